"""What `vmap` would spoil: single decisions for a whole batch, and single rows.

`vmap` turns a batched `cond` into "compute both and select" and a batched `while_loop`
into a loop that copies its whole carry each turn. For work that is merely *skipped*
when nobody needs it, one decision for the whole batch is right and far cheaper: the
work goes on while anybody, anywhere in any vmapped axis, needs it (`anywhere`). And one
row is not a batch of one (`over_rows`), nor are rows side by side one long row
(`vmap_rows`).
"""

import contextvars
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxpg.types import PyTree

__all__ = ["anybody", "anywhere", "over_rows", "rows_are_vmapped", "vmap_rows"]

_ROWS_ARE_VMAPPED = contextvars.ContextVar("rows_are_vmapped", default=False)


@jax.custom_batching.custom_vmap
def _or_over_vmapped_axes(flag: Bool[Array, "..."]) -> Bool[Array, "..."]:
    return flag


@_or_over_vmapped_axes.def_vmap
def _reduce_vmapped_axis(axis_size, in_batched, flag):
    del axis_size
    reduced = jnp.any(flag, axis=0) if in_batched[0] else flag
    return _or_over_vmapped_axes(reduced), False


def anywhere(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether any flag is set, in this array and along every vmapped axis around it.

    The result is not batched under `vmap`, so that a `cond` or a `while_loop` that
    depends on it stays a real branch. Use it only where doing the work for a member
    that does not need it changes nothing.

    >>> import jax, jax.numpy as jnp
    >>> jax.vmap(anywhere)(jnp.array([[False, False], [True, False]])).tolist()
    [True, True]
    """
    return _or_over_vmapped_axes(jnp.any(flags))


def anybody(flags: Bool[Array, "..."]) -> Bool[Array, "..."]:
    """Each flag by itself: whether it is set along any vmapped axis around it.

    Like `anywhere`, and for work of which there are several parts.

    >>> import jax, jax.numpy as jnp
    >>> jax.vmap(anybody)(jnp.array([[False, False], [True, False]])).tolist()
    [[True, False], [True, False]]
    """
    return _or_over_vmapped_axes(flags)


def vmap_rows(
    fn: Callable[..., PyTree], in_axes: tuple[int | None, ...]
) -> Callable[..., PyTree]:
    """`vmap` over rows, of which `rows_are_vmapped` tells while `fn` is traced.

    >>> vmap_rows(lambda scale, row: scale * row, (None, 0))(2.0, jnp.ones(2)).tolist()
    [2.0, 2.0]
    """

    def told(*args: Any) -> PyTree:
        token = _ROWS_ARE_VMAPPED.set(True)
        try:
            return fn(*args)
        finally:
            _ROWS_ARE_VMAPPED.reset(token)

    return jax.vmap(told, in_axes)


def rows_are_vmapped() -> bool:
    """Whether what is traced now will see many rows side by side.

    It may decide how numbers lie in memory, never what they are.

    >>> rows_are_vmapped()
    False
    """
    return _ROWS_ARE_VMAPPED.get()


def over_rows(fn: Callable[[Any, PyTree], PyTree], shared: Any, rows: PyTree) -> PyTree:
    """`fn(shared, row)` of every row: `vmap`, and no axis at all where there is one.

    Chunks of decisions come as one long row. An axis of one would still be carried
    through every product, and XLA lays some of them out anew for its sake.

    >>> over_rows(lambda scale, row: scale * row, 2.0, jnp.array([[1.0, 3.0]])).tolist()
    [[2.0, 6.0]]
    """
    if jax.tree.leaves(rows)[0].shape[0] != 1:
        return vmap_rows(fn, (None, 0))(shared, rows)
    found = fn(shared, jax.tree.map(lambda x: x[0], rows))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], found)
