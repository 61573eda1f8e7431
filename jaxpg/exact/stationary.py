r"""The continuing world: long-run average reward, and its gradient.

    P[s, x]   = sum_a pi(a | s) P(x | s, a),      d = d P,   sum_s d[s] = 1
    eta       = sum_s d[s] sum_a pi(a | s) r[s, a]
    grad eta  = its derivative, through the linear equations of d

Here the world never stops: `initial`, `terminal` and `horizon` are ignored, and rows of
terminal states in `transition` say where it goes on (in `canonical_mdp` to the start).
The average does not depend on the start as long as P has one recurrent class.

Reference: Baxter and Bartlett 2001, "Infinite-horizon policy-gradient estimation".
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpg._checks import check_range
from jaxpg.envs.tabular import TabularMDP
from jaxpg.exact.dynamic import action_probabilities
from jaxpg.policies import Policy
from jaxpg.types import Params

__all__ = [
    "average_reward",
    "average_reward_gradient",
    "discounted_approximation",
    "stationary_distribution",
]


def stationary_distribution(
    mdp: TabularMDP, policy: Policy, params: Params
) -> Float[Array, " S"]:
    """d = d P: how often each state is visited in the long run.

    Args:
        mdp: the world; it goes on from terminal states as `transition` says.
        policy: a memoryless policy over the world's observations.
        params: its parameters; differentiate with respect to them.

    Returns:
        Probabilities.

    Raises:
        ValueError: if the policy has memory, or its chain several recurrent classes.
    """
    chain = _chain(mdp, action_probabilities(mdp, policy, params))
    _check_one_class(chain)
    # Adding 1 to every entry adds sum(d) = 1 to both sides: now there is one solution.
    ones = jnp.ones_like(chain)
    equations = jnp.eye(chain.shape[0], dtype=chain.dtype) - chain.T + ones
    return jnp.linalg.solve(equations, ones[0])


def average_reward(mdp: TabularMDP, policy: Policy, params: Params) -> Float[Array, ""]:
    """eta = sum_s d[s] sum_a pi(a | s) r[s, a]: reward per decision in the long run.

    Args:
        mdp: the world; it goes on from terminal states as `transition` says.
        policy: a memoryless policy over the world's observations.
        params: its parameters; differentiate with respect to them.

    Returns:
        In units of the reward.

    Raises:
        ValueError: if the policy has memory, or its chain several recurrent classes.
    """
    visits = stationary_distribution(mdp, policy, params)
    probabilities = action_probabilities(mdp, policy, params)
    return jnp.einsum("s,sa,sa->", visits, probabilities, mdp.reward)


def average_reward_gradient(mdp: TabularMDP, policy: Policy, params: Params) -> Params:
    """grad eta, the derivative of both the policy and where it leads in the long run.

    Args:
        mdp: the world; it goes on from terminal states as `transition` says.
        policy: a memoryless policy over the world's observations.
        params: where to take the gradient.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: if the policy has memory, or its chain several recurrent classes.
    """
    stationary_distribution(mdp, policy, params)  # refuses here, where it can see
    return jax.grad(lambda p: average_reward(mdp, policy, p))(params)


def discounted_approximation(
    mdp: TabularMDP, policy: Policy, params: Params, beta: float
) -> Params:
    """What GPOMDP with trace decay beta estimates: the limit of its mean.

        sum_s d[s] sum_a grad pi(a | s) (r[s, a] + beta sum_x P(x | s, a) V_beta[x])

    where V_beta is the discounted value. Baxter and Bartlett pay the reward of a state
    when it is entered: with r[s, a] = sum_x P(x | s, a) r[x] this is their d^T (grad P)
    J_beta, and with r[s, a] = r[s], paid one decision later, beta times theirs.

    Args:
        mdp: the world; it goes on from terminal states as `transition` says.
        policy: a memoryless policy over the world's observations.
        params: where to take the gradient.
        beta: decay of the eligibility trace, in [0, 1]; at 1 the limit is taken.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: if the policy has memory, its chain several recurrent classes, or
            beta is out of range.

    Bias: as an answer to `average_reward_gradient` biased by O(1 - beta), none at 1.

    Reference: Baxter and Bartlett 2001, theorems 2 and 3.
    """
    check_range("beta", beta, 0.0, 1.0)
    visits = stationary_distribution(mdp, policy, params)
    probabilities = action_probabilities(mdp, policy, params)
    chain = _chain(mdp, probabilities)
    average = average_reward(mdp, policy, params)
    gains = jnp.einsum("sa,sa->s", probabilities, mdp.reward) - average
    # V_beta less the constant eta / (1 - beta), which no gradient of pi can see. What
    # is left has mean 0 under d, so adding d to every row changes nothing but the
    # condition of the equations: they stay solvable even at beta = 1.
    identity = jnp.eye(chain.shape[0], dtype=chain.dtype)
    equations = identity - beta * chain + jnp.broadcast_to(visits, chain.shape)
    values = jnp.linalg.solve(equations, gains)
    q = mdp.reward + beta * jnp.einsum("sax,x->sa", mdp.transition, values)

    def objective(params: Params) -> Array:
        return jnp.einsum(
            "s,sa,sa->", visits, action_probabilities(mdp, policy, params), q
        )

    return jax.grad(objective)(params)


def _chain(mdp: TabularMDP, probabilities: Array) -> Float[Array, "S S"]:
    return jnp.einsum("sa,sax->sx", probabilities, mdp.transition)


def _check_one_class(chain: Any) -> None:
    """Refuse chains whose equations d = d P have more than one solution."""
    if isinstance(chain, jax.core.Tracer):
        return
    matrix = np.asarray(chain)
    classes = len(matrix) - np.linalg.matrix_rank(np.eye(len(matrix)) - matrix)
    if classes > 1:
        raise ValueError(
            f"the policy's chain has {classes} recurrent classes, needs one, as the "
            "average must not depend on the start; let `transition` lead from one to "
            "another"
        )
