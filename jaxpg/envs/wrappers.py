"""Wrappers of observations: worlds made partially observed, or given a short memory.

    map_observations         obs' = function(obs)
    hide_components          obs' = obs without some of its components
    add_observation_noise    obs' = obs + std * N(0, 1), drawn anew at every decision
    stack_frames             obs'[t] = obs[t-n+1], ..., obs[t] side by side

Each takes an environment and answers with one, so they nest in any order, within and
around `with_time_limit`. Only what the policy sees changes: states, rewards, ends,
`max_steps` and `tells_truncation` are those of the world within, and the true last
observation of an episode is wrapped like any other. The name stays too; give another
with `env._replace(name=...)` where both are logged.

What is hidden makes a fully observed world a POMDP: without velocities CartPole needs
memory, and two frames bring them back.

Reference: D. Wierstra et al., 2007, Solving deep memory POMDPs with recurrent policy
gradients (CartPole without velocities); V. Mnih et al., 2015, Human-level control
through deep reinforcement learning (stacked frames).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxpg._checks import check_positive, is_concrete
from jaxpg.envs.base import Box, Environment, Space
from jaxpg.types import PRNGKey, PyTree, StepOutput

__all__ = [
    "add_observation_noise",
    "hide_components",
    "map_observations",
    "stack_frames",
]


def map_observations(
    env: Environment, function: Callable[[PyTree], PyTree], space: Space
) -> Environment:
    """Show the policy `function(obs)` in place of `obs`.

    Keys pass unchanged, so equal keys give the same episodes as without the wrapper.

    Args:
        env: any environment.
        function: a pure function of one observation.
        space: where its answers live.

    Returns:
        An environment that differs in its observations alone.

    Raises:
        ValueError: if the answer's shape, dtype or structure is not that of `space`.

    >>> from jaxpg.envs.probes import constant_reward
    >>> env = map_observations(constant_reward(), lambda obs: obs[0], Box(-1, 1, ()))
    >>> env.reset(jax.random.key(0))[1].shape
    ()
    """
    _check_answer(env, function, space)

    def reset(key: PRNGKey) -> tuple[PyTree, PyTree]:
        state, obs = env.reset(key)
        return state, function(obs)

    def step(key: PRNGKey, state: PyTree, action: PyTree) -> tuple[PyTree, StepOutput]:
        state, output = env.step(key, state, action)
        return state, output._replace(obs=function(output.obs))

    return env._replace(reset=reset, step=step, observation_space=space)


def hide_components(env: Environment, hidden: Sequence[int]) -> Environment:
    """Remove components of a flat observation.

    Args:
        env: its observations are a `Box` with shape (D,).
        hidden: which of the components 0 .. D - 1 to remove; not all of them.

    Returns:
        An environment whose observations are shorter, in the same order.

    Raises:
        ValueError: if the space is not a flat `Box`, an index is not one of its
            components, or none would be left.

    >>> from jaxpg.envs import make
    >>> hide_components(make("CartPole-v1"), (1, 3)).observation_space.shape
    (2,)
    """
    space = _box(env, "shape (D,)", lambda space: len(space.shape) == 1)
    size = space.shape[0]
    _check_hidden(hidden, size)
    kept = np.array([i for i in range(size) if i not in hidden])
    return map_observations(
        env, lambda obs: obs[kept], _map_box(space, lambda x: x[kept])
    )


def add_observation_noise(
    env: Environment, std: ArrayLike | Sequence[float]
) -> Environment:
    """Add normal noise to what is seen, drawn anew at every decision:

        obs'[t] = obs[t] + std * noise[t],   noise[t] ~ N(0, I)

    The noise never enters the state. Every call splits its key into the world's and the
    noise's: equal keys give equal noise, and other episodes than without the wrapper.

    Args:
        env: its observations are a `Box` of floats.
        std: standard deviation in the observation's units, at least 0: a number, or one
            per component in the shape of the observation. It may be traced.

    Returns:
        An environment whose observations are unbounded.

    Raises:
        ValueError: if the space is no `Box` of floats, the shape of `std` does not fit,
            or an entry is negative, infinite or NaN.

    >>> from jaxpg.envs.probes import constant_reward
    >>> env = add_observation_noise(constant_reward(), 0.1)
    >>> bool(env.reset(jax.random.key(0))[1] == 0.0)
    False
    """
    floats = "a floating dtype"
    space = _box(env, floats, lambda space: jnp.issubdtype(space.dtype, jnp.floating))
    _check_std(std, space.shape)

    def disturb(key: PRNGKey, obs: Array) -> Array:
        noise = jax.random.normal(key, obs.shape, obs.dtype)
        return obs + jnp.asarray(std, obs.dtype) * noise

    # Split, not fold_in: fold_in(key, i) is the child that the world's own split of
    # the same key may give it.
    def reset(key: PRNGKey) -> tuple[PyTree, Array]:
        key_env, key_noise = jax.random.split(key)
        state, obs = env.reset(key_env)
        return state, disturb(key_noise, obs)

    def step(key: PRNGKey, state: PyTree, action: PyTree) -> tuple[PyTree, StepOutput]:
        key_env, key_noise = jax.random.split(key)
        state, output = env.step(key_env, state, action)
        return state, output._replace(obs=disturb(key_noise, output.obs))

    unbounded = Box(-np.inf, np.inf, space.shape, space.dtype)
    return env._replace(reset=reset, step=step, observation_space=unbounded)


class StackedState(NamedTuple):
    """An environment's own state and what was seen last.

    Attributes:
        inner: the state of the world within.
        frames: the last observations on the last axis, the newest at the end.
    """

    inner: PyTree
    frames: Array


def stack_frames(env: Environment, num_frames: int) -> Environment:
    """Show the last observations side by side, joined along the last axis.

    Flat observations [D] become [n * D], images [H, W, C] become [H, W, n * C], the
    oldest first. An episode begins with its first observation repeated n times.

    Args:
        env: its observations are a `Box` of rank one or more.
        num_frames: n, how many observations are seen at once, at least 1.

    Returns:
        An environment whose state holds the frames.

    Raises:
        ValueError: if `num_frames` is not a positive whole number or the space is not a
            `Box` of rank one or more.

    >>> from jaxpg.envs.probes import delayed_reward
    >>> env = stack_frames(delayed_reward(), 3)
    >>> state, _ = env.reset(jax.random.key(0))
    >>> env.step(jax.random.key(1), state, jnp.array(0))[1].obs.tolist()
    [0.0, 0.0, 1.0]
    """
    check_positive("num_frames", num_frames)
    space = _box(env, "rank one or more", lambda space: len(space.shape) >= 1)
    width = space.shape[-1]

    def reset(key: PRNGKey) -> tuple[StackedState, Array]:
        inner, obs = env.reset(key)
        frames = jnp.concatenate([obs] * num_frames, axis=-1)
        return StackedState(inner, frames), frames

    def step(
        key: PRNGKey, state: StackedState, action: PyTree
    ) -> tuple[StackedState, StepOutput]:
        inner, output = env.step(key, state.inner, action)
        frames = jnp.concatenate([state.frames[..., width:], output.obs], axis=-1)
        return StackedState(inner, frames), output._replace(obs=frames)

    stacked = _map_box(space, lambda x: np.concatenate([x] * num_frames, axis=-1))
    return env._replace(reset=reset, step=step, observation_space=stacked)


def _box(env: Environment, need: str, fits: Callable[[Box], bool]) -> Box:
    """The observation space, if it is a `Box` that fits."""
    space = env.observation_space
    if isinstance(space, Box) and fits(space):
        return space
    raise ValueError(
        f"observation space of {env.name} is {space!r}, needs a Box with {need}; "
        "bring it to that with map_observations"
    )


def _map_box(box: Box, function: Callable[[np.ndarray], np.ndarray]) -> Box:
    """The box whose bounds are those of `box`, rearranged by `function`."""
    low, high = (
        function(np.broadcast_to(bound, box.shape)) for bound in (box.low, box.high)
    )
    return Box(low, high, low.shape, box.dtype)


def _check_answer(
    env: Environment, function: Callable[[PyTree], PyTree], space: Space
) -> None:
    def types(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)

    key = jax.random.key(0)
    came = types(jax.eval_shape(lambda key: function(env.reset(key)[1]), key))
    needed = types(jax.eval_shape(space.sample, key))
    if came != needed:
        raise ValueError(
            f"function makes {came} of an observation of {env.name}, needs {needed}, "
            f"as space says; mend one of them"
        )


def _check_hidden(hidden: Sequence[int], size: int) -> None:
    for index in hidden:
        whole = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
        if not whole or not 0 <= index < size:
            raise ValueError(
                f"hidden has the entry {index!r}, needs components from 0 to {size - 1}"
                "; count from the front"
            )
    if len(set(hidden)) == size:
        raise ValueError(
            f"hidden is {tuple(hidden)}, which is all {size} components; keep at least "
            "one"
        )


def _check_std(std: ArrayLike | Sequence[float], shape: tuple[int, ...]) -> None:
    if np.shape(std) not in ((), shape):
        raise ValueError(
            f"std has shape {np.shape(std)}, needs a number or one per component, "
            f"shape {shape}"
        )
    if is_concrete(std) and not np.all((np.asarray(std) >= 0) & np.isfinite(std)):
        raise ValueError(f"std is {std!r}, needs finite numbers of at least 0")
