"""Heads for finitely many actions: raw outputs are logits, and nothing else is learned.

Outputs are [..., num_outputs]; whatever leads is the distribution's batch.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpg.distributions import Bernoulli, Categorical, Distribution, MultiCategorical
from jaxpg.envs.base import Discrete, MultiBinary, MultiDiscrete
from jaxpg.heads.base import Head
from jaxpg.types import Params

__all__ = ["bernoulli_head", "categorical_head", "multi_categorical_head"]


def categorical_head(space: Discrete) -> Head:
    """Logits over the integers of a `Discrete` space.

    Args:
        space: n integers.

    Returns:
        A head without parameters, of n outputs.

    Raises:
        ValueError: if the space is not `Discrete`.

    >>> categorical_head(Discrete(3)).num_outputs
    3
    """
    if not isinstance(space, Discrete):
        raise ValueError(
            f"space is {space!r}, needs a Discrete; for a Box use gaussian_head"
        )
    return Head(space.n, dict, lambda _, logits: Categorical(logits), space)


def multi_categorical_head(space: MultiDiscrete) -> Head:
    """Logits over every component of a `MultiDiscrete` space, one after another.

    Args:
        space: components of nvec[0], nvec[1], ... integers.

    Returns:
        A head without parameters, of Σ nvec outputs.

    Raises:
        ValueError: if the space is not `MultiDiscrete`, or has no component.

    >>> multi_categorical_head(MultiDiscrete((2, 3))).num_outputs
    5
    """
    if not isinstance(space, MultiDiscrete) or not space.nvec:
        raise ValueError(
            f"space is {space!r}, needs a MultiDiscrete of at least one component; for "
            "a Discrete use categorical_head"
        )
    *ends, num_outputs = (int(end) for end in np.cumsum(space.nvec))

    def distribution(_: Params, logits: Array) -> Distribution:
        return MultiCategorical(tuple(jnp.split(logits, ends, axis=-1)))

    return Head(num_outputs, dict, distribution, space)


def bernoulli_head(space: MultiBinary) -> Head:
    """One log-odds for every bit of a `MultiBinary` space.

    Args:
        space: n bits.

    Returns:
        A head without parameters, of n outputs.

    Raises:
        ValueError: if the space is not `MultiBinary`.

    >>> bernoulli_head(MultiBinary(4)).num_outputs
    4
    """
    if not isinstance(space, MultiBinary):
        raise ValueError(
            f"space is {space!r}, needs a MultiBinary; for a Discrete use "
            "categorical_head"
        )
    return Head(space.n, dict, lambda _, logits: Bernoulli(logits), space)
