"""The host's loop: visits the devices every second or so, and keeps what they did.

    advance n updates -> log their rows -> checkpoint where one is due -> show -> again

Rows are on disk before their checkpoint is, and a resumed run drops the rows that its
checkpoint has not seen, so no line is lost or repeated wherever the process died.
How many updates are made between visits changes no bit of the result.
"""

import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxpg.envs.base import Environment
from jaxpg.policies import Policy
from jaxpg.train.config import TrainConfig
from jaxpg.train.evaluate import evaluate, summarize
from jaxpg.train.log import Row, RunLog, read_metrics, read_rows
from jaxpg.train.program import MAX_UPDATES_PER_CALL, TrainState
from jaxpg.train.progress import Glance, make_progress
from jaxpg.train.provenance import describe, differences, write_json_atomically
from jaxpg.train.render import plot_learning_curve
from jaxpg.train.run import (
    Run,
    create_run,
    initial_seeds,
    load_params,
    open_run,
    restore_state,
)

__all__ = ["NonFiniteError", "RunResult", "resume", "train"]

SECONDS_BETWEEN_VISITS = 1.0


class NonFiniteError(RuntimeError):
    """Training met a NaN or an infinity and stopped."""


class RunResult(NamedTuple):
    """What a training run left behind.

    Attributes:
        folder: everything it wrote.
        update: updates made.
        metrics: its log, one array per column.
        evaluation: one summary per seed; empty if there was none.
        stopped_by: the signal that ended it early, or None.
    """

    folder: Path
    update: int
    metrics: dict[str, np.ndarray]
    evaluation: list[dict[str, float]]
    stopped_by: int | None


def train(
    config: TrainConfig | None = None,
    *,
    env: Environment | None = None,
    policy: Policy | None = None,
    show: bool = True,
) -> RunResult:
    """Train a new run to its end.

    Args:
        config: its settings; None for the defaults.
        env: an environment of your own in place of `config.env`.
        policy: a policy of your own in place of the default.
        show: whether to print progress.

    Returns:
        Where everything lies, and the metrics.

    Raises:
        ValueError: if the settings do not fit together or the folder exists.
        NonFiniteError: if parameters or gradients become NaN or infinite.
    """
    run = create_run(config or TrainConfig(), env, policy)
    _say(show, f"run folder: {run.folder}")
    state = run.program.init(initial_seeds(run.config))
    return _finish(run, *_loop(run, state, 0, show), show)


def resume(
    folder: Path | str,
    *,
    num_updates: int | None = None,
    env: Environment | None = None,
    policy: Policy | None = None,
    show: bool = True,
) -> RunResult:
    """Continue a run from its last checkpoint, to the same bits as without a break.

    Args:
        folder: of the run.
        num_updates: a new length for the run; None keeps it.
        env: as for `train`, if the run was made with one.
        policy: as for `train`, if the run was made with one.
        show: whether to print progress.

    Returns:
        Where everything lies, and the metrics.

    Raises:
        ValueError: if the folder holds no run or a checkpoint is damaged.
        NonFiniteError: if parameters or gradients become NaN or infinite.
    """
    run = open_run(folder, env, policy, num_updates=num_updates)
    for difference in differences(run.provenance, describe()):
        warnings.warn(
            f"this run may not continue to the same bits: {difference}", stacklevel=2
        )
    step = run.checkpoints.latest_step()
    if step is None:
        state, step = run.program.init(initial_seeds(run.config)), 0
    else:
        state = restore_state(run, step)
    RunLog(run.folder).rewind(step)
    _say(show, f"run folder: {run.folder} (continued from update {step})")
    return _finish(run, *_loop(run, state, step, show), show)


def _loop(
    run: Run, state: TrainState, update: int, show: bool
) -> tuple[int, int | None]:
    """Advance the run to its end or to a signal; returns where it stopped and why."""
    config = run.config
    log = RunLog(run.folder)
    env_steps = _env_steps_so_far(run)
    progress = make_progress(show, update, config.num_updates)
    advance = run.program.advance.lower(state, np.int32(1)).compile()
    pace = 1
    try:
        with _signals() as stopped_by:
            while update < config.num_updates and not stopped_by:
                due = config.checkpoint_every - update % config.checkpoint_every
                count = min(pace, due, config.num_updates - update)
                began = time.perf_counter()
                state, metrics = advance(state, np.int32(count))
                columns = {name: np.asarray(x)[:count] for name, x in metrics.items()}
                seconds = time.perf_counter() - began
                trouble = _find_non_finite(run, columns, update)
                log.append(_rows(run, columns, update, env_steps, seconds))
                if trouble:
                    raise NonFiniteError(trouble)
                update += count
                if update % config.checkpoint_every == 0:
                    _checkpoint(run, state, update)
                progress.show(
                    _glance(config, columns, env_steps, update, count, seconds)
                )
                pace = _next_pace(count, seconds)
            _checkpoint(run, state, update)
    finally:
        progress.close()
    return update, stopped_by[0] if stopped_by else None


def _finish(run: Run, update: int, stopped_by: int | None, show: bool) -> RunResult:
    folder = run.folder
    rows = read_rows(folder)
    if rows:
        title = f"{run.config.env}, {run.config.algorithm_name}"
        plot_learning_curve(rows, folder / "learning_curve.png", title)
    evaluation: list[dict[str, float]] = []
    if run.config.eval_episodes and stopped_by is None:
        evaluation = _evaluate_all_seeds(run)
        write_json_atomically(folder / "evaluation.json", evaluation)
    return RunResult(folder, update, read_metrics(folder), evaluation, stopped_by)


def _evaluate_all_seeds(run: Run) -> list[dict[str, float]]:
    """The last policy of each seed on fresh episodes, actions drawn as in training."""
    _, trees = load_params(run)
    keys = [
        jax.random.fold_in(jax.random.key(run.config.seed + s), 0x5EED)
        for s in range(len(trees))
    ]
    count = run.config.eval_episodes
    return [
        {"seed": run.config.seed + s}
        | summarize(evaluate(run.env, run.policy, params, key, count))
        for s, (params, key) in enumerate(zip(trees, keys, strict=True))
    ]


def _rows(
    run: Run,
    columns: dict[str, np.ndarray],
    update: int,
    env_steps: np.ndarray,
    seconds: float,
) -> list[Row]:
    """One row per update and seed; adds the steps taken to `env_steps`."""
    count = len(columns["num_steps"])
    rate = float(columns["num_steps"].sum()) / seconds
    rows: list[Row] = []
    for i in range(count):
        env_steps += columns["num_steps"][i]
        for s in range(run.config.num_seeds):
            row: Row = {
                "update": update + i + 1,
                "seed": run.config.seed + s,
                "env_steps": int(env_steps[s]),
            }
            row |= {name: values[i, s].item() for name, values in columns.items()}
            row |= {"seconds": seconds / count, "steps_per_second": rate}
            rows.append(row)
    return rows


def _env_steps_so_far(run: Run) -> np.ndarray:
    """Steps of each seed up to the last row of the log."""
    env_steps = np.zeros(run.config.num_seeds, np.int64)
    for row in read_rows(run.folder)[-run.config.num_seeds :]:
        env_steps[cast(int, row["seed"]) - run.config.seed] = cast(
            int, row["env_steps"]
        )
    return env_steps


def _find_non_finite(
    run: Run, columns: dict[str, np.ndarray], update: int
) -> str | None:
    """What went wrong first, or None; the columns lose what came after it."""
    flags = {n: x for n, x in columns.items() if n.startswith("non_finite_")}
    bad = np.argwhere(sum(flags.values()) > 0)
    if not len(bad):
        return None
    index, seed = bad[0]
    for name in columns:
        columns[name] = columns[name][: index + 1]
    what = " and ".join(
        f"{int(x[index, seed])} entries of the {n.removeprefix('non_finite_')}"
        for n, x in flags.items()
        if x[index, seed]
    )
    last = run.checkpoints.latest_step()
    good = (
        "no checkpoint was made before"
        if last is None
        else f"the last good checkpoint is that of update {last} in {run.folder}"
    )
    return (
        f"NaN or infinity at update {update + index + 1}, seed "
        f"{run.config.seed + seed}: {what}; {good}. Try a smaller learning rate, "
        "or max_grad_norm"
    )


def _checkpoint(run: Run, state: TrainState, update: int) -> None:
    if update in run.checkpoints.steps():
        return
    rows = [row for row in read_rows(run.folder) if row["update"] == update]
    returns = [float(row["mean_return"] or 0.0) for row in rows]
    run.checkpoints.save(update, state, float(np.mean(returns)) if rows else None)


def _glance(
    config: TrainConfig,
    columns: dict[str, np.ndarray],
    env_steps: np.ndarray,
    update: int,
    count: int,
    seconds: float,
) -> Glance:
    return Glance(
        update=update,
        num_updates=config.num_updates,
        env_steps=int(env_steps.sum()),
        steps_per_second=float(columns["num_steps"].sum()) / seconds,
        mean_return=float(columns["mean_return"][-1].mean()),
        seconds_left=(config.num_updates - update) * seconds / count,
    )


def _next_pace(count: int, seconds: float) -> int:
    """Updates until the next visit."""
    wanted = round(count * SECONDS_BETWEEN_VISITS / max(seconds, 1e-6))
    return max(1, min(wanted, 2 * count, MAX_UPDATES_PER_CALL))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, to end between visits; a second one ends at once."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {n: signal.signal(n, remember) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be caught
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _say(show: bool, line: str) -> None:
    if show:
        print(line, flush=True)
