r"""Drift: how far the policy that is asked about has come from the one that acted.

Of log-ratios log rho = log pi(a) - log mu(a), of actions that mu took, what they say of
KL(mu || pi) and of the weights that they make, at every time step over the trajectories
alive there. Empty slots are never counted.

Reference: Schulman 2020, "Approximating KL divergence"; Kong 1992 for the effective
sample size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpg._checks import check_rank, check_same_shape
from jaxpg.importance import MAX_LOG_WEIGHT, to_weights
from jaxpg.moments import moments_of, variance

__all__ = [
    "KLEstimates",
    "MAX_LOG_RHO",
    "MAX_LOG_SUM",
    "RatioDiagnostics",
    "kl_estimators",
    "ratio_diagnostics",
]

MAX_LOG_RHO = 1e4
"""One decision's log-ratio is held within this: squares and means of it are finite."""

MAX_LOG_SUM = 1e9
"""Log-weights, sums of many log-ratios, are held within this."""

BATCH = "(B, T) = one number per decision; for one row use x[None]"


class KLEstimates(NamedTuple):
    """Three estimates of KL(mu || pi) in nats, from actions that mu took.

    Attributes:
        k1: mean of -log rho.
        k2: mean of (log rho)^2 / 2.
        k3: mean of rho - 1 - log rho.
        num_alive: how many decisions each is a mean over; 0 leaves the estimates 0.
    """

    k1: Float[Array, "*T"]
    k2: Float[Array, "*T"]
    k3: Float[Array, "*T"]
    num_alive: Int[Array, "*T"]

    @property
    def pooled(self) -> "KLEstimates":
        """The same over all decisions: their mean, each decision counting once."""
        total = jnp.sum(self.num_alive)
        n = jnp.maximum(total, 1).astype(self.k1.dtype)
        share = self.num_alive.astype(self.k1.dtype) / n
        k1, k2, k3 = (jnp.sum(share * k) for k in (self.k1, self.k2, self.k3))
        return KLEstimates(k1, k2, k3, total)


def kl_estimators(
    log_rhos: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> KLEstimates:
    """Estimates of KL(mu || pi) = E_mu[log mu - log pi] at each decision t.

    The direction is from the policy that acted, mu, to the one asked about, pi, with
    rho = pi / mu, averaged over what mu meets at t among the trajectories alive there.

    Args:
        log_rhos: log pi - log mu of each decision, held within +-`MAX_LOG_RHO`; in k3
            rho is held at exp(`MAX_LOG_WEIGHT`).
        mask: whether slot t holds a decision.

    Returns:
        One estimate of each kind per time step, [T], and `pooled` over all of them.

    Raises:
        ValueError: if the arrays are not two batches of one shape.

    Bias: k1 is unbiased and may be negative; k3 is unbiased where mu can take all that
        pi can, and never negative; k2 is biased by the third order in log rho. Where
        lengths vary, `pooled` is a ratio of means, biased O(1/B).

    Reference: Schulman 2020, "Approximating KL divergence".

    >>> estimates = kl_estimators(jnp.array([[-0.5], [0.1]]), jnp.ones((2, 1), bool))
    >>> [round(k.item(), 4) for k in estimates[:3]]
    [0.2, 0.065, 0.0559]
    """
    _check_batch(log_rhos=log_rhos, mask=mask)

    def of_step(log_rhos: Array, alive: Array) -> KLEstimates:
        # Where nothing is alive all three are 0 at log rho = 0.
        x = jnp.where(alive, jnp.clip(log_rhos, -MAX_LOG_RHO, MAX_LOG_RHO), 0.0)
        rho_less_one = jnp.expm1(jnp.minimum(x, MAX_LOG_WEIGHT))
        num_alive = jnp.sum(alive)
        n = jnp.maximum(num_alive, 1).astype(x.dtype)
        return KLEstimates(
            k1=jnp.sum(-x) / n,
            k2=jnp.sum(x**2 / 2.0) / n,
            k3=jnp.sum(rho_less_one - x) / n,
            num_alive=num_alive,
        )

    return jax.vmap(of_step, in_axes=1)(log_rhos, mask)


class RatioDiagnostics(NamedTuple):
    """How even importance weights are, step by step; 0 where nothing is alive.

    Attributes:
        num_alive: n, the decisions at this step.
        ess: (sum w)^2 / sum w^2, in [1, n].
        max_share: the largest weight's part of their sum, in [1/n, 1].
        max_weight: the largest weight.
        mean_ratio: the mean weight.
        log_weight_std: standard deviation of the log-weights, in nats.
    """

    num_alive: Int[Array, "*T"]
    ess: Float[Array, "*T"]
    max_share: Float[Array, "*T"]
    max_weight: Float[Array, "*T"]
    mean_ratio: Float[Array, "*T"]
    log_weight_std: Float[Array, "*T"]


def ratio_diagnostics(
    log_weights: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> RatioDiagnostics:
    """Effective sample size, largest weight, mean and spread at each decision t.

    Args:
        log_weights: log-ratios of decisions, or sums of them such as
            `cumulative_log_rhos`; held within +-`MAX_LOG_SUM`. Weights and their mean
            are held at exp(`MAX_LOG_WEIGHT`); `ess` and `max_share` are not.
        mask: whether slot t holds a decision.

    Returns:
        One number of each kind per time step, [T], over the trajectories alive there.

    Raises:
        ValueError: if the arrays are not two batches of one shape.

    Bias: `mean_ratio` is unbiased for its limit: 1 for single decisions' ratios; for
        products P_pi(alive at t) / P_mu(alive at t), 1 while all are alive. The others
        describe this batch. `log_weight_std` divides by n.

    Reference: Kong 1992; Owen 2013, "Monte Carlo theory", section 9.3.

    >>> ratio_diagnostics(jnp.zeros((3, 1)), jnp.ones((3, 1), bool)).ess.tolist()
    [3.0]
    """
    _check_batch(log_weights=log_weights, mask=mask)

    def of_step(log_weights: Array, alive: Array) -> RatioDiagnostics:
        bounded = jnp.clip(log_weights, -MAX_LOG_SUM, MAX_LOG_SUM)
        top = jnp.max(bounded, where=alive, initial=-MAX_LOG_SUM)
        shares = jnp.where(alive, jnp.exp(bounded - top), 0.0)
        num_alive = jnp.sum(alive)
        n = jnp.maximum(num_alive, 1).astype(shares.dtype)
        # With anything alive, the largest share is 1 and both sums are at least that.
        total = jnp.sum(shares)
        least = jnp.maximum(total, 1.0)
        std = jnp.sqrt(variance(moments_of(bounded, alive), ddof=0))
        return RatioDiagnostics(
            num_alive,
            ess=total**2 / jnp.maximum(jnp.sum(shares**2), 1.0),
            max_share=jnp.minimum(total, 1.0) / least,
            max_weight=to_weights(top),
            mean_ratio=to_weights(top + jnp.log(least) - jnp.log(n)),
            log_weight_std=jnp.where(num_alive > 0, std, 0.0),
        )

    return jax.vmap(of_step, in_axes=1)(log_weights, mask)


def _check_batch(**arrays: Array) -> None:
    check_same_shape(**arrays)
    for name, array in arrays.items():
        check_rank(name, array, 2, BATCH)
