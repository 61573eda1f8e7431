"""Algorithms by name: their settings, and the function that makes them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpg.algos.a2c import A2CConfig, a2c
from jaxpg.algos.base import Algorithm, Task
from jaxpg.algos.natural import ENACConfig, NPGConfig, enac, npg
from jaxpg.algos.off_policy import OffPolicyConfig, off_policy
from jaxpg.algos.ppo import PPOConfig, ppo
from jaxpg.algos.reinforce import ReinforceConfig, reinforce
from jaxpg.algos.trpo import TRPOConfig, trpo
from jaxpg.algos.vtrace import VTraceConfig, vtrace

__all__ = ["RECIPES", "Recipe"]


class Recipe(NamedTuple):
    """One algorithm.

    Attributes:
        settings: its frozen dataclass; the first line of its docstring names it.
        make: `make(settings, task) -> Algorithm`.
        needs_critic: whether it bootstraps from a value network.
    """

    settings: type
    make: Callable[[Any, Task], Algorithm]
    needs_critic: bool


RECIPES: dict[str, Recipe] = {
    "reinforce": Recipe(ReinforceConfig, reinforce, needs_critic=False),
    "a2c": Recipe(A2CConfig, a2c, needs_critic=True),
    "vtrace": Recipe(VTraceConfig, vtrace, needs_critic=True),
    "off-policy": Recipe(OffPolicyConfig, off_policy, needs_critic=False),
    "npg": Recipe(NPGConfig, npg, needs_critic=False),
    "enac": Recipe(ENACConfig, enac, needs_critic=False),
    "trpo": Recipe(TRPOConfig, trpo, needs_critic=True),
    "ppo": Recipe(PPOConfig, ppo, needs_critic=True),
}
"""By their names on the command line."""
