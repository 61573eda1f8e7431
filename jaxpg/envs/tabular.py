"""Tabular worlds: small enough that everything about them is known exactly.

    s[0] ~ initial,   s[t+1] ~ transition[s[t], a[t]],   r[t] = reward[s[t], a[t]]

    o[t] ~ emission[s[t]]                         (o[t] = s[t] without an emission)

An episode ends when a terminal state is entered (`terminated`) or after `horizon`
decisions (`truncated`). The policy sees o[t] alone: the state's number, or, in a
partially observed world, what the state happens to look like, drawn anew each time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxpg._checks import check_positive, check_range, check_rank, is_concrete
from jaxpg.envs.base import Discrete, Environment
from jaxpg.types import PRNGKey, StepOutput

__all__ = [
    "TabularMDP",
    "canonical_mdp",
    "canonical_pomdp",
    "check_mdp",
    "random_mdp",
    "tabular_environment",
]

SUM_TOLERANCE = 1e-6
"""How far from 1 a distribution's sum may be: what rounding to float32 can do."""


class TabularMDP(NamedTuple):
    """A finite Markov decision process with a finite horizon.

    Attributes:
        initial: probability of each first state, [S]; 0 for terminal ones.
        transition: probability of the next state, [S, A, S].
        reward: reward of each action in each state, [S, A].
        terminal: whether entering a state ends the episode, [S].
        horizon: decisions after which an episode is truncated.
        emission: probability of each observation in each state, [S, O]; None where the
            state itself is seen.
    """

    initial: Float[Array, " S"]
    transition: Float[Array, "S A S"]
    reward: Float[Array, "S A"]
    terminal: Bool[Array, " S"]
    horizon: int
    emission: Float[Array, "S O"] | None = None


def check_mdp(mdp: TabularMDP) -> None:
    """Refuse a world whose arrays do not fit together or hold no probabilities.

    Args:
        mdp: any world; of traced arrays only the shapes are looked at.

    Raises:
        ValueError: if a shape does not fit, a distribution is none, an episode would
            start in a terminal state, or the horizon is not a positive whole number.

    >>> check_mdp(canonical_mdp())
    """
    check_rank("reward", mdp.reward, 2, "(S, A) = one reward per state and action")
    states, actions = mdp.reward.shape
    _check_shape("initial", mdp.initial, (states,), "(S,)")
    _check_shape("transition", mdp.transition, (states, actions, states), "(S, A, S)")
    _check_shape("terminal", mdp.terminal, (states,), "(S,)")
    check_positive("horizon", mdp.horizon)
    _check_distributions("initial", mdp.initial)
    _check_distributions("transition", mdp.transition)
    if mdp.emission is not None:
        check_rank("emission", mdp.emission, 2, "(S, O) = one row per state")
        observations = mdp.emission.shape[1]
        _check_shape("emission", mdp.emission, (states, observations), "(S, O)")
        _check_distributions("emission", mdp.emission)
    if is_concrete(mdp.initial, mdp.terminal):
        at_the_end = np.asarray(mdp.initial)[np.asarray(mdp.terminal)]
        if (at_the_end > 0.0).any():
            raise ValueError(
                f"initial gives terminal states probability {at_the_end.sum():g}, needs"
                " 0; let episodes start in the others"
            )


def canonical_mdp() -> TabularMDP:
    """The mine: three states, two actions, three decisions, all numbers round.

    At the surface (state 0) `take` (action 0) pays 1 and ends the day half the time;
    `dig` (action 1) pays nothing and half the time reaches the seam (state 1). There
    `take` pays 4 and ends the day (state 2); `dig` costs 1 and leads back up.

    The best plan digs above, but for the last decision, and is worth 3.25; under
    uniform actions, worth 1.5, taking looks better. Terminal rows lead back to the
    start, for the continuing world.

    >>> canonical_mdp().reward.tolist()
    [[1.0, 0.0], [4.0, -1.0], [0.0, 0.0]]
    """
    return TabularMDP(
        initial=jnp.array([1.0, 0.0, 0.0]),
        transition=jnp.array(
            [
                [[0.5, 0.0, 0.5], [0.5, 0.5, 0.0]],
                [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]],
                [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
            ]
        ),
        reward=jnp.array([[1.0, 0.0], [4.0, -1.0], [0.0, 0.0]]),
        terminal=jnp.array([False, False, True]),
        horizon=3,
    )


def canonical_pomdp() -> TabularMDP:
    """The mine in the dark: each of its two places looks like the other 1 time in 4.

    >>> canonical_pomdp().emission[0].tolist()
    [0.75, 0.25, 0.0]
    """
    emission = jnp.array([[0.75, 0.25, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    return canonical_mdp()._replace(emission=emission)


def random_mdp(
    seed: int,
    num_states: int = 3,
    num_actions: int = 2,
    horizon: int = 3,
    num_terminal: int = 1,
    num_observations: int | None = None,
) -> TabularMDP:
    """A world with random transitions and normal rewards.

    Args:
        seed: of NumPy's generator: the same world on every platform.
        num_states: terminal ones included.
        num_actions: at least 1.
        horizon: at least 1.
        num_terminal: how many of the last states are terminal.
        num_observations: how many observations a random emission matrix has, drawn
            last, so that it hides the same world; None shows the state itself.

    Returns:
        A world whose every transition between states is possible.

    Raises:
        ValueError: if a count is not positive, or no state is left to start in.

    >>> random_mdp(0).transition.shape
    (3, 2, 3)
    """
    for name, value in (("num_actions", num_actions), ("horizon", horizon)):
        check_positive(name, value)
    check_range("num_terminal", num_terminal, 0, num_states - 1)
    if num_observations is not None:
        check_positive("num_observations", num_observations)
    rng = np.random.default_rng(seed)
    terminal = np.arange(num_states) >= num_states - num_terminal
    initial = np.where(terminal, 0.0, rng.exponential(size=num_states))
    transition = rng.exponential(size=(num_states, num_actions, num_states))
    mdp = TabularMDP(
        jnp.asarray(initial / initial.sum()),
        jnp.asarray(transition / transition.sum(-1, keepdims=True)),
        jnp.asarray(rng.normal(size=(num_states, num_actions))),
        jnp.asarray(terminal),
        horizon,
    )
    if num_observations is None:
        return mdp
    emission = rng.exponential(size=(num_states, num_observations))
    return mdp._replace(
        emission=jnp.asarray(emission / emission.sum(-1, keepdims=True))
    )


class TabularState(NamedTuple):
    """Where the world is, and how many decisions were taken."""

    state: Array
    time: Array


def tabular_environment(mdp: TabularMDP) -> Environment:
    """The world as an `Environment`, to roll out like any other.

    Args:
        mdp: the world; with an emission, its observations are drawn from it.

    Returns:
        An environment with `Discrete` observations and actions.

    Raises:
        ValueError: if `check_mdp` refuses the world.

    >>> tabular_environment(canonical_mdp()).observation_space.n
    3
    """
    check_mdp(mdp)
    num_states, num_actions = mdp.reward.shape
    num_observations = num_states if mdp.emission is None else mdp.emission.shape[1]

    def arrive(key: PRNGKey, probabilities: Array) -> tuple[Array, Array]:
        """A state and what it looks like; nothing more is drawn where it is seen."""
        if mdp.emission is None:
            state = _draw(key, probabilities)
            return state, state
        key_state, key_obs = jax.random.split(key)
        state = _draw(key_state, probabilities)
        return state, _draw(key_obs, jnp.asarray(mdp.emission)[state])

    def reset(key: PRNGKey) -> tuple[TabularState, Array]:
        state, obs = arrive(key, jnp.asarray(mdp.initial))
        return TabularState(state, jnp.zeros((), jnp.int32)), obs

    def step(
        key: PRNGKey, state: TabularState, action: Array
    ) -> tuple[TabularState, StepOutput]:
        chances = jnp.asarray(mdp.transition)[state.state, action]
        arrived, obs = arrive(key, chances)
        after = TabularState(arrived, state.time + 1)
        output = StepOutput(
            obs=obs,
            reward=jnp.asarray(mdp.reward)[state.state, action].astype(float),
            terminated=jnp.asarray(mdp.terminal)[arrived],
            truncated=after.time >= mdp.horizon,
        )
        return after, output

    return Environment(
        "Tabular",
        reset,
        step,
        Discrete(num_observations),
        Discrete(num_actions),
        mdp.horizon,
    )


def _draw(key: PRNGKey, probabilities: Array) -> Array:
    return jax.random.categorical(key, jnp.log(probabilities)).astype(jnp.int32)


def _check_shape(name: str, array: Any, shape: tuple[int, ...], meaning: str) -> None:
    if array.shape != shape:
        raise ValueError(
            f"{name} has shape {array.shape}, needs {meaning} = {shape}, with the S and"
            " A of reward; reshape the one that is wrong"
        )


def _check_distributions(name: str, array: Any) -> None:
    """Refuse rows (along the last axis) that are no distributions."""
    if not is_concrete(array):
        return
    rows = np.asarray(array, np.float64)
    if not (rows >= 0.0).all():
        raise ValueError(
            f"{name} holds {rows.min():g}, needs probabilities of at least 0; set "
            "impossible ones to 0 and divide each row by its sum"
        )
    sums = rows.sum(-1)
    wrong = np.abs(sums - 1.0) > SUM_TOLERANCE
    if wrong.any():
        place = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"{name}{place or ''} sums to {sums[wrong][0]:g}, needs 1; divide each row "
            "by its sum, .sum(-1, keepdims=True)"
        )
