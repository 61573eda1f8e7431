r"""How the second moment of importance weights grows with the horizon.

    W[t] = prod_{u <= t} rho[u],   rho[u] = pi(a[u] | o[u]) / mu(a[u] | o[u])
    K[s, a] = sum_o emission[s, o] pi(a | o)^2 / mu(a | o)       E[rho^2; a | s]
    M[s, x] = sum_a K[s, a] P(x | s, a)
    m[t + 1] = m[t] M     over the living states,    m[0] = initial

where m[t, s] = E_mu[W[t - 1]^2; alive in s at t]. As E_mu[W] = 1, the variance of a
weight is its second moment less 1. It grows like rate^t, `rate` being M's spectral
radius: this is why whole-trajectory weights fail on long horizons.

References: Precup, Sutton and Singh 2000, "Eligibility traces for off-policy policy
evaluation"; Liu et al. 2018, "Breaking the curse of horizon".
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg.envs.tabular import TabularMDP
from jaxpg.exact.dynamic import emission_matrix, log_probs_per_obs
from jaxpg.policies import Policy
from jaxpg.types import Params

__all__ = ["weight_growth_rate", "weight_second_moments"]

SQUARINGS = 60
"""M^(2^60): what it is not yet sure of is of the order 2^-60 in the logarithm."""


def weight_second_moments(
    mdp: TabularMDP, policy: Policy, params: Params, behaviour_params: Params
) -> Float[Array, " T"]:
    """E_mu[W[t]^2]; a trajectory that has ended keeps its last weight.

    Args:
        mdp: the world.
        policy: a memoryless policy over the world's observations.
        params: those of pi, which is asked about.
        behaviour_params: those of mu, which acts; what it never does does not count.

    Returns:
        Numbers of at least 1 that never fall, as long as mu can do whatever pi does;
        infinite where they outgrow the number format.

    Raises:
        ValueError: if the policy has memory.
    """
    squared = _squared_step(mdp, policy, params, behaviour_params)
    continues = (~mdp.terminal).astype(squared.dtype)

    def forward(
        carry: tuple[Array, Array], _: None
    ) -> tuple[tuple[Array, Array], Array]:
        alive, ended = carry
        arrived = alive @ squared
        ended = ended + jnp.dot(arrived, 1.0 - continues)
        alive = arrived * continues
        return (alive, ended), ended + jnp.sum(alive)

    start = (mdp.initial, jnp.zeros((), mdp.initial.dtype))
    return jax.lax.scan(forward, start, None, mdp.horizon)[1]


def weight_growth_rate(
    mdp: TabularMDP, policy: Policy, params: Params, behaviour_params: Params
) -> Float[Array, ""]:
    """log of M's spectral radius over non-terminal states: growth per decision.

    Args:
        mdp: the world; its horizon does not matter.
        policy: a memoryless policy over the world's observations.
        params: those of pi, which is asked about.
        behaviour_params: those of mu, which acts; what it never does does not count.

    Returns:
        lim log(E[W[t + 1]^2] / E[W[t]^2]), in nats, if it is positive and its states
        can be reached; if negative, episodes end faster than weights grow and the
        moment stays bounded.

    Raises:
        ValueError: if the policy has memory.
    """
    squared = _squared_step(mdp, policy, params, behaviour_params)
    continues = (~mdp.terminal).astype(squared.dtype)
    return _log_spectral_radius(squared * jnp.outer(continues, continues))


def _squared_step(
    mdp: TabularMDP, policy: Policy, params: Params, behaviour_params: Params
) -> Float[Array, "S S"]:
    """M[s, x]: what one decision does to the second moment."""
    target = log_probs_per_obs(mdp, policy, params)
    behaviour = log_probs_per_obs(mdp, policy, behaviour_params)
    taken = behaviour > -jnp.inf
    log_squares = 2.0 * target - jnp.where(taken, behaviour, 0.0)
    squares = jnp.where(taken, jnp.exp(log_squares), 0.0)
    by_state = emission_matrix(mdp) @ squares
    return jnp.einsum("sa,sax->sx", by_state, mdp.transition)


def _log_spectral_radius(matrix: Float[Array, "S S"]) -> Float[Array, ""]:
    """Gelfand's formula by squaring: lim 2^-k log ||M^(2^k)||, for any device.

    Nothing cancels where no entry is negative, and no eigenvalue solver is needed,
    which not every accelerator has.
    """

    def square(power: Array, share: Array) -> tuple[Array, Array]:
        size = jnp.max(jnp.abs(power))
        scaled = power / jnp.where(size > 0.0, size, 1.0)
        return scaled @ scaled, share * jnp.log(size)

    shares = 0.5 ** jnp.arange(SQUARINGS, dtype=matrix.dtype)
    return jnp.sum(jax.lax.scan(square, matrix, shares)[1])
