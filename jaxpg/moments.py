r"""Mean and variance of trees of arrays, streamed: constant memory, any chunking.

    mean = 1/n sum_i x[i],        squares = sum_i (x[i] - mean)^2        per entry

Two parts of a sample are joined by

    delta = mean_b - mean_a,      mean = mean_a + delta n_b / n
    squares = squares_a + squares_b + delta^2 n_a n_b / n

which never subtracts large sums, so a small variance around a large mean survives. Over
very many merges rounding alone would still stop both sums (what is added falls below
half a unit in the last place), so each is kept with the part that rounding took away
and the sum of the two is what is merged. The count is an integer, exact to 2^32 - 1.

`Moments` are a tree of arrays: carry them through `jax.lax.scan`, stack them with
`vmap`, gather them from devices, and join any number with `merge_over_axis`.

References: Welford 1962; Chan, Golub and LeVeque 1979, "Updating formulae and a
pairwise algorithm for computing sample variances"; Knuth 1969, section 4.2.2, for the
exact error of a sum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt

from jaxpg.types import PyTree

__all__ = [
    "Moments",
    "merge",
    "merge_over_axis",
    "moments_of",
    "no_moments",
    "variance",
]

BLOCK = 64
"""How many are summed plainly; more go in blocks, and in blocks of blocks."""


class Moments(NamedTuple):
    """What is known of a sample of trees; start from `no_moments` or `moments_of`.

    Attributes:
        num_samples: n; wraps around after 2^32 - 1.
        mean: the mean of each entry, as near as its dtype can say.
        mean_rest: what rounding took from `mean`; their sum is the mean.
        squares: sum of squared deviations from the mean, of each entry.
        squares_rest: what rounding took from `squares`.
    """

    num_samples: UInt[Array, "*K"]
    mean: PyTree
    mean_rest: PyTree
    squares: PyTree
    squares_rest: PyTree


def no_moments(tree_like: PyTree) -> Moments:
    """The moments of no sample at all; merging them changes nothing.

    Args:
        tree_like: one sample, or its shapes from `jax.eval_shape`.

    Returns:
        Zeros, in at least 32 bits.

    >>> no_moments(jnp.ones(2)).num_samples.item()
    0
    """
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _dtype(x)), tree_like)
    return Moments(jnp.zeros((), jnp.uint32), zeros, zeros, zeros, zeros)


def moments_of(samples: PyTree, mask: Bool[Array, " N"] | None = None) -> Moments:
    """Moments of N samples at once.

    Args:
        samples: a tree whose leaves have N in front.
        mask: whether sample i counts; all do without it. What does not count may be
            anything, NaN too.

    Returns:
        Moments of the samples that count, in at least 32 bits.

    Raises:
        ValueError: if there is no array, or the arrays' N differ.

    Bias: none; a mean over samples, and exact deviations from it.

    >>> moments = moments_of(jnp.array([1.0, 2.0, 6.0]))
    >>> moments.mean.item(), moments.squares.item()
    (3.0, 14.0)
    """
    number = _num_samples(samples, mask)
    counts = jnp.ones((number,), bool) if mask is None else mask

    def clean(x: Array) -> Array:
        x = x.astype(_dtype(x))
        return x if mask is None else jnp.where(_column(mask, x), x, 0.0)

    means = jax.tree.map(clean, samples)
    zeros = jax.tree.map(jnp.zeros_like, means)
    # A sample is the mean of itself alone.
    singles = Moments(counts.astype(jnp.uint32), means, zeros, zeros, zeros)
    return merge_over_axis(singles)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint samples together.

    Args:
        a: moments of one sample, possibly of nothing.
        b: moments of another, of the same tree.

    Returns:
        What `moments_of` would say of both samples together, but for rounding.

    Bias: none.

    Reference: Chan, Golub and LeVeque 1979, equations 2.1.

    >>> a, b = moments_of(jnp.array([1.0, 2.0])), moments_of(jnp.array([6.0]))
    >>> merge(a, b).squares.item()
    14.0
    """

    def join(*parts: Array) -> tuple[Array, ...]:
        merged = _merge_leaf(a.num_samples, b.num_samples, *parts)
        # From nothing, the other is taken as it is, to the bit.
        pairs = zip(merged, parts[4:], strict=True)
        return tuple(jnp.where(a.num_samples == 0, other, x) for x, other in pairs)

    joined = jax.tree.map(join, *a[1:], *b[1:])
    return _moments(a.num_samples + b.num_samples, a.mean, joined)


def merge_over_axis(stacked: Moments) -> Moments:
    """Join K moments that are stacked along a leading axis.

        n = sum_k n_k,    mean = sum_k n_k mean_k / n
        squares = sum_k squares_k + sum_k n_k (mean_k - mean)^2

    These are sums over K, taken in blocks of blocks so that rounding grows with log K.

    For devices: `merge_over_axis(jax.lax.all_gather(moments, axis_name))`, or plainly
    on a stack that is spread over them.

    Args:
        stacked: moments with K in front of every array, such as `vmap` gives.

    Returns:
        The moments of all K samples together.

    Bias: none.

    >>> parts = jax.vmap(moments_of)(jnp.array([[1.0, 2.0], [6.0, 7.0]]))
    >>> merge_over_axis(parts).mean.item()
    4.0
    """
    number = stacked.num_samples.shape[0]
    if number <= BLOCK:
        return _merge_block(stacked)
    whole = number // BLOCK * BLOCK
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, BLOCK, *x.shape[1:]), stacked)
    merged = jax.vmap(_merge_block)(blocks)
    if whole < number:
        rest = _merge_block(jax.tree.map(lambda x: x[whole:], stacked))
        merged = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), merged, rest)
    return merge_over_axis(merged)


def variance(moments: Moments, ddof: int = 1) -> PyTree:
    """squares / (n - ddof), entry by entry.

    Args:
        moments: of the sample.
        ddof: 1 for the variance of what was sampled from, 0 for that of the sample.

    Returns:
        A tree like one sample; NaN where n <= ddof, for then nothing is known.

    Bias: unbiased at `ddof = 1` (Bessel's correction); at 0 too small by 1 - 1/n.

    >>> variance(moments_of(jnp.array([1.0, 2.0, 6.0]))).item()
    7.0
    """

    def divide(squares: Array, rest: Array) -> Array:
        freedom = moments.num_samples.astype(squares.dtype) - ddof
        return jnp.where(
            freedom > 0.0, (squares + rest) / jnp.maximum(freedom, 1.0), jnp.nan
        )

    return jax.tree.map(divide, moments.squares, moments.squares_rest)


def _merge_block(stacked: Moments) -> Moments:
    """Join a few at once: two passes over how the means differ from the least one."""
    number = jnp.sum(stacked.num_samples, dtype=jnp.uint32)

    def of_leaf(
        mean: Array, mean_rest: Array, squares: Array, squares_rest: Array
    ) -> tuple[Array, ...]:
        each = _column(stacked.num_samples, mean).astype(mean.dtype)
        n = jnp.maximum(number.astype(mean.dtype), 1.0)
        # Anything inside the sample's range will do; this makes equal samples spread 0.
        least = jnp.min(mean, axis=0, where=each > 0.0, initial=jnp.inf)
        pivot = jnp.where(number > 0, least, 0.0)
        from_pivot = (mean - pivot[None]) + mean_rest
        shift = jnp.sum(each * from_pivot, axis=0) / n
        between = jnp.sum(each * (from_pivot - shift[None]) ** 2, axis=0)
        rest = between + jnp.sum(squares_rest, axis=0)
        return *_two_sum(pivot, shift), *_two_sum(jnp.sum(squares, axis=0), rest)

    return _moments(number, stacked.mean, jax.tree.map(of_leaf, *stacked[1:]))


def _column(numbers: Array, like: Array) -> Array:
    """[N] as [N, 1, ..., 1], with as many axes as `like`."""
    return numbers.reshape(-1, *(1,) * (like.ndim - 1))


def _moments(count: Array, tree_like: PyTree, leaves: PyTree) -> Moments:
    """Moments from a tree that has its four arrays at every leaf."""
    four = jax.tree.structure((0, 0, 0, 0))
    return Moments(
        count, *jax.tree.transpose(jax.tree.structure(tree_like), four, leaves)
    )


def _merge_leaf(count_a: Array, count_b: Array, *parts: Array) -> tuple[Array, ...]:
    mean_a, mean_rest_a, squares_a, squares_rest_a = parts[:4]
    mean_b, mean_rest_b, squares_b, squares_rest_b = parts[4:]
    number_a, number_b = (n.astype(mean_a.dtype) for n in (count_a, count_b))
    share = number_b / jnp.maximum(number_a + number_b, 1.0)
    delta = (mean_b - mean_a) + (mean_rest_b - mean_rest_a)
    between = delta * (number_a * share) * delta
    squares, lost = _two_sum(squares_a, squares_b)
    lost = lost + (squares_rest_a + squares_rest_b)
    return *_add(mean_a, mean_rest_a, share * delta), *_add(squares, lost, between)


def _add(x: Array, rest: Array, increment: Array) -> tuple[Array, Array]:
    """x + rest + increment, again as a rounded sum and what rounding took from it."""
    total, lost = _two_sum(x, increment)
    return _two_sum(total, rest + lost)


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """fl(x + y) and its exact error, whichever is larger (Knuth)."""
    total = x + y
    y_seen = total - x
    return total, (x - (total - y_seen)) + (y - y_seen)


def _dtype(x: Array | jax.ShapeDtypeStruct) -> jnp.dtype:
    """A float of at least 32 bits: half precision cannot count the samples."""
    is_wide = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 32
    return x.dtype if is_wide else jnp.result_type(float)


def _num_samples(samples: PyTree, mask: Array | None) -> int:
    arrays = jax.tree.leaves(samples)
    if not arrays:
        raise ValueError("samples hold no array, need a tree with N in front of each")
    leading = {x.shape[:1] for x in (*arrays, *([] if mask is None else [mask]))}
    if len(leading) > 1 or () in leading:
        shapes = [x.shape for x in arrays]
        of_mask = "" if mask is None else f" and mask {mask.shape}"
        raise ValueError(
            f"samples have shapes {shapes}{of_mask}, need the same N in front of each; "
            "for one sample use x[None]"
        )
    return arrays[0].shape[0]
