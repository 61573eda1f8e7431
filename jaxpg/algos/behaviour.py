"""Who collects, where that is not the policy that learns: an older self, or another.

lag n: the parameters that collect are renewed every n updates
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg.policies import Policy
from jaxpg.types import Params

__all__ = ["Behaviour", "Lagged", "follow", "start_lag"]


class Behaviour(NamedTuple):
    """Somebody else's policy, to collect with.

    Attributes:
        policy: any policy for the same spaces, whose log-probabilities are recorded.
        params: its parameters.
    """

    policy: Policy
    params: Params


class Lagged(NamedTuple):
    """An older self.

    Attributes:
        params: what collects.
        age: updates since they were renewed.
    """

    params: Params
    age: Array


def start_lag(params: Params) -> Lagged:
    """The first parameters, of age 0.

    >>> start_lag(jnp.ones(())).age.item()
    0
    """
    return Lagged(params, jnp.zeros((), jnp.int32))


def follow(lagged: Lagged, params: Params, lag: int) -> Lagged:
    """What collects after an update: renewed every `lag` updates.

    Args:
        lagged: what collected before.
        params: after the update.
        lag: at least 1; 1 always renews.

    Returns:
        What collects next.

    >>> old, new = jnp.zeros(()), jnp.ones(())
    >>> once = follow(start_lag(old), new, lag=2)
    >>> once.params.item(), follow(once, new, lag=2).params.item()
    (0.0, 1.0)
    """
    age = lagged.age + 1
    renew = age >= lag
    kept = jax.tree.map(lambda x, y: jnp.where(renew, x, y), params, lagged.params)
    return Lagged(kept, jnp.where(renew, 0, age))
