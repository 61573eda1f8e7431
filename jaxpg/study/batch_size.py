r"""The study of batch sizes: how long to a target return, against the batch.

    jaxpg study batch-size --quick

Small batches need the fewest episodes, large ones the fewest updates. Beside what is
measured stands what the gradient noise scale B predicts of both,

    updates(N) = S (1 + B / N),        episodes(N) = S (N + B)

with S the updates of an endless batch, fitted, and B measured on policies along the
way; returns diminish where N passes B.

Reference: McCandlish et al. 2018, equation 2.11.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxpg.study.bench import make_bench, reference_of
from jaxpg.study.curves import choose, reinforce_config, train_cell
from jaxpg.study.measure import measure_batches
from jaxpg.study.naming import expand_names
from jaxpg.study.progress import StudyProgress
from jaxpg.study.settings import BatchSizeConfig, VarianceConfig
from jaxpg.study.statistics import summarize
from jaxpg.study.store import Store, default_folder, open_store
from jaxpg.study.subjects import Subject, from_checkpoint
from jaxpg.study.variance import StudyResult
from jaxpg.train.loop import train

__all__ = ["study_batch_size"]

STAGES = 4
NOISE_BATCH = 64


def study_batch_size(
    config: BatchSizeConfig | None = None, *, show: bool = True, report: bool = True
) -> StudyResult:
    """Train with every batch size to a target return, and measure the noise scale.

    Args:
        config: the settings; None for the defaults.
        show: whether to print progress.
        report: whether to draw figures and write the report.

    Returns:
        One row per estimator and batch size, and the noise scale at each stage.

    Raises:
        ValueError: if settings do not fit together.
    """
    config = BatchSizeConfig() if config is None else config
    folder = config.folder or default_folder("batch-size", config.env)
    store, changes = open_store(folder, "batch-size", config)
    names = expand_names(config.estimators)
    notes = [f"resumed: {change}" for change in changes]
    rows, summary = [], []
    with StudyProgress(
        show, len(names) * (len(config.batch_sizes) + 1), "batch-size"
    ) as progress:
        for name in names:
            mine = [
                _raced(config, _cell(config, store, name, size, progress))
                for size in config.batch_sizes
            ]
            stages = _noise(config, store, name, mine, progress)
            rows += mine
            summary.append({"estimator": name, "stages": stages, **_fit(mine, stages)})
            lost = [str(row["batch_size"]) for row in mine if row["updates"] is None]
            if lost:
                notes.append(
                    f"{name} at N = {', '.join(lost)}: most seeds did not reach "
                    f"{config.target_return:g} within {config.num_episodes} episodes"
                )
    facts = {
        "label": config.env,
        "target_return": config.target_return,
        "seeds": config.num_seeds // 2,
        "num_episodes": config.num_episodes,
    }
    store.finish({"facts": facts, "summary": summary, "notes": notes}, rows)
    if report:
        from jaxpg.study.reports import write_batch_size_report

        write_batch_size_report(folder)
    return StudyResult(folder, rows, summary, notes)


def _cell(
    config: BatchSizeConfig, store: Store, name: str, size: int, progress: StudyProgress
) -> dict[str, Any]:
    key = f"{name.replace('/', '-')}-{size:06d}"
    cell = store.get(key)
    if cell is not None:
        progress.skip(1)
        return cell
    progress.say(f"{name}, N = {size}")
    cell = store.put(key, train_cell(config, name, size))
    progress.advance(1)
    return cell


def _raced(config: BatchSizeConfig, cell: dict[str, Any]) -> dict[str, Any]:
    """How long one batch size takes: quartiles over the seeds that did not choose."""
    size = cell["batch_size"]

    def updates(returns: np.ndarray) -> np.ndarray:
        return np.array([_first(config, size, row) for row in returns])

    rate, shown = choose(
        config, cell, lambda returns, _: -float(np.median(updates(returns)))
    )
    each = updates(shown["mean_return"])
    steps = shown["env_steps"]
    seconds = np.array(
        [
            steps[i, int(u) - 1] / cell["rate"] if np.isfinite(u) else np.inf
            for i, u in enumerate(each)
        ]
    )
    row: dict[str, Any] = {
        "estimator": cell["estimator"],
        "batch_size": size,
        "learning_rate": float(rate),
        "reached": int(np.isfinite(each).sum()),
        "seeds": len(each),
    }
    for name, values in (
        ("updates", each),
        ("episodes", each * size),
        ("seconds", seconds),
    ):
        ordered = np.sort(values)
        middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1].mean()
        row[name] = float(middle) if np.isfinite(middle) else None
        for end, share in (("low", 0.25), ("high", 0.75)):
            # The lower of two neighbours: between a number and never there is none.
            found = ordered[int(share * (len(ordered) - 1))]
            row[f"{name}_{end}"] = float(found) if np.isfinite(found) else None
    return row


def _first(config: BatchSizeConfig, size: int, returns: np.ndarray) -> float:
    """Updates to a running mean at the target; infinite if there is none."""
    window = max(1, config.window // size)
    if len(returns) < window:
        return float("inf")
    means = np.convolve(returns, np.ones(window) / window, mode="valid")
    reached = np.flatnonzero(means >= config.target_return)
    return float(reached[0] + window) if len(reached) else float("inf")


def _noise(
    config: BatchSizeConfig,
    store: Store,
    name: str,
    rows: list[dict[str, Any]],
    progress: StudyProgress,
) -> list[dict[str, Any]]:
    """The noise scale of policies along a run that reaches the target."""
    key = f"noise-{name.replace('/', '-')}"
    kept = store.get(key)
    if kept is not None:
        progress.skip(1)
        return kept
    progress.say(f"noise scale of {name}")
    good = [row for row in rows if row["updates"] is not None] or rows
    row = min(good, key=lambda r: abs(r["batch_size"] - NOISE_BATCH))
    every = max(1, int(row["updates"] or config.num_episodes // row["batch_size"]))
    every = max(1, every // STAGES)
    with tempfile.TemporaryDirectory() as folder:
        settings = reinforce_config(config, name, row["batch_size"], Path(folder))
        settings = _single(settings, row["learning_rate"], every)
        run = train(settings, show=False).folder
        found = [
            {
                "update": update,
                **_noise_of(config, name, from_checkpoint(run, update=str(update))),
            }
            for update in range(every, STAGES * every + 1, every)
        ]
    progress.advance(1)
    return store.put(key, found)


def _single(settings: Any, rate: float, every: int) -> Any:
    """One seed at one step size, with a checkpoint at every stage."""
    return dataclasses.replace(
        settings,
        sweep=(),
        num_seeds=1,
        members_at_once=None,
        num_updates=STAGES * every,
        checkpoint_every=every,
        keep_checkpoints=STAGES,
        algorithm=dataclasses.replace(settings.algorithm, learning_rate=rate),
    )


def _noise_of(config: BatchSizeConfig, name: str, subject: Subject) -> dict[str, Any]:
    """The noise scale of one policy."""
    count = max(8, config.noise_trajectories // NOISE_BATCH)
    study = VarianceConfig(
        env=config.env,
        estimators=(name,),
        batch_sizes=(NOISE_BATCH,),
        num_trajectories=count * NOISE_BATCH,
        reference_trajectories=count * NOISE_BATCH,
        chunk_size=NOISE_BATCH,
        num_devices=1,
        seed=config.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        store, _ = open_store(Path(folder) / "noise", "variance", study)
        bench = make_bench(study, subject)
        quiet = StudyProgress(False, 1.0, "")
        reference = reference_of(bench, study, store, quiet)
    measured = measure_batches(
        bench.contenders,
        bench.subject,
        bench.samplers[False],
        bench.placement,
        NOISE_BATCH,
        count,
    )
    cell = summarize(
        measured.gradients[name], NOISE_BATCH, reference, subject.blocks(), config.seed
    )
    return {
        "mean_return": bench.samplers[False].statistics()["mean_return"],
        **{k: cell[k] for k in ("noise_scale", "noise_scale_low", "noise_scale_high")},
    }


def _fit(
    rows: list[dict[str, Any]], stages: list[dict[str, Any]]
) -> dict[str, float | None]:
    """S for the measured noise scale, and S and B for the best curve of that form."""
    known = [(r["batch_size"], r["updates"]) for r in rows if r["updates"] is not None]
    scales = [
        s["noise_scale"] for s in stages if s["noise_scale"] and s["noise_scale"] > 0
    ]
    found: dict[str, float | None] = {
        "noise_scale": float(np.median(scales)) if scales else None,
        "least_updates": None,
        "fitted_noise_scale": None,
        "fitted_least_updates": None,
    }
    if not known:
        return found
    sizes, updates = np.array(known, float).T

    def least(scale: float) -> tuple[float, float]:
        """The S that fits best in logarithms, and what is left."""
        off = np.log(updates) - np.log1p(scale / sizes)
        return float(np.exp(off.mean())), float(((off - off.mean()) ** 2).sum())

    if found["noise_scale"] is not None:
        found["least_updates"] = least(found["noise_scale"])[0]
    if len(known) >= 3:
        grid = np.geomspace(sizes.min() / 8, sizes.max() * 8, 400)
        best = min(grid, key=lambda b: least(float(b))[1])
        found["fitted_noise_scale"] = float(best)
        found["fitted_least_updates"] = least(float(best))[0]
    return found
