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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_positive, is_concrete
from jaxpg.credit import Credit, held_finite, mean_credit
from jaxpg.episodes import check_single_episodes
from jaxpg.leave_out import (
    fold_of,
    mean_of_others,
    sums_at_starts,
    sums_by_time,
    whole,
)
from jaxpg.returns import at_episode_start
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "Baseline",
    "Summary",
    "apply_baseline",
    "batch_mean_baseline",
    "check_enough",
    "constant_baseline",
    "leave_one_out_baseline",
    "level_by_time",
    "no_baseline",
    "stateless",
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
        any_length: whether `summarize` and `predict` are cheap, and give the same if
            rows end earlier, with nothing but empty slots behind: `jaxpg.room` may cut
            those off.
    """

    init: Callable[[PRNGKey, PyTree], PyTree]
    summarize: Callable[[Params, Trajectory, Credit], Summary]
    predict: Callable[[Params, PyTree, Summary, Trajectory, Credit], Array]
    fit: Callable[[PyTree, Trajectory, Credit], tuple[PyTree, Info]]
    min_trajectories: int = 1
    needs_batch: bool = False
    needs_scores: bool = False
    any_length: bool = False


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
            trajectories than the baseline makes sense for, or several in a row where
            scores are taken.

    Bias: none of its own; that of the credit and of the baseline.

    Reference: Williams 1992; Greensmith, Bartlett and Baxter 2004.
    """
    if baseline.needs_scores:
        check_single_episodes(trajectories)
    if summary is None:
        check_enough(baseline.min_trajectories, trajectories)
        summary = baseline.summarize(params, trajectories, credit)
    level = baseline.predict(params, state, summary, trajectories, credit)
    weights = credit.value - held_finite(credit.reach * level)
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
        predict=lambda params, summary, rows, credit: jnp.full_like(
            credit.value, value
        ),
        any_length=True,
    )


def batch_mean_baseline() -> Baseline:
    """The batch's mean return, b = 1/N sum_j R_j.

    Bias: the gradient is shrunk by exactly (1 - 1/N), for each trajectory's own return
        is in the mean that is subtracted from it; use `leave_one_out_baseline` instead.
        The factor is exact on policy for a total return, and for reward-to-go at
        discount 1; else decisions shrink unequally.
    """

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        del params, trajectories
        level = mean_credit(*whole(summary))
        return jnp.broadcast_to(level, credit.value.shape)

    return stateless(predict, _summarize_starts, any_length=True)


def leave_one_out_baseline() -> Baseline:
    """The mean return of the other trajectories, b_i = 1/(N-1) sum_{j != i} R_j.

    Off policy the mean is importance-weighted: the others' value over their reach.

    Bias: unbiased (`jaxpg.leave_out` says what rounding can do).

    Reference: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        del params
        own = jax.tree.map(
            lambda x: jax.vmap(at_episode_start)(x, trajectories.time), credit
        )
        return mean_of_others(summary, own, fold_of(trajectories.episode_id))

    return stateless(predict, _summarize_starts, min_trajectories=2, any_length=True)


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
        to decision t is scaled, on policy, by 1 - E[1/n_t given alive].
    """
    check_positive("max_steps", max_steps)

    def summarize(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
        del params
        return sums_by_time(credit, trajectories, max_steps)

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        del params
        if not leave_one_out:
            return level_by_time(whole(summary), trajectories.time)
        fold = fold_of(trajectories.episode_id)
        return mean_of_others(summary, credit, fold, trajectories.time)

    return stateless(
        predict,
        summarize,
        min_trajectories=2 if leave_one_out else 1,
        any_length=True,
    )


def stateless(
    predict: Callable[[Params, Any, Trajectory, Credit], Array],
    summarize: Callable[[Params, Trajectory, Credit], Any] | None = None,
    *,
    min_trajectories: int = 1,
    needs_scores: bool = False,
    any_length: bool = False,
) -> Baseline:
    """A baseline that learns nothing from batch to batch.

    Args:
        predict: `predict(params, summary, trajectories, credit) -> [B, T]`.
        summarize: what it must know of the whole batch, as sums over rows; None for
            nothing.
        min_trajectories: the fewest trajectories that it makes sense for.
        needs_scores: whether rows must be single trajectories.
        any_length: whether empty slots at the rows' ends may be cut off.
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
        any_length=any_length,
    )


def level_by_time(sums: Credit, time: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The mean credit at each decision's own time; 0 beyond the last one."""
    levels = mean_credit(sums.value, sums.reach)
    return levels.at[time].get(mode="fill", fill_value=0.0)


def _summarize_starts(
    params: Params, trajectories: Trajectory, credit: Credit
) -> Credit:
    del params
    return jax.tree.map(lambda x: sums_at_starts(x, trajectories), credit)


def check_enough(least: int, trajectories: Trajectory) -> None:
    """Refuse a known batch of fewer than `least` trajectories.

    Raises:
        ValueError: naming how many there are and how many are needed.
    """
    if not is_concrete(trajectories.time, trajectories.mask):
        return
    with jax.ensure_compile_time_eval():
        number = int(jnp.sum(trajectories.starts))
    if number < least:
        raise ValueError(
            f"trajectories hold {number} episodes, needs at least {least}"
            + ("; sample more, or take no_baseline" if least > 1 else "")
        )
