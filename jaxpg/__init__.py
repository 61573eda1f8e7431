"""Policy gradients in JAX: exact theory, vectorised rollouts, measured variance.

    env -> rollout -> Trajectory -> credit / baselines -> weights [B, T]
        -> score_gradient -> Optax -> Algorithm.update -> train

The names below are the public ones, and the rooms that hold more of a kind; every room
documents its own equation. Training itself, with its files and progress, is in
`jaxpg.train`.
"""

from jaxpg import (
    advantages,
    critics,
    diagnostics,
    drift,
    eligibility,
    envs,
    exact,
    fisher,
    importance,
    moments,
    normalizers,
    optimal,
    streams,
    surrogate,
    trust_region,
)
from jaxpg._version import __version__
from jaxpg.algos.a2c import A2CConfig, a2c
from jaxpg.algos.base import (
    Algorithm,
    AlgorithmState,
    Episodes,
    Segments,
    Task,
    ascend,
    make_task,
)
from jaxpg.algos.behaviour import Behaviour
from jaxpg.algos.natural import ENACConfig, NPGConfig, enac, npg
from jaxpg.algos.off_policy import OffPolicyConfig, off_policy
from jaxpg.algos.ppo import PPOConfig, ppo
from jaxpg.algos.reinforce import (
    ReinforceConfig,
    reinforce,
    reinforce_gradient,
)
from jaxpg.algos.trpo import TRPOConfig, trpo
from jaxpg.algos.vtrace import VTraceConfig, vtrace
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
    StateDependentGaussian,
    TanhGaussian,
    entropy_of,
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
from jaxpg.heads import (
    Head,
    bernoulli_head,
    categorical_head,
    gaussian_head,
    head_for,
    multi_categorical_head,
    state_dependent_noise_head,
    tanh_gaussian_head,
)
from jaxpg.networks import (
    Network,
    cnn_network,
    feedforward,
    gru_network,
    mlp,
    mlp_network,
)
from jaxpg.policies import (
    Policy,
    cnn_policy,
    from_apply,
    from_linen,
    from_network,
    from_nnx,
    log_prob_fn,
    mlp_policy,
    recurrent_policy,
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
    "A2CConfig",
    "Algorithm",
    "AlgorithmState",
    "Baseline",
    "Behaviour",
    "Bernoulli",
    "Categorical",
    "Chunks",
    "Credit",
    "CreditConfig",
    "DiagonalGaussian",
    "Distribution",
    "ENACConfig",
    "Episodes",
    "Estimator",
    "EstimatorConfig",
    "Head",
    "MultiCategorical",
    "NPGConfig",
    "Network",
    "OffPolicyConfig",
    "PPOConfig",
    "Policy",
    "ReinforceConfig",
    "Segments",
    "StateDependentGaussian",
    "StepOutput",
    "TRPOConfig",
    "TanhGaussian",
    "Task",
    "Trajectory",
    "VTraceConfig",
    "__version__",
    "a2c",
    "advantages",
    "apply_baseline",
    "ascend",
    "batch_mean_baseline",
    "bernoulli_head",
    "categorical_head",
    "cnn_network",
    "cnn_policy",
    "constant_baseline",
    "credit_of",
    "critics",
    "diagnostics",
    "drift",
    "eligibility",
    "enac",
    "entropy_of",
    "envs",
    "episode_returns",
    "estimate_gradient",
    "estimate_terms",
    "estimate_weights",
    "exact",
    "feedforward",
    "fisher",
    "from_apply",
    "from_linen",
    "from_network",
    "from_nnx",
    "gaussian_head",
    "gru_network",
    "head_for",
    "importance",
    "leading_discounts",
    "leave_one_out_baseline",
    "log_prob_fn",
    "make_estimator",
    "make_task",
    "mlp",
    "mlp_network",
    "mlp_policy",
    "moments",
    "multi_categorical_head",
    "no_baseline",
    "normalizers",
    "npg",
    "off_policy",
    "optimal",
    "ppo",
    "recurrent_policy",
    "reinforce",
    "reinforce_gradient",
    "rewards_to_go",
    "rollout_episodes",
    "rollout_segments",
    "score_gradient",
    "start_segments",
    "state_dependent_noise_head",
    "step_discounts",
    "streams",
    "surrogate",
    "tabular_policy",
    "tanh_gaussian_head",
    "time_dependent_baseline",
    "trajectory_gradients",
    "trpo",
    "trust_region",
    "vtrace",
]
