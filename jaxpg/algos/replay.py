"""Batches that are played again wherever they are looked at, and never stored.

A row of segments is a pure function of the slot that it continues, of who acts, and of
the run's key. So a batch can be its slots alone: a survey plays them once, for what
must be known of all decisions together, and a gradient plays those of its minibatch,
some at a time. What is paid is a rollout, and the critic's values, for every pass;
memory is that of the slots and of the rows that are played together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_divides
from jaxpg.algos.base import Replay, Replayed, Task
from jaxpg.algos.measures import count_non_finite_decisions
from jaxpg.algos.segments import Advantages, advantages_of
from jaxpg.critics import CriticState
from jaxpg.episodes import ended_episodes
from jaxpg.gradients import Chunks, map_plainly, sum_over_chunks
from jaxpg.moments import Moments, merge_over_axis, moments_of, variance
from jaxpg.normalizers import moments_in
from jaxpg.rollout import RolloutState
from jaxpg.types import Params, PyTree, Trajectory

__all__ = [
    "Survey",
    "alone",
    "check_replay",
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


def check_replay(rows_at_once: int, num_rows: int, num_devices: int) -> int:
    """Rows that each device plays together: as many as are asked for and there are.

    Args:
        rows_at_once: as asked for.
        num_rows: of the batch.
        num_devices: that share them.

    Returns:
        A divisor of a device's rows.

    Raises:
        ValueError: if what is asked for is none.

    >>> check_replay(256, 64, 2)
    32
    """
    share = num_rows // num_devices
    rows_at_once = min(rows_at_once, share)
    check_divides("replay_envs", rows_at_once, "environments of each device", share)
    return rows_at_once


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
        rows_at_once: rows that are played together; divides each device's share.

    Returns:
        What must be kept, and what must be known of all decisions together.

    Raises:
        ValueError: if the rows played together do not divide a device's.
    """
    num_rows = replay.slots.stride.shape[0]
    rows_at_once = check_replay(rows_at_once, num_rows, task.num_devices)

    def of_some(shared: Any, slots: RolloutState) -> tuple[RolloutState, Any]:
        critic, seen_by, params, key = shared
        rows, after = replay.play(params, key, slots)
        estimate = advantages_of(config, alone(task), critic, rows)
        episodes = ended_episodes(rows, slots.episode_return)
        seen = moments_in(seen_by, rows.obs, rows.mask)
        return after, (episodes, seen, *_numbers(rows, estimate))

    def on_one_device(shared: Any, slots: RolloutState) -> tuple[RolloutState, Any]:
        parts = jax.tree.map(lambda x: x.reshape(-1, rows_at_once, *x.shape[1:]), slots)
        after, found = jax.lax.map(lambda some: of_some(shared, some), parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after), found

    shared = (critic, seen_by, replay.params, replay.key)
    after, found = task.map_rows(on_one_device, shared, replay.slots)
    episodes, seen, moments, largest, smallest, non_finite = found
    advantages, targets, errors = (merge_over_axis(each) for each in moments)
    return Replayed(
        after, jax.tree.map(lambda x: jnp.sum(x, axis=0), episodes)
    ), Survey(
        [merge_over_axis(each) for each in seen],
        advantages,
        targets,
        errors,
        jnp.max(largest),
        jnp.min(smallest),
        jnp.sum(non_finite),
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
        In units of the batch's deviation, from its mean; 0 where it hardly varies.

    Bias: biased, as `standardize`.
    """
    std = jnp.sqrt(variance(found.advantages, ddof=0))
    furthest = jnp.maximum(found.largest, -found.smallest)
    tells = std > 32.0 * jnp.finfo(std.dtype).eps * furthest
    centred = (advantages - found.advantages.mean) - found.advantages.mean_rest
    return jnp.where(tells, centred / jnp.where(tells, std, 1.0), 0.0)


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
