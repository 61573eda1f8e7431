r"""Self-normalised importance weights: divided by their own mean over the batch.

    w~[i, t] = w[i, t] / mean_j w[j, t]

The mean of a weight is 1 in expectation, so dividing by the batch's own mean changes
nothing in the limit and takes out the variance that all weights share. What "the mean"
ranges over depends on the product. A product of *past* ratios has mean 1 over ALL
trajectories, where one that has ended keeps its last product; over those still alive it
has not, for the two policies survive differently. A product that begins at t has mean 1
over those alive at t.

    product                          mean over
    whole trajectory, past ratios    all trajectories ("all")
    own ratio, future ratios         those alive at t ("alive")

The regularised objective of Levine and Koltun adds the log of the normaliser itself, so
that a policy cannot win by making all of its own samples unlikely:

    Phi = sum_t  mean_i w~[i, t] r[i, t]  +  coefficient * log(mean_i w[i, t])

References: Precup, Sutton and Singh 2000 (weighted importance sampling); Levine and
Koltun 2013, "Guided policy search".
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpg._checks import check_choice, check_rank, check_same_shape
from jaxpg.importance import finite_log_rhos

__all__ = [
    "log_normalizers",
    "regularized_objective",
    "regularized_weights",
    "self_normalize",
]

A_BATCH = "(B, T) = a batch of rows; for one row use [None]"


def self_normalize(
    log_weights: Float[Array, "B T"],
    time: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    ends: Bool[Array, "B T"],
    *,
    over: Literal["all", "alive"],
) -> Float[Array, "B T"]:
    """log w~ = log w - log(mean of w at the same time), per time step.

    Args:
        log_weights: logs of products of ratios, one per decision.
        time: decisions taken since the episode began.
        mask: whether slot t holds a decision.
        ends: whether decision t was the last of its episode.
        over: "all" for products of past ratios and for the whole trajectory's,
            "alive" for products that begin at t.

    Returns:
        Log-weights whose exponentials have mean 1 at every time step; 0 in empty slots.

    Raises:
        ValueError: if shapes differ or `over` is unknown.

    Bias: biased O(1/N); consistent for the limit of the form that it normalises.

    Reference: Precup, Sutton and Singh 2000, section 3.

    >>> log_weights, yes = jnp.log(jnp.array([[1.0], [3.0]])), jnp.ones((2, 1), bool)
    >>> time = jnp.zeros((2, 1), int)
    >>> jnp.exp(self_normalize(log_weights, time, yes, yes, over="alive")).tolist()
    [[0.5], [1.5]]
    """
    check_rank("log_weights", log_weights, 2, A_BATCH)
    check_same_shape(log_weights=log_weights, time=time, mask=mask, ends=ends)
    normalizers = log_normalizers(log_weights, time, mask, ends, over=over)
    return jnp.where(mask, finite_log_rhos(log_weights) - normalizers[time], 0.0)


def log_normalizers(
    log_weights: Float[Array, "B T"],
    time: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    ends: Bool[Array, "B T"],
    *,
    over: Literal["all", "alive"],
) -> Float[Array, " T"]:
    """log of the mean weight at each time step; 0 where nobody is left.

    Args:
        log_weights: logs of products of ratios, one per decision.
        time: decisions taken since the episode began.
        mask: whether slot t holds a decision.
        ends: whether decision t was the last of its episode.
        over: whether ended trajectories count with their last weight ("all") or not.

    Returns:
        One log-mean per time step, safe for log-weights of any size.

    Raises:
        ValueError: if `over` is unknown.

    Bias: the mean weight itself is unbiased for 1; its log is not for 0.

    >>> log_weights, yes = jnp.log(jnp.array([[1.0], [3.0]])), jnp.ones((2, 1), bool)
    >>> time = jnp.zeros((2, 1), int)
    >>> jnp.exp(log_normalizers(log_weights, time, yes, yes, over="all")).tolist()
    [2.0]
    """
    check_choice("over", over, ("all", "alive"))
    log_weights = finite_log_rhos(log_weights)
    log_sum = _log_sum_by_time(log_weights, time, mask)
    alive = mask.astype(log_weights.dtype)
    count = jnp.zeros_like(log_sum).at[time].add(alive)
    if over == "all":
        ended = _log_sum_by_time(log_weights, time, ends & mask)
        before = jnp.full((1,), -jnp.inf, ended.dtype)
        ended = jax.lax.cumlogsumexp(jnp.concatenate([before, ended[:-1]]))
        log_sum = jnp.logaddexp(log_sum, ended)
        count = jnp.full_like(count, count[0])
    return jnp.where(count > 0.0, log_sum - jnp.log(jnp.maximum(count, 1.0)), 0.0)


def regularized_objective(
    log_rhos: Float[Array, "N T"],
    rewards: Float[Array, "N T"],
    coefficient: float | Float[Array, ""] = 0.0,
) -> Float[Array, ""]:
    """Phi = sum_t sum_i w~[i, t] r[i, t] / N + coefficient * log(mean_i w[i, t]).

    With w[i, t] the product of trajectory i's ratios up to t. Differentiable in
    `log_rhos`: here the ratios do carry derivatives, for Phi is itself what is climbed.

    Args:
        log_rhos: one trajectory per row; 0 in empty slots.
        rewards: in the environment's units, 0 in empty slots.
        coefficient: weight of the log-normaliser, in units of reward; 0 gives the
            self-normalised estimate of the return alone.

    Returns:
        An estimate of the return of the policy that is asked about, regularised.

    Raises:
        ValueError: if the arrays are not two [N, T] of one shape.

    Bias: biased O(1/N) for the return at coefficient 0; consistent.

    Reference: Levine and Koltun 2013, "Guided policy search".

    >>> rewards = jnp.array([[4.0], [8.0]])
    >>> regularized_objective(jnp.zeros((2, 1)), rewards).item()
    6.0
    """
    check_rank("log_rhos", log_rhos, 2, A_BATCH)
    check_same_shape(log_rhos=log_rhos, rewards=rewards)
    return _objective(finite_log_rhos(log_rhos), rewards, coefficient)


def regularized_weights(
    log_rhos: Float[Array, "N T"],
    rewards: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    coefficient: float | Float[Array, ""] = 0.0,
) -> Float[Array, "N T"]:
    """The weights with which `score_gradient` is the gradient of Phi.

        weights[i, t] = N * dPhi / dlog_rhos[i, t]

    Args:
        log_rhos: one trajectory per row; 0 in empty slots.
        rewards: in the environment's units, 0 in empty slots.
        mask: whether slot t holds a decision; others get no weight, though the product
            of an ended trajectory's ratios counts on to the end of the row.
        coefficient: weight of the log-normaliser, in units of reward.

    Returns:
        One weight per decision; every reward has its time step's mean taken off, so the
        form carries its own baseline.

    Raises:
        ValueError: if the arrays are not two [N, T] of one shape.

    Bias: biased O(1/N) for the gradient of the return at coefficient 0; consistent.

    Reference: Levine and Koltun 2013, "Guided policy search".

    >>> rewards, mask = jnp.array([[4.0], [8.0]]), jnp.ones((2, 1), bool)
    >>> regularized_weights(jnp.zeros((2, 1)), rewards, mask).tolist()
    [[-2.0], [2.0]]
    """
    check_rank("log_rhos", log_rhos, 2, A_BATCH)
    check_same_shape(log_rhos=log_rhos, rewards=rewards, mask=mask)
    # At the held ratios: holding them must not take their slope away.
    slope = jax.grad(_objective)(finite_log_rhos(log_rhos), rewards, coefficient)
    return jax.lax.stop_gradient(jnp.where(mask, slope * log_rhos.shape[0], 0.0))


def _objective(log_rhos: Array, rewards: Array, coefficient: float | Array) -> Array:
    reached = jnp.cumsum(log_rhos, axis=1)
    shares = jax.nn.softmax(reached, axis=0)
    log_means = jax.nn.logsumexp(reached, axis=0) - jnp.log(float(reached.shape[0]))
    return jnp.sum(shares * rewards) + coefficient * jnp.sum(log_means)


def _log_sum_by_time(log_weights: Array, time: Array, flags: Array) -> Array:
    """log sum_i exp(log_weights[i, t]) of the flagged, about each step's largest."""
    shape = time.shape[1:]
    counted = jnp.where(flags, log_weights, -jnp.inf)
    largest = jnp.full(shape, -jnp.inf, log_weights.dtype).at[time].max(counted)
    anchor = jnp.where(jnp.isfinite(largest), largest, 0.0)
    parts = jnp.where(flags, jnp.exp(log_weights - anchor[time]), 0.0)
    return anchor + jnp.log(jnp.zeros(shape, log_weights.dtype).at[time].add(parts))
