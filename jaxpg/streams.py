r"""Gradients of batches that never exist: rollout and gradient fused, chunk by chunk.

A trajectory is a pure function of (params, key, episode id), so a batch of any size is
a list of ids, and memory holds one chunk of it at a time. What an estimator must know
of the whole batch before it can weigh a part (a mean, the sums behind an optimal
baseline) is gathered by a first pass; the second plays the same trajectories again.

    pass 1 (only if the baseline needs it)   summary = sum over chunks
    pass 2                                   gradient = mean over chunks of the terms

The mean return of the others needs no second pass: with S = sum_t s[t], the score,

    sum_i (R_i - b_i) S_i,  b_i = (sum_j R_j - R_i) / (N - 1)

is a sum over i of R_i S_i and of S_i, known at the end. These "running sums" cost a
second backward pass over the chunk instead of a second rollout.

The result does not depend on the chunk's size but for rounding.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt

from jaxpg._checks import check_choice, check_divides, check_positive, check_rank
from jaxpg._tracing import traced_once
from jaxpg.baselines import Summary
from jaxpg.chunks import Chunks
from jaxpg.envs.base import Environment
from jaxpg.estimators import (
    Estimator,
    estimate_credit,
    estimate_terms,
    estimate_weights,
    summarize_batch,
)
from jaxpg.gradients import score_gradient, score_gradients
from jaxpg.moments import Moments, merge, moments_of, no_moments
from jaxpg.policies import Policy
from jaxpg.returns import at_episode_start
from jaxpg.rollout import rollout_episodes
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "StreamedGradient",
    "TrajectorySource",
    "batch_source",
    "episode_source",
    "stream_gradient",
    "stream_summary",
]

TrajectorySource = Callable[[Params, PRNGKey, Int[Array, " n"]], Trajectory]
"""`source(params, key, ids) -> Trajectory`: one trajectory per id and row, always the
same ones for the same arguments."""

Statistics = Literal["none", "chunks", "trajectories"]
Method = Literal["replay", "running-sums"]

CACHED = Chunks("auto")
"""Decisions whose activations fit into a core's cache."""

TOGETHER = 32
"""Trajectories whose own gradients are held at once."""


class StreamedGradient(NamedTuple):
    """A gradient and what was seen on the way.

    Attributes:
        gradient: the estimate of grad J, a tree like the parameters.
        moments: of the samples that `statistics` asked for, each an estimate of the
            gradient in its own right: chunks' means or trajectories' terms; None
            without.
        trajectories_per_sample: how many trajectories each of these samples averages:
            variances of one trajectory are this many times as large.
        mean_return: undiscounted, over all trajectories.
        num_decisions: how many decisions they took together, below 2^32.
        num_non_finite: decisions whose reward or log-probability is NaN or infinite.
    """

    gradient: Params
    moments: Moments | None
    trajectories_per_sample: int
    mean_return: Float[Array, ""]
    num_decisions: UInt[Array, ""]
    num_non_finite: UInt[Array, ""]


class Seen(NamedTuple):
    """Running sums over trajectories: returns, decisions, those not finite."""

    returns: Array
    decisions: Array
    non_finite: Array


def episode_source(
    env: Environment, policy: Policy, *, acting: Params | None = None
) -> TrajectorySource:
    """Whole episodes of a policy in an environment, one per row.

    Args:
        env: must bound its episodes (`max_steps`).
        policy: chooses the actions.
        acting: parameters of the behaviour policy; None lets the policy that the
            gradient is asked about act itself.
    """

    def source(params: Params, key: PRNGKey, ids: Array) -> Trajectory:
        return rollout_episodes(
            env, policy, params if acting is None else acting, key, ids
        )

    return source


def batch_source(trajectories: Trajectory) -> TrajectorySource:
    """A stored batch as a source: id i is its row i.

    Args:
        trajectories: one trajectory per row.
    """

    def source(params: Params, key: PRNGKey, ids: Array) -> Trajectory:
        del params, key
        return jax.tree.map(lambda x: x[ids], trajectories)

    return source


def stream_gradient(
    estimator: Estimator,
    source: TrajectorySource,
    params: Params,
    state: PyTree,
    key: PRNGKey,
    ids: Int[Array, " N"],
    *,
    chunk_size: int,
    statistics: Statistics = "none",
    method: Method = "replay",
    chunks: Chunks = CACHED,
) -> StreamedGradient:
    """The gradient of a batch of any size in the memory of one chunk.

    Args:
        estimator: any that needs no more than sums of the whole batch: not
            standardised, not self-normalised.
        source: where trajectories come from.
        params: where the gradient is taken, and who acts.
        state: what the baseline has learned; () for those that learn nothing.
        key: the key that all trajectories derive from.
        ids: which trajectories; N of them.
        chunk_size: trajectories that are rolled out together; divides N.
        statistics: "trajectories" takes each one's own gradient and gives the variance
            of one; "chunks" only compares chunks' means, which costs next to nothing
            and knows the variance with N / chunk_size - 1 degrees of freedom.
        method: "replay" plays trajectories twice if the baseline must see them all
            first; "running-sums" does with one pass for "leave-one-out" and
            "batch-mean" on policy, without statistics.
        chunks: how many decisions the gradient works on together inside a chunk.

    Returns:
        The gradient, and moments of the samples that were asked for.

    Raises:
        ValueError: if the chunk does not divide N, or the estimator or the statistics
            do not go with streaming or the method.

    Bias: that of the estimator. Moments of a baseline that is fitted on the batch leave
        out what the baseline's own error adds to the variance, which is O(1/N^2).

    Reference: Greensmith, Bartlett and Baxter 2004 (the estimates); Chan, Golub and
    LeVeque 1979 (the moments).
    """
    check_rank("ids", ids, 1, "(N,) = one id per trajectory")
    _check_settings(estimator, statistics, method)
    _check_number(ids.shape[0], estimator)
    grid = _grid(ids, chunk_size)
    if method == "running-sums":
        return _with_running_sums(estimator, source, params, key, grid, chunks)
    summary = stream_summary(estimator, source, params, key, ids, chunk_size=chunk_size)
    sample = _sampler(estimator, params, state, summary, statistics, chunks)
    start = (
        no_moments(params) if statistics != "none" else optax.tree.zeros_like(params)
    )

    def visit(carry: Any, some: Array) -> tuple[Any, None]:
        total, seen = carry
        rows = source(params, key, some)
        return (sample(total, rows), _see(seen, rows)), None

    (total, seen), _ = jax.lax.scan(visit, (start, _nothing_seen()), grid)
    if statistics == "none":
        return _report(_divide(total, ids.shape[0]), None, seen, ids.shape[0])
    per_sample = chunk_size if statistics == "chunks" else 1
    return _report(total.mean, total, seen, ids.shape[0], per_sample)


def stream_summary(
    estimator: Estimator,
    source: TrajectorySource,
    params: Params,
    key: PRNGKey,
    ids: Int[Array, " N"],
    *,
    chunk_size: int,
) -> Summary:
    """What the estimator must know of the whole batch: one pass of rollouts.

    Args:
        estimator: any.
        source: where trajectories come from.
        params: where the gradient is taken, and who acts.
        key: the key that all trajectories derive from.
        ids: which trajectories; N of them.
        chunk_size: trajectories that are rolled out together; divides N.

    Returns:
        Sums over all trajectories; () without any pass where nothing is needed.

    Raises:
        ValueError: if the chunk does not divide N.
    """
    grid = _grid(ids, chunk_size)
    if not estimator.needs_batch:
        return ()

    @traced_once
    def of_chunk(some: Array) -> Summary:
        return summarize_batch(estimator, params, source(params, key, some))

    def visit(total: Summary, some: Array) -> tuple[Summary, None]:
        return jax.tree.map(jnp.add, total, of_chunk(some)), None

    zeros = optax.tree.zeros_like(jax.eval_shape(of_chunk, grid[0]))
    return jax.lax.scan(visit, zeros, grid)[0]


def _sampler(
    estimator: Estimator,
    params: Params,
    state: PyTree,
    summary: Summary,
    statistics: Statistics,
    chunks: Chunks,
) -> Callable[[Any, Trajectory], Any]:
    """How a chunk of rows is added to what is known of the gradient."""

    def total_of(rows: Trajectory) -> Params:
        if estimator.is_per_parameter:
            terms = estimate_terms(estimator, params, state, rows, summary=summary)
            return jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)
        return score_gradient(
            estimator.log_prob_fn,
            params,
            rows,
            estimate_weights(estimator, params, state, rows, summary=summary),
            num_trajectories=1,
            chunks=chunks._replace(cut_rows=estimator.cut_rows),
        )

    def add_total(total: Params, rows: Trajectory) -> Params:
        return jax.tree.map(jnp.add, total, total_of(rows))

    def add_mean(known: Moments, rows: Trajectory) -> Moments:
        mean = _divide(total_of(rows), rows.mask.shape[0])
        return merge(known, moments_of(jax.tree.map(lambda x: x[None], mean)))

    def add_terms(known: Moments, rows: Trajectory) -> Moments:
        def visit(known: Moments, some: Trajectory) -> tuple[Moments, None]:
            terms = estimate_terms(estimator, params, state, some, summary=summary)
            return merge(known, moments_of(terms)), None

        size = _largest_divisor(rows.mask.shape[0], TOGETHER)
        parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
        return jax.lax.scan(visit, known, parts)[0]

    return {"none": add_total, "chunks": add_mean, "trajectories": add_terms}[
        statistics
    ]


def _with_running_sums(
    estimator: Estimator,
    source: TrajectorySource,
    params: Params,
    key: PRNGKey,
    grid: Array,
    chunks: Chunks,
) -> StreamedGradient:
    """sum_i (R_i - b_i) S_i from sum (G + own R_i) s and sum s, in one pass.

    All credit is taken from a level on: that changes no R_i - b_i, and keeps the digits
    that two large sums would lose.
    """
    number = grid.size
    first = estimate_credit(estimator, params, source(params, key, grid[0]))
    origin = jnp.mean(first.value[:, 0])
    leaves_out = estimator.config.baseline == "leave-one-out"
    own_share = 1.0 / (number - 1) if leaves_out else 0.0
    level_share = 1.0 / (number - 1) if leaves_out else 1.0 / number

    def visit(carry: Any, some: Array) -> tuple[Any, None]:
        sums, returns, seen = carry
        rows = source(params, key, some)
        credit = estimate_credit(estimator, params, rows)
        credit = credit._replace(value=credit.value - origin * credit.reach)
        own = jax.vmap(at_episode_start)(credit.value, rows.time)
        both = score_gradients(
            estimator.log_prob_fn,
            params,
            rows,
            jnp.stack([credit.value + own_share * credit.reach * own, credit.reach]),
            num_trajectories=1,
            chunks=chunks._replace(cut_rows=estimator.cut_rows),
        )
        returns = returns + jnp.sum(jnp.where(rows.starts, credit.value, 0.0))
        return (jax.tree.map(jnp.add, sums, both), returns, _see(seen, rows)), None

    zeros = jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), params)
    start = (zeros, jnp.zeros(()), _nothing_seen())
    (sums, returns, seen), _ = jax.lax.scan(visit, start, grid)
    level = returns * level_share
    total = jax.tree.map(lambda x: x[0] - level.astype(x.dtype) * x[1], sums)
    return _report(_divide(total, number), None, seen, number)


def _check_settings(estimator: Estimator, statistics: str, method: str) -> None:
    check_choice("statistics", statistics, ("none", "chunks", "trajectories"))
    check_choice("method", method, ("replay", "running-sums"))
    config = estimator.config
    if config.standardize or config.credit.self_normalize:
        raise ValueError(
            "standardize or self_normalize is set, but both divide by a statistic of "
            "the whole batch's weights, which chunks cannot add up; leave them out, or "
            "use estimate_gradient on a batch in memory"
        )
    if method == "replay":
        return
    if config.baseline not in ("leave-one-out", "batch-mean") or (
        config.credit.ratio != "none" or statistics != "none"
    ):
        raise ValueError(
            f"method is 'running-sums', but baseline is {config.baseline!r}, ratio is "
            f"{config.credit.ratio!r} and statistics is {statistics!r}; needs "
            "'leave-one-out' or 'batch-mean', 'none' and 'none'; take method 'replay'"
        )


def _check_number(number: int, estimator: Estimator) -> None:
    if number < max(1, estimator.min_trajectories):
        raise ValueError(
            f"ids name {number} trajectories, needs at least "
            f"{max(1, estimator.min_trajectories)} for baseline "
            f"{estimator.config.baseline!r}; sample more, or take baseline 'none'"
        )


def _grid(ids: Array, chunk_size: int) -> Array:
    check_positive("chunk_size", chunk_size)
    check_divides("chunk_size", chunk_size, "number of ids", ids.shape[0])
    return ids.reshape(-1, chunk_size)


def _largest_divisor(whole: int, most: int) -> int:
    return max(n for n in range(1, min(whole, most) + 1) if whole % n == 0)


def _divide(tree: Params, number: int) -> Params:
    return jax.tree.map(lambda x: x / jnp.asarray(number, x.dtype), tree)


def _nothing_seen() -> Seen:
    return Seen(jnp.zeros(()), jnp.zeros((), jnp.uint32), jnp.zeros((), jnp.uint32))


def _see(seen: Seen, rows: Trajectory) -> Seen:
    rewards = jnp.sum(jnp.where(rows.mask, rows.reward, 0.0)).astype(float)
    known = jnp.isfinite(rows.reward) & jnp.isfinite(rows.log_prob)
    return Seen(
        seen.returns + rewards,
        seen.decisions + jnp.sum(rows.mask, dtype=jnp.uint32),
        seen.non_finite + jnp.sum(rows.mask & ~known, dtype=jnp.uint32),
    )


def _report(
    gradient: Params,
    moments: Moments | None,
    seen: Seen,
    number: int,
    per_sample: int = 1,
) -> StreamedGradient:
    return StreamedGradient(
        gradient,
        moments,
        per_sample,
        seen.returns / number,
        seen.decisions,
        seen.non_finite,
    )
