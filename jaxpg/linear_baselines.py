r"""Linear baselines: ridge regression on features of observation and time.

    V(o, t) = phi(o, t) . x,    phi = [o, o^2, t, t^2, t^3, 1]

    (M + ridge * diag(M)) x = v,  M = sum reach * phi phi^T,  v = sum value * phi

which minimises sum reach * (value / reach - V)^2: importance-weighted least squares off
policy, ordinary ones on policy. M and v are sums over decisions, so they add up over
chunks and devices.

What was fitted to a trajectory must not weigh it. Three ways are offered: fitted on
earlier batches (`fit` comes after the weighing), fitted on the other folds of the same
batch (`num_folds`), and fitted on the very batch, which is biased and goes by "plain".

References: Duan et al. 2016, "Benchmarking deep reinforcement learning for continuous
control" (the features); Chernozhukov et al. 2018, "Double/debiased machine learning for
treatment and structural parameters" (cross-fitting).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import check_positive, check_range
from jaxpg.baselines import Baseline, stateless
from jaxpg.credit import Credit, mean_credit
from jaxpg.envs.base import Space
from jaxpg.networks import flat_features
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "NormalEquations",
    "as_floats",
    "explained_with_offset",
    "linear_baseline",
    "plain_linear_baseline",
    "polynomial_features",
    "solve_ridge",
    "squared_errors",
]

HIGHEST = jax.lax.Precision.HIGHEST
"""Accelerators multiply in fewer bits unless told: too few for sums of products that a
system of equations is solved with."""

LARGEST_OBSERVATION = 10.0
"""Observations are clipped here, so that a rare huge one does not rule the fit."""


class NormalEquations(NamedTuple):
    """matrix @ coefficients = vector, as sums over decisions.

    Attributes:
        matrix: sum of reach * phi phi^T, [F, F]; with folds [K, F, F].
        vector: sum of value * phi, [F]; with folds [K, F].
    """

    matrix: Float[Array, "*K F F"]
    vector: Float[Array, "*K F"]


def linear_baseline(
    observation_space: Space,
    max_steps: int,
    *,
    ridge: float = 1e-3,
    num_folds: int | None = None,
) -> Baseline:
    """Ridge regression on features of observation and time.

    Without folds it is fitted on the batch before, and 0 in the first one. With K folds
    trajectory i is in fold `episode_id % K` and is predicted by a fit on the others of
    its own batch; nothing is kept from batch to batch.

    Args:
        observation_space: observations are flattened, numbers one-hot coded.
        max_steps: the most decisions that an episode can take; the unit of time.
        ridge: added to every feature's weight in the fit, as a share of what it has.
        num_folds: K, at least 2; None fits on earlier batches.

    Returns:
        A baseline whose work grows with the cube of the number of features.

    Raises:
        ValueError: if a number is out of its range.

    Bias: unbiased, either way.

    Reference: Duan et al. 2016, "Benchmarking deep reinforcement learning for
        continuous control", appendix.

    >>> from jaxpg.envs.base import Discrete
    >>> linear_baseline(Discrete(3), max_steps=5, num_folds=2).min_trajectories
    2
    """
    features, num_features = polynomial_features(observation_space, max_steps)
    check_range("ridge", ridge, 0.0, open_low=True)
    if num_folds is not None:
        return _cross_fitted(features, ridge, num_folds)

    def init(key: PRNGKey, obs: PyTree) -> Array:
        del key, obs
        return jnp.zeros((num_features,), float)

    def summarize(params: Params, trajectories: Trajectory, credit: Credit) -> tuple:
        del params, trajectories, credit
        return ()

    def predict(
        params: Params, state: Array, summary: Any, rows: Trajectory, credit: Credit
    ) -> Array:
        del params, summary
        return _dot(features(rows), state).astype(credit.value.dtype)

    def fit(
        state: Array, rows: Trajectory, credit: Credit
    ) -> tuple[Array, dict[str, Array]]:
        phi, credit = features(rows), as_floats(credit)
        errors = squared_errors(_dot(phi, state), credit)
        info = {"baseline_explained_variance": explained_with_offset(errors, credit)}
        return solve_ridge(*_normal_equations(phi, credit), ridge, free_last=True), info

    return Baseline(init, summarize, predict, fit)


def plain_linear_baseline(
    observation_space: Space, max_steps: int, *, ridge: float = 1e-3
) -> Baseline:
    """As `linear_baseline`, but fitted on the very batch that it weighs.

    Args:
        observation_space: observations are flattened, numbers one-hot coded.
        max_steps: the most decisions that an episode can take; the unit of time.
        ridge: added to every feature's weight in the fit, as a share of what it has.

    Raises:
        ValueError: if a number is out of its range.

    Bias: biased: a trajectory's own return is in its own baseline, the more so the
        fewer trajectories there are for each feature.
    """
    features, _ = polynomial_features(observation_space, max_steps)
    check_range("ridge", ridge, 0.0, open_low=True)

    def summarize(params: Params, rows: Trajectory, credit: Credit) -> NormalEquations:
        del params
        return _normal_equations(features(rows), as_floats(credit))

    def predict(
        params: Params, summary: NormalEquations, rows: Trajectory, credit: Credit
    ) -> Array:
        del params
        coefficients = solve_ridge(*summary, ridge, free_last=True)
        return _dot(features(rows), coefficients).astype(credit.value.dtype)

    return stateless(predict, summarize)


def polynomial_features(
    observation_space: Space, max_steps: int
) -> tuple[Callable[[Trajectory], Array], int]:
    """[o, o^2, t, t^2, t^3, 1] of every decision, and how many features that are.

    Args:
        observation_space: observations are flattened, numbers one-hot coded, and both
            clipped to +-10.
        max_steps: the most decisions that an episode can take; time runs from 0 to 1.

    Returns:
        `features(trajectories) -> [B, T, F]` and F.

    Raises:
        ValueError: if `max_steps` is not a positive whole number.
    """
    check_positive("max_steps", max_steps)
    encode, size = flat_features(observation_space)

    def of_decision(obs: PyTree, time: Array) -> Array:
        o = jnp.clip(encode(obs), -LARGEST_OBSERVATION, LARGEST_OBSERVATION)
        t = (time.astype(float) / max_steps)[None]
        return jnp.concatenate([o, o**2, t, t**2, t**3, jnp.ones_like(t)])

    def features(trajectories: Trajectory) -> Array:
        return jax.vmap(jax.vmap(of_decision))(trajectories.obs, trajectories.time)

    return features, 2 * size + 4


def solve_ridge(
    matrix: Float[Array, "F F"],
    vector: Float[Array, " F"],
    ridge: float,
    *,
    free_last: bool = False,
) -> Float[Array, " F"]:
    """Solve (M + ridge * diag(M)) x = v for M symmetric, positive semidefinite.

    The ridge is a share of each feature's own weight, so features may be in any units.
    Plain eliminations, no LAPACK: safe on many devices. No row needs exchanging, for
    every pivot of the scaled system is at least the ridge.

    Args:
        matrix: sum of weighted phi phi^T.
        vector: sum of weighted target times phi.
        ridge: above 0; never less than what rounding asks for.
        free_last: whether the last feature, the constant, is held by rounding's ridge
            alone: shrinking it would pull every prediction towards 0.

    Returns:
        Coefficients; 0 for a feature that was never different from 0.

    Reference: Hoerl and Kennard 1970, "Ridge regression".

    >>> solve_ridge(jnp.diag(jnp.array([4.0, 0.0])), jnp.array([8.0, 0.0]), 1.0)
    Array([1., 0.], dtype=float32)
    """
    size, limits = vector.shape[0], jnp.finfo(matrix.dtype)
    diagonal = jnp.diagonal(matrix)
    seen = diagonal > limits.tiny
    scale = jnp.where(seen, jax.lax.rsqrt(jnp.where(seen, diagonal, 1.0)), 0.0)
    least = max(float(ridge), size * float(limits.eps))
    ridges = jnp.full((size,), least, matrix.dtype)
    if free_last:
        ridges = ridges.at[-1].set(size * limits.eps)
    scaled = matrix * scale[:, None] * scale[None, :] + jnp.diag(ridges)

    def eliminate(k: Array, system: Array) -> Array:
        row = system[k] / jnp.maximum(system[k, k], ridges[k])
        return (system - system[:, k][:, None] * row[None, :]).at[k].set(row)

    system = jnp.concatenate([scaled, (scale * vector)[:, None]], axis=1)
    return scale * jax.lax.fori_loop(0, size, eliminate, system)[:, -1]


def as_floats(credit: Credit) -> Credit:
    """Credit in the precision that fits are computed in, JAX's default."""
    return jax.tree.map(lambda x: x.astype(float), credit)


def squared_errors(values: Array, credit: Credit) -> Float[Array, ""]:
    """sum reach * (value / reach - V)^2 over decisions.

    >>> credit = Credit(jnp.array([6.0]), jnp.array([2.0]))
    >>> squared_errors(jnp.array([1.0]), credit).item()
    8.0
    """
    targets = mean_credit(credit.value, credit.reach)
    return jnp.sum(credit.reach * (targets - values) ** 2)


def explained_with_offset(errors: Float[Array, ""], credit: Credit) -> Float[Array, ""]:
    """1 - E[(target - V)^2] / Var[target]; 0 where the targets do not vary.

    A V that is off by a constant is not forgiven: below 0 it is worse than the mean.

    Args:
        errors: from `squared_errors`.
        credit: of the whole batch.

    Returns:
        At most 1.
    """
    mean = mean_credit(jnp.sum(credit.value), jnp.sum(credit.reach))
    spread = squared_errors(mean, credit)
    varies = spread > 0.0
    return jnp.where(varies, 1.0 - errors / jnp.where(varies, spread, 1.0), 0.0)


def _cross_fitted(
    features: Callable[[Trajectory], Array], ridge: float, num_folds: int
) -> Baseline:
    check_positive("num_folds", num_folds)
    check_range("num_folds", num_folds, 2, cure="one fold has no others")
    folds = jnp.arange(num_folds, dtype=jnp.int32)

    def summarize(params: Params, rows: Trajectory, credit: Credit) -> NormalEquations:
        del params
        phi, credit = features(rows), as_floats(credit)

        def of_fold(fold: Array) -> NormalEquations:
            own = rows.episode_id % num_folds == fold
            return _normal_equations(
                phi, Credit(*(jnp.where(own, x, 0.0) for x in credit))
            )

        return jax.lax.map(of_fold, folds)

    def predict(
        params: Params, summary: NormalEquations, rows: Trajectory, credit: Credit
    ) -> Array:
        del params

        def without(fold: Array) -> Array:
            # Added up anew: total minus own would leave rounding of a fold's own sums.
            others = jax.tree.map(
                lambda x: jnp.sum(jnp.where(_along(folds != fold, x), x, 0.0), axis=0),
                summary,
            )
            return solve_ridge(others.matrix, others.vector, ridge, free_last=True)

        coefficients = jax.vmap(without)(folds)
        levels = _dot(features(rows), coefficients.T)
        own = (rows.episode_id % num_folds)[..., None]
        return jnp.take_along_axis(levels, own, -1)[..., 0].astype(credit.value.dtype)

    return stateless(predict, summarize, min_trajectories=2)


def _normal_equations(phi: Array, credit: Credit) -> NormalEquations:
    weighed = phi * credit.reach[..., None]
    return NormalEquations(
        jnp.einsum("btf,btg->fg", weighed, phi, precision=HIGHEST),
        jnp.einsum("btf,bt->f", phi, credit.value, precision=HIGHEST),
    )


def _dot(phi: Array, coefficients: Array) -> Array:
    return jnp.matmul(phi, coefficients, precision=HIGHEST)


def _along(flags: Array, x: Array) -> Array:
    return flags.reshape(flags.shape + (1,) * (x.ndim - 1))
