"""Batches that are played again wherever they are looked at, and never stored.

A row of segments is a pure function of the slot that it continues, of who acts, and of
the run's key. So a batch can be its slots alone: a survey plays them once, for what
must be known of all decisions together, and a gradient plays those of its minibatch,
some at a time. What is paid is a rollout, and the critic's values, for every pass;
memory is that of the slots and of the rows that are played together.

Programs of different shapes may round differently. Where rounding tips a draw, a row
that is played again parts from the one that was surveyed: a gradient is then of rows as
good as those, with their own log-probabilities, and not of the same ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg.algos.base import Replay, Replayed, Task
from jaxpg.algos.measures import count_non_finite, count_non_finite_decisions
from jaxpg.algos.segments import Advantages, advantages_of
from jaxpg.chunks import Chunks, map_plainly, sum_over_chunks
from jaxpg.critics import CriticState
from jaxpg.episodes import ended_episodes
from jaxpg.moments import Moments, merge_over_axis, moments_of, variance
from jaxpg.normalizers import moments_in
from jaxpg.rollout import RolloutState
from jaxpg.types import Params, PyTree, Trajectory

__all__ = [
    "Survey",
    "alone",
    "standardized_by",
    "sum_over_replay",
    "survey",
]


class Survey(NamedTuple):
    """What one pass over all rows has seen.

    Attributes:
        observations: moments for each of the statistics of observations.
        advantages: moments of the advantages.
        targets: of what the critic should say.
        errors: of targets less what it said.
        largest: of the advantages.
        smallest: of the advantages.
        num_non_finite: decisions with a number that is NaN or infinite.
    """

    observations: PyTree
    advantages: Moments
    targets: Moments
    errors: Moments
    largest: Float[Array, ""]
    smallest: Float[Array, ""]
    num_non_finite: Int[Array, ""]


def alone(task: Task) -> Task:
    """The task as one device sees it that works on rows of its own."""
    return task._replace(map_rows=map_plainly, sum_over_rows=sum_over_chunks)


def survey(
    config: Any,
    task: Task,
    critic: CriticState,
    replay: Replay,
    seen_by: Params,
    *,
    rows_at_once: int,
) -> tuple[Replayed, Survey]:
    """Play every row once.

    Args:
        config: settings that `advantages_of` needs.
        task: gives the critic's network and how rows are spread.
        critic: what it has learned.
        replay: the batch.
        seen_by: parameters that may hold statistics of observations.
        rows_at_once: rows that are played together.

    Returns:
        What must be kept, and what must be known of all decisions together.
    """

    def of_some(shared: Any, slots: RolloutState) -> tuple[RolloutState, Any]:
        critic, seen_by, params, key = shared
        rows, after = replay.play(params, key, slots)
        estimate = advantages_of(config, alone(task), critic, rows)
        episodes = ended_episodes(rows, slots.episode_return)
        seen = moments_in(seen_by, rows.obs, rows.mask)
        return after, (episodes, seen, *_numbers(rows, estimate))

    def on_one_device(shared: Any, slots: RolloutState) -> tuple[RolloutState, Any]:
        return _map_parts(lambda some: of_some(shared, some), slots, rows_at_once)

    shared = (critic, seen_by, replay.params, replay.key)
    after, found = task.map_rows(on_one_device, shared, replay.slots)
    episodes, seen, moments, largest, smallest, non_finite = found
    advantages, targets, errors = (merge_over_axis(each) for each in moments)
    squares = variance(advantages, ddof=0)  # infinite where the type cannot hold them
    lost = jnp.sum(non_finite, dtype=jnp.int32) + count_non_finite(squares)
    kept = Replayed(after, jax.tree.map(lambda x: jnp.sum(x, axis=0), episodes))
    return kept, Survey(
        [merge_over_axis(each) for each in seen],
        advantages,
        targets,
        errors,
        jnp.max(largest),
        jnp.min(smallest),
        lost,
    )


def sum_over_replay(
    task: Task,
    fn: Callable[[Any, Trajectory], Any],
    shared: Any,
    replay: Replay,
    *,
    rows_at_once: int,
) -> Any:
    """Sum `fn(shared, rows)` over rows that are played for it, some at a time.

    Args:
        task: gives how sums are taken.
        fn: maps what is shared and some rows to sums over them.
        shared: what it needs, for example parameters.
        replay: whose rows, or some of them.
        rows_at_once: rows that are played together.

    Returns:
        The sum over all rows.
    """

    def of_slots(shared: Any, slots: RolloutState) -> Any:
        shared, params, key = shared
        rows, _ = replay.play(params, key, slots)
        return fn(shared, rows)

    everywhere = jnp.ones((replay.slots.stride.shape[0], 1), bool)
    return task.sum_over_rows(
        of_slots,
        (shared, replay.params, replay.key),
        replay.slots,
        everywhere,
        Chunks(rows_at_once),
    )


def standardized_by(
    found: Survey, advantages: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """`advantages.standardize` over a batch of which only a survey is known.

    Args:
        found: of the whole batch.
        advantages: of some of its rows.

    Returns:
        In units of the batch's deviation, from its mean; 0 where it hardly varies, and
        where its square is beyond the numbers of the type.

    Bias: biased, as `standardize`.
    """
    std = jnp.sqrt(variance(found.advantages, ddof=0))
    furthest = jnp.maximum(found.largest, -found.smallest)
    tells = std > 32.0 * jnp.finfo(std.dtype).eps * furthest
    centred = (advantages - found.advantages.mean) - found.advantages.mean_rest
    return jnp.where(tells, centred / jnp.where(tells, std, 1.0), 0.0)


def _map_parts(
    fn: Callable[[RolloutState], tuple[RolloutState, Any]],
    slots: RolloutState,
    rows_at_once: int,
) -> tuple[RolloutState, Any]:
    """`fn` of some slots at a time, and of the rest: slots, and one result a part."""
    num_rows = slots.stride.shape[0]
    count, rest = divmod(num_rows, min(rows_at_once, num_rows))
    whole = num_rows - rest

    def cut(x: Array) -> Array:
        return x[:whole].reshape(count, whole // count, *x.shape[1:])

    def joined(x: Array) -> Array:
        return x.reshape(whole, *x.shape[2:])

    after, found = jax.lax.map(fn, jax.tree.map(cut, slots))
    parts = [(jax.tree.map(joined, after), found)]
    if rest:
        after, found = fn(jax.tree.map(lambda x: x[whole:], slots))
        parts.append((after, jax.tree.map(lambda x: x[None], found)))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _numbers(rows: Trajectory, estimate: Advantages) -> Any:
    advantages, targets = estimate.advantages, estimate.targets
    moments = [
        moments_of(x.reshape(-1))
        for x in (advantages, targets, targets - estimate.values)
    ]
    return (
        moments,
        jnp.max(advantages),
        jnp.min(advantages),
        count_non_finite_decisions(rows, advantages),
    )
