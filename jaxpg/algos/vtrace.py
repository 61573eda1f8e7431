r"""V-trace actor-critic: several steps on segments that an older policy collected.

    w[t] = min(max_rho, rho[t]) (r[t] + discount v[t + 1] - V[t]),     rho = pi / mu

with the targets v of V-trace, which the critic learns too. Ratios, values and targets
are taken anew in every pass.

Reference: Espeholt et al. 2018, "IMPALA: scalable distributed deep-RL with importance
weighted actor-learner architectures".
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg._checks import check_positive, check_range
from jaxpg.advantages import VTrace, standardize
from jaxpg.advantages import vtrace as vtrace_of_row
from jaxpg.algos.base import (
    Algorithm,
    Info,
    Segments,
    Task,
    ascend,
    check_steps,
    make_optimizer,
)
from jaxpg.algos.behaviour import Lagged, follow, start_lag
from jaxpg.algos.measures import (
    count_non_finite,
    count_non_finite_decisions,
    explained_variance,
    global_norm,
    log_ratios_of,
)
from jaxpg.algos.segments import (
    acting_params,
    check_segments,
    fit_critic,
    needed_critic,
    policy_gradient,
    valued,
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

__all__ = ["VTraceConfig", "VTraceState", "vtrace"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VTraceConfig:
    """Settings of the V-trace actor-critic."""

    num_steps: int = 16
    """Decisions of each environment for an update."""
    num_epochs: int = 2
    """Passes over a batch, one step of the policy each."""
    behaviour_lag: int = 2
    """Updates after which the policy that collects is renewed; 1 is always the last."""
    discount: float = 0.99
    """Weight of the next reward relative to this one, in [0, 1]."""
    lambda_: float = 1.0
    """How far targets trust rewards over values, in [0, 1]; the paper's is 1."""
    max_rho: float = 1.0
    """The largest ratio of a decision's own error."""
    max_c: float = 1.0
    """The largest ratio of the trace."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy, in units of the (standardised) advantages per nat."""
    standardize: bool = True
    """Bring advantages to mean 0 and deviation 1 over the batch: biased, popular."""
    learning_rate: float = 2e-3
    """Step size of Adam for the policy."""
    critic_learning_rate: float = 3e-3
    """Step size of Adam for the critic."""
    anneal: bool = False
    """Let the policy's rate fall linearly to zero over the run."""
    max_grad_norm: float | None = 0.5
    """Scale either gradient down to this global norm where it is longer."""
    bootstrap_truncated: bool = True
    """Value what a time limit cut off. Without it time limits count as true ends."""
    chunk_size: ChunkSize = "auto"
    """Decisions that a gradient works on together; sets memory and speed, not the
    result. "auto" suits the device, none takes all at once."""

    def __post_init__(self) -> None:
        check_steps(self)
        check_positive("behaviour_lag", self.behaviour_lag)
        check_range("entropy_coefficient", self.entropy_coefficient, 0.0)
        check_range("max_rho", self.max_rho, 0.0, open_low=True)
        check_range("max_c", self.max_c, 0.0, open_low=True)


class VTraceState(NamedTuple):
    """Everything that the next update needs.

    Attributes:
        params: the policy's parameters.
        opt_state: its optimiser's state.
        critic: parameters, optimiser and target statistics of the critic.
        behaviour: the parameters that collect next, of policy and critic.
    """

    params: Params
    opt_state: PyTree
    critic: CriticState
    behaviour: Lagged


def vtrace(config: VTraceConfig, task: Task) -> Algorithm:
    """The V-trace actor-critic as a record of pure functions.

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
    steps = None if task.num_updates is None else task.num_updates * config.num_epochs
    optimizer = make_optimizer(
        config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        anneal_over=steps if config.anneal else None,
    )
    critic_optimizer = make_optimizer(
        config.critic_learning_rate, max_grad_norm=config.max_grad_norm
    )

    def init(key: PRNGKey, obs: PyTree) -> VTraceState:
        key_policy, key_critic = jax.random.split(key)
        params = task.policy.init(key_policy, obs)
        first = init_critic(critic, critic_optimizer, key_critic, obs)
        acting = acting_params(task, params, first.params)
        return VTraceState(params, optimizer.init(params), first, start_lag(acting))

    def one_pass(
        state: VTraceState, key: PRNGKey, trajectories: Trajectory
    ) -> tuple[VTraceState, Info]:
        key_entropy, key_critic = jax.random.split(key)
        estimate, values, log_rhos = _vtrace(config, task, state, trajectories)
        weights = estimate.advantages
        if config.standardize:
            weights = standardize(weights, trajectories.mask)
        gradient, entropy = policy_gradient(
            config, task, state.params, trajectories, weights, key_entropy
        )
        params, opt_state = ascend(optimizer, gradient, state.opt_state, state.params)
        fitted, loss = fit_critic(
            task,
            critic_optimizer,
            follow_targets(state.critic, estimate.targets, trajectories.mask),
            key_critic,
            trajectories,
            estimate.targets,
            num_epochs=1,
            chunk_size=config.chunk_size,
        )
        rhos = jnp.exp(jnp.minimum(log_rhos, 20.0))
        info = {
            "entropy": entropy,
            "grad_norm": global_norm(gradient),
            "critic_loss": loss,
            "mean_ratio": jnp.mean(rhos, where=trajectories.mask),
            "explained_variance": explained_variance(
                estimate.targets, values, trajectories.mask
            ),
            "non_finite_batch": count_non_finite_decisions(
                trajectories, estimate.advantages
            ),
            "non_finite_gradient": count_non_finite(gradient),
            "non_finite_params": count_non_finite((params, fitted.params)),
        }
        state = state._replace(params=params, opt_state=opt_state, critic=fitted)
        return state, info

    def update(
        key: PRNGKey, state: VTraceState, trajectories: Trajectory
    ) -> tuple[VTraceState, Info]:
        state, infos = jax.lax.scan(
            lambda state, key: one_pass(state, key, trajectories),
            state,
            jax.random.split(key, config.num_epochs),
        )
        acting = acting_params(task, state.params, state.critic.params)
        lagged = follow(state.behaviour, acting, config.behaviour_lag)
        counted = {n: jnp.sum(x) for n, x in infos.items() if n.startswith("non_fin")}
        means = {n: jnp.mean(x) for n, x in infos.items() if n not in counted}
        return state._replace(behaviour=lagged), means | counted

    return Algorithm(
        init,
        update,
        Segments(config.num_steps),
        actor_with_critic(task.policy, critic),
        lambda state: state.behaviour.params,
    )


def _vtrace(
    config: VTraceConfig, task: Task, state: VTraceState, rows: Trajectory
) -> tuple[VTrace, Array, Array]:
    """Targets and advantages, the values that they correct, and the log-ratios."""
    row, values = valued(config, task, state.critic, rows)
    ours = policy_rows(needed_critic(task), rows)._replace(next_obs=None)

    log_rhos = log_ratios_of(
        task, state.params, ours, chunk_size=config.chunk_size, all_real=True
    )

    def of_row(row: Any, log_rhos: Array) -> VTrace:
        return vtrace_of_row(
            row,
            log_rhos,
            config.discount,
            lambda_=config.lambda_,
            max_rho=config.max_rho,
            max_c=config.max_c,
        )

    return jax.vmap(of_row)(row, log_rhos), values.values, log_rhos
