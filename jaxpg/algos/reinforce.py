r"""REINFORCE: the score-function gradient on whole episodes, and one Optax step.

    g = 1/N  sum_i sum_t  (Psi[i, t] - b[i, t]) * grad log pi(a[i, t] | s[i, t])

with Psi the episode's total return or the reward-to-go, and b a baseline.

Reference: Williams 1992, "Simple statistical gradient-following algorithms for
connectionist reinforcement learning"; Baxter and Bartlett 2001 for reward-to-go.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpg.algos.base import (
    Algorithm,
    AlgorithmState,
    Episodes,
    Info,
    Task,
    ascend,
    check_anneal,
    check_steps,
    make_optimizer,
    needed_max_steps,
)
from jaxpg.algos.measures import (
    count_non_finite,
    describe_batch,
    global_norm,
    mean_kl,
)
from jaxpg.baselines import Baseline
from jaxpg.chunks import Chunks, ChunkSize, SumOverRows, sum_over_chunks
from jaxpg.credit import Credit, CreditConfig, CreditName, credit_of_used
from jaxpg.episodes import split_episodes
from jaxpg.estimators import (
    BaselineName,
    Estimator,
    EstimatorConfig,
    estimate_gradient,
    make_estimator,
)
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "ReinforceConfig",
    "reinforce",
    "reinforce_gradient",
    "shares_credit",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """Settings of REINFORCE."""

    episodes_per_env: int = 4
    """Whole episodes per environment and update: N is this times the number of
    environments, which share them out as they get free."""
    credit: CreditName = "reward-to-go"
    """What a decision is weighed by, before the baseline."""
    baseline: BaselineName = "time-dependent"
    """What is subtracted from the credit. "-plain" and "batch-mean" contain a
    trajectory's own return and are biased; the others leave it out. "optimal",
    "peters-schaal" and "per-parameter" minimise the variance and need every
    trajectory's own score; "linear" and "value-network" see the observation and were
    fitted on earlier batches, "linear-folds" on the other half of this one."""
    discount: float = 1.0
    """Weight of the next reward relative to this one, in [0, 1]."""
    keep_leading_discount: bool = False
    """With reward-to-go, weigh decision t by discount^t as well: the unbiased gradient
    of the discounted return. Without it (usual practice) late decisions count like
    early ones. A total return needs no such factor."""
    standardize: bool = False
    """Divide the weights by their standard deviation over the batch and subtract their
    mean: biased, popular."""
    learning_rate: float = 0.01
    """Step size of Adam."""
    adapt_to_kl: float | None = None
    """Let the rate follow the KL that the last update made, to stay near this."""
    anneal: bool = False
    """Let the learning rate fall linearly to zero over the run."""
    max_grad_norm: float | None = None
    """Scale the gradient down to this global norm where it is longer."""
    chunk_size: ChunkSize = "auto"
    """Decisions that a gradient works on together; sets memory and speed, not the
    result. "auto" suits the device, none takes all at once."""

    def __post_init__(self) -> None:
        check_steps(self)
        _ = self.estimator  # which checks the settings that it takes

    @property
    def estimator(self) -> EstimatorConfig:
        """The part of the settings that makes the gradient."""
        return EstimatorConfig(
            credit=CreditConfig(
                credit=self.credit,
                discount=self.discount,
                keep_leading_discount=self.keep_leading_discount,
            ),
            baseline=self.baseline,
            standardize=self.standardize,
        )


def reinforce_gradient(
    estimator: Estimator,
    params: Params,
    baseline_state: PyTree,
    trajectories: Trajectory,
    max_steps: int,
    *,
    credit: Credit | None = None,
    chunk_size: ChunkSize = None,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Params:
    """The estimate of grad J that REINFORCE takes a step along.

    Args:
        estimator: from `make_estimator`.
        params: the policy's parameters.
        baseline_state: the baseline's own.
        trajectories: rows of whole episodes, packed or not.
        max_steps: the most decisions that an episode can take.
        credit: of the decisions, where it is known already; rows must be single
            episodes then where the estimator needs scores.
        chunk_size: decisions that the gradient works on together; None for all.
        sum_over_rows: how the gradient's sum over rows is taken.

    Returns:
        The gradient, a tree like `params`.

    Bias: that of the baseline at discount 1, and for the discounted return also with a
        total return or with the leading discount kept; always biased standardised.

    Reference: Williams 1992.
    """
    count = jnp.sum(trajectories.starts)
    num_rows, length = trajectories.mask.shape
    if estimator.needs_scores and length > max_steps:
        trajectories = split_episodes(
            trajectories, num_rows * (length // max_steps), max_steps
        )
    return estimate_gradient(
        estimator,
        params,
        baseline_state,
        trajectories,
        credit=credit,
        num_trajectories=count,
        chunks=Chunks(chunk_size),
        sum_over_rows=sum_over_rows,
    )


def shares_credit(estimator: Estimator, baseline_state: PyTree) -> bool:
    """Whether the gradient takes the credit that the baseline is fitted on.

    Where nothing is fitted that one is never worked out: weights make their own, within
    the turns that are used. Where scores are taken it would be of rows not yet split.
    """
    return bool(jax.tree.leaves(baseline_state)) and not estimator.needs_scores


def reinforce(
    config: ReinforceConfig, task: Task, *, baseline: Baseline | None = None
) -> Algorithm:
    """REINFORCE as a record of pure functions.

    Args:
        config: its settings.
        task: the policy and the world, whose episodes must be bounded.
        baseline: any baseline of your own instead of the one that `config` names.

    Returns:
        An algorithm whose `update` takes rows of whole episodes from
        `rollout_episodes`.

    Raises:
        ValueError: if episodes have no bound, or the learning rate is to be annealed
            over a run of unknown length.
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
    optimizer = make_optimizer(
        config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        anneal_over=task.num_updates if config.anneal else None,
        adapt_to_kl=config.adapt_to_kl,
    )
    check_anneal(config, task)

    def init(key: PRNGKey, obs: PyTree) -> AlgorithmState:
        key_policy, key_baseline = jax.random.split(key)
        params = task.policy.init(key_policy, obs)
        return AlgorithmState(
            params,
            optimizer.init(params),
            estimator.baseline.init(key_baseline, obs),
            () if config.adapt_to_kl is None else jnp.zeros((), float),
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
        params, opt_state = ascend(
            optimizer, gradient, state.opt_state, state.params, kl=state.kl
        )
        baseline_state, baseline_info = estimator.baseline.fit(
            state.baseline_state, trajectories, credit
        )
        info = {
            "grad_norm": global_norm(gradient),
            **describe_batch(trajectories),
            "non_finite_gradient": count_non_finite(gradient),
            "non_finite_params": count_non_finite(params),
            **baseline_info,
        }
        kl = state.kl
        if config.adapt_to_kl is not None:
            kl = info["kl"] = mean_kl(
                task, state.params, params, trajectories, chunk_size=config.chunk_size
            )
        return AlgorithmState(params, opt_state, baseline_state, kl), info

    return Algorithm(
        init,
        update,
        Episodes(config.episodes_per_env),
        task.policy,
        lambda state: state.params,
        estimator.min_trajectories,
    )
