"""What a training program costs before its first update: time, kernels, memory.

    python benchmarks/compilation.py [--algorithms ppo reinforce] [--rounds 3]

Every measurement is a process of its own, which builds what `jaxpg train` would run on
CartPole with the default settings: it traces `advance`, lowers it, compiles it without
the cache on disk, and tells the seconds of each part and the peak of its memory until
then. One more process each counts the kernels that XLA's CPU compiler makes one by one,
as the profiler sees them; equal ones are made once.
"""

import argparse
import gzip
import json
import os
import statistics
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

PARTS = ("trace", "lower", "compile")
KERNEL = "FusionCompiler::Compile"


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(one(options)))
        return
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in options.algorithms}
    for _ in range(options.rounds):
        for name, rows in table.items():
            rows.append(process(options, name))
    found = {}
    for name, rows in table.items():
        counted = process(options, name, "--count")
        found[name] = summary(rows) | {"kernels": counted["kernels"]}
        print(line_of(name, found[name]), flush=True)
    settings = {key: value for key, value in vars(options).items() if key != "one"}
    path = timing.save(
        f"compilation-{jax.default_backend()}", {"settings": settings, "table": found}
    )
    print(f"stored in {path.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    usual = ["ppo", "reinforce", "a2c", "trpo"]
    add("--algorithms", nargs="+", default=usual, choices=list(RECIPES))
    add("--num-envs", type=int, default=2048)
    add("--num-devices", type=int, default=os.cpu_count() or 1)
    add("--rounds", type=int, default=3)
    add("--one", action="store_true", help="measure here, and print it as JSON")
    add("--count", action="store_true", help="count kernels, under the profiler")
    return parser.parse_args()


def process(options: argparse.Namespace, name: str, *more: str) -> dict[str, Any]:
    sizes = (
        *("--num-envs", str(options.num_envs)),
        *("--num-devices", str(options.num_devices)),
    )
    words = ("--one", "--algorithms", name, *sizes, *more)
    return timing.in_a_process(__file__, *words)


def one(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each part, and the peak of this process, in MiB."""
    jax.config.update("jax_num_cpu_devices", options.num_devices)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            num_envs=options.num_envs,
            num_devices=options.num_devices,
            algorithm=RECIPES[options.algorithms[0]].settings(),
            runs_dir=Path(folder),
            name="run",
        )
        run = create_run(config)
        state = initial_state(run)
        times = [time.perf_counter()]
        traced = run.program.advance.trace(state, np.int32(1))
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        if options.count:
            return {"kernels": count_kernels(lowered, Path(folder) / "profile")}
        lowered.compile()
        times.append(time.perf_counter())
    seconds = dict(zip(PARTS, np.diff(times).tolist(), strict=True))
    return {**seconds, "peak_mib": timing.peak_bytes() / 2**20}


def count_kernels(lowered: Any, folder: Path) -> int | None:
    """None where the compiler does not tell."""
    with jax.profiler.trace(str(folder)):
        lowered.compile()
    (file,) = folder.rglob("*.trace.json.gz")
    with gzip.open(file, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    return sum(event.get("name", "").startswith(KERNEL) for event in events) or None


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {
            "median": statistics.median(row[name] for row in rows),
            "low": min(row[name] for row in rows),
            "high": max(row[name] for row in rows),
        }
        for name in (*PARTS, "peak_mib")
    }


def line_of(name: str, row: dict[str, Any]) -> str:
    parts = ", ".join(f"{part} {row[part]['median']:.2f} s" for part in PARTS)
    return (
        f"{name:12} {parts}, {row['kernels']} kernels, {row['peak_mib']['median']:.0f} "
        "MiB"
    )


if __name__ == "__main__":
    main()
