"""Rows have room for the longest episodes, and most of it may be empty.

Whole episodes come in rows of a length that no row can outgrow. While a policy is new
they may end after a twentieth of it (on CartPole they do), and work on every slot of
the batch, for returns, baselines and statistics, is mostly work on nothing. A shape
cannot follow the data, but one of two can be chosen by them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxpg._batching import anywhere
from jaxpg._checks import check_rank, is_concrete
from jaxpg.types import Trajectory

__all__ = ["SHARE", "WORTH_A_BRANCH", "at_used_length", "first_turns", "with_room"]

SHARE = 8
"""The shorter of the two lengths is this part of the room."""

WORTH_A_BRANCH = 512
"""Turns from which on there are two: a second branch is compiled for it."""


def at_used_length(fn: Callable[[int], Any], mask: Bool[Array, "B T"]) -> Any:
    """`fn(T)`, or `fn` of an eighth of T where nothing comes after that.

    Args:
        fn: takes how many turns to look at, counted from the first, and gives the same
            for both lengths, but for rounding, if all later slots are empty.
        mask: whether a slot holds a decision.

    Returns:
        What `fn` gives; of all turns, without a branch, where they are few or known.
        Members of a population, side by side under `vmap`, take one length together.

    Raises:
        ValueError: if the mask is not that of a batch.

    >>> mask = jnp.arange(1024)[None] < 9
    >>> jax.jit(lambda mask: at_used_length(jnp.asarray, mask))(mask).item()
    128
    """
    check_rank("mask", mask, 2, "(B, T) = a batch of rows")
    length = mask.shape[1]
    if length < WORTH_A_BRANCH or is_concrete(mask):
        return fn(length)
    short = length // SHARE
    is_long = anywhere(mask[:, short:])
    return jax.lax.cond(is_long, lambda: fn(length), lambda: fn(short))


def first_turns(trajectories: Trajectory, number: int) -> Trajectory:
    """The first turns of every row, [B, number]; the rows themselves if that is all."""
    if number == trajectories.mask.shape[1]:
        return trajectories  # of shapes that may be wrong: others will say so
    carry = trajectories.carry  # of a row, not of its turns
    first = jax.tree.map(lambda x: x[:, :number], trajectories._replace(carry=None))
    return first._replace(carry=carry)


def with_room(x: Array, length: int) -> Array:
    """[B, n, ...] with zeros behind, [B, length, ...].

    >>> with_room(jnp.ones((1, 2)), 3).tolist()
    [[1.0, 1.0, 0.0]]
    """
    behind = [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, behind)
