"""Distributions over real actions: normal, squashed into a box, or driven by features.

    DiagonalGaussian         a = mean + std * noise
    TanhGaussian             a = the same normal, squashed by tanh between two bounds
    StateDependentGaussian   a = mean + features @ (std * W), W one draw for all states

The last two are normals underneath: they hand their densities, entropies and
divergences to a `DiagonalGaussian`, plus what squashing adds.

References: Haarnoja et al. (2018), Soft Actor-Critic, appendix C (the tanh correction);
Rückstieß, Felder and Schmidhuber (2008), State-dependent exploration for policy
gradient methods; Raffin, Kober and Stulp (2022), Smooth exploration for robotic
reinforcement learning.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxpg._checks import check_same_shape
from jaxpg._unrolled import unrolled
from jaxpg.distributions.base import draw_dtype
from jaxpg.types import PRNGKey

__all__ = ["DiagonalGaussian", "StateDependentGaussian", "TanhGaussian"]


class DiagonalGaussian(NamedTuple):
    """D independent normals: a = mean + exp(log_std) * noise, noise ~ N(0, I).

    Attributes:
        mean: [..., D].
        log_std: logarithm of the standard deviation, of the mean's shape.

    >>> policy = DiagonalGaussian(jnp.zeros(2), jnp.zeros(2))
    >>> round(float(policy.log_prob(jnp.zeros(2))), 4)  # -log(2 pi)
    -1.8379
    """

    mean: Float[Array, "*B D"]
    log_std: Float[Array, "*B D"]

    def sample(self, key: PRNGKey) -> Float[Array, "*B D"]:
        """Draw an action, differentiable in the parameters (reparametrised)."""
        check_same_shape(mean=self.mean, log_std=self.log_std)
        dtype = draw_dtype(self.mean.dtype)
        noise = jax.random.normal(unrolled(key), self.mean.shape, dtype)
        return self.mean + jnp.exp(self.log_std) * noise.astype(self.mean.dtype)

    def log_prob(self, action: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """-Σ_d (z² / 2 + log_std + log(2π) / 2), z = (action - mean) / std; nats."""
        check_same_shape(mean=self.mean, log_std=self.log_std, action=action)
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return -jnp.sum(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi), -1)

    def entropy(self) -> Float[Array, "*B"]:
        """Σ_d (log_std + log(2πe) / 2), in nats; may be negative."""
        check_same_shape(mean=self.mean, log_std=self.log_std)
        return jnp.sum(self.log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def kl(self, other: "DiagonalGaussian") -> Float[Array, "*B"]:
        """Σ_d (r² - 1 - log r² + z²) / 2, r = std ratio, z = mean gap / other's std."""
        check_same_shape(
            **{"mean": self.mean, "log_std": self.log_std},
            **{"other.mean": other.mean, "other.log_std": other.log_std},
        )
        log_ratio = 2 * (self.log_std - other.log_std)
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        # expm1, because near equality exp(x) - 1 loses every digit of x.
        return 0.5 * jnp.sum(jnp.expm1(log_ratio) - log_ratio + z**2, axis=-1)

    def mode(self) -> Float[Array, "*B D"]:
        """The mean."""
        return self.mean

    def to_env(self, action: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The action itself."""
        return action


class TanhGaussian(NamedTuple):
    """A normal squashed into a box: a = low + (high - low) (tanh(pre) + 1) / 2.

    Batches keep the PRE-TANH value `pre`, because tanh cannot be inverted where it
    saturates: `sample`, `mode` and `log_prob` speak of it, and only `to_env` squashes.

    Attributes:
        mean: of `pre`, [..., D].
        log_std: of `pre`, of the mean's shape.
        low: finite lower bound: a number, one per distribution [...], or [..., D].
        high: finite upper bound, above `low`; shapes as for `low`.

    >>> policy = TanhGaussian(jnp.zeros(1), jnp.zeros(1), low=0.0, high=4.0)
    >>> policy.to_env(policy.mode())
    Array([2.], dtype=float32)
    """

    mean: Float[Array, "*B D"]
    log_std: Float[Array, "*B D"]
    low: ArrayLike = -1.0
    high: ArrayLike = 1.0

    def sample(self, key: PRNGKey) -> Float[Array, "*B D"]:
        """Draw `pre`, differentiable in the parameters (reparametrised)."""
        return self._base().sample(key)

    def log_prob(self, action: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Log-density of the SQUASHED action at the pre-tanh `action`, in nats.

        log N(pre) - Σ_d log |d squashed / d pre|; finite wherever `pre` is.
        """
        return self._base().log_prob(action) - self._log_det(action)

    def entropy(self) -> Float[Array, "*B"]:
        """Refused: the squashed normal has no closed entropy.

        Raises:
            ValueError: always; `sampled_entropy` is the cure.
        """
        raise ValueError(
            "TanhGaussian has no closed entropy, needs a sample of it; call "
            "sampled_entropy(key), or use DiagonalGaussian and clip in the environment"
        )

    def sampled_entropy(self, key: PRNGKey) -> Float[Array, "*B"]:
        """The base's exact entropy plus log |d squashed / d pre| at one draw, in nats.

        Bias: unbiased, and so is its gradient (the draw is reparametrised).
        """
        return self._base().entropy() + self._log_det(self.sample(key))

    def kl(self, other: "TanhGaussian") -> Float[Array, "*B"]:
        """KL of the two normals, in nats; both must have the same bounds.

        Squashing is one bijection applied to both, its Jacobian cancels in p / q, and
        so KL does not change.
        """
        return self._base().kl(other._base())

    def mode(self) -> Float[Array, "*B D"]:
        """The mean of `pre`; `to_env` makes it the median, not the density's mode."""
        return self.mean

    def to_env(self, action: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Squash a pre-tanh action into [low, high]."""
        check_same_shape(mean=self.mean, action=action)
        low, high = self._bounds()
        # Rounding may step over a bound by one unit in the last place: clip.
        return jnp.clip(low + (high - low) * (0.5 + 0.5 * jnp.tanh(action)), low, high)

    def _base(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.mean, self.log_std)

    def _log_det(self, pre: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        low, high = self._bounds()
        # 1 - tanh² underflows to 0 from |pre| = 9 on; this form of its log never does.
        slope = 2 * (math.log(2) - pre - jax.nn.softplus(-2 * pre))
        return jnp.sum(jnp.log(0.5 * (high - low)) + slope, axis=-1)

    def _bounds(self) -> tuple[Array, Array]:
        static = (int, float, np.ndarray, np.generic)
        if isinstance(self.low, static) and isinstance(self.high, static):
            width = np.subtract(self.high, self.low, dtype=np.float64)
            if not np.all((width > 0) & np.isfinite(width)):
                raise ValueError(
                    f"low is {self.low!r} and high is {self.high!r}, need finite "
                    "bounds with low < high; without bounds use DiagonalGaussian"
                )
        return _fit("low", self.low, self.mean), _fit("high", self.high, self.mean)


class StateDependentGaussian(NamedTuple):
    """Noise that is a random function of the state: a = mean + features @ (std * W).

    W ~ N(0, I) has one number for every feature and dimension. One key draws one W,
    whatever the features: decisions that share a key explore by one smooth function of
    the state instead of trembling. Seen alone, each action is normal, with

        std[d]² = Σ_f features[f]² exp(2 log_std[f, d]) + 1e-6

    whose floor is drawn too (from W's last row), so that the density is exactly the one
    that `sample` draws from, also where all features vanish.

    Attributes:
        mean: [..., D].
        features: what the noise depends on, [..., F].
        log_std: logarithm of the scale of W, [..., F, D].

    >>> features, log_std = jnp.array([3.0, 4.0]), jnp.zeros((2, 1))
    >>> policy = StateDependentGaussian(jnp.zeros(1), features, log_std)
    >>> round(float(jnp.exp(policy._base().log_std)[0]), 4)
    5.0
    """

    mean: Float[Array, "*B D"]
    features: Float[Array, "*B F"]
    log_std: Float[Array, "*B F D"]

    def sample(self, key: PRNGKey) -> Float[Array, "*B D"]:
        """Draw an action, differentiable in the parameters (reparametrised)."""
        self._check()
        *batch, rows, columns = self.log_std.shape
        dtype = self.mean.dtype
        shape = *batch, rows + 1, columns
        noise = jax.random.normal(unrolled(key), shape, draw_dtype(dtype)).astype(dtype)
        weights = jnp.exp(self.log_std) * noise[..., :-1, :]
        # A sum and not a matmul, which accelerators may round to fewer digits.
        push = jnp.sum(self.features[..., None] * weights, axis=-2)
        return self.mean + push + _FLOOR * noise[..., -1, :]

    def log_prob(self, action: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Log-density of a normal with the standard deviation above, in nats."""
        return self._base().log_prob(action)

    def entropy(self) -> Float[Array, "*B"]:
        """Σ_d (log std[d] + log(2πe) / 2), in nats; may be negative."""
        return self._base().entropy()

    def kl(self, other: "StateDependentGaussian") -> Float[Array, "*B"]:
        """KL of the two normals over one action, in nats."""
        return self._base().kl(other._base())

    def mode(self) -> Float[Array, "*B D"]:
        """The mean."""
        return self.mean

    def to_env(self, action: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The action itself."""
        return action

    def _base(self) -> DiagonalGaussian:
        self._check()
        parts = (self.features**2)[..., None] * jnp.exp(2 * self.log_std)
        variance = jnp.sum(parts, axis=-2) + _FLOOR**2
        return DiagonalGaussian(self.mean, 0.5 * jnp.log(variance))

    def _check(self) -> None:
        batch, size = self.mean.shape[:-1], self.mean.shape[-1]
        need = (*batch, self.features.shape[-1], size)
        if self.features.shape[:-1] != batch or self.log_std.shape != need:
            raise ValueError(
                f"features have shape {self.features.shape} and log_std has "
                f"{self.log_std.shape}, need (*B, F) and (*B, F, D) beside a mean of "
                f"shape {self.mean.shape} = (*B, D); broadcast or vmap them"
            )


# Below this standard deviation a density is as good as a spike.
_FLOOR = 1e-3


def _fit(name: str, bound: ArrayLike, mean: Float[Array, "*B D"]) -> Array:
    """Give a bound the mean's dtype and a rank that combines with the mean's."""
    bound = jnp.asarray(bound).astype(mean.dtype)
    if bound.ndim == 0 or bound.shape == mean.shape:
        return bound
    if bound.shape == mean.shape[:-1]:  # a number that vmap or scan has stacked
        return bound[..., None]
    raise ValueError(
        f"{name} has shape {bound.shape}, needs (), {mean.shape[:-1]} or {mean.shape} "
        f"beside a mean of shape {mean.shape}; use jnp.broadcast_to({name}, mean.shape)"
    )
