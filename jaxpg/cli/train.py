"""`jaxpg train`."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from jaxpg._checks import check_choice
from jaxpg.cli.process import set_up_jax
from jaxpg.cli.systems import resumes_system, train_system
from jaxpg.cli.words import (
    Sweep,
    UsageError,
    differences,
    parse,
    take_sweeps,
    value_of,
)
from jaxpg.systems.registry import SYSTEMS
from jaxpg.train import distributed
from jaxpg.train.agreement import is_first
from jaxpg.train.config import ALGORITHMS, TrainConfig
from jaxpg.train.tuned import tuned

__all__ = ["TrainOptions", "train_command"]

FREE_ON_RESUME = ("num_updates", "num_devices")
"""Settings that a run may be continued with other values of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a policy. With no option at all: REINFORCE on CartPole-v1.

    Defaults are those of the algorithm, or, where the library has settings for the pair
    of algorithm and environment, those. A population: --num-seeds 5, or
    --sweep learning_rate 1e-4 3e-4 1e-3 (which may be given several times)."""

    config: TrainConfig
    resume: Path | None = None
    """Folder of a run to continue from its last checkpoint. Its settings hold; only
    --num-updates and --num-devices may be given new values."""
    from_update: int | None = None
    """With --resume: go on from the checkpoint of this update and drop later ones, for
    example because the last one is damaged."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder: the next start is faster."""
    distributed: bool = False
    """Be one of several processes of one run, each started with the same words but for
    its number. SLURM, Open MPI, Kubernetes and TPU slices need no more than this."""
    coordinator: str | None = None
    """With --distributed: HOST:PORT of process 0, a port that is free there. Unset:
    JAX_COORDINATOR_ADDRESS, or what the cluster says."""
    num_processes: int | None = None
    """With --distributed: how many processes there are. Unset: JAX_NUM_PROCESSES, or
    what the cluster says."""
    process_id: int | None = None
    """With --distributed: which one this is, from 0. Unset: JAX_PROCESS_ID, or what the
    cluster says."""
    connect_timeout: float = 120.0
    """With --distributed: seconds to wait for the other processes."""

    def __post_init__(self) -> None:
        for name in ("coordinator", "num_processes", "process_id"):
            if getattr(self, name) is not None and not self.distributed:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is for --distributed, which is not given")


def train_command(words: list[str]) -> int:
    """Train a policy or a system, or go on with a run."""
    name = words.pop(0) if words and not words[0].startswith("-") else None
    if name in SYSTEMS or (name is None and resumes_system(words)):
        return train_system(name, words)
    algorithm = name or "reinforce"
    options = _parse_train(algorithm, words)
    _start_jax(options)
    from jaxpg.train.loop import resume, train

    if options.resume is not None:
        result = resume(
            options.resume,
            num_updates=options.config.num_updates,
            num_devices=options.config.num_devices,
            from_update=options.from_update,
        )
    else:
        result = train(options.config)
    return _report(result)


def _parse_train(algorithm: str, words: list[str]) -> TrainOptions:
    try:
        check_choice("algorithm", algorithm, [*ALGORITHMS, *SYSTEMS])
    except ValueError as error:
        raise UsageError(error) from error
    words, sweep = take_sweeps(words)
    config = tuned(value_of("--env", words, TrainConfig.env), algorithm)
    program = f"jaxpg train {algorithm}"
    options = parse(TrainOptions, words, program, TrainOptions(config=config))
    options = _with_sweep(options, sweep)
    if options.resume is None:
        return options
    from jaxpg.train.run import read_config

    # The run's own settings as defaults: what then differs was asked for by name.
    stored, _ = read_config(options.resume)
    # But for its sweep: tyro cannot have several settings' values for a default.
    default = dataclasses.replace(stored, sweep=())
    options = parse(TrainOptions, words, program, TrainOptions(config=default))
    options = _with_sweep(options, sweep or stored.sweep)
    free = {name: getattr(options.config, name) for name in FREE_ON_RESUME}
    expected = dataclasses.replace(stored, **free)
    if options.config != expected:
        changed = ", ".join(differences(expected, options.config))
        raise UsageError(
            f"{options.resume} was trained with other settings ({changed}); leave them "
            "out, or start a new run without --resume"
        )
    return options


def _with_sweep(options: TrainOptions, sweep: Sweep) -> TrainOptions:
    if not sweep:
        return options
    try:
        config = dataclasses.replace(options.config, sweep=sweep)
    except ValueError as error:
        raise UsageError(error) from error
    return dataclasses.replace(options, config=config)


def _start_jax(options: TrainOptions) -> None:
    """What JAX must know before its first computation: settings, other processes."""
    wanted = options.config.num_devices or 1
    if not options.distributed:
        set_up_jax(wanted, options.compilation_cache)
        return
    mine = options.coordinator, options.num_processes, options.process_id
    num_processes = distributed.find_group(*mine).num_processes
    set_up_jax(math.ceil(wanted / num_processes), options.compilation_cache)
    distributed.connect(*mine, timeout=options.connect_timeout)


def _report(result: Any) -> int:
    if is_first():
        _print_report(result)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _print_report(result: Any) -> None:
    from jaxpg.train.progress import table
    from jaxpg.train.sweeps import describe_sweep

    if result.stopped_by is not None:
        print(
            f"interrupted after update {result.update}; continue with: "
            f"jaxpg train --resume {result.folder}"
        )
        return
    if result.sweep:
        what = "Mean return, median (and quartiles) over seeds"
        table(what, describe_sweep(result.sweep))
    elif result.evaluation:
        table("Evaluation, actions drawn from the policy", result.evaluation)
    print(f"run folder: {result.folder}")
    if result.evaluation and not result.sweep:  # a mean over settings means nothing
        means = [row["mean"] for row in result.evaluation]
        print(f"mean {sum(means) / len(means):.2f}")
