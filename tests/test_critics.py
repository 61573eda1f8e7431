"""Critics by hand, and against a loop that steps through rows decision by decision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg.critics import (
    actor_with_critic,
    critic_rows,
    critic_terms,
    follow_targets,
    init_critic,
    policy_rows,
    values_of,
)
from jaxpg.envs.base import Box, Discrete
from jaxpg.networks import Network, feedforward, gru_network, mlp_network
from jaxpg.policies import mlp_policy
from jaxpg.rollout import rollout_segments, start_segments
from jaxpg.train.sharding import place
from jaxpg.types import Trajectory
from jaxpg.value_functions import TargetStatistics

KEY = jax.random.key(3)

# V(o) = o[0]: values can be read off the observations.
IDENTITY = feedforward(lambda key, obs: jnp.ones(1), lambda scale, obs: scale * obs)


def sums():
    """A memory that adds up observations; V is the sum."""

    def step(params, carry, obs):
        carry = carry + params * obs
        return carry, carry

    def unroll(params, carry, obs, starts):
        def one(carry, at):
            obs, start = at
            carry = jnp.where(start, 0.0, carry) + params * obs
            return carry, carry

        _, carries = jax.lax.scan(one, carry, (obs, starts))
        return carries, carries

    return Network(
        lambda key, obs: jnp.ones(1), lambda: jnp.zeros(1), step, unroll, True
    )


def state_of(network, mean=0.0, variance=1.0):
    state = init_critic(network, optax.sgd(0.1), KEY, jnp.zeros(1))
    known = TargetStatistics(jnp.ones(()), jnp.array(mean), jnp.array(variance))
    return state._replace(targets=known)


def flags(*rows):
    return jnp.array(rows, bool)


def rows_of(obs, next_obs, terminated, truncated, mask, time):
    """Rows of observations that are one number."""
    obs, next_obs = jnp.array(obs, float)[..., None], jnp.array(next_obs, float)
    zeros = jnp.zeros(obs.shape[:2])
    return Trajectory(
        obs=obs,
        action=zeros,
        log_prob=zeros,
        reward=zeros,
        terminated=flags(*terminated),
        truncated=flags(*truncated),
        mask=flags(*mask),
        time=jnp.array(time, jnp.int32),
        episode_id=zeros.astype(jnp.int32),
        next_obs=next_obs[..., None],
    )


# One row for each way that a decision can be followed by nothing, next to each other.
BY_HAND = rows_of(
    obs=[[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 3, 4]],
    next_obs=[[2, 3, 4, 50]] + [[12, 13, 14, 15]] * 4,
    terminated=[[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]],
    truncated=[[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]],
    mask=[[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]],
    time=[[5, 6, 7, 8], [0, 1, 0, 1], [4, 0, 1, 0], [0, 1, 0, 0], [2, 0, 0, 0]],
)
NEXT_BY_HAND = [
    [2, 3, 4, 50],  # goes on, and beyond the row
    [2, 0, 4, 15],  # a true end in the middle
    [12, 3, 14, 15],  # three truncations, an episode of one decision last
    [2, 13, 0, 0],  # cut by an empty slot: somebody stopped there
    [12, 0, 0, 15],  # both flags at 1: terminated wins
]
VALUES_BY_HAND = [[1, 2, 3, 4]] * 3 + [[1, 2, 0, 0], [1, 2, 3, 4]]


def test_values_by_hand():
    values = values_of(IDENTITY, state_of(IDENTITY), BY_HAND)
    np.testing.assert_allclose(values.values, VALUES_BY_HAND)
    np.testing.assert_allclose(values.next_values, NEXT_BY_HAND)


def test_values_are_in_units_of_the_return():
    state = state_of(IDENTITY, mean=100.0, variance=4.0)
    values = values_of(IDENTITY, state, BY_HAND)
    real = np.asarray(BY_HAND.mask)
    expected = np.where(real, 100.0 + 2.0 * np.array(VALUES_BY_HAND), 0.0)
    np.testing.assert_allclose(values.values, expected, rtol=1e-6)
    some = np.array(NEXT_BY_HAND) > 0
    expected = np.where(some, 100.0 + 2.0 * np.array(NEXT_BY_HAND), 0.0)
    np.testing.assert_allclose(values.next_values, expected, rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_rows_at_once_changes_nothing(at_once):
    values = jax.jit(
        functools.partial(values_of, IDENTITY, state_of(IDENTITY), rows_at_once=at_once)
    )(BY_HAND)
    np.testing.assert_array_equal(values.values, VALUES_BY_HAND)
    np.testing.assert_array_equal(values.next_values, NEXT_BY_HAND)


def test_values_need_the_next_observations():
    with pytest.raises(ValueError, match=r"^rows have no next_obs, .*keep_next_obs"):
        values_of(IDENTITY, state_of(IDENTITY), BY_HAND._replace(next_obs=None))


def test_values_have_no_derivative():
    def total(params):
        state = state_of(IDENTITY)._replace(params=params)
        values = values_of(IDENTITY, state, BY_HAND)
        return jnp.sum(values.values + values.next_values)

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones(1)), [0.0])


def test_another_number_of_outputs_is_refused():
    network = mlp_network(Box(-1, 1, (1,)), 2, hidden=(2,))
    with pytest.raises(ValueError, match=r"^critic gives outputs of shape \(2,\)"):
        init_critic(network, optax.sgd(0.1), KEY, jnp.zeros(1))


def test_a_new_critic_values_everything_at_zero():
    state = init_critic(IDENTITY, optax.sgd(0.1), KEY, jnp.zeros(1))
    values = values_of(IDENTITY, state, BY_HAND)
    assert not np.asarray(values.values).any()
    assert not np.asarray(values.next_values).any()


# With memory.


def test_memory_by_hand():
    """V is the sum of what was seen since the episode began, 10 before the row."""
    rows = rows_of(
        obs=[[1, 2, 4, 8, 16]],
        next_obs=[[2, 100, 8, 200, 300]],
        terminated=[[0, 0, 0, 0, 0]],
        truncated=[[0, 1, 0, 1, 0]],
        mask=[[1, 1, 1, 1, 1]],
        time=[[3, 4, 0, 1, 0]],
    )._replace(carry=jnp.array([[10.0]]))
    network = sums()
    values = values_of(network, state_of(network), rows)
    np.testing.assert_allclose(values.values, [[11, 13, 4, 12, 16]])
    # 13 + 100 after the first truncation, 12 + 200 after the second, 16 + 300 last.
    np.testing.assert_allclose(values.next_values, [[13, 113, 12, 212, 316]])


SPACE = Box(-1.0, 1.0, (1,))
GRU = gru_network(SPACE, 1, hidden=(3,), memory=4, output_scale=1.0)


def random_rows(num_rows=8, num_steps=6, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_rows, num_steps)
    terminated, truncated = rng.random(shape) < 0.2, rng.random(shape) < 0.3
    ends, time = terminated | truncated, np.zeros(shape, np.int32)
    time[:, 0] = rng.integers(0, 2, num_rows) * 3
    for t in range(1, num_steps):
        time[:, t] = np.where(ends[:, t - 1], 0, time[:, t - 1] + 1)
    mask = np.arange(num_steps) < rng.integers(3, num_steps + 3, (num_rows, 1))
    rows = rows_of(
        rng.normal(size=shape),
        rng.normal(size=shape),
        terminated,
        truncated,
        mask,
        time,
    )
    return rows._replace(carry=jnp.asarray(rng.normal(size=(num_rows, 4)), float))


def stepwise(network, state, rows):
    """V and V' by `network.step` alone, one decision after the other."""
    step = jax.jit(network.step)
    mean, std = state.targets.mean, np.sqrt(state.targets.variance)

    def value(carry, obs):
        output, carry = step(state.params, carry, obs)
        return mean + std * output[0], carry

    shape = rows.mask.shape
    values, next_values = np.zeros(shape), np.zeros(shape)
    for b in range(shape[0]):
        carry = rows.carry[b]
        for t in range(shape[1]):
            if not rows.mask[b, t]:
                continue
            if rows.time[b, t] == 0:
                carry = network.initial_carry()
            values[b, t], carry = value(carry, rows.obs[b, t])
            ends = rows.terminated[b, t] or rows.truncated[b, t]
            last = t + 1 == shape[1] or not rows.mask[b, t + 1]
            # In the middle the next observation is the next slot's own.
            there = rows.next_obs if ends or last else rows.obs[:, 1:]
            if not rows.terminated[b, t]:
                next_values[b, t] = value(carry, there[b, t])[0]
    return values, next_values


@pytest.fixture(scope="module")
def recurrent():
    rows = random_rows()
    params = GRU.init(KEY, jnp.zeros(1))
    state = state_of(IDENTITY, mean=2.0, variance=9.0)._replace(params=params)
    return rows, state, stepwise(GRU, state, rows)


def test_a_recurrent_critic_is_stepping_by_hand(recurrent):
    rows, state, (values, next_values) = recurrent
    assert (np.asarray(rows.truncated & rows.mask).sum(1) > 1).any()
    found = jax.jit(functools.partial(values_of, GRU))(state, rows)
    np.testing.assert_allclose(found.values, values, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(found.next_values, next_values, rtol=2e-5, atol=1e-5)
    plain = jax.jit(functools.partial(values_of, GRU))(state, rows._replace(carry=None))
    assert (np.abs(plain.values - found.values) > 1e-3).any(), "memory must matter"


@pytest.mark.parametrize("at_once", [None, 3])
def test_devices_change_no_value(recurrent, at_once):
    rows, state, (values, next_values) = recurrent
    placement = place(4, num_rows=8)
    found = jax.jit(
        functools.partial(
            values_of, GRU, map_rows=placement.map_rows, rows_at_once=at_once
        )
    )(state, rows)
    np.testing.assert_allclose(found.values, values, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(found.next_values, next_values, rtol=2e-5, atol=1e-5)


# What it learns from.


def test_loss_by_hand():
    known = TargetStatistics(jnp.ones(()), jnp.array(1.0), jnp.array(4.0))
    targets = jnp.where(BY_HAND.mask, 5.0, 1e6)  # (5 - 1) / 2 = 2
    loss, slope = jax.value_and_grad(critic_terms, argnums=1)(
        IDENTITY, jnp.ones(1), known, BY_HAND, targets
    )
    # Four full rows of 1/2 ((1 - 2)^2 + 0 + (3 - 2)^2 + (4 - 2)^2), and one of 1/2.
    np.testing.assert_allclose(loss, 4 * 3.0 + 0.5, rtol=1e-6)
    # sum of (s o - 2) o at s = 1: -1 + 0 + 3 + 8, and -1.
    np.testing.assert_allclose(slope, [4 * 10.0 - 1.0], rtol=1e-6)


def test_loss_before_anything_varied_wants_zero():
    zero = jnp.zeros(())
    known = TargetStatistics(zero, zero, zero)
    loss = critic_terms(IDENTITY, jnp.ones(1), known, BY_HAND, jnp.full((5, 4), 7.0))
    # Of o^2 / 2: four rows of (1 + 4 + 9 + 16) / 2 and one of (1 + 4) / 2.
    np.testing.assert_allclose(loss, 4 * 15.0 + 2.5, rtol=1e-6)


def test_clipped_loss_by_hand():
    # Outputs 1, 2, 3, 4; standardised old values and targets (mean 10, std 2) below.
    known = TargetStatistics(jnp.ones(()), jnp.array(10.0), jnp.array(4.0))
    rows = jax.tree.map(lambda x: x[:1], BY_HAND)
    old = 10.0 + 2.0 * jnp.array([[1.2, 0.0, 0.0, 4.0]])
    targets = 10.0 + 2.0 * jnp.array([[0.0, 1.0, 5.0, 4.5]])

    def loss(params):
        return critic_terms(IDENTITY, params, known, rows, targets, old, 0.5)

    found, slope = jax.value_and_grad(loss)(jnp.ones(1))
    # 1: within 0.5 of the old one: (1 - 0)^2 = 1, slope 1
    # 2: held at 0.5: max((2 - 1)^2, (0.5 - 1)^2) = 1, slope (2 - 1) * 2
    # 3: held at 0.5: max((3 - 5)^2, (0.5 - 5)^2) = 20.25, slope 0: it may go no further
    # 4: unmoved: (4 - 4.5)^2 = 0.25, slope -0.5 * 4
    np.testing.assert_allclose(found, 0.5 * (1 + 1 + 20.25 + 0.25), rtol=1e-6)
    np.testing.assert_allclose(slope, [1.0 + 2.0 + 0.0 - 2.0], rtol=1e-5)
    plain = critic_terms(IDENTITY, jnp.ones(1), known, rows, targets, old, None)
    np.testing.assert_allclose(plain, 0.5 * (1 + 1 + 4 + 0.25), rtol=1e-6)


def test_statistics_of_targets_by_hand():
    state = init_critic(IDENTITY, optax.sgd(0.1), KEY, jnp.zeros(1))
    mask = flags([1, 1, 0], [1, 1, 0])
    first = follow_targets(
        state, jnp.array([[1.0, 3.0, jnp.nan], [5.0, 7.0, 9e9]]), mask
    )
    # Mean 4, variance 5: whole at first, whatever is kept.
    np.testing.assert_allclose(first.targets[1:], [4.0, 5.0], rtol=1e-5)
    second = follow_targets(first, jnp.full((2, 3), 14.0), mask)
    # Weights 0.99 * 0.01 and 0.01: the new batch counts 1 / 1.99.
    share = 1 / 1.99
    variance = (1 - share) * 5.0 + share * (1 - share) * 10.0**2
    np.testing.assert_allclose(second.targets.mean, 4.0 + 10.0 * share, rtol=1e-4)
    np.testing.assert_allclose(second.targets.variance, variance, rtol=1e-4)
    assert second.params is state.params


# Who acts beside it.


def test_without_memory_the_actor_is_the_policy():
    policy = mlp_policy(SPACE, Discrete(2), hidden=(2,))
    assert actor_with_critic(policy, IDENTITY) is policy
    rows = BY_HAND._replace(carry=jnp.ones((5, 1)))
    assert critic_rows(IDENTITY, rows).carry is None
    assert policy_rows(IDENTITY, rows).carry is rows.carry


def test_the_actor_carries_the_critics_memory():
    """Two segments: V at the second's first decision knows what the first one saw."""
    from jaxpg.envs.probes import remember_first

    env = remember_first(5)
    policy = mlp_policy(env.observation_space, env.action_space, hidden=(2,))
    actor = actor_with_critic(policy, GRU)
    assert actor.is_recurrent
    params = actor.init(KEY, jnp.zeros(1))

    @jax.jit
    def collect(params):
        state = start_segments(env, actor, KEY, 4)
        first, state = rollout_segments(env, actor, params, KEY, state, 3)
        second, _ = rollout_segments(env, actor, params, KEY, state, 3)
        return first, second

    first, second = collect(params)
    assert second.carry.keys() == {"policy", "critic"}
    carries = jax.vmap(GRU.unroll, (None, 0, 0, 0))(
        params["critic"], first.carry["critic"], first.obs, first.starts
    )[1]
    np.testing.assert_allclose(second.carry["critic"], carries[:, -1], atol=1e-6)
    assert policy_rows(GRU, second).carry is None
    np.testing.assert_array_equal(
        critic_rows(GRU, second).carry, second.carry["critic"]
    )
    log_probs = jax.vmap(actor.unroll, (None, 0))(params, second).log_prob(
        second.action
    )
    np.testing.assert_allclose(log_probs, second.log_prob, rtol=1e-5)
