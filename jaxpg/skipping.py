"""Loops over chunks that are needed, in order; the others are skipped together."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg._tracing import traced_once

__all__ = ["TOGETHER", "map_first", "visit_first"]

TOGETHER = 32
"""Chunks that are skipped together, where they are many."""


def visit_first(
    add: Callable[[Any, Array], Any], total: Any, order: Array, count: Array | None
) -> Any:
    """`add` the first `count` indices, in order; the others are skipped together.

    To ask of every index whether it is needed costs more than the work, where rows are
    mostly empty. A `while_loop` over the needed ones would have no reverse derivative.
    Where `count` is None all are added, and nothing is asked.
    """
    if count is None:
        return jax.lax.scan(lambda x, i: (add(x, i), None), total, order)[0]
    add = traced_once(add)

    def visit(total: Any, some: tuple[Array, Array]) -> tuple[Any, None]:
        index, needed = some
        return jax.lax.cond(needed, lambda: add(total, index), lambda: total), None

    def one_by_one(total: Any, some: tuple[Array, Array]) -> Any:
        return jax.lax.scan(visit, total, some)[0]

    if order.shape[0] <= 2 * TOGETHER:
        return one_by_one(total, _with_flags(order, count))

    def of_block(total: Any, some: tuple[Array, Array]) -> tuple[Any, None]:
        begun = some[1][0]
        return jax.lax.cond(begun, lambda: one_by_one(total, some), lambda: total), None

    return jax.lax.scan(of_block, total, _in_blocks(order, count))[0]


def map_first(fn: Callable[[Array], Any], order: Array, count: Array | None) -> Any:
    """`fn` of the first `count` indices, in order, and zeros for the others.

    Those are skipped together, as in `visit_first`; None for `count` is all.

    >>> map_first(lambda i: i + 7, jnp.array([2, 0, 1]), jnp.array(2)).tolist()
    [9, 7, 0]
    """
    if count is None:
        return jax.lax.map(fn, order)
    fn = traced_once(fn)

    def empty(*number: int) -> Any:
        shapes = jax.eval_shape(fn, order[0])
        return jax.tree.map(lambda x: jnp.zeros((*number, *x.shape), x.dtype), shapes)

    def visit(_: None, some: tuple[Array, Array]) -> tuple[None, Any]:
        index, needed = some
        return None, jax.lax.cond(needed, lambda: fn(index), empty)

    def one_by_one(some: tuple[Array, Array]) -> Any:
        return jax.lax.scan(visit, None, some)[1]

    if order.shape[0] <= 2 * TOGETHER:
        return one_by_one(_with_flags(order, count))

    def of_block(_: None, some: tuple[Array, Array]) -> tuple[None, Any]:
        begun = some[1][0]
        together = functools.partial(empty, TOGETHER)
        return None, jax.lax.cond(begun, lambda: one_by_one(some), together)

    found = jax.lax.scan(of_block, None, _in_blocks(order, count))[1]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: order.shape[0]], found)


def _with_flags(order: Array, count: Array) -> tuple[Array, Array]:
    """Indices, and which of them are needed."""
    return order, jnp.arange(order.shape[0], dtype=jnp.int32) < count


def _in_blocks(order: Array, count: Array) -> tuple[Array, Array]:
    """The same in rows of `TOGETHER`, the last one filled up."""
    missing = -order.shape[0] % TOGETHER
    padded = _with_flags(jnp.pad(order, (0, missing)), count)
    index, needed = (x.reshape(-1, TOGETHER) for x in padded)
    return index, needed
