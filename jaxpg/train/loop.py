"""The host's loop: visits the devices every second or so, and keeps what they did.

    advance n updates -> log their rows -> checkpoint where one is due -> show -> again

Of several processes the first one decides when, and alone writes and prints; all go
through the same steps.

Rows are on disk before their checkpoint is, and a resumed run drops the rows that its
checkpoint has not seen, so no line is lost or repeated wherever the process died.
How many updates are made between visits changes no bit of the result.
"""

import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxpg.envs.base import Environment
from jaxpg.networks import Network
from jaxpg.policies import Policy
from jaxpg.train.agreement import agree, decide, is_first, wait_for_all
from jaxpg.train.config import TrainConfig
from jaxpg.train.distributed import advise
from jaxpg.train.evaluate import make_evaluator, summarize
from jaxpg.train.log import Row, RunLog, read_metrics, read_rows
from jaxpg.train.program import TrainState
from jaxpg.train.progress import Glance, make_progress
from jaxpg.train.provenance import describe, differences, write_json_atomically
from jaxpg.train.records import (
    Columns,
    env_steps_so_far,
    find_non_finite,
    to_rows,
)
from jaxpg.train.render import plot_learning_curve
from jaxpg.train.run import (
    Run,
    create_run,
    initial_state,
    load_params,
    open_run,
    restore_state,
    store_config,
)
from jaxpg.train.sweeps import plot_sweep, summarize_sweep, write_sweep
from jaxpg.train.visits import next_pace, received_signals

__all__ = ["NonFiniteError", "RunResult", "resume", "train"]


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
        sweep: medians and quartiles over seeds, one line per combination of swept
            values; empty where nothing is swept.
    """

    folder: Path
    update: int
    metrics: dict[str, np.ndarray]
    evaluation: list[dict[str, float]]
    stopped_by: int | None
    sweep: list[dict[str, float | None]]


def train(
    config: TrainConfig | None = None,
    *,
    env: Environment | None = None,
    policy: Policy | None = None,
    critic: Network | None = None,
    show: bool = True,
) -> RunResult:
    """Train a new run to its end.

    Args:
        config: its settings; None for the defaults.
        env: an environment of your own in place of `config.env`.
        policy: a policy of your own in place of the default.
        critic: a critic of your own in place of the default.
        show: whether to print progress.

    Returns:
        Where everything lies, and the metrics.

    Raises:
        ValueError: if the settings do not fit together or the folder exists.
        NonFiniteError: if parameters or gradients become NaN or infinite.
    """
    run = create_run(config or TrainConfig(), env, policy, critic)
    _say(show, f"run folder: {run.folder}")
    return _finish(run, *_loop(run, initial_state(run), 0, show), show)


def resume(
    folder: Path | str,
    *,
    num_updates: int | None = None,
    num_devices: int | None = None,
    from_update: int | None = None,
    env: Environment | None = None,
    policy: Policy | None = None,
    critic: Network | None = None,
    show: bool = True,
) -> RunResult:
    """Continue a run from its last checkpoint, to the same bits as without a break.

    On another number of devices or processes it continues to the same results but for
    the rounding of sums.

    Args:
        folder: of the run.
        num_updates: a new length for the run; None keeps it.
        num_devices: devices from now on, over all processes; None keeps their number.
        from_update: go on from this checkpoint and drop later ones; None for the last.
        env: as for `train`, if the run was made with one.
        policy: as for `train`, if the run was made with one.
        critic: as for `train`, if the run was made with one.
        show: whether to print progress.

    Returns:
        Where everything lies, and the metrics.

    Raises:
        ValueError: if the folder holds no run or a checkpoint is damaged.
        NonFiniteError: if parameters or gradients become NaN or infinite.
    """
    run = open_run(
        folder, env, policy, critic, num_updates=num_updates, num_devices=num_devices
    )
    for difference in differences(run.provenance, describe()) if is_first() else ():
        warnings.warn(
            f"this run may not continue to the same bits: {difference}", stacklevel=2
        )
    latest = decide(run.checkpoints.latest_step)
    step = latest if from_update is None else from_update
    state = initial_state(run) if step is None else restore_state(run, step)
    step = step or 0
    if run.config.num_updates < step:
        raise ValueError(
            f"num_updates is {run.config.num_updates}, but the run has made {step} "
            f"already; needs at least {step}"
        )
    # Only now that the checkpoint was read is anything on disk touched.
    wait_for_all("the checkpoint is read")
    run.checkpoints.rewind(step)
    if is_first():
        RunLog(run.folder).rewind(step)
        if (num_updates, num_devices) != (None, None):
            store_config(run)  # a later resume goes on like this one
    _say(show, f"run folder: {run.folder} (continued from update {step})")
    return _finish(run, *_loop(run, state, step, show), show)


def _loop(
    run: Run, state: TrainState, update: int, show: bool
) -> tuple[int, int | None]:
    """Advance the run to its end or to a signal; returns where it stopped and why."""
    config = run.config
    log = RunLog(run.folder) if is_first() else None
    env_steps = env_steps_so_far(run)
    progress = make_progress(show and is_first(), update, config.num_updates)
    advise(f"continue the run with: jaxpg train --resume {run.folder}")
    pace, stopped_by = 1, 0
    try:
        advance = run.program.advance.lower(state, np.int32(1)).compile()
        wait_for_all("the program is compiled")
        with received_signals() as received:
            while update < config.num_updates and not stopped_by:
                due = config.checkpoint_every - update % config.checkpoint_every
                count = min(pace, due, config.num_updates - update)
                began = time.perf_counter()
                state, metrics = advance(state, np.int32(count))
                columns = {name: np.asarray(x)[:count] for name, x in metrics.items()}
                seconds = time.perf_counter() - began
                trouble = find_non_finite(run, columns, update)
                rows = to_rows(run, columns, update, env_steps, seconds)
                if log is not None:
                    log.append(rows)
                if trouble:
                    raise NonFiniteError(trouble)
                update += count
                if update % config.checkpoint_every == 0:
                    _checkpoint(run, state, update)
                progress.show(
                    _glance(config, columns, env_steps, update, count, seconds)
                )
                stopped_by, pace = agree(max(received), next_pace(count, seconds))
            _checkpoint(run, state, update)
    finally:
        progress.close()
    return update, stopped_by or None


def _finish(run: Run, update: int, stopped_by: int | None, show: bool) -> RunResult:
    evaluation, sweep = decide(lambda: _look_back(run, stopped_by))
    metrics = read_metrics(run.folder)
    return RunResult(run.folder, update, metrics, evaluation, stopped_by, sweep)


def _look_back(
    run: Run, stopped_by: int | None
) -> tuple[list[dict[str, float]], list[dict[str, float | None]]]:
    """Pictures, evaluation and the table of what was swept."""
    folder = run.folder
    rows = read_rows(folder)
    if _learned(rows):
        swept = [name for name, _ in run.config.sweep]
        plot_learning_curve(rows, folder / "learning_curve.png", _title(run), by=swept)
    evaluation: list[dict[str, float]] = []
    if run.config.eval_episodes and stopped_by is None:
        evaluation = _evaluate_all_seeds(run)
        write_json_atomically(folder / "evaluation.json", _finite(evaluation))
    return evaluation, _keep_sweep(run, rows, evaluation)


def _title(run: Run) -> str:
    return f"{run.env.name}, {run.config.algorithm_name}"


def _learned(rows: list[Row]) -> bool:
    """Whether any episode has ended: in short segments of long ones none may have."""
    return any(row["mean_return"] is not None for row in rows)


def _keep_sweep(
    run: Run, rows: list[Row], evaluation: list[dict[str, float]]
) -> list[dict[str, float | None]]:
    """The table of what was swept, kept in the folder with its picture."""
    swept = [name for name, _ in run.config.sweep]
    if not swept or not rows:
        return []
    table = summarize_sweep(rows, evaluation, swept)
    write_sweep(table, run.folder)
    if _learned(rows):
        plot_sweep(rows, evaluation, swept, run.folder / "sweep.png", _title(run))
    return table


def _evaluate_all_seeds(run: Run) -> list[dict[str, float]]:
    """The last policy of each seed on fresh episodes, actions drawn as in training."""
    _, trees = load_params(run)
    members = run.config.members()
    keys = [
        jax.random.fold_in(jax.random.key(member["seed"]), 0x5EED) for member in members
    ]
    play = make_evaluator(run.env, run.policy, run.config.eval_episodes)
    return [
        member | summarize(play(params, key))
        for member, params, key in zip(members, trees, keys, strict=True)
    ]


def _finite(rows: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """NaN as None, which JSON can say: one episode has no standard error."""
    return [
        {name: x if np.isfinite(x) else None for name, x in row.items()} for row in rows
    ]


def _checkpoint(run: Run, state: TrainState, update: int) -> None:
    if decide(lambda: update in run.checkpoints.steps()):
        return
    rows = [row for row in read_rows(run.folder) if row["update"] == update]
    known = [float(r["mean_return"]) for r in rows if r["mean_return"] is not None]
    run.checkpoints.save(update, state, float(np.mean(known)) if known else None)


def _glance(
    config: TrainConfig,
    columns: Columns,
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
        mean_return=_last_known(columns["mean_return"]),
        seconds_left=(config.num_updates - update) * seconds / count,
    )


def _last_known(returns: np.ndarray) -> float:
    """The mean over members of the last update in which episodes ended; or NaN."""
    means = returns.mean(axis=1)
    known = means[np.isfinite(means)]
    return float(known[-1]) if len(known) else float("nan")


def _say(show: bool, line: str) -> None:
    if show and is_first():
        print(line, flush=True)
