"""Heads: how a network's raw outputs become a distribution over an action space.

Discrete        categorical_head             n logits
MultiDiscrete   multi_categorical_head       Σ nvec logits, component by component
MultiBinary     bernoulli_head               n log-odds
Box             gaussian_head                D means (and D log-std offsets)
                tanh_gaussian_head           the same, squashed into the box
                state_dependent_noise_head   D means and F features of the noise
"""

from jaxpg.envs.base import Box, Discrete, MultiBinary, MultiDiscrete, Space
from jaxpg.heads.base import Head
from jaxpg.heads.discrete import (
    bernoulli_head,
    categorical_head,
    multi_categorical_head,
)
from jaxpg.heads.gaussian import (
    LOG_STD_RANGE,
    gaussian_head,
    state_dependent_noise_head,
    tanh_gaussian_head,
)

__all__ = [
    "LOG_STD_RANGE",
    "Head",
    "bernoulli_head",
    "categorical_head",
    "gaussian_head",
    "head_for",
    "multi_categorical_head",
    "state_dependent_noise_head",
    "tanh_gaussian_head",
]


def head_for(space: Space) -> Head:
    """The usual head for an action space.

    Args:
        space: a `Discrete`, `MultiDiscrete`, `MultiBinary` or flat `Box`.

    Returns:
        The one head of a discrete space; `gaussian_head` for a `Box`.

    Raises:
        ValueError: if no head fits the space.

    >>> head_for(MultiBinary(3)).num_outputs
    3
    """
    if isinstance(space, Discrete):
        return categorical_head(space)
    if isinstance(space, MultiDiscrete):
        return multi_categorical_head(space)
    if isinstance(space, MultiBinary):
        return bernoulli_head(space)
    if isinstance(space, Box):
        return gaussian_head(space)
    raise ValueError(
        f"action space is {space!r}, no usual head fits it; build a Head and pass it"
    )
