r"""Diagnostics: how noisy a gradient is, and how far two policies have drifted apart.

Of N trajectories' own gradients g_i, with mean g, covariance Sigma and G = E g_i:

    total_variance     tr Sigma = sum over entries of 1/(N-1) sum_i (g_i - g)^2
    variance_of_mean   tr Cov(g) = tr Sigma / N
    gradient_norm_sq   |G|^2 = |g|^2 - tr Sigma / N,   for E|g|^2 = |G|^2 + tr Cov(g)
    signal_to_noise    |G|^2 / tr Cov(g)
    noise_scale        tr Sigma / |G|^2, the N at which signal and noise are equal

Estimates of |G|^2 are unbiased, hence negative at times: the batch was then too small
to see the gradient. They stay negative, for clipping would bias their averages. A ratio
of averages is what a ratio of noisy numbers should be: average both, then divide.

Of log-ratios log rho = log pi(a) - log mu(a), of actions that mu took, what they say of
KL(mu || pi) and of the weights that they make. Empty slots are never counted.

References: McCandlish, Kaplan, Amodei et al. 2018, "An empirical model of large-batch
training"; Schulman 2020, "Approximating KL divergence".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpg._checks import check_positive, check_range, check_rank, check_same_shape
from jaxpg.importance import MAX_LOG_WEIGHT, to_weights
from jaxpg.moments import Moments, moments_of, variance
from jaxpg.types import PyTree

__all__ = [
    "KLEstimates",
    "MAX_LOG_RHO",
    "MAX_LOG_SUM",
    "NoiseScale",
    "RatioDiagnostics",
    "cosine",
    "explained_variance",
    "gradient_norm_sq",
    "kl_estimators",
    "noise_scale",
    "ratio_diagnostics",
    "signal_to_noise",
    "total_variance",
    "two_batch_noise_scale",
    "variance_of_mean",
]

MAX_LOG_RHO = 1e4
"""One decision's log-ratio is held within this: squares and means of it are finite."""

MAX_LOG_SUM = 1e9
"""Log-weights, sums of many log-ratios, are held within this."""

BATCH = "(B, T) = one number per decision; for one row use x[None]"


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


class KLEstimates(NamedTuple):
    """Three estimates of KL(mu || pi) in nats, from actions that mu took.

    Attributes:
        k1: mean of -log rho.
        k2: mean of (log rho)^2 / 2.
        k3: mean of rho - 1 - log rho.
        num_alive: how many decisions each is a mean over; 0 leaves the estimates 0.
    """

    k1: Float[Array, "*T"]
    k2: Float[Array, "*T"]
    k3: Float[Array, "*T"]
    num_alive: Int[Array, "*T"]

    @property
    def pooled(self) -> "KLEstimates":
        """The same over all decisions: their mean, each decision counting once."""
        total = jnp.sum(self.num_alive)
        n = jnp.maximum(total, 1).astype(self.k1.dtype)
        share = self.num_alive.astype(self.k1.dtype) / n
        k1, k2, k3 = (jnp.sum(share * k) for k in (self.k1, self.k2, self.k3))
        return KLEstimates(k1, k2, k3, total)


def kl_estimators(
    log_rhos: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> KLEstimates:
    """Estimates of KL(mu || pi) = E_mu[log mu - log pi] at each decision t.

    The direction is from the policy that acted, mu, to the one asked about, pi, with
    rho = pi / mu, averaged over what mu meets at t among the trajectories alive there.

    Args:
        log_rhos: log pi - log mu of each decision, held within +-`MAX_LOG_RHO`; in k3
            rho is held at exp(`MAX_LOG_WEIGHT`).
        mask: whether slot t holds a decision.

    Returns:
        One estimate of each kind per time step, [T], and `pooled` over all of them.

    Raises:
        ValueError: if the arrays are not two batches of one shape.

    Bias: k1 is unbiased and may be negative; k3 is unbiased where mu can take all that
        pi can, and never negative; k2 is biased by the third order in log rho. Where
        lengths vary, `pooled` is a ratio of means, biased O(1/B).

    Reference: Schulman 2020, "Approximating KL divergence".

    >>> estimates = kl_estimators(jnp.array([[-0.5], [0.1]]), jnp.ones((2, 1), bool))
    >>> [round(k.item(), 4) for k in estimates[:3]]
    [0.2, 0.065, 0.0559]
    """
    _check_batch(log_rhos=log_rhos, mask=mask)

    def of_step(log_rhos: Array, alive: Array) -> KLEstimates:
        # Where nothing is alive all three are 0 at log rho = 0.
        x = jnp.where(alive, jnp.clip(log_rhos, -MAX_LOG_RHO, MAX_LOG_RHO), 0.0)
        rho_less_one = jnp.expm1(jnp.minimum(x, MAX_LOG_WEIGHT))
        num_alive = jnp.sum(alive)
        n = jnp.maximum(num_alive, 1).astype(x.dtype)
        return KLEstimates(
            k1=jnp.sum(-x) / n,
            k2=jnp.sum(x**2 / 2.0) / n,
            k3=jnp.sum(rho_less_one - x) / n,
            num_alive=num_alive,
        )

    return jax.vmap(of_step, in_axes=1)(log_rhos, mask)


class RatioDiagnostics(NamedTuple):
    """How even importance weights are, step by step; 0 where nothing is alive.

    Attributes:
        num_alive: n, the decisions at this step.
        ess: (sum w)^2 / sum w^2, in [1, n].
        max_share: the largest weight's part of their sum, in [1/n, 1].
        max_weight: the largest weight.
        mean_ratio: the mean weight.
        log_weight_std: standard deviation of the log-weights, in nats.
    """

    num_alive: Int[Array, "*T"]
    ess: Float[Array, "*T"]
    max_share: Float[Array, "*T"]
    max_weight: Float[Array, "*T"]
    mean_ratio: Float[Array, "*T"]
    log_weight_std: Float[Array, "*T"]


def ratio_diagnostics(
    log_weights: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> RatioDiagnostics:
    """Effective sample size, largest weight, mean and spread at each decision t.

    Args:
        log_weights: log-ratios of decisions, or sums of them such as
            `cumulative_log_rhos`; held within +-`MAX_LOG_SUM`. Weights and their mean
            are held at exp(`MAX_LOG_WEIGHT`); `ess` and `max_share` are not.
        mask: whether slot t holds a decision.

    Returns:
        One number of each kind per time step, [T], over the trajectories alive there.

    Raises:
        ValueError: if the arrays are not two batches of one shape.

    Bias: `mean_ratio` is unbiased for its limit: 1 for single decisions' ratios; for
        products P_pi(alive at t) / P_mu(alive at t), 1 while all are alive. The others
        describe this batch. `log_weight_std` divides by n.

    Reference: Kong 1992; Owen 2013, "Monte Carlo theory", section 9.3.

    >>> ratio_diagnostics(jnp.zeros((3, 1)), jnp.ones((3, 1), bool)).ess.tolist()
    [3.0]
    """
    _check_batch(log_weights=log_weights, mask=mask)

    def of_step(log_weights: Array, alive: Array) -> RatioDiagnostics:
        bounded = jnp.clip(log_weights, -MAX_LOG_SUM, MAX_LOG_SUM)
        top = jnp.max(bounded, where=alive, initial=-MAX_LOG_SUM)
        shares = jnp.where(alive, jnp.exp(bounded - top), 0.0)
        num_alive = jnp.sum(alive)
        n = jnp.maximum(num_alive, 1).astype(shares.dtype)
        # With anything alive, the largest share is 1 and both sums are at least that.
        total = jnp.sum(shares)
        least = jnp.maximum(total, 1.0)
        std = jnp.sqrt(variance(moments_of(bounded, alive), ddof=0))
        return RatioDiagnostics(
            num_alive,
            ess=total**2 / jnp.maximum(jnp.sum(shares**2), 1.0),
            max_share=jnp.minimum(total, 1.0) / least,
            max_weight=to_weights(top),
            mean_ratio=to_weights(top + jnp.log(least) - jnp.log(n)),
            log_weight_std=jnp.where(num_alive > 0, std, 0.0),
        )

    return jax.vmap(of_step, in_axes=1)(log_weights, mask)


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


def _check_batch(**arrays: Array) -> None:
    check_same_shape(**arrays)
    for name, array in arrays.items():
        check_rank(name, array, 2, BATCH)


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
