"""The training program: what runs on the devices between two visits of the host.

    init(keys) -> TrainState            advance(state, n) -> (TrainState, metrics)

One update samples N whole episodes and hands them to the algorithm. Seeds are a
leading axis of everything. The number of updates per visit is an argument and not a
shape, so the host may choose it freely: nothing compiles again, and no bit changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg.algos.base import Algorithm, AlgorithmState, Info
from jaxpg.algos.reinforce import reinforce
from jaxpg.envs.base import Environment
from jaxpg.estimators import make_estimator
from jaxpg.policies import Policy
from jaxpg.rollout import rollout_episodes
from jaxpg.train.config import TrainConfig
from jaxpg.train.sharding import Placement
from jaxpg.types import PRNGKey, Trajectory

__all__ = ["MAX_UPDATES_PER_CALL", "Program", "TrainState", "build_program"]

MAX_UPDATES_PER_CALL = 64


class TrainState(NamedTuple):
    """Everything that a bit-exact resume needs; every leaf has the seeds in front.

    Attributes:
        algorithm: parameters, optimiser and baseline.
        key: the run's key; every update derives its own from it.
        update: how many updates have been made.
    """

    algorithm: AlgorithmState
    key: Array
    update: Array


class Program(NamedTuple):
    """A run's compiled functions.

    Attributes:
        init: `init(seeds [S]) -> TrainState`.
        advance: `advance(state, n) -> (state, metrics)` makes n updates, at most
            `MAX_UPDATES_PER_CALL`; it consumes the state. Metrics are [n_max, S], of
            which the first n count.
    """

    init: Callable[[Array], TrainState]
    advance: Any


def build_program(
    config: TrainConfig, env: Environment, policy: Policy, placement: Placement
) -> Program:
    """Put environment, policy and algorithm together.

    Args:
        config: the run's settings.
        env: must bound its episodes.
        policy: the policy that is trained.
        placement: how rows are spread over devices.

    Returns:
        Jitted `init` and `advance`.

    Raises:
        ValueError: if the settings do not fit together.
    """
    num_episodes = config.num_envs * config.algorithm.episodes_per_env
    algorithm = _build_algorithm(config, env, policy, placement, num_episodes)

    def init(seed: Array) -> TrainState:
        key, key_obs, key_algorithm = jax.random.split(jax.random.key(seed), 3)
        _, obs = env.reset(key_obs)
        state = algorithm.init(key_algorithm, obs)
        return TrainState(state, key, jnp.zeros((), jnp.int32))

    def update(state: TrainState) -> tuple[TrainState, Info]:
        key_rollout, key_update = jax.random.split(
            jax.random.fold_in(state.key, state.update)
        )
        trajectories = sample(state.algorithm.params, key_rollout)
        new, info = algorithm.update(key_update, state.algorithm, trajectories)
        info = {**_statistics(trajectories), **info}
        return TrainState(new, state.key, state.update + 1), info

    def sample(params: Any, key: PRNGKey) -> Trajectory:
        def on_one_device(shared: Any, ids: Array) -> Trajectory:
            slots = config.num_envs // placement.num_devices
            params, key = shared
            return rollout_episodes(env, policy, params, key, ids, num_slots=slots)

        ids = jnp.arange(num_episodes, dtype=jnp.int32)
        return placement.map_rows(on_one_device, (params, key), ids)

    over_seeds = _over_seeds(update, config.num_seeds)

    def advance(state: TrainState, count: Array) -> tuple[TrainState, Info]:
        def body(i: Array, carry: Any) -> Any:
            state, metrics = carry
            state, info = over_seeds(state)
            return state, jax.tree.map(lambda x, y: x.at[i].set(y), metrics, info)

        shapes = jax.eval_shape(over_seeds, state)[1]
        metrics = jax.tree.map(
            lambda x: jnp.zeros((MAX_UPDATES_PER_CALL, *x.shape), x.dtype), shapes
        )
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    everywhere = placement.replicated
    return Program(
        jax.jit(_over_seeds(init, config.num_seeds)),
        jax.jit(advance, donate_argnums=0, out_shardings=everywhere),
    )


def _build_algorithm(
    config: TrainConfig,
    env: Environment,
    policy: Policy,
    placement: Placement,
    num_episodes: int,
) -> Algorithm:
    if env.max_steps is None:
        raise ValueError(
            f"environment {env.name} has no time limit, so whole episodes may never "
            "end; give --max-steps"
        )
    estimator = make_estimator(
        config.algorithm.estimator,
        policy,
        env.max_steps,
        observation_space=env.observation_space,
    )
    if num_episodes < estimator.min_trajectories:
        raise ValueError(
            f"num_envs * episodes_per_env is {num_episodes}, but baseline "
            f"{config.algorithm.baseline!r} needs at least "
            f"{estimator.min_trajectories} episodes; take more, or baseline 'none'"
        )
    return reinforce(
        config.algorithm,
        policy,
        env.max_steps,
        observation_space=env.observation_space,
        num_updates=config.num_updates,
        sum_over_rows=placement.sum_over_rows,
    )


def _statistics(trajectories: Trajectory) -> Info:
    num_steps = trajectories.num_decisions
    num_episodes = jnp.sum(trajectories.starts)
    rewards = jnp.where(trajectories.mask, trajectories.reward, 0.0)
    count = jnp.maximum(num_episodes, 1).astype(rewards.dtype)
    return {
        "mean_return": jnp.sum(rewards) / count,
        "mean_length": num_steps.astype(rewards.dtype) / count,
        "num_episodes": num_episodes,
        "num_steps": num_steps,
    }


def _over_seeds(fn: Callable, num_seeds: int) -> Callable:
    """`fn` over a leading axis of seeds; one seed runs without the axis, as fast."""
    if num_seeds > 1:
        return jax.vmap(fn)

    def single(argument: Any) -> Any:
        result = fn(jax.tree.map(lambda x: x[0], argument))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

    return single
