"""Environment steps per second of every algorithm's whole training program.

    python benchmarks/throughput.py             CartPole at every size, others at 512
    python benchmarks/throughput.py --grid      every algorithm, size and environment
    python benchmarks/throughput.py --quick     PPO and REINFORCE on CartPole
    python benchmarks/throughput.py --add ...   in pieces: stored places stay

Timed is `advance`, what `jaxpg train` runs between two visits of the host, a second or
so of updates: collecting, the update with the algorithm's default settings (PPO: 4
epochs of 4 minibatches over 128 steps each), statistics. Policies are fresh, held there
by a vanishing step size where there is one; REINFORCE has no baseline, so that no
gradient is skipped. Only real decisions count: whole episodes of fresh policies are
short and end at different times, and `ceilings.py` has the trained ones. Compile time
is that of the same program, tracing included, without a cache; working memory is what
XLA asks for beside the state. The ceiling is the environment alone, with random
actions, in the same process; all programs of one size are timed in turns.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import ceilings
import jax
import matplotlib.pyplot as plt
import numpy as np
import timing

from jaxpg.algos.registry import RECIPES
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.run import Run, create_run, initial_state
from jaxpg.train.visits import next_pace

NAMES = list(RECIPES)
WORLDS = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1"]
IMAGES = ["Breakout-MinAtar", "SpaceInvaders-MinAtar"]
SIZES = [4, 64, 512, 2048, 16384]
ACCELERATED = [2**n for n in range(11, 18)]
NUM_STEPS = 128

Place = tuple[str, int]


def main() -> None:
    options = parse()
    jax.config.update("jax_num_cpu_devices", options.num_devices)
    accelerated = jax.default_backend() != "cpu"
    table = stored_already(options) if options.add else {}
    for (env, num_envs), names in plan(options, accelerated).items():
        table[f"{env} {num_envs}"] = rates(options, env, num_envs, names)
        store(options, table)
    print(f"stored in {store(options, table).name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--grid", action="store_true", help="everything, which takes hours on CPU")
    add("--quick", action="store_true", help="only PPO and REINFORCE on CartPole")
    add("--envs", nargs="+", help="only these environments")
    add("--num-envs", type=int, nargs="+", help="only these sizes")
    add("--algorithms", nargs="+", help="only these algorithms", choices=NAMES)
    add("--num-devices", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--add", action="store_true", help="keep what is stored of other places")
    add("--out", default="throughput", help="name of the stored result")
    return parser.parse_args()


def plan(options: argparse.Namespace, accelerated: bool) -> dict[Place, list[str]]:
    """Which algorithms run where."""
    sizes = options.num_envs or (ACCELERATED if accelerated else SIZES)
    chosen: dict[Place, list[str]] = {}
    for env in options.envs or [*WORLDS, *IMAGES]:
        for num_envs in sizes:
            whole = options.grid or (env == "CartPole-v1" and num_envs == 2048)
            usual = ["ppo", "reinforce"] if env == "CartPole-v1" else ["ppo"]
            if options.quick and env != "CartPole-v1":
                continue
            asked_for = options.num_envs or env == "CartPole-v1" or num_envs == 512
            if not (whole or asked_for):
                continue
            names = NAMES if whole and not options.quick else usual
            chosen[env, num_envs] = options.algorithms or names
    return chosen


def stored_already(options: argparse.Namespace) -> dict[str, Any]:
    """Earlier places, so that a long plan can be run in pieces on one machine."""
    return timing.load(f"{options.out}-{jax.default_backend()}")["table"]


def store(options: argparse.Namespace, table: dict[str, Any]) -> Path:
    """What has been measured so far, with its picture."""
    found = {"settings": vars(options), "table": dict(sorted(table.items(), key=order))}
    backend = jax.default_backend()
    path = timing.save(f"{options.out}-{backend}", found)
    plot(table, path.with_suffix(".png"))
    return path


def order(item: tuple[str, Any]) -> tuple[int, int]:
    """Places as the plan has them: environment by environment, size by size."""
    env, num_envs = item[0].split()
    known = [*WORLDS, *IMAGES]
    return known.index(env) if env in known else len(known), int(num_envs)


def rates(
    options: argparse.Namespace, env: str, num_envs: int, names: list[str]
) -> dict[str, Any]:
    """Every algorithm's rate in one place, timed in turns with the ceiling."""
    programs = {name: Program(env, num_envs, name) for name in names}
    first = next(iter(programs.values())).run
    alone = ceilings.environment_alone(first.env, num_envs, NUM_STEPS, first.placement)
    seconds = timing.time_in_turns({**programs, "alone": alone}, options.rounds)
    ceiling = timing.rates(seconds.pop("alone"), num_envs * NUM_STEPS)
    found: dict[str, Any] = {"environment alone": ceiling}
    for name, program in programs.items():
        # Episodes differ in length from update to update: each round has its own steps.
        steps = program.steps[-options.rounds :]
        each = [n / s for n, s in zip(steps, seconds[name], strict=True)]
        found[name] = {
            "median": float(np.median(each)),
            "low": min(each),
            "high": max(each),
            "rounds": options.rounds,
            "of_environment_alone": float(np.median(each)) / ceiling["median"],
            "steps_per_update": float(np.mean(steps)) / program.count,
            "num_devices": program.run.placement.num_devices,
            "compile_seconds": program.compile_seconds,
            "working_bytes": program.working_bytes,
        }
        print(describe(env, num_envs, name, found[name]), flush=True)
    return found


def describe(env: str, num_envs: int, name: str, row: dict[str, Any]) -> str:
    return (
        f"{env:22} {num_envs:6} envs  {name:11} {row['median'] / 1e3:8.0f}k steps/s "
        f"({row['low'] / 1e3:.0f}k - {row['high'] / 1e3:.0f}k), "
        f"{100 * row['of_environment_alone']:.0f}% of the environment alone, "
        f"compiled in {row['compile_seconds']:.1f} s, works in "
        f"{row['working_bytes'] / 2**20:.0f} MiB on {row['num_devices']} devices"
    )


class Program:
    """One algorithm's compiled program; calling it makes some updates."""

    def __init__(self, env: str, num_envs: int, name: str, **changes: Any) -> None:
        self.run = make_run(env, num_envs, name, **changes)
        self.state = initial_state(self.run)
        began = time.perf_counter()
        lowered = self.run.program.advance.lower(self.state, np.int32(1))
        self.advance = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.working_bytes = self.advance.memory_analysis().temp_size_in_bytes
        self.steps: list[int] = []
        self.count = 1
        self.find_pace()

    def find_pace(self) -> None:
        """As many updates to a call as a run makes between two visits of the host.

        The first update of a call waits for fresh memory: calls of a single one are
        up to half as fast, with a large batch.
        """
        before = 0
        while before < self.count:
            before, began = self.count, time.perf_counter()
            jax.block_until_ready(self())
            self.count = next_pace(before, time.perf_counter() - began)

    def __call__(self) -> Any:
        self.state, metrics = self.advance(self.state, np.int32(self.count))
        self.steps.append(int(metrics["num_steps"][: self.count].sum()))
        return self.state


def make_run(
    env: str, num_envs: int, name: str, num_devices: int | None = None, **changes: Any
) -> Run:
    """A run with the defaults but for changes, in a folder that is gone at once."""
    image = env in IMAGES
    network = {"network": "cnn", "hidden": (128,)} if image else {}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            env=env,
            max_steps=1000 if image else None,
            num_envs=num_envs,
            num_devices=num_devices,
            algorithm=dataclasses.replace(held(name), **changes),
            policy=PolicyConfig(**network),  # type: ignore[arg-type]
        )
        return create_run(
            dataclasses.replace(config, runs_dir=Path(folder), name="run")
        )


def held(name: str) -> Any:
    """Default settings with which a policy stays as fresh as it is."""
    settings = RECIPES[name].settings()
    if hasattr(settings, "learning_rate"):
        settings = dataclasses.replace(settings, learning_rate=ceilings.HELD)
    if name == "reinforce":
        settings = dataclasses.replace(settings, baseline="none")
    return settings


def plot(table: dict[str, Any], path: Path) -> None:
    """Steps per second against environments, on CartPole."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, marker in zip(("environment alone", *NAMES), "kosv^D<>P", strict=True):
        sizes = [
            int(place.split()[1])
            for place, rows in table.items()
            if place.startswith("CartPole") and name in rows
        ]
        if not sizes:
            continue
        rows = [table[f"CartPole-v1 {size}"][name] for size in sizes]
        style = {"color": "0.5", "linestyle": ":"} if name.startswith("env") else {}
        axes.plot(
            sizes,
            [row["median"] for row in rows],
            marker="." if marker == "k" else marker,
            label=name,
            **style,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("environments side by side")
    axes.set_ylabel("environment steps per second")
    axes.set_title("CartPole-v1, whole training loop")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
