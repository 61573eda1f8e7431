r"""Credit that bootstraps: rewards up to some decision, a value function for the rest.

    delta[t] = r[t] + discount * V'[t] - V[t]                            TD error
    A[t]     = delta[t] + discount * lambda_ * A[t + 1]                  GAE
    G[t]     = r[t] + discount * ((1 - lambda_) * V'[t] + lambda_ * G[t + 1])

with V[t] the value of obs[t] and V'[t] that of next_obs[t], before any reset. The two
kinds of ends differ in V' alone: it counts 0 after a terminated decision (terminated
wins) and stands for all that is missing after a truncated one. Either way nothing is
taken from the next slot. The last decision of a row, or the last before an empty slot,
bootstraps from V' like a truncated one.

All of it is `suffix_recurrence` with other increments and decays. Everything is written
for one row, [T], but `standardize`, which needs the batch; batch it with `jax.vmap`,
for example `jax.vmap(generalized_advantages, (0, None, None))(rows, 0.99, 0.95)`.
Credit is numbers: no derivative flows through it, into a critic or out of one.

Truncation and the objective. Values at truncations ask what the policy would earn if
nobody stopped the clock. Where the horizon belongs to the task, hand over
`terminated | truncated` as `terminated`: nothing that follows is then counted.

References: Sutton 1988, "Learning to predict by the methods of temporal differences";
Pardo et al. 2018, "Time limits in reinforcement learning"; Schulman et al. 2016,
"High-dimensional continuous control using generalized advantage estimation"; Espeholt
et al. 2018, "IMPALA".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpg._checks import check_positive, check_range, check_rank, check_same_shape
from jaxpg.importance import to_weights, truncate_log_rhos
from jaxpg.returns import ONE_ROW, suffix_recurrence
from jaxpg.types import Trajectory

__all__ = [
    "VTrace",
    "ValuedRow",
    "generalized_advantages",
    "lambda_returns",
    "n_step_returns",
    "next_values_from",
    "standardize",
    "td_errors",
    "vtrace",
    "with_values",
]


class ValuedRow(NamedTuple):
    """One row of rewards and what a value function says beside them.

    Shapes are for one row; a batch has B in front of every field. Slots without a
    decision may hold anything and get credit 0.

    Attributes:
        rewards: in the environment's own units, [T].
        values: V(obs[t]), in units of the return, [T].
        next_values: V(next_obs[t]), the value of the observation after decision t and
            before any reset, [T]; not read where `terminated`.
        terminated: the task ended here: what follows is worth 0, [T].
        truncated: the clock was stopped here: what follows is worth `next_values`, [T].
        mask: whether slot t holds a decision, [T].
    """

    rewards: Float[Array, "*B T"]
    values: Float[Array, "*B T"]
    next_values: Float[Array, "*B T"]
    terminated: Bool[Array, "*B T"]
    truncated: Bool[Array, "*B T"]
    mask: Bool[Array, "*B T"]


class VTrace(NamedTuple):
    """What V-trace says about one row.

    Attributes:
        targets: v[t], what the value of obs[t] should become, [T].
        advantages: the weight of grad log pi[t], its own ratio included, [T].
    """

    targets: Float[Array, "*B T"]
    advantages: Float[Array, "*B T"]


def with_values(
    trajectories: Trajectory,
    values: Float[Array, "*B T"],
    next_values: Float[Array, "*B T"],
) -> ValuedRow:
    """What this room needs of a trajectory, with the values of its observations.

    Args:
        trajectories: one row, or a batch of them.
        values: V(obs[t]).
        next_values: V(next_obs[t]).

    Returns:
        The row or the batch, valued.
    """
    return ValuedRow(
        rewards=trajectories.reward,
        values=values,
        next_values=next_values,
        terminated=trajectories.terminated,
        truncated=trajectories.truncated,
        mask=trajectories.mask,
    )


def next_values_from(
    values: Float[Array, " T"], final_value: Float[Array, ""] | float
) -> Float[Array, " T"]:
    """V(next_obs[t]) for rows that did not keep `next_obs`: the next slot's value.

    Right where decision t + 1 goes on from decision t, and harmless after a terminated
    one, whose next value is not read. WRONG after a truncated decision inside the row
    and before an empty slot: the next slot then is another episode's, or nobody's.
    Rows with such decisions need the value of their own `next_obs`.

    Args:
        values: V(obs[t]).
        final_value: the value of the observation after the last decision, before any
            reset.

    Returns:
        V(obs[t + 1]), and `final_value` last.

    Raises:
        ValueError: if the arrays are not one row and one number.

    >>> next_values_from(jnp.array([1.0, 2.0]), 7.0).tolist()
    [2.0, 7.0]
    """
    check_rank("values", values, 1, ONE_ROW)
    final_value = jnp.asarray(final_value, values.dtype)
    check_rank("final_value", final_value, 0, "() = one number; for a batch use vmap")
    return _later(values, final_value)


def td_errors(row: ValuedRow, discount: float | Float[Array, ""]) -> Float[Array, " T"]:
    """delta[t] = r[t] + discount * V'[t] - V[t].

    Args:
        row: rewards and values.
        discount: the factor per decision, in [0, 1].

    Returns:
        How much better decision t went than expected; 0 in empty slots.

    Raises:
        ValueError: if the fields are not rows of one length, or for a discount outside
            its range.

    Bias: as credit unbiased where `next_values` are the policy's own (at discount 1;
        below it as `rewards_to_go`); otherwise biased by their error, while `values`
        are a baseline and may be anything.

    Reference: Sutton 1988.

    >>> no = jnp.array([False])
    >>> one, row = jnp.ones(1), jnp.array([3.0])
    >>> td_errors(ValuedRow(one, row, 2 * row, no, no, ~no), 0.5).tolist()
    [1.0]
    """
    errors = _one_step(row, discount) - row.values
    return jax.lax.stop_gradient(jnp.where(row.mask, errors, 0.0))


def generalized_advantages(
    row: ValuedRow,
    discount: float | Float[Array, ""],
    lambda_: float | Float[Array, ""],
) -> Float[Array, " T"]:
    """GAE, A[t] = sum_k (discount * lambda_)^k delta[t + k] within the episode.

    lambda_ = 0 gives the TD error, 1 the reward-to-go (with what is bootstrapped at a
    cut) minus V[t]; A + V is the lambda-return where V'[t] = V[t + 1].

    Args:
        row: rewards and values.
        discount: the factor per decision, in [0, 1].
        lambda_: how far rewards are trusted over values, in [0, 1].

    Returns:
        The advantage of decision t; 0 in empty slots.

    Raises:
        ValueError: if the fields are not rows of one length, or for a number outside
            its range.

    Bias: unbiased where the values are the policy's own, or with any values at lambda_
        1 in episodes that terminate (at discount 1; below it as `rewards_to_go`);
        otherwise biased by the error of the values bootstrapped from.

    Reference: Schulman et al. 2016, equation 16.

    >>> no, ones = jnp.array([False, False]), jnp.ones(2)
    >>> row = ValuedRow(ones, 0 * ones, 0 * ones, no, no, ~no)
    >>> generalized_advantages(row, 1.0, 0.5).tolist()
    [1.5, 1.0]
    """
    _check(row)
    decays = _decays(row, discount, lambda_)
    return suffix_recurrence(td_errors(row, discount), decays)


def lambda_returns(
    row: ValuedRow,
    discount: float | Float[Array, ""],
    lambda_: float | Float[Array, ""],
) -> Float[Array, " T"]:
    """G[t] = r[t] + discount * ((1 - lambda_) * V'[t] + lambda_ * G[t + 1]).

    The mixture of n-step returns with weights (1 - lambda_) * lambda_^(n - 1); all
    weight beyond the last decision goes to the longest. `values` are not read.

    Args:
        row: rewards and values.
        discount: the factor per decision, in [0, 1].
        lambda_: how far rewards are trusted over values, in [0, 1].

    Returns:
        What a critic should predict at obs[t]; 0 in empty slots.

    Raises:
        ValueError: if the fields are not rows of one length, or for a number outside
            its range.

    Bias: as `generalized_advantages`.

    Reference: Sutton and Barto 2018, section 12.1.

    >>> no, ones = jnp.array([False, False]), jnp.ones(2)
    >>> row = ValuedRow(ones, 0 * ones, 4 * ones, no, no, ~no)
    >>> lambda_returns(row, 1.0, 0.5).tolist()
    [5.5, 5.0]
    """
    _check(row)
    decays = _decays(row, discount, lambda_)
    discount = jnp.asarray(discount, row.rewards.dtype)
    increments = row.rewards + (discount - decays) * _following(row)
    returns = suffix_recurrence(jnp.where(row.mask, increments, 0.0), decays)
    return jax.lax.stop_gradient(returns)


def n_step_returns(
    row: ValuedRow, discount: float | Float[Array, ""], n: int
) -> Float[Array, " T"]:
    """r[t] + ... + discount^(n-1) r[t + n - 1] + discount^n V'[t + n - 1].

    An end, an empty slot or the end of the row that comes before n decisions cuts the
    sum there: it bootstraps from V', or from 0 where terminated. The work is n * T.
    `values` are not read.

    Args:
        row: rewards and values.
        discount: the factor per decision, in [0, 1].
        n: the most rewards that are counted, at least 1; T or more count all.

    Returns:
        What a critic should predict at obs[t]; 0 in empty slots.

    Raises:
        ValueError: if the fields are not rows of one length, n is not a positive whole
            number, or the discount is outside its range.

    Bias: as `generalized_advantages`, with n >= T in the place of lambda_ 1.

    Reference: Sutton and Barto 2018, section 7.1.

    >>> no, ones = jnp.array([False] * 3), jnp.ones(3)
    >>> row = ValuedRow(ones, 0 * ones, 4 * ones, no, no, ~no)
    >>> n_step_returns(row, 0.5, 2).tolist()
    [2.5, 2.5, 3.0]
    """
    check_positive("n", n)
    if n >= row.rewards.shape[-1]:
        return lambda_returns(row, discount, 1.0)
    one_step = jnp.where(row.mask, _one_step(row, discount), 0.0)
    continues = _continues(row)
    factor = jnp.asarray(discount, row.rewards.dtype)

    def one_reward_more(_: Array, returns: Array) -> Array:
        longer = row.rewards + factor * _later(returns, 0.0)
        return jnp.where(continues, longer, one_step)

    returns = jax.lax.fori_loop(0, n - 1, one_reward_more, one_step)
    return jax.lax.stop_gradient(returns)


def vtrace(
    row: ValuedRow,
    log_rhos: Float[Array, " T"],
    discount: float | Float[Array, ""],
    *,
    lambda_: float | Float[Array, ""] = 1.0,
    max_rho: float = 1.0,
    max_c: float = 1.0,
) -> VTrace:
    """V-trace: a critic's targets and an actor's advantages from another policy's rows.

        v[t] = V[t] + sum_{u >= t} discount^(u-t) c[t] ... c[u-1] rho[u] delta[u]
        advantages[t] = rho[t] * (r[t] + discount * v[t + 1] - V[t])

    with rho = min(max_rho, pi / mu), c = lambda_ * min(max_c, pi / mu), and V' for v
    after the last decision. On-policy, with neither clip below 1, v is the
    lambda-return (at lambda_ 1 the longest n-step return) where V'[t] = V[t + 1]; then
    `targets - values` is GAE. `advantages` trust v[t + 1] whole, as the paper does, and
    so are GAE at lambda_ 1 only.

    Args:
        row: rewards and values.
        log_rhos: log pi - log mu of each decision, from `importance.log_ratios`.
        discount: the factor per decision, in [0, 1].
        lambda_: how far rewards are trusted over values, in [0, 1].
        max_rho: the largest ratio of a TD error, above 0; it decides which policy's
            values the targets are: pi's at infinity, nearly mu's near 0.
        max_c: the largest ratio of the trace, above 0; products of ratios above 1 grow
            like max_c^T.

    Returns:
        Targets and advantages; 0 in empty slots.

    Raises:
        ValueError: if the fields are not rows of one length, or for a number outside
            its range.

    Bias: the targets, where no ratio exceeds `max_rho` or `max_c`, are unbiased for the
        values of pi at lambda_ 1 in episodes that terminate; otherwise biased. As an
        actor's weights biased even then: the states are mu's.

    Reference: Espeholt et al. 2018, equation 1 and section 4.2.

    >>> yes, one = jnp.array([True]), jnp.ones(1)
    >>> row = ValuedRow(one, 3 * one, one, yes, ~yes, yes)
    >>> vtrace(row, jnp.log(jnp.array([0.5])), 1.0)
    VTrace(targets=Array([2.], dtype=float32), advantages=Array([-1.], dtype=float32))
    """
    _check(row)
    check_same_shape(rewards=row.rewards, log_rhos=log_rhos)
    check_range("max_c", max_c, 0.0, open_low=True)
    log_rhos = jnp.where(row.mask, log_rhos, 0.0)
    rhos = to_weights(truncate_log_rhos(log_rhos, max_rho))
    decays = _decays(row, discount, lambda_)
    decays = decays * to_weights(truncate_log_rhos(log_rhos, max_c))
    corrections = suffix_recurrence(rhos * td_errors(row, discount), decays)
    targets = jnp.where(row.mask, row.values + corrections, 0.0)
    corrected = row._replace(
        next_values=jnp.where(_continues(row), _later(targets, 0.0), row.next_values)
    )
    advantages = rhos * td_errors(corrected, discount)
    return jax.lax.stop_gradient(VTrace(targets, advantages))


def standardize(
    advantages: Float[Array, "*B T"], mask: Bool[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """(advantages - mean) / std, over the real decisions of the whole batch.

    Where the advantages are equal but for rounding (a std below 32 units of rounding of
    the largest one) there is nothing to tell apart, and all become 0, not noise.

    Args:
        advantages: in any units, of the whole batch at once: not for `jax.vmap`.
        mask: whether a slot holds a decision.

    Returns:
        Mean 0 and standard deviation 1 over the real decisions; 0 in empty slots.

    Raises:
        ValueError: if the shapes differ.

    Bias: biased. The mean contains the decision's own advantage, and the division makes
        the step's length independent of the rewards' scale; popular for just that.

    Reference: Andrychowicz et al. 2021, "What matters for on-policy deep actor-critic
        methods?".

    >>> mask = jnp.array([[True, True, False]])
    >>> standardize(jnp.array([[1.0, 3.0, 9.0]]), mask).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    check_same_shape(advantages=advantages, mask=mask)
    known = jnp.where(mask, advantages, 0.0)
    # Seen from one of them, and in units of the largest difference: equal advantages
    # give exact zeros, and squares neither overflow nor vanish. Both ends are maxima,
    # so that several devices find them in one exchange.
    largest = jnp.max(known, initial=-jnp.inf, where=mask)
    smallest = -jnp.max(-known, initial=-jnp.inf, where=mask)
    differences = jnp.where(mask, known - largest, 0.0)
    spread = jnp.maximum(largest - smallest, 0.0)
    scaled = differences / jnp.where(spread > 0.0, spread, 1.0)
    count = jnp.maximum(jnp.sum(mask.astype(known.dtype)), 1.0)
    centred = jnp.where(mask, scaled - jnp.sum(scaled) / count, 0.0)
    std = jnp.sqrt(jnp.sum(centred**2) / count)
    rounding = 32.0 * jnp.finfo(known.dtype).eps * jnp.maximum(largest, -smallest)
    tells = (std > 0.0) & (std * spread > rounding)
    return jax.lax.stop_gradient(
        jnp.where(tells, centred / jnp.where(tells, std, 1.0), 0.0)
    )


def _following(row: ValuedRow) -> Array:
    """The value of what comes after each decision: V', and 0 after a terminated one."""
    return jnp.where(row.terminated, 0.0, row.next_values)


def _one_step(row: ValuedRow, discount: float | Array) -> Array:
    _check(row)
    check_range("discount", discount, 0.0, 1.0)
    return row.rewards + jnp.asarray(discount, row.rewards.dtype) * _following(row)


def _continues(row: ValuedRow) -> Array:
    """Whether the next slot holds the next decision of the same episode."""
    ends = row.terminated | row.truncated
    return row.mask & ~ends & _later(row.mask, False)


def _decays(row: ValuedRow, discount: float | Array, lambda_: float | Array) -> Array:
    check_range("discount", discount, 0.0, 1.0)
    check_range("lambda_", lambda_, 0.0, 1.0)
    discount, lambda_ = (
        jnp.asarray(number, row.rewards.dtype) for number in (discount, lambda_)
    )
    return jnp.where(_continues(row), discount * lambda_, 0.0)


def _later(row: Array, final: Array | float) -> Array:
    """x[t + 1], and `final` last."""
    return jnp.concatenate([row, jnp.asarray(final, row.dtype)[None]])[1:]


def _check(row: ValuedRow) -> None:
    check_rank("rewards", row.rewards, 1, ONE_ROW)
    check_same_shape(**row._asdict())
