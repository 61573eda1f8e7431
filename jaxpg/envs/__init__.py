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
    "from_gymnax",
    "load_problem",
    "make",
    "names",
    "register",
    "with_time_limit",
]
