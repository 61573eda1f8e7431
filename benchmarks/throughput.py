"""Environment steps per second of every algorithm's whole training program.

    python benchmarks/algorithms.py [--env CartPole-v1] [--num-envs 64 2048]

Timed is `advance`, what `jaxpg train` runs between two visits of the host: collecting,
the update with the algorithm's default settings (PPO: 4 epochs of 4 minibatches over
128 steps each), statistics. Fresh policies; only real decisions count. Compile time is
that of the same program, tracing included, without a cache. All programs of one size
are timed in turns.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing

from jaxpg.algos.registry import RECIPES
from jaxpg.train.config import TrainConfig
from jaxpg.train.run import create_run, initial_state


def main() -> None:
    options = parse()
    jax.config.update("jax_num_cpu_devices", options.num_devices)
    table: dict[str, Any] = {}
    for num_envs in options.num_envs:
        table[str(num_envs)] = rates(options, num_envs)
    name = "-".join(x for x in ("algorithms", suffix(options.env)) if x)
    path = timing.save(
        f"{name}-{jax.default_backend()}", {"settings": vars(options), "table": table}
    )
    print(f"stored in {path.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--num-devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--algorithms", nargs="+", default=list(RECIPES))
    return parser.parse_args()


def suffix(env: str) -> str:
    return "" if env == "CartPole-v1" else env.lower()


def rates(options: argparse.Namespace, num_envs: int) -> dict[str, Any]:
    """Every algorithm's rate at one number of environments, timed in turns."""
    programs = {name: Program(options, name, num_envs) for name in options.algorithms}
    seconds = timing.time_in_turns(programs, options.rounds)
    found = {}
    for name, program in programs.items():
        # Episodes differ in length from update to update: each round has its own steps.
        steps = program.steps[-options.rounds :]
        each = [n / s for n, s in zip(steps, seconds[name], strict=True)]
        found[name] = {
            "median": float(np.median(each)),
            "low": min(each),
            "high": max(each),
            "rounds": options.rounds,
            "steps_per_update": float(np.mean(steps)),
            "compile_seconds": program.compile_seconds,
        }
        print(
            f"{name:11} {num_envs:6} envs  {found[name]['median'] / 1e3:8.0f}k steps/s "
            f"({min(each) / 1e3:.0f}k - {max(each) / 1e3:.0f}k), "
            f"compiled in {program.compile_seconds:.1f} s",
            flush=True,
        )
    return found


class Program:
    """One algorithm's compiled program; calling it makes one update."""

    def __init__(self, options: argparse.Namespace, name: str, num_envs: int) -> None:
        config = TrainConfig(
            env=options.env,
            num_envs=num_envs,
            num_devices=options.num_devices,
            algorithm=RECIPES[name].settings(),
        )
        with tempfile.TemporaryDirectory() as folder:
            config = dataclasses.replace(config, runs_dir=Path(folder), name="run")
            run = create_run(config)
        self.state = initial_state(run)
        began = time.perf_counter()
        lowered = run.program.advance.lower(self.state, np.int32(1))
        self.advance = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        self.steps: list[int] = []

    def __call__(self) -> Any:
        self.state, metrics = self.advance(self.state, np.int32(1))
        self.steps.append(int(metrics["num_steps"][0].sum()))
        return self.state


if __name__ == "__main__":
    main()
