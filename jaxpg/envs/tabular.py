"""Tabular worlds: small enough that everything about them is known exactly.

    s[0] ~ initial,   s[t+1] ~ transition[s[t], a[t]],   r[t] = reward[s[t], a[t]]

An episode ends when a terminal state is entered (`terminated`) or after `horizon`
decisions (`truncated`). The policy sees the state's number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxpg._checks import check_positive, check_range
from jaxpg.envs.base import Discrete, Environment
from jaxpg.types import PRNGKey, StepOutput

__all__ = ["TabularMDP", "random_mdp", "tabular_environment"]


class TabularMDP(NamedTuple):
    """A finite Markov decision process with a finite horizon.

    Attributes:
        initial: probability of each first state, [S]; 0 for terminal ones.
        transition: probability of the next state, [S, A, S].
        reward: reward of each action in each state, [S, A].
        terminal: whether entering a state ends the episode, [S].
        horizon: decisions after which an episode is truncated.
    """

    initial: Float[Array, "S"]
    transition: Float[Array, "S A S"]
    reward: Float[Array, "S A"]
    terminal: Bool[Array, "S"]
    horizon: int


def random_mdp(
    seed: int,
    num_states: int = 3,
    num_actions: int = 2,
    horizon: int = 3,
    num_terminal: int = 1,
) -> TabularMDP:
    """A world with random transitions and normal rewards.

    Args:
        seed: of NumPy's generator: the same world on every platform.
        num_states: terminal ones included.
        num_actions: at least 1.
        horizon: at least 1.
        num_terminal: how many of the last states are terminal.

    Raises:
        ValueError: if a count is not positive, or no state is left to start in.

    >>> random_mdp(0).transition.shape
    (3, 2, 3)
    """
    for name, value in (("num_actions", num_actions), ("horizon", horizon)):
        check_positive(name, value)
    check_range("num_terminal", num_terminal, 0, num_states - 1)
    rng = np.random.default_rng(seed)
    terminal = np.arange(num_states) >= num_states - num_terminal
    initial = np.where(terminal, 0.0, rng.exponential(size=num_states))
    transition = rng.exponential(size=(num_states, num_actions, num_states))
    return TabularMDP(
        jnp.asarray(initial / initial.sum()),
        jnp.asarray(transition / transition.sum(-1, keepdims=True)),
        jnp.asarray(rng.normal(size=(num_states, num_actions))),
        jnp.asarray(terminal),
        horizon,
    )


class TabularState(NamedTuple):
    """Where the world is, and how many decisions were taken."""

    state: Array
    time: Array


def tabular_environment(mdp: TabularMDP) -> Environment:
    """The world as an `Environment`, to roll out like any other."""
    num_states, num_actions = mdp.reward.shape

    def reset(key: PRNGKey) -> tuple[TabularState, Array]:
        state = _draw(key, mdp.initial)
        return TabularState(state, jnp.zeros((), jnp.int32)), state

    def step(
        key: PRNGKey, state: TabularState, action: Array
    ) -> tuple[TabularState, StepOutput]:
        arrived = _draw(key, mdp.transition[state.state, action])
        after = TabularState(arrived, state.time + 1)
        output = StepOutput(
            obs=arrived,
            reward=mdp.reward[state.state, action].astype(float),
            terminated=mdp.terminal[arrived],
            truncated=after.time >= mdp.horizon,
        )
        return after, output

    return Environment(
        "Tabular",
        reset,
        step,
        Discrete(num_states),
        Discrete(num_actions),
        mdp.horizon,
    )


def _draw(key: PRNGKey, probabilities: Array) -> Array:
    return jax.random.categorical(key, jnp.log(probabilities)).astype(jnp.int32)
