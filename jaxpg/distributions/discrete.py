"""Distributions over finitely many actions: one integer, several, or bits.

    Categorical        p(a) = exp(logits[a]) / Σ_i exp(logits[i])
    MultiCategorical   p(a) = Π_k p_k(a[k])
    Bernoulli          p(a) = Π_k sigmoid(±logits[k])

A logit of -inf masks an action: it is never drawn, and it adds nothing to entropy, KL
or any first or second derivative of them. At least one logit must be finite. `kl` is
inf where `other` forbids what `self` may do.

Reference: Devroye (1986), Non-Uniform Random Variate Generation, III.2 (inversion).
"""

import functools
import itertools
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxpg._checks import check_same_shape
from jaxpg._unrolled import unrolled
from jaxpg.distributions.base import draw_dtype
from jaxpg.types import PRNGKey

__all__ = ["Bernoulli", "Categorical", "MultiCategorical"]


class Categorical(NamedTuple):
    """One of A actions: p(a) = exp(logits[a]) / Σ_i exp(logits[i]).

    Draws invert the cumulative distribution with one uniform u of at least float32:
    a = #{i : Σ_{j<=i} p_j <= u}. An action of probability zero is never drawn. Float32
    uniforms lie 2^-23 apart, so probabilities under about 1e-7 are at their resolution:
    such an action may be drawn up to 1e-7 too often, or never.

    Attributes:
        logits: unnormalised log-probabilities [..., A]; -inf masks an action.

    >>> policy = Categorical(jnp.log(jnp.array([0.25, 0.75])))
    >>> round(float(jnp.exp(policy.log_prob(jnp.array(1)))), 4)
    0.75
    """

    logits: Float[Array, "*B A"]

    def sample(self, key: PRNGKey) -> Int[Array, "*B"]:
        """Draw a ~ p, int32."""
        u = _uniform(key, self.logits.shape[:-1], self.logits.dtype)
        return _invert_cdf(self.logits, u)

    def log_prob(self, action: Integer[Array, "*B"]) -> Float[Array, "*B"]:
        """log p(action), in nats; -inf for an action outside 0 .. A - 1."""
        _check_action(action, self.logits.shape[:-1], "one integer per row of logits")
        return _select_log_prob(self.logits, action)

    def entropy(self) -> Float[Array, "*B"]:
        """-Σ p log p, in nats, between 0 and log A."""
        if self.logits.shape[-1] <= _MAX_COLUMNS:
            return _total(_entropy_term(x) for x in _log_prob_columns(self.logits))
        return _entropy(jax.nn.log_softmax(self.logits))

    def kl(self, other: "Categorical") -> Float[Array, "*B"]:
        """Σ p (log p - log q), in nats."""
        check_same_shape(**{"logits": self.logits, "other.logits": other.logits})
        return _kl(jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits))

    def mode(self) -> Int[Array, "*B"]:
        """The likeliest action; the first of them if several are."""
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def to_env(self, action: Integer[Array, "*B"]) -> Integer[Array, "*B"]:
        """The action itself."""
        return action


class MultiCategorical(NamedTuple):
    """K independent categoricals: p(a) = Π_k p_k(a[k]).

    Attributes:
        logits: K arrays [..., A_k], each as in `Categorical`.

    >>> policy = MultiCategorical((jnp.zeros(2), jnp.zeros(3)))
    >>> round(float(jnp.exp(policy.log_prob(jnp.array([1, 2])))), 4)
    0.1667
    """

    logits: tuple[Float[Array, "..."], ...]

    def sample(self, key: PRNGKey) -> Int[Array, "*B K"]:
        """Draw every component from its own uniform, int32."""
        parts = self._parts()
        shape = (*parts[0].logits.shape[:-1], len(parts))
        u = _uniform(key, shape, parts[0].logits.dtype)
        draws = [_invert_cdf(p.logits, u[..., k]) for k, p in enumerate(parts)]
        return jnp.stack(draws, axis=-1)

    def log_prob(self, action: Integer[Array, "*B K"]) -> Float[Array, "*B"]:
        """Σ_k log p_k(action[k]), in nats."""
        parts = self._parts()
        shape = (*parts[0].logits.shape[:-1], len(parts))
        _check_action(action, shape, "one integer per component on the last axis")
        return _total(p.log_prob(action[..., k]) for k, p in enumerate(parts))

    def entropy(self) -> Float[Array, "*B"]:
        """Σ_k of the components' entropies, in nats."""
        return _total(part.entropy() for part in self._parts())

    def kl(self, other: "MultiCategorical") -> Float[Array, "*B"]:
        """Σ_k of the components' divergences, in nats."""
        ours, theirs = self._parts(), other._parts()
        if len(ours) != len(theirs):
            raise ValueError(
                f"other has {len(theirs)} components, needs {len(ours)} as self has"
            )
        return _total(p.kl(q) for p, q in zip(ours, theirs, strict=True))

    def mode(self) -> Int[Array, "*B K"]:
        """The likeliest action of every component."""
        return jnp.stack([part.mode() for part in self._parts()], axis=-1)

    def to_env(self, action: Integer[Array, "*B K"]) -> Integer[Array, "*B K"]:
        """The action itself."""
        return action

    def _parts(self) -> list[Categorical]:
        batches = [logits.shape[:-1] for logits in self.logits]
        if len(set(batches)) != 1:
            raise ValueError(
                f"logits have leading shapes {batches}, need at least one component "
                "and the same leading shape in all; only the last axis may differ"
            )
        return [Categorical(logits) for logits in self.logits]


class Bernoulli(NamedTuple):
    """K independent bits: p(a) = Π_k sigmoid(logits[k] if a[k] else -logits[k]).

    Attributes:
        logits: log-odds of a one [..., K]; +inf and -inf fix a bit.

    >>> float(jnp.exp(Bernoulli(jnp.zeros(3)).log_prob(jnp.array([0, 1, 1]))))
    0.125
    """

    logits: Float[Array, "*B K"]

    def sample(self, key: PRNGKey) -> Int[Array, "*B K"]:
        """Draw every bit from its own uniform, int32 zeros and ones."""
        u = _uniform(key, self.logits.shape, self.logits.dtype)
        return (u < jax.nn.sigmoid(self.logits.astype(u.dtype))).astype(jnp.int32)

    def log_prob(
        self, action: Integer[Array, "*B K"] | Bool[Array, "*B K"]
    ) -> Float[Array, "*B"]:
        """Σ_k log p_k(action[k]), in nats."""
        _check_action(action, self.logits.shape, "one bit per logit")
        against = jnp.where(action.astype(bool), -self.logits, self.logits)
        return -jnp.sum(jax.nn.softplus(against), axis=-1)

    def entropy(self) -> Float[Array, "*B"]:
        """Σ_k of the bits' entropies, in nats, between 0 and K log 2."""
        return jnp.sum(_entropy(self._log_probs()), axis=-1)

    def kl(self, other: "Bernoulli") -> Float[Array, "*B"]:
        """Σ_k of the bits' divergences, in nats."""
        check_same_shape(**{"logits": self.logits, "other.logits": other.logits})
        return jnp.sum(_kl(self._log_probs(), other._log_probs()), axis=-1)

    def mode(self) -> Int[Array, "*B K"]:
        """The likelier value of every bit; zero where both are equally likely."""
        return (self.logits > 0).astype(jnp.int32)

    def to_env(
        self, action: Integer[Array, "*B K"] | Bool[Array, "*B K"]
    ) -> Integer[Array, "*B K"] | Bool[Array, "*B K"]:
        """The action itself."""
        return action

    def _log_probs(self) -> Float[Array, "*B K 2"]:
        both = [jax.nn.log_sigmoid(-self.logits), jax.nn.log_sigmoid(self.logits)]
        return jnp.stack(both, axis=-1)


# XLA's loops over a short last axis are slow on CPU; a chain over its columns is not.
# log_prob and its gradient at [65536, A] float32 on two CPU cores, in microseconds:
# A = 2: chain 120-210, 155-310; take_along_axis 660-780, 900-1180; one-hot sum 780, 760
# A = 6: chain 240-330, 480-520; take_along_axis 570-760, 1100;     one-hot sum 850, 760
# A = 18: the chain's gradient takes 12 ms, the others' 1.4-2.5 ms.
_MAX_COLUMNS = 8

# Draws have no gradient, so the chain stays ahead for longer: at [65536, 18] 1.0 ms,
# cumsum 10 ms, Gumbel noise 18-26 ms. Compile time is what grows with its length.
_MAX_RUNNING_SUM = 32


def _select_log_prob(
    logits: Float[Array, "*B A"], action: Integer[Array, "*B"]
) -> Float[Array, "*B"]:
    num_actions = logits.shape[-1]
    if num_actions <= _MAX_COLUMNS:
        columns = _log_prob_columns(logits)
        chosen = jnp.full_like(columns[0], -jnp.inf)
        for i, column in enumerate(columns):
            chosen = jnp.where(action == i, column, chosen)
        return chosen
    number = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hot = number == action.astype(jnp.int32)[..., None]
    # `where` and not a product, because 0 * -inf is NaN.
    log_prob = jnp.sum(jnp.where(hot, jax.nn.log_softmax(logits), 0.0), axis=-1)
    return jnp.where((action >= 0) & (action < num_actions), log_prob, -jnp.inf)


def _log_prob_columns(logits: Float[Array, "*B A"]) -> list[Float[Array, "*B"]]:
    """log p of each action: the same operations for whoever asks, so XLA makes one."""
    columns = [logits[..., i] for i in range(logits.shape[-1])]
    shift = functools.reduce(jnp.maximum, map(jax.lax.stop_gradient, columns))
    log_total = jnp.log(_total(jnp.exp(column - shift) for column in columns))
    return [column - shift - log_total for column in columns]


def _invert_cdf(
    logits: Float[Array, "*B A"], u: Float[Array, "*B"]
) -> Int[Array, "*B"]:
    """The action whose share of [0, 1) holds u, never one of probability zero.

    The largest weight is exp(0) = 1, so total >= 1 and u * total < total holds after
    rounding for every float u < 1.
    """
    logits = logits.astype(u.dtype)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    if logits.shape[-1] > _MAX_RUNNING_SUM:
        return _invert_long_cdf(weights, u)
    # A running sum repeats its value exactly where a weight is zero, hence no u falls
    # between the two. The last sum is never <= u * total and needs no comparison.
    columns = [weights[..., i] for i in range(logits.shape[-1])]
    *sums, total = itertools.accumulate(columns)
    passed = [(running <= u * total).astype(jnp.int32) for running in sums]
    return _total(passed) if passed else jnp.zeros(u.shape, jnp.int32)


def _invert_long_cdf(
    weights: Float[Array, "*B A"], u: Float[Array, "*B"]
) -> Int[Array, "*B"]:
    # jnp.cumsum adds in the order of a tree: over zero weights its sums may move by a
    # rounding, even backwards. So zero weights are taken out of the race by hand.
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    total = jnp.max(sums, axis=-1)
    return jnp.argmax(sums > (u * total)[..., None], axis=-1).astype(jnp.int32)


def _uniform(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Uniforms at the middle of their cells of [0, 1).

    JAX's own lie at the cells' left ends, so that u = 0 comes up once in 2^23 draws and
    would hand a first action of probability 1e-30 that much.
    """
    dtype = draw_dtype(dtype)
    left = jax.random.uniform(unrolled(key), shape, dtype)
    return left + 0.5 * float(jnp.finfo(dtype).eps)


def _entropy_term(log_prob: Float[Array, "*B"]) -> Float[Array, "*B"]:
    prob = jnp.exp(log_prob)
    return -prob * jnp.where(prob > 0, log_prob, 0.0)


def _entropy(log_probs: Float[Array, "*B A"]) -> Float[Array, "*B"]:
    probs = jnp.exp(log_probs)
    return -jnp.sum(probs * jnp.where(probs > 0, log_probs, 0.0), axis=-1)


def _kl(
    log_probs: Float[Array, "*B A"], other_log_probs: Float[Array, "*B A"]
) -> Float[Array, "*B"]:
    probs = jnp.exp(log_probs)
    # Each side is masked for itself: -inf - -inf is NaN even where nobody looks.
    ours = jnp.where(probs > 0, log_probs, 0.0)
    theirs = jnp.where(probs > 0, other_log_probs, 0.0)
    return jnp.sum(probs * (ours - theirs), axis=-1)


def _total(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def _check_action(action: Array, shape: tuple[int, ...], need: str) -> None:
    if action.shape != shape:
        raise ValueError(
            f"action has shape {action.shape}, needs {shape} = {need}; "
            "for more leading axes than the distribution has use jax.vmap"
        )
