r"""Proximal surrogates: several steps on one batch without going far from who acted.

    rho = pi / mu,    clipped:    mean_i sum_t min(rho A, clip(rho, 1 - eps, 1 + eps) A)
                      penalised:  mean_i sum_t (rho A - coefficient * KL[t])

These are losses, not weights: their derivative follows the ratios, and vanishes where
going further would be rewarded no more. At pi = mu both have the policy gradient with
the weights A for their derivative. The sum is over time and the mean over trajectories,
as everywhere; divide by the mean number of decisions for the usual mean per decision.

Reference: Schulman, Wolski, Dhariwal, Radford and Klimov 2017, "Proximal policy
optimization algorithms".
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpg._checks import check_no_nan, check_range, check_same_shape
from jaxpg.importance import MAX_LOG_WEIGHT, finite_log_rhos

__all__ = [
    "clipped_surrogate",
    "clipped_terms",
    "kl_penalty_surrogate",
    "kl_penalty_terms",
]


def clipped_surrogate(
    log_probs: Float[Array, "B T"],
    behaviour_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon: float = 0.2,
) -> Float[Array, ""]:
    """mean_i sum_t min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A).

    Args:
        log_probs: of the policy that learns, in nats; the derivative goes through it.
        behaviour_log_probs: of the policy that acted, held constant.
        advantages: held constant.
        mask: whether slot t holds a decision.
        epsilon: how far a ratio may go before it earns nothing, in (0, 1).

    Returns:
        What to climb.

    Raises:
        ValueError: if shapes differ, known advantages hold NaN or epsilon is out of
            range.

    Bias: biased for the gradient of the return but at pi = mu; its first-order ratios
        have the states and values of mu, and clipping drops more.

    Reference: Schulman et al. 2017, equation 7.

    >>> one, mask = jnp.ones((1, 1)), jnp.array([[True]])
    >>> clipped_surrogate(jnp.log(3 * one), 0 * one, one, mask, epsilon=0.5).item()
    1.5
    """
    terms = clipped_terms(
        log_probs, behaviour_log_probs, advantages, mask, epsilon=epsilon
    )
    return jnp.sum(terms) / terms.shape[0]


def clipped_terms(
    log_probs: Float[Array, "B T"],
    behaviour_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    epsilon: float | Float[Array, ""] = 0.2,
) -> Float[Array, "B T"]:
    """min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) of every decision.

    Args:
        log_probs: of the policy that learns, in nats; the derivative goes through it.
        behaviour_log_probs: of the policy that acted, held constant.
        advantages: held constant.
        mask: whether slot t holds a decision.
        epsilon: how far a ratio may go before it earns nothing, in (0, 1).

    Returns:
        The terms of `clipped_surrogate`, 0 in empty slots.

    Raises:
        ValueError: as `clipped_surrogate`.

    Bias: as `clipped_surrogate`.

    Reference: Schulman et al. 2017, equation 7.
    """
    check_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
    rhos, advantages = _ratios(log_probs, behaviour_log_probs, advantages, mask)
    # Not by `minimum`, whose derivative shares ties out by a division, term by term.
    gains = advantages >= 0.0
    bounds = jnp.where(gains, 1.0 + epsilon, 1.0 - epsilon).astype(rhos.dtype)
    too_far = jnp.where(gains, rhos > bounds, rhos < bounds)
    terms = jnp.where(too_far, bounds, rhos) * advantages
    return jnp.where(mask, terms, 0.0)


def kl_penalty_surrogate(
    log_probs: Float[Array, "B T"],
    behaviour_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    kls: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    coefficient: float | Float[Array, ""],
) -> Float[Array, ""]:
    """mean_i sum_t (rho A - coefficient * KL(mu || pi)).

    Args:
        log_probs: of the policy that learns, in nats; the derivative goes through it.
        behaviour_log_probs: of the policy that acted, held constant.
        advantages: held constant.
        kls: KL of mu from pi at each decision's observation, from the distributions'
            own `kl`; the derivative goes through it.
        mask: whether slot t holds a decision.
        coefficient: weight of the KL, at least 0; adapt it between batches.

    Returns:
        What to climb.

    Raises:
        ValueError: if shapes differ or known advantages hold NaN.

    Bias: biased for the gradient of the return but at pi = mu, where the KL's own
        derivative is 0.

    Reference: Schulman et al. 2017, equation 8.

    >>> zero, one, mask = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.array([[True]])
    >>> kl_penalty_surrogate(zero, zero, 3 * one, one, mask, coefficient=2.0).item()
    1.0
    """
    terms = kl_penalty_terms(
        log_probs, behaviour_log_probs, advantages, kls, mask, coefficient=coefficient
    )
    return jnp.sum(terms) / terms.shape[0]


def kl_penalty_terms(
    log_probs: Float[Array, "B T"],
    behaviour_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    kls: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    coefficient: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    """rho A - coefficient * KL(mu || pi) of every decision.

    Args:
        log_probs: of the policy that learns, in nats; the derivative goes through it.
        behaviour_log_probs: of the policy that acted, held constant.
        advantages: held constant.
        kls: KL of mu from pi at each decision's observation.
        mask: whether slot t holds a decision.
        coefficient: weight of the KL, at least 0.

    Returns:
        The terms of `kl_penalty_surrogate`, 0 in empty slots.

    Raises:
        ValueError: as `kl_penalty_surrogate`.

    Bias: as `kl_penalty_surrogate`.

    Reference: Schulman et al. 2017, equation 8.
    """
    check_range("coefficient", coefficient, 0.0)
    check_same_shape(log_probs=log_probs, kls=kls)
    rhos, advantages = _ratios(log_probs, behaviour_log_probs, advantages, mask)
    penalties = coefficient * jnp.where(mask, kls, 0.0)
    return jnp.where(mask, rhos * advantages - penalties, 0.0)


def _ratios(
    log_probs: Array, behaviour_log_probs: Array, advantages: Array, mask: Array
) -> tuple[Array, Array]:
    check_same_shape(
        log_probs=log_probs,
        behaviour_log_probs=behaviour_log_probs,
        advantages=advantages,
        mask=mask,
    )
    check_no_nan("advantages", advantages, mask)
    behaviour = jax.lax.stop_gradient(behaviour_log_probs)
    # Masked before they are exponentiated: what is infinite there would be NaN.
    log_rhos = jnp.where(mask, log_probs - behaviour, 0.0)
    log_rhos = finite_log_rhos(log_rhos)
    rhos = jnp.exp(jnp.where(log_rhos > MAX_LOG_WEIGHT, MAX_LOG_WEIGHT, log_rhos))
    return rhos, jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))
