r"""Baselines: what is subtracted from a decision's credit to lower the variance.

    weights[i, t] = value[i, t] - reach[i, t] * baseline[i, t]         (`jaxpg.credit`)

A baseline leaves the gradient unbiased when it is independent of the action that it is
subtracted for, given the history before it. The mean of the *other* trajectories is;
the mean of the batch is not, for it contains the action's own return.

A `Baseline` is four pure functions. What it needs to know of the whole batch is an
additive *summary*: sums over rows, so that a batch larger than memory is summarised
chunk by chunk, and devices add up theirs. `predict` then sees some rows and the summary
of all. `fit` comes after the weighing, so what is fitted serves later batches.

Here stand the means. Those that need scores are in `jaxpg.optimal`, those that are
fitted in `jaxpg.value_functions`. "The trajectory's return" is its credit at its first
decision: the total return for both total return and reward-to-go.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import check_positive, is_concrete
from jaxpg.credit import Credit
from jaxpg.importance import MAX_LOG_WEIGHT
from jaxpg.returns import at_episode_start
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "Baseline",
    "Summary",
    "apply_baseline",
    "batch_mean_baseline",
    "constant_baseline",
    "leave_one_out_baseline",
    "mean_credit",
    "mean_of_others",
    "no_baseline",
    "stateless",
    "sums_by_time",
    "time_dependent_baseline",
]

Info = dict[str, Array]

Summary = PyTree
"""Sums over rows; () where a baseline needs nothing of the batch."""


class Baseline(NamedTuple):
    """A baseline as a record of pure functions.

    Attributes:
        init: `init(key, obs) -> state`, from one observation.
        summarize: `summarize(params, trajectories, credit) -> summary`, sums over rows;
            () where `predict` needs nothing of the batch.
        predict: `predict(params, state, summary, trajectories, credit) -> [B, T]`, for
            some rows or all of those that the summary was made of.
        fit: `fit(state, trajectories, credit) -> (state, info)`, after the weighing.
        min_trajectories: the fewest trajectories that `predict` makes sense for.
        needs_batch: whether the summary says anything, so that batches that are
            visited in chunks must be visited twice.
        needs_scores: whether rows must be single trajectories, because their scores
            are taken.
    """

    init: Callable[[PRNGKey, PyTree], PyTree]
    summarize: Callable[[Params, Trajectory, Credit], Summary]
    predict: Callable[[Params, PyTree, Summary, Trajectory, Credit], Array]
    fit: Callable[[PyTree, Trajectory, Credit], tuple[PyTree, Info]]
    min_trajectories: int = 1
    needs_batch: bool = False
    needs_scores: bool = False


def apply_baseline(
    baseline: Baseline,
    params: Params,
    state: PyTree,
    trajectories: Trajectory,
    credit: Credit,
    summary: Summary | None = None,
) -> Float[Array, "B T"]:
    """value - reach * baseline: the weights of `score_gradient`.

    Args:
        baseline: any.
        params: the policy's parameters, for baselines that need scores.
        state: what the baseline has learned.
        trajectories: rows of whole episodes.
        credit: of the same rows.
        summary: of the whole batch; None where these rows are the whole batch.

    Returns:
        One weight per decision, 0 in empty slots, held constant.

    Raises:
        ValueError: if a whole batch, whose values are known and not traced, has fewer
            trajectories than the baseline makes sense for.

    Bias: none of its own; that of the credit and of the baseline.

    Reference: Williams 1992; Greensmith, Bartlett and Baxter 2004.
    """
    if summary is None:
        _check_enough(baseline, trajectories)
        summary = baseline.summarize(params, trajectories, credit)
    level = baseline.predict(params, state, summary, trajectories, credit)
    weights = credit.value - credit.reach * level
    return jax.lax.stop_gradient(jnp.where(trajectories.mask, weights, 0.0))


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
    return stateless(
        predict=lambda params, summary, rows, credit: jnp.full_like(credit.value, value)
    )


def batch_mean_baseline() -> Baseline:
    """The batch's mean return, b = 1/N sum_j R_j.

    Bias: the gradient is shrunk by exactly (1 - 1/N), for each trajectory's own return
        is in the mean that is subtracted from it; use `leave_one_out_baseline` instead.
    """

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        del params, trajectories
        level = mean_credit(summary.value, summary.reach)
        return jnp.broadcast_to(level, credit.value.shape)

    return stateless(predict, _sums_at_starts)


def leave_one_out_baseline() -> Baseline:
    """The mean return of the other trajectories, b_i = 1/(N-1) sum_{j != i} R_j.

    Off policy the mean is importance-weighted: the others' value over their reach.

    Bias: unbiased.

    Reference: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        del params
        own = jax.tree.map(
            lambda x: jax.vmap(at_episode_start)(x, trajectories.time), credit
        )
        return mean_of_others(summary, own)

    return stateless(predict, _sums_at_starts, min_trajectories=2)


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

    def summarize(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
        del params
        return jax.tree.map(lambda x: sums_by_time(x, trajectories, max_steps), credit)

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        del params
        at_same_time = jax.tree.map(lambda x: x[trajectories.time], summary)
        if not leave_one_out:
            return mean_credit(at_same_time.value, at_same_time.reach)
        return mean_of_others(at_same_time, credit)

    return stateless(predict, summarize, min_trajectories=2 if leave_one_out else 1)


def stateless(
    predict: Callable[[Params, Any, Trajectory, Credit], Array],
    summarize: Callable[[Params, Trajectory, Credit], Any] | None = None,
    *,
    min_trajectories: int = 1,
    needs_scores: bool = False,
) -> Baseline:
    """A baseline that learns nothing from batch to batch.

    Args:
        predict: `predict(params, summary, trajectories, credit) -> [B, T]`.
        summarize: what it must know of the whole batch, as sums over rows; None for
            nothing.
        min_trajectories: the fewest trajectories that it makes sense for.
        needs_scores: whether rows must be single trajectories.
    """

    def no_state(key: PRNGKey, obs: PyTree) -> Any:
        del key, obs
        return ()

    def no_summary(params: Params, trajectories: Trajectory, credit: Credit) -> Any:
        del params, trajectories, credit
        return ()

    def no_fit(state: PyTree, trajectories: Trajectory, credit: Credit) -> Any:
        del trajectories, credit
        return state, {}

    def predict_statelessly(
        params: Params,
        state: PyTree,
        summary: Summary,
        trajectories: Trajectory,
        credit: Credit,
    ) -> Float[Array, "B T"]:
        del state
        return predict(params, summary, trajectories, credit)

    return Baseline(
        no_state,
        no_summary if summarize is None else summarize,
        predict_statelessly,
        no_fit,
        min_trajectories,
        needs_batch=summarize is not None,
        needs_scores=needs_scores,
    )


def sums_by_time(
    values: Float[Array, "B T"], trajectories: Trajectory, max_steps: int
) -> Float[Array, "L"]:
    """Sums over all trajectories alive at each decision 0 .. max_steps - 1."""
    counted = jnp.where(trajectories.mask, values, 0.0)
    sums = jnp.zeros((max_steps,), counted.dtype)
    return sums.at[trajectories.time].add(counted)


def mean_credit(value: Array, reach: Array) -> Array:
    """value / reach, and 0 where there is no reach.

    Held so that its product with the largest reach is finite: off policy a tiny reach
    can stand under a huge value.
    """
    some = reach > 0.0
    largest = float(jnp.finfo(reach.dtype).max) / math.exp(MAX_LOG_WEIGHT) / 16.0
    level = jnp.where(some, value / jnp.where(some, reach, 1.0), 0.0)
    return jnp.clip(level, -largest, largest)


def mean_of_others(total: Credit, own: Credit) -> Array:
    """The mean credit without one's own, and 0 where the others have no weight.

    They are what is left when the own part is taken off the total, so others that weigh
    less than some units of rounding of it count as none: little of them would be left.
    """
    value, reach = (jnp.broadcast_to(x, own.value.shape) for x in total)
    rounding = 1024.0 * jnp.finfo(reach.dtype).eps
    others = jnp.where(reach - own.reach > rounding * reach, reach - own.reach, 0.0)
    return mean_credit(value - own.value, others)


def _check_enough(baseline: Baseline, trajectories: Trajectory) -> None:
    if baseline.min_trajectories < 2 or not is_concrete(
        trajectories.time, trajectories.mask
    ):
        return
    with jax.ensure_compile_time_eval():
        number = int(jnp.sum(trajectories.starts))
    if number < baseline.min_trajectories:
        raise ValueError(
            f"the batch has {number} trajectories, but the baseline leaves one out, "
            f"needs at least {baseline.min_trajectories}; sample more, or take "
            "no_baseline"
        )


def _sums_at_starts(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
    del params
    starts = trajectories.starts
    return jax.tree.map(lambda x: jnp.sum(jnp.where(starts, x, 0.0)), credit)
