"""Draws made of noise, so that another draw can be made of the same.

    Bernoulli          b = 1[z > 0],        z = logits - logit(u),     u uniform
    OneHotCategorical  b = one_hot(argmax z),  z = log p + gumbel(u)

The relaxed draw is sigmoid(z / temperature) or softmax(z / temperature). Given b, the
noise that led to it can be drawn again: `conditional` has z's distribution given b.

References: Jang, Gu and Poole 2017, "Categorical reparameterization with
Gumbel-softmax"; Maddison, Mnih and Teh 2017, "The concrete distribution"; Tucker et al.
2017, "REBAR", appendix C (conditional noise).
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg.distributions import Bernoulli, OneHotCategorical
from jaxpg.types import PRNGKey

__all__ = [
    "Relaxable",
    "conditional",
    "from_noise",
    "hard",
    "relaxed",
    "uniform_noise",
]

Relaxable: TypeAlias = Bernoulli | OneHotCategorical


def uniform_noise(key: PRNGKey, distribution: Relaxable) -> Float[Array, "..."]:
    """Uniforms in the open interval (0, 1), one for each logit."""
    logits = distribution.logits
    tiny = float(jnp.finfo(logits.dtype).eps)
    return jax.random.uniform(key, logits.shape, logits.dtype, tiny, 1.0 - tiny)


def from_noise(distribution: Relaxable, u: Array) -> Float[Array, "..."]:
    """z, whose sign or largest entry is the draw; differentiable in the logits."""
    if isinstance(distribution, Bernoulli):
        return distribution.logits - _logit(u)
    return jax.nn.log_softmax(distribution.logits) - jnp.log(-jnp.log(u))


def conditional(distribution: Relaxable, draw: Array, v: Array) -> Float[Array, "..."]:
    """z given the draw it led to, of fresh uniforms; differentiable in the logits."""
    if isinstance(distribution, Bernoulli):
        return _conditional_bit(distribution.logits, draw, v)
    log_probs, own = jax.nn.log_softmax(distribution.logits), draw > 0
    top = jnp.sum(jnp.where(own, -jnp.log(v), 0.0), axis=-1, keepdims=True)
    # Where own is set the other branch may overflow; it is masked before it is used.
    others = jnp.where(own, 0.0, -jnp.log(v) * jnp.exp(-log_probs))
    return jnp.where(own, -jnp.log(top), -jnp.log(others + top))


def hard(distribution: Relaxable, z: Array) -> Array:
    """The draw that z stands for, in the distribution's own type."""
    if isinstance(distribution, Bernoulli):
        return (z > 0).astype(jnp.int32)
    return jax.nn.one_hot(jnp.argmax(z, axis=-1), z.shape[-1], dtype=z.dtype)


def relaxed(distribution: Relaxable, z: Array, temperature: Any) -> Float[Array, "..."]:
    """The draw that z stands for, smoothed."""
    temperature = jnp.asarray(temperature, z.dtype)
    if isinstance(distribution, Bernoulli):
        return jax.nn.sigmoid(z / temperature)
    return jax.nn.softmax(z / temperature, axis=-1)


def _logit(u: Array) -> Array:
    return jnp.log(u) - jnp.log1p(-u)


def _conditional_bit(logits: Array, draw: Array, v: Array) -> Array:
    """u is uniform below sigmoid(logits) for a set bit, and above it for others."""
    log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    below = jnp.log(v) + log_p - jnp.log1p(-v * p)
    above = jnp.log(p + v * q) - log_q - jnp.log1p(-v)
    return logits - jnp.where(draw > 0, below, above)
