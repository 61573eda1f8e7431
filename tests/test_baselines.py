"""Baselines by hand on packed rows, and packing against one episode per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.algos.reinforce import BASELINES, make_baseline
from jaxpg.baselines import (
    batch_mean_baseline,
    constant_baseline,
    leave_one_out_baseline,
    no_baseline,
    time_dependent_baseline,
)
from jaxpg.types import Trajectory

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


def predict(baseline, trajectories=PACKED, credit=CREDIT):
    state = baseline.init(jax.random.key(0), jnp.zeros(1))
    prediction = jax.jit(baseline.predict)(state, trajectories, credit)
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


@pytest.mark.parametrize("name", BASELINES)
def test_an_empty_batch_gives_finite_numbers(name):
    empty = batch(time=[[0, 0]], mask=[[0, 0]])
    state, credit = (), jnp.array([[3.0, 4.0]])
    assert np.isfinite(make_baseline(name, 2).predict(state, empty, credit)).all()


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


@pytest.mark.parametrize("name", BASELINES)
def test_packed_episodes_get_what_they_get_one_per_row(name):
    rows, (packed_rows, source) = one_per_row(), packed()
    credit = jax.random.normal(jax.random.key(0), rows.time.shape)
    baseline = make_baseline(name, MAX_STEPS)
    expected = np.asarray(predict(baseline, rows, credit))[source]
    prediction = predict(baseline, packed_rows, credit[source])
    np.testing.assert_allclose(
        prediction[packed_rows.mask], expected[packed_rows.mask], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", BASELINES)
def test_empty_slots_are_not_counted(name):
    baseline = make_baseline(name, MAX_STEPS)
    wild = jnp.where(PACKED.mask, CREDIT, -1e6)
    np.testing.assert_array_equal(
        predict(baseline, credit=wild), predict(baseline, credit=CREDIT)
    )


@pytest.mark.parametrize("name", ["leave-one-out", "time-dependent"])
def test_no_derivative_of_the_own_credit(name):
    """What makes them unbiased: a decision's baseline does not read its own credit."""
    baseline = make_baseline(name, MAX_STEPS)
    state = baseline.init(jax.random.key(0), jnp.zeros(1))
    jacobian = jax.jacobian(lambda credit: baseline.predict(state, PACKED, credit))(
        CREDIT
    )
    episode = np.array([[0, 0, 1, 3], [2, 2, 2, 4]])
    same = episode[:, :, None, None] == episode
    np.testing.assert_array_equal(
        np.where(same & np.asarray(PACKED.mask), jacobian, 0.0), 0.0
    )
    assert np.abs(jacobian).max() > 0.1, "it must read the others'"


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_is_learned(name):
    baseline = make_baseline(name, MAX_STEPS)
    state = baseline.init(jax.random.key(0), jnp.zeros(1))
    assert baseline.fit(state, PACKED, CREDIT) == (state, {})


def test_each_knows_how_many_trajectories_it_needs():
    needs = {
        name: make_baseline(name, MAX_STEPS).min_trajectories for name in BASELINES
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
        make_baseline("leave-one-ou", 3)
