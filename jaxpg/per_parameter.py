r"""The optimal baseline of every single parameter.

    g[k] = 1/N sum_i (A[i, k] - b[k] B[i, k]),      b*[k] = E[A[k] B[k]] / E[B[k]^2]

with A = sum_t value[t] s[t] and B = sum_t reach[t] s[t] for scores s. No [B, T] of
weights gives this gradient, for each of its entries has a baseline of its own; so it is
one of the two estimators that do not go through `score_gradient`.

Reference: Peters and Schaal 2008, "Reinforcement learning of motor skills with policy
gradients", section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg.credit import Credit, held_finite, mean_credit
from jaxpg.gradients import LogProbFn, trajectory_gradients
from jaxpg.leave_out import fold_of, mean_of_others, sums_of_rows, whole
from jaxpg.optimal import with_squares
from jaxpg.types import Params, Trajectory

__all__ = [
    "ParameterSums",
    "per_parameter_gradient",
    "per_parameter_summary",
    "per_parameter_terms",
]


class ParameterSums(NamedTuple):
    """Sums over trajectories, entry by entry of the parameters.

    Attributes:
        products: sums of A_k B_k, one for each fold (`jaxpg.leave_out`).
        squares: sums of B_k^2, likewise.
    """

    products: Params
    squares: Params


def per_parameter_summary(
    log_prob_fn: LogProbFn, params: Params, trajectories: Trajectory, credit: Credit
) -> ParameterSums:
    """What the optimal per-parameter baseline must know of the batch; sums over rows.

    Args:
        log_prob_fn: log-probability of each decision of one trajectory, [T], in nats.
        params: where the gradient is taken.
        trajectories: one trajectory per row.
        credit: of the same rows.

    Returns:
        Sums that may be added over chunks and devices.
    """
    credited, scores = _both_gradients(log_prob_fn, params, trajectories, credit)

    def sums(part: int) -> Params:
        return jax.tree.map(
            lambda a, b: sums_of_rows(_products(a, b)[part], fold), credited, scores
        )

    fold = fold_of(trajectories.episode_id[:, 0])

    return ParameterSums(sums(0), sums(1))


def per_parameter_terms(
    log_prob_fn: LogProbFn,
    params: Params,
    trajectories: Trajectory,
    credit: Credit,
    summary: ParameterSums,
    *,
    leave_one_out: bool = True,
) -> Params:
    """Each trajectory's A_k - b_k B_k with b*_k = E[A_k B_k] / E[B_k^2].

    Args:
        log_prob_fn: log-probability of each decision of one trajectory, [T], in nats.
        params: where the gradient is taken.
        trajectories: one trajectory per row.
        credit: of the same rows.
        summary: of the whole batch, from `per_parameter_summary`.
        leave_one_out: whether a trajectory's own part is left out of both expectations.

    Returns:
        A tree like `params` with B in front; b_k is 0 where its denominator is.

    Bias: unbiased with `leave_one_out`; without, biased O(1/N).

    Reference: Peters and Schaal 2008, section 3.
    """
    credited, scores = _both_gradients(log_prob_fn, params, trajectories, credit)

    def relieved(a: Array, b: Array, products: Array, squares: Array) -> Array:
        total = Credit(products, squares)
        if leave_one_out:
            level = mean_of_others(total, _products(a, b), fold)
        else:
            level = mean_credit(*whole(total))[None]
        return a - held_finite(level * b)

    fold = fold_of(trajectories.episode_id[:, 0])

    return jax.tree.map(relieved, credited, scores, summary.products, summary.squares)


def per_parameter_gradient(
    log_prob_fn: LogProbFn,
    params: Params,
    trajectories: Trajectory,
    credit: Credit,
    *,
    leave_one_out: bool = True,
) -> Params:
    """The gradient of J with the optimal baseline of every parameter.

    This is no [B, T] of weights: each entry of the gradient has a baseline of its own.

    Args:
        log_prob_fn: log-probability of each decision of one trajectory, [T], in nats.
        params: where the gradient is taken.
        trajectories: one trajectory per row, the whole batch.
        credit: of the same rows.
        leave_one_out: whether a trajectory's own part is left out of both expectations.

    Returns:
        An ascent direction, a tree like `params`.

    Bias: that of the credit with `leave_one_out`; without, biased O(1/N).

    Reference: Peters and Schaal 2008, section 3.
    """
    summary = per_parameter_summary(log_prob_fn, params, trajectories, credit)
    terms = per_parameter_terms(
        log_prob_fn, params, trajectories, credit, summary, leave_one_out=leave_one_out
    )
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), terms)


def _products(a: Array, b: Array) -> Credit:
    """A_k B_k and B_k^2 of each trajectory, from numbers whose squares are finite."""
    bounded = with_squares(Credit(a, b))
    return Credit(bounded.value * bounded.reach, bounded.reach**2)


def _both_gradients(
    log_prob_fn: LogProbFn, params: Params, trajectories: Trajectory, credit: Credit
) -> tuple[Params, Params]:
    return (
        trajectory_gradients(log_prob_fn, params, trajectories, credit.value),
        trajectory_gradients(log_prob_fn, params, trajectories, credit.reach),
    )
