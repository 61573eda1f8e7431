"""Settings that are known to learn, by environment and algorithm.

`settings/ENVIRONMENT/ALGORITHM.json` holds what differs from the defaults. Each file
was made for a row of `benchmarks/learning.py`, whose stored result says what it
reaches, and in how many steps.
"""

import json
from importlib import resources
from typing import Any

from jaxpg._checks import check_choice
from jaxpg.train.config import ALGORITHMS, TrainConfig, config_from_json

__all__ = ["tuned", "tuned_pairs"]


def tuned(env: str, algorithm: str) -> TrainConfig:
    """The settings for a pair; the algorithm's defaults where none are stored.

    Args:
        env: name of the environment.
        algorithm: name of the algorithm.

    Returns:
        Settings of a run.

    Raises:
        ValueError: if the algorithm is unknown.

    >>> tuned("CartPole-v1", "ppo").algorithm_name
    'ppo'
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    file = resources.files("jaxpg").joinpath("settings", env, f"{algorithm}.json")
    stored: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    settings = {"name": algorithm, **stored.pop("algorithm", {})}
    return config_from_json({"env": env, **stored, "algorithm": settings})


def tuned_pairs() -> list[tuple[str, str]]:
    """Every pair of environment and algorithm that settings are stored for."""
    folder = resources.files("jaxpg").joinpath("settings")
    return sorted(
        (env.name, file.name.removesuffix(".json"))
        for env in folder.iterdir()
        if env.is_dir()
        for file in env.iterdir()
    )
