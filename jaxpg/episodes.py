"""Episodes in rows that are not: split out of packed rows, counted in segments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_positive, check_rank, is_concrete
from jaxpg.types import Trajectory

__all__ = [
    "EndedEpisodes",
    "check_single_episodes",
    "ended_episodes",
    "split_episodes",
]


class EndedEpisodes(NamedTuple):
    """Sums over the episodes that ended in some segments.

    Attributes:
        number: how many ended.
        returns: sum of their undiscounted returns, from their true beginning on.
        lengths: sum of the decisions that they took, likewise.
        num_decisions: of the segments.
    """

    number: Int[Array, "*B"]
    returns: Float[Array, "*B"]
    lengths: Float[Array, "*B"]
    num_decisions: Int[Array, "*B"]


def ended_episodes(segments: Trajectory, brought: Float[Array, " B"]) -> EndedEpisodes:
    """Count the episodes that ended in segments, and what they came to.

    Args:
        segments: rows that begin and end inside episodes, [B, T].
        brought: return of each row's first episode before the row, [B].

    Returns:
        Sums over all rows.

    >>> x, no = jnp.array([[1.0, 2.0, 4.0]]), jnp.zeros((1, 3), bool)
    >>> ends, time = jnp.array([[False, True, False]]), jnp.array([[7, 8, 0]])
    >>> rows = Trajectory(x, x, x, x, ends, no, ~no, time, time)
    >>> [x.item() for x in ended_episodes(rows, jnp.array([10.0]))]
    [1, 13.0, 9.0, 3]
    """

    ends, rewards = segments.ends, segments.reward
    step = jnp.arange(1, ends.shape[1] + 1, dtype=jnp.int32)
    # Whatever a row earns until its last end belongs to an episode that has ended.
    last_end = jnp.max(jnp.where(ends, step, 0), axis=1)
    earned = jnp.sum(jnp.where(step[None] <= last_end[:, None], rewards, 0.0))
    lengths = jnp.where(ends, segments.time + 1, 0).astype(rewards.dtype)
    return EndedEpisodes(
        jnp.sum(ends),
        earned + jnp.sum(jnp.where(last_end > 0, brought, 0.0)),
        jnp.sum(lengths),
        segments.num_decisions,
    )


def check_single_episodes(trajectories: Trajectory) -> None:
    """Refuse known rows that hold more than one episode, where scores are taken.

    Raises:
        ValueError: naming how many; `split_episodes` is the cure.
    """
    if not is_concrete(trajectories.time, trajectories.mask):
        return
    with jax.ensure_compile_time_eval():
        most = int(jnp.max(jnp.sum(trajectories.starts, axis=-1), initial=0))
    if most > 1:
        raise ValueError(
            f"trajectories have a row with {most} episodes, needs one per row, because "
            "every trajectory's own score is taken; use split_episodes"
        )


def split_episodes(
    trajectories: Trajectory, num_episodes: int, max_steps: int
) -> Trajectory:
    """The same episodes, one per row, in the order in which rows hold them.

    Args:
        trajectories: rows of whole episodes, several to a row or not.
        num_episodes: N, how many there are.
        max_steps: the most decisions that one of them takes.

    Returns:
        N rows of `max_steps` slots, masked after each one's end. A row without an
        episode, where there are fewer than N, is masked altogether.

    Raises:
        ValueError: if a count is not positive or the rows are no batch.

    >>> time, yes = jnp.array([[0, 1, 0]]), jnp.ones((1, 3), bool)
    >>> x = jnp.array([[5.0, 6.0, 7.0]])
    >>> rows = Trajectory(x, x, x, x, ~yes, ~yes, yes, time, time)
    >>> split_episodes(rows, 2, 2).mask.tolist()
    [[True, True], [True, False]]
    """
    check_positive("num_episodes", num_episodes)
    check_positive("max_steps", max_steps)
    check_rank("mask", trajectories.mask, 2, "(B, T) = a batch of rows")
    num_rows, length = trajectories.mask.shape
    size = num_rows * length
    (first,) = jnp.nonzero(
        trajectories.starts.reshape(-1), size=num_episodes, fill_value=size
    )
    row = jnp.minimum(first // length, num_rows - 1)
    steps = jnp.arange(max_steps, dtype=first.dtype)
    slot = (first - row * length)[:, None] + steps[None, :]
    inside = jnp.minimum(slot, length - 1)

    def pick(x: Array) -> Array:
        return x[row[:, None], inside]

    carry = jax.tree.map(lambda x: x[row], trajectories.carry)
    picked = jax.tree.map(pick, trajectories._replace(carry=None))
    # A slot of the same episode holds its own step number; the next one starts again.
    own = (
        (slot < length)
        & picked.mask
        & (picked.time == steps.astype(picked.time.dtype)[None, :])
    )
    return picked._replace(
        mask=own & (first < size)[:, None],
        time=jnp.broadcast_to(steps.astype(picked.time.dtype), own.shape),
        carry=carry,
    )
