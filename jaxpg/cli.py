"""The command line: train, eval, study, list.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (143 if terminated).
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxpg._checks import check_choice, check_positive
from jaxpg._version import __version__
from jaxpg.algos.registry import RECIPES
from jaxpg.systems.registry import SYSTEMS
from jaxpg.systems.runs import is_system_run, read_settings
from jaxpg.train import distributed
from jaxpg.train.agreement import is_first
from jaxpg.train.config import ALGORITHMS, TrainConfig
from jaxpg.train.tuned import tuned

__all__ = ["main"]

EVALUATION = 0xE7A1

FREE_ON_RESUME = ("num_updates", "num_devices")
"""Settings that a run may be continued with other values of."""

Sweep = tuple[tuple[str, tuple[float, ...]], ...]

USAGE = """\
usage: jaxpg COMMAND [OPTIONS]

Policy gradients in JAX.

commands:
  train [ALGORITHM]        train a policy (default: reinforce on CartPole-v1)
  train SYSTEM             train a system that has no environment
  train --resume RUN       continue an interrupted or finished run
  train --distributed      as one of several processes, usually on several hosts
  eval RUN                 evaluate a trained policy on whole episodes, or a system
  study KIND               measure estimators: variance, off-policy, learning,
                           batch-size
  list envs|algorithms|systems
                           what there is to choose from

options:
  --version                print the version
  -h, --help               print this; 'jaxpg COMMAND --help' tells more

Any command takes --debug, which shows the traceback of an error.
"""


STUDY_HELP = """Study {summary}.

--quick begins from settings that finish within two minutes on two cores; other options
still hold. --resume FOLDER goes on with a study that was interrupted, with its own
settings. Leaves report.html, figures, results.csv and results.json."""


SYSTEM_HELP = """Train a system that has no environment: {summary}.

Leaves a log, checkpoints, a learning curve and, where there is something to see, a
picture in the run's folder. Several seeds side by side: --num-seeds 5."""


class UsageError(Exception):
    """The command line itself is wrong: exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words; None takes them from the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except UsageError as error:
        return _complain(error, 2, debug)
    except SystemExit as error:  # tyro has printed its help or its complaint
        return int(error.code or 0)
    except KeyboardInterrupt:
        return _complain(KeyboardInterrupt("interrupted"), 130, debug)
    except Exception as error:
        return _complain(error, 1, debug)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        print(f"jaxpg {__version__}")
        return 0
    commands = {"train": _train, "eval": _eval, "study": _study, "list": _list}
    try:
        check_choice("command", words[0], commands)
    except ValueError as error:
        raise UsageError(error) from error
    return commands[words[0]](words[1:])


def _complain(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    if told := distributed.explain(message):
        print(f"jaxpg: error: {told}", file=sys.stderr)
    distributed.give_up(message, code)
    return code


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


def _train(words: list[str]) -> int:
    name = words.pop(0) if words and not words[0].startswith("-") else None
    if name in SYSTEMS or (name is None and _resumes_system(words)):
        return _train_system(name, words)
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
    words, sweep = _take_sweeps(words)
    config = tuned(_env_of(words), algorithm)
    program = f"jaxpg train {algorithm}"
    options = _parse(TrainOptions, words, program, TrainOptions(config=config))
    options = _with_sweep(options, sweep)
    if options.resume is None:
        return options
    from jaxpg.train.run import read_config

    # The run's own settings as defaults: what then differs was asked for by name.
    stored, _ = read_config(options.resume)
    # But for its sweep: tyro cannot have several settings' values for a default.
    default = dataclasses.replace(stored, sweep=())
    options = _parse(TrainOptions, words, program, TrainOptions(config=default))
    options = _with_sweep(options, sweep or stored.sweep)
    free = {name: getattr(options.config, name) for name in FREE_ON_RESUME}
    expected = dataclasses.replace(stored, **free)
    if options.config != expected:
        changed = ", ".join(_differences(expected, options.config))
        raise UsageError(
            f"{options.resume} was trained with other settings ({changed}); leave them "
            "out, or start a new run without --resume"
        )
    return options


def _env_of(words: list[str], default: Any = TrainConfig.env) -> Any:
    """The environment that is asked for, before anything else is known."""
    return _value_of("--env", words, default)


def _value_of(flag: str, words: list[str], default: Any) -> Any:
    for word, following in itertools.pairwise([*words, ""]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return default


def _resumes_system(words: list[str]) -> bool:
    folder = _value_of("--resume", words, None)
    return bool(folder) and is_system_run(folder)


def _train_system(name: str | None, words: list[str]) -> int:
    folder = _value_of("--resume", words, None)
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
    parsed = _parse(options, words, f"jaxpg train {name}", default)
    _set_up_jax(1, parsed.compilation_cache)
    from jaxpg.systems import training

    if stored is None:
        return _report_system(training.train(name, parsed.system, parsed.run))
    free = dataclasses.replace(stored[1], num_updates=parsed.run.num_updates)
    changed = _differences(free, parsed.run) + _differences(stored[2], parsed.system)
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


def _take_sweeps(words: list[str]) -> tuple[list[str], Sweep]:
    """Take `--sweep NAME VALUE VALUE ...` out of the words, each time it is there."""
    rest, sweeps = list(words), []
    while "--sweep" in rest:
        begin = rest.index("--sweep")
        taken = list(
            itertools.takewhile(lambda x: not x.startswith("--"), rest[begin + 1 :])
        )
        del rest[begin : begin + 1 + len(taken)]
        try:
            name, *values = taken
            sweeps.append((name.replace("-", "_"), tuple(float(x) for x in values)))
        except ValueError as error:
            raise UsageError(
                f"{' '.join(['--sweep', *taken])} needs the name of a setting and "
                "numbers, for example --sweep learning_rate 1e-4 3e-4 1e-3"
            ) from error
    return rest, tuple(sweeps)


def _with_sweep(options: TrainOptions, sweep: Sweep) -> TrainOptions:
    if not sweep:
        return options
    try:
        config = dataclasses.replace(options.config, sweep=sweep)
    except ValueError as error:
        raise UsageError(error) from error
    return dataclasses.replace(options, config=config)


def _differences(old: Any, new: Any) -> list[str]:
    found = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before):
            found += _differences(before, after)
        elif before != after:
            found.append(f"{field.name} was {before}, now {after}")
    return found


def _start_jax(options: TrainOptions) -> None:
    """What JAX must know before its first computation: settings, other processes."""
    wanted = options.config.num_devices or 1
    if not options.distributed:
        _set_up_jax(wanted, options.compilation_cache)
        return
    mine = options.coordinator, options.num_processes, options.process_id
    num_processes = distributed.find_group(*mine).num_processes
    _set_up_jax(math.ceil(wanted / num_processes), options.compilation_cache)
    distributed.connect(*mine, timeout=options.connect_timeout)


def _set_up_jax(num_devices: int, use_cache: bool) -> None:
    """Settings that JAX must know before its first computation."""
    import jax

    # Resuming to the bit needs sums in a fixed order; on CPU they are so anyway.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Never fewer than cores: a resumed run must find as many as a new one.
        with contextlib.suppress(RuntimeError):  # JAX runs already, with its devices
            jax.config.update("jax_num_cpu_devices", max(num_devices, cores))
    if use_cache:
        _use_compilation_cache()


def _use_compilation_cache() -> None:
    import jax
    import platformdirs

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = platformdirs.user_cache_path("jaxpg") / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate a trained policy on whole episodes; the last line is 'mean NUMBER'."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, as printed by training."""
    episodes: int = 1000
    """Episodes, for each seed of the run."""
    greedy: bool = False
    """Take the policy's mode instead of drawing from it."""
    gymnasium: bool = False
    """Evaluate in the real Gymnasium environment of the same name, on the CPU."""
    checkpoint: str = "latest"
    """Which checkpoint: latest, the number of an update, or best: the one whose last
    update was made from the batch with the highest mean return."""
    seed: int = 0
    """Random seed of the evaluation."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder: the next start is faster."""

    def __post_init__(self) -> None:
        check_positive("episodes", self.episodes)


def _eval(words: list[str]) -> int:
    options = _parse(EvalOptions, words, "jaxpg eval")
    if options.compilation_cache:
        _use_compilation_cache()
    from jaxpg.train.evaluate import summarize
    from jaxpg.train.progress import table

    if is_system_run(options.run):
        return _eval_system(options)
    from jaxpg.train.run import load_params, open_run

    run = open_run(options.run, num_devices=1)
    update, trees = load_params(run, options.checkpoint)
    play = _make_player(run, options)
    rows = [
        member | summarize(play(params, index))
        for index, (member, params) in enumerate(
            zip(run.config.members(), trees, strict=True)
        )
    ]
    where = "Gymnasium's" if options.gymnasium else "jaxpg's"
    how = "greedy" if options.greedy else "drawn"
    table(f"{where} {run.env.name}, update {update}, actions {how}", rows)
    print(f"mean {sum(row['mean'] for row in rows) / len(rows):.2f}")
    return 0


def _eval_system(options: EvalOptions) -> int:
    from jaxpg.systems.runs import open_run
    from jaxpg.systems.training import evaluate, load_state
    from jaxpg.train.progress import table

    run = open_run(options.run)
    wanted = options.checkpoint
    if wanted != "latest" and not wanted.isdigit():
        raise ValueError(
            f"checkpoint is {wanted!r}, needs latest or the number of an update: a "
            "system's run keeps no best one"
        )
    step, _ = load_state(run, None if wanted == "latest" else int(wanted))
    table(f"{run.name}, update {step}", evaluate(run, step))
    return 0


def _make_player(run: Any, options: EvalOptions) -> Callable[[Any, int], Any]:
    """`play(params, index) -> EpisodeResults` of the seed at that index."""
    import jax

    from jaxpg.train.evaluate import evaluate_in_gymnasium, make_evaluator

    if options.gymnasium:
        return lambda params, index: evaluate_in_gymnasium(
            run.env.name,
            run.policy,
            params,
            options.seed + index,
            options.episodes,
            greedy=options.greedy,
            max_steps=run.config.max_steps,
        )
    play = make_evaluator(run.env, run.policy, options.episodes, greedy=options.greedy)
    # Away from the keys that training with the same seed derives.
    key = jax.random.fold_in(jax.random.key(options.seed), EVALUATION)
    return lambda params, index: play(params, jax.random.fold_in(key, index))


def _study(words: list[str]) -> int:
    from jaxpg.study.commands import STUDIES, defaults_of, run_study

    if not words or words[0] in ("-h", "--help"):
        print("usage: jaxpg study KIND [--quick] [OPTIONS]\n\nkinds:")
        for name, command in STUDIES.items():
            print(f"  {name:<12} {command.summary}")
        print("\n'jaxpg study KIND --help' tells more")
        return 0 if words else 2
    kind, *words = words
    try:
        check_choice("kind of study", kind, STUDIES)
        default = defaults_of(kind, _env_of(words, None), "--quick" in words)
    except ValueError as error:
        raise UsageError(error) from error
    options = dataclasses.make_dataclass(
        "StudyOptions",
        [
            ("config", STUDIES[kind].settings),
            ("quick", bool, False),
            ("resume", Path | None, None),
            ("compilation_cache", bool, True),
        ],
        frozen=True,
        kw_only=True,
        namespace={"__doc__": STUDY_HELP.format(summary=STUDIES[kind].summary)},
    )
    parsed = _parse(options, words, f"jaxpg study {kind}", options(config=default))
    num_devices = getattr(parsed.config, "num_devices", None)
    _set_up_jax(num_devices or 1, parsed.compilation_cache)
    return run_study(kind, parsed.config, parsed.resume)


def _list(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    what = words[0] if len(words) == 1 else ""
    if what == "algorithms":
        for name, recipe in RECIPES.items():
            print(f"{name:<12} {recipe.summary}")
        return 0
    if what == "envs":
        from jaxpg import envs

        for name in envs.names():
            problem = envs.load_problem(name)
            print(name if problem is None else f"{name}  (cannot load: {problem})")
        return 0
    if what == "systems":
        for name, system in SYSTEMS.items():
            print(f"{name:<16} {system.summary}")
        return 0
    raise UsageError(
        "list what? choose one of: jaxpg list envs, jaxpg list algorithms, "
        "jaxpg list systems"
    )


def _parse(kind: type, words: list[str], program: str, default: Any = None) -> Any:
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, args=words, prog=program, config=flat, **given)


if __name__ == "__main__":
    sys.exit(main())
