r"""The score-function gradient: the one engine behind every estimator.

    g = 1/N  sum_i sum_t  weights[i, t] * grad log pi(action[i, t] | history[i, t])

The weights are numbers: returns, baselines and importance ratios only ever make them,
and no derivative flows through them. The engine sees `log_prob_fn(params, row) -> [T]`
and never a policy or an environment, so anything that is sampled can use it.

A gradient is the MEAN over N trajectories of the SUM over time. Where rows of storage
are not trajectories (packed episodes), the caller says how many trajectories there are.

Batches larger than the cache or the memory are a matter of `jaxpg.chunks`; chunks whose
weights are all zero are skipped.

Reference: Williams 1992; the surrogate's first derivative is the estimate, and only its
first (Schulman et al. 2015, "Gradient estimation using stochastic computation graphs").
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._batching import over_rows, vmap_rows
from jaxpg._checks import check_rank
from jaxpg.chunks import (
    ALL_AT_ONCE,
    Chunks,
    SumOverRows,
    sum_over_chunks,
)
from jaxpg.types import Params, PyTree

__all__ = [
    "LogProbFn",
    "check_rows",
    "score_gradient",
    "score_gradients",
    "trajectory_gradients",
    "weigh",
]

LogProbFn = Callable[[Params, PyTree], Array]
"""`log_prob_fn(params, row) -> [T]`: log-probability of each decision of one row."""


def score_gradient(
    log_prob_fn: LogProbFn,
    params: Params,
    rows: PyTree,
    weights: Float[Array, "B T"],
    *,
    num_trajectories: int | Array | None = None,
    chunks: Chunks = ALL_AT_ONCE,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Params:
    """The gradient of J: 1/N sum_i sum_t weights[i, t] * grad log pi[i, t].

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats.
        params: where to take the gradient.
        rows: what `log_prob_fn` reads, with B in front of every leaf.
        weights: one number per decision, held constant; 0 where there is none.
        num_trajectories: N; the number of rows unless rows pack several episodes.
        chunks: how many decisions are worked on together.
        sum_over_rows: how sums over rows are taken; `jaxpg.train.sharding` has one
            for several devices.

    Returns:
        An ascent direction, a tree like `params`.

    Raises:
        ValueError: if weights are not [B, T] with the rows' own B.

    Bias: none of its own; exactly that of the weights.

    Reference: Williams 1992, equation 5.

    >>> log_prob_fn = lambda mean, x: -0.5 * (x - mean) ** 2
    >>> x, weights = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 10.0]])
    >>> score_gradient(log_prob_fn, jnp.array(0.0), x, weights).item()
    21.0
    """
    check_rows(rows, weights)
    weights = jax.lax.stop_gradient(weights)

    def surrogate(params: Params, chunk: tuple[PyTree, Array]) -> Array:
        chunk_rows, chunk_weights = chunk
        log_probs = over_rows(log_prob_fn, params, chunk_rows)
        return jnp.sum(weigh(chunk_weights, log_probs))

    total = sum_over_rows(
        jax.grad(surrogate), params, (rows, weights), weights != 0.0, chunks
    )
    count = weights.shape[0] if num_trajectories is None else num_trajectories
    return jax.tree.map(lambda x: x / jnp.asarray(count, x.dtype), total)


def score_gradients(
    log_prob_fn: LogProbFn,
    params: Params,
    rows: PyTree,
    weights: Float[Array, "K B T"],
    *,
    num_trajectories: int | Array | None = None,
    chunks: Chunks = ALL_AT_ONCE,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Params:
    """K gradients of the same rows under K weightings: one forward pass for all.

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats.
        params: where to take the gradients.
        rows: what `log_prob_fn` reads, with B in front of every leaf.
        weights: K numbers per decision, held constant.
        num_trajectories: N; the number of rows unless rows pack several episodes.
        chunks: how many decisions are worked on together.
        sum_over_rows: how sums over rows are taken.

    Returns:
        A tree like `params` with K in front: `score_gradient` of each weighting.

    Raises:
        ValueError: if weights are not [K, B, T] with the rows' own B.

    Bias: none of its own; exactly that of the weights.

    >>> log_prob_fn = lambda mean, x: -0.5 * (x - mean) ** 2
    >>> x, weights = jnp.array([[1.0, 2.0]]), jnp.array([[[1.0, 10.0]], [[1.0, 1.0]]])
    >>> score_gradients(log_prob_fn, jnp.array(0.0), x, weights).tolist()
    [21.0, 3.0]
    """
    check_rank("weights", weights, 3, "(K, B, T) = K weightings of a batch")
    check_rows(rows, weights[0])
    # Rows in front, and time behind them, so that chunks may cut both.
    by_row = jnp.transpose(jax.lax.stop_gradient(weights), (1, 2, 0))

    def pulled_back(params: Params, chunk: tuple[PyTree, Array]) -> Params:
        chunk_rows, chunk_weights = chunk

        def log_probs(params: Params) -> Array:
            log_prob = over_rows(log_prob_fn, params, chunk_rows)
            _check_one_per_decision(chunk_weights[..., 0], log_prob)
            return jnp.where(_is_weighed(chunk_weights), log_prob, 0.0)

        log_prob, pull_back = jax.vjp(log_probs, params)
        cotangents = jnp.moveaxis(chunk_weights, -1, 0).astype(log_prob.dtype)
        return jax.vmap(pull_back)(cotangents)[0]

    active = _is_weighed(by_row)
    total = sum_over_rows(pulled_back, params, (rows, by_row), active, chunks)
    count = weights.shape[1] if num_trajectories is None else num_trajectories
    return jax.tree.map(lambda x: x / jnp.asarray(count, x.dtype), total)


def trajectory_gradients(
    log_prob_fn: LogProbFn,
    params: Params,
    rows: PyTree,
    weights: Float[Array, "B T"],
) -> Params:
    """Each row's own gradient, sum_t weights[i, t] * grad log pi[i, t], not averaged.

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats.
        params: where to take the gradients.
        rows: what `log_prob_fn` reads, with B in front; here rows ARE trajectories.
        weights: one number per decision, held constant.

    Returns:
        A tree like `params` with B in front; its mean over B is `score_gradient`.

    Bias: none of its own; exactly that of the weights.

    >>> log_prob_fn = lambda mean, x: -0.5 * (x - mean) ** 2
    >>> x, weights = jnp.array([[1.0], [2.0]]), jnp.ones((2, 1))
    >>> trajectory_gradients(log_prob_fn, jnp.array(0.0), x, weights).tolist()
    [1.0, 2.0]
    """
    check_rows(rows, weights)

    def surrogate(params: Params, row: PyTree, row_weights: Array) -> Array:
        return jnp.sum(weigh(row_weights, log_prob_fn(params, row)))

    weights = jax.lax.stop_gradient(weights)
    return vmap_rows(jax.grad(surrogate), (None, 0, 0))(params, rows, weights)


def weigh(
    weights: Float[Array, "*B"], log_probs: Float[Array, "..."]
) -> Float[Array, "*B"]:
    """weights * log_probs, where a weight of 0 hides even an infinite log_prob.

    What is hidden is its value: where its own derivative is infinite too, as that of
    log(0 * x) is, 0 times it is NaN, and `log_prob_fn` must avoid it.

    Raises:
        ValueError: if there is not one log-probability per weight.
    """
    _check_one_per_decision(weights, log_probs)
    return weights * jnp.where(weights != 0.0, log_probs, 0.0)


def _is_weighed(weights: Array) -> Array:
    """Whether any of the weightings, which stand last, counts a decision."""
    return jnp.any(weights != 0.0, axis=-1)


def _check_one_per_decision(weights: Array, log_probs: Array) -> None:
    if weights.shape != log_probs.shape:
        raise ValueError(
            f"weights have shape {weights.shape}, but log_prob_fn gives "
            f"{log_probs.shape}; it must give one log-probability per decision, [T]"
        )


def check_rows(rows: PyTree, weights: Array) -> None:
    """Refuse weights that are no [B, T], or rows with another B.

    Raises:
        ValueError: naming the leaf that does not fit.
    """
    if weights.ndim != 2:
        raise ValueError(
            f"weights have shape {weights.shape}, needs (B, T) = one number per "
            "decision; for one row use weights[None]"
        )
    for leaf in jax.tree.leaves(rows):
        if leaf.shape[:1] != weights.shape[:1]:
            raise ValueError(
                f"rows have a leaf of shape {leaf.shape}, but weights have B = "
                f"{weights.shape[0]}; every leaf needs the same B in front"
            )
