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
    two_numbers                1                  logits of MultiDiscrete cut wrongly
    bits                       1                  bits mixed up, or not independent
    masked_actions             1 + d + d^2        masks unused, or of another step
    push_away                  d^15               noise that does not last over steps

The last two tell more. In `masked_actions` a policy that keeps to the mask earns at
least 0 a decision and 0.5 if it draws evenly, so that a mean near 0.5 means features
unseen and a negative one means a mask not obeyed. In `push_away` a Gaussian policy with
fresh noise at each decision finds the reward in about 0.2% of its first episodes, with
noise held over a whole episode in 74%: what fails there is exploration, not learning.

Observations have shape (1,) and there are two actions in the first seven worlds.

Reference: A. Jones, 2021, Debugging RL, without the agonizing pain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_positive
from jaxpg.envs.base import (
    Box,
    Discrete,
    Environment,
    Masked,
    MaskedObs,
    MultiBinary,
    MultiDiscrete,
    Space,
    with_time_limit,
)
from jaxpg.types import PRNGKey, StepOutput

__all__ = [
    "PROBES",
    "action_dependent_reward",
    "bits",
    "constant_reward",
    "delayed_reward",
    "endless_reward",
    "masked_actions",
    "matching_number",
    "obs_and_action_reward",
    "obs_dependent_reward",
    "push_away",
    "remember_first",
    "two_numbers",
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


def two_numbers() -> Environment:
    """One decision, obs (i, j) with i < 2 and j < 3; reward = fraction copied right.

    The sizes differ, so logits that are cut in the wrong place cannot learn it.
    """
    return _copying("Probe-TwoNumbers-v0", MultiDiscrete((2, 3)), np.array([1.0, 2.0]))


def bits() -> Environment:
    """One decision, obs three bits; reward = fraction of them copied right."""
    return _copying("Probe-Bits-v0", MultiBinary(3), 1.0)


class MaskedState(NamedTuple):
    """What is seen now, and the decisions taken so far."""

    obs: MaskedObs
    time: Int[Array, ""]


def masked_actions(num_steps: int = 3) -> Environment:
    """Two of four actions are allowed, the others at the next decision, and so on.

    The feature is -1 or 1, drawn at each decision: -1 asks for the lower of the allowed
    actions, 1 for the higher. The one asked for earns 1, the other nothing, and a
    forbidden one costs 10. Whoever acts by the mask of the decision before or after
    pays every time.

    Args:
        num_steps: decisions in an episode, at least 1.

    Returns:
        An environment that terminates after `num_steps` decisions.

    Raises:
        ValueError: if `num_steps` is not a positive whole number.

    >>> masked_actions().reset(jax.random.key(0))[1].action_mask.sum().item()
    2
    """
    check_positive("num_steps", num_steps)

    def reset(key: PRNGKey) -> tuple[MaskedState, MaskedObs]:
        key_sign, key_mask = jax.random.split(key)
        mask = jax.random.permutation(key_mask, jnp.arange(4) < 2)
        obs = MaskedObs(_sign(key_sign), mask)
        return MaskedState(obs, jnp.zeros((), jnp.int32)), obs

    def step(
        key: PRNGKey, state: MaskedState, action: Int[Array, ""]
    ) -> tuple[MaskedState, StepOutput]:
        obs = MaskedObs(_sign(key), ~state.obs.action_mask)
        output = StepOutput(
            obs=obs,
            reward=_masked_reward(state.obs, action),
            terminated=state.time + 1 >= num_steps,
            truncated=jnp.zeros((), bool),
        )
        return MaskedState(obs, state.time + 1), output

    return Environment(
        "Probe-MaskedActions-v0",
        reset,
        step,
        Masked(_signs(), 4),
        Discrete(4),
        max_steps=num_steps,
    )


def push_away(max_steps: int = 48) -> Environment:
    """A point at 0 on a line; reward 1, and the end, once it is pushed to -1 or 1:

        position += clip(action, -1, 1) / 16

    Sixteen full pushes to one side do it. Fresh N(0, 1) actions cancel out: their sum
    spreads by 0.31 in 48 decisions, so the goal is more than three deviations away. One
    such action held reaches it where |action| > 1/3.

    Args:
        max_steps: decisions after which `truncated` is raised, at least 1.

    Returns:
        An environment that shows the position.

    Raises:
        ValueError: if `max_steps` is not a positive whole number.

    >>> push_away(20).max_steps
    20
    """

    def reset(key: PRNGKey) -> tuple[Obs, Obs]:
        return jnp.zeros((1,)), jnp.zeros((1,))

    def step(
        key: PRNGKey, state: Obs, action: Float[Array, "1"]
    ) -> tuple[Obs, StepOutput]:
        push = jnp.clip(action, -1.0, 1.0) / 16  # exact, so that 16 reach 1.0
        position = jnp.clip(state + push, -1.0, 1.0)
        there = jnp.abs(position[0]) >= 1.0
        reward = there.astype(jnp.result_type(float))
        return position, StepOutput(position, reward, there, jnp.zeros((), bool))

    env = Environment("Probe-PushAway-v0", reset, step, _signs(), _signs())
    return with_time_limit(env, max_steps)


def _one_decision(
    name: str,
    draw_obs: Callable[[PRNGKey], Float[Array, " D"]],
    reward: Callable[[Float[Array, " D"], Array], Reward],
    action_space: Space | None = None,
    observation_space: Space | None = None,
) -> Environment:
    """A world that ends after one decision; its state is the observation."""

    def reset(key: PRNGKey) -> tuple[Array, Array]:
        obs = draw_obs(key)
        return obs, obs

    def step(key: PRNGKey, state: Array, action: Array) -> tuple[Array, StepOutput]:
        ends, no = jnp.ones((), bool), jnp.zeros((), bool)
        return state, StepOutput(state, reward(state, action), ends, no)

    observations = _signs() if observation_space is None else observation_space
    actions = Discrete(2) if action_space is None else action_space
    return Environment(name, reset, step, observations, actions, max_steps=1)


def _copying(name: str, actions: MultiDiscrete | MultiBinary, high: Any) -> Environment:
    """One decision: the action must repeat the observation, number by number."""

    def draw_obs(key: PRNGKey) -> Float[Array, " D"]:
        return actions.sample(key).astype(float)

    def reward(obs: Float[Array, " D"], action: Array) -> Reward:
        return jnp.mean(action == obs.astype(action.dtype), dtype=obs.dtype)

    space = Box(0.0, high, actions.shape, jnp.result_type(float))
    return _one_decision(name, draw_obs, reward, actions, space)


def _masked_reward(obs: MaskedObs, action: Int[Array, ""]) -> Reward:
    lowest = jnp.argmax(obs.action_mask)
    highest = 3 - jnp.argmax(obs.action_mask[::-1])
    asked_for = jnp.where(obs.features[0] > 0, highest, lowest).astype(action.dtype)
    earned = jnp.where(action == asked_for, 1.0, 0.0)
    return jnp.where(obs.action_mask[action], earned, -10.0)


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
    "Probe-TwoNumbers-v0": two_numbers,
    "Probe-Bits-v0": bits,
    "Probe-MaskedActions-v0": masked_actions,
    "Probe-PushAway-v0": push_away,
}
"""The probe worlds by id, in reading order."""
