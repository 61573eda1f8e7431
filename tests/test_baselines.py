"""Baselines by hand on packed rows, and packing against one episode per row."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.baselines import (
    apply_baseline,
    batch_mean_baseline,
    constant_baseline,
    leave_one_out_baseline,
    no_baseline,
    time_dependent_baseline,
)
from jaxpg.credit import Credit
from jaxpg.envs import Discrete
from jaxpg.estimators import make_baseline
from jaxpg.policies import tabular_policy
from jaxpg.types import Trajectory

# Means: those that need scores are tested in test_optimal.py.
MEANS = [
    "time-dependent",
    "time-dependent-plain",
    "leave-one-out",
    "batch-mean",
    "none",
]
POLICY = tabular_policy(Discrete(2), Discrete(2))

MAX_STEPS = 3


def batch(time, mask, episode_id=None):
    """Rows with nothing in them but what baselines read."""
    time, mask = jnp.array(time), jnp.array(mask, bool)
    zeros, no = jnp.zeros(time.shape), jnp.zeros(time.shape, bool)
    ids = jnp.zeros(time.shape, int) if episode_id is None else episode_id
    return Trajectory(zeros, zeros, zeros, zeros, no, no, mask, time, ids)


# Three episodes on two rows: A of 2 decisions and B of 1; C of 3, then an empty slot.
#     row 0:  A0 A1 B0 --        row 1:  C0 C1 C2 --
PACKED = batch(
    time=[[0, 1, 0, 1], [0, 1, 2, 0]],
    mask=[[1, 1, 1, 0], [1, 1, 1, 0]],
)
# Empty slots hold numbers that would be seen in any sum.
CREDIT = jnp.array([[5.0, 3.0, 7.0, 100.0], [9.0, 6.0, 2.0, 200.0]])


def with_reach(credit, trajectories):
    """On policy: a reach of 1 on every decision, and none in empty slots."""
    mask = trajectories.mask
    return Credit(jnp.where(mask, credit, 0.0), mask.astype(credit.dtype))


@functools.partial(jax.jit, static_argnums=0)
def of_whole_batch(baseline, state, trajectories, credit):
    summary = baseline.summarize(None, trajectories, credit)
    return baseline.predict(None, state, summary, trajectories, credit)


def predict(baseline, trajectories=PACKED, credit=CREDIT):
    state = baseline.init(jax.random.key(0), jnp.zeros(1))
    with_ones = with_reach(credit, trajectories)
    prediction = of_whole_batch(baseline, state, trajectories, with_ones)
    assert prediction.shape == credit.shape and prediction.dtype == credit.dtype
    return np.where(trajectories.mask, prediction, np.nan)


def test_no_baseline_and_a_constant():
    np.testing.assert_array_equal(predict(no_baseline())[PACKED.mask], 0.0)
    np.testing.assert_array_equal(predict(constant_baseline(1.5))[PACKED.mask], 1.5)


def test_batch_mean_by_hand():
    # credit at the first decisions: A 5, B 7, C 9; (5 + 7 + 9) / 3 = 7
    np.testing.assert_allclose(predict(batch_mean_baseline())[PACKED.mask], 7.0)


def test_leave_one_out_by_hand():
    # A: (7 + 9) / 2 = 8;  B: (5 + 9) / 2 = 7;  C: (5 + 7) / 2 = 6
    expected = [[8, 8, 7, np.nan], [6, 6, 6, np.nan]]
    np.testing.assert_allclose(predict(leave_one_out_baseline()), expected)


def test_time_dependent_by_hand():
    # t = 0: A 5, B 7, C 9: others' means (7 + 9)/2 = 8, (5 + 9)/2 = 7, (5 + 7)/2 = 6
    # t = 1: A 3, C 6: others' means 6 and 3
    # t = 2: C alone: 0
    expected = [[8, 6, 7, np.nan], [6, 3, 0, np.nan]]
    np.testing.assert_allclose(predict(time_dependent_baseline(MAX_STEPS)), expected)


def test_time_dependent_with_the_own_credit_by_hand():
    # t = 0: (5 + 7 + 9) / 3 = 7;  t = 1: (3 + 6) / 2 = 4.5;  t = 2: 2
    expected = [[7, 4.5, 7, np.nan], [7, 4.5, 2, np.nan]]
    plain = time_dependent_baseline(MAX_STEPS, leave_one_out=False)
    np.testing.assert_allclose(predict(plain), expected)


@pytest.mark.parametrize(
    "baseline", [leave_one_out_baseline(), time_dependent_baseline(MAX_STEPS)]
)
def test_with_two_trajectories_each_gets_the_others_credit(baseline):
    two = batch(time=[[0, 1], [0, 1]], mask=[[1, 1], [1, 1]])
    credit = jnp.array([[4.0, 4.0], [6.0, 6.0]])
    np.testing.assert_allclose(predict(baseline, two, credit), [[6, 6], [4, 4]])


@pytest.mark.parametrize(
    "baseline", [leave_one_out_baseline(), time_dependent_baseline(MAX_STEPS)]
)
def test_a_single_trajectory_has_no_others_and_gets_zero(baseline):
    alone = batch(time=[[0, 1]], mask=[[1, 1]])
    prediction = predict(baseline, alone, jnp.array([[4.0, 3.0]]))
    np.testing.assert_array_equal(prediction, [[0.0, 0.0]])


@pytest.mark.parametrize("name", MEANS)
def test_an_empty_batch_gives_finite_numbers(name):
    empty = batch(time=[[0, 0]], mask=[[0, 0]])
    credit = with_reach(jnp.array([[3.0, 4.0]]), empty)
    prediction = of_whole_batch(make_baseline(name, POLICY, 2), (), empty, credit)
    assert np.isfinite(prediction).all()


LENGTHS = (2, 1, 3, 1, 1, 3)


def one_per_row():
    time = np.tile(np.arange(MAX_STEPS), (len(LENGTHS), 1))
    return batch(time, time < np.array(LENGTHS)[:, None])


def packed():
    """The same episodes three to a row, and where each decision came from."""
    first, second = (
        [(i, t) for i in row for t in range(LENGTHS[i])]
        for row in ((0, 1, 2), (3, 4, 5))
    )
    source = np.array([first, [*second, (0, 0)]])
    mask = np.array([[1] * 6, [1] * 5 + [0]])
    return batch(source[..., 1], mask), (source[..., 0], source[..., 1])


@pytest.mark.parametrize("name", MEANS)
def test_packed_episodes_get_what_they_get_one_per_row(name):
    rows, (packed_rows, source) = one_per_row(), packed()
    credit = jax.random.normal(jax.random.key(0), rows.time.shape)
    baseline = make_baseline(name, POLICY, MAX_STEPS)
    expected = np.asarray(predict(baseline, rows, credit))[source]
    prediction = predict(baseline, packed_rows, credit[source])
    np.testing.assert_allclose(
        prediction[packed_rows.mask], expected[packed_rows.mask], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", MEANS)
def test_empty_slots_are_not_counted(name):
    baseline = make_baseline(name, POLICY, MAX_STEPS)
    wild = jnp.where(PACKED.mask, CREDIT, -1e6)
    np.testing.assert_array_equal(
        predict(baseline, credit=wild), predict(baseline, credit=CREDIT)
    )


@pytest.mark.parametrize("name", ["leave-one-out", "time-dependent"])
def test_no_derivative_of_the_own_credit(name):
    """What makes them unbiased: a decision's baseline does not read its own credit."""
    baseline = make_baseline(name, POLICY, MAX_STEPS)

    def prediction(credit):
        return of_whole_batch(baseline, (), PACKED, with_reach(credit, PACKED))

    jacobian = jax.jacobian(prediction)(CREDIT)
    episode = np.array([[0, 0, 1, 3], [2, 2, 2, 4]])
    same = episode[:, :, None, None] == episode
    np.testing.assert_array_equal(
        np.where(same & np.asarray(PACKED.mask), jacobian, 0.0), 0.0
    )
    assert np.abs(jacobian).max() > 0.1, "it must read the others'"


@pytest.mark.parametrize("name", MEANS)
def test_nothing_is_learned(name):
    baseline = make_baseline(name, POLICY, MAX_STEPS)
    state = baseline.init(jax.random.key(0), jnp.zeros(1))
    credit = with_reach(CREDIT, PACKED)
    assert baseline.fit(state, PACKED, credit) == (state, {})


def test_each_knows_how_many_trajectories_it_needs():
    needs = {
        name: make_baseline(name, POLICY, MAX_STEPS).min_trajectories for name in MEANS
    }
    assert needs == {
        "time-dependent": 2,
        "time-dependent-plain": 1,
        "leave-one-out": 2,
        "batch-mean": 1,
        "none": 1,
    }


@pytest.mark.parametrize("wrong", [0, -3, True])
def test_wrong_max_steps_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^max_steps is .*, needs a whole number"):
        time_dependent_baseline(wrong)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'leave-one-ou', unknown.*'leave-one-out'"):
        make_baseline("leave-one-ou", POLICY, 3)


# Off policy: the mean is over reach, and a baseline never sees its own part.


def test_off_policy_means_are_weighted_by_reach():
    # rows of one decision; values 2, 6, 20 with reaches 1, 2, 5
    rows = batch(time=[[0], [0], [0]], mask=[[1], [1], [1]])
    credit = Credit(jnp.array([[2.0], [6.0], [20.0]]), jnp.array([[1.0], [2.0], [5.0]]))
    others = of_whole_batch(leave_one_out_baseline(), (), rows, credit)
    np.testing.assert_allclose(others, [[26 / 7], [22 / 6], [8 / 3]], rtol=1e-6)
    everyone = of_whole_batch(batch_mean_baseline(), (), rows, credit)
    np.testing.assert_allclose(everyone, 28 / 8, rtol=1e-6)


def test_others_without_weight_count_as_none():
    rows = batch(time=[[0], [0]], mask=[[1], [1]])
    credit = Credit(jnp.array([[3e8], [1.0]]), jnp.array([[1e8], [1e-8]]))
    levels = of_whole_batch(leave_one_out_baseline(), (), rows, credit)
    np.testing.assert_allclose(levels, [[0.0], [3.0]], rtol=1e-6)


def test_summaries_of_parts_add_up_to_that_of_the_whole():
    rows = one_per_row()
    credit = with_reach(jax.random.normal(jax.random.key(0), rows.time.shape), rows)
    for name in MEANS:
        baseline = make_baseline(name, POLICY, MAX_STEPS)
        whole = baseline.summarize(None, rows, credit)
        parts = [
            baseline.summarize(None, *jax.tree.map(lambda x, i=i: x[i], (rows, credit)))
            for i in (slice(0, 2), slice(2, 6))
        ]
        chex.assert_trees_all_close(
            jax.tree.map(jnp.add, *parts), whole, rtol=1e-6, atol=1e-6
        )


def test_weights_are_value_less_reach_times_baseline():
    credit = Credit(jnp.array([[5.0, 7.0]]), jnp.array([[2.0, 3.0]]))
    rows = batch(time=[[0, 1]], mask=[[1, 0]])
    weights = apply_baseline(constant_baseline(1.5), None, (), rows, credit)
    np.testing.assert_array_equal(weights, [[5.0 - 2.0 * 1.5, 0.0]])
