"""A system's run on disk: the folder of any other run, with a system in its header.

config.json            system, settings, versions and devices
metrics.jsonl, .csv    one row per update and seed
checkpoints/           the last few states
learning_curve.png     the headline of the evaluations against updates
evaluation.json        the evaluation at the end
picture.png            what the first seed has learned, where that can be seen
"""

import dataclasses
import time
import typing
from pathlib import Path
from typing import Any, NamedTuple

from jaxpg._checks import check_choice
from jaxpg.systems.base import RunSettings, System
from jaxpg.systems.program import SystemProgram, build_system_program
from jaxpg.systems.registry import SYSTEMS
from jaxpg.train.checkpoint import CheckpointStore
from jaxpg.train.provenance import describe, write_json_atomically
from jaxpg.train.run import SCHEMA, read_stored

__all__ = ["SystemRun", "create_run", "is_system_run", "open_run", "read_settings"]


class SystemRun(NamedTuple):
    """A system's run that can go on, be evaluated or be looked at.

    Attributes:
        folder: where it lives.
        name: of the system.
        config: settings of the run.
        settings: settings of the system.
        system: what is trained.
        program: its compiled functions.
        checkpoints: its states.
        provenance: versions and devices that it was begun with.
    """

    folder: Path
    name: str
    config: RunSettings
    settings: Any
    system: System
    program: SystemProgram
    checkpoints: CheckpointStore
    provenance: dict[str, Any]


def create_run(
    name: str, settings: Any = None, config: RunSettings | None = None
) -> SystemRun:
    """Make the folder of a new run.

    Args:
        name: of the system.
        settings: of the system; None for its own defaults.
        config: of the run; None for the system's own.

    Returns:
        The run, before its first update.

    Raises:
        ValueError: if the system is unknown, its settings do not fit together, or the
            folder exists already.
    """
    check_choice("system", name, SYSTEMS)
    recipe = SYSTEMS[name]
    settings = recipe.settings() if settings is None else settings
    config = recipe.run if config is None else config
    usual = f"{name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = config.runs_dir / (config.name or usual)
    if folder.exists():
        raise ValueError(
            f"run folder {folder} exists already; choose another --name, or continue "
            f"it with --resume {folder}"
        )
    run = _assemble(folder, name, config, settings, describe())
    folder.mkdir(parents=True)
    store_settings(run)
    return run


def open_run(folder: Path | str, *, num_updates: int | None = None) -> SystemRun:
    """Open the folder of a run.

    Args:
        folder: as printed by training.
        num_updates: a new length for the run; None keeps it.

    Returns:
        The run as it was left.

    Raises:
        ValueError: if the folder holds no run of a system that is known.
    """
    name, config, settings = read_settings(folder)
    if num_updates is not None:
        config = dataclasses.replace(config, num_updates=num_updates)
    provenance = read_stored(folder)["provenance"]
    return _assemble(Path(folder), name, config, settings, provenance)


def is_system_run(folder: Path | str) -> bool:
    """Whether a folder holds a system's run, and no policy's.

    Raises:
        ValueError: if it holds no run at all.
    """
    return "system" in read_stored(folder)


def read_settings(folder: Path | str) -> tuple[str, RunSettings, Any]:
    """The system of a run, the settings of the run and those of the system.

    Raises:
        ValueError: if the folder holds no run of a system that is known.
    """
    stored = read_stored(folder)
    if "system" not in stored:
        raise ValueError(
            f"{folder} holds a run of a policy, needs one of a system; open it with "
            "jaxpg.train.run.open_run"
        )
    name = stored["system"]
    check_choice("system", name, SYSTEMS)
    config = _from_json(RunSettings, stored["run"])
    return name, config, _from_json(SYSTEMS[name].settings, stored["settings"])


def store_settings(run: SystemRun) -> None:
    """Put a run's present settings in place of those that its folder holds."""
    stored = {
        "schema": SCHEMA,
        "system": run.name,
        "run": _to_json(run.config),
        "settings": _to_json(run.settings),
        "provenance": run.provenance,
    }
    write_json_atomically(run.folder / "config.json", stored)


def _assemble(
    folder: Path,
    name: str,
    config: RunSettings,
    settings: Any,
    provenance: dict[str, Any],
) -> SystemRun:
    system = SYSTEMS[name].make(settings)
    return SystemRun(
        folder,
        name,
        config,
        settings,
        system,
        build_system_program(system, config),
        CheckpointStore(folder / "checkpoints", config.keep_checkpoints),
        provenance,
    )


def _to_json(settings: Any) -> dict[str, Any]:
    return {
        name: str(x) if isinstance(x, Path) else list(x) if isinstance(x, tuple) else x
        for name, x in dataclasses.asdict(settings).items()
    }


def _from_json(kind: type, tree: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)

    def value_of(name: str, x: Any) -> Any:
        if isinstance(x, str) and Path in (hints[name], *typing.get_args(hints[name])):
            return Path(x)
        return tuple(x) if isinstance(x, list) else x

    known = {field.name for field in dataclasses.fields(kind)}
    for name in tree:
        check_choice(f"setting of {kind.__name__}", name, known)
    return kind(**{name: value_of(name, x) for name, x in tree.items()})
