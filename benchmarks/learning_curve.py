"""The README's figure: eight seeds of the default run in one vmapped program.

python benchmarks/learning_curve.py
"""

import shutil
import tempfile
from pathlib import Path

import jax
import timing

from jaxpg.train.config import TrainConfig
from jaxpg.train.loop import train


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    with tempfile.TemporaryDirectory() as folder:
        result = train(TrainConfig(num_seeds=8, runs_dir=Path(folder)))
        picture = timing.RESULTS / "cartpole-learning-curve.png"
        shutil.copy(result.folder / "learning_curve.png", picture)
        timing.save("learning-curve-cpu", {"evaluation": result.evaluation})


if __name__ == "__main__":
    main()
