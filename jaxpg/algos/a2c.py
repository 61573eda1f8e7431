r"""A2C: one policy-gradient step on segments, with advantages from a critic.

    w[t] = A[t] by GAE,     params += step of  mean w[t] grad log pi[t] + c grad H[t]

Reference: Mnih et al. 2016, "Asynchronous methods for deep reinforcement learning",
here synchronous; Schulman et al. 2016 for the advantages.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg._checks import check_positive, check_range
from jaxpg.advantages import standardize
from jaxpg.algos.base import (
    Algorithm,
    Info,
    Segments,
    Task,
    ascend,
    check_steps,
    make_optimizer,
)
from jaxpg.algos.measures import (
    count_non_finite,
    count_non_finite_decisions,
    explained_variance,
    global_norm,
    mean_kl,
)
from jaxpg.algos.segments import (
    acting_params,
    advantages_of,
    check_segments,
    fit_critic,
    needed_critic,
    policy_gradient,
)
from jaxpg.chunks import ChunkSize
from jaxpg.critics import (
    CriticState,
    actor_with_critic,
    follow_targets,
    init_critic,
    policy_rows,
)
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = ["A2CConfig", "A2CState", "a2c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class A2CConfig:
    """Settings of A2C."""

    num_steps: int = 16
    """Decisions of each environment for an update."""
    discount: float = 0.99
    """Weight of the next reward relative to this one, in [0, 1]."""
    lambda_: float = 0.95
    """How far GAE trusts rewards over values, in [0, 1]."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy, in units of the (standardised) advantages per nat."""
    standardize: bool = True
    """Bring advantages to mean 0 and deviation 1 over the batch: biased, popular."""
    learning_rate: float = 3e-3
    """Step size of Adam for the policy."""
    critic_learning_rate: float = 3e-3
    """Step size of Adam for the critic."""
    critic_epochs: int = 2
    """Passes of the critic over the batch."""
    anneal: bool = False
    """Let the policy's rate fall linearly to zero over the run."""
    max_grad_norm: float | None = 0.5
    """Scale either gradient down to this global norm where it is longer."""
    adapt_to_kl: float | None = None
    """Let the policy's rate follow the KL that its last step made, to stay at this."""
    bootstrap_truncated: bool = True
    """Value what a time limit cut off. Without it time limits count as true ends."""
    chunk_size: ChunkSize = "auto"
    """Decisions that a gradient works on together; sets memory and speed, not the
    result. "auto" suits the device, none takes all at once."""

    def __post_init__(self) -> None:
        check_steps(self)
        check_positive("critic_epochs", self.critic_epochs)
        check_range("entropy_coefficient", self.entropy_coefficient, 0.0)


class A2CState(NamedTuple):
    """Everything that the next update needs.

    Attributes:
        params: the policy's parameters.
        opt_state: its optimiser's state.
        critic: parameters, optimiser and target statistics of the critic.
        kl: KL that the last step made, in nats; 0 where nothing adapts to it.
    """

    params: Params
    opt_state: PyTree
    critic: CriticState
    kl: Array


def a2c(config: A2CConfig, task: Task) -> Algorithm:
    """A2C as a record of pure functions.

    Args:
        config: its settings.
        task: the policy, the world, and a critic.

    Returns:
        An algorithm whose `update` takes segments with `next_obs`.

    Raises:
        ValueError: if there is no critic, if the learning rate is to be annealed over a
            run of unknown length, or if the world cannot tell time limits from true
            ends and bootstrapping is asked for.
    """
    check_segments(config, task)
    critic = needed_critic(task)
    optimizer = make_optimizer(
        config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        anneal_over=task.num_updates if config.anneal else None,
        adapt_to_kl=config.adapt_to_kl,
    )
    critic_optimizer = make_optimizer(
        config.critic_learning_rate, max_grad_norm=config.max_grad_norm
    )

    def init(key: PRNGKey, obs: PyTree) -> A2CState:
        key_policy, key_critic = jax.random.split(key)
        params = task.policy.init(key_policy, obs)
        return A2CState(
            params,
            optimizer.init(params),
            init_critic(critic, critic_optimizer, key_critic, obs),
            jnp.zeros((), float),
        )

    def update(
        key: PRNGKey, state: A2CState, trajectories: Trajectory
    ) -> tuple[A2CState, Info]:
        key_entropy, key_critic = jax.random.split(key)
        estimate = advantages_of(config, task, state.critic, trajectories)
        weights = estimate.advantages
        if config.standardize:
            weights = standardize(weights, trajectories.mask)
        gradient, entropy = policy_gradient(
            config, task, state.params, trajectories, weights, key_entropy
        )
        params, opt_state = ascend(
            optimizer, gradient, state.opt_state, state.params, kl=state.kl
        )
        fitted, loss = fit_critic(
            task,
            critic_optimizer,
            follow_targets(state.critic, estimate.targets, trajectories.mask),
            key_critic,
            trajectories,
            estimate.targets,
            num_epochs=config.critic_epochs,
            chunk_size=config.chunk_size,
        )
        kl = state.kl
        if config.adapt_to_kl is not None:
            rows = policy_rows(critic, trajectories)._replace(next_obs=None)
            kl = mean_kl(task, state.params, params, rows, chunk_size=config.chunk_size)
        info = {
            "entropy": entropy,
            "grad_norm": global_norm(gradient),
            "critic_loss": loss,
            "explained_variance": explained_variance(
                estimate.targets, estimate.values, trajectories.mask
            ),
            **({} if config.adapt_to_kl is None else {"kl": kl}),
            "non_finite_batch": count_non_finite_decisions(
                trajectories, estimate.advantages
            ),
            "non_finite_gradient": count_non_finite(gradient),
            "non_finite_params": count_non_finite((params, fitted.params)),
        }
        return A2CState(params, opt_state, fitted, kl), info

    return Algorithm(
        init,
        update,
        Segments(config.num_steps),
        actor_with_critic(task.policy, critic),
        lambda state: acting_params(task, state.params, state.critic.params),
    )
