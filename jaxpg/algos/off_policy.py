r"""Off-policy REINFORCE: several steps on one batch, its decisions weighed by ratios.

    g = 1/N sum_i sum_t w[i, t] grad log pi(a[i, t]),    w with rho = pi / mu

mu is whoever collected: the policy before the first step, an older one, or somebody
else's. Which ratios stand on a decision is a setting (`jaxpg.importance` says what each
form has for its limit). The steps end once the weights are worth too few samples.

References: Precup, Sutton and Singh 2000; Degris, White and Sutton 2012; Kong 1992 for
the effective sample size.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg._batching import anywhere
from jaxpg._checks import check_positive, check_range
from jaxpg._tracing import traced_once
from jaxpg.algos.base import (
    Algorithm,
    Episodes,
    Info,
    Task,
    ascend,
    check_anneal,
    check_steps,
    make_optimizer,
    needed_max_steps,
    single_episodes,
)
from jaxpg.algos.behaviour import Behaviour, Lagged, follow, start_lag
from jaxpg.algos.measures import (
    count_non_finite,
    describe_batch,
    global_norm,
    log_ratios_of,
    mean_kl,
)
from jaxpg.algos.reinforce import reinforce_gradient
from jaxpg.chunks import ChunkSize
from jaxpg.credit import (
    Credit,
    CreditConfig,
    CreditName,
    RatioName,
    credit_of,
    credit_of_used,
)
from jaxpg.estimators import BaselineName, EstimatorConfig, make_estimator
from jaxpg.room import at_used_length, first_turns, with_room
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = ["OffPolicyConfig", "OffPolicyState", "off_policy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffPolicyConfig:
    """Settings of off-policy REINFORCE."""

    episodes_per_env: int = 4
    """Whole episodes per environment and update."""
    num_epochs: int = 8
    """Steps on one batch, at most."""
    min_ess: float = 0.5
    """Stop stepping once the effective sample size of the decisions' weights falls
    under this part of their number, in [0, 1)."""
    ratio: RatioName = "first-order"
    """Which importance ratios stand on a decision."""
    max_rho: float | None = None
    """Truncate every single ratio at this; unset leaves them as they are."""
    self_normalize: bool = False
    """Divide products of ratios by their mean over the batch at the same time step."""
    credit: CreditName = "reward-to-go"
    """What a decision is weighed by, before ratios and baseline."""
    baseline: BaselineName = "time-dependent"
    """What is subtracted from the credit; the names are REINFORCE's."""
    discount: float = 1.0
    """Weight of the next reward relative to this one, in [0, 1]."""
    keep_leading_discount: bool = False
    """With reward-to-go, weigh decision t by discount^t as well."""
    standardize: bool = False
    """Bring the weights to mean 0 and deviation 1 over the batch: biased, popular."""
    behaviour_lag: int = 1
    """Updates after which the policy that collects is renewed; 1 is always the last."""
    learning_rate: float = 0.005
    """Step size of Adam."""
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
        check_positive("behaviour_lag", self.behaviour_lag)
        check_range("min_ess", self.min_ess, 0.0, 1.0)
        if self.ratio == "none":
            raise ValueError(
                "ratio is 'none', but later steps are off policy, needs a form of "
                "ratios; for one step on policy take the algorithm 'reinforce'"
            )

    @property
    def estimator(self) -> EstimatorConfig:
        """The part of the settings that makes the gradient."""
        return EstimatorConfig(
            credit=CreditConfig(
                credit=self.credit,
                discount=self.discount,
                keep_leading_discount=self.keep_leading_discount,
                ratio=self.ratio,
                max_rho=self.max_rho,
                self_normalize=self.self_normalize,
            ),
            baseline=self.baseline,
            standardize=self.standardize,
        )


class OffPolicyState(NamedTuple):
    """Everything that the next update needs.

    Attributes:
        params: the policy's parameters.
        opt_state: the Optax optimiser's state.
        baseline_state: what the baseline has learned; () where it learns nothing.
        behaviour: the parameters that collect next.
    """

    params: Params
    opt_state: PyTree
    baseline_state: PyTree
    behaviour: Lagged


def off_policy(
    config: OffPolicyConfig, task: Task, *, behaviour: Behaviour | None = None
) -> Algorithm:
    """Off-policy REINFORCE as a record of pure functions.

    Args:
        config: its settings.
        task: the policy and the world, whose episodes must be bounded.
        behaviour: somebody else's policy to collect with; None collects with the own
            one, as old as `config.behaviour_lag` lets it be.

    Returns:
        An algorithm whose `update` takes rows of whole episodes.

    Raises:
        ValueError: if episodes have no bound, or the learning rate is to be annealed
            over a run of unknown length.
    """
    check_anneal(config, task)
    max_steps = needed_max_steps(task)
    estimator = make_estimator(
        config.estimator,
        task.policy,
        max_steps,
        observation_space=task.observation_space,
        sum_over_rows=task.sum_over_rows,
    )
    steps = None if task.num_updates is None else task.num_updates * config.num_epochs
    optimizer = make_optimizer(
        config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        anneal_over=steps if config.anneal else None,
    )

    def init(key: PRNGKey, obs: PyTree) -> OffPolicyState:
        key_policy, key_baseline = jax.random.split(key)
        params = task.policy.init(key_policy, obs)
        return OffPolicyState(
            params,
            optimizer.init(params),
            estimator.baseline.init(key_baseline, obs),
            start_lag(params),
        )

    def step(
        carry: tuple, rows: Trajectory, credit: Credit, baseline_state: PyTree
    ) -> tuple:
        params, opt_state = carry
        gradient = reinforce_gradient(
            estimator,
            params,
            baseline_state,
            rows,
            max_steps,
            credit=credit,
            chunk_size=config.chunk_size,
            sum_over_rows=task.sum_over_rows,
        )
        info = {
            "grad_norm": global_norm(gradient),
            "non_finite_gradient": count_non_finite(gradient),
        }
        return ascend(optimizer, gradient, opt_state, params), info

    def update(
        key: PRNGKey, state: OffPolicyState, trajectories: Trajectory
    ) -> tuple[OffPolicyState, Info]:
        del key  # every step uses the whole batch: nothing is drawn
        rows = trajectories._replace(next_obs=None)
        if estimator.needs_scores:
            rows = single_episodes(task, rows, max_steps)

        def turn(carry: tuple, _: None) -> tuple[tuple, Info]:
            going, *learned = carry
            credit, ess = _credit_and_ess(config, task, learned[0], rows)
            going = going & (ess >= config.min_ess)

            @traced_once
            def move() -> tuple:
                return step(tuple(learned), rows, credit, state.baseline_state)

            def stay() -> tuple:
                infos = jax.eval_shape(move)[1]
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), infos)
                return tuple(learned), zeros

            moved, info = jax.lax.cond(anywhere(going), move, stay)
            kept = jax.tree.map(
                lambda x, y: jnp.where(going, x, y), moved, tuple(learned)
            )
            # A member that has stopped comes here in the company of others: it sees 0.
            info = {name: jnp.where(going, x, 0) for name, x in info.items()}
            return (going, *kept), info | {"ess": ess, "made": going}

        first = (jnp.ones((), bool), state.params, state.opt_state)
        (_, params, opt_state), infos = jax.lax.scan(
            turn, first, None, config.num_epochs
        )
        on_policy = CreditConfig(
            credit=config.credit,
            discount=config.discount,
            keep_leading_discount=config.keep_leading_discount,
        )
        baseline_state, baseline_info = estimator.baseline.fit(
            state.baseline_state, trajectories, credit_of_used(trajectories, on_policy)
        )
        made = jnp.sum(infos["made"])
        info = {
            "grad_norm": jnp.sum(infos["grad_norm"])
            / jnp.maximum(made, 1).astype(float),
            **describe_batch(trajectories),
            "kl": mean_kl(
                task,
                state.params,
                params,
                trajectories,
                chunk_size=config.chunk_size,
            ),
            "ess": jnp.min(infos["ess"]),
            "steps_made": made,
            "non_finite_gradient": jnp.sum(infos["non_finite_gradient"]),
            "non_finite_params": count_non_finite(params),
            **baseline_info,
        }
        lagged = follow(state.behaviour, params, config.behaviour_lag)
        return OffPolicyState(params, opt_state, baseline_state, lagged), info

    return Algorithm(
        init,
        update,
        Episodes(config.episodes_per_env),
        task.policy if behaviour is None else behaviour.policy,
        lambda state: state.behaviour.params if behaviour is None else behaviour.params,
        estimator.min_trajectories,
    )


def _credit_and_ess(
    config: OffPolicyConfig, task: Task, params: Params, rows: Trajectory
) -> tuple[Credit, Array]:
    """The credit of every decision, and what share of the sample its ratios leave."""
    log_rhos = log_ratios_of(task, params, rows, chunk_size=config.chunk_size)
    whole, length = config.estimator.credit, rows.mask.shape[1]
    ratios_alone = dataclasses.replace(whole, keep_leading_discount=False)

    def of_turns(number: int) -> tuple[Credit, Array]:
        some, some_log_rhos = first_turns(rows, number), log_rhos[:, :number]
        credit = credit_of(some, whole, some_log_rhos)
        weights = credit.reach
        if whole.keep_leading_discount:
            weights = credit_of(some, ratios_alone, some_log_rhos).reach
        ess = _ess_fraction(weights, some.mask)
        return jax.tree.map(lambda x: with_room(x, length), credit), ess

    return at_used_length(of_turns, rows.mask)


def _ess_fraction(weights: Array, mask: Array) -> Array:
    """(sum w)^2 / (n sum w^2) over the decisions, in [1/n, 1]."""
    largest = jnp.max(weights, initial=0.0, where=mask)
    some = largest > 0.0
    shares = jnp.where(mask, weights / jnp.where(some, largest, 1.0), 0.0)
    count = jnp.maximum(jnp.sum(mask), 1).astype(shares.dtype)
    squares = jnp.sum(shares**2)
    return jnp.where(
        some, jnp.sum(shares) ** 2 / jnp.maximum(squares, 1e-30) / count, 0.0
    )
