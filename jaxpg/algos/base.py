"""An algorithm as a pair of pure functions, in the manner of an Optax optimiser.

    init(key, obs) -> AlgorithmState
    update(key, state, trajectories) -> (AlgorithmState, info)

What the next update needs is state; what a person wants to see is info; they never
mix. Estimators give ascent directions of J; the one minus sign of the library stands
here, where Optax, which descends, takes them over.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = ["Algorithm", "AlgorithmState", "Info", "ascend", "count_non_finite"]

Info = dict[str, Array]
"""Scalars for people, by name."""


class AlgorithmState(NamedTuple):
    """Everything that the next update needs.

    Attributes:
        params: the policy's parameters.
        opt_state: the Optax optimiser's state.
        baseline_state: what the baseline has learned; () where it learns nothing.
    """

    params: Params
    opt_state: PyTree
    baseline_state: PyTree


class Algorithm(NamedTuple):
    """A learning algorithm as a record of pure functions.

    Attributes:
        init: the first state, from one observation.
        update: one update from one batch of trajectories.
    """

    init: Callable[[PRNGKey, PyTree], AlgorithmState]
    update: Callable[[PRNGKey, Any, Trajectory], tuple[Any, Info]]


def ascend(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    opt_state: PyTree,
    params: Params,
) -> tuple[Params, PyTree]:
    """One Optax step UP the gradient of J.

    Args:
        optimizer: any Optax transformation; it sees minus the gradient.
        gradient: an ascent direction, a tree like `params`.
        opt_state: the optimiser's state.
        params: where the gradient was taken.

    Returns:
        The next parameters and the next optimiser state.

    >>> sgd, params = optax.sgd(0.5), jnp.array(1.0)
    >>> ascend(sgd, jnp.array(2.0), sgd.init(params), params)[0].item()
    2.0
    """
    descent = jax.tree.map(jnp.negative, gradient)
    # Optax mixes types: strict promotion, where a caller has set it, is not for it.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(descent, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def count_non_finite(tree: PyTree) -> Array:
    """How many entries of a tree are NaN or infinite.

    >>> count_non_finite({"a": jnp.array([1.0, jnp.nan]), "b": jnp.array(jnp.inf)})
    Array(2, dtype=int32)
    """
    counts = [jnp.sum(~jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack(counts)).astype(jnp.int32)
