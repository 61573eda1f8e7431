r"""Exact answers by dynamic programming over states: any horizon, memoryless policies.

    d[t, s]     = P(decision t is taken, in state s)                   forwards
    Q[t, s, a]  = r[s, a] + discount * sum_x P(x | s, a) V[t + 1, x]   backwards
    V[t, s]     = sum_a pi(a | s) Q[t, s, a],   J = sum_s initial[s] V[0, s]
    grad J      = the derivative of J, through the recursion

A policy that sees an observation acts in state s with pi(a | s) = sum_o emission[s, o]
pi(a | o). That is exact, because the observation is drawn anew at every decision and a
memoryless policy forgets it. Policies with memory are left to `exact.enumeration`.

References: Sutton et al. 2000, "Policy gradient methods for reinforcement learning with
function approximation"; Kakade 2001, "A natural policy gradient".
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxpg._checks import check_range
from jaxpg.envs.tabular import TabularMDP, check_mdp
from jaxpg.policies import Policy
from jaxpg.types import Params

__all__ = [
    "action_probabilities",
    "action_values",
    "advantages",
    "expected_return",
    "fisher_matrix",
    "mixed_gradient",
    "natural_gradient",
    "occupancies",
    "policy_gradient",
    "state_values",
]


def action_probabilities(
    mdp: TabularMDP, policy: Policy, params: Params
) -> Float[Array, "S A"]:
    """pi(a | s) = sum_o emission[s, o] pi(a | o); without emission o is s.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: its parameters.

    Returns:
        The probability of each action in each state.

    Raises:
        ValueError: if the policy has memory, or the world is none.
    """
    seen = jnp.exp(log_probs_per_obs(mdp, policy, params))
    return seen if mdp.emission is None else mdp.emission @ seen


def log_probs_per_obs(
    mdp: TabularMDP, policy: Policy, params: Params
) -> Float[Array, "O A"]:
    """log pi(a | o), in nats: the one place where this package asks a policy."""
    check_mdp(mdp)
    if policy.is_recurrent:
        raise ValueError(
            "policy is recurrent, needs a memoryless one: with memory the state does "
            "not determine the action's law; use exact.enumerated_return and jax.grad "
            "of it"
        )
    num_states, num_actions = mdp.reward.shape
    num_obs = num_states if mdp.emission is None else mdp.emission.shape[1]
    actions = jnp.arange(num_actions, dtype=jnp.int32)

    def of_obs(obs: Array) -> Array:
        distribution, _ = policy.step(params, policy.initial_carry(), obs)
        return jax.vmap(distribution.log_prob)(actions)

    return jax.vmap(of_obs)(jnp.arange(num_obs, dtype=jnp.int32))


def emission_matrix(mdp: TabularMDP) -> Float[Array, "S O"]:
    """The emission; where the state itself is seen, the identity."""
    if mdp.emission is None:
        return jnp.eye(mdp.reward.shape[0], dtype=mdp.reward.dtype)
    return mdp.emission


def expected_return(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Float[Array, ""]:
    """J(theta) = E[sum_t discount^t r[t]], by backward dynamic programming.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: its parameters; differentiate with respect to them.
        discount: the factor per decision, in [0, 1].

    Returns:
        The exact objective.

    Raises:
        ValueError: if the policy has memory, or an argument is out of range.
    """
    return jnp.dot(mdp.initial, state_values(mdp, policy, params, discount)[0])


def policy_gradient(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Params:
    """grad J, exactly: what every unbiased estimator must average to."""
    return jax.grad(lambda p: expected_return(mdp, policy, p, discount))(params)


def occupancies(mdp: TabularMDP, policy: Policy, params: Params) -> Float[Array, "T S"]:
    """The probability of being in each state at each decision, still alive.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: its parameters.

    Returns:
        d[t, s]; each d[t] sums to the probability that decision t is taken at all.
    """
    probabilities = action_probabilities(mdp, policy, params)
    continues = (~mdp.terminal).astype(mdp.reward.dtype)

    def forward(alive: Array, _: None) -> tuple[Array, Array]:
        moves = jnp.einsum("s,sa,sax->x", alive, probabilities, mdp.transition)
        return moves * continues, alive

    return jax.lax.scan(forward, mdp.initial, None, mdp.horizon)[1]


def action_values(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Float[Array, "T S A"]:
    """Q[t, s, a]: the expected reward-to-go of action a in state s at decision t.

    Args:
        mdp: the world.
        policy: a memoryless policy over observations, followed from t + 1 on.
        params: its parameters.
        discount: the factor per decision, in [0, 1].

    Returns:
        Values in units of the reward.
    """
    check_range("discount", discount, 0.0, 1.0)
    probabilities = action_probabilities(mdp, policy, params)
    continues = (~mdp.terminal).astype(mdp.reward.dtype)

    def backward(values: Array, _: None) -> tuple[Array, Array]:
        future = jnp.einsum("sax,x,x->sa", mdp.transition, continues, values)
        q = mdp.reward + discount * future
        return jnp.sum(probabilities * q, axis=1), q

    zeros = jnp.zeros_like(mdp.initial)
    return jax.lax.scan(backward, zeros, None, mdp.horizon, reverse=True)[1]


def state_values(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Float[Array, "T S"]:
    """V[t, s] = sum_a pi(a | s) Q[t, s, a]: of the state, whatever it looks like.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: its parameters.
        discount: the factor per decision, in [0, 1].

    Returns:
        Values in units of the reward.
    """
    values = action_values(mdp, policy, params, discount)
    probabilities = action_probabilities(mdp, policy, params)
    return jnp.einsum("sa,tsa->ts", probabilities, values)


def advantages(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Float[Array, "T S A"]:
    """A[t, s, a] = Q[t, s, a] - V[t, s]; their mean over actions is 0.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: its parameters.
        discount: the factor per decision, in [0, 1].

    Returns:
        Advantages in units of the reward.
    """
    values = state_values(mdp, policy, params, discount)
    return action_values(mdp, policy, params, discount) - values[..., None]


def mixed_gradient(
    mdp: TabularMDP,
    policy: Policy,
    params: Params,
    states_of: Params,
    values_of: Params,
    discount: float = 1.0,
) -> Params:
    """sum_{t,s} d[t, s] sum_a grad pi(a | s) Q[t, s, a], with d and Q of any policies.

    With both of `params` this is the policy gradient (for discount 1); with one or both
    of a behaviour policy it is the limit of an off-policy form that drops ratios.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: the parameters that pi is differentiated at.
        states_of: the parameters that the states are visited with.
        values_of: the parameters that the values belong to.
        discount: of the values; the states' own is not discounted.

    Returns:
        A tree like `params`.

    Reference: Sutton et al. 2000, theorem 1; Degris, White and Sutton 2012.
    """
    visits = occupancies(mdp, policy, states_of)
    values = action_values(mdp, policy, values_of, discount)

    def objective(params: Params) -> Array:
        probabilities = action_probabilities(mdp, policy, params)
        return jnp.einsum("ts,sa,tsa->", visits, probabilities, values)

    return jax.grad(objective)(params)


def fisher_matrix(
    mdp: TabularMDP, policy: Policy, params: Params
) -> Float[Array, "P P"]:
    """F = E[sum_t s[t] s[t]^T], s[t] = grad log pi(a[t] | o[t]), undiscounted.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: its parameters; P counts them as `jax.flatten_util.ravel_pytree` does.

    Returns:
        A sum over an episode's decisions, not a mean per decision.

    Raises:
        ValueError: if the policy has memory.

    Reference: Kakade 2001; Peters and Schaal 2008, "Natural actor-critic".
    """
    flat, unravel = ravel_pytree(params)

    def log_probs(flat: Array) -> Array:
        return log_probs_per_obs(mdp, policy, unravel(flat))

    visits = occupancies(mdp, policy, params)
    seen = jnp.einsum("ts,so->o", visits, emission_matrix(mdp))
    chances = jnp.exp(log_probs(flat))
    # The score of an impossible action may be infinite, and does not count.
    scores = jnp.where(chances[..., None] > 0.0, jax.jacrev(log_probs)(flat), 0.0)
    return jnp.einsum("o,oa,oap,oaq->pq", seen, chances, scores, scores)


def natural_gradient(
    mdp: TabularMDP,
    policy: Policy,
    params: Params,
    discount: float = 1.0,
    damping: float = 0.0,
) -> Params:
    """x = F^+ grad J, the shortest solution of F x = grad J; damped (F + damping)^-1.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: its parameters.
        discount: of the gradient, in [0, 1]; F is undiscounted.
        damping: what is added to F's diagonal, at least 0; a Python number.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: if the policy has memory, or an argument is out of range.

    Reference: Kakade 2001, section 2.
    """
    check_range("damping", damping, 0.0)
    fisher = fisher_matrix(mdp, policy, params)
    gradient, unravel = ravel_pytree(policy_gradient(mdp, policy, params, discount))
    if damping == 0.0:
        return unravel(jnp.linalg.pinv(fisher, hermitian=True) @ gradient)
    damped = fisher + damping * jnp.eye(fisher.shape[0], dtype=fisher.dtype)
    return unravel(jnp.linalg.solve(damped, gradient))
