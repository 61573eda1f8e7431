"""jaxpg and its peers on the same work, in turns: speed, compilation, memory, learning.

    PUREJAXRL=checkout STOIX=checkout python benchmarks/peers.py [--num-envs 4 64 2048]

Every library lives in a virtual environment of its own, which is made on the first run
(in `.peers/`; Stoix needs an older JAX). For each size of work every library compiles
its program in a process of its own, and then they train in turns, A B C A B C ..., one
at a time; ratios are taken round by round. `--learn` compares learning instead: the
same settings, returns against steps over five seeds.

What "the same work" leaves different is told in `benchmarks/README.md`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import timing

WORKERS = Path(__file__).parent / "workers"
SECONDS_OF_A_CALL = 5.0
"""Of most libraries: the first update of a call waits for fresh memory."""


METHODS = ("ppo", "one-step", "reinforce", "reinforce-trained")
"""PPO; one gradient step on segments, with a critic; and REINFORCE without one, on
whole episodes, which are short with fresh policies and long with trained ones. Stoix's
ff_reinforce has a critic and segments, and its updates take the same time with any
policy; it is asked each time."""


class Library(NamedTuple):
    """How a library is had.

    Attributes:
        worker: the file in `workers/` that runs it.
        requirements: what its environment needs; none for this one's own.
        checkout: the environment variable that names its checkout, if it needs one.
        methods: what of the work it can do.
        most_envs: beyond these a round would take a quarter of a minute.
    """

    worker: str
    requirements: tuple[str, ...] = ()
    checkout: str | None = None
    methods: tuple[str, ...] = ("ppo", "one-step")
    most_envs: int = 2**20


JAX = f"jax=={jax.__version__}"
OLD = ("jax==0.5.3", "flax==0.10.6", "gymnax==0.0.9", "stoa-env==0.1.2")
LAUNCHED_BY = ("hydra-core", "omegaconf", "colorama", "rich")
LIBRARIES = {
    "jaxpg": Library("jaxpg_program.py", methods=METHODS),
    "PureJaxRL": Library(
        "purejaxrl_ppo.py",
        (JAX, "flax", "gymnax", "six", "distrax", "optax"),
        "PUREJAXRL",
    ),
    "Stoix": Library(
        "stoix_systems.py",
        (*OLD, *"distrax==0.1.5 flashbax jumanji rlax".split(), *LAUNCHED_BY),
        "STOIX",
        METHODS,
    ),
    "rejax": Library("rejax_ppo.py", (JAX, "rejax", "six"), methods=("ppo",)),
    "Stable-Baselines3": Library(
        "sb3_ppo.py", ("stable-baselines3", "torch", "gymnasium"), most_envs=512
    ),
}


def main() -> None:
    options = parse()
    libraries = usable(options)
    pythons = {name: environment(options.environments, name) for name in libraries}
    compare = learning if options.learn else speed
    table = {
        f"{method} {num_envs}": compare(options, pythons, method, num_envs)
        for method in options.methods
        for num_envs in options.num_envs
    }
    kind = "peers-learning" if options.learn else "peers"
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("environments", "out")
    }
    found = {"settings": settings, "commits": commits(libraries), "table": table}
    path = timing.save(options.out or f"{kind}-{jax.default_backend()}", found)
    print(f"stored in {path.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--num-envs", type=int, nargs="+", default=[4, 64, 2048])
    add("--env", default="CartPole-v1")
    add("--rounds", type=int, default=5)
    add("--learn", action="store_true", help="compare learning, not speed")
    add("--seeds", type=int, default=5)
    add("--env-steps", type=int, default=500_000, help="of a learning run")
    add("--environments", type=Path, default=Path(".peers"), help="where they are kept")
    add("--out", help="name of the stored result, without .json")
    options = parser.parse_args()
    if options.learn:  # whole episodes have no fixed number of steps an update
        options.methods = [name for name in options.methods if "reinforce" not in name]
    return options


def usable(options: argparse.Namespace) -> list[str]:
    """The libraries whose checkouts are there."""
    found = []
    for name in options.libraries:
        variable = LIBRARIES[name].checkout
        folder = "." if variable is None else os.environ.get(variable)
        if folder and Path(folder).is_dir():
            found.append(name)
        else:
            print(f"{name} is left out: set {variable} to a checkout of it")
    return found


def environment(folder: Path, name: str) -> str:
    """The Python of a library's own virtual environment, made where it is missing."""
    requirements = LIBRARIES[name].requirements
    if not requirements:
        return sys.executable
    home = folder.absolute() / name.lower()
    python, done = home / "bin" / "python", home / "installed.json"
    if not done.exists() or json.loads(done.read_text()) != list(requirements):
        print(f"making an environment for {name}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(install, check=True)
        done.write_text(json.dumps(requirements))
    return str(python)


class Worker:
    """A process that holds one library's compiled program."""

    def __init__(self, python: str, name: str, work: dict[str, Any]) -> None:
        command = [python, str(WORKERS / LIBRARIES[name].worker), json.dumps(work)]
        self.name = name
        self.errors = Path(f"{name}-errors.log").absolute()
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.name} failed; see {self.errors.name}")
        return json.loads(line)

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.unlink()


def speed(
    options: argparse.Namespace, pythons: dict[str, str], method: str, num_envs: int
) -> dict[str, Any]:
    """Rates of all libraries that know the method, timed in turns."""
    workers = {
        name: Worker(python, name, work_of(options, name, method, num_envs))
        for name, python in pythons.items()
        if can(name, method, num_envs)
    }
    rates: dict[str, list[float]] = {name: [] for name in workers}
    peaks: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            told = worker.ask(do="time")
            rates[name].append(told["steps"] / told["seconds"])
            peaks[name] = told["peak_mib"]
    rows = {}
    for name, worker in workers.items():
        rows[name] = {
            "steps_per_second": spread(rates[name]),
            "ratio": spread(quotients(rates, name)),
            "peak_mib": peaks[name],
            **worker.ready,
        }
        worker.close()
        print(line_of(method, num_envs, name, rows[name]), flush=True)
    return rows


def can(name: str, method: str, num_envs: int) -> bool:
    library = LIBRARIES[name]
    return method in library.methods and num_envs <= library.most_envs


def work_of(
    options: argparse.Namespace, name: str, method: str, num_envs: int
) -> dict[str, Any]:
    """The work for one library; calls are long enough to be timed."""
    expected = {"Stable-Baselines3": 2e4 if num_envs > 4 else 2e3}.get(name, 1e5)
    if name == "jaxpg" and "reinforce" in method:
        expected = 5e5
    per_update = 128 * num_envs
    updates = max(1, round(SECONDS_OF_A_CALL * expected / per_update))
    if options.learn:
        updates = max(1, options.env_steps // per_update)
    return {
        "method": method,
        "env": options.env,
        "num_envs": num_envs,
        "num_updates": min(updates, 10_000 if options.learn else 64),
        "num_devices": devices_for(name, num_envs),
    }


def devices_for(name: str, num_envs: int) -> int:
    """Host devices, one per core, that `jaxpg train` would share the work between."""
    if name != "jaxpg":
        return 1
    from jaxpg.train.sharding import MIN_ROWS, largest_device_count

    worth_it = min(os.cpu_count() or 1, max(1, num_envs // MIN_ROWS))
    return largest_device_count(worth_it, num_envs)


def quotients(rates: dict[str, list[float]], name: str) -> list[float]:
    """How much faster the first library (jaxpg) was than this one, round by round."""
    first = next(iter(rates))
    return [a / b for a, b in zip(rates[first], rates[name], strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
    }


def line_of(method: str, num_envs: int, name: str, row: dict[str, Any]) -> str:
    rate, ratio = row["steps_per_second"], row["ratio"]
    return (
        f"{method:17} {num_envs:5} envs  {name:18} {rate['median'] / 1e3:8.1f}k steps/s"
        f"  jaxpg is {ratio['median']:.2f} times as fast"
        f" ({ratio['low']:.2f} - {ratio['high']:.2f})"
        f"  compiled in {row['compile_seconds']:.1f} s, {row['peak_mib']:.0f} MiB"
    )


def learning(
    options: argparse.Namespace, pythons: dict[str, str], method: str, num_envs: int
) -> dict[str, Any]:
    """Mean returns after each update, seed by seed, one library after the other."""
    rows = {}
    for name, python in pythons.items():
        if not can(name, method, num_envs):
            continue
        work = work_of(options, name, method, num_envs)
        worker = Worker(python, name, work)
        curves = [
            worker.ask(do="learn", seed=seed)["returns"]
            for seed in range(options.seeds)
        ]
        worker.close()
        rows[name] = {
            "steps_per_update": 128 * num_envs,
            "curves": curves,
            "mean_return": spread([mean_of(curve) for curve in curves]),
            "last_return": spread([last_of(curve) for curve in curves]),
            "versions": worker.ready["versions"],
        }
        mean, last = rows[name]["mean_return"], rows[name]["last_return"]
        print(
            f"{method:8} {num_envs:5} envs  {name:18} mean return over the run "
            f"{mean['median']:.0f} ({mean['low']:.0f} - {mean['high']:.0f}), at its "
            f"end {last['median']:.0f} ({last['low']:.0f} - {last['high']:.0f})",
            flush=True,
        )
    return rows


def mean_of(curve: list[float | None]) -> float:
    """Mean over the run, each update with the last return that was known."""
    known, filled = 0.0, []
    for value in curve:
        known = known if value is None else value
        filled.append(known)
    return float(np.mean(filled))


def last_of(curve: list[float | None]) -> float:
    """Mean of the last tenth of the known returns."""
    known = [value for value in curve if value is not None]
    return float(np.mean(known[-max(1, len(known) // 10) :]))


def commits(libraries: list[str]) -> dict[str, str]:
    """What was checked out of the libraries that are no packages."""
    found = {}
    for name in libraries:
        variable = LIBRARIES[name].checkout
        if variable is not None:
            command = ["git", "-C", os.environ[variable], "rev-parse", "HEAD"]
            told = subprocess.run(command, capture_output=True, text=True, check=False)
            found[name] = told.stdout.strip() or "unknown"
    return found


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s")
