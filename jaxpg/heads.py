"""Heads: how a network's raw outputs become a distribution over an action space."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxpg.distributions import Categorical, DiagonalGaussian, Distribution
from jaxpg.envs.base import Box, Discrete, Space
from jaxpg.types import Params

__all__ = ["Head", "categorical_head", "gaussian_head", "head_for"]


class Head(NamedTuple):
    """How raw network outputs become a distribution over one action space.

    Attributes:
        num_outputs: how many raw outputs the network must give.
        init: the head's own parameters, such as a log standard deviation.
        distribution: `distribution(head_params, outputs)`.
        space: the action space that it acts in.
    """

    num_outputs: int
    init: Callable[[], Params]
    distribution: Callable[[Params, Array], Distribution]
    space: Space


def categorical_head(space: Discrete) -> Head:
    """Logits over the integers of a `Discrete` space.

    Raises:
        ValueError: if the space is not `Discrete`.
    """
    if not isinstance(space, Discrete):
        raise ValueError(
            f"space is {space!r}, needs a Discrete; for a Box use gaussian_head"
        )
    return Head(space.n, dict, lambda _, logits: Categorical(logits), space)


def gaussian_head(space: Box, initial_log_std: float = 0.0) -> Head:
    """A diagonal Gaussian with one learned log standard deviation per dimension.

    Actions are not clipped here: gradients belong to the action that was drawn, and
    what lies outside the box is the environment's to clip.

    Args:
        space: a `Box` of rank one.
        initial_log_std: log of the first standard deviation, in action units.

    Returns:
        A head whose scale does not depend on the state.

    Raises:
        ValueError: if the space is not a flat `Box`.
    """
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise ValueError(
            f"space is {space!r}, needs a Box with shape (D,); flatten the actions"
        )
    size = space.shape[0]

    def init() -> Params:
        return {"log_std": jnp.full((size,), initial_log_std, dtype=float)}

    def distribution(params: Params, mean: Array) -> Distribution:
        log_std = jnp.broadcast_to(params["log_std"].astype(mean.dtype), mean.shape)
        return DiagonalGaussian(mean, log_std)

    return Head(size, init, distribution, space)


def head_for(space: Space) -> Head:
    """The usual head for an action space.

    Raises:
        ValueError: if no head fits the space.

    >>> head_for(Discrete(3)).num_outputs
    3
    """
    if isinstance(space, Discrete):
        return categorical_head(space)
    if isinstance(space, Box):
        return gaussian_head(space)
    raise ValueError(
        f"action space is {space!r}, no usual head fits it; build a Head and pass it"
    )
