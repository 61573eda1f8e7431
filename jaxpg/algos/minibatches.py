"""Minibatches without sorting the batch: pieces of rows are shuffled within groups.

Rows are cut into pieces of a few consecutive decisions (whole rows, where a policy has
memory), and into groups of rows that never mix. Every minibatch takes as many pieces
from each group, drawn anew every epoch. A piece moves as one block, a sort is as short
as a group has pieces, and no group crosses a device: nothing of the batch is
communicated, and the minibatches do not depend on the number of devices.

Sorting every decision instead takes a quarter of an update on two CPU cores. Within a
minibatch the decisions of a piece are correlated, across pieces nothing changes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg._checks import check_positive
from jaxpg._flat import scan_into_vectors
from jaxpg._unrolled import unrolled
from jaxpg.algos.base import Task
from jaxpg.chunks import MapRows, map_plainly
from jaxpg.types import PRNGKey, PyTree

__all__ = [
    "Cut",
    "check_minibatches",
    "over_minibatches",
    "plan_minibatches",
    "shuffle_into_minibatches",
    "take_minibatch",
]

GROUPS = 2**6 * 3 * 5
"""Groups of rows, as far as they divide the rows. Devices share out whole groups, so a
number with many divisors lets many numbers of devices do that."""

MAX_PIECE = 16
"""Consecutive decisions of a piece, at most."""

MIN_PIECES = 32
"""Pieces of a minibatch, where rows may be cut to have so many."""


class Cut(NamedTuple):
    """How a batch is cut into minibatches.

    Attributes:
        num_minibatches: M.
        num_groups: groups of rows that do not mix.
        piece: consecutive decisions that stay together; None for whole rows.
    """

    num_minibatches: int
    num_groups: int
    piece: int | None


def plan_minibatches(
    num_rows: int, num_steps: int, num_minibatches: int, *, cut_rows: bool
) -> Cut:
    """Choose groups and pieces for a batch of rows.

    Args:
        num_rows: rows of the batch, over all devices.
        num_steps: decisions of a row.
        num_minibatches: minibatches of an epoch.
        cut_rows: whether a row may be cut in time (a memoryless policy).

    Returns:
        The longest pieces that leave every minibatch enough of them.

    Raises:
        ValueError: if the minibatches do not divide the batch.

    >>> plan_minibatches(2048, 128, 4, cut_rows=True)
    Cut(num_minibatches=4, num_groups=64, piece=16)
    """
    check_positive("num_minibatches", num_minibatches)
    what, size = "num_envs", num_rows
    if cut_rows:
        what, size = "num_envs * num_steps", num_rows * num_steps

    def fits(piece: int) -> bool:
        pieces = num_rows * num_steps // piece
        enough = pieces >= MIN_PIECES * num_minibatches
        return pieces % num_minibatches == 0 and (enough or piece == 1)

    if size % num_minibatches:
        raise ValueError(
            f"num_minibatches is {num_minibatches}, needs a divisor of {what} = {size}"
            + ("" if cut_rows else ", because a memory or a replay keeps rows whole")
        )
    if not cut_rows:
        return Cut(num_minibatches, _num_groups(num_rows, 1, num_minibatches), None)
    piece = next(n for n in _divisors(num_steps, MAX_PIECE) if fits(n))
    groups = _num_groups(num_rows, num_steps // piece, num_minibatches)
    return Cut(num_minibatches, groups, piece)


def check_minibatches(
    task: Task, num_steps: int, num_minibatches: int, *, cut_rows: bool
) -> None:
    """Refuse, before anything runs, minibatches that do not fit a task's rows.

    Args:
        task: whose rows and devices are looked at, where they are known.
        num_steps: decisions of a row.
        num_minibatches: minibatches of an epoch.
        cut_rows: whether a row may be cut in time (a memoryless policy).

    Raises:
        ValueError: if the minibatches do not divide the batch, or the devices cannot
            share its groups of rows.
    """
    if task.num_rows is None:
        return
    cut = plan_minibatches(task.num_rows, num_steps, num_minibatches, cut_rows=cut_rows)
    if cut.num_groups % task.num_devices:
        raise ValueError(
            f"num_devices is {task.num_devices}, needs a divisor of {cut.num_groups}, "
            f"the groups that {task.num_rows} environments are shuffled in for "
            f"{num_minibatches} minibatches; a power of two of environments always fits"
        )


def shuffle_into_minibatches(
    key: PRNGKey, cut: Cut, rows: PyTree, map_rows: MapRows = map_plainly
) -> PyTree:
    """Draw an epoch's minibatches.

    Args:
        key: consumed.
        cut: from `plan_minibatches`.
        rows: leaves [B, T, ...]; where pieces are whole rows T may be missing.
        map_rows: how rows are spread over devices.

    Returns:
        Leaves [groups, M, pieces, piece, ...], for `take_minibatch`; every decision of
        the batch is in exactly one minibatch.
    """

    def of_groups(key: PRNGKey, part: Any) -> PyTree:
        numbers, rows = part
        count = numbers.shape[0]

        def blocks(x: Array) -> Array:
            rows = x.shape[0] // count
            if cut.piece is None:
                return x.reshape(count, rows, *x.shape[1:])
            pieces = rows * x.shape[1] // cut.piece
            return x.reshape(count, pieces, cut.piece, *x.shape[2:])

        blocked = jax.tree.map(blocks, rows)
        num_blocks = jax.tree.leaves(blocked)[0].shape[1]

        def order(number: Array) -> Array:
            group_key = jax.random.fold_in(unrolled(key), number)
            return jax.random.permutation(group_key, num_blocks)

        orders = jax.vmap(order)(numbers)

        def gather(x: Array) -> Array:
            shuffled = jax.vmap(lambda x, order: x[order])(x, orders)
            return shuffled.reshape(count, cut.num_minibatches, -1, *x.shape[2:])

        return jax.tree.map(gather, blocked)

    numbers = jnp.arange(cut.num_groups, dtype=jnp.int32)
    return map_rows(of_groups, key, (numbers, rows))


def take_minibatch(minibatches: PyTree, index: Array) -> PyTree:
    """Minibatch `index` as rows: leaves [groups * pieces, piece, ...]."""

    def take(x: Array) -> Array:
        chosen = jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)
        return chosen.reshape(-1, *chosen.shape[2:])

    return jax.tree.map(take, minibatches)


def over_minibatches(
    step: Callable[[Any, PRNGKey, PyTree], tuple[Any, PyTree]],
    carry: Any,
    key: PRNGKey,
    cut: Cut,
    rows: PyTree,
    num_epochs: int,
    map_rows: MapRows = map_plainly,
    prepare: Callable[[PyTree], PyTree] = lambda minibatches: minibatches,
) -> tuple[Any, PyTree]:
    """Visit every minibatch once an epoch, drawn anew each time.

    Args:
        step: `step(carry, key, minibatch) -> (carry, info)`.
        carry: before the first one.
        key: consumed.
        cut: from `plan_minibatches`.
        rows: as for `shuffle_into_minibatches`.
        num_epochs: passes over the rows.
        map_rows: how rows are spread over devices.
        prepare: what is done to all minibatches of an epoch at once, as
            `shuffle_into_minibatches` gives them: several devices then exchange what
            it sums once an epoch, and not once a step.

    Returns:
        The carry after the last one, and infos [epochs, M, ...].
    """

    def epoch(carry: Any, key: PRNGKey) -> tuple[Any, PyTree]:
        key_order, key_steps = jax.random.split(key)
        minibatches = shuffle_into_minibatches(key_order, cut, rows, map_rows)
        minibatches = prepare(minibatches)

        def visit(carry: Any, index: Array) -> tuple[Any, PyTree]:
            minibatch = take_minibatch(minibatches, index)
            return step(carry, jax.random.fold_in(key_steps, index), minibatch)

        indices = jnp.arange(cut.num_minibatches, dtype=jnp.int32)
        return scan_into_vectors(visit, carry, indices)

    return scan_into_vectors(epoch, carry, jax.random.split(key, num_epochs))


def _divisors(number: int, most: int) -> list[int]:
    """Divisors of `number` from `most` down to 1."""
    return [n for n in range(min(most, number), 0, -1) if number % n == 0]


def _num_groups(num_rows: int, per_row: int, num_minibatches: int) -> int:
    """As many groups as divide the rows and leave each group whole minibatches."""
    needed = num_minibatches // math.gcd(num_minibatches, per_row)
    return math.gcd(GROUPS, num_rows // needed) if num_rows % needed == 0 else 1
