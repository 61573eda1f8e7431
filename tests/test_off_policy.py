"""Off-policy REINFORCE: whose decisions count how much, and when it stops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_batch import ENV, MDP, POLICY, even_params, every_path, flat, packed

from jaxpg import exact
from jaxpg.algos.base import make_task
from jaxpg.algos.behaviour import Behaviour
from jaxpg.algos.off_policy import OffPolicyConfig, off_policy
from jaxpg.algos.reinforce import ReinforceConfig, reinforce
from jaxpg.envs import make as make_env
from jaxpg.policies import mlp_policy
from jaxpg.rollout import rollout_episodes

pytestmark = pytest.mark.usefixtures("float64")

TASK = make_task(ENV, POLICY)
BASE = OffPolicyConfig(
    num_epochs=1, min_ess=0.0, baseline="none", learning_rate=0.1, chunk_size=None
)
change = dataclasses.replace
KEYS = functools.partial(jax.random.key, 3)


@functools.cache
def updater(config):
    make = reinforce if isinstance(config, ReinforceConfig) else off_policy
    run = jax.jit(make(config, TASK).update)

    def update(state, rows):
        state, info = run(KEYS(), state, rows)
        return state, {name: np.asarray(x) for name, x in info.items()}

    return update


def first_state(config, params=None):
    make = reinforce if isinstance(config, ReinforceConfig) else off_policy
    state = make(config, TASK).init(KEYS(), jnp.int32(0))
    return state._replace(params=even_params() if params is None else params)


def other_params():
    """A policy that is not the one that acted."""
    table = jnp.array([[0.4, -0.3], [-0.2, 0.9], [0.0, 0.5]])
    return {**even_params(), "network": table}


def rows_of():
    return every_path()._replace(next_obs=None)


def given_gradient(state):
    """What the first Adam step was given: its moment is a tenth of minus that."""
    kind = optax.ScaleByAdamState
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kind))
    (adam,) = (leaf for leaf in leaves if isinstance(leaf, kind))
    assert adam.count == 1
    return -10.0 * flat(adam.mu)


# The gradient of every step.


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "time-dependent", "discount": 0.9},
        {"baseline": "none", "credit": "total-return", "ratio": "whole"},
        {"baseline": "leave-one-out", "ratio": "causal"},
        {"baseline": "time-dependent", "standardize": True},
    ],
)
@pytest.mark.thinned(2)
def test_the_first_step_on_policy_is_reinforces(settings):
    config = change(BASE, **settings)
    shared = {name: x for name, x in settings.items() if name != "ratio"}
    plain = ReinforceConfig(learning_rate=0.1, chunk_size=None, **shared)
    rows = packed(rows_of(), 2)
    found, info = updater(config)(first_state(config), rows)
    expected, _ = updater(plain)(first_state(plain), rows)
    np.testing.assert_allclose(
        given_gradient(found), given_gradient(expected), rtol=1e-9, atol=1e-12
    )
    assert np.linalg.norm(given_gradient(found)) > 0.1
    np.testing.assert_allclose(info["ess"], 1.0, rtol=1e-12)
    assert info["steps_made"] == 1


def plain_first_order(params, rows):
    """The gradient of 1/N sum rho G, for the slope of rho is rho grad log pi."""
    rewards = jnp.where(rows.mask, rows.reward, 0.0)
    to_go = jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]

    def objective(params):
        table = jax.nn.log_softmax(params["network"])
        rhos = jnp.exp(table[rows.obs, rows.action] - rows.log_prob)
        return jnp.sum(jnp.where(rows.mask, rhos * to_go, 0.0)) / rows.mask.shape[0]

    return jax.grad(objective)(params)


def test_later_steps_are_taken_at_the_moved_parameters():
    config = change(BASE, num_epochs=3)
    state, info = updater(config)(first_state(config), rows_of())
    params, adam = even_params(), optax.adam(0.1)
    opt_state, norms = adam.init(params), []
    for _ in range(3):
        gradient = plain_first_order(params, rows_of())
        norms.append(optax.tree.norm(gradient))
        with jax.numpy_dtype_promotion("standard"):
            moves, opt_state = adam.update(
                jax.tree.map(jnp.negative, gradient), opt_state
            )
        params = optax.apply_updates(params, moves)
    np.testing.assert_allclose(flat(state.params), flat(params), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(info["grad_norm"], np.mean(norms), rtol=1e-9)
    table = jax.nn.log_softmax(state.params["network"])
    gaps = np.asarray(jnp.sum(0.5 * (jnp.log(0.5) - table), axis=1))
    kl = gaps[np.asarray(rows_of().obs)][np.asarray(rows_of().mask)].mean()
    np.testing.assert_allclose(info["kl"], kl, rtol=1e-9)


@pytest.mark.parametrize(
    ("ratio", "limit"),
    [
        ("causal", "exact"),
        ("whole", "exact"),
        ("future-dropped", "values of the behaviour"),
        ("first-order", "states and values of the behaviour"),
    ],
)
@pytest.mark.thinned(2)
def test_the_expected_gradient_from_somebody_elses_episodes(ratio, limit):
    """The batch holds every path of the even policy in proportion: it is the mean."""
    target, even = other_params(), even_params()
    config = change(BASE, ratio=ratio)
    state, info = updater(config)(first_state(config, target), rows_of())
    gradient = exact.policy_gradient(MDP, POLICY, target)
    expected = {
        "exact": gradient,
        "values of the behaviour": exact.mixed_gradient(
            MDP, POLICY, target, target, even
        ),
        "states and values of the behaviour": exact.mixed_gradient(
            MDP, POLICY, target, even, even
        ),
    }
    found = given_gradient(state)
    np.testing.assert_allclose(found, flat(expected[limit]), rtol=1e-9, atol=1e-12)
    if limit != "exact":
        assert np.linalg.norm(found - flat(gradient)) > 1e-2
    assert 0.1 < info["ess"] < 0.99


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": "causal", "keep_leading_discount": True, "discount": 0.9},
        {"baseline": "per-parameter"},
        {"baseline": "optimal-time"},
    ],
)
@pytest.mark.thinned(2)
def test_neither_chunks_nor_packing_change_it(settings):
    config = change(BASE, num_epochs=3, **settings)
    whole, info = updater(config)(first_state(config), rows_of())
    cut = change(config, chunk_size=3)
    found, cut_info = updater(cut)(first_state(cut), packed(rows_of(), 2))
    np.testing.assert_allclose(flat(found.params), flat(whole.params), rtol=1e-9)
    np.testing.assert_allclose(cut_info["ess"], info["ess"], rtol=1e-9)
    assert info["steps_made"] == 3 and info["ess"] < 0.999


def test_memory_does_not_grow_with_the_empty_room():
    """Decisions are weighed in chunks: activations of all slots never exist."""
    env = make_env("CartPole-v1", max_steps=20)
    policy = mlp_policy(env.observation_space, env.action_space, hidden=(64,))
    algorithm = off_policy(OffPolicyConfig(), make_task(env, policy))
    state = algorithm.init(KEYS(), env.reset(KEYS())[1])

    def working_bytes(num_envs):
        rows = jax.eval_shape(
            lambda: rollout_episodes(
                env, policy, state.params, KEYS(), jnp.arange(num_envs, dtype=jnp.int32)
            )
        )
        lowered = jax.jit(algorithm.update).lower(KEYS(), state, rows)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    more = working_bytes(256) - working_bytes(64)
    per_slot = more / (192 * 20)
    assert per_slot < 64 * 8, "less than one layer's activations, in float64"


# When it stops.


def ess_of(params, rows):
    table = jax.nn.log_softmax(params["network"])
    rhos = np.exp(table[rows.obs, rows.action] - rows.log_prob)[np.asarray(rows.mask)]
    return rhos.sum() ** 2 / (rhos**2).sum() / rhos.size


def test_it_stops_where_the_weights_are_worth_too_little():
    free = change(BASE, num_epochs=4)
    one = updater(BASE)(first_state(BASE), rows_of())[0].params
    ess = ess_of(one, rows_of())
    assert 0.5 < ess < 0.999
    for min_ess, made in ((ess + 1e-9, 1), (ess - 1e-9, 2)):
        config = change(free, min_ess=float(min_ess))
        state, info = updater(config)(first_state(config), rows_of())
        assert info["steps_made"] >= made if made > 1 else info["steps_made"] == 1
        if made == 1:
            np.testing.assert_allclose(flat(state.params), flat(one), rtol=1e-12)
            np.testing.assert_allclose(info["ess"], ess, rtol=1e-9)
            assert np.linalg.norm(given_gradient(state)) > 0.1, "of one step alone"


def test_discounts_are_no_ratios():
    """On policy every decision is worth one, however little it counts by discount^t."""
    config = change(
        BASE, min_ess=0.9, discount=0.2, keep_leading_discount=True, num_epochs=1
    )
    _, info = updater(config)(first_state(config), rows_of())
    np.testing.assert_allclose(info["ess"], 1.0, rtol=1e-12)
    assert info["steps_made"] == 1


def test_a_member_that_has_stopped_tells_the_same_in_company():
    config = change(BASE, num_epochs=4, min_ess=0.999)
    algorithm = off_policy(config, TASK)
    idle = rows_of()._replace(reward=jnp.zeros_like(rows_of().reward))
    state = first_state(config)

    def both(rows):
        return jax.vmap(algorithm.update, (None, None, 0))(KEYS(), state, rows)

    states, infos = jax.jit(both)(
        jax.tree.map(lambda *x: jnp.stack(x), rows_of(), idle)
    )
    alone, info = updater(config)(state, rows_of())
    np.testing.assert_array_equal(infos["steps_made"], [1, 4])
    for name, value in info.items():
        np.testing.assert_allclose(infos[name][0], value, rtol=1e-9, err_msg=name)
    first = jax.tree.map(lambda x: x[0], states.params)
    np.testing.assert_allclose(flat(first), flat(alone.params), rtol=1e-12)


# Who collects.


def test_somebody_elses_policy_collects_and_stands_in_the_ratios():
    foreign = mlp_policy(ENV.observation_space, ENV.action_space, hidden=(2,))
    theirs = foreign.init(jax.random.key(9), jnp.int32(0))
    theirs = jax.tree.map(lambda x: x + 0.5, theirs)
    config = change(BASE, ratio="first-order")
    algorithm = off_policy(config, TASK, behaviour=Behaviour(foreign, theirs))
    state = algorithm.init(KEYS(), jnp.int32(0))
    assert algorithm.actor is foreign and algorithm.actor_params(state) is theirs

    @jax.jit
    def turn(state):
        ids = jnp.arange(16, dtype=jnp.int32)
        params = algorithm.actor_params(state)
        rows = rollout_episodes(ENV, algorithm.actor, params, KEYS(), ids)
        return rows, algorithm.update(KEYS(), state, rows)

    rows, (after, _) = turn(state)
    log_probs = jax.vmap(foreign.unroll, (None, 0))(theirs, rows).log_prob(rows.action)
    np.testing.assert_allclose(
        np.asarray(rows.log_prob)[np.asarray(rows.mask)],
        np.asarray(log_probs)[np.asarray(rows.mask)],
        rtol=1e-9,
    )
    expected = plain_first_order(state.params, rows)
    np.testing.assert_allclose(
        given_gradient(after), flat(expected), rtol=1e-9, atol=1e-12
    )
    assert algorithm.actor_params(after) is theirs


@pytest.mark.parametrize("lag", [1, 3])
def test_the_own_policy_is_renewed_every_so_many_updates(lag):
    config = change(BASE, behaviour_lag=lag)
    algorithm = off_policy(config, TASK)
    state, seen = first_state(config), []
    state = state._replace(behaviour=state.behaviour._replace(params=state.params))
    learned = [flat(state.params)]
    for _ in range(6):
        seen.append(flat(algorithm.actor_params(state)))
        state, _ = updater(config)(state, rows_of())
        learned.append(flat(state.params))
    for number, params in enumerate(seen):
        np.testing.assert_array_equal(params, learned[number - number % lag])
    assert np.abs(learned[0] - learned[3]).max() > 0.1


# What is counted and what is refused.


def test_numbers_that_are_none_are_counted():
    rows = rows_of()
    spoilt = rows._replace(reward=rows.reward.at[0, 0].set(jnp.nan))
    _, info = updater(BASE)(first_state(BASE), spoilt)
    assert info["non_finite_batch"] == 1
    assert info["non_finite_gradient"] > 0 and info["non_finite_params"] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ratio": "none"}, "^ratio is 'none', but later steps are off policy"),
        ({"ratio": "causl"}, "^ratio is 'causl', unknown; did you mean 'causal'"),
        ({"min_ess": 1.5}, r"^min_ess is 1.5, needs a number in \[0, 1\]"),
        ({"behaviour_lag": 0}, "^behaviour_lag is 0, needs a whole number"),
        ({"num_epochs": 0}, "^num_epochs is 0, needs a whole number"),
        ({"max_rho": 0.0}, r"^max_rho is 0.0, needs a number in \(0"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence, monkeypatch):
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        OffPolicyConfig(**settings)


def test_what_the_task_lacks_is_refused():
    with pytest.raises(ValueError, match="has no time limit, so whole episodes may"):
        off_policy(BASE, TASK._replace(max_steps=None))
    with pytest.raises(ValueError, match=r"^anneal is set, but num_updates is None"):
        off_policy(change(BASE, anneal=True), TASK)
