r"""The score-function gradient: the one engine behind every estimator.

    g = 1/N  sum_i sum_t  weights[i, t] * grad log pi(action[i, t] | history[i, t])

The weights are numbers: returns, baselines and importance ratios only ever make them,
and no derivative flows through them. The engine sees `log_prob_fn(params, row) -> [T]`
and never a policy or an environment, so anything that is sampled can use it.

A gradient is the MEAN over N trajectories of the SUM over time. Where rows of storage
are not trajectories (packed episodes), the caller says how many trajectories there are.

Batches larger than the cache or the memory are a matter of `Chunks` alone: rows are
visited chunk by chunk and summed, and the answer does not depend on the size but for
rounding. Chunks whose weights are all zero are skipped.

Reference: Williams 1992; the surrogate's first derivative is the estimate, and only its
first (Schulman et al. 2015, "Gradient estimation using stochastic computation graphs").
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxpg._batching import anywhere
from jaxpg._checks import check_positive
from jaxpg.types import Params, PyTree

__all__ = [
    "Chunks",
    "LogProbFn",
    "SumOverRows",
    "score_gradient",
    "split_rows",
    "sum_over_chunks",
    "trajectory_gradients",
]

LogProbFn = Callable[[Params, PyTree], Array]
"""`log_prob_fn(params, row) -> [T]`: log-probability of each decision of one row."""

PIECE = 16
"""Decisions per piece of a row that is cut: short enough to skip empty tails."""


class Chunks(NamedTuple):
    """How a sum over rows is cut up; it changes memory and speed, not the sum.

    Attributes:
        size: decisions that are worked on together; None takes all at once.
        cut_rows: whether a row may be cut in time, as it may where no decision's
            log-probability depends on the row's earlier ones (a memoryless policy).
    """

    size: int | None = None
    cut_rows: bool = False


ALL_AT_ONCE = Chunks()


@runtime_checkable
class SumOverRows(Protocol):
    """How `fn` is summed over rows: in chunks on one device, or over many devices."""

    def __call__(
        self,
        fn: Callable[[Any, PyTree], Any],
        shared: Any,
        rows: PyTree,
        active: Bool[Array, "B T"],
        chunks: Chunks,
    ) -> Any:
        """See `sum_over_chunks`."""


def sum_over_chunks(
    fn: Callable[[Any, PyTree], Any],
    shared: Any,
    rows: PyTree,
    active: Bool[Array, "B T"],
    chunks: Chunks = ALL_AT_ONCE,
) -> Any:
    """Sum `fn(shared, chunk)` over chunks of rows, skipping chunks with nothing active.

    Args:
        fn: maps what is shared and a chunk of rows to a tree of sums over the chunk.
        shared: what every chunk needs, for example parameters.
        rows: a tree whose leaves have B in front, and T behind it if rows may be cut.
        active: whether a decision can contribute anything.
        chunks: how to cut.

    Returns:
        The sum over all rows; independent of `chunks` but for rounding.

    Raises:
        ValueError: if the chunk size is not a positive whole number.

    >>> rows, active = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2), bool)
    >>> total = lambda scale, x: scale * jnp.sum(x)
    >>> sum_over_chunks(total, 2.0, rows, active, Chunks(size=2)).item()
    30.0
    """
    if chunks.size is None:
        return fn(shared, rows)
    check_positive("chunk size", chunks.size)
    if chunks.cut_rows:
        piece = _largest_divisor(active.shape[1], min(PIECE, chunks.size))
        rows, active = split_rows((rows, active), piece)
    num_rows, length = active.shape
    per_chunk = min(max(1, chunks.size // length), num_rows)
    num_chunks, rest = divmod(num_rows, per_chunk)
    whole = num_chunks * per_chunk

    def stack(x: Array) -> Array:
        return x[:whole].reshape((num_chunks, per_chunk, *x.shape[1:]))

    def visit(total: Any, inputs: tuple[PyTree, Array]) -> tuple[Any, None]:
        chunk, chunk_active = inputs
        add = lambda: jax.tree.map(jnp.add, total, fn(shared, chunk))  # noqa: E731
        return jax.lax.cond(anywhere(chunk_active), add, lambda: total), None

    first = jax.tree.map(lambda x: x[:per_chunk], rows)
    total = optax.tree.zeros_like(jax.eval_shape(fn, shared, first))
    total, _ = jax.lax.scan(visit, total, jax.tree.map(stack, (rows, active)))
    if rest:
        last = jax.tree.map(lambda x: x[whole:], (rows, active))
        total, _ = visit(total, last)
    return total


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
    _check_rows(rows, weights)
    weights = jax.lax.stop_gradient(weights)

    def surrogate(params: Params, chunk: tuple[PyTree, Array]) -> Array:
        chunk_rows, chunk_weights = chunk
        log_probs = jax.vmap(log_prob_fn, (None, 0))(params, chunk_rows)
        return jnp.sum(_weigh(chunk_weights, log_probs))

    total = sum_over_rows(
        jax.grad(surrogate), params, (rows, weights), weights != 0.0, chunks
    )
    count = weights.shape[0] if num_trajectories is None else num_trajectories
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
    _check_rows(rows, weights)

    def surrogate(params: Params, row: PyTree, row_weights: Array) -> Array:
        return jnp.sum(_weigh(row_weights, log_prob_fn(params, row)))

    weights = jax.lax.stop_gradient(weights)
    return jax.vmap(jax.grad(surrogate), (None, 0, 0))(params, rows, weights)


def split_rows(rows: PyTree, num_steps: int) -> PyTree:
    """Cut rows [B, T, ...] into shorter ones [B * T / num_steps, num_steps, ...].

    Only for decisions whose log-probability does not depend on the row's earlier ones:
    a memoryless policy. Pieces come in order of time, then of row, so that empty tails
    of packed rows end up together and whole chunks of them can be skipped.

    Args:
        rows: leaves [B, T, ...].
        num_steps: decisions per piece; a divisor of T.

    Returns:
        The same decisions in shorter rows.

    >>> split_rows(jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]]), 2).tolist()
    [[1, 2], [5, 6], [3, 4], [7, 8]]
    """

    def split(x: Array) -> Array:
        num_rows, length, *rest = x.shape
        pieces = x.reshape((num_rows, length // num_steps, num_steps, *rest))
        return jnp.swapaxes(pieces, 0, 1).reshape((-1, num_steps, *rest))

    return jax.tree.map(split, rows)


def _largest_divisor(whole: int, at_most: int) -> int:
    return max(n for n in range(1, min(at_most, whole) + 1) if whole % n == 0)


def _weigh(weights: Array, log_probs: Array) -> Array:
    """weights * log_probs, where a weight of 0 hides even an infinite log_prob."""
    if weights.shape != log_probs.shape:
        raise ValueError(
            f"weights have shape {weights.shape}, but log_prob_fn gives "
            f"{log_probs.shape}; it must give one log-probability per decision, [T]"
        )
    return jnp.where(weights != 0.0, weights * log_probs, 0.0)


def _check_rows(rows: PyTree, weights: Array) -> None:
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
