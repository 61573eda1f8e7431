"""Probe worlds: environments so small that each can fail for one reason only.

Every optimal value is known by hand, so a wrong one names the broken part. Read them in
this order; d is the discount and V the value of the best policy:

    world                      V(first obs)       if it fails, suspect
    constant_reward            1                  value loss, its optimiser
    obs_dependent_reward       obs                the network sees no observations
    delayed_reward             d                  returns and discounting
    action_dependent_reward    1                  advantages, the policy gradient
    obs_and_action_reward      1                  rows mixed up between obs and action
    endless_reward             1 / (1 - d)        no bootstrap at a truncation
    remember_first             d^(num_steps - 1)  memory, its reset and its unroll
    matching_number            0                  the continuous policy

Observations have shape (1,) and, save in `matching_number`, there are two actions.

Reference: A. Jones, 2021, Debugging RL, without the agonizing pain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_positive
from jaxpg.envs.base import Box, Discrete, Environment, Space, with_time_limit
from jaxpg.types import PRNGKey, StepOutput

__all__ = [
    "PROBES",
    "action_dependent_reward",
    "constant_reward",
    "delayed_reward",
    "endless_reward",
    "matching_number",
    "obs_and_action_reward",
    "obs_dependent_reward",
    "remember_first",
]

Obs = Float[Array, "1"]
Reward = Float[Array, ""]


def constant_reward() -> Environment:
    """One decision, obs 0, reward 1 whatever the action."""
    return _one_decision(
        "Probe-ConstantReward-v0", _zero, lambda obs, action: jnp.ones(())
    )


def obs_dependent_reward() -> Environment:
    """One decision, obs -1 or 1 by a fair coin, reward = obs whatever the action."""
    return _one_decision(
        "Probe-ObsDependentReward-v0", _sign, lambda obs, action: obs[0]
    )


def action_dependent_reward() -> Environment:
    """One decision, obs 0; action 1 earns 1, action 0 costs 1."""
    return _one_decision(
        "Probe-ActionDependentReward-v0",
        _zero,
        lambda obs, action: _as_sign(action),
    )


def obs_and_action_reward() -> Environment:
    """One decision, obs -1 or 1; action 0 fits -1 and 1 fits 1: reward 1, else -1."""
    return _one_decision(
        "Probe-ObsAndActionReward-v0",
        _sign,
        lambda obs, action: obs[0] * _as_sign(action),
    )


def matching_number() -> Environment:
    """One decision, obs 0, a number in [-1, 1]: reward = -(action - 0.5)^2.

    The action is not clipped: a Gaussian policy is paid for what it drew.
    """
    return _one_decision(
        "Probe-MatchingNumber-v0",
        _zero,
        lambda obs, action: -((action[0] - 0.5) ** 2),
        Box(-1.0, 1.0, (1,), jnp.result_type(float)),
    )


def delayed_reward() -> Environment:
    """Two decisions, obs 0 and then 1; reward 1 for the second whatever the actions."""

    def reset(key: PRNGKey) -> tuple[Int[Array, ""], Obs]:
        return jnp.zeros((), jnp.int32), jnp.zeros((1,))

    def step(
        key: PRNGKey, state: Int[Array, ""], action: Array
    ) -> tuple[Int[Array, ""], StepOutput]:
        late = state >= 1
        output = StepOutput(
            obs=jnp.ones((1,)),
            reward=late.astype(jnp.result_type(float)),
            terminated=late,
            truncated=jnp.zeros((), bool),
        )
        return state + 1, output

    return Environment(
        "Probe-DelayedReward-v0", reset, step, _signs(), Discrete(2), max_steps=2
    )


def endless_reward(max_steps: int = 10) -> Environment:
    """Obs 0 and reward 1 for ever; only a time limit stops it.

    The observation never changes, so the value is the same everywhere: 1 / (1 - d) if
    truncations are bootstrapped, at most (1 - d^max_steps) / (1 - d) if not.

    Args:
        max_steps: decisions after which `truncated` is raised, at least 1.

    Returns:
        An environment that never terminates.

    Raises:
        ValueError: if `max_steps` is not a positive whole number.

    >>> endless_reward(3).max_steps
    3
    """

    def reset(key: PRNGKey) -> tuple[tuple[()], Obs]:
        return (), jnp.zeros((1,))

    def step(
        key: PRNGKey, state: tuple[()], action: Array
    ) -> tuple[tuple[()], StepOutput]:
        no = jnp.zeros((), bool)
        return state, StepOutput(jnp.zeros((1,)), jnp.ones(()), no, no)

    env = Environment("Probe-EndlessReward-v0", reset, step, _signs(), Discrete(2))
    return with_time_limit(env, max_steps)


class CueState(NamedTuple):
    """What the first observation said, and the decisions taken since."""

    cue: Obs
    time: Int[Array, ""]


def remember_first(num_steps: int = 4) -> Environment:
    """Obs -1 or 1 first, then 0; the last action earns 1 if it fits the first obs.

    Action 0 fits -1 and action 1 fits 1; the wrong one costs 1, earlier ones nothing.
    Without memory nothing beats a mean reward of 0 (from two steps on).

    Args:
        num_steps: decisions in an episode, at least 1.

    Returns:
        An environment that terminates after `num_steps` decisions.

    Raises:
        ValueError: if `num_steps` is not a positive whole number.

    >>> remember_first(6).max_steps
    6
    """
    check_positive("num_steps", num_steps)

    def reset(key: PRNGKey) -> tuple[CueState, Obs]:
        cue = _sign(key)
        return CueState(cue, jnp.zeros((), jnp.int32)), cue

    def step(
        key: PRNGKey, state: CueState, action: Int[Array, ""]
    ) -> tuple[CueState, StepOutput]:
        last = state.time + 1 >= num_steps
        output = StepOutput(
            obs=jnp.zeros((1,)),
            reward=jnp.where(last, state.cue[0] * _as_sign(action), 0.0),
            terminated=last,
            truncated=jnp.zeros((), bool),
        )
        return CueState(state.cue, state.time + 1), output

    return Environment(
        "Probe-RememberFirst-v0",
        reset,
        step,
        _signs(),
        Discrete(2),
        max_steps=num_steps,
    )


def _one_decision(
    name: str,
    draw_obs: Callable[[PRNGKey], Obs],
    reward: Callable[[Obs, Array], Reward],
    action_space: Space | None = None,
) -> Environment:
    """A world that ends after one decision; its state is the observation."""

    def reset(key: PRNGKey) -> tuple[Obs, Obs]:
        obs = draw_obs(key)
        return obs, obs

    def step(key: PRNGKey, state: Obs, action: Array) -> tuple[Obs, StepOutput]:
        ends, no = jnp.ones((), bool), jnp.zeros((), bool)
        return state, StepOutput(state, reward(state, action), ends, no)

    actions = Discrete(2) if action_space is None else action_space
    return Environment(name, reset, step, _signs(), actions, max_steps=1)


def _signs() -> Box:
    return Box(-1.0, 1.0, (1,), jnp.result_type(float))


def _zero(key: PRNGKey) -> Obs:
    return jnp.zeros((1,))


def _sign(key: PRNGKey) -> Obs:
    return jax.random.rademacher(key, (1,), jnp.result_type(float))


def _as_sign(action: Int[Array, ""]) -> Reward:
    return jnp.where(action == 1, 1.0, -1.0)


PROBES: dict[str, Callable[..., Any]] = {
    "Probe-ConstantReward-v0": constant_reward,
    "Probe-ObsDependentReward-v0": obs_dependent_reward,
    "Probe-DelayedReward-v0": delayed_reward,
    "Probe-ActionDependentReward-v0": action_dependent_reward,
    "Probe-ObsAndActionReward-v0": obs_and_action_reward,
    "Probe-EndlessReward-v0": endless_reward,
    "Probe-RememberFirst-v0": remember_first,
    "Probe-MatchingNumber-v0": matching_number,
}
"""The probe worlds by id, in reading order."""
