"""How a batch [B, T] is cut into chunks, and which of them are visited.

A grid is equal blocks of rows by equal blocks of steps, with smaller ones for the rest;
each pair is a part of its own, whose chunks have one shape. A chunk is a number: `cut`
takes it out of any array of the batch when its turn comes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxpg._batching import anybody
from jaxpg._checks import check_positive

__all__ = [
    "PIECE",
    "Blocks",
    "Part",
    "Plan",
    "cutter",
    "grid_of",
    "needed_first",
    "plan",
]

PIECE = 16
"""Consecutive decisions of one row in a chunk, where rows may be cut: few, so that the
empty tails of packed rows fall into chunks of their own, and are skipped."""


class Blocks(NamedTuple):
    """`number` blocks of `size` indices each, the first from `start` on."""

    start: int
    size: int
    number: int


class Plan(NamedTuple):
    """Which chunks of a part are visited, and where what is found there belongs.

    Attributes:
        cut: `cut(x, index)`, a chunk of [B, T, ...].
        order: the chunks' indices, [n], those that are needed first.
        num_needed: how many those are; None where all are.
        put_back: numbers of all chunks in that order, [n, rows, steps], where the part
            has their decisions.
    """

    cut: Callable[[Array, Array], Array]
    order: Int[Array, " n"]
    num_needed: Int[Array, ""] | None
    put_back: Callable[[Array], Array]


class Part(NamedTuple):
    """Blocks of rows by blocks of steps: chunks of one shape."""

    rows: Blocks
    steps: Blocks


def _blocks(whole: int, size: int) -> list[Blocks]:
    """Cut range(whole) into equal blocks, and a smaller one for the rest."""
    count, rest = divmod(whole, size)
    blocks = [Blocks(0, size, count)]
    return blocks if rest == 0 else [*blocks, Blocks(count * size, rest, 1)]


def grid_of(shape: tuple[int, ...], size: int, *, cut_rows: bool) -> list[list[Part]]:
    """Cut a batch into chunks of about `size` decisions.

    Args:
        shape: (B, T).
        size: decisions of a chunk, at least 1.
        cut_rows: whether a row may be cut in time.

    Returns:
        Parts from the first steps to the last, for the first rows and for the rest.

    Raises:
        ValueError: if the chunk size is not a positive whole number.

    >>> grid = grid_of((5, 6), 12, cut_rows=False)
    >>> [[(part.rows.number, part.rows.size) for part in parts] for parts in grid]
    [[(2, 2)], [(1, 1)]]
    """
    check_positive("chunk size", size)
    num_rows, length = shape
    num_steps = min(PIECE, size, length) if cut_rows else length
    per_chunk = min(max(1, size // num_steps), num_rows)
    return [
        [Part(some_rows, some_steps) for some_steps in _blocks(length, num_steps)]
        for some_rows in _blocks(num_rows, per_chunk)
    ]


def plan(active: Bool[Array, "B T"] | None, part: Part, length: int) -> Plan:
    """Chunks of a part of the batch, those with anything active first.

    Pieces of rows go into chunks in any company: rows of unlike lengths, side by side,
    would leave chunks of neighbours mostly empty.

    Args:
        active: whether a decision can contribute anything; None where all can.
        part: of the batch.
        length: T.

    Returns:
        Which chunks to visit, and how.
    """
    if active is None:
        return _of_all(part, length)
    return _of_pieces(active, part) if part.steps.number > 1 else _of_rows(active, part)


def _of_all(part: Part, length: int) -> Plan:
    """All chunks, as they lie."""

    def put_back(found: Array) -> Array:
        x = found.reshape(part.steps.number, part.rows.number, *found.shape[1:])
        return jnp.moveaxis(x, 0, 2).reshape(part.rows.number * part.rows.size, -1)

    order = jnp.arange(part.rows.number * part.steps.number, dtype=jnp.int32)
    return Plan(cutter(part, length), order, None, put_back)


def _of_rows(active: Bool[Array, "B T"], part: Part) -> Plan:
    """Chunks of neighbouring rows, in one block of steps."""
    needed = anybody(jnp.any(_by_piece(active, part), axis=(1, 2)))
    order, count = needed_first(needed)

    def put_back(found: Array) -> Array:
        return found[_inverse(order)].reshape(-1, part.steps.size)

    return Plan(cutter(part, active.shape[1]), order, count, put_back)


def _of_pieces(active: Bool[Array, "B T"], part: Part) -> Plan:
    """Chunks of any pieces of any rows."""
    order, num_needed = needed_first(anybody(_by_piece(active, part).reshape(-1)))
    per_chunk, size = part.rows.size, part.steps.size

    def cut(x: Array, index: Array) -> Array:
        some = jax.lax.dynamic_slice_in_dim(order, index * per_chunk, per_chunk)
        row, piece = jnp.divmod(some, part.steps.number)
        row, first = part.rows.start + row, part.steps.start + piece * size
        steps = first[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        return x[row[:, None], steps]

    def put_back(found: Array) -> Array:
        pieces = found.reshape(-1, size)[_inverse(order)]
        return pieces.reshape(-1, part.steps.number * size)

    index = jnp.arange(part.rows.number * part.steps.number, dtype=jnp.int32)
    return Plan(cut, index, -(-num_needed // per_chunk), put_back)


def _inverse(order: Int[Array, " n"]) -> Int[Array, " n"]:
    """Where each index stands in an order of all."""
    index = jnp.arange(order.shape[0], dtype=jnp.int32)
    return (
        jnp.zeros_like(index)
        .at[order]
        .set(index, mode="promise_in_bounds", unique_indices=True)
    )


def needed_first(needed: Bool[Array, " n"]) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Indices of what is needed, in order, before all others; and how many those are.

    `argsort(~needed)` in the time of a running sum: a sort of a quarter of a million
    pieces would take a tenth of an update.

    >>> order, count = needed_first(jnp.array([False, True, False, True]))
    >>> order.tolist(), count.item()
    ([1, 3, 0, 2], 2)
    """
    index = jnp.arange(needed.shape[0], dtype=jnp.int32)
    num_so_far = jnp.cumsum(needed, dtype=jnp.int32)
    place = jnp.where(needed, num_so_far - 1, num_so_far[-1] + index - num_so_far)
    order = (
        jnp.zeros_like(index)
        .at[place]
        .set(index, mode="promise_in_bounds", unique_indices=True)
    )
    return order, num_so_far[-1]


def _by_piece(active: Bool[Array, "B T"], part: Part) -> Bool[Array, "R r W"]:
    """Whether anything is active: blocks of rows, rows of a block, blocks of steps."""
    rows, steps = part
    active = active[rows.start :][: rows.number * rows.size]
    active = active[:, steps.start :][:, : steps.number * steps.size]
    shape = rows.number, rows.size, steps.number, steps.size
    return jnp.any(active.reshape(shape), axis=3)


def cutter(part: Part, length: int) -> Callable[[Array, Array], Array]:
    """`cut(x, index)`: a chunk of [B, T, ...]; the rows' place runs fastest."""
    rows, steps = part

    def cut(x: Array, index: Array) -> Array:
        later, place = jnp.divmod(index, rows.number)
        x = jax.lax.dynamic_slice_in_dim(x, rows.start + place * rows.size, rows.size)
        if steps.size == length:
            return x  # whole rows: a leaf need not have T
        first = steps.start + later * steps.size
        return jax.lax.dynamic_slice_in_dim(x, first, steps.size, axis=1)

    return cut
