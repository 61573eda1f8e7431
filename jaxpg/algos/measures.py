"""What an update meets and does, measured on its own batch: sums over all decisions.

Numeric trouble never raises inside `jit`: it is counted here, and the training loop
stops the run.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxpg._batching import over_rows
from jaxpg._flat import as_vectors
from jaxpg.algos.base import Task
from jaxpg.chunks import Chunks, ChunkSize, map_over_chunks
from jaxpg.importance import MAX_LOG_WEIGHT, log_ratios
from jaxpg.policies import Policy, log_prob_fn
from jaxpg.room import at_used_length, first_turns
from jaxpg.types import Params, PyTree, Trajectory

__all__ = [
    "chunks_for",
    "log_ratios_of",
    "count_non_finite",
    "count_non_finite_decisions",
    "describe_batch",
    "explained_variance",
    "global_norm",
    "mean_kl",
    "mean_surrogate",
]


def chunks_for(policy: Policy, chunk_size: ChunkSize) -> Chunks:
    """Chunks of so many decisions; rows stay whole where the policy has a memory."""
    return Chunks(chunk_size, cut_rows=not policy.is_recurrent)


def mean_kl(
    task: Task,
    old: Params,
    new: Params,
    rows: Trajectory,
    *,
    chunk_size: ChunkSize = None,
) -> Float[Array, ""]:
    """Mean over decisions of KL(old || new), in nats, from the distributions' own kl.

    Args:
        task: gives the policy and how sums are taken.
        old: parameters of the policy that acted.
        new: parameters of the one that has come of it.
        rows: whose observations count.
        chunk_size: decisions that are worked on together.

    Returns:
        A number of at least 0 but for rounding.
    """

    def of_chunk(shared: Any, rows: Trajectory) -> Array:
        ours, theirs = (
            over_rows(task.policy.unroll, params, rows) for params in shared
        )
        return jnp.sum(jnp.where(rows.mask, ours.kl(theirs), 0.0))

    return _mean(task, of_chunk, (old, new), rows, rows, chunk_size)


def mean_surrogate(
    task: Task,
    params: Params,
    rows: Trajectory,
    advantages: Float[Array, "B T"],
    *,
    chunk_size: ChunkSize = None,
) -> Float[Array, ""]:
    """Mean over decisions of rho A, rho over the log-probabilities that are recorded.

    Args:
        task: gives the policy and how sums are taken.
        params: of the policy that is asked about.
        rows: decisions of the policy that acted.
        advantages: one per decision.
        chunk_size: decisions that are worked on together.

    Returns:
        What a trust region's step must raise.

    Reference: Schulman et al. 2015, equation 14.
    """

    def of_chunk(params: Params, chunk: Any) -> Array:
        rows, advantages = chunk
        distribution: Any = over_rows(task.policy.unroll, params, rows)
        log_rhos = jnp.where(
            rows.mask, distribution.log_prob(rows.action) - rows.log_prob, 0.0
        )
        rhos = jnp.exp(jnp.minimum(log_rhos, MAX_LOG_WEIGHT))
        return jnp.sum(jnp.where(rows.mask, rhos * advantages, 0.0))

    return _mean(task, of_chunk, params, (rows, advantages), rows, chunk_size)


def log_ratios_of(
    task: Task,
    params: Params,
    rows: Trajectory,
    *,
    chunk_size: ChunkSize = None,
    all_real: bool = False,
) -> Float[Array, "B T"]:
    """log pi - log mu of every decision, mu's as recorded; 0 in empty slots.

    Args:
        task: gives the policy pi and how rows are spread.
        params: of pi.
        rows: decisions of mu, without `next_obs`, which would be cut in vain.
        chunk_size: decisions that are worked on together.
        all_real: whether no slot is empty, as in segments: nothing is skipped then.

    Returns:
        Log-ratios in nats, without derivative.
    """
    chunks = chunks_for(task.policy, chunk_size)

    def of_row(params: Params, row: Trajectory) -> Array:
        log_probs = log_prob_fn(task.policy)(params, row)
        return log_ratios(log_probs, row.log_prob, row.mask)

    def of_chunk(params: Params, rows: Trajectory) -> Array:
        return over_rows(of_row, params, rows)

    def of_rows(params: Params, rows: Trajectory) -> Array:
        active = None if all_real else rows.mask
        return map_over_chunks(of_chunk, params, rows, active, chunks)

    return task.map_rows(of_rows, params, rows)


def explained_variance(
    targets: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """1 - Var(targets - values) / Var(targets) over the real decisions.

    Args:
        targets: what a critic should have said.
        values: what it said.
        mask: whether slot t holds a decision.

    Returns:
        1 for a perfect critic, 0 for a constant one; 0 where targets do not vary.

    >>> targets, mask = jnp.array([[1.0, 3.0]]), jnp.ones((1, 2), bool)
    >>> explained_variance(targets, targets - 5.0, mask).item()
    1.0
    """
    count = jnp.maximum(jnp.sum(mask), 1).astype(targets.dtype)

    def variance(x: Array) -> Array:
        mean = jnp.sum(jnp.where(mask, x, 0.0)) / count
        return jnp.sum(jnp.where(mask, (x - mean) ** 2, 0.0)) / count

    varying, left = variance(targets), variance(targets - values)
    some = varying > 0.0
    return jnp.where(some, 1.0 - left / jnp.where(some, varying, 1.0), 0.0)


def count_non_finite(tree: PyTree) -> Array:
    """How many entries of a tree that every device has whole are NaN or infinite.

    >>> count_non_finite({"a": jnp.array([1.0, jnp.nan]), "b": jnp.array(jnp.inf)})
    Array(2, dtype=int32)
    """
    vectors, _ = as_vectors(tree)
    counts = [jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for x in vectors]
    return sum(counts, start=jnp.zeros((), jnp.int32))


def global_norm(tree: PyTree) -> Array:
    """The Euclidean length of all of a tree's numbers together.

    >>> global_norm({"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}).item()
    5.0
    """
    return optax.tree.norm(as_vectors(tree)[0])


def count_non_finite_decisions(
    trajectories: Trajectory, *more: Float[Array, "B T"]
) -> Array:
    """How many rewards and log-probabilities of real decisions are NaN or infinite.

    A weight of 0 hides a log-probability that is NaN from the gradient, not from here.

    Args:
        trajectories: the batch.
        *more: other numbers of its decisions, such as advantages.

    Returns:
        Their number.
    """
    seen = (trajectories.reward, trajectories.log_prob, *more)
    # Array by array: rows may live on many devices, and would meet in one vector.
    lost = [jnp.asarray(trajectories.mask & ~jnp.isfinite(x), jnp.int32) for x in seen]
    return jnp.sum(sum(lost[1:], start=lost[0]))


def describe_batch(trajectories: Trajectory) -> dict[str, Array]:
    """What is told of a batch of whole episodes, whatever learns from it.

    Args:
        trajectories: rows of whole episodes.

    Returns:
        `entropy`, in nats, as sampled by who acted; `non_finite_batch`, from
        `count_non_finite_decisions`.
    """

    def of_turns(number: int) -> dict[str, Array]:
        rows = first_turns(trajectories, number)
        return {
            "entropy": -jnp.mean(rows.log_prob, where=rows.mask),
            "non_finite_batch": count_non_finite_decisions(rows),
        }

    return at_used_length(of_turns, trajectories.mask)


def _mean(
    task: Task,
    of_chunk: Any,
    shared: Any,
    batch: Any,
    rows: Trajectory,
    chunk_size: ChunkSize,
) -> Array:
    chunks = chunks_for(task.policy, chunk_size)
    total = task.sum_over_rows(of_chunk, shared, batch, rows.mask, chunks)
    return total / jnp.maximum(rows.num_decisions, 1).astype(total.dtype)
