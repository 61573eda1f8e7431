r"""Credit: what a decision is weighed by, on policy or with importance ratios.

    weights[i, t] = value[i, t] - reach[i, t] * baseline[i, t]

`value` is everything that a decision is credited with, discounts and ratios included.
`reach` is the factor that a baseline must carry to leave the mean as it is: 1 on
policy, discount^t where that is kept, the ratios that lead to the decision off policy.
With both, a baseline need not know which credit it serves: the mean credit is `sum
value / sum reach`, an importance-weighted average where there are ratios.

    ratio                  value[t]                                 reach[t]
    none                   R or G[t]                                1
    whole                  exp(L) R or exp(L) G[t]                  exp(L)
    causal                 sum_{u >= t} r[u] exp(L[u])              exp(L[t])
    future-dropped         exp(L[t]) G[t]                           exp(L[t])
    past-dropped           sum_{u >= t} r[u] prod_{t..u} rho        rho[t]
    past-dropped-whole     prod_{u >= t} rho[u] G[t]                the product
    first-order            rho[t] G[t]                              rho[t]

See `jaxpg.importance` for what each form has for its limit. Truncated ratios have no
mean of 1 left, so with `max_rho` every baseline moves the mean as well, and with
`self_normalize` it does by O(1/N).
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpg import importance
from jaxpg._checks import (
    check_choice,
    check_no_nan,
    check_not_empty,
    check_range,
    check_rank,
    check_same_shape,
)
from jaxpg.returns import (
    episode_returns,
    leading_discounts,
    rewards_to_go,
    step_discounts,
)
from jaxpg.room import at_used_length, first_turns, with_room
from jaxpg.self_normalized import self_normalize
from jaxpg.types import Trajectory

__all__ = [
    "CREDITS",
    "RATIOS",
    "Credit",
    "CreditConfig",
    "CreditName",
    "credit_of",
    "credit_of_used",
    "held_finite",
    "mean_credit",
]

CreditName = Literal["reward-to-go", "total-return"]
RatioName = Literal[
    "none",
    "whole",
    "causal",
    "future-dropped",
    "past-dropped",
    "past-dropped-whole",
    "first-order",
]
CREDITS: tuple[str, ...] = ("reward-to-go", "total-return")
RATIOS: tuple[str, ...] = (
    "none",
    "whole",
    "causal",
    "future-dropped",
    "past-dropped",
    "past-dropped-whole",
    "first-order",
)


class Credit(NamedTuple):
    """What decisions are credited with, before any baseline; 0 in empty slots.

    Attributes:
        value: the credit, discounts and ratios included, [B, T].
        reach: what a baseline must be multiplied by to leave the mean as it is, [B, T].
    """

    value: Float[Array, "*B T"]
    reach: Float[Array, "*B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """Which credit, with which discount and which ratios."""

    credit: CreditName = "reward-to-go"
    """What a decision is weighed by, before the baseline."""
    discount: float = 1.0
    """Weight of the next reward relative to this one, in [0, 1]."""
    keep_leading_discount: bool = False
    """With reward-to-go, weigh decision t by discount^t as well: the unbiased gradient
    of the discounted return. Without it (usual practice) late decisions count like
    early ones. A total return needs no such factor."""
    ratio: RatioName = "none"
    """Which importance ratios stand on decision t."""
    max_rho: float | None = None
    """Truncate every single ratio at this; None leaves them as they are."""
    self_normalize: bool = False
    """Divide products of ratios by their mean over the batch at the same time step."""

    def __post_init__(self) -> None:
        check_choice("credit", self.credit, CREDITS)
        check_choice("ratio", self.ratio, RATIOS)
        check_range("discount", self.discount, 0.0, 1.0)
        if self.max_rho is not None:
            check_range("max_rho", self.max_rho, 0.0, open_low=True)
        self._refuse_what_does_not_go_together()

    def _refuse_what_does_not_go_together(self) -> None:
        total = self.credit == "total-return"
        if self.keep_leading_discount and total:
            raise ValueError(
                "keep_leading_discount is set, but credit is 'total-return', which "
                "counts discount^t already; leave it out, or take credit 'reward-to-go'"
            )
        if total and self.ratio not in ("none", "whole"):
            raise ValueError(
                f"ratio is {self.ratio!r}, but credit is 'total-return', whose rewards "
                "may lie before the decision; take credit 'reward-to-go', or ratio "
                "'whole'"
            )
        if self.ratio == "none" and (self.self_normalize or self.max_rho is not None):
            raise ValueError(
                "self_normalize or max_rho is set, but ratio is 'none', so there is "
                f"nothing to change; choose a ratio of {', '.join(RATIOS[1:])}"
            )
        if self.self_normalize and self.ratio == "past-dropped":
            raise ValueError(
                "self_normalize is set, but ratio is 'past-dropped', whose products "
                "differ for every pair of times; take 'past-dropped-whole'"
            )


def credit_of(
    trajectories: Trajectory,
    config: CreditConfig = CreditConfig(),
    log_rhos: Float[Array, "B T"] | None = None,
) -> Credit:
    """The credit of every decision of a batch of rows of whole episodes.

    Args:
        trajectories: rows of whole episodes.
        config: which credit; all of its combinations are in the oracle's table.
        log_rhos: log pi - log mu of each decision, from `importance.log_ratios`; needed
            unless `config.ratio` is "none".

    Returns:
        Value and reach, both constant for differentiation and 0 in empty slots.

    Raises:
        ValueError: if the rows are no batch or empty, hold a reward or a log-ratio that
            is NaN (where values are known, not traced), or ratios are asked for and
            not given.

    Bias: unbiased for the undiscounted return with ratio "none" (on policy), "whole"
        and "causal", and for the discounted one with a total return or the leading
        discount kept; otherwise biased as `jaxpg.importance` says.

    Reference: Williams 1992; Baxter and Bartlett 2001; Precup, Sutton and Singh 2000.
    """
    _check(trajectories)
    if config.ratio == "none":
        credit = jax.vmap(lambda row: _on_policy(row, config))(trajectories)
    elif log_rhos is None:
        raise ValueError(
            f"log_rhos is None, but ratio is {config.ratio!r}, which needs them; "
            "importance.log_ratios makes them, or take ratio 'none'"
        )
    else:
        credit = _off_policy(trajectories, config, log_rhos)
    return jax.lax.stop_gradient(_only_real(credit, trajectories.mask))


def credit_of_used(
    trajectories: Trajectory, config: CreditConfig = CreditConfig()
) -> Credit:
    """`credit_of` on policy, worked out for as many turns as the batch uses.

    Args:
        trajectories: rows of whole episodes.
        config: which credit, of ratio "none".

    Returns:
        Value and reach, as `credit_of` but for rounding.

    Raises:
        ValueError: as `credit_of`, and if ratios are asked for.

    Bias: that of `credit_of`.
    """
    if config.ratio != "none":
        raise ValueError(
            f"ratio is {config.ratio!r}, needs 'none' on policy; credit_of takes others"
        )

    def of_turns(number: int) -> Credit:
        credit = credit_of(first_turns(trajectories, number), config)
        length = trajectories.mask.shape[1]
        return jax.tree.map(lambda x: with_room(x, length), credit)

    return at_used_length(of_turns, trajectories.mask)


def mean_credit(value: Array, reach: Array) -> Array:
    """value / reach, and 0 where there is no reach; finite whatever they are."""
    some = reach > 0.0
    return held_finite(jnp.where(some, value / jnp.where(some, reach, 1.0), 0.0))


def held_finite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, held within a quarter of what its type can hold; NaN stays.

    Off policy a tiny reach can stand under a huge value, and a huge reach before it.

    >>> bool(jnp.isfinite(held_finite(jnp.array(jnp.inf))))
    True
    """
    largest = 0.25 * float(jnp.finfo(x.dtype).max)
    return jnp.clip(x, -largest, largest)


def _check(trajectories: Trajectory) -> None:
    check_rank("reward", trajectories.reward, 2, "(B, T) = a batch of rows")
    check_not_empty("reward", trajectories.reward, "sample at least one trajectory")
    check_same_shape(reward=trajectories.reward, mask=trajectories.mask)
    check_no_nan("reward", trajectories.reward, trajectories.mask)


def _on_policy(row: Trajectory, config: CreditConfig) -> Credit:
    value = _returns(row, config, _rewards(row))
    return _with_leading_discount(Credit(value, jnp.ones_like(value)), row, config)


def _off_policy(
    trajectories: Trajectory, config: CreditConfig, log_rhos: Array
) -> Credit:
    check_same_shape(reward=trajectories.reward, log_rhos=log_rhos)
    check_no_nan("log_rhos", log_rhos, trajectories.mask)
    log_rhos = jnp.where(trajectories.mask, log_rhos, 0.0)
    if config.max_rho is not None:
        log_rhos = importance.truncate_log_rhos(log_rhos, config.max_rho)
    products = jax.vmap(lambda row, x: _log_products(row, config, x))(
        trajectories, log_rhos
    )
    if config.self_normalize:
        products = self_normalize(
            products,
            trajectories.time,
            trajectories.mask,
            trajectories.ends,
            over="all"
            if config.ratio in ("whole", "causal", "future-dropped")
            else "alive",
        )
    return jax.vmap(lambda row, x, y: _ratio_credit(row, config, x, y))(
        trajectories, log_rhos, products
    )


def _log_products(row: Trajectory, config: CreditConfig, log_rhos: Array) -> Array:
    """The log of the product of ratios that stands on decision t."""
    match config.ratio:
        case "whole":
            return importance.episode_log_rhos(log_rhos, row.ends, row.time)
        case "causal" | "future-dropped":
            return importance.cumulative_log_rhos(log_rhos, row.time)
        case "past-dropped-whole":
            return importance.remaining_log_rhos(log_rhos, row.ends)
        case _:
            return importance.finite_log_rhos(log_rhos)


def _ratio_credit(
    row: Trajectory, config: CreditConfig, log_rhos: Array, log_products: Array
) -> Credit:
    reach = importance.to_weights(log_products)
    rewards = _rewards(row)
    discounts = step_discounts(row.ends, row.mask, config.discount)
    if config.ratio == "causal" and config.self_normalize:
        value = rewards_to_go(rewards * reach, discounts)
    elif config.ratio == "causal":
        value = importance.causal_weights(rewards, discounts, log_rhos, row.time)
    elif config.ratio == "past-dropped":
        value = importance.past_dropped_weights(rewards, discounts, log_rhos)
        # Its products are held there, and what a baseline takes off must not be more.
        reach = jnp.minimum(reach, math.exp(importance.MAX_LOG_WEIGHT / 2))
    else:
        value = reach * _returns(row, config, rewards)
    return _with_leading_discount(Credit(value, reach), row, config)


def _rewards(row: Trajectory) -> Array:
    return jnp.where(row.mask, row.reward, 0.0)


def _returns(row: Trajectory, config: CreditConfig, rewards: Array) -> Array:
    discounts = step_discounts(row.ends, row.mask, config.discount)
    if config.credit == "total-return":
        return episode_returns(rewards, discounts, row.time)
    return rewards_to_go(rewards, discounts)


def _with_leading_discount(
    credit: Credit, row: Trajectory, config: CreditConfig
) -> Credit:
    if not config.keep_leading_discount:
        return credit
    factors = leading_discounts(row.time, config.discount)
    return Credit(credit.value * factors, credit.reach * factors)


def _only_real(credit: Credit, mask: Bool[Array, "B T"]) -> Credit:
    return Credit(*(jnp.where(mask, x, 0.0) for x in credit))
