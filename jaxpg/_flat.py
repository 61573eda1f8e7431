"""Trees as vectors, one of each type of number, and back.

A compiler makes, and a device launches, work array by array: a dozen arrays of weights
that are squared, checked and moved are dozens of small kernels. As one vector they are
a few.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxpg.types import PyTree

__all__ = ["as_vectors", "on_vectors", "scan_into_vectors"]

Vectors = list[Array]


def as_vectors(tree: PyTree) -> tuple[Vectors, Callable[[Vectors], PyTree]]:
    """The numbers of a tree in its order, and how such vectors become a tree again.

    Args:
        tree: of arrays.

    Returns:
        One vector for each type that occurs, and `back(vectors)`, which takes vectors
        of the same lengths, with further axes in front if need be.

    >>> vectors, back = as_vectors({"a": jnp.ones((2, 2)), "b": jnp.zeros(1)})
    >>> [x.tolist() for x in vectors]
    [[1.0, 1.0, 1.0, 1.0, 0.0]]
    >>> jax.tree.map(jnp.shape, back([jnp.ones((7, 5))]))
    {'a': (7, 2, 2), 'b': (7, 1)}
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(x) for x in leaves]
    shapes = [x.shape for x in leaves]
    groups: dict[Any, list[int]] = {}  # in order of appearance: the same everywhere
    for place, x in enumerate(leaves):
        groups.setdefault(x.dtype, []).append(place)
    places = list(groups.values())

    def back(vectors: Vectors) -> PyTree:
        found: dict[int, Array] = {}
        for some, vector in zip(places, vectors, strict=True):
            ends = np.cumsum([np.prod(shapes[i], dtype=int) for i in some])[:-1]
            for i, part in zip(some, jnp.split(vector, ends, axis=-1), strict=True):
                found[i] = part.reshape(*vector.shape[:-1], *shapes[i])
        return jax.tree.unflatten(structure, [found[i] for i in range(len(shapes))])

    def join(some: list[int]) -> Array:
        return jnp.concatenate([leaves[i].reshape(-1) for i in some])

    return [join(some) for some in places], back


def on_vectors(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same optimiser, with its state and its work in vectors.

    Args:
        optimizer: treats numbers one by one, or all together, whatever the tree.

    Returns:
        An Optax transformation with extra arguments.

    >>> sgd, slope = on_vectors(optax.sgd(0.5)), {"a": jnp.ones(2), "b": jnp.ones(1)}
    >>> jax.tree.map(lambda x: x.tolist(), sgd.update(slope, sgd.init(slope))[0])
    {'a': [-0.5, -0.5], 'b': [-0.5]}
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        return inner.init(as_vectors(params)[0])

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        vectors, back = as_vectors(updates)
        where = None if params is None else as_vectors(params)[0]
        moved, state = inner.update(vectors, state, where, **extra)
        return back(moved), state

    return optax.GradientTransformationExtraArgs(init, update)


def scan_into_vectors(
    fn: Callable[[Any, Any], tuple[Any, PyTree]], carry: Any, xs: PyTree
) -> tuple[Any, PyTree]:
    """`lax.scan`, for results of many small arrays: each step writes a few vectors.

    Args:
        fn: `fn(carry, x) -> (carry, y)`.
        carry: before the first step.
        xs: what is scanned over.

    Returns:
        As `lax.scan`.

    >>> total, seen = scan_into_vectors(lambda c, x: (c + x, (c, x)), 0, jnp.arange(3))
    >>> total.item(), jax.tree.map(lambda x: x.tolist(), seen)
    (3, ([0, 0, 1], [0, 1, 2]))
    """
    found: list[Callable[[Vectors], PyTree]] = []

    def step(carry: Any, x: Any) -> tuple[Any, Vectors]:
        carry, y = fn(carry, x)
        vectors, back = as_vectors(y)
        found.append(back)
        return carry, vectors

    carry, vectors = jax.lax.scan(step, carry, xs)
    return carry, found[-1](vectors)
