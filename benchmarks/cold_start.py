"""From the command to a trained, evaluated CartPole policy, as a user feels it.

    python benchmarks/cold_start.py [--seeds 10]

Each run is a new process, `jaxpg train --seed S`, with its default settings and without
the compilation cache: imports, compilation, training, checkpoints, the learning curve
and an evaluation over 100 episodes all count. Then the first run's policy is evaluated
in the real Gymnasium environment.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timing

TARGET = 475.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_run(seed, Path(folder)) for seed in range(options.seeds)]
        gymnasium = in_gymnasium(Path(folder) / "seed-0")
    seconds = [run["seconds"] for run in runs]
    summary = {
        "reached_target": sum(run["mean"] >= TARGET for run in runs),
        "reached_target_within_60_seconds": sum(
            run["mean"] >= TARGET and run["seconds"] < 60.0 for run in runs
        ),
        "runs": len(runs),
        "seconds_median": statistics.median(seconds),
        "seconds_low": min(seconds),
        "seconds_high": max(seconds),
        "updates_to_target_median": statistics.median(
            run["updates_to_target"] for run in runs if run["updates_to_target"]
        ),
        "gymnasium_mean": gymnasium,
    }
    print(json.dumps(summary, indent=2))
    timing.save("cold-start-cpu", {"target": TARGET, "summary": summary, "each": runs})


def one_run(seed: int, folder: Path) -> dict[str, Any]:
    """Train one seed in a process of its own; seconds from its start to its end."""
    name = f"seed-{seed}"
    words = ["train", "--seed", str(seed), "--runs-dir", str(folder), "--name", name]
    began = time.perf_counter()
    call(*words, "--no-compilation-cache")
    seconds = time.perf_counter() - began
    evaluation = json.loads((folder / name / "evaluation.json").read_text())[0]
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
    reached = [row["update"] for row in rows if row["mean_return"] >= TARGET]
    result = {
        "seed": seed,
        "seconds": seconds,
        "mean": evaluation["mean"],
        "updates_to_target": min(reached, default=None),
    }
    print(result, flush=True)
    return result


def in_gymnasium(run: Path) -> float:
    """The mean return of 100 episodes in the real environment."""
    output = call("eval", str(run), "--gymnasium", "--episodes", "100")
    return float(output.strip().splitlines()[-1].removeprefix("mean "))


def call(*words: str) -> str:
    command = [sys.executable, "-m", "jaxpg", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
