r"""Optimal baselines: those that minimise the variance of the gradient itself.

Write trajectory i's term of the gradient as A[i] - b B[i], with

    A = sum_t value[t] s[t],    B = sum_t reach[t] s[t],    s[t] = grad log pi(a[t] | .)

and the scalar that minimises its total variance is b* = E[A . B] / E[|B|^2]. A number
for every decision, b[t] = E[B[t] . A] / E[|B[t]|^2] with B[t] = reach[t] s[t], is
jointly optimal where scores at different times are uncorrelated, which takes a reach
without later ratios: all forms but "whole" and "past-dropped-whole". The state's value
V(s) is neither. One number per parameter is no weight of a decision any more and has a
room of its own, `jaxpg.per_parameter`.

The expectations must be estimated. Fitted on the very batch that they weigh they are
biased, badly at small N, because a trajectory's own return is in its own baseline. So
each one leaves a trajectory's own part out by default; the plain form goes under
`leave_one_out=False`. Rows must be single trajectories, for their scores are taken.

References: Greensmith, Bartlett and Baxter 2004, "Variance reduction techniques for
gradient estimates in reinforcement learning"; Peters and Schaal 2008, "Reinforcement
learning of motor skills with policy gradients".
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxpg._batching import vmap_rows
from jaxpg._checks import check_choice, check_positive, check_range
from jaxpg.baselines import Baseline, level_by_time, stateless
from jaxpg.credit import Credit, mean_credit
from jaxpg.gradients import LogProbFn, trajectory_gradients
from jaxpg.importance import MAX_LOG_WEIGHT
from jaxpg.leave_out import (
    fold_of,
    mean_of_others,
    sums_by_time,
    sums_of_rows,
    whole,
)
from jaxpg.returns import suffix_recurrence
from jaxpg.types import Params, PyTree, Trajectory

__all__ = [
    "decision_score_norms",
    "optimal_baseline",
    "optimal_time_dependent_baseline",
    "peters_schaal_baseline",
    "with_squares",
]


def optimal_baseline(log_prob_fn: LogProbFn, *, leave_one_out: bool = True) -> Baseline:
    """The optimal scalar, b* = E[A . B] / E[|B|^2], for whichever credit it serves.

    Args:
        log_prob_fn: log-probability of each decision of one trajectory, [T], in nats.
        leave_one_out: whether a trajectory's own part is left out of both expectations.

    Bias: unbiased with `leave_one_out`; without, biased O(1/N).

    Reference: Weaver and Tao 2001, "The optimal reward baseline for gradient-based
        reinforcement learning"; Greensmith, Bartlett and Baxter 2004.
    """

    def projections(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
        credit = with_squares(credit)
        credited = trajectory_gradients(log_prob_fn, params, trajectories, credit.value)
        scores = trajectory_gradients(log_prob_fn, params, trajectories, credit.reach)
        return Credit(_dot(credited, scores), _dot(scores, scores))

    def summarize(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
        own, fold = projections(params, trajectories, credit), _fold(trajectories)
        return jax.tree.map(lambda x: sums_of_rows(x, fold), own)

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        if not leave_one_out:
            return jnp.broadcast_to(mean_credit(*whole(summary)), credit.value.shape)
        own = projections(params, trajectories, credit)
        levels = mean_of_others(summary, own, _fold(trajectories))
        return jnp.broadcast_to(levels[:, None], credit.value.shape)

    return stateless(
        predict,
        summarize,
        min_trajectories=2 if leave_one_out else 1,
        needs_scores=True,
    )


def optimal_time_dependent_baseline(
    log_prob_fn: LogProbFn,
    max_steps: int,
    *,
    form: Literal["joint", "termwise"] = "joint",
    leave_one_out: bool = True,
    cut_rows: bool = True,
) -> Baseline:
    """One optimal number per decision, b[t] = E[B[t] . A] / E[|B[t]|^2].

    "termwise" is E[|s[t]|^2 G[t]] / E[|s[t]|^2] instead: it minimises the variance of
    each decision's own term and ignores what the terms have in common.

    Args:
        log_prob_fn: log-probability of each decision of one trajectory, [T], in nats.
        max_steps: the most decisions that an episode can take.
        form: "joint" or "termwise".
        leave_one_out: whether a trajectory's own part is left out of both expectations.
        cut_rows: whether a row may be cut in time, as with memoryless policies; without
            it every decision's score costs a pass over the whole row.

    Raises:
        ValueError: if `max_steps` is not positive or `form` is unknown.

    Bias: unbiased with `leave_one_out` (0 where alone); without, biased O(1/N).

    Reference: Greensmith, Bartlett and Baxter 2004; Peters and Schaal 2008 (termwise).
    """
    check_positive("max_steps", max_steps)
    check_choice("form", form, ("joint", "termwise"))

    def projections(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
        def of_row(row: Trajectory, own: Credit) -> Credit:
            norms = decision_score_norms(log_prob_fn, params, row, cut_rows=cut_rows)
            if form == "termwise":
                credited = own.value * norms
            else:
                credited = _scores_along_credit(log_prob_fn, params, row, own.value)
            return Credit(own.reach * credited, own.reach**2 * norms)

        return vmap_rows(of_row, (0, 0))(trajectories, with_squares(credit))

    def summarize(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
        own = projections(params, trajectories, credit)
        return sums_by_time(own, trajectories, max_steps)

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        if not leave_one_out:
            return level_by_time(whole(summary), trajectories.time)
        own = projections(params, trajectories, credit)
        fold = fold_of(trajectories.episode_id)
        return mean_of_others(summary, own, fold, trajectories.time)

    return stateless(
        predict,
        summarize,
        min_trajectories=2 if leave_one_out else 1,
        needs_scores=True,
    )


def peters_schaal_baseline(
    log_prob_fn: LogProbFn,
    *,
    discount: float = 1.0,
    leave_one_out: bool = True,
    cut_rows: bool = True,
) -> Baseline:
    """Peters and Schaal's number per reward, b[u] = E[|Z[u]|^2 r[u]] / E[|Z[u]|^2].

    Z[u] is the sum of the scores up to u, which is what reward u multiplies; decision t
    is then relieved of sum_{u >= t} discount^(u-t) b[u]. That sum runs to the row's end
    for every trajectory, and one that has ended counts on with reward 0 and its last Z:
    how long it lives depends on its actions, so stopping there would bias the gradient.

    Args:
        log_prob_fn: log-probability of each decision of one trajectory, [T], in nats.
        discount: of the reward-to-go that it serves, in [0, 1].
        leave_one_out: whether a trajectory's own part is left out of both expectations.
        cut_rows: whether a row may be cut in time, as with memoryless policies.

    Returns:
        A baseline for reward-to-go on policy.

    Raises:
        ValueError: if `discount` is not in [0, 1].

    Bias: unbiased with `leave_one_out`; without, biased O(1/N).

    Reference: Peters and Schaal 2008, section 3.2 (here one number for all parameters).
    """
    check_range("discount", discount, 0.0, 1.0)

    def projections(params: Params, trajectories: Trajectory) -> Credit:
        def of_row(row: Trajectory) -> Credit:
            norms = _cumulative_score_norms(log_prob_fn, params, row, cut_rows)
            return Credit(jnp.where(row.mask, row.reward, 0.0) * norms, norms)

        return jax.vmap(of_row)(trajectories)

    def summarize(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
        del credit
        own, fold = projections(params, trajectories), _fold(trajectories)
        return jax.tree.map(lambda x: sums_of_rows(x, fold), own)

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        if leave_one_out:
            own = projections(params, trajectories)
            per_reward = mean_of_others(summary, own, _fold(trajectories))
        else:
            level = mean_credit(*whole(summary))
            per_reward = jnp.broadcast_to(level, credit.value.shape)
        decays = jnp.full(per_reward.shape, discount, per_reward.dtype)
        return jax.vmap(suffix_recurrence)(per_reward, decays)

    return stateless(
        predict,
        summarize,
        min_trajectories=2 if leave_one_out else 1,
        needs_scores=True,
    )


def with_squares(credit: Credit) -> Credit:
    """Credit whose squares are finite: held at the root of the largest weight.

    Only baselines are computed from it, so it changes their quality where a ratio is
    beyond exp(30), and no estimate's mean.
    """
    bound = math.exp(MAX_LOG_WEIGHT / 2)
    return Credit(*(jnp.clip(x, -bound, bound) for x in credit))


def decision_score_norms(
    log_prob_fn: LogProbFn,
    params: Params,
    row: PyTree,
    *,
    cut_rows: bool = True,
) -> Float[Array, " T"]:
    """|grad log pi(a[t] | .)|^2 of each decision of one row.

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats.
        params: where the scores are taken.
        row: one trajectory.
        cut_rows: whether the row may be cut into single decisions.

    Returns:
        Squared norms over all parameters; one decision's score is held at a time.
    """

    def norm(time: Array) -> Array:
        score = _decision_score(log_prob_fn, params, row, time, cut_rows)
        return optax.tree.norm(score, squared=True)

    return jax.lax.map(norm, _times(row))


def _fold(trajectories: Trajectory) -> Array:
    """Of each row, which is one trajectory."""
    return fold_of(trajectories.episode_id[:, 0])


def _dot(first: Params, second: Params) -> Array:
    """One inner product per trajectory, [B]."""
    parts = jax.tree.map(
        lambda a, b: jnp.sum(a * b, axis=tuple(range(1, a.ndim))), first, second
    )
    return jax.tree.reduce(jnp.add, parts)


def _scores_along_credit(
    log_prob_fn: LogProbFn, params: Params, row: Trajectory, value: Array
) -> Array:
    """s[t] . A for every t at once: the derivative of log pi along A."""

    def log_probs(params: Params) -> Array:
        return jnp.where(row.mask, log_prob_fn(params, row), 0.0)

    log_prob, pull_back = jax.vjp(log_probs, params)
    (credited,) = pull_back(value.astype(log_prob.dtype))
    return jax.jvp(log_probs, (params,), (credited,))[1]


def _cumulative_score_norms(
    log_prob_fn: LogProbFn, params: Params, row: Trajectory, cut_rows: bool
) -> Array:
    """|Z[t]|^2, where Z stays as it is after the trajectory's end."""

    def visit(reached: Params, inputs: tuple[Array, Array]) -> tuple[Params, Array]:
        time, is_real = inputs
        score = _decision_score(log_prob_fn, params, row, time, cut_rows)
        reached = jax.tree.map(
            lambda z, s: z + jnp.where(is_real, s, 0.0), reached, score
        )
        return reached, optax.tree.norm(reached, squared=True)

    zeros = optax.tree.zeros_like(params)
    return jax.lax.scan(visit, zeros, (_times(row), row.mask))[1]


def _decision_score(
    log_prob_fn: LogProbFn, params: Params, row: PyTree, time: Array, cut_rows: bool
) -> Params:
    if not cut_rows:
        return jax.grad(lambda p: log_prob_fn(p, row)[time])(params)
    decision = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, time, 1), row)
    return jax.grad(lambda p: log_prob_fn(p, decision)[0])(params)


def _times(row: Any) -> Array:
    return jnp.arange(jax.tree.leaves(row)[0].shape[0], dtype=jnp.int32)
