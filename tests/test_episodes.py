"""Packed episodes split up are the episodes that one-per-row rollouts give."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.credit import CreditConfig, credit_of
from jaxpg.distributions import Categorical
from jaxpg.envs.tabular import canonical_mdp, tabular_environment
from jaxpg.episodes import split_episodes
from jaxpg.policies import Policy, log_prob_fn, tabular_policy
from jaxpg.rollout import rollout_episodes
from jaxpg.types import Trajectory

MDP = canonical_mdp()
ENV = tabular_environment(MDP)
KEY = jax.random.key(0)
NUMBER = 11


def quick(function, *arguments):
    """`jit` for programs that run once: compiling them costs more than running."""
    compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return compiled(*arguments)


def wavering_policy():
    """Remembers what it saw and leans the other way the next time."""

    def step(params, carry, obs):
        logits = params[obs] + jnp.stack([carry, -carry])
        return Categorical(logits), 0.5 * carry + obs.astype(float) + 1.0

    def unroll(params, row):
        def visit(carry, inputs):
            obs, is_first = inputs
            carry = jnp.where(is_first, 0.0, carry)
            distribution, carry = step(params, carry, obs)
            return carry, distribution.logits

        _, logits = jax.lax.scan(visit, row.carry, (row.obs, row.time == 0))
        return Categorical(logits)

    def init(key, obs):
        return jax.random.normal(key, (3, 2))

    return Policy(init, lambda: jnp.zeros(()), step, unroll, is_recurrent=True)


POLICIES = {
    "memoryless": tabular_policy(ENV.observation_space, ENV.action_space),
    "recurrent": wavering_policy(),
}


@functools.cache
def rollout(name="memoryless", num_slots=None):
    policy = POLICIES[name]

    def roll():
        params = policy.init(jax.random.key(1), jnp.array(0, jnp.int32))
        ids = jnp.arange(5, 5 + NUMBER, dtype=jnp.int32)
        rows = rollout_episodes(
            ENV, policy, params, KEY, ids, num_slots=num_slots, keep_next_obs=True
        )
        if policy.is_recurrent:
            carry = jnp.zeros(rows.mask.shape[0])
            rows = rows._replace(carry=carry)
        return params, rows

    return quick(roll)


split_jitted = jax.jit(
    split_episodes,
    static_argnums=(1, 2),
    compiler_options={"xla_backend_optimization_level": 0},
)


def split(rows, number=NUMBER, max_steps=MDP.horizon):
    return split_jitted(rows, number, max_steps)


def facts(rows, episode):
    """All that is recorded of one episode's decisions, wherever they stand."""
    where = np.asarray(rows.mask & (rows.episode_id == episode))
    rows = rows._replace(carry=None)
    return jax.tree.map(lambda x: np.asarray(x)[where], rows)


def ids_of(rows):
    """The episodes in the order in which rows hold them."""
    return np.asarray(rows.episode_id)[np.asarray(rows.starts)].tolist()


@pytest.mark.parametrize(
    ("name", "num_slots"),
    [
        ("memoryless", 1),
        ("memoryless", 3),
        ("memoryless", NUMBER),
        ("recurrent", 2),
    ],
)
def test_split_rows_are_the_rollout_with_one_episode_per_row(name, num_slots):
    _, apart = rollout(name)
    _, packed = rollout(name, num_slots)
    rows = split(packed)
    assert rows.mask.shape == (NUMBER, MDP.horizon)
    assert sorted(ids_of(rows)) == ids_of(apart) == list(range(5, 5 + NUMBER))
    assert ids_of(rows) == ids_of(packed), "in the order in which rows hold them"
    lengths = set()
    for episode in ids_of(rows):
        own, expected = facts(rows, episode), facts(apart, episode)
        chex.assert_trees_all_equal(
            own._replace(log_prob=0), expected._replace(log_prob=0)
        )
        np.testing.assert_allclose(own.log_prob, expected.log_prob, rtol=1e-6)
        lengths.add(len(own.time))
    assert len(lengths) > 1, "so that there is something to split"


def test_one_row_holds_one_episode_and_then_nothing():
    rows = split(rollout(num_slots=3)[1])
    steps = np.arange(MDP.horizon)
    np.testing.assert_array_equal(rows.time, np.tile(steps, (NUMBER, 1)))
    lengths = np.asarray(rows.mask).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(rows.mask, steps < lengths)
    assert (np.asarray(rows.ends).sum(axis=1) == 1).all()
    assert (np.asarray(rows.starts).sum(axis=1) == 1).all()


@pytest.mark.parametrize(("name", "num_slots"), [("memoryless", 3), ("recurrent", 2)])
def test_the_policy_sees_in_split_rows_what_it_saw_when_it_acted(name, num_slots):
    params, packed = rollout(name, num_slots)
    rows = split(packed)
    fn = jax.vmap(log_prob_fn(POLICIES[name]), (None, 0))
    mask = np.asarray(rows.mask)
    again = np.asarray(quick(fn, params, rows))
    np.testing.assert_allclose(again[mask], rows.log_prob[mask], rtol=1e-5, atol=1e-6)
    assert np.ptp(again[mask]) > 0.1


def test_credit_of_split_rows_is_credit_of_packed_ones():
    packed = rollout(num_slots=3)[1]
    rows = split(packed)
    config = CreditConfig(discount=0.5, keep_leading_discount=True)
    value, split_value = (
        quick(lambda x: credit_of(x, config).value, some) for some in (packed, rows)
    )
    for episode in ids_of(rows):
        np.testing.assert_allclose(
            split_value[rows.mask & (rows.episode_id == episode)],
            value[packed.mask & (packed.episode_id == episode)],
        )


@pytest.mark.parametrize("number", [1, 4])
def test_fewer_rows_than_episodes_hold_the_first_ones(number):
    packed = rollout(num_slots=3)[1]
    few, every = split(packed, number), split(packed)
    chex.assert_trees_all_equal(few, jax.tree.map(lambda x: x[:number], every))


def test_more_rows_than_episodes_are_masked_altogether():
    packed = rollout(num_slots=3)[1]
    many = split(packed, NUMBER + 5)
    assert not many.mask[NUMBER:].any() and not many.starts[NUMBER:].any()
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[:NUMBER], many), split(packed))


def hand_made(time, mask):
    """Rows whose rewards say where they stood: 10 * row + slot; a carry per row."""
    time, mask = jnp.array(time), jnp.array(mask, bool)
    number, length = time.shape
    tens = jnp.arange(10 * number, step=10, dtype=float)
    x = tens[:, None] + jnp.broadcast_to(jnp.arange(length, dtype=float), mask.shape)
    no, ids = jnp.zeros(mask.shape, bool), x.astype(int) - time
    image = jnp.broadcast_to(x[..., None, None], (*x.shape, 2, 3))
    carry = {"h": jnp.stack([tens, -tens], axis=1), "c": tens}
    return Trajectory({"image": image}, x, x, x, no, no, mask, time, ids, x, carry)


#     row 0:  -- -- -- --      row 1:  A0 A1 B0 --      row 2:  C0 D0 D1 D2
ROWS = hand_made(
    time=[[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 2]],
    mask=[[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
)


@pytest.mark.parametrize("split_it", [split_episodes, split_jitted])
def test_by_hand(split_it):
    rows = split_it(ROWS, 5, 3)
    stood = np.where(rows.mask, rows.reward, -1)
    expected = [[10, 11, -1], [12, -1, -1], [20, -1, -1], [21, 22, 23], [-1, -1, -1]]
    np.testing.assert_array_equal(stood, expected)
    image = np.asarray(rows.obs["image"])
    assert image.shape == (5, 3, 2, 3)
    np.testing.assert_array_equal(image[rows.mask][:, 1, 2], rows.reward[rows.mask])
    np.testing.assert_array_equal(rows.next_obs, rows.reward)
    np.testing.assert_array_equal(rows.episode_id[:4, 0], [10, 12, 20, 21])


def test_each_episode_takes_its_rows_carry_along():
    rows = split(ROWS, 4, 3)
    np.testing.assert_array_equal(rows.carry["c"], [10, 10, 20, 20])
    np.testing.assert_array_equal(
        rows.carry["h"], [[10, -10], [10, -10], [20, -20], [20, -20]]
    )
    without = split(ROWS._replace(carry=None, next_obs=None), 4, 3)
    assert without.carry is None and without.next_obs is None


def test_other_lengths_than_the_longest_episode():
    short = split(ROWS, 4, 2)
    stood = np.where(short.mask, short.reward, -1)
    np.testing.assert_array_equal(stood, [[10, 11], [12, -1], [20, -1], [21, 22]])
    long = split(ROWS, 4, 9)  # longer than the rows themselves
    assert np.asarray(long.mask).sum(axis=1).tolist() == [2, 1, 1, 3]
    np.testing.assert_array_equal(long.time, np.tile(np.arange(9), (4, 1)))
    assert np.isfinite(long.reward).all()


def test_a_batch_without_an_episode_gives_masked_rows():
    rows = split(ROWS._replace(mask=jnp.zeros((3, 4), bool)), 2, 3)
    assert rows.mask.shape == (2, 3) and not rows.mask.any()


def test_the_rest_of_an_episode_that_began_before_the_row_is_left_out():
    rest = hand_made(time=[[4, 5, 0, 1]], mask=[[1, 1, 1, 1]])
    rows = split(rest, 2, 4)
    stood = np.where(rows.mask, rows.reward, -1)
    np.testing.assert_array_equal(stood, [[2, 3, -1, -1], [-1] * 4])


def test_an_episode_ends_at_a_slot_that_is_empty():
    """A masked slot whose time would continue the episode, as in a slot that waits."""
    waits = hand_made(time=[[0, 1, 2, 3]], mask=[[1, 1, 0, 0]])
    rows = split(waits, 1, 4)
    np.testing.assert_array_equal(rows.mask, [[True, True, False, False]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((ROWS, 0, 3), "num_episodes is 0, needs a whole number of at least 1"),
        ((ROWS, True, 3), "num_episodes is True, needs a whole number"),
        ((ROWS, 2, -1), "max_steps is -1, needs a whole number of at least 1"),
        ((jax.tree.map(lambda x: x[0], ROWS), 2, 3), r"mask has shape \(4,\), needs"),
    ],
)
def test_wrong_input_is_refused(arguments, words):
    call = inspect.unwrap(split_episodes)  # without the tests' shape checker
    with pytest.raises(ValueError, match=words):
        call(*arguments)
