"""Returns by hand, joined episodes against separate ones, and the edges."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxpg.returns import (
    at_episode_start,
    episode_returns,
    leading_discounts,
    rewards_to_go,
    step_discounts,
    suffix_recurrence,
)


def row(*values):
    return jnp.array(values, float)


def flags(*values):
    return jnp.array(values, bool)


def unchecked(fn):
    """As users have it, without the shape checker that the tests wrap around it."""
    return inspect.unwrap(fn)


# The recurrence.


def test_suffix_recurrence_by_hand():
    x = suffix_recurrence(row(1, 2, 3), row(0.5, 0.25, 2.0), 10.0)
    # x2 = 3 + 2 * 10 = 23; x1 = 2 + 23 / 4 = 7.75; x0 = 1 + 7.75 / 2 = 4.875
    np.testing.assert_allclose(x, [4.875, 7.75, 23.0])


@pytest.mark.parametrize("final", [0.0, 4.0])
def test_one_decision(final):
    x = suffix_recurrence(row(3.0), row(0.5), final)
    np.testing.assert_allclose(x, [3.0 + 0.5 * final])


def test_no_decision_at_all_gives_an_empty_row():
    assert suffix_recurrence(row(), row(), 1.0).shape == (0,)


def reference(increments, decays, final):
    x = np.empty_like(increments)
    later = final
    for t in reversed(range(len(increments))):
        later = x[t] = increments[t] + decays[t] * later
    return x


@st.composite
def inputs(draw):
    shape = draw(st.integers(1, 9))
    numbers = st.floats(-10, 10, width=32)
    increments, decays = (
        draw(hnp.arrays(np.float64, shape, elements=numbers)) for _ in range(2)
    )
    return increments, decays / 10, draw(numbers)


@settings(max_examples=60, deadline=None)
@given(inputs())
def test_suffix_recurrence_equals_a_loop(case):
    with jax.enable_x64(True):
        x = jax.jit(suffix_recurrence)(*map(jnp.asarray, case))
    np.testing.assert_allclose(x, reference(*case), rtol=1e-12, atol=1e-12)


def test_its_derivative_is_the_product_of_decays():
    # dx0 / d increments = (1, d0, d0 d1); dx0 / d final = d0 d1 d2
    decays = row(0.5, 0.25, 2.0)
    of_increments, of_final = jax.grad(
        lambda x, final: suffix_recurrence(x, decays, final)[0], (0, 1)
    )(row(1, 2, 3), jnp.array(10.0))
    np.testing.assert_allclose(of_increments, [1.0, 0.5, 0.125])
    np.testing.assert_allclose(of_final, 0.25)


# Two episodes, (1, 2) and (3, 4, 5), then an empty slot; discount 1/2.

REWARDS = row(1, 2, 3, 4, 5, 0)
ENDS = flags(0, 1, 0, 0, 1, 0)
MASK = flags(1, 1, 1, 1, 1, 0)
TIME = jnp.array([0, 1, 0, 1, 2, 3])


def test_step_discounts_by_hand():
    discounts = step_discounts(ENDS, MASK, 0.5)
    np.testing.assert_array_equal(discounts, [0.5, 0, 0.5, 0.5, 0, 0])


def test_rewards_to_go_by_hand():
    rewards_left = rewards_to_go(REWARDS, step_discounts(ENDS, MASK, 0.5))
    # 1 + 2/2 = 2, 2;  5, 4 + 5/2 = 6.5, 3 + 6.5/2 = 6.25
    np.testing.assert_allclose(rewards_left, [2, 2, 6.25, 6.5, 5, 0])


def test_episode_returns_by_hand():
    returns = episode_returns(REWARDS, step_discounts(ENDS, MASK, 0.5), TIME)
    # 1 + 2/2 = 2;  3 + 4/2 + 5/4 = 6.25
    np.testing.assert_allclose(returns[:5], [2, 2, 6.25, 6.25, 6.25])


def test_the_value_after_an_unfinished_row_reaches_its_last_episode_only():
    discounts = step_discounts(flags(0, 1, 0, 0), jnp.ones(4, bool), 0.5)
    # 4 + 8/2 = 8, 3 + 8/2 = 7;  2, 1 + 2/2 = 2
    np.testing.assert_allclose(
        rewards_to_go(row(1, 2, 3, 4), discounts, 8.0), [2, 2, 7, 8]
    )


def test_at_episode_start_by_hand():
    values = row(7, 8, 9, 10, 11)
    time = jnp.array([3, 4, 0, 1, 0])  # an episode from an earlier row comes first
    np.testing.assert_array_equal(at_episode_start(values, time), [7, 7, 9, 9, 11])


@pytest.mark.parametrize("discount", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["rewards_to_go", "episode_returns"])
def test_joined_episodes_equal_separate_ones(name, discount):
    lengths = [1, 4, 2]
    rewards = jax.random.normal(jax.random.key(0), (sum(lengths) + 2,))
    time = jnp.concatenate([jnp.arange(n) for n in [*lengths, 2]])
    ends = jnp.isin(jnp.arange(9), jnp.cumsum(jnp.array(lengths)) - 1)
    mask = jnp.arange(9) < sum(lengths)

    def credit(steps):
        discounts = step_discounts(ends[steps], mask[steps], discount)
        given = jnp.where(mask, rewards, 0.0)[steps]
        if name == "rewards_to_go":
            return rewards_to_go(given, discounts)
        return episode_returns(given, discounts, time[steps])

    joined = credit(slice(None))
    first = 0
    for length in lengths:
        steps = slice(first, first + length)
        np.testing.assert_allclose(joined[steps], credit(steps), rtol=1e-6)
        first += length


def test_a_row_of_empty_slots_is_zero():
    nothing = jnp.zeros(4, bool)
    discounts = step_discounts(nothing, nothing, 1.0)
    np.testing.assert_array_equal(discounts, np.zeros(4))
    zeros, time = jnp.zeros(4), jnp.zeros(4, int)
    np.testing.assert_array_equal(rewards_to_go(zeros, discounts, 5.0), zeros)
    np.testing.assert_array_equal(episode_returns(zeros, discounts, time), zeros)


def test_an_end_in_an_empty_slot_changes_nothing():
    wild = ENDS.at[-1].set(True)
    np.testing.assert_array_equal(
        step_discounts(wild, MASK, 0.5), step_discounts(ENDS, MASK, 0.5)
    )


# Leading discounts.


@pytest.mark.parametrize(
    ("discount", "factors"),
    [(0.0, [1, 0, 0, 1]), (1.0, [1, 1, 1, 1]), (0.5, [1, 0.5, 0.25, 1])],
)
@pytest.mark.parametrize("traced", [False, True])
def test_leading_discounts_also_at_their_limits(discount, factors, traced):
    time = jnp.array([0, 1, 2, 0])
    if traced:
        answer = jax.jit(leading_discounts)(time, jnp.array(discount))
    else:
        answer = leading_discounts(time, discount)
    np.testing.assert_allclose(answer, factors)
    assert answer.dtype == jnp.zeros(()).dtype


def test_leading_discounts_turn_one_convention_into_the_other():
    """sum_t d^t r_t is the reward-to-go at 0; d^t G_t is its tail, by definition."""
    discounts = step_discounts(ENDS, MASK, 0.5)
    tail = leading_discounts(TIME, 0.5) * rewards_to_go(REWARDS, discounts)
    # tails of 1 + 1 and of 3 + 2 + 5/4
    np.testing.assert_allclose(tail[:5], [2, 1, 6.25, 3.25, 1.25])


# Errors, dtypes, vmap.


@pytest.mark.parametrize("discount", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize(
    "call",
    [
        lambda discount: step_discounts(ENDS, MASK, discount),
        lambda discount: leading_discounts(TIME, discount),
    ],
)
def test_discounts_outside_their_range_are_refused(call, discount):
    with pytest.raises(ValueError, match=r"^discount is .*, needs a number in \[0, 1"):
        call(discount)


TWO_ROWS = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: unchecked(suffix_recurrence)(TWO_ROWS, TWO_ROWS),
            r"^increments has shape \(2, 3\), needs \(T,\) = one row; .* jax.vmap",
        ),
        (
            lambda: unchecked(suffix_recurrence)(jnp.ones(3), jnp.ones(2)),
            r"^decays has shape \(2,\), but increments has shape \(3,\)",
        ),
        (
            lambda: unchecked(at_episode_start)(jnp.ones(3), jnp.zeros(2, int)),
            r"^time has shape \(2,\), but values has shape \(3,\)",
        ),
        (
            lambda: unchecked(suffix_recurrence)(jnp.ones(3), jnp.ones(3), jnp.ones(2)),
            r"^final has shape \(2,\), needs \(\)",
        ),
        (
            lambda: unchecked(at_episode_start)(TWO_ROWS, jnp.zeros((2, 3), int)),
            r"^values has shape \(2, 3\), needs \(T,\) = one row",
        ),
    ],
)
def test_wrong_shapes_are_refused_by_name(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_double_precision_is_kept(float64):
    discounts = step_discounts(ENDS, MASK, 0.1)
    credit = episode_returns(jnp.asarray(REWARDS, jnp.float64), discounts, TIME)
    assert credit.dtype == jnp.float64
    # 3 + 0.4 + 0.05
    np.testing.assert_allclose(credit[2:5], 3.45, rtol=1e-15)


def test_a_batch_by_vmap_equals_row_by_row():
    rewards = jax.random.normal(jax.random.key(0), (3, 6))
    discounts = jnp.stack([step_discounts(ENDS, MASK, d) for d in (0.0, 0.5, 1.0)])
    batch = jax.jit(jax.vmap(rewards_to_go))(rewards, discounts)
    for i in range(3):
        expected = reference(*map(np.asarray, (rewards[i], discounts[i])), 0.0)
        np.testing.assert_allclose(batch[i], expected, rtol=1e-5, atol=1e-6)
