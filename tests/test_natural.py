"""Natural gradients on all paths of a world, where the oracle's are theirs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_batch import ENV, MDP, POLICY, even_params, every_path, flat, packed

from jaxpg import exact
from jaxpg.algos.base import make_task
from jaxpg.algos.natural import ENACConfig, NPGConfig, enac, npg
from jaxpg.exact.dynamic import log_probs_per_obs

pytestmark = pytest.mark.usefixtures("float64")

TASK = make_task(ENV, POLICY)
NPG = NPGConfig(
    baseline="none",
    max_kl=None,
    learning_rate=0.5,
    cg_iterations=50,
    damping=0.02,
    chunk_size=None,
)
ENAC = ENACConfig(
    max_kl=None, learning_rate=0.5, cg_iterations=50, damping=0.02, chunk_size=None
)
MAKERS = {NPGConfig: npg, ENACConfig: enac}
change = dataclasses.replace


@functools.cache
def updater(config):
    algorithm = MAKERS[type(config)](config, TASK)
    run = jax.jit(algorithm.update)

    def update(rows):
        state = algorithm.init(jax.random.key(0), jnp.int32(0))
        state, info = run(jax.random.key(1), state._replace(params=even_params()), rows)
        return flat(state.params), {name: np.asarray(x) for name, x in info.items()}

    return update


def whole_episodes():
    return every_path()._replace(next_obs=None)


@pytest.mark.parametrize("config", [NPG, ENAC], ids=["npg", "enac"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.thinned(2)
def test_the_step_is_the_exact_natural_gradient(config, pack):
    """Scores have mean 0 over all paths, so eNAC's regression has F for its matrix."""
    expected = exact.natural_gradient(MDP, POLICY, even_params(), damping=0.02)
    rows = packed(whole_episodes(), 2) if pack else whole_episodes()
    params, info = updater(config)(rows)
    assert np.linalg.norm(flat(expected)) > 0.5
    np.testing.assert_allclose(params, 0.5 * flat(expected), rtol=1e-6, atol=1e-8)
    assert info["cg_residual"] < 1e-5
    plain = flat(exact.policy_gradient(MDP, POLICY, even_params()))
    cosine = plain @ params / np.linalg.norm(plain) / np.linalg.norm(params)
    assert cosine < 0.99, "the natural gradient must be another direction"


@pytest.mark.parametrize("config", [NPG, ENAC], ids=["npg", "enac"])
def test_without_damping_it_is_the_pseudoinverse(config):
    expected = exact.natural_gradient(MDP, POLICY, even_params())
    params, _ = updater(change(config, damping=0.0))(whole_episodes())
    np.testing.assert_allclose(params, 0.5 * flat(expected), rtol=1e-5, atol=1e-7)


def test_a_constant_reward_moves_enac_nowhere():
    """Its offset is a baseline: without one the returns' mean would be in the way."""
    rows = whole_episodes()
    first = jnp.arange(3) == 0
    rewards = jnp.where(first[None], 100.0, 0.0) + 0.0 * rows.reward
    params, _ = updater(ENAC)(rows._replace(reward=rewards))
    np.testing.assert_allclose(params, 0.0, atol=1e-10)


@pytest.mark.parametrize("config", [NPG, ENAC], ids=["npg", "enac"])
@pytest.mark.parametrize("max_kl", [1e-4, 1e-2])
def test_a_step_by_kl_makes_that_kl(config, max_kl):
    params, info = updater(change(config, max_kl=max_kl))(whole_episodes())
    rows = whole_episodes()
    _, unravel = jax.flatten_util.ravel_pytree(even_params())
    old = log_probs_per_obs(MDP, POLICY, even_params())
    new = log_probs_per_obs(MDP, POLICY, unravel(jnp.asarray(params)))
    gaps = np.asarray(jnp.sum(jnp.exp(old) * (old - new), axis=1))
    kl = gaps[np.asarray(rows.obs)][np.asarray(rows.mask)].mean()
    np.testing.assert_allclose(info["kl"], kl, rtol=1e-8)
    # To second order: what is left falls with the step.
    np.testing.assert_allclose(kl, max_kl, rtol=3 * np.sqrt(max_kl))


def test_npg_by_kl_is_per_decision():
    """Damping is then in units of a mean over decisions, as TRPO's."""
    length = float(jnp.sum(exact.occupancies(MDP, POLICY, even_params())))
    expected = exact.natural_gradient(MDP, POLICY, even_params(), damping=0.05 * length)
    found, _ = updater(change(NPG, max_kl=1e-3, damping=0.05))(whole_episodes())
    direction = flat(expected) / np.linalg.norm(flat(expected))
    np.testing.assert_allclose(found / np.linalg.norm(found), direction, rtol=1e-6)


def test_a_foreign_baseline_may_be_given():
    from jaxpg.baselines import no_baseline

    algorithm = npg(change(NPG, baseline="optimal"), TASK, baseline=no_baseline())
    state = algorithm.init(jax.random.key(0), jnp.int32(0))
    state = state._replace(params=even_params())
    state, _ = jax.jit(algorithm.update)(jax.random.key(1), state, whole_episodes())
    np.testing.assert_allclose(flat(state.params), updater(NPG)(whole_episodes())[0])


def test_numbers_that_are_none_are_counted():
    rows = whole_episodes()
    spoilt = rows._replace(reward=rows.reward.at[0, 0].set(jnp.nan))
    for config in (NPG, ENAC):
        _, info = updater(config)(spoilt)
        assert info["non_finite_batch"] == 1
        assert info["non_finite_gradient"] > 0 or config is ENAC


@pytest.mark.parametrize("kind", [NPGConfig, ENACConfig])
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_kl": 0.0}, r"^max_kl is 0.0, needs a number in \(0"),
        ({"damping": -0.1}, "^damping is -0.1, needs"),
        ({"cg_iterations": 0}, "^cg_iterations is 0, needs a whole number"),
        ({"discount": 2.0}, "^discount is 2.0, needs"),
    ],
)
def test_wrong_settings_are_refused(kind, settings, sentence, monkeypatch):
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        kind(**settings)


@pytest.mark.parametrize("config", [NPG, ENAC], ids=["npg", "enac"])
def test_episodes_without_a_bound_are_refused(config):
    with pytest.raises(ValueError, match="has no time limit, so whole episodes may"):
        MAKERS[type(config)](config, TASK._replace(max_steps=None))
