"""Learning curves of many seeds: one program a cell, put together over seeds.

A cell is an estimator at a batch size; its step sizes and seeds are trained side by
side by `jaxpg.train`. All cells may use the same number of episodes, so their curves
end together: return against episodes (equal samples), and against the seconds that one
run takes at the rate its program reached (equal wall-clock).

The step size is chosen by one half of the seeds and shown on the other half.

Reference: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the
statistical precipice" (interquartile means, intervals over seeds).
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxpg.algos.reinforce import ReinforceConfig
from jaxpg.study.naming import parse_estimator
from jaxpg.train.config import TrainConfig
from jaxpg.train.loop import train

__all__ = [
    "choose",
    "interquartile_mean",
    "over_seeds",
    "reinforce_config",
    "train_cell",
]

RESAMPLES = 400
MOST_ENVS = 64


def train_cell(config: Any, name: str, batch_size: int) -> dict[str, Any]:
    """Train every seed at every step size.

    Args:
        config: settings of the study.
        name: of the estimator.
        batch_size: episodes of an update.

    Returns:
        `episodes` [U], `rate` in steps per second, and by step size `returns` and
        `env_steps`, [seeds, U].
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = reinforce_config(config, name, batch_size, Path(folder))
        columns = train(settings, show=False).metrics
    updates = settings.num_updates
    found: dict[str, Any] = {
        "estimator": name,
        "batch_size": batch_size,
        "episodes": [batch_size * (i + 1) for i in range(updates)],
        "rate": _rate(columns),
        "curves": {},
    }
    for rate in config.learning_rates:
        mine = np.isclose(columns["learning_rate"], rate)
        found["curves"][f"{rate:g}"] = {
            part: [
                columns[part][mine & (columns["seed"] == seed)].tolist()
                for seed in range(config.seed, config.seed + config.num_seeds)
            ]
            for part in ("mean_return", "env_steps")
        }
    return found


def reinforce_config(
    config: Any, name: str, batch_size: int, folder: Path
) -> TrainConfig:
    """Settings of the runs of one cell.

    Args:
        config: settings of the study.
        name: of the estimator.
        batch_size: episodes of an update.
        folder: where the runs live for a moment.
    """
    estimator = parse_estimator(name)
    num_envs = min(batch_size, MOST_ENVS)
    updates = config.num_episodes // batch_size
    return TrainConfig(
        env=config.env,
        max_steps=config.max_steps,
        policy=config.policy,
        seed=config.seed,
        num_seeds=config.num_seeds,
        sweep=(("learning_rate", tuple(float(x) for x in config.learning_rates)),),
        members_at_once=config.members_at_once,
        num_envs=num_envs,
        num_devices=1,
        num_updates=updates,
        checkpoint_every=updates,
        eval_episodes=0,
        runs_dir=folder,
        name="run",
        algorithm=ReinforceConfig(
            episodes_per_env=batch_size // num_envs,
            credit=estimator.credit.credit,
            baseline=estimator.baseline,
            standardize=estimator.standardize,
        ),
    )


def choose(config: Any, cell: dict[str, Any], score: Any) -> tuple[str, dict[str, Any]]:
    """The step size whose first half of the seeds scores best, and the other half.

    Args:
        config: settings of the study.
        cell: from `train_cell`.
        score: `score(returns [seeds, U], env_steps [seeds, U]) -> number`, more is
            better.

    Returns:
        The step size and its curves on the seeds that did not choose it.
    """
    half = config.num_seeds // 2

    def part(curves: dict[str, Any], which: slice) -> dict[str, np.ndarray]:
        return {name: np.asarray(x, float)[which] for name, x in curves.items()}

    halves = {rate: part(c, slice(0, half)) for rate, c in cell["curves"].items()}
    best = max(
        halves, key=lambda r: score(halves[r]["mean_return"], halves[r]["env_steps"])
    )
    return best, part(cell["curves"][best], slice(half, None))


def over_seeds(values: np.ndarray, seed: int = 0) -> dict[str, list[float]]:
    """Median, interquartile mean and its 95% bootstrap interval, over seeds.

    Args:
        values: [seeds, points].
        seed: of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(values), size=(RESAMPLES, len(values)))
    means = np.stack([interquartile_mean(values[index]) for index in drawn])
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return {
        "median": np.median(values, axis=0).tolist(),
        "iqm": interquartile_mean(values).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half over the first axis.

    Args:
        values: [seeds, ...]; of fewer than four the mean of all.

    >>> interquartile_mean(np.array([0.0, 1.0, 3.0, 100.0])).item()
    2.0
    """
    ordered = np.sort(values, axis=0)
    cut = len(values) // 4
    return np.asarray(ordered[cut : len(values) - cut].mean(axis=0))


def _rate(columns: dict[str, np.ndarray]) -> float:
    """Steps per second, without the first visits, in which programs were compiled."""
    rates = columns["steps_per_second"][columns["update"] > 1]
    return float(np.median(rates if len(rates) else columns["steps_per_second"]))
