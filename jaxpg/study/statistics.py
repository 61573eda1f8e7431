r"""What K gradients of independent batches say of an estimator, with intervals.

With g[k] the gradient of batch k, g their mean, G the true gradient (exact, or that of
a reference batch whose own error is taken off), per estimator and batch size:

    variance      V = 1/(K-1) sum_k |g[k] - g|^2       total, and of each block
    bias          <g - G, G> / |G|^2                   along the gradient, signed
    bias_norm_sq  (|g - G|^2 - V/K) / |G|^2            unbiased, may be negative
    snr           (|g|^2 - V/K) / V
    cosine        mean_k cos(g[k], G)
    noise_scale   N V / |G|^2                          in trajectories
    error         mean_k |g[k] - G|^2 / |G|^2          relative squared error

All estimators see the same trajectories, so two of them are compared batch by batch,
which takes off most of the luck that they share:

    relative_variance   V / V of another
    paired_bias         <g - g', G> / |G|^2,  g' of one that is proved unbiased

Batches are what is resampled in the bootstrap: they are independent, trajectories in
one of them are not once a baseline has tied them together. Below `LEAST` batches no
interval is given.

References: McCandlish et al. 2018 (noise scale); Efron and Tibshirani 1993.
"""

from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "LEAST",
    "Reference",
    "compare_bias",
    "compare_variance",
    "exact_reference",
    "sampled_reference",
    "summarize",
]

LEAST = 8
"""Batches below which a bootstrap would only pretend to know."""

RESAMPLES = 400
QUANTILES = (0.025, 0.975)


class Reference(NamedTuple):
    """The gradient that estimates are held against.

    Attributes:
        gradient: flat, [D].
        error_sq: E|gradient - G|^2; 0 where it is exact.
        along_error: standard error of <gradient, G> / |G|^2; 0 where it is exact.
        trajectories: how many it was made of; 0 where it is exact.
    """

    gradient: np.ndarray
    error_sq: float
    along_error: float
    trajectories: int

    @property
    def norm_sq(self) -> float:
        """|G|^2, without what the reference's own error adds."""
        return float(self.gradient @ self.gradient) - self.error_sq

    @property
    def is_seen(self) -> bool:
        """Whether there is a gradient, and the reference shows it over its own error.

        Else nothing can be told relative to it.
        """
        return self.norm_sq > 2.0 * self.error_sq and self.norm_sq > 0.0

    @property
    def scale(self) -> float:
        """|G|^2, or NaN where it is not seen: what is divided by it is then unknown."""
        return self.norm_sq if self.is_seen else float("nan")


def exact_reference(gradient: Any) -> Reference:
    """A gradient that is known.

    Args:
        gradient: flat, [D].
    """
    return Reference(np.asarray(gradient, np.float64), 0.0, 0.0, 0)


def sampled_reference(gradients: np.ndarray, trajectories: int) -> Reference:
    """The mean of independent batches' unbiased gradients, with its own error.

    Args:
        gradients: [K, D].
        trajectories: how many they were made of together.
    """
    x = np.asarray(gradients, np.float64)
    mean, count = x.mean(axis=0), len(x)
    error_sq = float(x.var(axis=0, ddof=1).sum()) / count
    norm_sq = max(float(mean @ mean) - error_sq, 1e-300)
    along = float(np.std(x @ mean, ddof=1)) / np.sqrt(count) / norm_sq
    return Reference(mean, error_sq, along, trajectories)


def summarize(
    gradients: np.ndarray,
    batch_size: int,
    reference: Reference,
    blocks: dict[str, slice],
    seed: int = 0,
) -> dict[str, Any]:
    """One cell of a study: the module's quantities, each with its interval.

    Args:
        gradients: of K batches, [K, D].
        batch_size: N.
        reference: what they estimate.
        blocks: where each array of the parameters lies in D.
        seed: of the bootstrap.

    Returns:
        Plain numbers by name; `NAME_low` and `NAME_high` bound the central 95% of the
        bootstrap. None where nothing is known.
    """
    x = np.asarray(gradients, np.float64)
    finite = np.isfinite(x).all(axis=1)
    x, count = x[finite], int(finite.sum())
    row: dict[str, Any] = {"batches": count, "non_finite_batches": int((~finite).sum())}
    if count == 0:
        return row | dict.fromkeys(NAMES) | {"variance_by_block": {}}
    parts = _Parts(x, reference, blocks)
    ones = np.ones((1, count))
    values = parts.quantities(ones, batch_size)
    row |= {name: _plain(values[name][0]) for name in NAMES}
    row |= _standard_errors(parts, reference)
    row["variance_by_block"] = {
        name: _plain(v)
        for name, v in zip(blocks, parts.variances(ones)[0], strict=True)
    }
    return row | _intervals(parts, batch_size, seed)


def compare_variance(
    gradients: np.ndarray, base: np.ndarray, seed: int = 0
) -> dict[str, float | None]:
    """The variance relative to another estimator's, on the same trajectories.

    Args:
        gradients: of K batches, [K, D].
        base: of the same batches by the other estimator.
        seed: of the bootstrap, which resamples both alike.

    Returns:
        The ratio and the central 95% of its bootstrap; None where nothing is known.
    """
    name = "relative_variance"
    both = np.isfinite(gradients).all(axis=1) & np.isfinite(base).all(axis=1)
    count = int(both.sum())
    if count < 2:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    ones = np.ones((1, count))
    own, other = (_variances_of(x[both], ones) for x in (gradients, base))
    found = {name: _ratio(own[0], other[0])}
    if count < LEAST:
        return found | dict.fromkeys((f"{name}_low", f"{name}_high"))
    counts = _resamples(count, seed)
    own, other = (_variances_of(x[both], counts) for x in (gradients, base))
    low, high = np.quantile(own / np.maximum(other, 1e-300), QUANTILES)
    return found | {f"{name}_low": _plain(low), f"{name}_high": _plain(high)}


def compare_bias(
    gradients: np.ndarray, unbiased: list[np.ndarray], reference: Reference
) -> dict[str, float | None]:
    """Bias along the gradient, held against estimators that are proved unbiased.

    Args:
        gradients: of K batches, [K, D].
        unbiased: of the same batches; the one that leaves the least error is taken.
        reference: gives the direction.

    Returns:
        The difference's mean and its standard error; None without any to compare with.
    """
    found: dict[str, float | None] = {"paired_bias": None, "paired_bias_error": None}
    for other in unbiased:
        along = (gradients - other) @ reference.gradient / reference.scale
        along = along[np.isfinite(along)]
        if len(along) < 2:
            continue
        error = float(np.std(along, ddof=1) / np.sqrt(len(along)))
        if found["paired_bias_error"] is None or error < found["paired_bias_error"]:
            found = {"paired_bias": float(along.mean()), "paired_bias_error": error}
    return found


NAMES = (
    "variance",
    "bias",
    "bias_norm_sq",
    "snr",
    "cosine",
    "noise_scale",
    "error",
)


class _Parts:
    """What every resample needs of the gradients, computed once."""

    def __init__(
        self, x: np.ndarray, reference: Reference, blocks: dict[str, slice]
    ) -> None:
        self.x = x
        self.count = len(x)
        self.reference = reference
        self.blocks = list(blocks.values())
        self.squares = np.stack([(x[:, b] ** 2).sum(axis=1) for b in self.blocks], 1)
        # About their mean: a small variance around a large mean keeps its digits.
        self.centred = x - x.mean(axis=0)
        self.centred_squares = np.stack(
            [(self.centred[:, b] ** 2).sum(axis=1) for b in self.blocks], 1
        )
        self.along = x @ reference.gradient
        norms = np.sqrt((x**2).sum(axis=1))
        self.cosines = self.along / np.maximum(norms * np.sqrt(reference.scale), 1e-300)
        self.distances = ((x - reference.gradient) ** 2).sum(axis=1)

    def variances(self, counts: np.ndarray) -> np.ndarray:
        """Sample variance of each block, for each row of counts, [S, blocks]."""
        shares = counts / self.count
        means = shares @ self.centred
        norms = np.stack([(means[:, b] ** 2).sum(axis=1) for b in self.blocks], 1)
        if self.count < 2:
            return np.full(norms.shape, np.nan)
        return (shares @ self.centred_squares - norms) * self.count / (self.count - 1)

    def quantities(self, counts: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """The module's quantities for each row of counts, [S]."""
        shares, reference = counts / self.count, self.reference
        size = reference.scale
        variance = self.variances(counts).sum(axis=1)
        of_mean = np.nan_to_num(variance / self.count)
        means = shares @ self.x
        mean_sq = (means**2).sum(axis=1)
        off = ((means - reference.gradient) ** 2).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "variance": variance,
                "bias": shares @ self.along / size - 1.0,
                "bias_norm_sq": (off - of_mean - reference.error_sq) / size,
                "snr": (mean_sq - of_mean) / variance,
                "cosine": shares @ self.cosines,
                "noise_scale": batch_size * variance / size,
                "error": (shares @ self.distances - reference.error_sq) / size,
            }


def _standard_errors(parts: _Parts, reference: Reference) -> dict[str, Any]:
    """Of the bias along the gradient: the batches' and the reference's own."""
    if parts.count < 2:
        return {"bias_error": None}
    own = np.std(parts.along, ddof=1) / np.sqrt(parts.count) / reference.scale
    return {"bias_error": _plain(np.hypot(own, reference.along_error))}


def _intervals(parts: _Parts, batch_size: int, seed: int) -> dict[str, Any]:
    if parts.count < LEAST:
        return {f"{name}_{end}": None for name in NAMES for end in ("low", "high")}
    counts = _resamples(parts.count, seed)
    found: dict[str, Any] = {}
    # A resample of K has the spread of K - 1: widened to be right on average.
    again = parts.count / (parts.count - 1)
    for name, values in parts.quantities(counts, batch_size).items():
        if name in ("variance", "noise_scale"):
            values = values * again
        if name == "bias_norm_sq":
            # Resampled means stray from the mean by V/K once more.
            values = values - parts.variances(np.ones((1, parts.count))).sum() / (
                parts.count * parts.reference.scale
            )
        low, high = np.quantile(values, QUANTILES)
        found[f"{name}_low"], found[f"{name}_high"] = _plain(low), _plain(high)
        found[f"{name}_error"] = _plain(np.std(values))
    if found["bias_norm_sq_error"] is not None:
        found["bias_norm_sq_error"] = float(
            np.hypot(found["bias_norm_sq_error"], _reference_part(parts.reference))
        )
    del found["bias_error"]  # the standard error knows the reference's part as well
    return found


def _resamples(count: int, seed: int) -> np.ndarray:
    """How often each batch is drawn, [S, K]; the same for every estimator."""
    rng = np.random.default_rng(seed)
    even = np.full(count, 1.0 / count)
    return rng.multinomial(count, even, size=RESAMPLES).astype(float)


def _variances_of(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Total variance of each resample, [S]."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=0)
    shares = counts / len(x)
    off = ((shares @ centred) ** 2).sum(axis=1)
    return (shares @ (centred**2).sum(axis=1) - off) * len(x) / (len(x) - 1)


def _ratio(one: float, other: float) -> float | None:
    return _plain(one / other) if other > 0.0 else None


def _reference_part(reference: Reference) -> float:
    """How far the reference's own error can move a bias norm."""
    return reference.error_sq / reference.scale


def _plain(x: Any) -> float | None:
    """A finite Python number, or None."""
    return float(x) if np.isfinite(x) else None
