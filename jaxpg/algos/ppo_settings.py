"""Settings of PPO, and what does not fit."""

import dataclasses
from typing import Literal, get_args

from jaxpg._checks import check_choice, check_positive, check_range
from jaxpg.algos.base import check_steps
from jaxpg.chunks import ChunkSize

__all__ = ["PPOConfig"]

Form = Literal["clip", "kl-penalty"]
Standardize = Literal["minibatch", "batch", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of PPO."""

    num_steps: int = 128
    """Decisions of each environment for an update."""
    num_epochs: int = 4
    """Passes over the batch."""
    num_minibatches: int = 4
    """Steps in each pass."""
    discount: float = 0.99
    """Weight of the next reward relative to this one, in [0, 1]."""
    lambda_: float = 0.95
    """How far GAE trusts rewards over values, in [0, 1]."""
    form: Form = "clip"
    """What holds the policy near the one that acted: clipped ratios or a KL penalty."""
    clip_eps: float = 0.2
    """How far a ratio may go from 1 before it earns nothing more."""
    kl_coefficient: float = 1.0
    """First weight of the KL penalty; it adapts."""
    kl_target: float = 0.01
    """KL that an update should make, in nats, where a penalty adapts."""
    clip_values: float | None = None
    """How far a value may go from the old one, in standard deviations of the targets;
    unset does not clip."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy, in units of the (standardised) advantages per nat."""
    standardize: Standardize = "minibatch"
    """Over what advantages are brought to mean 0 and deviation 1: biased, popular."""
    learning_rate: float = 1e-3
    """Step size of Adam for the policy."""
    critic_learning_rate: float = 1e-3
    """Step size of Adam for the critic."""
    anneal: bool = False
    """Let both rates fall linearly to zero over the run."""
    max_grad_norm: float | None = 0.5
    """Scale either gradient down to this global norm where it is longer."""
    stop_at_kl: float | None = None
    """Skip the rest of an update once a minibatch shows more KL than this, in nats."""
    adapt_to_kl: float | None = None
    """Let the policy's rate follow the KL of its minibatches, to stay near this."""
    bootstrap_truncated: bool = True
    """Value what a time limit cut off. Without it time limits count as true ends."""
    chunk_size: ChunkSize = "auto"
    """Decisions that a gradient works on together; sets memory and speed, not the
    result. "auto" suits the device, none takes all at once."""
    replay_envs: int | None = None
    """Store no batch, but play it again, so many environments at a time, wherever it
    is looked at: once, and once an epoch. Memory is then theirs alone. Minibatches
    are made of whole rows, and advantages standardised over the batch or not at all.
    Unset stores the batch."""

    def __post_init__(self) -> None:
        check_steps(self)
        check_positive("num_minibatches", self.num_minibatches)
        check_choice("form", self.form, get_args(Form))
        check_choice("standardize", self.standardize, get_args(Standardize))
        check_range("clip_eps", self.clip_eps, 0.0, 1.0, open_low=True)
        check_range("kl_coefficient", self.kl_coefficient, 0.0)
        check_range("entropy_coefficient", self.entropy_coefficient, 0.0)
        if self.replay_envs is not None:
            check_positive("replay_envs", self.replay_envs)
            if self.standardize == "minibatch":
                raise ValueError(
                    "standardize is 'minibatch', which needs a minibatch at once, but "
                    "replay_envs is set and none is ever stored; take 'batch' or 'none'"
                )
        for name in ("kl_target", "clip_values", "stop_at_kl", "adapt_to_kl"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0.0, open_low=True)
