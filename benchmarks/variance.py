"""The reference study: variance of estimators on CartPole-v1, at two stages.

    python benchmarks/variance.py [--folder studies] [--stage untrained|nearly-trained]

`untrained`: 2^18 trajectories of a policy before its first update, batches of 2^4 to
2^18. `nearly-trained`: 2^14 of the policy after ten updates of REINFORCE, whose
episodes are 18 times as long, batches of 2^4 to 2^11. Each is what `jaxpg study
variance` gives for these settings; a study that is interrupted goes on where it was.
Results and the main figure are stored beside the other benchmarks'.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import timing

from jaxpg.study.settings import VarianceConfig
from jaxpg.study.variance import study_variance
from jaxpg.train.config import TrainConfig
from jaxpg.train.loop import train
from jaxpg.train.provenance import read_json, write_json_atomically

UPDATES = 10
SIZES = {"untrained": 18, "nearly-trained": 14}
REFERENCE = {"untrained": 17, "nearly-trained": 13}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("studies"))
    parser.add_argument("--stage", choices=list(SIZES), default=None)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    for stage in SIZES if options.stage is None else [options.stage]:
        keep(stage, study_variance(settings(stage, options.folder)).folder)


def settings(stage: str, folder: Path) -> VarianceConfig:
    """What each stage asks for."""
    largest = SIZES[stage]
    config = VarianceConfig(
        num_trajectories=2**largest,
        batch_sizes=tuple(2**k for k in (*range(4, 11), *range(12, largest + 1, 2))),
        max_batches=64,
        reference_trajectories=2 ** REFERENCE[stage],
        folder=folder / f"reference-{stage}",
    )
    if stage == "untrained":
        return config
    return dataclasses.replace(
        config,
        checkpoint=trained(folder),
        batch_sizes=tuple(2**k for k in range(4, largest - 2)),
        estimators=("default", "value-network"),
    )


def trained(folder: Path) -> Path:
    """A run of REINFORCE that was stopped early."""
    run = folder / "reference-run"
    if not run.exists():
        config = TrainConfig(
            num_updates=UPDATES,
            checkpoint_every=UPDATES,
            eval_episodes=0,
            num_devices=1,
            runs_dir=folder,
            name=run.name,
        )
        train(config, show=False)
    return run


def keep(stage: str, folder: Path) -> None:
    """Store a study's results and its main figure, without this machine's paths."""
    results: dict[str, Any] = read_json(folder / "results.json")
    results["settings"]["checkpoint"] = None
    results["command"] = f"python benchmarks/variance.py --stage {stage}"
    timing.RESULTS.mkdir(exist_ok=True)
    write_json_atomically(timing.RESULTS / f"variance-{stage}.json", results)
    shutil.copy(
        folder / "figures" / "variance.png", timing.RESULTS / f"variance-{stage}.png"
    )


if __name__ == "__main__":
    main()
