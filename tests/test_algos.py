"""The algorithm contract, and learning on worlds whose optimum is known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg import exact
from jaxpg.algos.base import AlgorithmState, ascend, make_task
from jaxpg.algos.measures import count_non_finite
from jaxpg.algos.reinforce import (
    ReinforceConfig,
    reinforce,
    reinforce_gradient,
)
from jaxpg.credit import CreditConfig, credit_of
from jaxpg.envs.probes import PROBES
from jaxpg.envs.tabular import random_mdp, tabular_environment
from jaxpg.estimators import BASELINES, make_estimator
from jaxpg.policies import mlp_policy
from jaxpg.rollout import rollout_episodes
from jaxpg.types import Trajectory

KEY = jax.random.key(0)


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


MDP = random_mdp(0, num_states=3, horizon=4)
ENV = tabular_environment(MDP)
POLICY = mlp_policy(ENV.observation_space, ENV.action_space, hidden=(4,))
TASK = make_task(ENV, POLICY, num_updates=10)


def batch(params, num_episodes=12, num_slots=5):
    ids = jnp.arange(num_episodes, dtype=jnp.int32)
    return quick(
        lambda params: rollout_episodes(
            ENV, POLICY, params, KEY, ids, num_slots=num_slots
        )
    )(params)


def first_state(algorithm):
    return quick(algorithm.init)(KEY, jnp.array(0, jnp.int32))


SETTINGS = {
    **{
        name: ReinforceConfig(baseline=name)
        for name in BASELINES
        if not name.endswith(("-plain", "-termwise", "-folds"))
    },
    "total-return": ReinforceConfig(credit="total-return", discount=0.9),
    "clipped-annealed": ReinforceConfig(anneal=True, max_grad_norm=0.1),
    "biased": ReinforceConfig(
        standardize=True, keep_leading_discount=True, discount=0.9, chunk_size=None
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.thinned(8)
def test_contract(name):
    algorithm = reinforce(SETTINGS[name], TASK)
    state = first_state(algorithm)
    assert isinstance(state, AlgorithmState)
    trajectories = batch(state.params)
    chex.clear_trace_counter()
    update = jax.jit(
        chex.assert_max_traces(algorithm.update, n=1),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    before = state
    for i in range(3):
        state, info = update(jax.random.fold_in(KEY, i), state, trajectories)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    assert jax.tree.structure(before) == jax.tree.structure(state)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, state)
    assert any(jax.tree.leaves(moved.params))
    assert all(x.shape == () and np.isfinite(x) for x in info.values())
    assert info["non_finite_gradient"] == info["non_finite_params"] == 0


def test_one_update_is_the_gradient_and_one_optax_step():
    config = ReinforceConfig(learning_rate=0.1, baseline="none")
    algorithm = reinforce(config, TASK)
    state = first_state(algorithm)
    trajectories = batch(state.params)
    after, info = quick(algorithm.update)(KEY, state, trajectories)
    estimator = make_estimator(config.estimator, POLICY, ENV.max_steps)
    gradient = quick(
        lambda params: reinforce_gradient(
            estimator, params, (), trajectories, ENV.max_steps
        )
    )(state.params)
    np.testing.assert_allclose(info["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    # Adam's first step: learning_rate * g / (|g| + 1e-8), upwards.
    expected = jax.tree.map(
        lambda x, g: x + 0.1 * g / (np.abs(g) + 1e-8), state.params, gradient
    )
    chex.assert_trees_all_close(after.params, expected, rtol=1e-3, atol=1e-4)


def test_info_by_hand():
    config = ReinforceConfig(baseline="none")
    algorithm = reinforce(config, TASK)
    state = first_state(algorithm)
    trajectories = batch(state.params)
    _, info = quick(algorithm.update)(KEY, state, trajectories)
    mask = np.asarray(trajectories.mask)
    entropy = -np.asarray(trajectories.log_prob)[mask].mean()
    np.testing.assert_allclose(info["entropy"], entropy, rtol=1e-5)
    assert 0.5 < entropy < np.log(2) + 0.1


def test_non_finite_numbers_are_counted_and_not_raised():
    algorithm = reinforce(ReinforceConfig(), TASK)
    state = first_state(algorithm)
    trajectories = batch(state.params)
    spoilt = trajectories._replace(reward=trajectories.reward.at[0, 0].set(jnp.nan))
    _, info = quick(algorithm.update)(KEY, state, spoilt)
    assert info["non_finite_gradient"] > 0 and info["non_finite_params"] > 0
    assert info["non_finite_batch"] == 1


def test_clipping_bounds_the_global_norm_and_keeps_the_direction():
    """Through plain SGD, for Adam hides the length: it is the chain that is tested."""
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    clip = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    zero = jax.tree.map(jnp.zeros_like, gradient)
    moved, _ = ascend(clip, gradient, clip.init(zero), zero)
    chex.assert_trees_all_close(
        moved, {"a": jnp.array([0.6, 0.0]), "b": jnp.array(0.8)}, rtol=1e-6
    )


def test_the_learning_rate_falls_to_zero_over_the_run():
    config = ReinforceConfig(anneal=True, learning_rate=0.1)
    algorithm = reinforce(config, make_task(ENV, POLICY, num_updates=2))
    state = first_state(algorithm)
    trajectories = batch(state.params)
    update, sizes = quick(algorithm.update), []
    for _ in range(3):
        after, _ = update(KEY, state, trajectories)
        steps = jax.tree.map(jnp.subtract, after.params, state.params)
        sizes.append(max(np.abs(x).max() for x in jax.tree.leaves(steps)))
        state = after
    # Adam moves its largest entries by the rate itself: 0.1, 0.05, 0.
    np.testing.assert_allclose(sizes, [0.1, 0.05, 0.0], rtol=0.05, atol=1e-9)


def test_count_non_finite():
    tree = {"a": jnp.array([1.0, jnp.nan, -jnp.inf]), "b": jnp.zeros((2, 2))}
    assert count_non_finite(tree) == 2


# Credit.


def test_credit_of_packed_rows_by_hand():
    # Episodes (1, 2) and (4), then an empty slot that holds 100; discount 1/2.
    flags = lambda *x: jnp.array([x], bool)  # noqa: E731
    zeros = jnp.zeros((1, 4))
    rows = Trajectory(
        zeros,
        zeros,
        zeros,
        jnp.array([[1.0, 2.0, 4.0, 100.0]]),
        flags(0, 1, 0, 0),
        flags(0, 0, 1, 1),
        flags(1, 1, 1, 0),
        jnp.array([[0, 1, 0, 0]]),
        jnp.array([[0, 0, 1, 0]]),
    )
    # 1 + 2/2 = 2, 2, 4

    def value(**settings):
        credit = credit_of(rows, CreditConfig(**settings))
        np.testing.assert_array_equal(credit.reach, rows.mask)
        return credit.value[0]

    np.testing.assert_allclose(value(discount=0.5), [2, 2, 4, 0])
    total = value(credit="total-return", discount=0.5)
    np.testing.assert_allclose(total, [2, 2, 4, 0])
    # undiscounted: 3, 2, 4 and 3, 3, 4
    np.testing.assert_allclose(value(), [3, 2, 4, 0])
    np.testing.assert_allclose(value(credit="total-return"), [3, 3, 4, 0])


@pytest.mark.parametrize("baseline", ["time-dependent", "optimal", "per-parameter"])
@pytest.mark.thinned(2)
def test_packing_does_not_change_the_gradient(baseline):
    config = ReinforceConfig(baseline=baseline)
    algorithm = reinforce(config, TASK)
    state = first_state(algorithm)
    updates = [
        quick(algorithm.update)(KEY, state, batch(state.params, num_slots=slots))
        for slots in (2, 12)
    ]
    (_, packed), (_, one_per_row) = updates
    np.testing.assert_allclose(packed["grad_norm"], one_per_row["grad_norm"], rtol=1e-4)


# Learning.


def learn(env, config, num_updates, num_episodes=64):
    """Train a tiny policy in one scan; the mean reward of an episode at its end."""
    policy = mlp_policy(env.observation_space, env.action_space, hidden=(8,))
    task = make_task(env, policy, num_updates=num_updates)
    algorithm = reinforce(config, task)
    ids = jnp.arange(num_episodes, dtype=jnp.int32)

    def update(state, key):
        rows = rollout_episodes(env, policy, state.params, key, ids, num_slots=16)
        reward = jnp.sum(jnp.where(rows.mask, rows.reward, 0.0)) / num_episodes
        state, info = algorithm.update(key, state, rows)
        return state, (reward, info["non_finite_params"])

    @jax.jit
    def run(key):
        state = algorithm.init(key, env.reset(key)[1])
        return jax.lax.scan(update, state, jax.random.split(key, num_updates))

    state, (rewards, broken) = run(KEY)
    assert not broken.any()
    return policy, state, np.asarray(rewards)


@pytest.mark.parametrize(
    ("name", "before", "optimum"),
    [
        ("Probe-ActionDependentReward-v0", 0.0, 1.0),
        ("Probe-ObsAndActionReward-v0", 0.0, 1.0),
        # Uniform start N(0, 1): -(1 + 0.25); the learned scale must shrink.
        ("Probe-MatchingNumber-v0", -1.25, 0.0),
        ("Probe-DelayedReward-v0", 1.0, 1.0),
    ],
)
@pytest.mark.thinned(2)
def test_probe_worlds_are_solved(name, before, optimum):
    config = ReinforceConfig(learning_rate=0.03)
    _, _, rewards = learn(PROBES[name](), config, 200)
    np.testing.assert_allclose(rewards[0], before, atol=0.7)
    np.testing.assert_allclose(rewards[-20:].mean(), optimum, atol=0.1)


def test_a_tabular_world_is_solved_to_its_exact_optimum():
    policy, state, _ = learn(ENV, ReinforceConfig(learning_rate=0.03), 200)
    learned = exact.expected_return(MDP, policy, state.params)
    values = np.zeros(3)  # of the best policy, by backward induction
    best = []
    for _ in range(MDP.horizon):
        future = np.where(MDP.terminal, 0.0, values)
        values = np.max(np.asarray(MDP.reward) + MDP.transition @ future, axis=1)
        best.append(values @ np.asarray(MDP.initial))
    assert best[-1] - 0.1 < learned <= best[-1] + 1e-5
    uniform = exact.expected_return(
        MDP, policy, jax.tree.map(jnp.zeros_like, state.params)
    )
    assert uniform < best[-1] - 0.3, "so that the test can fail"


# What is refused.


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"episodes_per_env": 0}, "^episodes_per_env is 0, needs a whole number"),
        (
            {"credit": "reward-togo"},
            "^credit is 'reward-togo', unknown; .*reward-to-go",
        ),
        (
            {"baseline": "leave-one"},
            "^baseline is 'leave-one', unknown; .*leave-one-out",
        ),
        ({"discount": 1.5}, r"^discount is 1.5, needs a number in \[0, 1\]"),
        ({"learning_rate": 0.0}, r"^learning_rate is 0.0, needs a number in \(0"),
        ({"max_grad_norm": -1.0}, r"^max_grad_norm is -1.0, needs a number in \(0"),
        ({"chunk_size": 0}, "^chunk_size is 0, needs a whole number"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence, monkeypatch):
    from jaxtyping import config

    # As users have it, without the shape checker that the tests wrap around it.
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        ReinforceConfig(**settings)


def test_annealing_over_a_run_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match=r"^anneal is set, but num_updates is None"):
        reinforce(ReinforceConfig(anneal=True), make_task(ENV, POLICY))


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        ReinforceConfig().discount = 0.5
