"""Sums and maps over rows, chunk by chunk: memory and speed, never the answer.

Batches larger than the cache or the memory are a matter of `Chunks` alone: rows are
visited chunk by chunk and summed, and the answer does not depend on the size but for
rounding. Chunks with nothing active are skipped.

Where rows are spread over devices, `jaxpg.train.sharding` offers the same two functions
(`SumOverRows`, `MapRows`) for many devices; what uses them never sees an axis name.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from jaxpg._batching import anybody, anywhere
from jaxpg._checks import check_positive
from jaxpg.types import PyTree

__all__ = [
    "ALL_AT_ONCE",
    "ChunkSize",
    "Chunks",
    "MapRows",
    "SumOverRows",
    "map_over_chunks",
    "map_plainly",
    "sum_over_chunks",
]

PIECE = 16
"""Consecutive decisions of one row in a chunk, where rows may be cut: few, so that the
empty tails of packed rows fall into chunks of their own, and are skipped."""


TOGETHER = 32
"""Chunks that are skipped together, where they are many."""


ChunkSize = int | Literal["auto"] | None
"""Decisions that are worked on together: so many, as suits the device, or all."""


class Chunks(NamedTuple):
    """How a sum over rows is cut up; it changes memory and speed, not the sum.

    Attributes:
        size: decisions that are worked on together; "auto" as suits the device, None
            takes all at once.
        cut_rows: whether a row may be cut in time, as it may where no decision's
            log-probability depends on the row's earlier ones (a memoryless policy).
    """

    size: ChunkSize = None
    cut_rows: bool = False

    @property
    def number(self) -> int | None:
        """Decisions that are worked on together, with "auto" decided.

        On CPU the activations of a small network should fit into a core's own cache:
        with 2 x 64 units a gradient takes 0.89 microseconds per decision at 256 and
        1.2 at 2048. Rows that stay whole need company, or products are thin. What
        accelerators get is a guess that nothing has been measured for.
        """
        if self.size != "auto":
            return self.size
        if jax.default_backend() != "cpu":
            return 2**16
        return 256 if self.cut_rows else 2048


ALL_AT_ONCE = Chunks()


@runtime_checkable
class SumOverRows(Protocol):
    """How `fn` is summed over rows: in chunks on one device, or over many devices."""

    def __call__(
        self,
        fn: Callable[[Any, PyTree], Any],
        shared: Any,
        rows: PyTree,
        active: Bool[Array, "B T"],
        chunks: Chunks,
    ) -> Any:
        """See `sum_over_chunks`."""


@runtime_checkable
class MapRows(Protocol):
    """How work on each row for itself is done: plainly, or on each device's own."""

    def __call__(
        self, fn: Callable[[Any, PyTree], PyTree], shared: Any, rows: PyTree
    ) -> PyTree:
        """`fn(shared, some_rows) -> new rows`, put together; B stays in front."""


def map_plainly(
    fn: Callable[[Any, PyTree], PyTree], shared: Any, rows: PyTree
) -> PyTree:
    """`fn(shared, rows)`: all rows at once, on one device."""
    return fn(shared, rows)


def sum_over_chunks(
    fn: Callable[[Any, PyTree], Any],
    shared: Any,
    rows: PyTree,
    active: Bool[Array, "B T"],
    chunks: Chunks = ALL_AT_ONCE,
) -> Any:
    """Sum `fn(shared, chunk)` over chunks of rows, skipping chunks with nothing active.

    Args:
        fn: maps what is shared and a chunk of rows to a tree of sums over the chunk.
        shared: what every chunk needs, for example parameters.
        rows: a tree whose leaves have B in front, and T behind it if rows may be cut.
        active: whether a decision can contribute anything.
        chunks: how to cut.

    Returns:
        The sum over all rows; independent of `chunks` but for rounding.

    Raises:
        ValueError: if the chunk size is not a positive whole number.

    >>> rows, active = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2), bool)
    >>> total = lambda scale, x: scale * jnp.sum(x)
    >>> sum_over_chunks(total, 2.0, rows, active, Chunks(size=2)).item()
    30.0
    """
    if chunks.cut_rows:
        fn = _on_one_row(fn)
    grid = _grid(active, chunks)
    if grid is None:
        return fn(shared, rows)
    sums = [
        _sum_over_grid(fn, shared, rows, active, *part)
        for parts in grid
        for part in parts
    ]
    return jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *sums)


def map_over_chunks(
    fn: Callable[[Any, PyTree], Any],
    shared: Any,
    rows: PyTree,
    active: Bool[Array, "B T"],
    chunks: Chunks = ALL_AT_ONCE,
) -> Any:
    """`fn(shared, chunk)` of every chunk of rows, put together: one number a decision.

    Args:
        fn: maps what is shared and a chunk of rows to a tree of numbers, one for each
            of the chunk's decisions.
        shared: what every chunk needs, for example parameters.
        rows: a tree whose leaves have B in front, and T behind it if rows may be cut.
        active: whether a decision's number is asked for.
        chunks: how to cut.

    Returns:
        A tree of [B, T]; 0 in chunks with nothing active, which are skipped.

    Raises:
        ValueError: if the chunk size is not a positive whole number.

    >>> rows, active = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2), bool)
    >>> double = lambda scale, x: scale * x
    >>> map_over_chunks(double, 2.0, rows, active, Chunks(size=2)).tolist()
    [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
    """
    if chunks.cut_rows:
        fn = _of_one_row(fn)
    grid = _grid(active, chunks)
    if grid is None:
        return fn(shared, rows)
    by_rows = [
        _beside([_map_over_grid(fn, shared, rows, active, *part) for part in parts], 1)
        for parts in grid
    ]
    return _beside(by_rows, 0)


def _beside(parts: list[Any], axis: int) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=axis), *parts)


def _on_one_row(fn: Callable[[Any, PyTree], Any]) -> Callable[[Any, PyTree], Any]:
    """`fn` of all decisions in one row: where rows may be cut they may be joined.

    A network then sees one long list, and not a batch of short ones.
    """

    def on_one_row(shared: Any, rows: PyTree) -> Any:
        def join(x: Array) -> Array:
            return x.reshape(1, -1, *x.shape[2:])

        return fn(shared, jax.tree.map(join, rows))

    return on_one_row


def _of_one_row(fn: Callable[[Any, PyTree], Any]) -> Callable[[Any, PyTree], Any]:
    """`_on_one_row`, with its numbers back in the rows that they came from."""

    def of_one_row(shared: Any, rows: PyTree) -> Any:
        num_rows, length = jax.tree.leaves(rows)[0].shape[:2]
        found = _on_one_row(fn)(shared, rows)
        return jax.tree.map(lambda x: x.reshape(num_rows, length), found)

    return of_one_row


Plan = tuple[Callable[[Array, Array], Array], Array, Array]
"""`cut(x, index)`, the chunks' indices in order, and how many of them are needed."""


class Blocks(NamedTuple):
    """`number` blocks of `size` indices each, the first from `start` on."""

    start: int
    size: int
    number: int


def _blocks(whole: int, size: int) -> list[Blocks]:
    """Cut range(whole) into equal blocks, and a smaller one for the rest."""
    count, rest = divmod(whole, size)
    blocks = [Blocks(0, size, count)]
    return blocks if rest == 0 else [*blocks, Blocks(count * size, rest, 1)]


def _grid(active: Array, chunks: Chunks) -> list[list[tuple[Blocks, Blocks]]] | None:
    """Blocks of rows, each with all blocks of steps; None where nothing is cut."""
    size = chunks.number
    if size is None:
        return None
    check_positive("chunk size", size)
    num_rows, length = active.shape
    num_steps = min(PIECE, size, length) if chunks.cut_rows else length
    per_chunk = min(max(1, size // num_steps), num_rows)
    return [
        [(some_rows, some_steps) for some_steps in _blocks(length, num_steps)]
        for some_rows in _blocks(num_rows, per_chunk)
    ]


def _sum_over_grid(
    fn: Callable[[Any, PyTree], Any],
    shared: Any,
    rows: PyTree,
    active: Bool[Array, "B T"],
    some_rows: Blocks,
    some_steps: Blocks,
) -> Any:
    """Sum over a grid of equal chunks, each cut out only when its turn comes."""
    plan = _plan_of_pieces if some_steps.number > 1 else _plan_of_blocks
    cut, order, count = plan(active, some_rows, some_steps)

    def of_chunk(index: Array) -> Any:
        return fn(shared, jax.tree.map(lambda x: cut(x, index), rows))

    def add(total: Any, index: Array) -> Any:
        return jax.tree.map(jnp.add, total, of_chunk(index))

    zeros = optax.tree.zeros_like(jax.eval_shape(of_chunk, order[0]))
    return _visit_first(add, zeros, order, count)


def _plan_of_blocks(
    active: Bool[Array, "B T"], some_rows: Blocks, some_steps: Blocks
) -> Plan:
    """Chunks of neighbouring rows, in one block of steps, those with anything first."""
    needed = anybody(jnp.any(_by_piece(active, some_rows, some_steps), axis=(1, 2)))
    return _cutter(some_rows, some_steps, active.shape[1]), *_first(needed)


def _plan_of_pieces(
    active: Bool[Array, "B T"], some_rows: Blocks, some_steps: Blocks
) -> Plan:
    """Chunks of any pieces of any rows, those with anything active first.

    Rows of unlike lengths, side by side, leave chunks of neighbours mostly empty.
    """
    needed = anybody(_by_piece(active, some_rows, some_steps).reshape(-1))
    order, num_needed = _first(needed)
    per_chunk, size = some_rows.size, some_steps.size

    def cut(x: Array, index: Array) -> Array:
        some = jax.lax.dynamic_slice_in_dim(order, index * per_chunk, per_chunk)
        row, piece = jnp.divmod(some, some_steps.number)
        row, first = some_rows.start + row, some_steps.start + piece * size
        steps = first[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        return x[row[:, None], steps]

    number = some_rows.number * some_steps.number
    return cut, jnp.arange(number, dtype=jnp.int32), -(-num_needed // per_chunk)


def _first(needed: Bool[Array, "n"]) -> tuple[Int[Array, "n"], Int[Array, ""]]:
    """Indices of what is needed, in order, before all others; and how many those are.

    `argsort(~needed)` in the time of a running sum: a sort of a quarter of a million
    pieces would take a tenth of an update.
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


def _by_piece(
    active: Bool[Array, "B T"], some_rows: Blocks, some_steps: Blocks
) -> Bool[Array, "R r W"]:
    """Whether anything is active: blocks of rows, rows of a block, blocks of steps."""
    active = active[some_rows.start :][: some_rows.number * some_rows.size]
    last = some_steps.start + some_steps.number * some_steps.size
    active = active[:, some_steps.start : last]
    shape = some_rows.number, some_rows.size, some_steps.number, some_steps.size
    return jnp.any(active.reshape(shape), axis=3)


def _visit_first(
    add: Callable[[Any, Array], Any], total: Any, order: Array, count: Array
) -> Any:
    """`add` the first `count` indices, in order; the others are skipped together.

    To ask of every index whether it is needed costs more than the work, where rows are
    mostly empty. A `while_loop` over the needed ones would have no reverse derivative.
    """
    number = order.shape[0]

    def visit(total: Any, some: tuple[Array, Array]) -> tuple[Any, None]:
        index, needed = some
        return jax.lax.cond(needed, lambda: add(total, index), lambda: total), None

    def one_by_one(total: Any, some: tuple[Array, Array]) -> Any:
        return jax.lax.scan(visit, total, some)[0]

    if number <= 2 * TOGETHER:
        return one_by_one(total, (order, jnp.arange(number, dtype=jnp.int32) < count))
    blocks = -(-number // TOGETHER)
    order = jnp.pad(order, (0, blocks * TOGETHER - number)).reshape(blocks, TOGETHER)
    needed = (jnp.arange(blocks * TOGETHER, dtype=jnp.int32) < count).reshape(
        blocks, TOGETHER
    )

    def of_block(total: Any, some: tuple[Array, Array]) -> tuple[Any, None]:
        begun = some[1][0]
        return jax.lax.cond(begun, lambda: one_by_one(total, some), lambda: total), None

    return jax.lax.scan(of_block, total, (order, needed))[0]


def _map_over_grid(
    fn: Callable[[Any, PyTree], Any],
    shared: Any,
    rows: PyTree,
    active: Bool[Array, "B T"],
    some_rows: Blocks,
    some_steps: Blocks,
) -> Any:
    """`fn` of each chunk of a grid, its numbers where the grid has its decisions."""
    cut = _cutter(some_rows, some_steps, active.shape[1])

    def of_chunk(index: Array) -> Any:
        return fn(shared, jax.tree.map(lambda x: cut(x, index), rows))

    def visit(_: None, index: Array) -> tuple[None, Any]:
        zeros = optax.tree.zeros_like(jax.eval_shape(of_chunk, index))
        needed = anywhere(cut(active, index))
        return None, jax.lax.cond(needed, lambda: of_chunk(index), lambda: zeros)

    def spread(x: Array) -> Array:
        x = x.reshape(some_steps.number, some_rows.number, *x.shape[1:])
        x = jnp.transpose(x, (1, 2, 0, 3))
        return x.reshape(some_rows.number * some_rows.size, -1)

    indices = jnp.arange(some_rows.number * some_steps.number, dtype=jnp.int32)
    return jax.tree.map(spread, jax.lax.scan(visit, None, indices)[1])


def _cutter(
    some_rows: Blocks, some_steps: Blocks, length: int
) -> Callable[[Array, Array], Array]:
    """`cut(x, index)`: a chunk of [B, T, ...]; the rows' place runs fastest."""

    def cut(x: Array, index: Array) -> Array:
        later, place = jnp.divmod(index, some_rows.number)
        first = some_rows.start + place * some_rows.size
        x = jax.lax.dynamic_slice_in_dim(x, first, some_rows.size)
        if some_steps.size == length:
            return x  # whole rows: a leaf need not have T
        first = some_steps.start + later * some_steps.size
        return jax.lax.dynamic_slice_in_dim(x, first, some_steps.size, axis=1)

    return cut
