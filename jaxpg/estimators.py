r"""Estimators by name: credit, baseline and ratios put together.

    credit (value, reach)  ->  baseline  ->  weights [B, T]  ->  score gradient

Everything that this room does can be done with the parts alone; it exists so that
algorithms, studies and tables mean the same thing by the same name.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg import importance
from jaxpg._checks import check_choice, check_rank, check_same_shape
from jaxpg.advantages import standardize
from jaxpg.baselines import (
    Baseline,
    Summary,
    apply_baseline,
    batch_mean_baseline,
    check_enough,
    leave_one_out_baseline,
    no_baseline,
    time_dependent_baseline,
)
from jaxpg.chunks import ALL_AT_ONCE, Chunks, SumOverRows, sum_over_chunks
from jaxpg.credit import Credit, CreditConfig, credit_of
from jaxpg.envs.base import Space
from jaxpg.episodes import check_single_episodes
from jaxpg.gradients import score_gradient, trajectory_gradients
from jaxpg.linear_baselines import linear_baseline, plain_linear_baseline
from jaxpg.optimal import (
    optimal_baseline,
    optimal_time_dependent_baseline,
    peters_schaal_baseline,
)
from jaxpg.per_parameter import per_parameter_summary, per_parameter_terms
from jaxpg.policies import Policy, log_prob_fn
from jaxpg.room import at_used_length, first_turns, with_room
from jaxpg.types import Params, PyTree, Trajectory
from jaxpg.value_functions import value_network_baseline

__all__ = [
    "BASELINES",
    "PER_PARAMETER",
    "BaselineName",
    "Estimator",
    "EstimatorConfig",
    "estimate_credit",
    "estimate_gradient",
    "estimate_terms",
    "estimate_weights",
    "make_baseline",
    "make_estimator",
    "summarize_batch",
]

BaselineName = Literal[
    "time-dependent",
    "time-dependent-plain",
    "leave-one-out",
    "batch-mean",
    "none",
    "optimal",
    "optimal-plain",
    "optimal-time",
    "optimal-time-plain",
    "optimal-termwise",
    "optimal-termwise-plain",
    "peters-schaal",
    "peters-schaal-plain",
    "per-parameter",
    "per-parameter-plain",
    "linear",
    "linear-folds",
    "linear-plain",
    "value-network",
]
BASELINES: tuple[str, ...] = get_args(BaselineName)
"""Baselines by name. "-plain" is fitted on the very batch that it weighs, and biased;
the others leave a trajectory's own part out, or were fitted on earlier batches."""

PER_PARAMETER = ("per-parameter", "per-parameter-plain")
"""Baselines of the gradient's entries, which are no weights of decisions."""

SEES_OBSERVATIONS = ("linear", "linear-folds", "linear-plain", "value-network")
"""Baselines that need to know the observation space."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """One estimator of the policy gradient."""

    credit: CreditConfig = dataclasses.field(default_factory=CreditConfig)
    """What decisions are credited with."""
    baseline: BaselineName = "time-dependent"
    """What is subtracted from the credit."""
    standardize: bool = False
    """Take the weights' mean off and divide by their standard deviation over the batch:
    biased, popular."""

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, BASELINES)
        credit = self.credit
        if self.baseline.startswith("peters-schaal") and (
            credit.ratio != "none" or credit.credit != "reward-to-go"
        ):
            raise ValueError(
                f"baseline is {self.baseline!r}, which is made of plain rewards, but "
                f"credit is {credit.credit!r} with ratio {credit.ratio!r}; take "
                "'optimal-time', or 'reward-to-go' with ratio 'none'"
            )
        if self.standardize and self.baseline in PER_PARAMETER:
            raise ValueError(
                f"standardize is set, but baseline is {self.baseline!r}, which makes "
                "no weights to standardise; leave it out, or take another baseline"
            )


class Estimator(NamedTuple):
    """An estimator of the gradient of J as a record of what it is made of.

    Attributes:
        log_prob_fn: log-probability of each decision of one row.
        config: its settings.
        baseline: of that name, or any other; "none" where it is per parameter.
        cut_rows: whether rows may be cut in time (a memoryless policy).
    """

    log_prob_fn: Callable[[Params, Trajectory], Array]
    config: EstimatorConfig
    baseline: Baseline
    cut_rows: bool

    @property
    def needs_batch(self) -> bool:
        """Whether it must see the whole batch before it can weigh any of it."""
        return self.baseline.needs_batch or self.is_per_parameter

    @property
    def needs_scores(self) -> bool:
        """Whether rows must be single trajectories."""
        return self.baseline.needs_scores or self.is_per_parameter

    @property
    def min_trajectories(self) -> int:
        """The fewest trajectories that it makes sense for."""
        leaves_out = self.config.baseline == "per-parameter"
        return 2 if leaves_out else self.baseline.min_trajectories

    @property
    def is_per_parameter(self) -> bool:
        """Whether its baseline belongs to parameters, not to decisions."""
        return self.config.baseline in PER_PARAMETER


def make_estimator(
    config: EstimatorConfig,
    policy: Policy,
    max_steps: int,
    *,
    observation_space: Space | None = None,
    baseline: Baseline | None = None,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Estimator:
    """Put an estimator together.

    Args:
        config: its settings.
        policy: the policy that is differentiated.
        max_steps: the most decisions that an episode can take.
        observation_space: what baselines that see observations need.
        baseline: any baseline of your own; `config.baseline` is not read then.
        sum_over_rows: how a value network's gradient is summed over rows.

    Raises:
        ValueError: if a name is unknown, or a space is needed and not given.
    """
    if baseline is not None:
        config = dataclasses.replace(config, baseline="none")
    elif config.baseline in PER_PARAMETER:
        baseline = no_baseline()
    else:
        baseline = make_baseline(
            config.baseline,
            policy,
            max_steps,
            discount=config.credit.discount,
            observation_space=observation_space,
            sum_over_rows=sum_over_rows,
        )
    return Estimator(log_prob_fn(policy), config, baseline, not policy.is_recurrent)


def make_baseline(
    name: str,
    policy: Policy,
    max_steps: int,
    *,
    discount: float = 1.0,
    observation_space: Space | None = None,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Baseline:
    """The baseline of that name.

    Args:
        name: one of `BASELINES`, but for those of parameters.
        policy: the policy that is differentiated, for baselines that need scores.
        max_steps: the most decisions that an episode can take.
        discount: of the credit, for the baseline that works per reward.
        observation_space: what baselines that see observations need.
        sum_over_rows: how a value network's gradient is summed over rows.

    Raises:
        ValueError: if the name is unknown, or a space is needed and not given.
    """
    check_choice("baseline", name, [x for x in BASELINES if x not in PER_PARAMETER])
    if name in SEES_OBSERVATIONS:
        return _that_sees(name, observation_space, max_steps, sum_over_rows)
    kind = name.removesuffix("-plain")
    own = {"leave_one_out": kind == name}
    log_probs, cut = log_prob_fn(policy), {"cut_rows": not policy.is_recurrent}
    match kind:
        case "none":
            return no_baseline()
        case "batch-mean":
            return batch_mean_baseline()
        case "leave-one-out":
            return leave_one_out_baseline()
        case "time-dependent":
            return time_dependent_baseline(max_steps, **own)
        case "optimal":
            return optimal_baseline(log_probs, **own)
        case "peters-schaal":
            return peters_schaal_baseline(log_probs, discount=discount, **own, **cut)
        case _:
            return optimal_time_dependent_baseline(
                log_probs,
                max_steps,
                form="termwise" if kind == "optimal-termwise" else "joint",
                **own,
                **cut,
            )


def _that_sees(
    name: str, space: Space | None, max_steps: int, sum_over_rows: SumOverRows
) -> Baseline:
    if space is None:
        raise ValueError(
            f"baseline is {name!r}, which sees observations, but observation_space is "
            "None; give the environment's"
        )
    match name:
        case "linear":
            return linear_baseline(space, max_steps)
        case "linear-folds":
            return linear_baseline(space, max_steps, num_folds=2)
        case "linear-plain":
            return plain_linear_baseline(space, max_steps)
        case _:
            return value_network_baseline(space, sum_over_rows=sum_over_rows)


def estimate_credit(
    estimator: Estimator, params: Params, trajectories: Trajectory
) -> Credit:
    """The credit of every decision; ratios are of `params` over whoever acted.

    Args:
        estimator: which credit.
        params: the policy that is asked about; the recorded log-probabilities are the
            behaviour policy's.
        trajectories: rows of whole episodes.

    Returns:
        Value and reach, held constant.

    Bias: see `credit_of`.
    """
    config = estimator.config.credit
    if config.ratio == "none":
        return credit_of(trajectories, config)

    def of_row(row: Trajectory) -> Array:
        log_probs = estimator.log_prob_fn(params, row)
        return importance.log_ratios(log_probs, row.log_prob, row.mask)

    return credit_of(trajectories, config, jax.vmap(of_row)(trajectories))


def summarize_batch(
    estimator: Estimator,
    params: Params,
    trajectories: Trajectory,
    *,
    credit: Credit | None = None,
) -> Summary:
    """What the estimator must know of the whole batch: sums that add over its parts.

    Args:
        estimator: any.
        params: where the gradient is taken.
        trajectories: some rows of the batch, or all.
        credit: of these rows, where it is known already.

    Returns:
        A tree of sums; () where nothing is needed.

    """
    if credit is None:
        credit = estimate_credit(estimator, params, trajectories)
    if estimator.is_per_parameter:
        return per_parameter_summary(
            estimator.log_prob_fn, params, trajectories, credit
        )
    return estimator.baseline.summarize(params, trajectories, credit)


def estimate_weights(
    estimator: Estimator,
    params: Params,
    state: PyTree,
    trajectories: Trajectory,
    *,
    summary: Summary | None = None,
    credit: Credit | None = None,
) -> Float[Array, "B T"]:
    """The weights of `score_gradient` for some rows of a batch.

    Args:
        estimator: any but a per-parameter one.
        params: where the gradient is taken.
        state: what its baseline has learned; () for those that learn nothing.
        trajectories: some rows, or the whole batch.
        summary: of the whole batch; None where these rows are the whole batch.
        credit: of these rows, where it is known already.

    Returns:
        One weight per decision, 0 in empty slots, held constant.

    Raises:
        ValueError: if its baseline belongs to parameters, a part of the batch is to be
            weighed by statistics of the whole, or shapes do not match.

    Bias: that of the credit and the baseline; always biased with `standardize`.
    """
    if estimator.is_per_parameter:
        raise ValueError(
            f"baseline is {estimator.config.baseline!r}, which makes no weights of "
            "decisions; needs estimate_gradient or estimate_terms"
        )
    config = estimator.config
    if summary is not None and (config.standardize or config.credit.self_normalize):
        raise ValueError(
            "summary is given, but standardize or self_normalize divides by statistics "
            "of all weights, which it does not hold; give the whole batch, no summary"
        )

    def of_turns(number: int) -> Array:
        rows, own = first_turns(trajectories, number), credit
        if own is None:
            own = estimate_credit(estimator, params, rows)
        own = jax.tree.map(lambda x: x[:, :number], own)
        weights = apply_baseline(estimator.baseline, params, state, rows, own, summary)
        if config.standardize:
            weights = standardize(weights, rows.mask)
        return with_room(weights, trajectories.mask.shape[1])

    check_rank("mask", trajectories.mask, 2, "(B, T) = a batch of rows")
    if credit is not None:
        check_same_shape(mask=trajectories.mask, credit=credit.value)
    asks_policy = credit is None and config.credit.ratio != "none"
    if asks_policy or not estimator.baseline.any_length:
        return of_turns(trajectories.mask.shape[1])
    return at_used_length(of_turns, trajectories.mask)


def estimate_terms(
    estimator: Estimator,
    params: Params,
    state: PyTree,
    trajectories: Trajectory,
    *,
    summary: Summary | None = None,
    credit: Credit | None = None,
) -> Params:
    """Each trajectory's term of the estimate; the mean over the batch is the gradient.

    Args:
        estimator: any.
        params: where the gradient is taken.
        state: what its baseline has learned.
        trajectories: single trajectories, one per row.
        summary: of the whole batch; None where these rows are the whole batch.
        credit: of these rows, where it is known already.

    Returns:
        A tree like `params` with B in front.

    Raises:
        ValueError: if known rows hold several trajectories, or too few there are.

    Bias: that of the credit and the baseline.
    """
    check_single_episodes(trajectories)
    if credit is None:
        credit = estimate_credit(estimator, params, trajectories)
    if estimator.is_per_parameter:
        if summary is None:
            check_enough(estimator.min_trajectories, trajectories)
            summary = summarize_batch(estimator, params, trajectories, credit=credit)
        return per_parameter_terms(
            estimator.log_prob_fn,
            params,
            trajectories,
            credit,
            summary,
            leave_one_out=not estimator.config.baseline.endswith("-plain"),
        )
    weights = estimate_weights(
        estimator, params, state, trajectories, summary=summary, credit=credit
    )
    return trajectory_gradients(estimator.log_prob_fn, params, trajectories, weights)


def estimate_gradient(
    estimator: Estimator,
    params: Params,
    state: PyTree,
    trajectories: Trajectory,
    *,
    credit: Credit | None = None,
    num_trajectories: int | Array | None = None,
    chunks: Chunks = ALL_AT_ONCE,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Params:
    """The estimate of grad J from a whole batch.

    Args:
        estimator: any.
        params: where the gradient is taken.
        state: what its baseline has learned; () for those that learn nothing.
        trajectories: the whole batch; single trajectories where it needs scores.
        credit: of its decisions, where it is known already.
        num_trajectories: N; None counts the episodes that start in the batch.
        chunks: how many decisions the gradient works on together.
        sum_over_rows: how the gradient's sum over rows is taken.

    Returns:
        An ascent direction, a tree like `params`.

    Bias: that of the credit and the baseline; always biased with `standardize`.

    Reference: Williams 1992.
    """
    check_enough(1, trajectories)
    trajectories = trajectories._replace(next_obs=None)
    count = jnp.asarray(
        jnp.sum(trajectories.starts) if num_trajectories is None else num_trajectories
    )
    if estimator.is_per_parameter:
        terms = estimate_terms(estimator, params, state, trajectories, credit=credit)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0) / count.astype(x.dtype), terms)
    return score_gradient(
        estimator.log_prob_fn,
        params,
        trajectories,
        estimate_weights(estimator, params, state, trajectories, credit=credit),
        num_trajectories=count,
        chunks=chunks._replace(cut_rows=estimator.cut_rows),
        sum_over_rows=sum_over_rows,
    )
