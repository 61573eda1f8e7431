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
        summary: what it is, in a line.
        settings: its frozen dataclass.
        make: `make(settings, task) -> Algorithm`.
        needs_critic: whether it bootstraps from a value network.
    """

    summary: str
    settings: type
    make: Callable[[Any, Task], Algorithm]
    needs_critic: bool = False


RECIPES: dict[str, Recipe] = {
    "reinforce": Recipe(
        "score-function gradient on whole episodes, any baseline",
        ReinforceConfig,
        reinforce,
    ),
    "a2c": Recipe(
        "one step a batch of segments, advantages from a critic",
        A2CConfig,
        a2c,
        needs_critic=True,
    ),
    "vtrace": Recipe(
        "several steps on segments of an older policy, V-trace",
        VTraceConfig,
        vtrace,
        needs_critic=True,
    ),
    "off-policy": Recipe(
        "several steps on whole episodes, importance ratios",
        OffPolicyConfig,
        off_policy,
    ),
    "npg": Recipe(
        "natural gradient by Fisher products, whole episodes", NPGConfig, npg
    ),
    "enac": Recipe(
        "natural gradient by regression of returns on scores", ENACConfig, enac
    ),
    "trpo": Recipe(
        "natural direction as far as the KL allows and it climbs",
        TRPOConfig,
        trpo,
        needs_critic=True,
    ),
    "ppo": Recipe(
        "minibatch steps with clipped ratios or a KL penalty",
        PPOConfig,
        ppo,
        needs_critic=True,
    ),
}
"""By their names on the command line."""
