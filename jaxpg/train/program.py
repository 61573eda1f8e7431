"""The training program: what runs on the devices between two visits of the host.

    init(seeds) -> TrainState            advance(state, n) -> (TrainState, metrics)

One update collects what the algorithm wants, whole episodes or segments, and hands it
over. Members of a population (seeds, and values of settings that are swept) are a
leading axis of everything. The number of updates per visit is an argument and not a
shape, so the host may choose it freely: nothing compiles again, and no bit changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg._tracing import traced_once
from jaxpg.algos.base import (
    Algorithm,
    Episodes,
    Info,
    Replay,
    Segments,
    Task,
    make_task,
)
from jaxpg.algos.registry import RECIPES
from jaxpg.envs.base import Environment
from jaxpg.episodes import EndedEpisodes, ended_episodes
from jaxpg.networks import Network
from jaxpg.normalizers import observe_in
from jaxpg.policies import Policy
from jaxpg.rollout import (
    RolloutState,
    rollout_episodes,
    rollout_segments,
    start_segments,
)
from jaxpg.room import at_used_length, first_turns
from jaxpg.train.config import TrainConfig, with_values_unchecked
from jaxpg.train.sharding import Placement
from jaxpg.train.visits import MAX_UPDATES_PER_CALL
from jaxpg.types import PRNGKey, PyTree, Trajectory

__all__ = [
    "Program",
    "TrainState",
    "build_program",
    "over_members",
    "state_shardings",
]

EPISODES = 2**32 - 1
"""What the key of all episodes in segments is derived with, away from updates."""


class TrainState(NamedTuple):
    """Everything that a bit-exact resume needs; every leaf has the members in front.

    Attributes:
        algorithm: parameters, optimiser, critic or baseline.
        rollout: the running segments; () where whole episodes are collected.
        key: the run's key; every update derives its own from it.
        update: how many updates have been made.
    """

    algorithm: Any
    rollout: RolloutState | tuple[()]
    key: Array
    update: Array


class Program(NamedTuple):
    """A run's compiled functions.

    Attributes:
        init: `init(seeds [S]) -> TrainState`, for S members.
        advance: `advance(state, n) -> (state, metrics)` makes n updates, at most
            `MAX_UPDATES_PER_CALL`; it consumes the state. Metrics are [n_max, S], of
            which the first n count.
    """

    init: Callable[[Array], TrainState]
    advance: Any


def build_program(
    config: TrainConfig,
    env: Environment,
    policy: Policy,
    critic: Network | None,
    placement: Placement,
) -> Program:
    """Put environment, policy and algorithm together.

    Args:
        config: the run's settings.
        env: the world; it must bound its episodes where they are collected whole.
        policy: the policy that is trained.
        critic: the network of a value function, for algorithms that need one.
        placement: how rows are spread over devices.

    Returns:
        Jitted `init` and `advance`.

    Raises:
        ValueError: if the settings do not fit together.
    """
    task = make_task(
        env,
        policy,
        critic=critic,
        num_updates=config.num_updates,
        sum_over_rows=placement.sum_over_rows,
        map_rows=placement.map_rows,
        num_rows=config.num_envs,
        num_devices=placement.num_devices,
    )
    _check_enough(config, _algorithm(config, task, {}))
    swept = {name: jnp.asarray(x) for name, x in config.swept_values().items()}

    def of_member(index: Array) -> Collector:
        chosen = {name: values[index] for name, values in swept.items()}
        return Collector(config, env, _algorithm(config, task, chosen), placement)

    def init(argument: tuple[Array, Array]) -> TrainState:
        seed, index = argument
        return of_member(index).init(seed)

    def update(argument: tuple[TrainState, Array]) -> tuple[TrainState, Info]:
        state, index = argument
        return of_member(index).update(state)

    indices = jnp.arange(config.num_members, dtype=jnp.int32)
    all_members = over_members(update, config.num_members, config.members_at_once)

    def advance(state: TrainState, count: Array) -> tuple[TrainState, Info]:
        update_all = traced_once(all_members)

        def body(i: Array, carry: Any) -> Any:
            state, metrics = carry
            state, info = update_all((state, indices))
            put = jax.lax.dynamic_update_index_in_dim
            return state, jax.tree.map(lambda x, y: put(x, y, i, 0), metrics, info)

        shapes = jax.eval_shape(update_all, (state, indices))[1]
        metrics = jax.tree.map(
            lambda x: jnp.zeros((MAX_UPDATES_PER_CALL, *x.shape), x.dtype), shapes
        )
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    init_all = over_members(init, config.num_members, config.members_at_once)

    def init_members(seeds: Array) -> TrainState:
        return init_all((seeds, indices))

    shapes = jax.eval_shape(init_members, jnp.zeros(config.num_members, jnp.int32))
    everywhere = placement.replicated
    return Program(
        jax.jit(init_members, out_shardings=state_shardings(shapes, placement)),
        jax.jit(
            advance,
            donate_argnums=0,
            out_shardings=(state_shardings(shapes, placement), everywhere),
        ),
    )


def state_shardings(state: TrainState, placement: Placement) -> PyTree:
    """Where a state lives: running segments on their devices, all else everywhere."""
    shared = jax.tree.map(lambda _: placement.replicated, state)
    return shared._replace(
        rollout=jax.tree.map(lambda _: placement.spread, state.rollout)
    )


class Collector(NamedTuple):
    """One member's updates: collect, learn, take in what was seen.

    Attributes:
        config: the run's settings.
        env: the world.
        algorithm: what learns.
        placement: how rows are spread over devices.
    """

    config: TrainConfig
    env: Environment
    algorithm: Algorithm
    placement: Placement

    def init(self, seed: Array) -> TrainState:
        """The state before the first update."""
        key, key_obs, key_algorithm = jax.random.split(jax.random.key(seed), 3)
        _, obs = self.env.reset(key_obs)
        state = self.algorithm.init(key_algorithm, obs)
        return TrainState(state, self._start(key), key, jnp.zeros((), jnp.int32))

    def update(self, state: TrainState) -> tuple[TrainState, Info]:
        """One update and what to tell of it."""
        key_rollout, key_update = jax.random.split(
            jax.random.fold_in(state.key, state.update)
        )
        params = self.algorithm.actor_params(state.algorithm)
        if isinstance(self.algorithm.collects, Episodes):
            trajectories = self._episodes(params, key_rollout)
            statistics, rollout = _of_episodes(trajectories), state.rollout
        else:
            if self.algorithm.update_replayed is not None:
                return self._update_replayed(key_update, state)
            key, before = jax.random.fold_in(state.key, EPISODES), state.rollout
            assert isinstance(before, RolloutState)
            trajectories, rollout = self._segments(params, key, before)
            brought = before.episode_return
            statistics = _of_segments(ended_episodes(trajectories, brought))
        new, info = self.algorithm.update(key_update, state.algorithm, trajectories)
        new = observe_batch(new, trajectories)
        after = TrainState(new, rollout, state.key, state.update + 1)
        return after, {**statistics, **info}

    def _update_replayed(
        self, key_update: PRNGKey, state: TrainState
    ) -> tuple[TrainState, Info]:
        assert self.algorithm.update_replayed is not None
        assert isinstance(state.rollout, RolloutState)
        params = self.algorithm.actor_params(state.algorithm)
        key = jax.random.fold_in(state.key, EPISODES)
        replay = Replay(params, key, state.rollout, self._play)
        new, info, kept = self.algorithm.update_replayed(
            key_update, state.algorithm, replay
        )
        after = TrainState(new, kept.after, state.key, state.update + 1)
        return after, {**_of_segments(kept.episodes), **info}

    def _start(self, key: PRNGKey) -> RolloutState | tuple[()]:
        if isinstance(self.algorithm.collects, Episodes):
            return ()
        total = self.config.num_envs

        def on_one_device(key: PRNGKey, ids: Array) -> RolloutState:
            return start_segments(self.env, self.algorithm.actor, key, total, ids)

        ids = jnp.arange(total, dtype=jnp.int32)
        key = jax.random.fold_in(key, EPISODES)
        return self.placement.map_rows(on_one_device, key, ids)

    def _episodes(self, params: Any, key: PRNGKey) -> Trajectory:
        slots = self.config.num_envs // self.placement.num_devices

        def on_one_device(shared: Any, ids: Array) -> Trajectory:
            params, key = shared
            return rollout_episodes(
                self.env, self.algorithm.actor, params, key, ids, num_slots=slots
            )

        ids = jnp.arange(_num_episodes(self.config, self.algorithm), dtype=jnp.int32)
        return self.placement.map_rows(on_one_device, (params, key), ids)

    def _segments(
        self, params: Any, key: PRNGKey, rollout: Any
    ) -> tuple[Trajectory, RolloutState]:
        def on_one_device(shared: Any, rollout: RolloutState) -> Any:
            params, key = shared
            return self._play(params, key, rollout)

        return self.placement.map_rows(on_one_device, (params, key), rollout)

    def _play(
        self, params: Any, key: PRNGKey, rollout: RolloutState
    ) -> tuple[Trajectory, RolloutState]:
        collects = self.algorithm.collects
        assert isinstance(collects, Segments)
        return rollout_segments(
            self.env, self.algorithm.actor, params, key, rollout, collects.num_steps
        )


def observe_batch(state: Any, trajectories: Trajectory) -> Any:
    """Let running statistics of observations, where there are any, take in a batch.

    They are part of the parameters of policy and critic, and are frozen while a batch
    is collected and learned from, so that both see the same numbers. An older self
    that collects keeps its own, until it is renewed.
    """
    seen = trajectories.obs, trajectories.mask
    state = state._replace(params=observe_in(state.params, *seen))
    lagged = getattr(state, "behaviour", None)
    if lagged is not None:
        now = observe_in(lagged.params, *seen)
        renewed = jax.tree.map(
            lambda x, y: jnp.where(lagged.age == 0, x, y), now, lagged.params
        )
        state = state._replace(behaviour=lagged._replace(params=renewed))
    critic = getattr(state, "critic", None)
    if critic is None:
        return state
    return state._replace(
        critic=critic._replace(params=observe_in(critic.params, *seen))
    )


def _algorithm(config: TrainConfig, task: Task, chosen: dict[str, Array]) -> Algorithm:
    recipe = RECIPES[config.algorithm_name]
    return recipe.make(with_values_unchecked(config.algorithm, chosen), task)


def _num_episodes(config: TrainConfig, algorithm: Algorithm) -> int:
    assert isinstance(algorithm.collects, Episodes)
    return config.num_envs * algorithm.collects.per_env


def _check_enough(config: TrainConfig, algorithm: Algorithm) -> None:
    if not isinstance(algorithm.collects, Episodes):
        return
    num_episodes = _num_episodes(config, algorithm)
    if num_episodes < algorithm.min_trajectories:
        baseline = getattr(config.algorithm, "baseline", None)
        who = config.algorithm_name if baseline is None else f"baseline {baseline!r}"
        raise ValueError(
            f"num_envs * episodes_per_env is {num_episodes}, but {who} needs at least "
            f"{algorithm.min_trajectories} episodes; take more"
            + ("" if baseline is None else ", or baseline 'none'")
        )


def _of_episodes(trajectories: Trajectory) -> Info:
    def sums(number: int) -> tuple[Array, Array, Array]:
        rows = first_turns(trajectories, number)
        rewards = jnp.where(rows.mask, rows.reward, 0.0)
        return rows.num_decisions, jnp.sum(rows.starts), jnp.sum(rewards)

    num_steps, num_episodes, rewards = at_used_length(sums, trajectories.mask)
    count = jnp.maximum(num_episodes, 1).astype(rewards.dtype)
    return {
        "mean_return": rewards / count,
        "mean_length": num_steps.astype(rewards.dtype) / count,
        "num_episodes": num_episodes,
        "num_steps": num_steps,
    }


def _of_segments(ended: EndedEpisodes) -> Info:
    """Of the episodes that ended in the segments; NaN where none did."""
    count = ended.number.astype(ended.returns.dtype)
    nothing = jnp.asarray(jnp.nan, ended.returns.dtype)

    def mean(total: Array) -> Array:
        return jnp.where(ended.number > 0, total / jnp.maximum(count, 1.0), nothing)

    return {
        "mean_return": mean(ended.returns),
        "mean_length": mean(ended.lengths),
        "num_episodes": ended.number,
        "num_steps": ended.num_decisions,
    }


def over_members(
    fn: Callable[[Any], Any], num_members: int, at_once: int | None
) -> Callable[[Any], Any]:
    """`fn` over a leading axis of members; one runs without the axis, as fast.

    Args:
        fn: of one member's argument.
        num_members: length of the axis.
        at_once: how many run side by side; None for all.

    Returns:
        `fn` of all of them.
    """
    if num_members > 1 and (at_once is None or at_once >= num_members):
        return jax.vmap(fn)
    if num_members > 1:
        return lambda argument: jax.lax.map(fn, argument, batch_size=at_once)

    def single(argument: Any) -> Any:
        result = fn(jax.tree.map(lambda x: x[0], argument))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

    return single
