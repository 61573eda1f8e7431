"""Policy gradients in JAX: exact theory, vectorised rollouts, measured variance.

    env -> rollout -> Trajectory -> returns / baselines -> weights [B, T]
        -> score_gradient -> Optax -> Algorithm.update -> train

The names below are the public ones; every room documents its own equation. Training
itself, with its files and progress, is in `jaxpg.train`, and the oracle in
`jaxpg.exact`.
"""

from jaxpg import envs, exact
from jaxpg._version import __version__
from jaxpg.algos.base import Algorithm, AlgorithmState, ascend
from jaxpg.algos.reinforce import (
    ReinforceConfig,
    reinforce,
    reinforce_credit,
    reinforce_gradient,
)
from jaxpg.baselines import (
    Baseline,
    batch_mean_baseline,
    constant_baseline,
    leave_one_out_baseline,
    no_baseline,
    time_dependent_baseline,
)
from jaxpg.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    TanhGaussian,
)
from jaxpg.gradients import (
    Chunks,
    score_gradient,
    sum_over_chunks,
    trajectory_gradients,
)
from jaxpg.networks import mlp
from jaxpg.policies import (
    Head,
    Policy,
    categorical_head,
    from_apply,
    from_linen,
    from_nnx,
    gaussian_head,
    head_for,
    log_prob_fn,
    mlp_policy,
)
from jaxpg.returns import (
    at_episode_start,
    episode_returns,
    leading_discounts,
    rewards_to_go,
    step_discounts,
    suffix_recurrence,
)
from jaxpg.rollout import (
    RolloutState,
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
    "DiagonalGaussian",
    "Distribution",
    "Head",
    "MultiCategorical",
    "Policy",
    "ReinforceConfig",
    "RolloutState",
    "StepOutput",
    "TanhGaussian",
    "Trajectory",
    "__version__",
    "ascend",
    "at_episode_start",
    "batch_mean_baseline",
    "categorical_head",
    "constant_baseline",
    "envs",
    "episode_returns",
    "exact",
    "from_apply",
    "from_linen",
    "from_nnx",
    "gaussian_head",
    "head_for",
    "leading_discounts",
    "leave_one_out_baseline",
    "log_prob_fn",
    "mlp",
    "mlp_policy",
    "no_baseline",
    "reinforce",
    "reinforce_credit",
    "reinforce_gradient",
    "rewards_to_go",
    "rollout_episodes",
    "rollout_segments",
    "score_gradient",
    "start_segments",
    "step_discounts",
    "suffix_recurrence",
    "sum_over_chunks",
    "time_dependent_baseline",
    "trajectory_gradients",
]
