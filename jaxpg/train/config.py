"""Settings of a run: one frozen record, on the command line and in Python alike."""

import copy
import dataclasses
import itertools
import math
import typing
from pathlib import Path
from typing import Any, Literal, get_args

from jaxpg._checks import check_choice, check_positive, check_range
from jaxpg.algos.registry import RECIPES
from jaxpg.algos.reinforce import ReinforceConfig
from jaxpg.networks import ACTIVATIONS

__all__ = [
    "ALGORITHMS",
    "PolicyConfig",
    "TrainConfig",
    "config_from_json",
    "config_to_json",
    "with_values_unchecked",
]

ALGORITHMS: dict[str, type] = {name: x.settings for name, x in RECIPES.items()}
"""Settings by algorithm name."""

AlgorithmConfig = typing.Union[tuple(ALGORITHMS.values())]  # noqa: UP007

NetworkName = Literal["mlp", "cnn"]
HeadName = Literal["usual", "tanh", "held-noise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Settings of the policy's and the critic's networks."""

    network: NetworkName = "mlp"
    """What reads the observation: layers on it flat, or convolutions on [H, W, C]."""
    hidden: tuple[int, ...] = (64, 64)
    """Width of each hidden layer."""
    channels: tuple[int, ...] = (16,)
    """Channels of each convolution (3 x 3), where there are convolutions."""
    memory: int = 0
    """Size of a GRU's memory behind the hidden layers; 0 for none."""
    activation: str = "tanh"
    """Activation of the hidden layers: tanh, relu, gelu or silu."""
    normalize_observations: bool = False
    """Bring observations to mean 0 and deviation 1 by statistics of all seen so far."""
    head: HeadName = "usual"
    """For boxes: "tanh" squashes a Gaussian into the bounds; "held-noise" explores with
    noise that depends on the state and is held over several decisions."""
    state_dependent_std: bool = False
    """For boxes: let the network give the standard deviations too."""
    initial_log_std: float = 0.0
    """For boxes: log of the first standard deviation, in units of the action (of the
    unsquashed one with "tanh")."""
    noise_hold: int = 1
    """Decisions that share one draw of the noise. Above 1 it explores further, and the
    gradient is biased."""

    def __post_init__(self) -> None:
        check_choice("network", self.network, get_args(NetworkName))
        check_choice("head", self.head, get_args(HeadName))
        check_choice("activation", self.activation, ACTIVATIONS)
        check_positive("noise_hold", self.noise_hold)
        for name in ("hidden", "channels"):
            for width in getattr(self, name):
                check_positive(name, width)
        check_range("memory", self.memory, 0)


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
    sweep: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Settings of the algorithm that take several values, side by side like the seeds.
    On the command line `--sweep learning_rate 1e-4 3e-4 1e-3`."""
    members_at_once: int | None = None
    """Seeds times swept values that run side by side; the others wait for their turn,
    which takes less memory. Unset: all. With whole episodes, who runs beside whom may
    change last digits."""
    num_envs: int = 64
    """Environments that run side by side, for each seed."""
    num_updates: int = 60
    """Updates of the policy."""
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    """Settings of the networks."""
    num_devices: int | None = None
    """Devices that share the environments, over all processes and the same number of
    each. Unset: all of them, on CPU one per core, as far as they divide the
    environments and each has 8 of them or more."""
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
    algorithm: AlgorithmConfig = dataclasses.field(default_factory=ReinforceConfig)
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
        for name in ("max_steps", "num_devices", "members_at_once"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.eval_episodes < 0:
            raise ValueError(
                f"eval_episodes is {self.eval_episodes}, needs 0 (none) or more"
            )
        _check_sweep(self)

    @property
    def algorithm_name(self) -> str:
        """The algorithm's name on the command line."""
        names = {kind: name for name, kind in ALGORITHMS.items()}
        return names[type(self.algorithm)]

    @property
    def num_members(self) -> int:
        """Seeds times combinations of swept values."""
        return self.num_seeds * math.prod(len(values) for _, values in self.sweep)

    def members(self) -> list[dict[str, float]]:
        """Each member's seed and swept values, in the order of the leading axis."""
        names = [name for name, _ in self.sweep]
        combinations = itertools.product(*(values for _, values in self.sweep))
        return [
            {"seed": self.seed + s, **dict(zip(names, values, strict=True))}
            for values in combinations
            for s in range(self.num_seeds)
        ]

    def swept_values(self) -> dict[str, list[float]]:
        """Each swept setting's value for every member."""
        members = self.members()
        return {name: [m[name] for m in members] for name, _ in self.sweep}


def with_values_unchecked(config: Any, values: dict[str, Any]) -> Any:
    """Settings with some values replaced by arrays that are traced.

    Args:
        config: any settings; they are left as they are.
        values: by field; what they stand for was checked when the run was set up.

    Returns:
        A copy.
    """
    config = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(config, name, value)
    return config


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """A tree of plain JSON values; `config_from_json` is its inverse."""
    tree = dataclasses.asdict(config)
    tree["runs_dir"] = str(config.runs_dir)
    tree["algorithm"] = {"name": config.algorithm_name, **tree["algorithm"]}
    return _lists(tree)


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
    if "runs_dir" in tree:
        tree["runs_dir"] = Path(tree["runs_dir"])
    if "policy" in tree:
        tree["policy"] = _build(PolicyConfig, tree["policy"])
    return _build(TrainConfig, {**tree, "algorithm": algorithm})


def _check_sweep(config: TrainConfig) -> None:
    """Each value must be a good setting by itself, and of a kind that can be traced."""
    floats = {
        field.name
        for field in dataclasses.fields(config.algorithm)
        if isinstance(getattr(config.algorithm, field.name), float)
    }
    for name, values in config.sweep:
        check_choice("swept setting", name, sorted(floats))
        if len(set(values)) != len(values) or not values:
            raise ValueError(
                f"sweep of {name} has the values {values}, needs different ones, at "
                "least one"
            )
        for value in values:
            dataclasses.replace(config.algorithm, **{name: float(value)})


def _build(kind: type, tree: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in tree:
        check_choice(f"setting of {kind.__name__}", name, known)
    return kind(**{name: _tuples(value) for name, value in tree.items()})


def _lists(tree: Any) -> Any:
    """What JSON can say: lists in the place of tuples."""
    if isinstance(tree, dict):
        return {name: _lists(value) for name, value in tree.items()}
    return [_lists(x) for x in tree] if isinstance(tree, (tuple, list)) else tree


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value
