r"""Diagnostics: how noisy a gradient is, and how well a value function predicts.

Of N trajectories' own gradients g_i, with mean g, covariance Sigma and G = E g_i:

    total_variance     tr Sigma = sum over entries of 1/(N-1) sum_i (g_i - g)^2
    variance_of_mean   tr Cov(g) = tr Sigma / N
    gradient_norm_sq   |G|^2 = |g|^2 - tr Sigma / N,   for E|g|^2 = |G|^2 + tr Cov(g)
    signal_to_noise    |G|^2 / tr Cov(g)
    noise_scale        tr Sigma / |G|^2, the N at which signal and noise are equal

Estimates of |G|^2 are unbiased, hence negative at times: the batch was then too small
to see the gradient. They stay negative, for clipping would bias their averages. A ratio
of averages is what a ratio of noisy numbers should be: average both, then divide.

How far two policies have drifted apart is in `jaxpg.drift`.

Reference: McCandlish, Kaplan, Amodei et al. 2018, "An empirical model of large-batch
training".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpg._checks import check_positive, check_range, check_same_shape
from jaxpg.moments import Moments, moments_of, variance
from jaxpg.types import PyTree

__all__ = [
    "NoiseScale",
    "cosine",
    "explained_variance",
    "gradient_norm_sq",
    "noise_scale",
    "signal_to_noise",
    "total_variance",
    "two_batch_noise_scale",
    "variance_of_mean",
]


def total_variance(moments: Moments) -> Float[Array, ""]:
    """tr Sigma: variance of ONE trajectory's gradient, summed over its entries.

    Args:
        moments: of single trajectories' gradients.

    Returns:
        In units of the gradient squared; NaN for fewer than two trajectories.

    Bias: unbiased (N - 1).

    >>> total_variance(moments_of({"w": jnp.array([[0.0, 1.0], [2.0, 1.0]])})).item()
    2.0
    """
    return _sum_over_leaves(variance(moments))


def variance_of_mean(moments: Moments) -> Float[Array, ""]:
    """tr Cov(g) = tr Sigma / N: variance of the batch's gradient, which is a mean.

    Args:
        moments: of single trajectories' gradients.

    Returns:
        In units of the gradient squared; NaN for fewer than two trajectories.

    Bias: unbiased, for independent trajectories. A baseline from the batch itself ties
        them together, a little.

    >>> variance_of_mean(moments_of(jnp.array([0.0, 2.0]))).item()
    1.0
    """
    total = total_variance(moments)
    return total / jnp.maximum(moments.num_samples.astype(total.dtype), 1.0)


def gradient_norm_sq(moments: Moments) -> Float[Array, ""]:
    """|G|^2 = |g|^2 - tr Sigma / N: the mean's squared norm without what is noise.

    Args:
        moments: of single trajectories' gradients.

    Returns:
        In units of the gradient squared; negative where noise hides the gradient, NaN
        for fewer than two trajectories.

    Bias: unbiased; |g|^2 itself is too large by tr Sigma / N.

    >>> gradient_norm_sq(moments_of(jnp.array([0.0, 2.0, 4.0]))).round(4).item()
    2.6666998863220215
    """
    return _dot(moments.mean, moments.mean) - variance_of_mean(moments)


def signal_to_noise(moments: Moments) -> Float[Array, ""]:
    """|G|^2 / tr Cov(g) of the batch's gradient: N over the noise scale.

    The plain ratio |g|^2 / tr Cov(g) is exactly this plus one, and so is never near 0.

    Args:
        moments: of single trajectories' gradients.

    Returns:
        A number of at least -1, without unit; not above 0 where the batch shows no
        gradient over its noise. Infinite without any noise, 0 without either.

    Bias: a ratio of unbiased estimates, itself biased O(1/N) of its size. Over steps
        divide averages of `gradient_norm_sq` by averages of `variance_of_mean`.

    >>> signal_to_noise(moments_of(jnp.array([0.0, 2.0, 4.0]))).round(4).item()
    2.0
    """
    return _ratio(gradient_norm_sq(moments), variance_of_mean(moments))


class NoiseScale(NamedTuple):
    """The pair behind the gradient noise scale; average pairs, not their ratios.

    The ratio is no field, so that `jax.tree.map(jnp.mean, pairs).noise_scale` divides
    averages.

    Attributes:
        gradient_norm_sq: an unbiased estimate of |G|^2; may be negative.
        total_variance: an unbiased estimate of tr Sigma, for one trajectory.
    """

    gradient_norm_sq: Float[Array, "*K"]
    total_variance: Float[Array, "*K"]

    @property
    def noise_scale(self) -> Float[Array, "*K"]:
        """tr Sigma / |G|^2, in trajectories; infinite at |G|^2 = 0, 0 without either.

        Below 0 it says that the batches were too small to see the gradient.
        """
        return _ratio(self.total_variance, self.gradient_norm_sq)


def noise_scale(moments: Moments) -> NoiseScale:
    """The gradient noise scale B = tr Sigma / |G|^2 from single trajectories.

    A batch of B trajectories has as much noise as signal; many more are wasted.

    Args:
        moments: of single trajectories' gradients.

    Returns:
        The pair to average over steps, and its ratio in trajectories.

    Bias: both of the pair are unbiased; their ratio is biased.

    Reference: McCandlish et al. 2018, equation 2.9.

    >>> noise_scale(moments_of(jnp.array([0.0, 2.0, 4.0]))).noise_scale.round(4).item()
    1.5
    """
    return NoiseScale(gradient_norm_sq(moments), total_variance(moments))


def two_batch_noise_scale(
    small_norm_sq: Float[Array, "*K"],
    big_norm_sq: Float[Array, "*K"],
    batch_small: int,
    batch_big: int,
) -> NoiseScale:
    """The gradient noise scale from squared norms of two batches' mean gradients.

        |G|^2 = (B_big |g_big|^2 - B_small |g_small|^2) / (B_big - B_small)
        tr Sigma = (|g_small|^2 - |g_big|^2) / (1 / B_small - 1 / B_big)

    Args:
        small_norm_sq: |g_small|^2, or its mean over the parts of the big batch.
        big_norm_sq: |g_big|^2; the big batch may contain the small one.
        batch_small: trajectories in the small batch.
        batch_big: trajectories in the big batch, more.

    Returns:
        The pair to average over steps, and its ratio in trajectories.

    Raises:
        ValueError: if the big batch is not bigger than the small one.

    Bias: both of the pair are unbiased; their ratio is biased.

    Reference: McCandlish et al. 2018, appendix A.1.

    >>> two_batch_noise_scale(jnp.array(5.0), jnp.array(2.0), 1, 4).noise_scale.item()
    4.0
    """
    check_positive("batch_small", batch_small)
    cure = "give the smaller batch first"
    check_range("batch_big", batch_big, batch_small, open_low=True, cure=cure)
    scaled = batch_big * big_norm_sq - batch_small * small_norm_sq
    excess = small_norm_sq - big_norm_sq
    return NoiseScale(
        scaled / (batch_big - batch_small), excess / (1 / batch_small - 1 / batch_big)
    )


def cosine(tree_a: PyTree, tree_b: PyTree) -> Float[Array, ""]:
    """<a, b> / (|a| |b|), the cosine of the angle between two trees.

    Args:
        tree_a: a gradient, say; of any size, for it is scaled first.
        tree_b: a tree of the same structure and shapes.

    Returns:
        A number in [-1, 1]; 0 where either is zero.

    Raises:
        ValueError: if structures or shapes differ.

    Bias: between a noisy gradient and a fixed one drawn towards 0 by the noise.

    >>> cosine({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 4.0])}).item()
    0.6000000238418579
    """
    jax.tree.map(lambda x, y: check_same_shape(tree_a=x, tree_b=y), tree_a, tree_b)
    a, b = _largest_to_one(tree_a), _largest_to_one(tree_b)
    norms = jnp.sqrt(_dot(a, a) * _dot(b, b))
    return jnp.clip(_ratio(_dot(a, b), norms), -1.0, 1.0)


def explained_variance(
    predictions: Float[Array, "..."],
    targets: Float[Array, "..."],
    mask: Bool[Array, "..."],
) -> Float[Array, ""]:
    """1 - Var(targets - predictions) / Var(targets), of a value function say.

    Args:
        predictions: of any shape, in units of the return.
        targets: what was predicted, of the same shape.
        mask: which of them count.

    Returns:
        1 for perfect predictions, 0 for those no better than a constant, negative for
        worse; 0 where the targets do not vary or nothing counts.

    Raises:
        ValueError: if the shapes differ.

    Bias: describes this batch; an error that is the same everywhere is not seen.

    >>> targets = jnp.array([0.0, 1.0, 2.0])
    >>> explained_variance(targets + 5.0, targets, jnp.ones(3, bool)).item()
    1.0
    """
    check_same_shape(predictions=predictions, targets=targets, mask=mask)

    def spread(x: Array) -> Array:
        return variance(moments_of(x.ravel(), mask.ravel()), ddof=0)

    whole, left = spread(targets), spread(targets - predictions)
    varies = whole > 0.0
    return jnp.where(varies, 1.0 - left / jnp.where(varies, whole, 1.0), 0.0)


def _sum_over_leaves(tree: PyTree) -> Array:
    sums = [jnp.sum(x.astype(float)) for x in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack(sums))


def _dot(a: PyTree, b: PyTree) -> Array:
    return _sum_over_leaves(
        jax.tree.map(lambda x, y: x.astype(float) * y.astype(float), a, b)
    )


def _largest_to_one(tree: PyTree) -> PyTree:
    """The tree, scaled so that no square overflows, nor all of them vanish."""
    tree = jax.tree.map(lambda x: x.astype(float), tree)
    sizes = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack(sizes))
    scale = jnp.where(largest > 0.0, largest, 1.0)
    return jax.tree.map(lambda x: x / scale, tree)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Their quotient, where 0 / 0 is 0."""
    neither = (numerator == 0.0) & (denominator == 0.0)
    return numerator / jnp.where(neither, 1.0, denominator)
