"""What every distribution can do, and what all of them share."""

from typing import Any, Protocol, cast, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg.types import PRNGKey, PyTree

__all__ = ["Distribution", "draw_dtype", "entropy_of"]


@runtime_checkable
class Distribution(Protocol):
    """What every distribution over actions can do."""

    def sample(self, key: PRNGKey) -> PyTree:
        """Draw one action for each leading index; the key is consumed."""

    def log_prob(self, action: Any) -> Float[Array, "*B"]:
        """Log-probability or log-density of `action`, in nats."""

    def entropy(self) -> Float[Array, "*B"]:
        """-E[log p(action)], in nats."""

    def kl(self, other: Any) -> Float[Array, "*B"]:
        """KL(self || other), in nats; `other` is of the same class and shape."""

    def mode(self) -> PyTree:
        """The action for acting greedily."""

    def to_env(self, action: Any) -> PyTree:
        """What the environment receives for an action kept in a batch."""


def entropy_of(distribution: Distribution, key: PRNGKey) -> Float[Array, "*B"]:
    """The entropy of a distribution, exact where it has a closed form.

    -E[log p(a)], or the draw of it that `sampled_entropy(key)` makes.

    Args:
        distribution: any; the closed form is taken unless it has `sampled_entropy`.
        key: consumed by `sampled_entropy`; no other distribution looks at it.

    Returns:
        One number for each leading index, in nats.

    Bias: unbiased, and so is its gradient.

    >>> import jax
    >>> from jaxpg.distributions import Bernoulli, TanhGaussian
    >>> key, two = jax.random.key(0), jnp.zeros(2)
    >>> round(float(entropy_of(Bernoulli(two), key)), 4)  # 2 log 2
    1.3863
    >>> bool(jnp.isfinite(entropy_of(TanhGaussian(two, two), key)))
    True
    """
    sampled = getattr(distribution, "sampled_entropy", None)
    return cast(Array, distribution.entropy() if sampled is None else sampled(key))


def draw_dtype(dtype: Any) -> Any:
    """The type to draw random numbers in: `dtype`, and at least float32.

    Args:
        dtype: of the parameters.

    Returns:
        A type whose uniforms have 2^23 values or more; those of bfloat16 have 128.
    """
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
