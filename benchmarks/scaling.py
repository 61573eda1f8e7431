"""What devices exchange in an update, and how long it takes: strong and weak scaling.

    python benchmarks/scaling.py [--rounds 5]

Strong: 2048 environments of CartPole-v1 over 1, 2, 4 and 8 host devices. Weak: 512 for
each device. Exchanges and their bytes are counted in the compiled program, with loops
of known length multiplied out; loops that end by themselves (conjugate gradients, line
search) count once. Updates are timed, in turns, only where every device has a core.
"""

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing
from exchanges import exchanges

from jaxpg.algos.registry import RECIPES
from jaxpg.train.config import TrainConfig
from jaxpg.train.run import create_run, initial_state

DEVICES = (1, 2, 4, 8)
NAMES = ("ppo", "reinforce", "trpo")
STRONG, WEAK = 2048, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="0: only count")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        rows += scaled(name, options.rounds)
        timing.save("scaling-cpu", {"settings": vars(options), "rows": rows})
    print("stored in scaling-cpu.json")


def scaled(name: str, rounds: int) -> list[dict[str, Any]]:
    """Strong and weak scaling of one algorithm."""
    places = [("strong", n, STRONG) for n in DEVICES]
    places += [("weak", n, WEAK * n) for n in DEVICES]
    programs = {  # one for both where they meet
        (n, size): Update(name, n, size, timed=rounds > 0) for _, n, size in places
    }
    cores = len(os.sched_getaffinity(0))
    timed = {place: run for place, run in programs.items() if place[0] <= cores}
    seconds = timing.time_in_turns(timed, rounds) if rounds else {}
    rows = []
    for kind, num_devices, num_envs in places:
        each = seconds.get((num_devices, num_envs))
        row = {
            "algorithm": name,
            "scaling": kind,
            "num_devices": num_devices,
            "num_envs": num_envs,
            **programs[num_devices, num_envs].talk,
            "milliseconds": None if each is None else 1e3 * float(np.median(each)),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


class Update:
    """One algorithm's compiled program; calling it makes an update."""

    def __init__(
        self, name: str, num_devices: int, num_envs: int, *, timed: bool
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run = create_run(
                TrainConfig(
                    env="CartPole-v1",
                    num_envs=num_envs,
                    num_devices=num_devices,
                    algorithm=RECIPES[name].settings(),
                    runs_dir=Path(folder),
                    name="run",
                )
            )
        self.state = initial_state(run)
        lowered = run.program.advance.lower(self.state, np.int32(1))
        # Exchanges are settled before the compiler's last part, which takes longest.
        quick = {} if timed else {"xla_backend_optimization_level": 0}
        self.advance = lowered.compile(compiler_options=quick)
        found = exchanges(self.advance.as_text())
        kinds: Counter[str] = Counter()
        for exchange in found:
            kinds[exchange.kind] += exchange.times
        self.talk = {
            "exchanges": dict(kinds),
            "bytes": sum(x.num_bytes * x.times for x in found),
            "largest_bytes": max((x.num_bytes for x in found), default=0),
        }

    def __call__(self) -> Any:
        self.state, metrics = self.advance(self.state, np.int32(1))
        return metrics


if __name__ == "__main__":
    main()
