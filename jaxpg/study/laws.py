r"""How variance falls with the batch: slopes, laws, and what the oracle says of them.

Estimators that are means of N independent terms have variance a / N. Leave-one-out ties
its terms together: with A, B the trajectory's credited and plain scores and R its
return (on policy, E B = 0),

    V(N) = a / N + c / (N (N - 1)),     a = tr Var(A - E[R] B)
                                        c = Var(R) E|B|^2 + |E[R B]|^2

because g is the mean of A - E[R] B less a U-statistic of (R[j] - E R) B[i] that is
uncorrelated with it. The batch mean has a trajectory's own return in it as well:

    V(N) = tr Var(A - E[R] B - (R - E R) B / N) / N + c (N - 1) / N^3

On a log-log scale a / N is a line of slope -1.

The critical batch size is where signal equals noise, V(N) = |G|^2; for a / N that is
McCandlish's noise scale a / |G|^2.

References: Hoeffding 1948, "A class of statistics with asymptotically normal
distribution"; McCandlish et al. 2018.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxpg import exact
from jaxpg.credit import credit_of
from jaxpg.estimators import Estimator, EstimatorConfig, estimate_terms
from jaxpg.gradients import trajectory_gradients
from jaxpg.policies import log_prob_fn
from jaxpg.study.subjects import Subject
from jaxpg.types import Trajectory

__all__ = [
    "Law",
    "Slope",
    "exact_leave_one_out_law",
    "exact_term_law",
    "fit_law",
    "fit_slope",
    "has_independent_terms",
    "is_proved_unbiased",
    "law_of",
    "pooled_errors",
]


class Law(NamedTuple):
    """V(N) = a / N + c / (N (N - 1)); of the batch mean where `own` is given.

    Attributes:
        a: variance of one trajectory's term.
        c: what a baseline that is fitted on the others adds.
        own: tr Var((R - E R) B), where a trajectory's own return is in its baseline.
        cross: tr Cov(A - E[R] B, (R - E R) B), likewise.
    """

    a: float
    c: float = 0.0
    own: float | None = None
    cross: float = 0.0

    def variance(self, batch_size: Any) -> Any:
        """V at some N, at least 2 where c is not 0."""
        n = np.asarray(batch_size, float)
        if self.own is not None:
            term = self.a - 2.0 * self.cross / n + self.own / n**2
            return term / n + self.c * (n - 1.0) / n**3
        pairs = self.c / np.maximum(n * (n - 1.0), 1e-300) if self.c else 0.0
        return self.a / n + pairs

    def critical_batch_size(self, norm_sq: float) -> float | None:
        """The N at which V(N) = |G|^2; None where there is no signal.

        >>> Law(8.0).critical_batch_size(2.0)
        4.0
        """
        if not norm_sq > 0.0 or not self.a > 0.0:
            return None
        if self.c <= 0.0:
            return self.a / norm_sq
        # |G|^2 N (N - 1) = a (N - 1) + c
        half = 0.5 * (norm_sq + self.a)
        root = half**2 - norm_sq * (self.a - self.c)
        return (half + float(np.sqrt(max(root, 0.0)))) / norm_sq


class Slope(NamedTuple):
    """A line through log variance against log N.

    Attributes:
        value: -1 for means of independent terms.
        error: its standard error, as if sizes shared no trajectories.
        sizes: how many sizes it was fitted to.
    """

    value: float
    error: float
    sizes: int


def has_independent_terms(config: EstimatorConfig) -> bool:
    """Whether the estimate is a mean of N independent terms.

    Args:
        config: an estimator's settings; baselines that learn count as learned.
    """
    learned = ("none", "linear", "value-network")
    divides = config.standardize or config.credit.self_normalize
    return config.baseline in learned and not divides


def is_proved_unbiased(config: EstimatorConfig) -> bool:
    """Whether the oracle's table has it as unbiased, at any batch size.

    Args:
        config: an estimator's settings.
    """
    credit = config.credit
    whole = credit.ratio in ("none", "whole", "causal") and credit.max_rho is None
    plain = config.baseline == "batch-mean" or config.baseline.endswith("-plain")
    divides = config.standardize or credit.self_normalize
    return whole and not plain and not divides


def pooled_errors(variances: Any, errors: Any, batches: Any) -> list[float | None]:
    """Standard errors of variances as V sqrt(s / (K - 1)), with one s for all.

    A variance that came out small by luck has a small bootstrap error as well, and
    would draw a fitted line down to itself.

    Args:
        variances: V at each size.
        errors: bootstrap standard error of each.
        batches: K at each size.
    """
    known = [
        (e / v) ** 2 * (k - 1)
        for v, e, k in zip(variances, errors, batches, strict=True)
        if v and e
    ]
    if not known:
        return [None] * len(variances)
    scale = float(np.median(known))
    return [
        v * float(np.sqrt(scale / (k - 1))) if v and e else None
        for v, e, k in zip(variances, errors, batches, strict=True)
    ]


def fit_slope(sizes: Any, variances: Any, errors: Any) -> Slope | None:
    """Weighted least squares of log V on log N.

    Args:
        sizes: N, at least two different ones.
        variances: V at each.
        errors: standard error of each V.

    Returns:
        The slope; None where fewer than two variances are known.

    >>> fit_slope([2, 4, 8], [4.0, 2.0, 1.0], [0.1, 0.1, 0.1]).value.__round__(6)
    -1.0
    """
    known = _known(sizes, variances, errors)
    if len(known) < 2:
        return None
    n, v, e = known.T
    x, y, w = np.log(n), np.log(v), (v / e) ** 2
    middle = (w * x).sum() / w.sum()
    spread = (w * (x - middle) ** 2).sum()
    value = (w * (x - middle) * y).sum() / spread
    return Slope(float(value), float(1.0 / np.sqrt(spread)), len(known))


def fit_law(sizes: Any, variances: Any, errors: Any) -> Law | None:
    """Weighted least squares of V on 1/N and 1/(N (N - 1)).

    Args:
        sizes: N, at least 2 each.
        variances: V at each.
        errors: standard error of each V.

    Returns:
        The law; None where fewer than three variances are known.
    """
    known = _known(sizes, variances, errors)
    known = known[known[:, 0] >= 2] if len(known) else known
    if len(known) < 3:
        return None
    n, v, e = known.T
    both = np.stack([1.0 / n, 1.0 / (n * (n - 1.0))], axis=1) / e[:, None]
    a, c = np.linalg.lstsq(both, v / e, rcond=None)[0]
    return Law(float(a), float(c))


def law_of(
    config: EstimatorConfig, sizes: Any, variances: Any, errors: Any
) -> Law | None:
    """The law that a kind of estimator is known to follow, fitted to what was measured.

    Args:
        config: the estimator's settings.
        sizes: N.
        variances: V at each.
        errors: standard error of each V.
    """
    known = _known(sizes, variances, errors)
    if not len(known):
        return None
    if has_independent_terms(config):
        n, v, e = known.T
        weights = (n * e) ** -2.0
        return Law(float((weights * n * v).sum() / weights.sum()))
    return fit_law(*known.T)


def exact_term_law(subject: Subject, estimator: Estimator, state: Any) -> Law:
    """a = tr Var of one trajectory's term, by enumeration of the world.

    Args:
        subject: a tabular one.
        estimator: a mean of independent terms.
        state: what its baseline has learned.
    """
    assert subject.mdp is not None
    acts = subject.params
    if estimator.config.credit.ratio != "none":
        assert subject.behaviour is not None
        acts = subject.behaviour

    def terms(rows: Trajectory) -> Array:
        found = estimate_terms(estimator, subject.params, state, rows, summary=())
        return jax.vmap(lambda tree: ravel_pytree(tree)[0])(found)[0]

    moments = exact.estimate_moments(terms, subject.mdp, subject.policy, acts, 1)
    return Law(float(jnp.sum(moments.variance)))


def exact_leave_one_out_law(subject: Subject, estimator: Estimator) -> Law:
    """a and c of the mean return of the others, on policy, by enumeration.

    Args:
        subject: a tabular one.
        estimator: with the baseline "leave-one-out" or "batch-mean", and an
            undiscounted credit.
    """
    assert subject.mdp is not None
    log_probs = log_prob_fn(subject.policy)

    def parts(rows: Trajectory) -> tuple[Array, ...]:
        credit = credit_of(rows, estimator.config.credit)
        a, b = (
            jax.vmap(lambda tree: ravel_pytree(tree)[0])(
                trajectory_gradients(log_probs, subject.params, rows, w)
            )[0]
            for w in credit
        )
        return a, b, credit.value[0, 0]

    mdp = subject.mdp

    def expected(estimate: Any) -> Any:
        return exact.expected_estimate(
            lambda rows: estimate(*parts(rows)), mdp, subject.policy, subject.params, 1
        )

    mean, gradient = expected(lambda a, b, total: (total, total * b))

    def products(a: Array, b: Array, total: Array) -> tuple[Array, ...]:
        term = a - mean * b - gradient
        own = (total - mean) * b - gradient
        return (
            jnp.sum(term**2),
            jnp.sum(own**2),
            jnp.sum(term * own),
            (total - mean) ** 2,
            jnp.sum(b**2),
        )

    a, own, cross, spread, scores = (float(x) for x in expected(products))
    c = spread * scores + float(jnp.sum(gradient**2))
    if estimator.config.baseline == "batch-mean":
        return Law(a, c, own, cross)
    return Law(a, c)


def _known(sizes: Any, variances: Any, errors: Any) -> np.ndarray:
    """Rows (N, V, error) where all three are known and positive."""
    rows = [
        (float(n), float(v), float(e))
        for n, v, e in zip(sizes, variances, errors, strict=True)
        if v is not None and e is not None and v > 0.0 and e > 0.0
    ]
    return np.array(rows).reshape(-1, 3)
