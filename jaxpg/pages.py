"""Pages: where a rollout writes turns before they become rows.

Loops go from turn to turn, [T, B, ...], and the library reads rows, [B, T, ...]. To
write each turn into the rows of all slots would touch as many places in memory, and to
turn everything over at the end needs the batch's memory twice. So turns are written
side by side on a page, and each page is moved into the rows when it is full.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg.slots import Slot
from jaxpg.types import Trajectory

__all__ = [
    "PAGE",
    "empty_rows",
    "page_of",
    "turned",
    "with_page",
    "written",
]

PAGE = 64
"""Turns of a page."""


def empty_rows(
    decide: Callable[[Slot], tuple[Slot, Trajectory]], slots: Slot, capacity: int
) -> Trajectory:
    """Rows of nothing, for so many turns of what `decide` tells."""

    def empty(x: Any) -> Array:
        return jnp.zeros((x.shape[0], capacity, *x.shape[1:]), x.dtype)

    return jax.tree.map(empty, jax.eval_shape(decide, slots)[1])


def page_of(rows: Trajectory, step: Array) -> tuple[Trajectory, Array]:
    """What the rows hold from about `step` on, time first, and where that begins.

    The last page begins earlier if the rows end: what they hold there stays.
    """
    length = rows.mask.shape[1]
    size = min(PAGE, length)
    first = jnp.minimum(step, length - size)
    page = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), rows
    )
    return turned(page), first


def with_page(rows: Trajectory, page: Trajectory, first: Array) -> Trajectory:
    """The rows with a page moved into them."""
    put = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda x, y: put(x, y, first, 1), rows, turned(page))


def written(page: Trajectory, decision: Trajectory, step: Array) -> Trajectory:
    """The page with one turn's decisions on line `step`."""

    def write(rows: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(rows, row, step, 0)

    return jax.tree.map(write, page, decision)


def turned(decisions: Trajectory) -> Trajectory:
    """From time-major, as loops write it, to the library's [B, T, ...], and back."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), decisions)
