"""The environment type that jaxpg owns, and the spaces that describe it.

An `Environment` is a record of pure functions for ONE copy of a world; rollouts vmap
them. It never resets itself: `step` answers with the true next observation, and the
rollout decides what follows an end. That is what keeps `terminated` and `truncated`
apart and the last observation alive (Gymnasium's 1.0 contract without auto-reset).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxpg._checks import check_positive
from jaxpg.types import PRNGKey, PyTree, StepOutput

__all__ = [
    "Box",
    "Discrete",
    "Environment",
    "Masked",
    "MaskedObs",
    "MultiBinary",
    "MultiDiscrete",
    "Space",
    "with_time_limit",
]


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The integers 0 .. n - 1."""

    n: int
    dtype: Any = jnp.int32

    def __post_init__(self) -> None:
        check_positive("n", self.n)

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def sample(self, key: PRNGKey) -> Array:
        """Draw uniformly."""
        return jax.random.randint(key, (), 0, self.n, self.dtype)

    def contains(self, x: Array) -> Bool[Array, ""]:
        """Whether `x` lies in the space."""
        return jnp.all((x >= 0) & (x < self.n))


@dataclasses.dataclass(frozen=True)
class MultiDiscrete:
    """Several integers at once; entry i runs over 0 .. nvec[i] - 1."""

    nvec: tuple[int, ...]
    dtype: Any = jnp.int32

    def __post_init__(self) -> None:
        for n in self.nvec:
            check_positive("nvec", n)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.nvec),)

    def sample(self, key: PRNGKey) -> Array:
        """Draw uniformly."""
        nvec = np.array(self.nvec, self.dtype)
        return jax.random.randint(key, self.shape, 0, nvec, self.dtype)

    def contains(self, x: Array) -> Bool[Array, ""]:
        """Whether `x` lies in the space."""
        return jnp.all((x >= 0) & (x < np.array(self.nvec, x.dtype)))


@dataclasses.dataclass(frozen=True)
class Box:
    """Arrays between two bounds; a bound may be infinite, a number or an array."""

    low: Any
    high: Any
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self._facts())

    def sample(self, key: PRNGKey) -> Array:
        """Draw uniformly between finite bounds, normally where a bound is infinite.

        Where one bound is finite, the normal is folded to its side.
        """
        low, high = self._bounds()
        if jnp.issubdtype(self.dtype, jnp.integer):
            integers = jax.random.randint(key, self.shape, low, high + 1)
            return integers.astype(self.dtype)
        huge = np.finfo(np.float32).max / 4
        left, right = low > -huge, high < huge
        width = np.where(left & right, high - low, 0.0)
        key_uniform, key_normal = jax.random.split(key)
        uniform = jax.random.uniform(key_uniform, self.shape) * _as_float(width)
        normal = jax.random.normal(key_normal, self.shape)
        above = _as_float(np.where(left, low, 0.0)) + jnp.abs(normal)
        below = _as_float(np.where(right, high, 0.0)) - jnp.abs(normal)
        free = jnp.where(left, above, jnp.where(right, below, normal))
        inside = _as_float(np.where(left & right, low, 0.0)) + uniform
        return jnp.where(left & right, inside, free).astype(self.dtype)

    def contains(self, x: Array) -> Bool[Array, ""]:
        """Whether `x` lies between the bounds."""
        low, high = (_as_float(bound) for bound in self._bounds())
        x = x.astype(low.dtype)
        return jnp.all((x >= low) & (x <= high))

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low = np.broadcast_to(np.asarray(self.low, np.float64), self.shape)
        high = np.broadcast_to(np.asarray(self.high, np.float64), self.shape)
        return low, high

    def _facts(self) -> tuple[object, ...]:
        # Array bounds are neither comparable nor hashable as the dataclass would do it.
        low, high = self._bounds()
        return (low.tobytes(), high.tobytes(), self.shape, np.dtype(self.dtype))


def _as_float(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class MultiBinary:
    """n bits."""

    n: int
    dtype: Any = jnp.int32

    def __post_init__(self) -> None:
        check_positive("n", self.n)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n,)

    def sample(self, key: PRNGKey) -> Array:
        """Draw every bit from a fair coin."""
        return jax.random.bernoulli(key, 0.5, self.shape).astype(self.dtype)

    def contains(self, x: Array) -> Bool[Array, ""]:
        """Whether `x` lies in the space."""
        return jnp.all((x == 0) | (x == 1))


class MaskedObs(NamedTuple):
    """An observation that says which actions are allowed now.

    Attributes:
        features: what there is to see.
        action_mask: whether an action may be taken, for every logit that a head has:
            [n] for `Discrete`, [sum(nvec)] for `MultiDiscrete`; at least one of each
            component must be.
    """

    features: PyTree
    action_mask: Bool[Array, "*B A"]


@dataclasses.dataclass(frozen=True)
class Masked:
    """Observations of `features` that carry a mask over `num_actions` logits."""

    features: "Space"
    num_actions: int
    dtype: Any = None

    def __post_init__(self) -> None:
        check_positive("num_actions", self.num_actions)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.features.shape

    def sample(self, key: PRNGKey) -> MaskedObs:
        """Draw features, with every action allowed."""
        return MaskedObs(self.features.sample(key), jnp.ones((self.num_actions,), bool))

    def contains(self, x: MaskedObs) -> Bool[Array, ""]:
        """Whether the features lie in their space and some action is allowed."""
        return self.features.contains(x.features) & jnp.any(x.action_mask)


Space = Discrete | MultiDiscrete | MultiBinary | Box | Masked


class Environment(NamedTuple):
    """A world as a record of pure functions, for one copy of it.

    Attributes:
        name: what logs and errors call it.
        reset: `reset(key) -> (state, obs)`.
        step: `step(key, state, action) -> (state, StepOutput)`; never resets.
        observation_space: where observations live.
        action_space: where actions live.
        max_steps: decisions after which an episode has ended for certain; None where
            nothing bounds it (then only segments can be rolled out).
        tells_truncation: whether `truncated` can be trusted. An environment that
            cannot tell a time limit from a true end says False here, and nothing
            bootstraps from it silently.
    """

    name: str
    reset: Callable[[PRNGKey], tuple[PyTree, PyTree]]
    step: Callable[[PRNGKey, PyTree, PyTree], tuple[PyTree, StepOutput]]
    observation_space: Space
    action_space: Space
    max_steps: int | None = None
    tells_truncation: bool = True


class TimedState(NamedTuple):
    """An environment's own state and the decisions taken so far."""

    inner: PyTree
    time: Array


def with_time_limit(env: Environment, max_steps: int) -> Environment:
    """Truncate episodes of `env` after `max_steps` decisions.

    Args:
        env: any environment; its own ends stay as they are.
        max_steps: decisions after which `truncated` is raised, at least 1.

    Returns:
        An environment whose `max_steps` is the smaller of both limits.

    Raises:
        ValueError: if `max_steps` is not a positive whole number.

    >>> from jaxpg.envs.probes import constant_reward
    >>> with_time_limit(constant_reward(), 5).max_steps
    1
    """
    check_positive("max_steps", max_steps)

    def reset(key: PRNGKey) -> tuple[TimedState, PyTree]:
        state, obs = env.reset(key)
        return TimedState(state, jnp.zeros((), jnp.int32)), obs

    def step(
        key: PRNGKey, state: TimedState, action: PyTree
    ) -> tuple[TimedState, StepOutput]:
        inner, output = env.step(key, state.inner, action)
        time = state.time + 1
        truncated = output.truncated | (time >= max_steps)
        return TimedState(inner, time), output._replace(truncated=truncated)

    limit = max_steps if env.max_steps is None else min(env.max_steps, max_steps)
    return env._replace(reset=reset, step=step, max_steps=limit)
