"""`jaxpg train SYSTEM` and `jaxpg eval` of its run."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxpg.cli.process import set_up_jax
from jaxpg.cli.words import UsageError, differences, parse, value_of
from jaxpg.systems.registry import SYSTEMS
from jaxpg.systems.runs import is_system_run, read_settings

__all__ = ["evaluate_system", "resumes_system", "train_system"]

SYSTEM_HELP = """Train a system that has no environment: {summary}.

Leaves a log, checkpoints, a learning curve and, where there is something to see, a
picture in the run's folder. Several seeds side by side: --num-seeds 5."""


def resumes_system(words: list[str]) -> bool:
    """Whether the run that is to be continued is a system's."""
    folder = value_of("--resume", words, None)
    return bool(folder) and is_system_run(folder)


def train_system(name: str | None, words: list[str]) -> int:
    """Train a system, or go on with a run of it, whose name may then be left out."""
    folder = value_of("--resume", words, None)
    stored = read_settings(folder) if folder else None
    name = name or (stored[0] if stored else "")
    if stored and name != stored[0]:
        raise UsageError(f"{folder} holds a run of {stored[0]}, not of {name}")
    recipe = SYSTEMS[name]
    options = _system_options(name)
    default = options(
        run=stored[1] if stored else recipe.run,
        system=stored[2] if stored else recipe.settings(),
    )
    parsed = parse(options, words, f"jaxpg train {name}", default)
    set_up_jax(1, parsed.compilation_cache)
    from jaxpg.systems import training

    if stored is None:
        return _report_system(training.train(name, parsed.system, parsed.run))
    free = dataclasses.replace(stored[1], num_updates=parsed.run.num_updates)
    changed = differences(free, parsed.run) + differences(stored[2], parsed.system)
    if changed:
        raise UsageError(
            f"{folder} was trained with other settings ({', '.join(changed)}); leave "
            "them out, or start a new run without --resume"
        )
    return _report_system(
        training.resume(
            folder,
            num_updates=parsed.run.num_updates,
            from_update=parsed.from_update,
        )
    )


def _system_options(name: str) -> type:
    recipe = SYSTEMS[name]
    return dataclasses.make_dataclass(
        "SystemOptions",
        [
            ("run", type(recipe.run)),
            ("system", recipe.settings),
            ("resume", Path | None, None),
            ("from_update", int | None, None),
            ("compilation_cache", bool, True),
        ],
        frozen=True,
        kw_only=True,
        namespace={"__doc__": SYSTEM_HELP.format(summary=recipe.summary)},
    )


def _report_system(result: Any) -> int:
    from jaxpg.train.progress import table

    if result.stopped_by is not None:
        print(
            f"interrupted after update {result.update}; continue with: "
            f"jaxpg train --resume {result.folder}"
        )
        return 128 + result.stopped_by
    table("Evaluation", result.evaluation)
    print(f"run folder: {result.folder}")
    return 0


def evaluate_system(folder: Path, wanted: str) -> int:
    """Evaluate a checkpoint: latest, or the number of an update."""
    from jaxpg.systems.runs import open_run
    from jaxpg.systems.training import evaluate, load_state
    from jaxpg.train.progress import table

    run = open_run(folder)
    if wanted != "latest" and not wanted.isdigit():
        raise ValueError(
            f"checkpoint is {wanted!r}, needs latest or the number of an update: a "
            "system's run keeps no best one"
        )
    step, _ = load_state(run, None if wanted == "latest" else int(wanted))
    table(f"{run.name}, update {step}", evaluate(run, step))
    return 0
