r"""Groups of trajectories that share a start state, and baselines made of them.

    b[i] = 1/(G - 1)  sum_{j in group of i, j != i} R[j]

Episodes i with the same `episode_id // group_size` are one group; `rollout_episodes`
with that `group_size` starts them in the same state. Their mean return then knows how
good the start is, which a mean over the batch does not: what is left to vary is what
the policy and the world did afterwards.

A batch holds `num_groups` whole groups with contiguous ids: from a multiple of
`group_size` on, `num_groups * group_size` of them. They may lie in any rows and order.

"The trajectory's return" is its credit at its first decision, as in `jaxpg.baselines`.

References: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!";
Shao et al. 2024, "DeepSeekMath" (GRPO); Liu et al. 2025, "Understanding R1-Zero-like
training" (Dr. GRPO: what GRPO's division does to the gradient).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_positive, check_range, check_rank
from jaxpg.baselines import Baseline, stateless
from jaxpg.credit import Credit, mean_credit
from jaxpg.leave_out import FOLDS, fold_of, mean_of_others
from jaxpg.returns import at_episode_start
from jaxpg.types import Params, Trajectory

__all__ = ["group_index", "group_leave_one_out_baseline", "group_standardize"]


def group_index(
    episode_id: Int[Array, "B T"], group_size: int, num_groups: int
) -> Int[Array, "B T"]:
    """Which of the batch's groups each decision belongs to, 0 .. num_groups - 1.

    >>> group_index(jnp.array([[8, 9, 10, 11]]), 2, 2).tolist()
    [[0, 0, 1, 1]]
    """
    return episode_id // group_size % num_groups


def group_leave_one_out_baseline(group_size: int, num_groups: int) -> Baseline:
    """The mean return of the other trajectories of the same group.

    Off policy the mean is importance-weighted: the others' value over their reach.

    Args:
        group_size: G, trajectories that share a start state; at least 2.
        num_groups: groups in a batch.

    Raises:
        ValueError: if a count is not a whole number in its range.

    Bias: unbiased, whatever the groups: start states may differ between them, and need
        not even be shared within.

    Reference: Kool et al. 2019.
    """
    _check_counts(group_size, num_groups)

    def summarize(params: Params, trajectories: Trajectory, credit: Credit) -> Credit:
        del params
        group = group_index(trajectories.episode_id, group_size, num_groups)
        fold, starts = fold_of(trajectories.episode_id), trajectories.starts

        def sums_by_place(x: Array) -> Array:
            return jnp.zeros((FOLDS, num_groups), x.dtype).at[fold, group].add(x)

        return jax.tree.map(lambda x: sums_by_place(jnp.where(starts, x, 0.0)), credit)

    def predict(
        params: Params, summary: Credit, trajectories: Trajectory, credit: Credit
    ) -> Array:
        del params
        group = group_index(trajectories.episode_id, group_size, num_groups)
        own = jax.tree.map(
            lambda x: jax.vmap(at_episode_start)(x, trajectories.time), credit
        )
        return mean_of_others(summary, own, fold_of(trajectories.episode_id), group)

    return stateless(predict, summarize, min_trajectories=group_size)


def group_standardize(
    trajectories: Trajectory, credit: Credit, group_size: int, num_groups: int
) -> Float[Array, "B T"]:
    """(value - reach * mean) / std, by the group's own mean and std: GRPO's weights.

    A group whose returns are equal says nothing, and all its weights are exactly 0.
    Equal means: but for rounding. Returns that are sums of equal rewards in another
    order differ by some units in their last place; divided by their own std these would
    become weights of size 1. Differences up to 4 eps * sum_t |value[t]|, what rounding
    can do in a sum with the partial sums `value`, count as none.

    Args:
        trajectories: the whole batch, rows of whole episodes.
        credit: of the same rows.
        group_size: G, trajectories that share a start state; at least 2.
        num_groups: groups in the batch.

    Returns:
        One weight per decision for `score_gradient`, 0 in empty slots, held constant.

    Raises:
        ValueError: if a count is not a whole number in its range or the rows are no
            batch.

    Bias: biased: the mean contains the trajectory's own return, which shrinks the
        gradient, and the division weighs start states by 1/std, so that those whose
        return hardly varies count most. `group_leave_one_out_baseline` does neither.

    Reference: Shao et al. 2024, section 4.1 (here the std of the G, not over G - 1);
        Liu et al. 2025, section 3.1.
    """
    _check_counts(group_size, num_groups)
    check_rank("mask", trajectories.mask, 2, "(B, T) = a batch of rows")
    shape = (num_groups, group_size)
    start, steps = _tables(trajectories, credit, shape)
    returns, counted = mean_credit(start.value, start.reach), start.reach > 0.0
    largest, eps = jnp.finfo(returns.dtype).max, jnp.finfo(returns.dtype).eps
    low = jnp.min(returns, 1, keepdims=True, initial=largest, where=counted)
    spread = jnp.max(returns - low, 1, keepdims=True, initial=0.0, where=counted)
    rounding = 4.0 * eps * jnp.max(steps, 1, keepdims=True)
    # From the lowest return on and in units of the range: equal returns are then equal
    # numbers whatever their size, and squares neither overflow nor vanish.
    unit = jnp.where(spread > rounding, spread, 1.0)
    scaled = jnp.where(counted, (returns - low) / unit, 0.0)
    mean, variance = _mean_and_variance(scaled, start.reach)
    std = jnp.sqrt(variance)
    # One member may have all of the reach.
    tells = (spread > rounding) & (std > 4.0 * eps)
    group = group_index(trajectories.episode_id, group_size, num_groups)
    tells, low, unit, mean, std = (
        x[:, 0][group] for x in (tells, low, unit, mean, jnp.where(tells, std, 1.0))
    )
    weights = ((credit.value - credit.reach * low) / unit - credit.reach * mean) / std
    return jax.lax.stop_gradient(jnp.where(trajectories.mask & tells, weights, 0.0))


def _check_counts(group_size: int, num_groups: int) -> None:
    check_positive("group_size", group_size)
    check_range("group_size", group_size, 2, cure="one trajectory has no others")
    check_positive("num_groups", num_groups)


def _sums(x: Array, group: Array, num_groups: int) -> Array:
    return jnp.zeros((num_groups,), x.dtype).at[group].add(x)


def _tables(
    trajectories: Trajectory, credit: Credit, shape: tuple[int, int]
) -> tuple[Credit, Array]:
    """Per group and member: the credit at the start, and sum_t |value / reach|."""
    size = shape[0] * shape[1]
    member = trajectories.episode_id % size

    def table(x: Array, where: Array) -> Array:
        return _sums(jnp.where(where, x, 0.0), member, size).reshape(shape)

    start = jax.tree.map(lambda x: table(x, trajectories.starts), credit)
    sizes = jnp.abs(mean_credit(credit.value, credit.reach))
    return start, table(sizes, trajectories.mask)


def _mean_and_variance(x: Array, weights: Array) -> tuple[Array, Array]:
    """Over the members of each group."""

    def mean(x: Array) -> Array:
        total = jnp.sum(weights * x, axis=1, keepdims=True)
        return mean_credit(total, jnp.sum(weights, axis=1, keepdims=True))

    return mean(x), mean((x - mean(x)) ** 2)
