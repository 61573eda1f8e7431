r"""TRPO: the natural direction on segments, as far as the KL allows and it climbs.

    x = (F + damping)^-1 g,    step = shrink^k sqrt(2 max_kl / x^T F x) x

g, F, the KL and the surrogate, mean rho A, are means over decisions. The first k is
taken whose step has a KL of at most `max_kl` on the whole batch and a higher surrogate;
without one the parameters stay. The critic is fitted beside.

Reference: Schulman, Levine, Abbeel, Jordan and Moritz 2015, "Trust region policy
optimization".
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import optax

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
    chunks_for,
    count_non_finite,
    count_non_finite_decisions,
    explained_variance,
    global_norm,
    mean_kl,
    mean_surrogate,
)
from jaxpg.algos.minibatches import check_minibatches
from jaxpg.algos.segments import (
    acting_params,
    advantages_of,
    check_segments,
    fit_critic,
    needed_critic,
    policy_gradient,
    rows_cut,
)
from jaxpg.chunks import ChunkSize
from jaxpg.critics import (
    CriticState,
    actor_with_critic,
    follow_targets,
    init_critic,
    policy_rows,
)
from jaxpg.fisher import fisher_vector_product
from jaxpg.trust_region import natural_gradient, trust_region
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = ["TRPOConfig", "TRPOState", "thinned", "trpo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TRPOConfig:
    """Settings of TRPO."""

    num_steps: int = 128
    """Decisions of each environment for an update."""
    discount: float = 0.99
    """Weight of the next reward relative to this one, in [0, 1]."""
    lambda_: float = 0.95
    """How far GAE trusts rewards over values, in [0, 1]."""
    max_kl: float = 0.01
    """The most KL that an update may make, in nats, a mean over decisions."""
    cg_iterations: int = 10
    """Steps of conjugate gradients; each costs one Fisher product."""
    damping: float = 0.1
    """What is added to the Fisher matrix's diagonal, in its own units."""
    fisher_every: int = 1
    """The Fisher products use every n-th row of the batch. The KL limit is checked on
    all of it."""
    max_backtracks: int = 10
    """Shorter steps that are tried before none is taken."""
    shrink: float = 0.7
    """How much shorter each is than the one before, in (0, 1)."""
    standardize: bool = True
    """Bring advantages to mean 0 and deviation 1 over the batch."""
    critic_learning_rate: float = 1e-3
    """Step size of Adam for the critic."""
    critic_epochs: int = 8
    """Passes of the critic over the batch."""
    critic_minibatches: int = 4
    """Steps in each pass."""
    bootstrap_truncated: bool = True
    """Value what a time limit cut off. Without it time limits count as true ends."""
    chunk_size: ChunkSize = "auto"
    """Decisions that a gradient works on together; sets memory and speed, not the
    result. "auto" suits the device, none takes all at once."""

    entropy_coefficient = 0.0
    anneal = False

    def __post_init__(self) -> None:
        check_steps(self)
        for name in (
            "cg_iterations",
            "fisher_every",
            "critic_epochs",
            "critic_minibatches",
        ):
            check_positive(name, getattr(self, name))
        check_range(
            "max_kl",
            self.max_kl,
            0.0,
            open_low=True,
            cure="no step has a KL of zero; 0.01 is usual",
        )
        check_range("damping", self.damping, 0.0)


class TRPOState(NamedTuple):
    """Everything that the next update needs.

    Attributes:
        params: the policy's parameters.
        opt_state: how the last search went; nothing of it is used by the next.
        critic: parameters, optimiser and target statistics of the critic.
    """

    params: Params
    opt_state: PyTree
    critic: CriticState


def trpo(config: TRPOConfig, task: Task) -> Algorithm:
    """TRPO as a record of pure functions.

    Args:
        config: its settings.
        task: the policy, the world, and a critic.

    Returns:
        An algorithm whose `update` takes segments with `next_obs`.

    Raises:
        ValueError: if there is no critic, if the world cannot tell time limits from
            true ends and bootstrapping is asked for, or if minibatches do not divide
            the batch.
    """
    check_segments(config, task)
    critic = needed_critic(task)
    check_minibatches(
        task, config.num_steps, config.critic_minibatches, cut_rows=rows_cut(task)
    )
    optimizer = optax.chain(
        natural_gradient(num_iterations=config.cg_iterations, damping=config.damping),
        trust_region(
            config.max_kl, max_backtracks=config.max_backtracks, shrink=config.shrink
        ),
    )
    critic_optimizer = make_optimizer(config.critic_learning_rate)

    def init(key: PRNGKey, obs: PyTree) -> TRPOState:
        key_policy, key_critic = jax.random.split(key)
        params = task.policy.init(key_policy, obs)
        return TRPOState(
            params,
            optimizer.init(params),
            init_critic(critic, critic_optimizer, key_critic, obs),
        )

    def update(
        key: PRNGKey, state: TRPOState, trajectories: Trajectory
    ) -> tuple[TRPOState, Info]:
        key_entropy, key_critic = jax.random.split(key)
        estimate = advantages_of(config, task, state.critic, trajectories)
        weights = estimate.advantages
        if config.standardize:
            weights = standardize(weights, trajectories.mask)
        gradient, entropy = policy_gradient(
            config, task, state.params, trajectories, weights, key_entropy
        )
        rows = policy_rows(critic, trajectories)._replace(next_obs=None)
        params, opt_state = ascend(
            optimizer,
            gradient,
            state.opt_state,
            state.params,
            **_measures(config, task, state.params, rows, weights),
        )
        fitted, loss = fit_critic(
            task,
            critic_optimizer,
            follow_targets(state.critic, estimate.targets, trajectories.mask),
            key_critic,
            trajectories,
            estimate.targets,
            num_epochs=config.critic_epochs,
            num_minibatches=config.critic_minibatches,
            chunk_size=config.chunk_size,
        )
        solved, search = opt_state
        info = {
            "entropy": entropy,
            "grad_norm": global_norm(gradient),
            "kl": search.kl,
            "step_fraction": search.step_fraction,
            "improvement": search.improvement,
            "rejected_steps": search.num_rejections,
            "no_step_found": ~search.found,
            "cg_residual": solved.residual,
            "cg_iterations": solved.num_iterations,
            "critic_loss": loss,
            "explained_variance": explained_variance(
                estimate.targets, estimate.values, trajectories.mask
            ),
            "non_finite_batch": count_non_finite_decisions(
                trajectories, estimate.advantages
            ),
            "non_finite_gradient": count_non_finite(gradient),
            "non_finite_params": count_non_finite((params, fitted.params)),
        }
        return TRPOState(params, opt_state, fitted), info

    return Algorithm(
        init,
        update,
        Segments(config.num_steps),
        actor_with_critic(task.policy, critic),
        lambda state: acting_params(task, state.params, state.critic.params),
    )


def thinned(task: Task, rows: Trajectory, every: int) -> Trajectory:
    """Every n-th row of the batch, on each device of its own rows; at least one."""
    if every == 1:
        return rows
    return task.map_rows(
        lambda _, part: jax.tree.map(lambda x: x[::every], part), (), rows
    )


def _measures(
    config: TRPOConfig, task: Task, params: Params, rows: Trajectory, weights: Any
) -> dict[str, Any]:
    """What the step is made of and judged by."""
    some = thinned(task, rows, config.fisher_every)

    def product(vector: Params) -> Params:
        return fisher_vector_product(
            task.policy.unroll,
            params,
            some,
            vector,
            chunks=chunks_for(task.policy, config.chunk_size),
            sum_over_rows=task.sum_over_rows,
        )

    def objective(new: Params) -> jax.Array:
        return mean_surrogate(task, new, rows, weights, chunk_size=config.chunk_size)

    def kl(new: Params) -> jax.Array:
        return mean_kl(task, params, new, rows, chunk_size=config.chunk_size)

    return {"fisher_vector_product": product, "objective": objective, "kl": kl}
