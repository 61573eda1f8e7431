r"""GPOMDP: the gradient of the average reward from one endless stream of decisions.

    z[t]    = beta * z[t - 1] + grad log pi[t],     z = 0 before an episode's start
    mean[t] = mean[t - 1] + (r[t] * z[t] - mean[t - 1]) / (t + 1)

The trace z remembers, ever more faintly, which decisions a reward may be owed to. It
turns the sums over later rewards of `returns.rewards_to_go` round in time: summed over
a whole episode at beta = 1,

    sum_t r[t] z[t] = sum_t grad log pi[t] sum_{u >= t} r[u]

exactly, so that is REINFORCE with reward-to-go. Nothing waits for a future reward,
though, and so no episode needs to end and nothing is stored: memory is two trees like
the parameters, whatever the number of decisions. (Hence no `suffix_recurrence` here: it
works on stored rows, and rows of scores are what must never be stored.)

The estimate is a mean per DECISION, the gradient of the reward per decision; that of
`gradients.score_gradient` is a mean per TRAJECTORY, of the reward per episode.

Reference: Baxter and Bartlett 2001, "Infinite-horizon policy-gradient estimation".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_range, check_rank, check_same_shape
from jaxpg.gradients import LogProbFn
from jaxpg.returns import ONE_ROW
from jaxpg.types import Params, Trajectory

__all__ = [
    "GPOMDPState",
    "RunningMean",
    "gpomdp_init",
    "gpomdp_update",
    "merge_means",
]


class RunningMean(NamedTuple):
    """A mean over the decisions seen so far.

    Attributes:
        mean: a tree like the parameters; 0 before the first decision.
        num_decisions: how many it is over, below 2^31.
    """

    mean: Params
    num_decisions: Int[Array, "*B"]


class GPOMDPState(NamedTuple):
    """What one stream hands on from decision to decision.

    Attributes:
        trace: z, a tree like the parameters.
        estimate: the running mean of r * z, the gradient per decision.
    """

    trace: Params
    estimate: RunningMean


def gpomdp_init(params: Params) -> GPOMDPState:
    """The state before the first decision.

    For B slots, `jax.vmap(gpomdp_init, None, axis_size=B)(params)`. To begin a new mean
    after a step of the parameters and keep the trace (Baxter and Bartlett's online
    form), `gpomdp_init(params)._replace(trace=state.trace)`.

    Args:
        params: the policy's parameters.

    Returns:
        A zero trace and an empty mean.

    >>> gpomdp_init(jnp.ones(2)).trace.tolist()
    [0.0, 0.0]
    """
    zeros = optax.tree.zeros_like(params)
    return GPOMDPState(zeros, RunningMean(zeros, jnp.zeros((), jnp.int32)))


def gpomdp_update(
    log_prob_fn: LogProbFn,
    params: Params,
    state: GPOMDPState,
    row: Trajectory,
    beta: float | Float[Array, ""],
) -> GPOMDPState:
    """Take the decisions of a row into account, one after another.

    A row may be a single decision or any stretch of the stream: the state after it is
    the same however the stream is cut. For B slots, vmap over `state` and `row` and put
    the slots together with `merge_means`.

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats. It is
            asked about rows of one decision, so the policy must be memoryless.
        params: where to take the gradient; they acted in `row`.
        state: from `gpomdp_init` or the previous row.
        row: one row, [T]; the trace is reset where `row.starts`, and slots that hold no
            decision change nothing.
        beta: how much of the trace the next decision keeps, in [0, 1]; 1 only where
            episodes end.

    Returns:
        The state after the row; `estimate.mean` is an ascent direction.

    Raises:
        ValueError: if `row` is not one row, the policy has a memory, or beta is outside
            its range.

    Bias: biased for the gradient of the average reward at beta < 1, by what a decision
        changes later than about 1 / (1 - beta) decisions on; its limit is grad_beta eta
        = d^T (grad P) J_beta, with d the stationary distribution of (state, action) and
        J_beta the values at discount beta. The variance grows like 1 / (1 - beta). At
        beta 1, over whole episodes, `mean * num_decisions / num_episodes` is unbiased
        for the gradient of the undiscounted return; `mean` alone is a ratio, biased
        where the episodes' lengths are random.

    Reference: Baxter and Bartlett 2001, algorithm 1.

    >>> log_prob_fn = lambda mean, row: -0.5 * (row.action - mean) ** 2
    >>> no, x = jnp.array([False, False]), jnp.array([1.0, 2.0])
    >>> row = Trajectory(x, x, x, x, no, no, ~no, jnp.arange(2), jnp.zeros(2, int))
    >>> mean = jnp.array(0.0)
    >>> gpomdp_update(log_prob_fn, mean, gpomdp_init(mean), row, 0.5).estimate.mean
    Array(3., dtype=float32)
    """
    _check(row)
    check_range("beta", beta, 0.0, 1.0)

    def score(decision: Trajectory) -> Params:
        return jax.grad(lambda params: jnp.sum(log_prob_fn(params, decision)))(params)

    def visit(state: GPOMDPState, decision: Trajectory) -> tuple[GPOMDPState, None]:
        decision = jax.tree.map(lambda x: x[None], decision)
        keep = jnp.where(decision.starts[0], 0.0, beta)
        after = _advance(state, score(decision), decision.reward[0], keep)
        real = decision.mask[0]
        return jax.tree.map(
            lambda new, old: jnp.where(real, new, old), after, state
        ), None

    return jax.lax.scan(visit, state, row)[0]


def merge_means(estimates: RunningMean) -> RunningMean:
    """One mean over the decisions of several streams, sum_b n_b mean_b / sum_b n_b.

    Args:
        estimates: a batch of them, B in front of every leaf; of slots, or of earlier
            merges stacked.

    Returns:
        The mean that all their decisions together have; 0 if there are none.

    Bias: none of its own.

    Reference: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
        variance"; the part about means.

    >>> estimates = RunningMean(jnp.array([1.0, 4.0]), jnp.array([2, 1]))
    >>> merged = merge_means(estimates)
    >>> merged.mean.item(), merged.num_decisions.item()
    (2.0, 3)
    """
    count = estimates.num_decisions
    check_rank(
        "num_decisions", count, 1, "(B,) = one per stream; stack them to merge them"
    )
    # The shares, not the sums: n * mean would grow with the stream and lose digits.
    shares = count.astype(float) / jnp.maximum(jnp.sum(count.astype(float)), 1.0)

    def merge(means: Array) -> Array:
        highest = jax.lax.Precision.HIGHEST
        return jnp.tensordot(shares.astype(means.dtype), means, 1, precision=highest)

    mean = jax.tree.map(merge, estimates.mean)
    return RunningMean(mean, jnp.sum(count, dtype=count.dtype))


def _advance(
    state: GPOMDPState, score: Params, reward: Array, keep: Array
) -> GPOMDPState:
    """Trace and mean after one real decision."""
    count = state.estimate.num_decisions + 1

    def trace(z: Array, s: Array) -> Array:
        return keep.astype(z.dtype) * z + s

    def mean(m: Array, z: Array) -> Array:
        return m + (reward.astype(m.dtype) * z - m) / count.astype(m.dtype)

    traces = jax.tree.map(trace, state.trace, score)
    means = jax.tree.map(mean, state.estimate.mean, traces)
    return GPOMDPState(traces, RunningMean(means, count))


def _check(row: Trajectory) -> None:
    check_rank("row.reward", row.reward, 1, ONE_ROW)
    check_same_shape(**{"row.reward": row.reward, "row.mask": row.mask})
    if row.carry is not None:
        raise ValueError(
            "row.carry is a memory, needs None, for decisions are scored one at a "
            "time, which forgets it; for a recurrent policy use rewards_to_go and "
            "score_gradient"
        )
