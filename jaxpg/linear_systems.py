r"""Linear systems A x = target whose matrix is known only by its products.

    conjugate_gradient    x by steps along directions p with p[i]^T A p[j] = 0
    inner_product         sum of x * y over all entries of two trees

Vectors are trees of floating-point arrays, such as parameters; a search works on them
as one vector of each type.

Reference: Hestenes and Stiefel 1952, "Methods of conjugate gradients for solving linear
systems".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_positive, check_range
from jaxpg._flat import as_vectors
from jaxpg.types import PyTree

__all__ = [
    "ConjugateGradientResult",
    "Product",
    "add_scaled",
    "check_like",
    "conjugate_gradient",
    "inner_product",
    "largest_entry",
]

Product = Callable[[PyTree], PyTree]
"""A symmetric matrix, known by its product with a tree that stands for a vector."""


class ConjugateGradientResult(NamedTuple):
    """An approximate solution of A x = target.

    Attributes:
        solution: x, a tree like the target.
        residual: |target - A x| / |target|, computed from x itself; 0 for a target of
            zero, and NaN where the target or A x is not finite.
        num_iterations: how many steps x is the sum of.
    """

    solution: PyTree
    residual: Float[Array, ""]
    num_iterations: Int[Array, ""]


class _Search(NamedTuple):
    """A conjugate-gradient search between two steps."""

    solution: PyTree
    remainder: PyTree  # target - A x, by recurrence
    remainder_sq: Array
    direction: PyTree
    stiffest: Array  # the largest curvature met
    num_iterations: Array
    goes_on: Array


def conjugate_gradient(
    matvec: Product,
    target: PyTree,
    *,
    num_iterations: int = 10,
    tolerance: float = 1e-10,
    start: PyTree | None = None,
) -> ConjugateGradientResult:
    """Solve A x = target for a symmetric, positive A that is known by its products.

    From zero, it stays in A's range: where A is singular and the target lies in the
    range, x is the shortest solution. A direction without positive curvature, which
    only a singular or indefinite A or rounding can give, ends the search; the solution
    is what was found until then. Nothing is raised, `residual` tells.

    Args:
        matvec: x -> A x, on trees like the target.
        target: a tree of floating-point arrays.
        num_iterations: the most steps; each costs one product, and the residual of the
            result one more.
        tolerance: the search ends where |target - A x|^2 <= tolerance |target|^2, and
            in any case where that is rounding; at least 0.
        start: the first x, zero unless given; it costs one more product.

    Returns:
        The solution, and how good it is.

    Raises:
        ValueError: if a number is out of range, or `start` is no tree like the target.

    Reference: Hestenes and Stiefel 1952, "Methods of conjugate gradients for solving
        linear systems"; Nocedal and Wright 2006, algorithm 5.2.

    >>> result = conjugate_gradient(lambda x: 4.0 * x, jnp.array([4.0, 8.0]))
    >>> result.solution.tolist(), result.num_iterations.item()
    ([1.0, 2.0], 1)
    """
    check_positive("num_iterations", num_iterations)
    check_range("tolerance", tolerance, 0.0)
    if start is not None:
        check_like("start", start, target)
    target, back = as_vectors(target)
    start = None if start is None else as_vectors(start)[0]
    matvec = _on_vectors(matvec, back)
    # The largest entry becomes 1, so that no square overflows or vanishes.
    scale = largest_entry(target)
    scale = jnp.where((scale > 0.0) & jnp.isfinite(scale), scale, 1.0)
    unit = jax.tree.map(lambda x: x / scale.astype(x.dtype), target)
    size_sq = inner_product(unit, unit)
    first = _start_search(matvec, unit, start, scale, size_sq)
    # What is left below this is rounding, and where A is singular not in its range.
    least = max(tolerance, (8.0 * _rounding(target)) ** 2)

    def unfinished(search: _Search) -> Array:
        far = search.remainder_sq > least * size_sq
        return far & search.goes_on & (search.num_iterations < num_iterations)

    last = jax.lax.while_loop(unfinished, lambda s: _one_step(matvec, s), first)
    left = jax.tree.map(jnp.subtract, unit, matvec(last.solution))
    residual = jnp.sqrt(inner_product(left, left) / jnp.where(size_sq, size_sq, 1.0))
    solution = jax.tree.map(lambda x: x * scale.astype(x.dtype), last.solution)
    return ConjugateGradientResult(back(solution), residual, last.num_iterations)


def _on_vectors(matvec: Product, back: Callable[[PyTree], PyTree]) -> Product:
    return lambda x: as_vectors(matvec(back(x)))[0]


def _start_search(
    matvec: Product, unit: PyTree, start: PyTree | None, scale: Array, size_sq: Array
) -> _Search:
    solution = jax.tree.map(jnp.zeros_like, unit)
    remainder = unit
    if start is not None:
        # A target of zero has the solution zero, wherever the search would start.
        factor = jnp.where(size_sq > 0.0, 1.0 / scale, 0.0)
        solution = jax.tree.map(lambda x: x * factor.astype(x.dtype), start)
        remainder = jax.tree.map(jnp.subtract, unit, matvec(solution))
    remainder_sq = inner_product(remainder, remainder)
    return _Search(
        solution,
        remainder,
        remainder_sq,
        remainder,
        jnp.zeros_like(remainder_sq),
        jnp.zeros((), jnp.int32),
        jnp.array(True),
    )


def _one_step(matvec: Product, search: _Search) -> _Search:
    product = matvec(search.direction)
    curvature = inner_product(search.direction, product)
    size_sq = inner_product(search.direction, search.direction)
    stiffest = jnp.maximum(search.stiffest, curvature / size_sq)
    # Less than rounding leaves of the stiffest one is no curvature. NaN is none either.
    floor = _rounding(search.direction) * stiffest * size_sq
    usable = curvature > floor
    length = jnp.where(usable, search.remainder_sq / curvature, 0.0)
    solution = add_scaled(search.solution, length, search.direction)
    remainder = add_scaled(search.remainder, -length, product)
    remainder_sq = inner_product(remainder, remainder)
    turn = remainder_sq / search.remainder_sq
    return _Search(
        solution,
        remainder,
        remainder_sq,
        add_scaled(remainder, turn, search.direction),
        stiffest,
        search.num_iterations + usable.astype(jnp.int32),
        usable,
    )


def inner_product(one: PyTree, other: PyTree) -> Float[Array, ""]:
    """sum of one * other over all entries of two trees, in the default float type.

    Not a matrix product, which accelerators round to fewer digits.

    >>> tree = {"a": jnp.ones(2), "b": jnp.array(3.0)}
    >>> inner_product(tree, tree).item()
    11.0
    """
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(float) * y.astype(float)), one, other
    )
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


def largest_entry(tree: PyTree) -> Float[Array, ""]:
    """The largest absolute value in a tree, in the default float type.

    >>> largest_entry({"a": jnp.array([1.0, -4.0]), "b": jnp.array(3.0)}).item()
    4.0
    """
    sizes = [
        jnp.max(jnp.abs(x.astype(float)), initial=0.0) for x in jax.tree.leaves(tree)
    ]
    return jnp.max(jnp.stack(sizes))


def add_scaled(one: PyTree, factor: Array, other: PyTree) -> PyTree:
    """one + factor * other, entry by entry, in the types of `one`.

    >>> add_scaled(jnp.array(1.0), jnp.array(2.0), jnp.array(3.0)).item()
    7.0
    """
    return jax.tree.map(lambda x, y: x + factor.astype(x.dtype) * y, one, other)


def _rounding(tree: PyTree) -> float:
    """The relative rounding of the coarsest type in a tree."""
    return max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree))


def check_like(name: str, tree: PyTree, model: PyTree) -> None:
    """Refuse a tree of another structure, or with another shape or type in it.

    Raises:
        ValueError: naming what came and what is needed.
    """
    came, needed = (
        jax.tree.map(lambda x: (x.shape, str(x.dtype)), one) for one in (tree, model)
    )
    if came != needed:
        raise ValueError(
            f"{name} is a tree of {came}, needs {needed}: the same structure, shapes "
            "and types"
        )
