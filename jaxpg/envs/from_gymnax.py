"""gymnax's worlds as `Environment` records.

One decision of the adapter, with gymnax's own names:

    obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
    truncated = env.is_truncated(state, params)

`env.step` is never called: it resets by itself, which costs a reset per step and hides
the last observation. States are cast to the strong types that a step answers with, so
that a scan may carry them; rewards and floating observations have JAX's default float.

What the 26 worlds of gymnax 1.0 do, read from their sources:

* Ends. In all of them `terminated` comes from the task alone and the clock raises
  `truncated` alone, so `tells_truncation` is True. Pendulum, Freeway, DiscountingChain,
  PointRobot, Reacher, Swimmer, BernoulliBandit and GaussianBandit never terminate: a
  learner that bootstraps there values what the clock cut off. At the end of DeepSea
  both flags are raised; terminated wins.
* Bounds. Catch, DeepSea, MemoryChain, UmbrellaChain, SimpleBandit and MNISTBandit end
  long before `max_steps_in_episode`; `max_steps` is their true bound (9, 8, 6, 10, 1, 1
  by default).
* Actions out of the box. Pendulum, MountainCarContinuous and PointRobot clip the force,
  yet the reward of MountainCarContinuous charges, and PointRobot shows in its next
  observation, what was asked for. Reacher and Swimmer do not clip at all. Nor does this
  adapter: clipping belongs to the policy.
* Observations. FourRooms (integers, declared float) and Catch (floats, declared int)
  become floats. Four leave their declared box: MemoryChain (its context is -1 or 1, the
  box starts at 0), GaussianBandit (negative rewards and times), MetaMaze (it shows the
  last reward of 10, the box ends at 1), UmbrellaChain (a rounding below 0).
* Oddities. MemoryChain answers with the observation from before the step, so the first
  is seen twice. MetaMaze moves the agent away when it finds the goal and terminates
  only if it lands on it again. DiscountingChain is truncated where bsuite ends it.
  DeepSea's `step` carries metrics over resets; here they start anew.

Importing gymnax starts JAX's backend: `jax.distributed.initialize` must come before.

Reference: R. Lange, 2022, gymnax; M. Towers et al., 2024, Gymnasium (the two flags).
"""

import contextlib
import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpg.envs.base import Box, Discrete, Environment, Space
from jaxpg.types import PRNGKey, PyTree, StepOutput

__all__ = ["default_promotion", "from_gymnax", "import_gymnax"]


def from_gymnax(
    env: Any, env_params: Any = None, name: str | None = None
) -> Environment:
    """Adapt a gymnax environment (1.0 or later).

    Ported worlds of older gymnax may raise `terminated` at the time limit: then say so
    with `from_gymnax(env)._replace(tells_truncation=False)`.

    Args:
        env: an object of a subclass of gymnax's `Environment`, not a wrapper.
        env_params: its parameters; None for `env.default_params`.
        name: what logs call it; None for `env.name`.

    Returns:
        An environment without auto-reset. Its `max_steps` is None where `env` decides
        by itself what truncates it.

    Raises:
        TypeError: if `env` is not a gymnax environment object.
        ValueError: if its spaces or its state cannot be represented.

    >>> from gymnax.environments import CartPole
    >>> from_gymnax(CartPole()).max_steps
    500
    """
    _check_kind(env)
    params = env.default_params if env_params is None else env_params
    name = env.name if name is None else name
    with default_promotion():
        actions = _space(env.action_space(params), f"action space of {name}")
        layout, obs_type = _layout(env, params, actions, name)
        observations = _observation_space(env, params, obs_type, name)

    def reset(key: PRNGKey) -> tuple[PyTree, Array]:
        with default_promotion():
            obs, state = env.reset_env(key, params)
            return _strong(state, layout), jnp.asarray(obs, observations.dtype)

    def step(key: PRNGKey, state: PyTree, action: Array) -> tuple[PyTree, StepOutput]:
        with default_promotion():
            action = _as_action(action, actions, name)
            obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
            truncated = env.is_truncated(state, params)
            output = StepOutput(
                obs=jnp.asarray(obs, observations.dtype),
                reward=jnp.asarray(reward, jnp.result_type(float)).reshape(()),
                terminated=jnp.asarray(terminated, bool).reshape(()),
                truncated=jnp.asarray(truncated, bool).reshape(()),
            )
            return _strong(state, layout), output

    return Environment(
        name, reset, step, observations, actions, _max_steps(env, params, name)
    )


def import_gymnax() -> types.ModuleType:
    """Import gymnax without what it needs only to draw.

    Five of its modules import pyplot and seaborn at their top, and with them pandas
    and scipy: three quarters of its start-up. They get stand-ins that import the real
    module when first used; `sys.modules` is left as if nobody had asked for it yet.
    """
    with _deferred("matplotlib.pyplot", "seaborn"), default_promotion():
        return importlib.import_module("gymnax")


@contextlib.contextmanager
def default_promotion() -> Iterator[None]:
    """Run foreign code by JAX's default promotion rules, however strict ours are."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


class _Deferred(types.ModuleType):
    """Stands for a module and imports it at the first use."""

    def __getattr__(self, attribute: str) -> Any:
        # Another thread may use the stand-in while it still holds the name.
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


@contextlib.contextmanager
def _deferred(*names: str) -> Iterator[None]:
    """Give stand-ins to whoever imports `names` inside; loaded ones stay."""
    stand_ins = {name: _Deferred(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


def _check_kind(env: Any) -> None:
    base = import_gymnax().environments.environment.Environment
    if not isinstance(env, base):
        raise TypeError(
            f"env is {env!r}, needs an object of a subclass of gymnax's Environment; "
            "pass the first of the two that gymnax.make returns, without wrappers"
        )


def _space(space: Any, where: str) -> Space:
    """Our counterpart of a gymnax space."""
    spaces = import_gymnax().environments.spaces
    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n))
    if isinstance(space, spaces.Box):
        low, high = (
            np.asarray(bound, np.float32) if np.ndim(bound) else float(bound)
            for bound in (space.low, space.high)
        )
        return Box(low, high, tuple(space.shape), jnp.dtype(space.dtype))
    raise ValueError(f"{where} is {space!r}, needs Discrete or Box; flatten it first")


def _observation_space(env: Any, params: Any, obs_type: Any, name: str) -> Space:
    """The declared space, with floats where the declaration or the world has them."""
    where = f"observation space of {name}"
    space = _space(env.observation_space(params), where)
    if not hasattr(obs_type, "shape") or obs_type.shape != space.shape:
        raise ValueError(
            f"{where} has shape {space.shape}, but observations are {obs_type}; "
            "they must agree"
        )
    if not isinstance(space, Box):
        return space
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in (space, obs_type)]
    dtype = jnp.result_type(float) if any(floating) else space.dtype
    return Box(space.low, space.high, space.shape, jnp.dtype(dtype))


def _layout(env: Any, params: Any, actions: Space, name: str) -> tuple[PyTree, Any]:
    """Shapes and dtypes of the state and the observation that a step answers with."""

    def step(key: PRNGKey, state: PyTree, action: Array) -> tuple[PyTree, Any]:
        obs, state, *_ = env.step_env(key, state, action, params)
        return state, obs

    key = jax.random.key(0)
    action = jax.ShapeDtypeStruct(actions.shape, actions.dtype)
    _, start = jax.eval_shape(lambda key: env.reset_env(key, params), key)
    state, obs = jax.eval_shape(step, key, start, action)
    after, _ = jax.eval_shape(step, key, state, action)
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (start, state)]
    if shapes[0] != shapes[1] or not _same_types(state, after):
        raise ValueError(
            f"the state of {name} changes its shapes or dtypes from step to step, "
            "needs fixed ones to be scanned; mend reset_env and step_env"
        )
    return state, obs


def _same_types(one: PyTree, other: PyTree) -> bool:
    def types_of(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

    return types_of(one) == types_of(other)


def _strong(state: PyTree, layout: PyTree) -> PyTree:
    """Cast Python numbers and weak types to the dtypes of `layout`; keys stay."""

    def cast(x: Any, like: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return x
        return jnp.asarray(x, like.dtype)

    return jax.tree.map(cast, state, layout)


def _as_action(action: Any, space: Space, name: str) -> Array:
    action = jnp.asarray(action)
    lossy = jnp.issubdtype(action.dtype, jnp.inexact) and isinstance(space, Discrete)
    if action.shape != space.shape or lossy:
        raise ValueError(
            f"action has shape {action.shape} and dtype {action.dtype}, {name} needs "
            f"shape {space.shape} and dtype {jnp.dtype(space.dtype)}; "
            "vmap over a batch"
        )
    return action.astype(space.dtype)


# Worlds that end by themselves earlier than their time limit, by class.
_OWN_BOUNDS: dict[str, Callable[[Any, Any], int]] = {
    "Catch": lambda env, params: env.rows - 1,
    "DeepSea": lambda env, params: env.size,
    "MemoryChain": lambda env, params: params.memory_length + 1,
    "UmbrellaChain": lambda env, params: params.chain_length,
    "SimpleBandit": lambda env, params: 1,
    "MNISTBandit": lambda env, params: 1,
}


def _max_steps(env: Any, params: Any, name: str) -> int | None:
    """After how many decisions an episode has ended for certain."""
    base = import_gymnax().environments.environment.Environment
    limit = getattr(params, "max_steps_in_episode", None)
    if limit is None or type(env).is_truncated is not base.is_truncated:
        return None
    if not limit >= 1:
        raise ValueError(
            f"max_steps_in_episode of {name} is {limit!r}, needs at least 1"
        )
    limit = math.ceil(limit)
    if type(env).__module__.startswith("gymnax."):
        own = _OWN_BOUNDS.get(type(env).__name__, lambda *_: limit)(env, params)
        limit = min(limit, own) if own >= 1 else limit
    return limit
