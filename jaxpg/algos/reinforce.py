r"""REINFORCE: the score-function gradient on whole episodes, and one Optax step.

    g = 1/N  sum_i sum_t  (Psi[i, t] - b[i, t]) * grad log pi(a[i, t] | s[i, t])

with Psi the episode's total return or the reward-to-go, and b a baseline.

Reference: Williams 1992, "Simple statistical gradient-following algorithms for
connectionist reinforcement learning"; Baxter and Bartlett 2001 for reward-to-go.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxpg._checks import check_choice, check_positive, check_range
from jaxpg.algos.base import (
    Algorithm,
    AlgorithmState,
    Info,
    ascend,
    count_non_finite,
)
from jaxpg.baselines import (
    Baseline,
    batch_mean_baseline,
    leave_one_out_baseline,
    no_baseline,
    time_dependent_baseline,
)
from jaxpg.gradients import Chunks, SumOverRows, score_gradient, sum_over_chunks
from jaxpg.policies import Policy, log_prob_fn
from jaxpg.returns import (
    episode_returns,
    leading_discounts,
    rewards_to_go,
    step_discounts,
)
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "BASELINES",
    "CREDITS",
    "ReinforceConfig",
    "make_baseline",
    "reinforce",
    "reinforce_credit",
    "reinforce_gradient",
]

CREDITS = ("reward-to-go", "total-return")
BASELINES = (
    "time-dependent",
    "time-dependent-plain",
    "leave-one-out",
    "batch-mean",
    "none",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """Settings of REINFORCE."""

    episodes_per_env: int = 4
    """Whole episodes per environment and update: N is this times the number of
    environments, which share them out as they get free."""
    credit: Literal["reward-to-go", "total-return"] = "reward-to-go"
    """What a decision is weighed by, before the baseline."""
    baseline: Literal[
        "time-dependent", "time-dependent-plain", "leave-one-out", "batch-mean", "none"
    ] = "time-dependent"
    """What is subtracted from the credit. The first and third leave a trajectory's own
    return out and are unbiased; plain and batch-mean do not and are biased."""
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
    anneal: bool = False
    """Let the learning rate fall linearly to zero over the run."""
    max_grad_norm: float | None = None
    """Scale the gradient down to this global norm where it is longer."""
    chunk_size: int | None = 1024
    """Decisions that the gradient works on together; sets memory, not the result."""

    def __post_init__(self) -> None:
        check_positive("episodes_per_env", self.episodes_per_env)
        check_choice("credit", self.credit, CREDITS)
        check_choice("baseline", self.baseline, BASELINES)
        check_range("discount", self.discount, 0.0, 1.0)
        if self.keep_leading_discount and self.credit == "total-return":
            raise ValueError(
                "keep_leading_discount is set, but credit is 'total-return', which "
                "counts discount^t already; leave it out, or take credit 'reward-to-go'"
            )
        check_range("learning_rate", self.learning_rate, 0.0, open_low=True)
        if self.max_grad_norm is not None:
            check_range("max_grad_norm", self.max_grad_norm, 0.0, open_low=True)
        if self.chunk_size is not None:
            check_positive("chunk_size", self.chunk_size)


def make_baseline(name: str, max_steps: int) -> Baseline:
    """The baseline of that name.

    Args:
        name: one of `BASELINES`.
        max_steps: the most decisions that an episode can take.

    Raises:
        ValueError: if the name is unknown.
    """
    check_choice("baseline", name, BASELINES)
    makers = {
        "time-dependent": lambda: time_dependent_baseline(max_steps),
        "time-dependent-plain": lambda: time_dependent_baseline(
            max_steps, leave_one_out=False
        ),
        "leave-one-out": leave_one_out_baseline,
        "batch-mean": batch_mean_baseline,
        "none": no_baseline,
    }
    return makers[name]()


def reinforce_credit(
    trajectories: Trajectory,
    credit: str = "reward-to-go",
    discount: float = 1.0,
) -> Float[Array, "B T"]:
    """What each decision of whole episodes is credited with, before any baseline.

    Args:
        trajectories: rows of whole episodes.
        credit: "reward-to-go" or "total-return".
        discount: the factor per decision, in [0, 1].

    Returns:
        The credit in units of the reward; meaningless where `mask` is False.

    Raises:
        ValueError: if the credit is unknown.

    Bias: unbiased at discount 1.
    """
    check_choice("credit", credit, CREDITS)

    def of_row(row: Trajectory) -> Array:
        discounts = step_discounts(row.ends, row.mask, discount)
        rewards = jnp.where(row.mask, row.reward, 0.0)
        if credit == "total-return":
            return episode_returns(rewards, discounts, row.time)
        return rewards_to_go(rewards, discounts)

    return jax.vmap(of_row)(trajectories)


def reinforce_gradient(
    config: ReinforceConfig,
    policy: Policy,
    baseline: Baseline,
    params: Params,
    baseline_state: PyTree,
    trajectories: Trajectory,
    *,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> tuple[Params, Float[Array, "B T"]]:
    """The estimate of grad J that REINFORCE takes a step along.

    Args:
        config: its settings; the baseline's name is not read.
        policy: the policy that acted and is differentiated.
        baseline: what is subtracted from the credit.
        params: the policy's parameters.
        baseline_state: the baseline's own.
        trajectories: rows of whole episodes.
        sum_over_rows: how the gradient's sum over rows is taken.

    Returns:
        The gradient, a tree like `params`, and the credit that it used.

    Bias: that of the baseline at discount 1, and for the discounted return also with a
        total return or with `keep_leading_discount`; always biased with `standardize`.

    Reference: Williams 1992.
    """
    credit = reinforce_credit(trajectories, config.credit, config.discount)
    advantages = credit - baseline.predict(baseline_state, trajectories, credit)
    gradient = score_gradient(
        log_prob_fn(policy),
        params,
        trajectories._replace(next_obs=None),
        _weights(config, trajectories, advantages),
        num_trajectories=jnp.sum(trajectories.starts),
        chunks=Chunks(config.chunk_size, cut_rows=not policy.is_recurrent),
        sum_over_rows=sum_over_rows,
    )
    return gradient, credit


def reinforce(
    config: ReinforceConfig,
    policy: Policy,
    max_steps: int,
    *,
    num_updates: int | None = None,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Algorithm:
    """REINFORCE as an (init, update) pair.

    Args:
        config: its settings.
        policy: the policy that is trained.
        max_steps: the most decisions that an episode can take.
        num_updates: length of the run, needed to anneal the learning rate.
        sum_over_rows: how the gradient's sum over rows is taken.

    Returns:
        An algorithm whose `update` takes rows of whole episodes from
        `rollout_episodes`.

    Raises:
        ValueError: if the learning rate is to be annealed over a run of unknown length.
    """
    baseline = make_baseline(config.baseline, max_steps)
    optimizer = _optimizer(config, num_updates)

    def init(key: PRNGKey, obs: PyTree) -> AlgorithmState:
        key_policy, key_baseline = jax.random.split(key)
        params = policy.init(key_policy, obs)
        return AlgorithmState(
            params, optimizer.init(params), baseline.init(key_baseline, obs)
        )

    def update(
        key: PRNGKey, state: AlgorithmState, trajectories: Trajectory
    ) -> tuple[AlgorithmState, Info]:
        del key  # the whole batch makes one gradient: nothing is drawn
        gradient, credit = reinforce_gradient(
            config,
            policy,
            baseline,
            state.params,
            state.baseline_state,
            trajectories,
            sum_over_rows=sum_over_rows,
        )
        params, opt_state = ascend(optimizer, gradient, state.opt_state, state.params)
        baseline_state, baseline_info = baseline.fit(
            state.baseline_state, trajectories, credit
        )
        info = {
            "grad_norm": optax.tree.norm(gradient),
            "entropy": -jnp.mean(trajectories.log_prob, where=trajectories.mask),
            "non_finite_gradient": count_non_finite(gradient),
            "non_finite_params": count_non_finite(params),
            **baseline_info,
        }
        return AlgorithmState(params, opt_state, baseline_state), info

    return Algorithm(init, update)


def _weights(
    config: ReinforceConfig, trajectories: Trajectory, advantages: Array
) -> Array:
    mask = trajectories.mask
    if config.standardize:
        mean = jnp.mean(advantages, where=mask)
        std = jnp.std(advantages, where=mask)
        advantages = (advantages - mean) / (std + 1e-8)
    if config.keep_leading_discount:
        factors = jax.vmap(leading_discounts, (0, None))(
            trajectories.time, config.discount
        )
        advantages = advantages * factors
    return jnp.where(mask, advantages, 0.0)


def _optimizer(
    config: ReinforceConfig, num_updates: int | None
) -> optax.GradientTransformation:
    rate: optax.ScalarOrSchedule = config.learning_rate
    if config.anneal:
        if num_updates is None:
            raise ValueError(
                "anneal is set, but num_updates is None; needs the length of the run"
            )
        rate = optax.linear_schedule(config.learning_rate, 0.0, num_updates)
    adam = optax.adam(rate)
    if config.max_grad_norm is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)
