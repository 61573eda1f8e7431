"""The study of learning: what lower variance buys.

    jaxpg study learning --quick

REINFORCE with every estimator at every batch size, at equal episodes and at equal
wall-clock. A curve is the return of an update's own batch; what is told of it is its
mean over all episodes (the area under it) and over the last tenth.
"""

from typing import Any

import numpy as np

from jaxpg.study.curves import choose, interquartile_mean, over_seeds, train_cell
from jaxpg.study.naming import expand_names
from jaxpg.study.progress import StudyProgress
from jaxpg.study.settings import LearningConfig
from jaxpg.study.store import default_folder, open_store
from jaxpg.study.variance import StudyResult

__all__ = ["study_learning"]


def study_learning(
    config: LearningConfig | None = None, *, show: bool = True, report: bool = True
) -> StudyResult:
    """Train with every estimator at every batch size.

    Args:
        config: the settings; None for the defaults.
        show: whether to print progress.
        report: whether to draw figures and write the report.

    Returns:
        One row per estimator and batch size, and their curves in `results.json`.

    Raises:
        ValueError: if settings do not fit together.
    """
    config = LearningConfig() if config is None else config
    folder = config.folder or default_folder("learning", config.env)
    store, changes = open_store(folder, "learning", config)
    cells = [
        (n, s) for s in config.batch_sizes for n in expand_names(config.estimators)
    ]
    rows, curves = [], []
    with StudyProgress(show, len(cells), "learning") as progress:
        for name, size in cells:
            key = f"{name.replace('/', '-')}-{size:06d}"
            cell = store.get(key)
            if cell is None:
                progress.say(f"{name}, N = {size}")
                cell = store.put(key, train_cell(config, name, size))
                progress.advance(1)
            else:
                progress.skip(1)
            row, curve = _told(config, cell)
            rows.append(row)
            curves.append(curve)
    notes = [f"resumed: {change}" for change in changes]
    facts = {
        "label": config.env,
        "num_episodes": config.num_episodes,
        "seeds": config.num_seeds // 2,
        "learning_rates": list(config.learning_rates),
    }
    results = {"facts": facts, "summary": [], "notes": notes, "curves": curves}
    store.finish(results, rows)
    if report:
        from jaxpg.study.reports import write_learning_report

        write_learning_report(folder)
    return StudyResult(folder, rows, [], notes)


def _told(
    config: LearningConfig, cell: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A cell's line of the table, and its curve."""
    rate, shown = choose(
        config, cell, lambda returns, _: float(interquartile_mean(returns.mean(axis=1)))
    )
    returns = shown["mean_return"]
    seconds = shown["env_steps"].mean(axis=0) / cell["rate"]
    last = max(1, returns.shape[1] // 10)
    row = {
        "estimator": cell["estimator"],
        "batch_size": cell["batch_size"],
        "learning_rate": float(rate),
        "seconds": float(seconds[-1]),
        **_spread("area", returns.mean(axis=1)),
        **_spread("last", returns[:, -last:].mean(axis=1)),
    }
    curve = {
        "estimator": cell["estimator"],
        "batch_size": cell["batch_size"],
        "episodes": cell["episodes"],
        "seconds": seconds.tolist(),
        **over_seeds(returns),
    }
    return row, curve


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Of one number per seed."""
    found = over_seeds(values[:, None])
    return {
        f"{name}_{part}": found[part][0] for part in ("median", "iqm", "low", "high")
    }
