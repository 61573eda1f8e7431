"""TRPO's step against the exact one, and when it makes none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_batch import ENV, MDP, POLICY, even_params, every_path, flat

from jaxpg import exact
from jaxpg.algos.base import make_task
from jaxpg.algos.trpo import TRPOConfig, thinned, trpo
from jaxpg.exact.dynamic import log_probs_per_obs
from jaxpg.networks import mlp_network
from jaxpg.rollout import rollout_segments, start_segments
from jaxpg.train.sharding import place

pytestmark = pytest.mark.usefixtures("float64")

CRITIC = mlp_network(ENV.observation_space, 1, hidden=(), output_scale=1.0)
TASK = make_task(ENV, POLICY, critic=CRITIC)
# A critic that has learned nothing says 0: advantages are rewards-to-go.
EXACT = TRPOConfig(
    num_steps=3,
    discount=1.0,
    lambda_=1.0,
    standardize=False,
    cg_iterations=50,
    max_kl=1e-3,
    damping=0.05,
    critic_epochs=1,
    chunk_size=None,
)
change = dataclasses.replace


@functools.cache
def updater(config):
    run = jax.jit(trpo(config, TASK).update)

    def update(state, rows):
        state, info = run(jax.random.key(1), state, rows)
        return state, {name: np.asarray(x) for name, x in info.items()}

    return update


def first_state(config, params=None):
    state = trpo(config, TASK).init(jax.random.key(0), jnp.int32(0))
    return state._replace(params=even_params() if params is None else params)


def kl_of(old, new, rows):
    """Mean over real decisions, from the tables alone."""
    before, after = (log_probs_per_obs(MDP, POLICY, x) for x in (old, new))
    gaps = np.asarray(jnp.sum(jnp.exp(before) * (before - after), axis=1))
    return gaps[np.asarray(rows.obs)][np.asarray(rows.mask)].mean()


def surrogate_of(params, rows, advantages):
    table = np.asarray(log_probs_per_obs(MDP, POLICY, params))
    rhos = np.exp(table[np.asarray(rows.obs), np.asarray(rows.action)] - rows.log_prob)
    return (rhos * advantages)[np.asarray(rows.mask)].mean()


def rewards_to_go(rows):
    rewards = np.where(rows.mask, rows.reward, 0.0)
    return rewards[:, ::-1].cumsum(1)[:, ::-1]


def exact_step(max_kl, damping):
    """sqrt(2 max_kl / x F x) x with F and g of the world itself, per decision."""
    params = even_params()
    length = float(jnp.sum(exact.occupancies(MDP, POLICY, params)))
    fisher = np.asarray(exact.fisher_matrix(MDP, POLICY, params)) / length
    gradient = flat(exact.policy_gradient(MDP, POLICY, params)) / length
    x = np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient)
    return np.sqrt(2 * max_kl / (x @ fisher @ x)) * x


@pytest.mark.parametrize("max_kl", [1e-3, 0.5])
@pytest.mark.thinned(2)
def test_the_step_is_the_exact_one(max_kl):
    config = change(EXACT, max_kl=max_kl)
    rows = every_path()
    after, info = updater(config)(first_state(config), rows)
    full = exact_step(max_kl, config.damping)
    _, unravel = jax.flatten_util.ravel_pytree(even_params())
    old, fraction, rejected = even_params(), 1.0, 0
    before = surrogate_of(old, rows, rewards_to_go(rows))
    while True:
        new = unravel(jnp.asarray(fraction * full))
        kl = kl_of(old, new, rows)
        gain = surrogate_of(new, rows, rewards_to_go(rows)) - before
        if kl <= max_kl and gain > 0:
            break
        fraction, rejected = fraction * config.shrink, rejected + 1
    np.testing.assert_allclose(
        flat(after.params), fraction * full, rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(info["step_fraction"], fraction, rtol=1e-9)
    assert info["rejected_steps"] == rejected and not info["no_step_found"]
    np.testing.assert_allclose(info["kl"], kl, rtol=1e-9)
    np.testing.assert_allclose(info["improvement"], gain, rtol=1e-6)
    assert info["cg_residual"] < 1e-5
    # The old J rises by about the surrogate's gain times the mean length.
    risen = exact.expected_return(MDP, POLICY, after.params) - 1.5
    assert risen > 0.0
    if max_kl == 1e-3:
        lengths = float(jnp.sum(exact.occupancies(MDP, POLICY, old)))
        np.testing.assert_allclose(risen, gain * lengths, rtol=0.1)
        np.testing.assert_allclose(kl / fraction**2, max_kl, rtol=0.1)


def test_no_step_of_this_kl_climbs_higher():
    """Against the surrogate's best on the KL's sphere, found by plain ascent."""
    config = change(EXACT, max_kl=1e-3, damping=1e-4)
    rows, old = every_path(), even_params()
    after, info = updater(config)(first_state(config), rows)
    gain = surrogate_of(after.params, rows, rewards_to_go(rows)) - surrogate_of(
        old, rows, rewards_to_go(rows)
    )
    _, unravel = jax.flatten_util.ravel_pytree(old)
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = flat(after.params) + 0.02 * rng.normal(size=6)
        scale = np.sqrt(info["kl"] / kl_of(old, unravel(jnp.asarray(other)), rows))
        new = unravel(jnp.asarray(other * scale))
        better = surrogate_of(new, rows, rewards_to_go(rows)) - surrogate_of(
            old, rows, rewards_to_go(rows)
        )
        # Tolerance: a KL that is only quadratic to second order.
        assert better < gain * 1.02


@pytest.mark.parametrize("every", [1, 2])
def test_the_kl_of_the_whole_batch_is_within_bounds(every):
    config = change(
        EXACT,
        max_kl=0.3,
        fisher_every=every,
        lambda_=0.9,
        standardize=True,
        damping=1e-3,
    )
    params = {"network": jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))}
    params = {**even_params(), **params}

    @jax.jit
    def collect(params):
        state = start_segments(ENV, POLICY, jax.random.key(5), 16)
        return rollout_segments(ENV, POLICY, params, jax.random.key(5), state, 4)[0]

    rows = collect(params)
    state = first_state(config, params)
    after, info = updater(config)(state, rows)
    kl = kl_of(params, after.params, rows)
    np.testing.assert_allclose(info["kl"], kl, rtol=1e-9)
    assert 0.05 < kl <= 0.3 and not info["no_step_found"]
    assert info["improvement"] > 0.01
    # The fisher of other rows makes another step.
    if every == 2:
        whole, _ = updater(change(config, fisher_every=1))(state, rows)
        assert np.abs(flat(whole.params) - flat(after.params)).max() > 1e-3


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("reward", [0.0, jnp.nan])
def test_without_anything_to_climb_the_parameters_stay_to_the_bit(reward):
    rows = every_path()
    rows = rows._replace(reward=jnp.full_like(rows.reward, reward))
    params = jax.tree.map(lambda x: x.at[0, 0].set(-0.0), even_params())
    state = first_state(EXACT, params)
    after, info = updater(EXACT)(state, rows)
    assert bits(after.params) == bits(params)
    assert info["no_step_found"] and info["step_fraction"] == info["kl"] == 0.0
    assert info["rejected_steps"] == EXACT.max_backtracks + 1
    assert (info["non_finite_batch"] > 0) == bool(np.isnan(reward))
    assert (info["non_finite_gradient"] > 0) == bool(np.isnan(reward))


def test_thinned_rows_are_every_nth_of_each_device():
    rows = every_path()
    one = thinned(TASK, rows, 3)
    np.testing.assert_array_equal(one.episode_id[:, 0], np.arange(0, 64, 3))
    assert thinned(TASK, rows, 1) is rows
    spread = TASK._replace(map_rows=place(4).map_rows)
    found = jax.jit(lambda rows: thinned(spread, rows, 3))(rows)
    expected = [start + i for start in (0, 16, 32, 48) for i in range(0, 16, 3)]
    np.testing.assert_array_equal(found.episode_id[:, 0], expected)


def test_a_kl_of_zero_is_refused(monkeypatch):
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(
        ValueError, match=r"^max_kl is 0.0, needs .*no step has a KL of"
    ):
        TRPOConfig(max_kl=0.0)
    with pytest.raises(ValueError, match=r"^fisher_every is 0, needs a whole number"):
        TRPOConfig(fisher_every=0)
    with pytest.raises(ValueError, match=r"^damping is -1.0, needs"):
        TRPOConfig(damping=-1.0)
