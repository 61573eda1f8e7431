"""Settings of a run: one frozen record, on the command line and in Python alike."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxpg._checks import check_choice, check_positive
from jaxpg.algos.reinforce import ReinforceConfig
from jaxpg.networks import ACTIVATIONS

__all__ = ["ALGORITHMS", "TrainConfig", "config_from_json", "config_to_json"]

ALGORITHMS: dict[str, type] = {"reinforce": ReinforceConfig}
"""Settings by algorithm name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run that do not depend on the algorithm."""

    env: str = "CartPole-v1"
    """Environment; `jaxpg list envs` shows all."""
    max_steps: int | None = None
    """Truncate episodes after this many decisions, where the environment's own limit
    is longer or it has none."""
    seed: int = 0
    """First random seed."""
    num_seeds: int = 1
    """Seeds that are trained side by side in one program: seed, seed + 1, ..."""
    num_envs: int = 64
    """Environments that run side by side, for each seed."""
    num_updates: int = 60
    """Updates of the policy."""
    hidden: tuple[int, ...] = (64, 64)
    """Width of each hidden layer of the policy."""
    activation: str = "tanh"
    """Activation of the hidden layers: tanh, relu, gelu or silu."""
    num_devices: int | None = None
    """Devices that share the environments. Unset: all of them, on CPU one per core, as
    far as they divide the environments."""
    checkpoint_every: int = 20
    """Updates between checkpoints; there is always one at the end."""
    keep_checkpoints: int = 3
    """How many of the last checkpoints stay; the best one stays as well."""
    eval_episodes: int = 100
    """Episodes of the evaluation after training; 0 for none."""
    runs_dir: Path = Path("runs")
    """Folder that runs are kept in."""
    name: str | None = None
    """Folder of this run in there. Unset: environment, algorithm, seed and time."""
    algorithm: ReinforceConfig = dataclasses.field(default_factory=ReinforceConfig)
    """Settings of the algorithm."""

    def __post_init__(self) -> None:
        for name in (
            "num_seeds",
            "num_envs",
            "num_updates",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            check_positive(name, getattr(self, name))
        for name in ("max_steps", "num_devices"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_choice("activation", self.activation, ACTIVATIONS)
        for width in self.hidden:
            check_positive("hidden", width)
        if self.eval_episodes < 0:
            raise ValueError(
                f"eval_episodes is {self.eval_episodes}, needs 0 (none) or more"
            )

    @property
    def algorithm_name(self) -> str:
        """The algorithm's name on the command line."""
        names = {kind: name for name, kind in ALGORITHMS.items()}
        return names[type(self.algorithm)]


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """A tree of plain JSON values; `config_from_json` is its inverse."""
    tree = dataclasses.asdict(config)
    tree["runs_dir"] = str(config.runs_dir)
    tree["hidden"] = list(config.hidden)
    tree["algorithm"] = {"name": config.algorithm_name, **tree["algorithm"]}
    return tree


def config_from_json(tree: dict[str, Any]) -> TrainConfig:
    """Rebuild settings from plain JSON values.

    Raises:
        ValueError: if a setting is unknown, for example from another version.
    """
    tree = dict(tree)
    algorithm_tree = dict(tree.pop("algorithm"))
    name = algorithm_tree.pop("name")
    check_choice("algorithm", name, ALGORITHMS)
    algorithm = _build(ALGORITHMS[name], algorithm_tree)
    tree["runs_dir"] = Path(tree["runs_dir"])
    tree["hidden"] = tuple(tree["hidden"])
    return _build(TrainConfig, {**tree, "algorithm": algorithm})


def _build(kind: type, tree: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in tree:
        check_choice(f"setting of {kind.__name__}", name, known)
    return kind(**tree)
