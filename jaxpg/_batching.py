"""Predicates that stay one decision when the program around them is vmapped.

`vmap` turns a batched `cond` into "compute both and select" and a batched `while_loop`
into a loop that copies its whole carry each turn. For work that is merely *skipped*
when nobody needs it, one decision for the whole batch is right and far cheaper: the
work goes on while anybody, anywhere in any vmapped axis, needs it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

__all__ = ["anywhere"]


@jax.custom_batching.custom_vmap
def _or_over_vmapped_axes(flag: Bool[Array, ""]) -> Bool[Array, ""]:
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
