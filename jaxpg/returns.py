r"""Returns: what the rewards of one row of storage add up to.

All of them are one linear recurrence, run backwards in time:

    x[t] = increments[t] + decays[t] * x[t + 1],      x[T] = final

`decays[t] = 0` cuts the sum after decision t, which is how rows that hold several
episodes keep them apart. Everything here is written for one row, [T]; batch it with
`jax.vmap`.

Two discount conventions exist and both are offered by name. Usual practice weighs
decision t by sum_{u >= t} discount^(u - t) r[u] and forgets that later decisions count
less from the start's point of view; `leading_discounts` is the factor discount^t that
it forgets, and with it the gradient is that of the discounted return
(Nota and Thomas 2020, "Is the policy gradient a gradient?").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpg._checks import check_range, check_rank, check_same_shape

__all__ = [
    "at_episode_start",
    "episode_returns",
    "leading_discounts",
    "rewards_to_go",
    "step_discounts",
    "suffix_recurrence",
]

ONE_ROW = "(T,) = one row; for a batch use jax.vmap"


def suffix_recurrence(
    increments: Float[Array, " T"],
    decays: Float[Array, " T"],
    final: Float[Array, ""] | float = 0.0,
) -> Float[Array, " T"]:
    """Solve x[t] = increments[t] + decays[t] * x[t + 1] backwards from x[T] = final.

    Args:
        increments: what each decision adds.
        decays: how much of the later sum decision t keeps; 0 cuts it off.
        final: the value of x after the row.

    Returns:
        x[0], ..., x[T - 1].

    Raises:
        ValueError: if the arrays are not two rows of one length and one number.

    >>> suffix_recurrence(jnp.ones(3), jnp.array([1.0, 0.0, 1.0]), 5.0).tolist()
    [2.0, 1.0, 6.0]
    """
    check_rank("increments", increments, 1, ONE_ROW)
    check_same_shape(increments=increments, decays=decays)
    final = jnp.asarray(final, increments.dtype)
    check_rank("final", final, 0, "() = what follows the row; for a batch use jax.vmap")

    def step(later: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        increment, decay = inputs
        x = increment + decay * later
        return x, x

    return jax.lax.scan(step, final, (increments, decays), reverse=True)[1]


def step_discounts(
    ends: Bool[Array, " T"], mask: Bool[Array, " T"], discount: float | Float[Array, ""]
) -> Float[Array, " T"]:
    """How much the next decision counts at each one: discount, and 0 after an end.

    Args:
        ends: whether decision t was the last of its episode.
        mask: whether slot t holds a decision.
        discount: the factor per decision, in [0, 1].

    Returns:
        `discount` inside episodes; 0 at ends and in empty slots.

    >>> step_discounts(jnp.array([False, True]), jnp.array([True, True]), 0.5).tolist()
    [0.5, 0.0]
    """
    check_range("discount", discount, 0.0, 1.0)
    return jnp.where(ends | ~mask, 0.0, discount)


def leading_discounts(
    time: Int[Array, " T"], discount: float | Float[Array, ""]
) -> Float[Array, " T"]:
    """The factor discount^time that usual practice drops.

    Args:
        time: decisions taken since the episode began.
        discount: the factor per decision, in [0, 1].

    Returns:
        discount^time, and 1 everywhere for a discount of 1.

    Reference: Sutton et al. 2000, "Policy gradient methods", theorem 1.

    >>> leading_discounts(jnp.array([0, 1, 2]), 0.5).tolist()
    [1.0, 0.5, 0.25]
    """
    check_range("discount", discount, 0.0, 1.0)
    return jnp.power(jnp.asarray(discount, float), time.astype(float))


def rewards_to_go(
    rewards: Float[Array, " T"],
    discounts: Float[Array, " T"],
    final_value: Float[Array, ""] | float = 0.0,
) -> Float[Array, " T"]:
    """Reward-to-go, G[t] = r[t] + discounts[t] * G[t + 1].

    Causality: a decision cannot change rewards that came before it, so dropping them
    leaves the gradient's mean as it is and lowers its variance.

    Args:
        rewards: in the environment's units; zero in empty slots.
        discounts: from `step_discounts`: 0 after ends.
        final_value: what follows the row, where the last episode is unfinished.

    Returns:
        The discounted sum of this and all later rewards of the same episode.

    Bias: unbiased for the undiscounted return at discount 1, and for the discounted
        return when weighed by `leading_discounts`; without them biased for either.

    Reference: Baxter and Bartlett 2001; Sutton et al. 2000.

    >>> rewards_to_go(jnp.ones(3), jnp.array([0.5, 0.5, 0.0])).tolist()
    [1.75, 1.5, 1.0]
    """
    return suffix_recurrence(rewards, discounts, final_value)


def at_episode_start(
    values: Float[Array, " T"], time: Int[Array, " T"]
) -> Float[Array, " T"]:
    """For each decision the value at its own episode's first decision.

    Args:
        values: one value per decision.
        time: decisions taken since the episode began.

    Returns:
        values[t - time[t]]; for an episode that began before the row, values[0].

    Raises:
        ValueError: if the arrays are not two rows of one length.

    >>> time = jnp.array([0, 1, 0])
    >>> at_episode_start(jnp.array([7.0, 8.0, 9.0]), time).tolist()
    [7.0, 7.0, 9.0]
    """
    check_rank("values", values, 1, ONE_ROW)
    check_same_shape(values=values, time=time)
    index = jnp.arange(time.shape[0], dtype=time.dtype) - time
    return values[jnp.clip(index, 0)]


def episode_returns(
    rewards: Float[Array, " T"],
    discounts: Float[Array, " T"],
    time: Int[Array, " T"],
) -> Float[Array, " T"]:
    """The whole episode's return, sum_u discount^u r[u], at each of its decisions.

    Args:
        rewards: in the environment's units; zero in empty slots.
        discounts: from `step_discounts`: 0 after ends.
        time: decisions taken since the episode began.

    Returns:
        The return from the episode's first decision on, repeated at every decision.

    Bias: unbiased; the credit of Williams' REINFORCE.

    Reference: Williams 1992, "Simple statistical gradient-following algorithms".

    >>> discounts, time = jnp.array([1.0, 0.0, 0.0]), jnp.array([0, 1, 0])
    >>> episode_returns(jnp.array([1.0, 2.0, 5.0]), discounts, time).tolist()
    [3.0, 3.0, 5.0]
    """
    return at_episode_start(rewards_to_go(rewards, discounts), time)
