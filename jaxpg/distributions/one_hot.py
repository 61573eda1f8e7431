"""A categorical draw as a vector: for programs that add up what each choice is worth.

    p(a) = exp(logits . a) / sum_i exp(logits[i]),   a one of the unit vectors

A program written for the vector goes on to work when the draw is relaxed into the
simplex (`jaxpg.stochastic.relaxation`); one written for an integer cannot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import check_same_shape
from jaxpg.distributions.discrete import Categorical
from jaxpg.types import PRNGKey

__all__ = ["OneHotCategorical"]


class OneHotCategorical(NamedTuple):
    """One of A unit vectors, in the type of the logits.

    Attributes:
        logits: unnormalised log-probabilities [..., A]; -inf masks an action.

    >>> policy = OneHotCategorical(jnp.log(jnp.array([0.25, 0.75])))
    >>> round(float(jnp.exp(policy.log_prob(jnp.array([0.0, 1.0])))), 4)
    0.75
    """

    logits: Float[Array, "*B A"]

    def sample(self, key: PRNGKey) -> Float[Array, "*B A"]:
        """Draw a ~ p."""
        return self._vector(Categorical(self.logits).sample(key))

    def log_prob(self, action: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        """log p(action), in nats, of unit vectors."""
        check_same_shape(action=action, logits=self.logits)
        chosen = jnp.argmax(action, axis=-1).astype(jnp.int32)
        return Categorical(self.logits).log_prob(chosen)

    def entropy(self) -> Float[Array, "*B"]:
        """-Σ p log p, in nats, between 0 and log A."""
        return Categorical(self.logits).entropy()

    def kl(self, other: "OneHotCategorical") -> Float[Array, "*B"]:
        """Σ p (log p - log q), in nats."""
        return Categorical(self.logits).kl(Categorical(other.logits))

    def mode(self) -> Float[Array, "*B A"]:
        """The likeliest unit vector; the first of them if several are."""
        return self._vector(Categorical(self.logits).mode())

    def to_env(self, action: Float[Array, "*B A"]) -> Float[Array, "*B A"]:
        """The vector itself."""
        return action

    def _vector(self, index: Array) -> Float[Array, "*B A"]:
        number = self.logits.shape[-1]
        return jax.nn.one_hot(index, number, dtype=self.logits.dtype)
