"""Settings of the studies: frozen records, on the command line and in Python alike."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxpg._checks import check_positive, check_range
from jaxpg.study.naming import expand_names, parse_estimator
from jaxpg.train.config import PolicyConfig

__all__ = [
    "BatchSizeConfig",
    "LearningConfig",
    "OffPolicyConfig",
    "VarianceConfig",
    "quick_batch_size",
    "quick_learning",
    "quick_off_policy",
    "quick_variance",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceConfig:
    """Settings of the study of variance."""

    env: str = "CartPole-v1"
    """Environment (`jaxpg list envs`), or a tabular world with an exact gradient: mine,
    dark-mine, random-SEED, chain-HORIZON."""
    checkpoint: Path | None = None
    """Folder of a run whose policy is studied; unset: an untrained one."""
    update: str = "latest"
    """Which checkpoint of the run: latest, best, or an update's number."""
    member: int = 0
    """Which of the run's seeds or swept settings."""
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    """Networks of an untrained policy."""
    max_steps: int | None = None
    """Truncate episodes after this many decisions."""
    estimators: tuple[str, ...] = ("default",)
    """Names CREDIT/BASELINE/RATIO, parts of which may be left out, such as
    leave-one-out or causal; or groups: default, all, ratios."""
    batch_sizes: tuple[int, ...] = tuple(2**k for k in range(4, 17))
    """Trajectories in a batch; powers of two."""
    num_trajectories: int = 2**16
    """Trajectories that are sampled, and shared by all: at size N they make
    num_trajectories / N independent batches, but at most max_batches."""
    max_batches: int = 256
    """The most batches that are weighed at one size."""
    reference_trajectories: int = 2**16
    """Trajectories of the reference gradient, where no exact one is known."""
    discount: float = 1.0
    """Of the objective, in [0, 1]."""
    behaviour_kl: float | None = None
    """KL(mu || pi) per decision, in nats, of a behaviour policy mu that acts for
    estimators with ratios. Unset: there is none."""
    seed: int = 0
    """Random seed of everything."""
    chunk_size: int = 256
    """Trajectories that are held at once; a power of two. Sets memory, not results."""
    num_devices: int | None = None
    """Devices that share the trajectories, 1 or 2. Unset: 2 where there are."""
    memory_gib: float = 2.0
    """Trajectories are kept up to this, and played again beyond it."""
    folder: Path | None = None
    """Where the study is kept. Unset: studies/KIND-ENVIRONMENT-TIME."""

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "max_batches", "reference_trajectories"):
            check_positive(name, getattr(self, name))
        for name, value in (
            ("chunk_size", self.chunk_size),
            *(("batch_sizes", size) for size in self.batch_sizes),
        ):
            _check_power_of_two(name, value)
        if not self.batch_sizes:
            raise ValueError("batch_sizes is empty, needs at least one; such as 16 64")
        check_range("discount", self.discount, 0.0, 1.0)
        if self.behaviour_kl is not None:
            check_range("behaviour_kl", self.behaviour_kl, 0.0, open_low=True)
        if max(self.batch_sizes) > self.num_trajectories:
            raise ValueError(
                f"batch_sizes go up to {max(self.batch_sizes)}, but num_trajectories "
                f"is {self.num_trajectories}; sample as many, better 8 times as many"
            )
        expand_names(self.estimators)


def quick_variance(**changes: Any) -> VarianceConfig:
    """Settings that finish within two minutes on two cores.

    Args:
        **changes: settings that differ from that.
    """
    small: dict[str, Any] = {
        "batch_sizes": (16, 32, 64, 128, 256, 512),
        "num_trajectories": 2**13,
        "max_batches": 128,
        "reference_trajectories": 2**13,
        "chunk_size": 128,
        "estimators": (
            "total-return",
            "reward-to-go",
            "batch-mean",
            "leave-one-out",
            "time-dependent",
            "optimal",
        ),
    }
    return VarianceConfig(**(small | changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffPolicyConfig:
    """Settings of the study of importance ratios."""

    env: str = "chain"
    """A tabular world without an end of its own, "chain" or "random-SEED", where bias
    and growth are known exactly; or any environment (`jaxpg list envs`)."""
    checkpoint: Path | None = None
    """Folder of a run whose policy is the target; unset: an untrained one."""
    update: str = "latest"
    """Which checkpoint of the run: latest, best, or an update's number."""
    member: int = 0
    """Which of the run's seeds or swept settings."""
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    """Networks of an untrained policy."""
    estimators: tuple[str, ...] = ("ratios",)
    """Names with a ratio, such as causal or first-order/max-rho=2; or the group
    ratios."""
    kls: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """KL(mu || pi) per decision, in nats."""
    horizons: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Decisions after which episodes are truncated."""
    batch_size: int = 64
    """Trajectories in a batch; a power of two."""
    num_trajectories: int = 2**14
    """Trajectories in each cell: num_trajectories / batch_size batches."""
    reference_trajectories: int = 2**14
    """Trajectories of the reference gradient, where no exact one is known."""
    seed: int = 0
    """Random seed of everything."""
    chunk_size: int = 1024
    """Trajectories that are held at once; a power of two."""
    num_devices: int | None = None
    """Devices that share the trajectories, 1 or 2. Unset: 2 where there are."""
    memory_gib: float = 1.0
    """Trajectories are kept up to this, and played again beyond it."""
    folder: Path | None = None
    """Where the study is kept. Unset: studies/KIND-ENVIRONMENT-TIME."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk_size"):
            _check_power_of_two(name, getattr(self, name))
        for name in ("kls", "horizons"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, needs at least one value")
        for kl in self.kls:
            check_range("kls", kl, 0.0, open_low=True)
        for horizon in self.horizons:
            check_positive("horizons", horizon)
        if self.num_trajectories < 8 * self.batch_size:
            raise ValueError(
                f"num_trajectories is {self.num_trajectories}, needs at least 8 "
                f"batches = {8 * self.batch_size}, for an interval; sample more"
            )
        expand_names(self.estimators)

    @property
    def discount(self) -> float:
        """Of the objective: horizons are finite."""
        return 1.0


def quick_off_policy(**changes: Any) -> OffPolicyConfig:
    """Settings that finish within two minutes on two cores.

    Args:
        **changes: settings that differ from that.
    """
    small: dict[str, Any] = {
        "kls": (0.01, 0.1),
        "horizons": (2, 8, 32),
        "num_trajectories": 2**12,
        "reference_trajectories": 2**13,
        "chunk_size": 512,
    }
    return OffPolicyConfig(**(small | changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """Settings of the study of learning."""

    env: str = "CartPole-v1"
    """Environment; `jaxpg list envs` shows all."""
    max_steps: int | None = None
    """Truncate episodes after this many decisions."""
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    """Networks of the policy."""
    estimators: tuple[str, ...] = (
        "total-return",
        "reward-to-go",
        "leave-one-out",
        "time-dependent",
    )
    """Names CREDIT/BASELINE, without ratios."""
    batch_sizes: tuple[int, ...] = (16, 64, 256)
    """Trajectories of an update; powers of two."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Step sizes of Adam. The one whose first half of the seeds learns fastest is shown
    on the other half, so that no curve profits from the luck that chose it."""
    num_episodes: int = 4096
    """Trajectories that every run may learn from."""
    num_seeds: int = 16
    """Seeds of every run, side by side in one program; even."""
    seed: int = 0
    """First random seed."""
    members_at_once: int | None = 8
    """Seeds times step sizes that run side by side; the others wait for their turn."""
    folder: Path | None = None
    """Where the study is kept. Unset: studies/KIND-ENVIRONMENT-TIME."""

    def __post_init__(self) -> None:
        _check_learning(self)
        if any(parse_estimator(x).credit.ratio != "none" for x in self.estimators):
            raise ValueError(
                f"estimators are {', '.join(self.estimators)}, needs names without "
                "ratios: REINFORCE learns from its own trajectories; take them out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSizeConfig:
    """Settings of the study of batch sizes."""

    env: str = "CartPole-v1"
    """Environment; `jaxpg list envs` shows all."""
    max_steps: int | None = None
    """Truncate episodes after this many decisions."""
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    """Networks of the policy."""
    estimators: tuple[str, ...] = ("time-dependent",)
    """Names CREDIT/BASELINE, without ratios."""
    target_return: float = 400.0
    """Mean return of the last `window` episodes that ends the race."""
    window: int = 64
    """Episodes that this mean is over, or one update's, if those are more."""
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Trajectories of an update; powers of two."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Step sizes of Adam; each batch size takes the one that is fastest on the first
    half of the seeds, and is shown on the other half."""
    num_episodes: int = 8192
    """Trajectories that every run may learn from."""
    num_seeds: int = 16
    """Seeds of every run, side by side in one program; even."""
    seed: int = 0
    """First random seed."""
    members_at_once: int | None = 8
    """Seeds times step sizes that run side by side; the others wait for their turn."""
    noise_trajectories: int = 4096
    """Trajectories that the noise scale is measured with, at each of four stages."""
    folder: Path | None = None
    """Where the study is kept. Unset: studies/KIND-ENVIRONMENT-TIME."""

    def __post_init__(self) -> None:
        _check_learning(self)
        check_positive("window", self.window)
        check_positive("noise_trajectories", self.noise_trajectories)


def quick_learning(**changes: Any) -> LearningConfig:
    """Settings that finish within two minutes on two cores.

    Args:
        **changes: settings that differ from that.
    """
    small: dict[str, Any] = {
        "estimators": ("reward-to-go", "time-dependent"),
        "batch_sizes": (16, 64),
        "learning_rates": (0.01, 0.03),
        "num_episodes": 512,
        "num_seeds": 4,
        "max_steps": 200,
    }
    return LearningConfig(**(small | changes))


def quick_batch_size(**changes: Any) -> BatchSizeConfig:
    """Settings that finish within two minutes on two cores.

    Args:
        **changes: settings that differ from that.
    """
    small: dict[str, Any] = {
        "batch_sizes": (8, 32, 128),
        "learning_rates": (0.01, 0.03),
        "num_episodes": 1024,
        "num_seeds": 4,
        "target_return": 100.0,
        "max_steps": 200,
        "noise_trajectories": 1024,
    }
    return BatchSizeConfig(**(small | changes))


def _check_learning(config: Any) -> None:
    """What studies that train have in common."""
    for size in config.batch_sizes:
        _check_power_of_two("batch_sizes", size)
    for name in ("batch_sizes", "learning_rates"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty, needs at least one value")
    check_positive("num_seeds", config.num_seeds)
    if config.num_seeds % 2:
        raise ValueError(
            f"num_seeds is {config.num_seeds}, needs an even number: one half chooses "
            "the step size, the other is shown"
        )
    if config.num_episodes < 4 * max(config.batch_sizes):
        raise ValueError(
            f"num_episodes is {config.num_episodes}, needs at least 4 updates of the "
            f"largest batch = {4 * max(config.batch_sizes)}; give more, or take "
            "smaller --batch-sizes"
        )
    expand_names(config.estimators)


def _check_power_of_two(name: str, value: int) -> None:
    check_positive(name, value)
    if value & (value - 1):
        below = 1 << (value.bit_length() - 1)
        raise ValueError(
            f"{name} holds {value}, needs powers of two, so that batches fill chunks; "
            f"the nearest are {below} and {2 * below}"
        )
