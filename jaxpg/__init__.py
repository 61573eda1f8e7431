"""Policy gradients in JAX: exact theory, vectorised rollouts, measured variance.

    env -> rollout -> Trajectory -> credit / baselines -> weights [B, T]
        -> score_gradient -> Optax -> Algorithm.update -> train

The names below are the public ones, and the rooms that hold more of a kind; every room
documents its own equation. Training itself, with its files and progress, is in
`jaxpg.train`.
"""

from jaxpg import (
    advantages,
    diagnostics,
    drift,
    eligibility,
    envs,
    exact,
    importance,
    moments,
    optimal,
    streams,
    surrogate,
)
from jaxpg._version import __version__
from jaxpg.algos.base import Algorithm, AlgorithmState, ascend
from jaxpg.algos.reinforce import (
    ReinforceConfig,
    reinforce,
    reinforce_gradient,
)
from jaxpg.baselines import (
    Baseline,
    apply_baseline,
    batch_mean_baseline,
    constant_baseline,
    leave_one_out_baseline,
    no_baseline,
    time_dependent_baseline,
)
from jaxpg.credit import Credit, CreditConfig, credit_of
from jaxpg.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    TanhGaussian,
)
from jaxpg.estimators import (
    Estimator,
    EstimatorConfig,
    estimate_gradient,
    estimate_terms,
    estimate_weights,
    make_estimator,
)
from jaxpg.gradients import (
    Chunks,
    score_gradient,
    trajectory_gradients,
)
from jaxpg.heads import Head, categorical_head, gaussian_head, head_for
from jaxpg.networks import mlp
from jaxpg.policies import (
    Policy,
    from_apply,
    from_linen,
    from_nnx,
    log_prob_fn,
    mlp_policy,
    tabular_policy,
)
from jaxpg.returns import (
    episode_returns,
    leading_discounts,
    rewards_to_go,
    step_discounts,
)
from jaxpg.rollout import (
    rollout_episodes,
    rollout_segments,
    start_segments,
)
from jaxpg.types import StepOutput, Trajectory

__all__ = [
    "Algorithm",
    "AlgorithmState",
    "Baseline",
    "Bernoulli",
    "Categorical",
    "Chunks",
    "Credit",
    "CreditConfig",
    "DiagonalGaussian",
    "Distribution",
    "Estimator",
    "EstimatorConfig",
    "Head",
    "MultiCategorical",
    "Policy",
    "ReinforceConfig",
    "StepOutput",
    "TanhGaussian",
    "Trajectory",
    "__version__",
    "advantages",
    "apply_baseline",
    "ascend",
    "batch_mean_baseline",
    "categorical_head",
    "constant_baseline",
    "credit_of",
    "diagnostics",
    "drift",
    "eligibility",
    "envs",
    "episode_returns",
    "estimate_gradient",
    "estimate_terms",
    "estimate_weights",
    "exact",
    "from_apply",
    "from_linen",
    "from_nnx",
    "gaussian_head",
    "head_for",
    "importance",
    "leading_discounts",
    "leave_one_out_baseline",
    "log_prob_fn",
    "make_estimator",
    "mlp",
    "mlp_policy",
    "moments",
    "no_baseline",
    "optimal",
    "reinforce",
    "reinforce_gradient",
    "rewards_to_go",
    "rollout_episodes",
    "rollout_segments",
    "score_gradient",
    "start_segments",
    "step_discounts",
    "streams",
    "surrogate",
    "tabular_policy",
    "time_dependent_baseline",
    "trajectory_gradients",
]
