"""GPOMDP: against rewards-to-go trajectory by trajectory, and against linear algebra.

The stationary distribution, the lag terms and the limit are computed here in float64.
The one sampled test says its size, its seed and its z-score.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import exact
from jaxpg.eligibility import (
    RunningMean,
    gpomdp_init,
    gpomdp_update,
    merge_means,
)
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import random_mdp, tabular_environment
from jaxpg.gradients import trajectory_gradients
from jaxpg.heads import categorical_head
from jaxpg.policies import from_apply, log_prob_fn
from jaxpg.returns import rewards_to_go, step_discounts
from jaxpg.rollout import rollout_segments, start_segments
from jaxpg.types import Trajectory

NUM_STATES, NUM_ACTIONS = 3, 2


def tabular_policy():
    def init(key, obs):
        return jax.random.normal(key, (NUM_STATES, NUM_ACTIONS))

    head = categorical_head(Discrete(NUM_ACTIONS))
    return from_apply(init, lambda table, state: table[state], head)


POLICY = tabular_policy()
LOG_PROBS = log_prob_fn(POLICY)


def some_params():
    return POLICY.init(jax.random.key(0), jnp.zeros((), jnp.int32))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def stream(row, beta=0.7, state=None, params=None):
    """The state after a row, from the very beginning unless told otherwise."""
    params = some_params() if params is None else params
    state = gpomdp_init(params) if state is None else state
    return update(params, state, row, beta)


@jax.jit
def update(params, state, row, beta):
    return gpomdp_update(LOG_PROBS, params, state, row, beta)


def random_rows(num_rows=3, length=12, seed=0):
    """Rows that hold several episodes each, the last of them unfinished."""
    rng = np.random.default_rng(seed)
    ends = rng.random((num_rows, length)) < 0.3
    time = np.zeros((num_rows, length), np.int32)
    for t in range(1, length):
        time[:, t] = np.where(ends[:, t - 1], 0, time[:, t - 1] + 1)
    return Trajectory(
        obs=jnp.asarray(rng.integers(NUM_STATES, size=ends.shape), jnp.int32),
        action=jnp.asarray(rng.integers(NUM_ACTIONS, size=ends.shape), jnp.int32),
        log_prob=jnp.zeros(ends.shape),
        reward=jnp.asarray(rng.normal(size=ends.shape), float),
        terminated=jnp.asarray(ends),
        truncated=jnp.zeros(ends.shape, bool),
        mask=jnp.ones(ends.shape, bool),
        time=jnp.asarray(time),
        episode_id=jnp.zeros(ends.shape, jnp.int32),
    )


def at(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


# By hand, and what it sums up to.


def test_by_hand():
    """Scores of a unit Gaussian at mean 0 are the actions themselves: 1, 2, 3, 5."""
    row = Trajectory(
        obs=jnp.zeros(4),
        action=jnp.array([1.0, 2.0, 3.0, 5.0]),
        log_prob=jnp.zeros(4),
        reward=jnp.array([10.0, 20.0, -1.0, 4.0]),
        terminated=jnp.array([False, True, False, False]),
        truncated=jnp.zeros(4, bool),
        mask=jnp.array([True, True, True, True]),
        time=jnp.array([0, 1, 0, 1]),
        episode_id=jnp.array([0, 0, 1, 1]),
    )
    mean = jnp.array(0.0)

    def log_probs(mean, row):
        return -0.5 * (row.action - mean) ** 2

    state = gpomdp_update(log_probs, mean, gpomdp_init(mean), row, 0.5)
    # z = 1, 2 + 1/2 = 2.5; reset: 3, 5 + 3/2 = 6.5
    # (10 * 1 + 20 * 2.5 - 1 * 3 + 4 * 6.5) / 4 = (10 + 50 - 3 + 26) / 4 = 20.75
    np.testing.assert_allclose(state.trace, 6.5)
    np.testing.assert_allclose(state.estimate.mean, 20.75)
    assert state.estimate.num_decisions == 4


def test_at_beta_1_it_is_reward_to_go_trajectory_by_trajectory(float64):
    """sum_t r[t] z[t] = sum_t grad log pi[t] G[t] on every path, not on average."""
    mdp = random_mdp(5, NUM_STATES, NUM_ACTIONS, horizon=3)
    paths = exact.enumerate_trajectories(mdp).trajectories
    params = some_params()

    def weights(row):
        rewards = jnp.where(row.mask, row.reward, 0.0)
        to_go = rewards_to_go(rewards, step_discounts(row.ends, row.mask, 1.0))
        return jnp.where(row.mask, to_go, 0.0)

    def total(row):
        estimate = stream(row, 1.0, params=params).estimate
        count = estimate.num_decisions.astype(float)
        return jax.tree.map(lambda x: x * count, estimate.mean)

    ours = jax.vmap(total)(paths)
    theirs = trajectory_gradients(LOG_PROBS, params, paths, jax.vmap(weights)(paths))
    assert not np.asarray(paths.mask).all(), "some paths must end early"
    np.testing.assert_allclose(flat(ours), flat(theirs), rtol=1e-11, atol=1e-12)


def test_packed_episodes_at_beta_1_are_reward_to_go_too(float64):
    """Traces are reset at starts: no reward is owed to an earlier episode."""
    rows, params = random_rows(), some_params()

    def weights(row):
        return rewards_to_go(row.reward, step_discounts(row.ends, row.mask, 1.0))

    theirs = trajectory_gradients(LOG_PROBS, params, rows, jax.vmap(weights)(rows))
    for i in range(3):
        estimate = stream(at(rows, i), 1.0, params=params).estimate
        np.testing.assert_allclose(
            12 * flat(estimate.mean), flat(at(theirs, i)), rtol=1e-11, atol=1e-12
        )


def test_beta_0_credits_a_decision_with_its_own_reward_only():
    rows, params = random_rows(), some_params()
    theirs = trajectory_gradients(LOG_PROBS, params, rows, rows.reward)
    estimate = stream(at(rows, 0), 0.0).estimate
    np.testing.assert_allclose(
        12 * flat(estimate.mean), flat(at(theirs, 0)), rtol=1e-5, atol=1e-6
    )


# One stream, however it is cut, masked or merged.


def assert_same(one, other, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, other)


@pytest.mark.parametrize("piece", [1, 5])
def test_one_piece_at_a_time_is_the_same_as_all_at_once(piece):
    row = at(random_rows(), 0)
    state = None
    for first in range(0, 12, piece):
        state = stream(at(row, slice(first, first + piece)), state=state)
    assert_same(state, stream(row), rtol=1e-6, atol=1e-7)
    assert state.estimate.num_decisions == 12


def test_masked_decisions_count_nothing_whatever_they_hold():
    row = at(random_rows(), 0)
    real = np.flatnonzero(np.arange(12) % 3 != 1)
    mask = jnp.isin(jnp.arange(12), real)
    starts = row.time == 0
    row = row._replace(time=jnp.where(mask, row.time, 0), mask=mask)
    wild = row._replace(reward=jnp.where(mask, row.reward, jnp.nan))
    assert bool(jnp.any(starts[real])) and not bool(jnp.all(starts[real]))
    expected = stream(at(row._replace(mask=jnp.ones(12, bool)), real))
    assert_same(stream(wild), expected, rtol=1e-6, atol=1e-7)
    assert stream(wild).estimate.num_decisions == len(real)


def test_an_empty_row_changes_nothing():
    state = stream(at(random_rows(), 0))
    nothing = at(random_rows(seed=1), 0)._replace(mask=jnp.zeros(12, bool))
    assert_same(stream(nothing, state=state), state, rtol=0)
    assert_same(stream(at(nothing, slice(0, 0)), state=state), state, rtol=0)


def test_slots_are_updated_by_vmap_and_merged_by_count():
    rows, params = random_rows(), some_params()
    lengths = jnp.array([12, 0, 5])
    rows = rows._replace(mask=jnp.arange(12)[None] < lengths[:, None])
    slots = jax.vmap(gpomdp_init, None, axis_size=3)(params)
    after = jax.vmap(update, (None, 0, 0, None))(params, slots, rows, 0.7)
    merged = merge_means(after.estimate)
    # The same decisions as one stream of whole segments, traces begun anew at each.
    joined = at(rows, 0)._replace(time=rows.time[0].at[0].set(0))
    tail = at(rows, 2)._replace(time=rows.time[2].at[0].set(0))
    state = stream(tail, state=stream(joined))
    assert_same(merged, state.estimate, rtol=1e-5, atol=1e-7)
    assert merged.num_decisions == 17


def test_merges_may_be_merged():
    means = {"w": jnp.array([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]])}
    estimates = RunningMean(means, jnp.array([1, 2, 5]))
    first = merge_means(jax.tree.map(lambda x: x[:2], estimates))
    rest = jax.tree.map(lambda x: x[2], estimates)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), first, rest)
    # (1 + 2 * 3 + 5 * 7) / 8 = 42/8, (2 + 2 * 5 + 5 * 11) / 8 = 67/8
    for merged in (merge_means(stacked), merge_means(estimates)):
        np.testing.assert_allclose(merged.mean["w"], [5.25, 8.375], rtol=1e-6)
        assert merged.num_decisions == 8


def test_merging_nothing_gives_zero():
    estimates = RunningMean(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))
    merged = merge_means(estimates)
    np.testing.assert_array_equal(merged.mean, np.zeros(3))
    assert merged.num_decisions == 0


def test_memory_does_not_grow_with_the_row():
    """Scores are never stacked: temporary memory at T = 4096 is that at T = 64."""
    params = {"w": jnp.zeros((64, 64))}

    def log_probs(params, row):
        return jnp.sum(jnp.tanh(row.obs @ params["w"]), axis=-1)

    def temporary_bytes(length):
        row = at(random_rows(1, length), 0)._replace(obs=jnp.ones((length, 64)))

        def run(state, row):
            return gpomdp_update(log_probs, params, state, row, 0.9)

        compiled = jax.jit(run).lower(gpomdp_init(params), row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(64), temporary_bytes(4096)
    assert few > 64 * 64 * 4, "it must at least hold a trace"
    assert many < 1.2 * few


# Against the stationary law of an endless world.

BETA = 0.5


class Endless:
    """A world that never ends, started in its stationary distribution; float64."""

    def __init__(self, horizon):
        mdp = random_mdp(5, NUM_STATES, NUM_ACTIONS, horizon, num_terminal=0)
        self.params = some_params()
        self.pi = exact.action_probabilities(mdp, POLICY, self.params)
        self.moves = jnp.einsum("sa,sax->sx", self.pi, mdp.transition)
        # d (P - I) = 0 and sum d = 1, as one overdetermined system.
        lhs = np.concatenate([np.asarray(self.moves).T - np.eye(NUM_STATES), [[1] * 3]])
        d = np.linalg.lstsq(lhs, np.array([0.0, 0.0, 0.0, 1.0]), rcond=None)[0]
        self.mdp = mdp._replace(initial=jnp.asarray(d / d.sum()))

    def lag_gradients(self, length):
        """g[k] = E[grad log pi[0] r[k]] = sum d(s) grad pi(a | s) E[r[k] | s, a]."""
        jacobian = jax.jacobian(
            lambda params: exact.action_probabilities(self.mdp, POLICY, params)
        )(self.params)["network"]
        d, moves, rewards = (
            np.asarray(x) for x in (self.mdp.initial, self.moves, self.mdp.reward)
        )
        value = np.sum(np.asarray(self.pi) * rewards, axis=1)
        lags = []
        for _ in range(length):
            lags.append(np.einsum("s,sa...,sa->...", d, jacobian, rewards).ravel())
            rewards = np.asarray(self.mdp.transition) @ value
            value = moves @ value
        return np.array(lags)

    def mean_after(self, length, beta):
        """1/T sum_k (T - k) beta^k g[k]."""
        k = np.arange(length)
        return (length - k) / length * beta**k @ self.lag_gradients(length)

    def limit(self, beta):
        """d^T (grad P) J_beta on the chain of (state, action) pairs."""
        size = NUM_STATES * NUM_ACTIONS
        rewards = self.mdp.reward.reshape(size)

        def chain(params):
            pi = exact.action_probabilities(self.mdp, POLICY, params)
            return jnp.einsum("sax,xb->saxb", self.mdp.transition, pi).reshape(
                size, size
            )

        p = chain(self.params)
        d = (self.mdp.initial[:, None] * self.pi).reshape(size)
        j_beta = jnp.linalg.solve(jnp.eye(size) - beta * p, rewards)
        return flat(jax.grad(lambda params: d @ chain(params) @ j_beta)(self.params))

    def average_reward_gradient(self):
        """grad eta by central differences of the stationary mean reward."""

        def eta(table):
            pi = jax.nn.softmax(table, axis=1)
            moves = jnp.einsum("sa,sax->sx", pi, self.mdp.transition)
            law = jnp.linalg.matrix_power(moves, 2**12)[0]
            return law @ jnp.sum(pi * self.mdp.reward, axis=1)

        table, step = self.params["network"], 1e-5
        return np.array(
            [
                (eta(table.at[i].add(step)) - eta(table.at[i].add(-step))) / (2 * step)
                for i in np.ndindex(*table.shape)
            ]
        )


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_exact_mean_after_four_decisions_is_the_sum_over_lags(beta, float64):
    world = Endless(horizon=4)

    def estimate(rows):
        # An endless stream: `truncated` at the horizon is the enumeration's, not ours.
        return stream(at(rows, 0), beta, params=world.params).estimate.mean

    mean = exact.expected_estimate(estimate, world.mdp, POLICY, world.params, 1)
    expected = world.mean_after(4, beta)
    assert np.linalg.norm(expected) > 1e-2
    np.testing.assert_allclose(flat(mean), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.6, 0.9])
def test_the_sum_over_lags_tends_to_the_gradient_at_beta(beta, float64):
    """They differ by 1/T sum_k k beta^k g[k], and by lags beyond T."""
    world, k, length = Endless(horizon=4), np.arange(400), 1e6
    lags = world.lag_gradients(400)
    limit = world.limit(beta)
    np.testing.assert_allclose(beta**k @ lags, limit, rtol=1e-10, atol=1e-12)
    long = (length - k) / length * beta**k @ lags
    missing = k * beta**k @ lags / length
    np.testing.assert_allclose(limit - long, missing, rtol=1e-3, atol=1e-13)


def test_the_limit_is_biased_and_the_bias_vanishes_as_beta_goes_to_1(float64):
    world = Endless(horizon=4)
    gradient = world.average_reward_gradient()
    scale = np.linalg.norm(gradient)
    errors = [
        np.linalg.norm(world.limit(beta) - gradient) / scale
        for beta in (0.0, 0.9, 1 - 1e-6)
    ]
    assert errors[0] > 1e-2
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 1e-5


def test_a_long_run_agrees_with_the_limit(float64):
    """64 slots of 4096 decisions, key 1: |mean - limit| below 4 standard errors.

    Slots are independent, so their spread gives the standard error; begun in the
    stationary law, they are 1/T * sum_k k beta^k g[k] off the limit, far below it.
    """
    num_slots, length = 64, 4096
    world = Endless(horizon=10**9)
    env, key = tabular_environment(world.mdp), jax.random.key(1)

    @jax.jit
    def run(params):
        start = start_segments(env, POLICY, key, num_slots)
        rows, _ = rollout_segments(
            env, POLICY, params, key, start, length, keep_next_obs=False
        )
        slots = jax.vmap(lambda row: stream(row, BETA, params=params))(rows)
        return slots.estimate.mean["network"], merge_means(slots.estimate)

    slots, merged = run(world.params)
    assert merged.num_decisions == num_slots * length
    slots = np.asarray(slots).reshape(num_slots, -1)
    error = slots.std(axis=0, ddof=1) / np.sqrt(num_slots)
    limit = world.limit(BETA)
    z = (merged.mean["network"].reshape(-1) - limit) / error
    assert np.abs(z).max() < 4.0
    early = np.abs(world.mean_after(length, BETA) - limit)
    assert np.all(early < 0.5 * error)
    # It could have failed: the first lag alone, or no discount, is far away.
    for other in (world.limit(0.0), world.limit(0.99)):
        assert np.abs((other - limit) / error).max() > 10.0


# Errors.


@pytest.mark.parametrize(
    ("change", "beta", "words"),
    [
        (lambda rows: rows, 0.5, r"^row.reward has shape \(3, 12\), needs .*vmap"),
        (lambda rows: at(rows, 0), 1.5, r"^beta is 1.5, needs a number in \[0, 1\]"),
        (
            lambda rows: at(rows, 0)._replace(carry=jnp.zeros(2)),
            0.5,
            r"^row.carry is a memory, needs None.*rewards_to_go",
        ),
        (
            lambda rows: at(rows, 0)._replace(mask=jnp.ones(3, bool)),
            0.5,
            r"^row.mask has shape \(3,\), but row.reward has shape",
        ),
    ],
)
def test_wrong_input_is_refused(change, beta, words):
    # Unwrapped: as users have it, without the tests' shape checker.
    call = inspect.unwrap(gpomdp_update)
    params = some_params()
    with pytest.raises(ValueError, match=words):
        call(LOG_PROBS, params, gpomdp_init(params), change(random_rows()), beta)


def test_means_that_are_not_stacked_are_refused():
    with pytest.raises(
        ValueError, match=r"^num_decisions has shape \(\), needs \(B,\)"
    ):
        merge_means(gpomdp_init(jnp.zeros(2)).estimate)
