"""What the host keeps of one visit: rows for the log, and the first sign of trouble.

`columns` below are a visit's metrics by name, each [updates, seeds].
"""

from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from jaxpg.train.checkpoint import CheckpointStore
from jaxpg.train.log import Row, read_rows
from jaxpg.train.run import Run

__all__ = ["Columns", "env_steps_so_far", "find_non_finite", "to_rows"]

Columns = dict[str, np.ndarray]


@runtime_checkable
class Watched(Protocol):
    """What must be known of a run to say where it went wrong."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Any: ...
    @property
    def checkpoints(self) -> CheckpointStore: ...


def to_rows(
    run: Run, columns: Columns, update: int, env_steps: np.ndarray, seconds: float
) -> list[Row]:
    """One row per update and member; adds the steps taken to `env_steps`.

    Args:
        run: whose rows they are.
        columns: the visit's metrics.
        update: updates made before the visit.
        env_steps: steps of each member before the visit, [S]; changed in place.
        seconds: how long the visit's updates took.

    Returns:
        Rows in order of update, then of member.
    """
    count = len(columns["num_steps"])
    rate = float(columns["num_steps"].sum()) / seconds
    rows: list[Row] = []
    for i in range(count):
        env_steps += columns["num_steps"][i]
        for s, member in enumerate(run.config.members()):
            row: Row = {"update": update + i + 1, **member}
            row["env_steps"] = int(env_steps[s])
            row |= {name: values[i, s].item() for name, values in columns.items()}
            row |= {"seconds": seconds / count, "steps_per_second": rate}
            rows.append(row)
    return rows


def env_steps_so_far(run: Run) -> np.ndarray:
    """Steps of each member up to the last row of the log, [S]."""
    env_steps = np.zeros(run.config.num_members, np.int64)
    for index, row in enumerate(read_rows(run.folder)[-run.config.num_members :]):
        env_steps[index] = cast(int, row["env_steps"])
    return env_steps


def find_non_finite(run: Watched, columns: Columns, update: int) -> str | None:
    """What went wrong first, or None; the columns lose what came after it.

    Args:
        run: for its seeds and its last good checkpoint.
        columns: the visit's metrics; cut in place behind the first bad update.
        update: updates made before the visit.

    Returns:
        A sentence that names update, seed, what was not finite and the cure.
    """
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
    member = run.config.members()[seed]
    last = run.checkpoints.latest_step()
    good = (
        "no checkpoint was made before"
        if last is None
        else f"the last good checkpoint is that of update {last} in {run.folder}"
    )
    return (
        f"NaN or infinity at update {update + index + 1}, {_spoken(member)}: {what}; "
        f"{good}. Try a smaller learning rate, or max_grad_norm"
    )


def _spoken(member: dict[str, float]) -> str:
    """A member's seed and swept values, such as "seed 3, learning_rate 0.1"."""
    return ", ".join(f"{name} {value:g}" for name, value in member.items())
