"""Worlds to learn in: one environment type, and doors to other suites."""

from jaxpg.envs.base import (
    Box,
    Discrete,
    Environment,
    Masked,
    MaskedObs,
    MultiBinary,
    MultiDiscrete,
    Space,
    with_time_limit,
)
from jaxpg.envs.from_gymnax import from_gymnax
from jaxpg.envs.probes import PROBES
from jaxpg.envs.registry import load_problem, make, names, register
from jaxpg.envs.wrappers import (
    add_observation_noise,
    hide_components,
    map_observations,
    stack_frames,
)

__all__ = [
    "PROBES",
    "Box",
    "Discrete",
    "Environment",
    "Masked",
    "MaskedObs",
    "MultiBinary",
    "MultiDiscrete",
    "Space",
    "add_observation_noise",
    "from_gymnax",
    "hide_components",
    "load_problem",
    "make",
    "map_observations",
    "names",
    "register",
    "stack_frames",
    "with_time_limit",
]
