"""The oracle: exact answers on tabular worlds, to hold every estimator against.

    dynamic      J, grad J, values, Fisher matrix, natural gradient: any horizon
    paths        all trajectories of a small world and their probabilities
    enumeration  mean and variance of any estimator; J of policies with memory
    stationary   the continuing world: average reward, its gradient, GPOMDP's limit
    weights      how fast importance weights spread as the horizon grows

Nothing is sampled here. Run it in float64 (`jax.enable_x64`) for answers to 1e-10.
Each file imports only earlier ones.
"""

from jaxpg.exact.dynamic import (
    action_probabilities,
    action_values,
    advantages,
    expected_return,
    fisher_matrix,
    mixed_gradient,
    natural_gradient,
    occupancies,
    policy_gradient,
    state_values,
)
from jaxpg.exact.enumeration import (
    EstimateMoments,
    enumerated_return,
    estimate_moments,
    expected_estimate,
)
from jaxpg.exact.paths import Paths, enumerate_trajectories, with_log_probs
from jaxpg.exact.stationary import (
    average_reward,
    average_reward_gradient,
    discounted_approximation,
    stationary_distribution,
)
from jaxpg.exact.weights import weight_growth_rate, weight_second_moments

__all__ = [
    "EstimateMoments",
    "Paths",
    "action_probabilities",
    "action_values",
    "advantages",
    "average_reward",
    "average_reward_gradient",
    "discounted_approximation",
    "enumerate_trajectories",
    "enumerated_return",
    "estimate_moments",
    "expected_estimate",
    "expected_return",
    "fisher_matrix",
    "mixed_gradient",
    "natural_gradient",
    "occupancies",
    "policy_gradient",
    "state_values",
    "stationary_distribution",
    "weight_growth_rate",
    "weight_second_moments",
    "with_log_probs",
]
