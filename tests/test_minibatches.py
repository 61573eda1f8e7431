"""Minibatches: a partition of the batch, drawn anew, the same on any devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.algos.minibatches import (
    Cut,
    over_minibatches,
    plan_minibatches,
    shuffle_into_minibatches,
    take_minibatch,
)
from jaxpg.train.sharding import place

KEY = jax.random.key(7)


def rows_of(num_rows, num_steps, with_carry):
    """Decisions that know their number; a memory that knows its row."""
    numbers = jnp.arange(num_rows * num_steps, dtype=jnp.int32)
    rows = {"number": numbers.reshape(num_rows, num_steps)}
    rows["wide"] = jnp.stack([rows["number"]] * 3, axis=-1)
    if with_carry:
        rows["carry"] = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
        rows["bare"] = jnp.arange(num_rows, dtype=jnp.int32)
    return rows


def minibatches_of(rows, cut, key=KEY, **more):
    @jax.jit
    def all_of_them(key, rows):
        shuffled = shuffle_into_minibatches(key, cut, rows, **more)
        indices = jnp.arange(cut.num_minibatches, dtype=jnp.int32)
        return jax.vmap(take_minibatch, (None, 0))(shuffled, indices)

    parts = jax.tree.map(np.asarray, all_of_them(key, rows))
    return [
        {name: x[number] for name, x in parts.items()}
        for number in range(cut.num_minibatches)
    ]


SHAPES = {
    True: [(1, 1, 1), (1, 20, 4), (2, 3, 3), (7, 16, 7), (8, 20, 4), (64, 16, 2)],
    False: [(1, 3, 1), (6, 3, 2), (7, 16, 7), (8, 1, 4), (64, 4, 4)],
}


@pytest.mark.parametrize("cut_rows", [True, False])
def test_every_decision_is_in_exactly_one_minibatch(cut_rows):
    for num_rows, num_steps, number in SHAPES[cut_rows]:
        cut = plan_minibatches(num_rows, num_steps, number, cut_rows=cut_rows)
        rows = rows_of(num_rows, num_steps, with_carry=not cut_rows)
        parts = minibatches_of(rows, cut)
        assert cut.num_minibatches == number
        sizes = {part["number"].size for part in parts}
        assert sizes == {num_rows * num_steps // number}, "all of one size"
        together = np.concatenate([part["number"].ravel() for part in parts])
        np.testing.assert_array_equal(np.sort(together), np.arange(together.size))
        for part in parts:
            # Leaves stay aligned, and pieces are consecutive decisions of one row.
            for column in range(3):
                np.testing.assert_array_equal(part["wide"][..., column], part["number"])
            assert (np.diff(part["number"], axis=1) == 1).all()
            own_row = part["number"] // num_steps
            assert (own_row == own_row[:, :1]).all()
            if not cut_rows:
                assert part["number"].shape[1] == num_steps
                np.testing.assert_array_equal(part["carry"], own_row[:, :1])
                np.testing.assert_array_equal(part["bare"], own_row[:, 0])


def test_groups_do_not_mix_and_each_gives_every_minibatch_as_much():
    cut = plan_minibatches(8, 16, 4, cut_rows=True)
    assert cut == Cut(num_minibatches=4, num_groups=8, piece=1)
    shuffled = shuffle_into_minibatches(KEY, cut, rows_of(8, 16, with_carry=False))
    assert shuffled["number"].shape == (8, 4, 4, 1)
    group = np.asarray(shuffled["number"]) // 16
    np.testing.assert_array_equal(group, np.arange(8)[:, None, None, None] + 0 * group)


def test_plans_by_hand():
    # 2048 * 128 decisions in 4: pieces of 16 give 4096 pieces to a minibatch.
    assert plan_minibatches(2048, 128, 4, cut_rows=True) == Cut(4, 64, 16)
    # 4 * 64 = 256 decisions in 2 need 64 pieces: of 4 decisions.
    assert plan_minibatches(4, 64, 2, cut_rows=True) == Cut(2, 4, 4)
    # Whole rows: 8 rows in 4, so 2 groups of 4 rows.
    assert plan_minibatches(8, 128, 4, cut_rows=False) == Cut(4, 2, None)
    # 3 rows of 4 decisions in 2: pieces of 1 and groups of one row of 4.
    assert plan_minibatches(3, 4, 2, cut_rows=True) == Cut(2, 3, 1)


def test_epochs_differ_and_the_key_alone_decides():
    cut = plan_minibatches(8, 16, 2, cut_rows=True)
    rows = rows_of(8, 16, with_carry=False)["number"]

    def step(count, key, minibatch):
        return count + 1, (jnp.sort(minibatch.ravel()), jax.random.bits(key))

    def run(key):
        return over_minibatches(step, jnp.int32(0), key, cut, rows, 3)

    run = jax.jit(run)
    count, (members, bits) = run(KEY)
    assert count == 6 and members.shape == (3, 2, 64)
    for epoch in members:
        np.testing.assert_array_equal(np.sort(epoch.ravel()), np.arange(128))
    for one, other in itertools.combinations(members, 2):
        assert (np.asarray(one[0]) != np.asarray(other[0])).mean() > 0.2
    assert len(np.unique(bits)) == 6, "every step has a key of its own"
    again, other = run(KEY)[1][0], run(jax.random.key(8))[1][0]
    np.testing.assert_array_equal(members, again)
    assert (np.asarray(members) != np.asarray(other)).any()


def test_minibatches_are_drawn_evenly():
    """A decision meets each other decision of its group equally often, by 4 errors."""
    cut = Cut(2, 1, 1)
    rows = jnp.arange(8, dtype=jnp.int32).reshape(1, 8)

    def first(key):
        part = take_minibatch(shuffle_into_minibatches(key, cut, rows), jnp.int32(0))
        return jnp.zeros(8).at[part.ravel()].set(1.0)

    number = 2000
    chosen = np.asarray(jax.jit(jax.vmap(first))(jax.random.split(KEY, number)))
    together = chosen.T @ chosen / number
    # P(both in the first half) = 4/8 * 3/7
    expected = np.where(np.eye(8), 0.5, 0.5 * 3 / 7)
    error = np.sqrt(expected * (1 - expected) / number)
    assert (np.abs(together - expected) < 4 * error).all()


@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("cut_rows", [True, False])
@pytest.mark.thinned(3)
def test_devices_do_not_change_the_minibatches(num_devices, cut_rows):
    cut = plan_minibatches(32, 4, 4, cut_rows=cut_rows)
    rows = rows_of(32, 4, with_carry=not cut_rows)
    placement = place(num_devices, num_rows=32)
    alone = minibatches_of(rows, cut)
    spread = minibatches_of(rows, cut, map_rows=placement.map_rows)
    for one, other in zip(alone, spread, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("arguments", "cut_rows", "sentence"),
    [
        (
            (4, 3, 5),
            True,
            r"^num_minibatches is 5, needs a divisor of num_envs \* num_steps = 12$",
        ),
        (
            (6, 4, 4),
            False,
            "^num_minibatches is 4, needs a divisor of num_envs = 6, because "
            "a memory or a replay keeps rows whole$",
        ),
        ((4, 3, 0), True, "^num_minibatches is 0, needs a whole number of at least 1"),
    ],
)
def test_minibatches_that_do_not_divide_are_refused(arguments, cut_rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_minibatches(*arguments, cut_rows=cut_rows)
