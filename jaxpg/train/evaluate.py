"""Evaluation: whole episodes of a fixed policy, in our environments or in Gymnasium's.

Every started episode is counted, whatever its length: the number of episodes is fixed
before the first step, so short ones cannot crowd out long ones.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpg._checks import check_positive
from jaxpg.envs.base import Environment
from jaxpg.policies import Policy
from jaxpg.rollout import rollout_episodes
from jaxpg.types import Params, PRNGKey

__all__ = [
    "EpisodeResults",
    "as_greedy",
    "evaluate",
    "evaluate_in_gymnasium",
    "make_evaluator",
    "summarize",
]


class EpisodeResults(NamedTuple):
    """What N episodes brought.

    Attributes:
        returns: undiscounted return of each, in the environment's units.
        lengths: decisions in each.
    """

    returns: np.ndarray
    lengths: np.ndarray


class Greedy(NamedTuple):
    """A distribution that always draws the mode of another one."""

    base: Any

    def sample(self, key: PRNGKey) -> Any:
        del key
        return self.base.mode()

    def log_prob(self, action: Any) -> Array:
        return self.base.log_prob(action)

    def to_env(self, action: Any) -> Any:
        return self.base.to_env(action)


def as_greedy(policy: Policy) -> Policy:
    """The same policy, acting by its mode instead of drawing."""

    def step(params: Params, carry: Any, obs: Any) -> tuple[Greedy, Any]:
        distribution, carry = policy.step(params, carry, obs)
        return Greedy(distribution), carry

    return policy._replace(step=step)


def evaluate(
    env: Environment,
    policy: Policy,
    params: Params,
    key: PRNGKey,
    num_episodes: int,
    *,
    greedy: bool = False,
    num_envs: int = 256,
) -> EpisodeResults:
    """Run whole episodes side by side.

    Args:
        env: must bound its episodes.
        policy: chooses the actions.
        params: the policy's parameters.
        key: all episodes derive from it.
        num_episodes: at least 1.
        greedy: act by the mode instead of drawing.
        num_envs: environments side by side.

    Returns:
        Each episode's return and length.

    Raises:
        ValueError: if a count is not positive or the episodes are not bounded.
    """
    run = make_evaluator(env, policy, num_episodes, greedy=greedy, num_envs=num_envs)
    return run(params, key)


def make_evaluator(
    env: Environment,
    policy: Policy,
    num_episodes: int,
    *,
    greedy: bool = False,
    num_envs: int = 256,
) -> Callable[[Params, PRNGKey], EpisodeResults]:
    """`evaluate` as a function of (params, key), compiled once for many of them.

    Args:
        env: must bound its episodes.
        policy: chooses the actions.
        num_episodes: at least 1.
        greedy: act by the mode instead of drawing.
        num_envs: environments side by side.

    Returns:
        `run(params, key) -> EpisodeResults`.

    Raises:
        ValueError: if a count is not positive.
    """
    check_positive("num_episodes", num_episodes)
    check_positive("num_envs", num_envs)
    actor = as_greedy(policy) if greedy else policy

    @jax.jit
    def play(params: Params, key: PRNGKey) -> tuple[Array, Array]:
        ids = jnp.arange(num_episodes, dtype=jnp.int32)
        slots = min(num_envs, num_episodes)
        rows = rollout_episodes(env, actor, params, key, ids, num_slots=slots)
        rewards = jnp.where(rows.mask, rows.reward, 0.0)
        zeros = jnp.zeros((num_episodes,), rewards.dtype)
        returns = zeros.at[rows.episode_id].add(rewards)
        return returns, zeros.at[rows.episode_id].add(rows.mask.astype(rewards.dtype))

    def run(params: Params, key: PRNGKey) -> EpisodeResults:
        returns, lengths = play(params, key)
        return EpisodeResults(np.asarray(returns), np.asarray(lengths).astype(np.int64))

    return run


def evaluate_in_gymnasium(
    name: str,
    policy: Policy,
    params: Params,
    seed: int,
    num_episodes: int,
    *,
    greedy: bool = False,
    num_envs: int = 32,
    max_steps: int | None = None,
) -> EpisodeResults:
    """Run whole episodes in the real Gymnasium environment, on the CPU.

    Args:
        name: Gymnasium's id, for example "CartPole-v1".
        policy: chooses the actions.
        params: the policy's parameters.
        seed: of the environments and of the actions.
        num_episodes: at least 1; each environment runs its share of them, rounded up.
        greedy: act by the mode instead of drawing.
        num_envs: environments side by side.
        max_steps: time limit in place of Gymnasium's own; None keeps that.

    Returns:
        Each episode's return and length.

    Raises:
        ValueError: if Gymnasium has no environment of that name or cannot start it.
    """
    check_positive("num_episodes", num_episodes)
    num_envs = min(num_envs, num_episodes)
    envs = [_make_gymnasium(name, max_steps) for _ in range(num_envs)]
    actor = as_greedy(policy) if greedy else policy

    @jax.jit
    def act(params: Params, carry: Any, obs: Any, key: PRNGKey) -> tuple[Any, Any]:
        distribution, carry = jax.vmap(actor.step, (None, 0, 0))(params, carry, obs)
        keys = jax.random.split(key, num_envs)
        action = jax.vmap(lambda d, k: d.to_env(d.sample(k)))(distribution, keys)
        return action, carry

    key = jax.random.key(seed)
    rounds = []
    for start in range(0, num_episodes, num_envs):
        key, key_round = jax.random.split(key)
        seeds = [seed * 100_003 + start + i for i in range(num_envs)]
        carry = _initial_carries(policy, num_envs)
        rounds.append(
            _one_round(
                envs,
                seeds,
                lambda *x: act(params, *x),
                carry,
                key_round,
                actor.noise_hold,
            )
        )
    for env in envs:
        env.close()
    returns, lengths = (
        np.concatenate(x)[:num_episodes] for x in zip(*rounds, strict=True)
    )
    return EpisodeResults(returns, lengths)


def _one_round(
    envs: list, seeds: list[int], act: Any, carry: Any, key: PRNGKey, noise_hold: int
) -> EpisodeResults:
    """One whole episode in each environment; all are counted, however long."""
    observations = [env.reset(seed=s)[0] for env, s in zip(envs, seeds, strict=True)]
    returns, lengths = np.zeros(len(envs)), np.zeros(len(envs), np.int64)
    running = np.ones(len(envs), bool)
    for time in itertools.count():
        if not running.any():
            return EpisodeResults(returns, lengths)
        key_act = jax.random.fold_in(key, time // noise_hold)
        actions, carry = act(carry, np.stack(observations), key_act)
        actions = np.asarray(actions)
        for i in np.flatnonzero(running):
            action = _native_action(envs[i].action_space, actions[i])
            step = envs[i].step(action)
            observations[i], reward, terminated, truncated, _ = step
            returns[i] += float(reward)
            lengths[i] += 1
            running[i] = not (terminated or truncated)
    raise AssertionError("counting never ends")


def _native_action(space: Any, action: Any) -> Any:
    """What Gymnasium wants: a plain int, or an array inside the box."""
    if hasattr(space, "low"):
        return np.clip(action, space.low, space.high)
    return int(action) if np.ndim(action) == 0 else action


def summarize(results: EpisodeResults) -> dict[str, float]:
    """Mean with its standard error, median and range of returns, and mean length.

    >>> results = EpisodeResults(np.array([1.0, 3.0]), np.array([5, 7]))
    >>> summarize(results)["mean"], summarize(results)["standard_error"]
    (2.0, 1.0)
    """
    returns, lengths = results
    count = len(returns)
    spread = float(np.std(returns, ddof=1)) if count > 1 else float("nan")
    return {
        "episodes": count,
        "mean": float(np.mean(returns)),
        "standard_error": spread / float(np.sqrt(count)),
        "median": float(np.median(returns)),
        "min": float(np.min(returns)),
        "max": float(np.max(returns)),
        "mean_length": float(np.mean(lengths)),
        "length_min": float(np.min(lengths)),
        "length_max": float(np.max(lengths)),
    }


def _make_gymnasium(name: str, max_steps: int | None) -> Any:
    import gymnasium

    try:
        return gymnasium.make(name, max_episode_steps=max_steps)
    except gymnasium.error.Error as error:
        raise ValueError(
            f"Gymnasium cannot start {name!r}: {error}; leave out --gymnasium to "
            "evaluate in the training environment"
        ) from error


def _initial_carries(policy: Policy, num_envs: int) -> Any:
    carry = policy.initial_carry()
    return jax.tree.map(lambda x: jnp.stack([x] * num_envs), carry)
