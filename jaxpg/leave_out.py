r"""Leaving oneself out: the mean credit of the other trajectories, from additive sums.

    b[i] = sum_{j != i} value[j] / sum_{j != i} reach[j]

Taking one's own part off the total is not enough. Where ratios make one trajectory
weigh a million times the others, the difference is rounding of that one's OWN part, and
a baseline that knows its own action is biased exactly where it matters. So sums are
kept apart in a few folds by episode number: those of the other folds are added up anew,
and only within one's own fold is anything subtracted, and dropped where little is left.

Sums add over rows, so they serve batches in chunks and on several devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg.credit import Credit, mean_credit
from jaxpg.types import PyTree, Trajectory

__all__ = [
    "FOLDS",
    "fold_of",
    "mean_of_others",
    "other_folds",
    "sums_at_starts",
    "sums_by_time",
    "sums_of_rows",
    "whole",
]

FOLDS = 8
"""Into how many sums the episodes of a batch are shared out."""

BLOCK = 256
"""Rows that are added one after another; more go in blocks, so that sums of a million
rows keep their digits."""


def fold_of(episode_id: Int[Array, "..."]) -> Int[Array, "..."]:
    """Which fold an episode belongs to: neighbours belong to different ones."""
    return episode_id % FOLDS


def sums_by_time(values: PyTree, trajectories: Trajectory, max_steps: int) -> PyTree:
    """Sums over the trajectories alive at each decision 0 .. max_steps - 1, by fold.

    Args:
        values: a tree of numbers for each decision, [B, T], in one type.
        trajectories: what they belong to.
        max_steps: L.

    Returns:
        The same tree of [F, L].
    """
    leaves, structure = jax.tree.flatten(values)
    # In one scatter, which goes from decision to decision, and not one for each leaf.
    side_by_side = jnp.stack(leaves, axis=-1)
    counted = jnp.where(trajectories.mask[..., None], side_by_side, 0.0)
    fold = fold_of(trajectories.episode_id)

    def of_block(x: Array, fold: Array, time: Array) -> Array:
        sums = jnp.zeros((FOLDS, max_steps, x.shape[-1]), x.dtype)
        return sums.at[fold, time].add(x, mode="drop")

    sums = _in_blocks(of_block, counted, fold, trajectories.time)
    return jax.tree.unflatten(structure, list(jnp.moveaxis(sums, -1, 0)))


def sums_at_starts(
    values: Float[Array, "B T"], trajectories: Trajectory
) -> Float[Array, " F"]:
    """Sums of what stands at the episodes' first decisions, by fold."""
    counted = jnp.where(trajectories.starts, values, 0.0)
    return sums_of_rows(counted, fold_of(trajectories.episode_id))


def sums_of_rows(x: Float[Array, "B ..."], fold: Int[Array, "B ..."]) -> Array:
    """Sums over B by fold, [F, ...]; or over all entries, where each has a fold."""
    over = tuple(range(fold.ndim))
    like = fold.reshape(*fold.shape, *(1,) * (x.ndim - fold.ndim))
    return jnp.stack(
        [jnp.sum(jnp.where(like == k, x, 0.0), axis=over) for k in range(FOLDS)]
    )


def whole(sums: PyTree) -> PyTree:
    """The sums over all folds."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def other_folds(sums: PyTree) -> PyTree:
    """For each fold the sum of the others, added up anew."""

    def of_leaf(x: Array) -> Array:
        without = [
            jnp.sum(jnp.concatenate([x[:k], x[k + 1 :]]), axis=0) for k in range(FOLDS)
        ]
        return jnp.stack(without)

    return jax.tree.map(of_leaf, sums)


def mean_of_others(sums: Credit, own: Credit, *index: Any) -> Array:
    """The mean credit without one's own, and 0 where the others have no weight.

    Args:
        sums: by fold, [F, ...], over the whole batch.
        own: one's own part of them.
        index: fold, and whatever else says where in `sums` one's own part went;
            what lies outside of them counts nothing.

    Returns:
        One level for each of `own`.

    Bias: none for the gradient; the level depends on one's own part by rounding alone.
    """

    def pick(x: Array) -> Array:
        return x.at[index].get(mode="fill", fill_value=0.0)

    same, other = jax.tree.map(pick, sums), jax.tree.map(pick, other_folds(sums))
    reach, value = same.reach - own.reach, same.value - own.value
    # Less than some units of rounding of the fold would be mostly one's own rounding.
    is_left = reach > 1024.0 * jnp.finfo(reach.dtype).eps * same.reach
    return mean_credit(
        other.value + jnp.where(is_left, value, 0.0),
        other.reach + jnp.where(is_left, reach, 0.0),
    )


def _in_blocks(of_block: Any, *rows: Array) -> Array:
    number = rows[0].shape[0]
    if number <= BLOCK:
        return of_block(*rows)
    missing = -number % BLOCK

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(-1, BLOCK, *x.shape[1:])

    return jnp.sum(jax.vmap(of_block)(*(cut(x) for x in rows)), axis=0)
