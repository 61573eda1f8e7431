r"""Importance ratios: what decisions of a behaviour policy mu say about a policy pi.

    rho[t]  = pi(a[t] | s[t]) / mu(a[t] | s[t]),        log_rhos = log pi - log mu
    L[t]    = sum_{u <= t} log rho[u]     within one episode; L = L[last decision]

The exact weight of grad log pi[t] is exp(L[t]), for having come here, times the future
seen through its own ratios. The other forms drop some ratios, and with them variance:

    form              weight of grad log pi[t]                      its limit
    whole trajectory  exp(L) * credit[t]                            exact
    causal            sum_{u >= t} r[u] exp(L[u])                   exact
    future dropped    exp(L[t]) * G[t]                              states pi, Q mu
    past dropped      sum_{u >= t} r[u] prod_{t <= v <= u} rho[v]   states mu, Q pi
                      or, not causal, prod_{u >= t} rho[u] * G[t]   the same
    first order       rho[t] * G[t]                                 states mu, Q mu

Course slides often print the causal form as exp(L[t]) * sum_{u >= t} r[u] prod_{v=t..u}
rho[v]. That counts rho[t] twice and is biased; the inner product starts at t + 1.

Products are sums of log-ratios, exponentiated last and at most at `MAX_LOG_WEIGHT`, so
that log-ratios of any size give finite weights and never inf * 0. Everything is written
for one row, [T]; batch it with `jax.vmap`. Weights are numbers: no derivative flows
through them.

References: Precup, Sutton and Singh 2000, "Eligibility traces for off-policy policy
evaluation"; Degris, White and Sutton 2012, "Off-policy actor-critic".
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpg._checks import (
    check_no_nan,
    check_range,
    check_rank,
    check_same_shape,
    is_concrete,
)
from jaxpg.returns import ONE_ROW, at_episode_start, suffix_recurrence

__all__ = [
    "MAX_LOG_WEIGHT",
    "causal_weights",
    "cumulative_log_rhos",
    "effective_sample_size",
    "episode_log_rhos",
    "finite_log_rhos",
    "log_of_ratios",
    "log_ratios",
    "past_dropped_weights",
    "remaining_log_rhos",
    "to_weights",
    "truncate_log_rhos",
]

MAX_LOG_WEIGHT = 60.0
"""Weights stop growing at exp(60) = 1e26, so that their sums are finite in float32."""


def log_ratios(
    log_probs: Float[Array, " T"],
    behaviour_log_probs: Float[Array, " T"],
    mask: Bool[Array, " T"],
) -> Float[Array, " T"]:
    """log rho[t] = log pi - log mu, without derivative; 0 in empty slots.

    Args:
        log_probs: of the policy that is asked about, in nats.
        behaviour_log_probs: of the policy that acted, in nats.
        mask: whether slot t holds a decision.

    Returns:
        One log-ratio per decision.

    Raises:
        ValueError: if the shapes differ.

    >>> half, mask = jnp.log(jnp.array([0.5])), jnp.array([True])
    >>> log_ratios(jnp.zeros(1), half, mask).round(4).tolist()
    [0.6930999755859375]
    """
    check_same_shape(
        log_probs=log_probs, behaviour_log_probs=behaviour_log_probs, mask=mask
    )
    difference = jnp.where(mask, log_probs - behaviour_log_probs, 0.0)
    return jax.lax.stop_gradient(finite_log_rhos(difference))


def log_of_ratios(rhos: Float[Array, "..."]) -> Float[Array, "..."]:
    """log rho for ratios that are given as such; -1e4 for a ratio of 0.

    Args:
        rhos: ratios pi / mu, at least 0.

    Raises:
        ValueError: if a known ratio is negative or NaN.

    >>> log_of_ratios(jnp.array([1.0, 0.0])).tolist()
    [0.0, -10000.0]
    """
    check_no_nan("rhos", rhos)
    if is_concrete(rhos):
        with jax.ensure_compile_time_eval():
            least = float(jnp.min(rhos, initial=jnp.inf))
        if least < 0.0:
            raise ValueError(
                f"rhos holds {least:g}, needs ratios of at least 0; if these are "
                "log-ratios already, they need no log_of_ratios"
            )
    return finite_log_rhos(jnp.log(rhos))


def finite_log_rhos(log_rhos: Float[Array, "..."]) -> Float[Array, "..."]:
    """A ratio of exactly 0 or infinity as a finite log: 0 * inf is NaN, and spreads.

    >>> finite_log_rhos(jnp.array([-jnp.inf, 0.5])).tolist()
    [-10000.0, 0.5]
    """
    # Not by `clip`, whose derivative shares ties out by divisions.
    log_rhos = jnp.where(log_rhos > 1e4, 1e4, log_rhos)
    return jnp.where(log_rhos < -1e4, -1e4, log_rhos)


def truncate_log_rhos(
    log_rhos: Float[Array, "..."], max_rho: float
) -> Float[Array, "..."]:
    """log min(max_rho, rho).

    Args:
        log_rhos: log-ratios of decisions, or of products of them.
        max_rho: the largest ratio that stays, above 0.

    Returns:
        Log-ratios of at most log(max_rho).

    Raises:
        ValueError: if `max_rho` is not positive.

    Bias: biased, and not consistent at a fixed `max_rho`; none where it never binds.

    Reference: Ionides 2008, "Truncated importance sampling".

    >>> jnp.exp(truncate_log_rhos(jnp.log(jnp.array([0.5, 8.0])), 2.0)).tolist()
    [0.5, 2.0]
    """
    check_range("max_rho", max_rho, 0.0, open_low=True)
    return jnp.minimum(log_rhos, jnp.log(max_rho))


def to_weights(log_weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(log_weights), held at exp(MAX_LOG_WEIGHT), so never infinite.

    >>> to_weights(jnp.array([0.0, -1e4])).tolist()
    [1.0, 0.0]
    """
    return jnp.exp(jnp.minimum(log_weights, MAX_LOG_WEIGHT))


def cumulative_log_rhos(
    log_rhos: Float[Array, " T"], time: Int[Array, " T"]
) -> Float[Array, " T"]:
    """L[t] = sum_{u <= t} log rho[u], begun anew at every episode's start.

    `to_weights(cumulative_log_rhos(...))` times reward-to-go is the form that drops the
    future's ratios.

    Args:
        log_rhos: one log-ratio per decision.
        time: decisions taken since the episode began.

    Returns:
        The log of the product of this and all earlier ratios of the episode.

    Raises:
        ValueError: if the arrays are not two rows of one length.

    Bias: with reward-to-go biased; its limit has the states of pi and the Q of mu.

    >>> log_rhos, time = jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 1, 0])
    >>> cumulative_log_rhos(log_rhos, time).tolist()
    [1.0, 3.0, 4.0]
    """
    check_rank("log_rhos", log_rhos, 1, ONE_ROW)
    check_same_shape(log_rhos=log_rhos, time=time)
    continues = (time > 0).astype(log_rhos.dtype)
    return suffix_recurrence(finite_log_rhos(log_rhos)[::-1], continues[::-1])[::-1]


def episode_log_rhos(
    log_rhos: Float[Array, " T"], ends: Bool[Array, " T"], time: Int[Array, " T"]
) -> Float[Array, " T"]:
    """L = sum_u log rho[u] over the whole episode, repeated at each of its decisions.

    Args:
        log_rhos: one log-ratio per decision.
        ends: whether decision t was the last of its episode.
        time: decisions taken since the episode began.

    Returns:
        The log of the whole trajectory's ratio.

    Bias: unbiased with any unbiased credit; the variance grows exponentially in T.

    >>> log_rhos, time = jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 1, 0])
    >>> episode_log_rhos(log_rhos, jnp.array([False, True, True]), time).tolist()
    [3.0, 3.0, 4.0]
    """
    return at_episode_start(remaining_log_rhos(log_rhos, ends), time)


def remaining_log_rhos(
    log_rhos: Float[Array, " T"], ends: Bool[Array, " T"]
) -> Float[Array, " T"]:
    """sum_{u >= t} log rho[u]: this and all later ratios of the episode.

    `to_weights(remaining_log_rhos(...))` times reward-to-go drops the past's ratios
    without using causality; `past_dropped_weights` uses it.

    Args:
        log_rhos: one log-ratio per decision.
        ends: whether decision t was the last of its episode.

    Returns:
        The log of the product of this and all later ratios of the episode.

    Bias: with reward-to-go biased; its limit has the states of mu and the Q of pi.

    >>> ends = jnp.array([False, True, True])
    >>> remaining_log_rhos(jnp.array([1.0, 2.0, 4.0]), ends).tolist()
    [3.0, 2.0, 4.0]
    """
    check_same_shape(log_rhos=log_rhos, ends=ends)
    continues = (~ends).astype(log_rhos.dtype)
    return suffix_recurrence(finite_log_rhos(log_rhos), continues)


def causal_weights(
    rewards: Float[Array, " T"],
    discounts: Float[Array, " T"],
    log_rhos: Float[Array, " T"],
    time: Int[Array, " T"],
) -> Float[Array, " T"]:
    """Per decision: w[t] = sum_{u >= t} discount^(u-t) r[u] exp(L[u]).

    A reward is weighed by the ratios of the decisions that led to it, no later one.

    Args:
        rewards: in the environment's units; zero in empty slots.
        discounts: from `step_discounts`: 0 after ends.
        log_rhos: one log-ratio per decision.
        time: decisions taken since the episode began.

    Returns:
        The whole weight of grad log pi[t], credit included.

    Bias: unbiased. (With the inner product from u = t on, as often printed, rho[t] is
        counted twice and it is biased.)

    Reference: Precup, Sutton and Singh 2000, section 3.

    >>> rewards, discounts = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0])
    >>> rhos, time = jnp.array([2.0, 3.0]), jnp.array([0, 1])
    >>> causal_weights(rewards, discounts, jnp.log(rhos), time).round(4).tolist()
    [8.0, 6.0]
    """
    reached = to_weights(cumulative_log_rhos(log_rhos, time))
    return suffix_recurrence(rewards * reached, discounts)


def past_dropped_weights(
    rewards: Float[Array, " T"],
    discounts: Float[Array, " T"],
    log_rhos: Float[Array, " T"],
) -> Float[Array, " T"]:
    """w[t] = sum_{u >= t} discount^(u-t) r[u] prod_{t <= v <= u} rho[v].

    Solved backwards, w[t] = rho[t] * (r[t] + discounts[t] * w[t + 1]).

    Args:
        rewards: in the environment's units; zero in empty slots.
        discounts: from `step_discounts`: 0 after ends.
        log_rhos: one log-ratio per decision.

    Returns:
        The whole weight of grad log pi[t], credit included.

    Raises:
        ValueError: if the arrays are not rows of one length.

    Bias: biased; its limit has the states of mu and the Q of pi.

    Reference: Degris, White and Sutton 2012, equation 5.

    >>> rewards, discounts = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0])
    >>> log_rhos = jnp.log(jnp.array([2.0, 3.0]))
    >>> past_dropped_weights(rewards, discounts, log_rhos).round(4).tolist()
    [8.0, 3.0]
    """
    check_rank("rewards", rewards, 1, ONE_ROW)
    check_same_shape(rewards=rewards, discounts=discounts, log_rhos=log_rhos)
    bound = jnp.exp(jnp.asarray(MAX_LOG_WEIGHT / 2, rewards.dtype))
    # Held below the square root of the largest weight, twice: no product overflows.
    rhos = jnp.minimum(jnp.exp(jnp.minimum(log_rhos, MAX_LOG_WEIGHT / 2)), bound)

    def step(later: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, discount, rho = inputs
        weight = jnp.clip(rho * (reward + discount * later), -bound, bound)
        return weight, weight

    zero = jnp.zeros((), rewards.dtype)
    return jax.lax.scan(step, zero, (rewards, discounts, rhos), reverse=True)[1]


def effective_sample_size(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """(sum w)^2 / sum w^2: how many equally weighted samples the N are worth.

    Args:
        log_weights: log-weights, in nats; only their differences matter.

    Returns:
        A number in [1, N].

    Raises:
        ValueError: if the weights are not one row.

    Reference: Kong 1992; Owen 2013, "Monte Carlo theory", section 9.3.

    >>> effective_sample_size(jnp.zeros(5)).item()
    5.0
    """
    check_rank("log_weights", log_weights, 1, "(N,) = one log-weight per sample")
    finite = jnp.clip(log_weights, -1e9, 1e9)
    weights = jnp.exp(finite - jnp.max(finite))
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)
