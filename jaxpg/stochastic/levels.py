"""Baselines that learn: what a draw may expect to cost, from the runs before.

    moving_average   b = mean of earlier credits
    nvil             b = c(inputs) + moving average of the rest,  scale = max(1, std)

A baseline predicts from its state and the datum alone, so it knows nothing of the draw,
and the estimate stays unbiased; a scale divides a node's term by a number that the draw
does not move. `fit` then looks at the credits that the run reported.

    state = baseline.init(key, report.credits, *inputs)
    levels, scales = baseline.predict(state, *inputs)
    (cost, report), gradient = jax.value_and_grad(loss, has_aux=True)(
        params, key, *inputs, baselines=levels, scales=scales
    )
    state = baseline.fit(state, report.credits, *inputs)

Reference: Mnih and Gregor 2014, "Neural variational inference and learning in belief
networks" (NVIL): section 2.3 and appendix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxpg._checks import check_range
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["LevelBaseline", "Moments", "NVILState", "moving_average", "nvil"]

ByNode: TypeAlias = dict[str, Array]


class LevelBaseline(NamedTuple):
    """A baseline of nodes.

    Attributes:
        init: `init(key, credits, *inputs) -> state`, from one datum's report.
        predict: `predict(state, *inputs) -> (baselines, scales)` for one datum.
        fit: `fit(state, credits, *inputs) -> state` from a batch of data, their axis in
            front of credits and inputs.
    """

    init: Callable[..., Any]
    predict: Callable[..., tuple[ByNode, ByNode]]
    fit: Callable[..., Any]


class Moments(NamedTuple):
    """Decaying sums over batches, by node and round.

    Attributes:
        mean: decaying sum of means.
        square: decaying sum of mean squares.
        weight: what they are divided by; below 1 while batches are few.
    """

    mean: ByNode
    square: ByNode
    weight: Float[Array, ""]


def moving_average(decay: float = 0.99, *, normalise: bool = False) -> LevelBaseline:
    """The mean credit of earlier batches.

        m <- decay m + (1 - decay) mean(credit),     b = m / (1 - decay^n)

    Args:
        decay: per batch, in [0, 1).
        normalise: also divide by max(1, standard deviation), as in NVIL.

    Returns:
        A baseline; before its first batch it predicts 0.

    Raises:
        ValueError: if the decay is out of range.

    Bias: none; with `normalise` unbiased up to the scale.

    Reference: Williams 1992, section 7; Mnih and Gregor 2014, algorithm 1.

    >>> baseline = moving_average(0.9)
    >>> credits = {"z": jnp.array([2.0, 4.0])}  # of two data
    >>> state = baseline.init(jax.random.key(0), {"z": jnp.array(0.0)})
    >>> round(float(baseline.predict(baseline.fit(state, credits))[0]["z"]), 4)
    3.0
    """
    check_range("decay", decay, 0.0, 1.0)

    def init(key: PRNGKey, credits: ByNode, *inputs: PyTree) -> Moments:
        zeros = jax.tree.map(jnp.zeros_like, credits)
        return Moments(zeros, zeros, jnp.zeros(()))

    def predict(state: Moments, *inputs: PyTree) -> tuple[ByNode, ByNode]:
        return _means(state), _scales(state) if normalise else {}

    def fit(state: Moments, credits: ByNode, *inputs: PyTree) -> Moments:
        return _moved(state, credits, decay)

    return LevelBaseline(init, predict, fit)


class NVILState(NamedTuple):
    """What NVIL's baseline knows: of the datum, and of what that leaves."""

    params: Params
    optimizer: Any
    moments: Moments


def nvil(
    init_fn: Callable[..., Params],
    apply_fn: Callable[..., ByNode],
    optimizer: optax.GradientTransformation,
    *,
    decay: float = 0.99,
    normalise: bool = True,
) -> LevelBaseline:
    """NVIL's: a function of the datum, a moving mean of the rest, and its scale.

        b(x) = c(x) + m,     scale = max(1, std(credit - c(x))),
        c descends mean (credit - m - c(x))²

    Args:
        init_fn: `init_fn(key, *inputs) -> params` of c.
        apply_fn: `apply_fn(params, *inputs) -> {node: level}` for one datum.
        optimizer: of c, from Optax.
        decay: of the moving moments per batch, in [0, 1).
        normalise: whether to divide by the scale.

    Returns:
        A baseline.

    Raises:
        ValueError: if the decay is out of range.

    Bias: none; with `normalise` unbiased up to the scale.

    Reference: Mnih and Gregor 2014, sections 2.3.1 to 2.3.3.
    """
    average = moving_average(decay, normalise=normalise)

    def init(key: PRNGKey, credits: ByNode, *inputs: PyTree) -> NVILState:
        params = init_fn(key, *inputs)
        return NVILState(params, optimizer.init(params), average.init(key, credits))

    def predict(state: NVILState, *inputs: PyTree) -> tuple[ByNode, ByNode]:
        means, scales = average.predict(state.moments)
        levels = apply_fn(state.params, *inputs)
        return {name: level + means[name] for name, level in levels.items()}, scales

    def fit(state: NVILState, credits: ByNode, *inputs: PyTree) -> NVILState:
        means, _ = average.predict(state.moments)

        def error(params: Params) -> tuple[Array, ByNode]:
            levels = jax.vmap(apply_fn, (None, *(0 for _ in inputs)))(params, *inputs)
            rest = {name: credits[name] - levels[name] for name in credits}
            squares = [jnp.mean((x - means[name]) ** 2) for name, x in rest.items()]
            return sum(squares, jnp.zeros(())), rest

        gradient, rest = jax.grad(error, has_aux=True)(state.params)
        change, memory = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, change)
        return NVILState(params, memory, average.fit(state.moments, rest))

    return LevelBaseline(init, predict, fit)


def _moved(state: Moments, credits: ByNode, decay: float) -> Moments:
    def move(old: Array, new: Array) -> Array:
        over = tuple(range(new.ndim - old.ndim))
        return decay * old + (1.0 - decay) * jnp.mean(new, axis=over)

    squares = jax.tree.map(jnp.square, credits)
    return Moments(
        {name: move(state.mean[name], x) for name, x in credits.items()},
        {name: move(state.square[name], x) for name, x in squares.items()},
        decay * state.weight + (1.0 - decay),
    )


def _means(state: Moments) -> ByNode:
    weight = jnp.where(state.weight > 0, state.weight, 1.0)
    return {name: x / weight for name, x in state.mean.items()}


def _scales(state: Moments) -> ByNode:
    weight = jnp.where(state.weight > 0, state.weight, 1.0)
    means = _means(state)
    variances = {n: x / weight - means[n] ** 2 for n, x in state.square.items()}
    return {n: jnp.sqrt(jnp.maximum(x, 1.0)) for n, x in variances.items()}
