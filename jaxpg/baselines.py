r"""Baselines: what is subtracted from a decision's credit to lower the variance.

    weights[i, t] = returns[i, t] - baseline[i, t]

A baseline leaves the gradient unbiased when it is independent of the action that it is
subtracted for, given the history before it. The mean of the *other* trajectories is;
the mean of the batch is not, for it contains the action's own return.

A `Baseline` is three pure functions. `predict` sees the batch that is being weighed;
`fit` sees it afterwards, so what is fitted serves later batches. Here stand those that
read returns only and have nothing to fit; those that need scores live with the engine.

"The trajectory's return" below is its credit at its first decision, whichever credit is
used: the total return for both total return and reward-to-go.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import check_positive
from jaxpg.returns import at_episode_start
from jaxpg.types import PRNGKey, PyTree, Trajectory

__all__ = [
    "Baseline",
    "batch_mean_baseline",
    "constant_baseline",
    "leave_one_out_baseline",
    "no_baseline",
    "time_dependent_baseline",
]

Info = dict[str, Array]


class Baseline(NamedTuple):
    """A baseline as a record of pure functions.

    Attributes:
        init: `init(key, obs) -> state`, from one observation.
        predict: `predict(state, trajectories, returns [B, T]) -> [B, T]`.
        fit: `fit(state, trajectories, returns) -> (state, info)`, after the weighing.
        min_trajectories: the fewest trajectories that `predict` makes sense for.
    """

    init: Callable[[PRNGKey, PyTree], PyTree]
    predict: Callable[[PyTree, Trajectory, Array], Array]
    fit: Callable[[PyTree, Trajectory, Array], tuple[PyTree, Info]]
    min_trajectories: int = 1


def no_baseline() -> Baseline:
    """No baseline: b = 0.

    Bias: unbiased.
    """
    return constant_baseline(0.0)


def constant_baseline(value: float) -> Baseline:
    """The same number everywhere, fixed before the batch is seen.

    Args:
        value: in units of the return.

    Bias: unbiased.

    Reference: Williams 1992, reinforcement baseline.
    """
    return _stateless(lambda trajectories, returns: jnp.full_like(returns, value))


def batch_mean_baseline() -> Baseline:
    """The batch's mean return, b = 1/N sum_j R_j.

    Bias: the gradient is shrunk by exactly (1 - 1/N), for each trajectory's own return
        is in the mean that is subtracted from it; use `leave_one_out_baseline` instead.
    """

    def predict(trajectories: Trajectory, returns: Array) -> Array:
        total, count = _sum_at_starts(trajectories, returns)
        return jnp.full_like(returns, 1.0) * (total / jnp.maximum(count, 1.0))

    return _stateless(predict)


def leave_one_out_baseline() -> Baseline:
    """The mean return of the other trajectories, b_i = 1/(N-1) sum_{j != i} R_j.

    Bias: unbiased.

    Reference: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """

    def predict(trajectories: Trajectory, returns: Array) -> Array:
        total, count = _sum_at_starts(trajectories, returns)
        own = jax.vmap(at_episode_start)(returns, trajectories.time)
        return (total - own) / jnp.maximum(count - 1.0, 1.0)

    return _stateless(predict, min_trajectories=2)


def time_dependent_baseline(max_steps: int, *, leave_one_out: bool = True) -> Baseline:
    """The mean credit at decision t over the n_t trajectories still alive there.

    With `leave_one_out` the mean is over the other alive ones, b_it = 1/(n_t - 1)
    sum_{j != i} G_jt, and 0 where a trajectory is alone.

    Args:
        max_steps: the most decisions that an episode can take.
        leave_one_out: whether a trajectory's own credit is left out of its mean.

    Returns:
        A baseline for credit that depends on time, such as reward-to-go.

    Raises:
        ValueError: if `max_steps` is not a positive whole number.

    Bias: unbiased with `leave_one_out`; without, the part of the gradient that belongs
        to decision t is scaled by 1 - E[1/n_t given alive].
    """
    check_positive("max_steps", max_steps)

    def predict(trajectories: Trajectory, returns: Array) -> Array:
        time, mask = trajectories.time, trajectories.mask
        alive = mask.astype(returns.dtype)
        total = _sum_by_time(alive * returns, time, max_steps)
        count = _sum_by_time(alive, time, max_steps)
        if not leave_one_out:
            return (total / jnp.maximum(count, 1.0))[time]
        others = count[time] - 1.0
        mean = (total[time] - returns) / jnp.maximum(others, 1.0)
        return jnp.where(others > 0.0, mean, 0.0)

    return _stateless(predict, min_trajectories=2 if leave_one_out else 1)


def _stateless(
    predict: Callable[[Trajectory, Array], Array], min_trajectories: int = 1
) -> Baseline:
    def init(key: PRNGKey, obs: PyTree) -> Any:
        del key, obs
        return ()

    def fit(state: PyTree, trajectories: Trajectory, returns: Array) -> Any:
        del trajectories, returns
        return state, {}

    def predict_statelessly(
        state: PyTree, trajectories: Trajectory, returns: Float[Array, "B T"]
    ) -> Float[Array, "B T"]:
        del state
        return predict(trajectories, returns)

    return Baseline(init, predict_statelessly, fit, min_trajectories)


def _sum_at_starts(trajectories: Trajectory, returns: Array) -> tuple[Array, Array]:
    starts = trajectories.starts
    total = jnp.sum(jnp.where(starts, returns, 0.0))
    return total, jnp.sum(starts.astype(returns.dtype))


def _sum_by_time(values: Array, time: Array, max_steps: int) -> Array:
    return jnp.zeros((max_steps,), values.dtype).at[time].add(values)
