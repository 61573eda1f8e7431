"""Policy gradients in JAX: exact theory, vectorised rollouts, measured variance.

    env -> rollout -> Trajectory -> credit / baselines -> weights [B, T]
        -> score_gradient -> Optax -> Algorithm.update -> train

The names below are the public ones, and the rooms that hold more of a kind; every room
documents its own equation. Training itself, with its files and progress, is in
`jaxpg.train`.
"""

from jaxpg import (
    advantages,
    baselines,
    critics,
    diagnostics,
    distributions,
    drift,
    eligibility,
    envs,
    exact,
    fisher,
    heads,
    importance,
    moments,
    networks,
    normalizers,
    optimal,
    policies,
    stochastic,
    streams,
    surrogate,
    trust_region,
)
from jaxpg._version import __version__
from jaxpg.algos.a2c import A2CConfig, a2c
from jaxpg.algos.base import Algorithm, Task, ascend, make_task
from jaxpg.algos.natural import ENACConfig, NPGConfig, enac, npg
from jaxpg.algos.off_policy import OffPolicyConfig, off_policy
from jaxpg.algos.ppo import PPOConfig, ppo
from jaxpg.algos.reinforce import ReinforceConfig, reinforce, reinforce_gradient
from jaxpg.algos.trpo import TRPOConfig, trpo
from jaxpg.algos.vtrace import VTraceConfig, vtrace
from jaxpg.baselines import (
    Baseline,
    apply_baseline,
    leave_one_out_baseline,
    no_baseline,
    time_dependent_baseline,
)
from jaxpg.chunks import Chunks
from jaxpg.credit import Credit, CreditConfig, credit_of
from jaxpg.estimators import (
    Estimator,
    EstimatorConfig,
    estimate_gradient,
    estimate_terms,
    estimate_weights,
    make_estimator,
)
from jaxpg.gradients import score_gradient, trajectory_gradients
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
from jaxpg.rollout import rollout_episodes, rollout_segments, start_segments
from jaxpg.types import StepOutput, Trajectory

__all__ = [
    "A2CConfig",
    "Algorithm",
    "Baseline",
    "Chunks",
    "Credit",
    "CreditConfig",
    "ENACConfig",
    "Estimator",
    "EstimatorConfig",
    "NPGConfig",
    "OffPolicyConfig",
    "PPOConfig",
    "Policy",
    "ReinforceConfig",
    "StepOutput",
    "TRPOConfig",
    "Task",
    "Trajectory",
    "VTraceConfig",
    "__version__",
    "a2c",
    "advantages",
    "apply_baseline",
    "ascend",
    "baselines",
    "credit_of",
    "critics",
    "diagnostics",
    "distributions",
    "drift",
    "eligibility",
    "enac",
    "envs",
    "episode_returns",
    "estimate_gradient",
    "estimate_terms",
    "estimate_weights",
    "exact",
    "fisher",
    "from_apply",
    "from_linen",
    "from_nnx",
    "heads",
    "importance",
    "leading_discounts",
    "leave_one_out_baseline",
    "log_prob_fn",
    "make_estimator",
    "make_task",
    "mlp_policy",
    "moments",
    "networks",
    "no_baseline",
    "normalizers",
    "npg",
    "off_policy",
    "optimal",
    "policies",
    "ppo",
    "reinforce",
    "reinforce_gradient",
    "rewards_to_go",
    "rollout_episodes",
    "rollout_segments",
    "score_gradient",
    "start_segments",
    "step_discounts",
    "stochastic",
    "streams",
    "surrogate",
    "tabular_policy",
    "time_dependent_baseline",
    "trajectory_gradients",
    "trpo",
    "trust_region",
    "vtrace",
]
