r"""Natural policy gradients on whole episodes: by the Fisher matrix, and by regression.

    NPG:    x = (F + damping)^-1 g,     F and g of the whole batch
    eNAC:   R_i = x . phi_i + b,        phi_i = sum_t discount^t grad log pi[i, t]

eNAC's regression of returns on the trajectories' scores has the natural gradient for
its limit, and its offset b for a baseline. Either direction becomes a step by a rate,
or by the length that makes a KL of `max_kl`, to second order.

References: Kakade 2001, "A natural policy gradient"; Peters and Schaal 2008, "Natural
actor-critic"; Duan et al. 2016 for the step by KL ("truncated natural policy
gradient").
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxpg._checks import check_positive, check_range
from jaxpg.algos.base import (
    Algorithm,
    AlgorithmState,
    Episodes,
    Info,
    Task,
    ascend,
    check_steps,
    needed_max_steps,
)
from jaxpg.algos.measures import (
    chunks_for,
    count_non_finite,
    describe_batch,
    global_norm,
    mean_kl,
)
from jaxpg.algos.reinforce import reinforce_gradient, shares_credit
from jaxpg.baselines import Baseline
from jaxpg.chunks import ChunkSize
from jaxpg.credit import CreditConfig, CreditName, credit_of_used
from jaxpg.estimators import BaselineName, EstimatorConfig, make_estimator
from jaxpg.fisher import episodic_natural_gradient, fisher_vector_product
from jaxpg.policies import log_prob_fn
from jaxpg.returns import leading_discounts
from jaxpg.trust_region import natural_gradient, normalize_by_kl
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = ["ENACConfig", "NPGConfig", "enac", "npg"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NPGConfig:
    """Settings of the natural policy gradient."""

    episodes_per_env: int = 4
    """Whole episodes per environment and update."""
    credit: CreditName = "reward-to-go"
    """What a decision is weighed by, before the baseline."""
    baseline: BaselineName = "time-dependent"
    """What is subtracted from the credit; the names are REINFORCE's."""
    discount: float = 1.0
    """Weight of the next reward relative to this one, in [0, 1]."""
    keep_leading_discount: bool = False
    """With reward-to-go, weigh decision t by discount^t as well."""
    max_kl: float | None = 0.01
    """KL that a step makes to second order, in nats, a mean over decisions. Unset:
    steps are `learning_rate` times the natural gradient."""
    learning_rate: float = 0.1
    """Step size where `max_kl` is unset."""
    cg_iterations: int = 10
    """Steps of conjugate gradients; each costs one Fisher product."""
    damping: float = 0.1
    """What is added to the Fisher matrix's diagonal: in units of a mean over decisions
    with `max_kl`, else of a mean over trajectories."""
    chunk_size: ChunkSize = "auto"
    """Decisions that a gradient works on together; sets memory and speed, not the
    result. "auto" suits the device, none takes all at once."""

    def __post_init__(self) -> None:
        check_steps(self)
        _ = self.estimator  # which checks the settings that it takes
        check_positive("cg_iterations", self.cg_iterations)
        check_range("damping", self.damping, 0.0)
        if self.max_kl is not None:
            check_range("max_kl", self.max_kl, 0.0, open_low=True)

    @property
    def estimator(self) -> EstimatorConfig:
        """The part of the settings that makes the gradient."""
        credit = CreditConfig(
            credit=self.credit,
            discount=self.discount,
            keep_leading_discount=self.keep_leading_discount,
        )
        return EstimatorConfig(credit=credit, baseline=self.baseline)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ENACConfig:
    """Settings of the episodic natural actor-critic."""

    episodes_per_env: int = 4
    """Whole episodes per environment and update."""
    discount: float = 1.0
    """Weight of the next reward relative to this one, in [0, 1]."""
    max_kl: float | None = 0.01
    """KL that a step makes to second order, in nats, a mean over decisions. Unset:
    steps are `learning_rate` times the regression's weights."""
    learning_rate: float = 0.1
    """Step size where `max_kl` is unset."""
    cg_iterations: int = 20
    """Steps of conjugate gradients; each costs a pass over the batch."""
    damping: float = 1.0
    """Ridge of the regression, in units of a trajectory's squared score."""
    chunk_size: ChunkSize = "auto"
    """Decisions that a gradient works on together; sets memory and speed, not the
    result. "auto" suits the device, none takes all at once."""

    def __post_init__(self) -> None:
        check_steps(self)
        check_positive("cg_iterations", self.cg_iterations)
        check_range("damping", self.damping, 0.0)
        if self.max_kl is not None:
            check_range("max_kl", self.max_kl, 0.0, open_low=True)


def npg(
    config: NPGConfig, task: Task, *, baseline: Baseline | None = None
) -> Algorithm:
    """The natural policy gradient as a record of pure functions.

    Args:
        config: its settings.
        task: the policy and the world, whose episodes must be bounded.
        baseline: any baseline of your own instead of the one that `config` names.

    Returns:
        An algorithm whose `update` takes rows of whole episodes.

    Raises:
        ValueError: if episodes have no bound.
    """
    max_steps = needed_max_steps(task)
    estimator = make_estimator(
        config.estimator,
        task.policy,
        max_steps,
        observation_space=task.observation_space,
        baseline=baseline,
        sum_over_rows=task.sum_over_rows,
    )
    direction = natural_gradient(
        num_iterations=config.cg_iterations, damping=config.damping
    )
    optimizer = optax.chain(direction, _step_size(config))

    def init(key: PRNGKey, obs: PyTree) -> AlgorithmState:
        key_policy, key_baseline = jax.random.split(key)
        params = task.policy.init(key_policy, obs)
        return AlgorithmState(
            params, optimizer.init(params), estimator.baseline.init(key_baseline, obs)
        )

    def update(
        key: PRNGKey, state: AlgorithmState, trajectories: Trajectory
    ) -> tuple[AlgorithmState, Info]:
        del key  # the whole batch makes one gradient: nothing is drawn
        credit = credit_of_used(trajectories, config.estimator.credit)
        shared = shares_credit(estimator, state.baseline_state)
        gradient = reinforce_gradient(
            estimator,
            state.params,
            state.baseline_state,
            trajectories,
            max_steps,
            credit=credit if shared else None,
            chunk_size=config.chunk_size,
            sum_over_rows=task.sum_over_rows,
        )
        per = "trajectory"
        if config.max_kl is not None:  # everything is a mean over decisions then
            per, length = "decision", _mean_length(trajectories)
            gradient = jax.tree.map(lambda x: x / length.astype(x.dtype), gradient)
        params, opt_state = ascend(
            optimizer,
            gradient,
            state.opt_state,
            state.params,
            fisher_vector_product=_products(
                config, task, state.params, trajectories, per
            ),
        )
        baseline_state, baseline_info = estimator.baseline.fit(
            state.baseline_state, trajectories, credit
        )
        info = {
            **_report(config, task, state.params, params, gradient, trajectories),
            "cg_residual": opt_state[0].residual,
            "cg_iterations": opt_state[0].num_iterations,
            **baseline_info,
        }
        return AlgorithmState(params, opt_state, baseline_state), info

    return Algorithm(
        init,
        update,
        Episodes(config.episodes_per_env),
        task.policy,
        lambda state: state.params,
        estimator.min_trajectories,
    )


def enac(config: ENACConfig, task: Task) -> Algorithm:
    """The episodic natural actor-critic as a record of pure functions.

    Args:
        config: its settings.
        task: the policy and the world, whose episodes must be bounded.

    Returns:
        An algorithm whose `update` takes rows of whole episodes.

    Raises:
        ValueError: if episodes have no bound.
    """
    needed_max_steps(task)
    optimizer = _step_size(config)

    def init(key: PRNGKey, obs: PyTree) -> AlgorithmState:
        params = task.policy.init(key, obs)
        return AlgorithmState(params, optimizer.init(params), ())

    def update(
        key: PRNGKey, state: AlgorithmState, trajectories: Trajectory
    ) -> tuple[AlgorithmState, Info]:
        del key  # the whole batch makes one regression: nothing is drawn
        found = _regression(config, task, state.params, trajectories)
        params, opt_state = ascend(
            optimizer,
            found.solution,
            state.opt_state,
            state.params,
            fisher_vector_product=_products(
                config, task, state.params, trajectories, "decision"
            ),
        )
        info = {
            **_report(config, task, state.params, params, found.solution, trajectories),
            "cg_residual": found.residual,
            "cg_iterations": found.num_iterations,
        }
        return AlgorithmState(params, opt_state, ()), info

    return Algorithm(
        init,
        update,
        Episodes(config.episodes_per_env),
        task.policy,
        lambda state: state.params,
        min_trajectories=2,
    )


def _regression(
    config: ENACConfig, task: Task, params: Params, rows: Trajectory
) -> Any:
    """The weights of the regression of the episodes' returns on their scores."""
    discounts = CreditConfig(credit="total-return", discount=config.discount)
    return episodic_natural_gradient(
        log_prob_fn(task.policy),
        params,
        rows._replace(next_obs=None),
        credit_of_used(rows, discounts).value,
        damping=config.damping,
        num_iterations=config.cg_iterations,
        decision_weights=jax.vmap(leading_discounts, (0, None))(
            rows.time, config.discount
        ),
        chunks=chunks_for(task.policy, config.chunk_size),
        sum_over_rows=task.sum_over_rows,
    )


def _step_size(
    config: NPGConfig | ENACConfig,
) -> optax.GradientTransformationExtraArgs:
    if config.max_kl is not None:
        return normalize_by_kl(config.max_kl)
    rate = optax.scale_by_learning_rate(config.learning_rate)
    return optax.with_extra_args_support(rate)


def _mean_length(trajectories: Trajectory) -> Array:
    count = jnp.maximum(jnp.sum(trajectories.starts), 1).astype(float)
    return jnp.maximum(trajectories.num_decisions, 1).astype(float) / count


def _products(
    config: NPGConfig | ENACConfig,
    task: Task,
    params: Params,
    trajectories: Trajectory,
    per: str,
) -> Any:
    def product(vector: Params) -> Params:
        return fisher_vector_product(
            task.policy.unroll,
            params,
            trajectories,
            vector,
            per=per,
            chunks=chunks_for(task.policy, config.chunk_size),
            sum_over_rows=task.sum_over_rows,
        )

    return product


def _report(
    config: NPGConfig | ENACConfig,
    task: Task,
    before: Params,
    after: Params,
    direction: Params,
    trajectories: Trajectory,
) -> Info:
    return {
        "grad_norm": global_norm(direction),
        **describe_batch(trajectories),
        "kl": mean_kl(task, before, after, trajectories, chunk_size=config.chunk_size),
        "non_finite_gradient": count_non_finite(direction),
        "non_finite_params": count_non_finite(after),
    }
