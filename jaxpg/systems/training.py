"""Training a system: visit the devices, keep what they did, stop and go on exactly.

    advance n updates -> evaluate where due -> log rows -> checkpoint where due -> again

Rows are on disk before their checkpoint is, and a resumed run drops the rows that its
checkpoint has not seen. How many updates are made between visits changes no bit.
"""

import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.systems.base import RunSettings
from jaxpg.systems.runs import SystemRun, create_run, open_run, store_settings
from jaxpg.train.log import Row, RunLog, read_metrics, read_rows
from jaxpg.train.loop import NonFiniteError
from jaxpg.train.progress import Reading, make_progress
from jaxpg.train.provenance import describe, differences, write_json_atomically
from jaxpg.train.records import Columns, find_non_finite
from jaxpg.train.render import plot_learning_curve
from jaxpg.train.visits import next_pace, received_signals
from jaxpg.types import PyTree

__all__ = ["SystemResult", "evaluate", "load_state", "resume", "train"]


class SystemResult(NamedTuple):
    """What training a system left behind.

    Attributes:
        folder: everything it wrote.
        update: updates made.
        metrics: its log, one array per column; evaluations are NaN in rows without.
        evaluation: the last evaluation, one line per seed; empty if it was cut short.
        stopped_by: the signal that ended it early, or None.
    """

    folder: Path
    update: int
    metrics: dict[str, np.ndarray]
    evaluation: list[dict[str, float]]
    stopped_by: int | None


def train(
    name: str,
    settings: Any = None,
    config: RunSettings | None = None,
    *,
    show: bool = True,
) -> SystemResult:
    """Train a new run of a system to its end.

    Args:
        name: of the system; `jaxpg list systems` shows all.
        settings: of the system; None for its defaults.
        config: of the run; None for the system's own.
        show: whether to print progress.

    Returns:
        Where everything lies, the metrics and the last evaluation.

    Raises:
        ValueError: if the settings do not fit together or the folder exists.
        NonFiniteError: if the state becomes NaN or infinite.
    """
    run = create_run(name, settings, config)
    _say(show, f"run folder: {run.folder}")
    return _finish(run, *_loop(run, run.program.init(), 0, show))


def resume(
    folder: Path | str,
    *,
    num_updates: int | None = None,
    from_update: int | None = None,
    show: bool = True,
) -> SystemResult:
    """Continue a run from its last checkpoint, to the same bits as without a break.

    Args:
        folder: of the run.
        num_updates: a new length for the run; None keeps it.
        from_update: go on from this checkpoint and drop later ones; None for the last.
        show: whether to print progress.

    Returns:
        Where everything lies, the metrics and the last evaluation.

    Raises:
        ValueError: if the folder holds no run of a system, a checkpoint is damaged, or
            the run is longer already.
        NonFiniteError: if the state becomes NaN or infinite.
    """
    run = open_run(folder, num_updates=num_updates)
    for difference in differences(run.provenance, describe()):
        warnings.warn(
            f"this run may not continue to the same bits: {difference}", stacklevel=2
        )
    step = run.checkpoints.latest_step() if from_update is None else from_update
    state = run.program.init() if step is None else _restore(run, step)
    step = step or 0
    if run.config.num_updates < step:
        raise ValueError(
            f"num_updates is {run.config.num_updates}, but the run has made {step} "
            f"already; needs at least {step}"
        )
    # Only now that the checkpoint was read is anything on disk touched.
    run.checkpoints.rewind(step)
    RunLog(run.folder).rewind(step)
    if num_updates is not None:
        store_settings(run)
    _say(show, f"run folder: {run.folder} (continued from update {step})")
    return _finish(run, *_loop(run, state, step, show))


def load_state(run: SystemRun, step: int | None = None) -> tuple[int, PyTree]:
    """A run's state from a checkpoint.

    Args:
        run: an opened run.
        step: after which update; None for the last checkpoint.

    Returns:
        The update, and the state with its seeds in front.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    step = run.checkpoints.latest_step() if step is None else step
    if step is None:
        raise ValueError(
            f"run {run.folder} holds no checkpoint yet; train it for longer, or "
            f"continue it with --resume {run.folder}"
        )
    return step, _restore(run, step)


def evaluate(run: SystemRun, step: int | None = None) -> list[dict[str, float]]:
    """Evaluate a checkpoint of a run anew.

    Args:
        run: an opened run.
        step: after which update; None for the last checkpoint.

    Returns:
        One line of numbers for each seed, the same as in its log.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    step, state = load_state(run, step)
    found = run.program.evaluate(state, np.int32(step))
    return _lines(run, {name: np.asarray(x) for name, x in found.items()})


def _restore(run: SystemRun, step: int) -> PyTree:
    shapes = jax.eval_shape(run.program.init)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    return jax.tree.map(jax.numpy.asarray, run.checkpoints.restore(template, step))


def _loop(
    run: SystemRun, state: PyTree, update: int, show: bool
) -> tuple[int, int | None]:
    """Advance the run to its end or to a signal; returns where it stopped and why."""
    config, program = run.config, run.program
    log = RunLog(run.folder)
    progress = make_progress(show, update, config.num_updates)
    pace, stopped_by = 1, 0
    try:
        advance = program.advance.lower(state, *_counts(update, 1)).compile()  # type: ignore[attr-defined]
        names = tuple(jax.eval_shape(program.evaluate, state, np.int32(update)))
        with received_signals() as received:
            while update < config.num_updates and not stopped_by:
                count = _until_due(config, update, pace)
                began = time.perf_counter()
                state, info = advance(state, *_counts(update, count))
                columns = {name: np.asarray(x)[:count] for name, x in info.items()}
                seconds = time.perf_counter() - began
                trouble = find_non_finite(run, columns, update)
                done = update + count
                found: Columns = {}
                if not trouble and _is_due(config, done, config.evaluate_every):
                    numbers = program.evaluate(state, np.int32(done))
                    found = {name: np.asarray(x) for name, x in numbers.items()}
                log.append(_rows(run, columns, update, seconds / count, names, found))
                if trouble:
                    raise NonFiniteError(trouble)
                update = done
                if _is_due(config, update, config.checkpoint_every):
                    run.checkpoints.save(update, state)
                progress.show(_reading(config, columns, update, seconds))
                stopped_by, pace = max(received), next_pace(count, seconds)
            if update not in run.checkpoints.steps():
                run.checkpoints.save(update, state)
    finally:
        progress.close()
    return update, stopped_by or None


def _counts(update: int, count: int) -> tuple[np.int32, np.int32]:
    return np.int32(update), np.int32(count)


def _until_due(config: RunSettings, update: int, pace: int) -> int:
    dues = [
        every - update % every
        for every in (config.evaluate_every, config.checkpoint_every)
    ]
    return min(pace, config.num_updates - update, *dues)


def _is_due(config: RunSettings, update: int, every: int) -> bool:
    return update % every == 0 or update == config.num_updates


def _rows(
    run: SystemRun,
    columns: Columns,
    update: int,
    seconds: float,
    names: tuple[str, ...],
    found: Columns,
) -> list[Row]:
    """One row per update and seed; an evaluation stands in those of the last update."""
    length = len(columns["non_finite_state"])
    rows: list[Row] = []
    for i in range(length):
        known = found if i == length - 1 else {}
        for s, member in enumerate(run.config.members()):
            row: Row = {"update": update + i + 1, **member}
            row |= {name: values[i, s].item() for name, values in columns.items()}
            row |= {
                f"eval_{name}": known[name][s].item() if known else None
                for name in names
            }
            rows.append(row | {"seconds": seconds})
    return rows


def _reading(
    config: RunSettings, columns: Columns, update: int, seconds: float
) -> Reading:
    count = len(columns["non_finite_state"])
    values = {
        name: float(x[-1].mean())
        for name, x in columns.items()
        if not name.startswith("non_finite_")
    }
    left = (config.num_updates - update) * seconds / count
    return Reading(update, config.num_updates, values, count / seconds, left)


def _finish(run: SystemRun, update: int, stopped_by: int | None) -> SystemResult:
    """Picture, evaluation and learning curve."""
    rows = read_rows(run.folder)
    headline = f"eval_{run.system.headline}"
    rated = [row for row in rows if row[headline] is not None]
    if rated:
        title = f"{run.name}, {run.system.headline.replace('_', ' ')} when evaluated"
        path = run.folder / "learning_curve.png"
        plot_learning_curve(rated, path, title, x="update", y=headline)
    evaluation: list[dict[str, float]] = []
    if stopped_by is None:
        evaluation = evaluate(run, update)
        write_json_atomically(run.folder / "evaluation.json", _finite(evaluation))
        if run.system.picture is not None:
            _, state = load_state(run, update)
            first = jax.tree.map(lambda x: x[0], state)
            run.system.picture(first, run.folder / "picture.png")
    metrics = read_metrics(run.folder)
    return SystemResult(run.folder, update, metrics, evaluation, stopped_by)


def _lines(run: SystemRun, found: Columns) -> list[dict[str, float]]:
    return [
        member | {name: x[s].item() for name, x in found.items()}
        for s, member in enumerate(run.config.members())
    ]


def _finite(lines: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """NaN as None, which JSON can say."""
    return [
        {name: x if np.isfinite(x) else None for name, x in line.items()}
        for line in lines
    ]


def _say(show: bool, line: str) -> None:
    if show:
        print(line, flush=True)
