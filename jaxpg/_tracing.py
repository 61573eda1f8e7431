"""Functions that are traced once, however often their program mentions them.

JAX traces a function at every mention of it: once for the shapes of its results, once
in the loop that runs it. Where such mentions are nested their numbers multiply; the
terms of PPO's gradient were traced eight times over for one program.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from jaxpg.types import PyTree

__all__ = ["traced_once"]


def traced_once(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`fn`, whose trace is kept for arguments of the same shapes.

    Unlike a `jit` within the program it leaves no trace of its own: the operations are
    those of `fn`, and a profile finds them at the lines where `fn` has them.

    Args:
        fn: a pure function of trees of arrays. It may close over others.

    Returns:
        The same function, for use within the program that is being traced: it does not
        see that a setting of JAX has changed since.

    >>> import jax.numpy as jnp
    >>> twice = traced_once(lambda x: 2.0 * x)
    >>> jax.eval_shape(twice, jnp.ones(3)).shape, twice(jnp.ones(3)).tolist()
    ((3,), [2.0, 2.0, 2.0])
    """
    traces: dict[Any, Any] = {}

    def from_trace(*args: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(args)
        kinds = structure, tuple(jax.typeof(x) for x in leaves)
        if kinds not in traces:
            traces[kinds] = jax.make_jaxpr(fn, return_shape=True)(*args)
        program, shapes = traces[kinds]
        results = jaxpr_as_fun(program)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return from_trace
