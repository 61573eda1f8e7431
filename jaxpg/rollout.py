"""Rollouts: policies acting in many copies of an environment at once.

This is the one place where the batch is visible. Two ways to collect decisions:

`rollout_episodes` samples N WHOLE episodes on M slots. Slots draw episodes from a queue
and start the next one the moment theirs ends, so they stay busy whatever the lengths;
every episode that is started is finished and counted, none is dropped, and which
episodes are sampled was fixed before the first step. So the sample is exactly N
independent episodes, and estimates on it are unbiased. (Stopping after a fixed number
of *steps* instead would keep short episodes and cut long ones.) With N = M each row
holds one episode, masked after its end.

`rollout_segments` continues M auto-resetting slots for T steps, whatever ends within.

Randomness belongs to the episode: episode i uses `fold_in(key, i)`, and its decision t
`fold_in` of that with t; only the reset is the first episode's of a group, where there
are groups, and a policy that holds its noise draws with the key of an earlier decision.
Slots, chunks and devices therefore never change the sample.

Capacity. N episodes of at most L decisions need at most K * L turns, K = ceil(N / M):
after (K - 1) * L turns every slot has finished K - 1 episodes or found the queue empty,
so all N have started, and L turns later they have ended. The loop stops with the last.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpg._batching import anywhere
from jaxpg._checks import check_positive
from jaxpg._unrolled import plain, unrolled
from jaxpg.envs.base import Environment
from jaxpg.policies import Policy
from jaxpg.types import Params, PRNGKey, PyTree, StepOutput, Trajectory

__all__ = [
    "RolloutState",
    "Slot",
    "restart_ended",
    "rollout_episodes",
    "rollout_segments",
    "start_segments",
]


FEW = 8
"""Slots that have ended are reset alone where they are this part of all, or less."""


class Slot(NamedTuple):
    """The present of one slot, just before a decision.

    Attributes:
        key: the key of the running episode.
        env_state: the environment's state.
        obs: what the policy sees now.
        carry: what the policy remembers.
        time: decisions taken since the episode began.
        episode_id: which episode runs here.
    """

    key: Array
    env_state: PyTree
    obs: PyTree
    carry: PyTree
    time: Array
    episode_id: Array


class RolloutState(NamedTuple):
    """What continuing segments hand on: the slots, and each one's running return.

    Attributes:
        slots: M slots.
        stride: what an episode's number grows by when its slot begins the next, [M].
        episode_return: undiscounted reward of the running episode so far, [M].
    """

    slots: Slot
    stride: Int[Array, "M"]
    episode_return: Float[Array, "M"]


class Loop(NamedTuple):
    """What the episode loop carries.

    Attributes:
        step: turns of the loop so far.
        slots: M slots.
        running: whether a slot's episode is one of those asked for, [M].
        num_started: episodes taken from the queue.
        buffer: decisions so far, time first.
    """

    step: Array
    slots: Slot
    running: Array
    num_started: Array
    buffer: Trajectory


def rollout_episodes(
    env: Environment,
    policy: Policy,
    params: Params,
    key: PRNGKey,
    episode_ids: Int[Array, "N"],
    *,
    num_slots: int | None = None,
    group_size: int = 1,
    keep_next_obs: bool = False,
) -> Trajectory:
    """Sample whole episodes, each counted exactly once, packed into rows.

    Args:
        env: must bound its episodes (`max_steps`).
        policy: chooses the actions.
        params: the policy's parameters.
        key: the key that all episodes derive from.
        episode_ids: which episodes to sample; also the order of the queue.
        num_slots: M, rows that work side by side; None gives every episode its own.
        group_size: episodes i with the same `i // group_size` begin alike, in the
            environment's state and the first observation; see `jaxpg.groups`.
        keep_next_obs: whether to keep `next_obs`, which doubles the observations.

    Returns:
        A batch of M rows of ceil(N / M) * max_steps slots; `mask` marks the decisions.

    Raises:
        ValueError: if the environment does not bound its episodes, M is not in
            1 .. N, or the group size is not a positive whole number.

    Bias: none; the N episodes are draws from the policy's own law, independent but for
        the start that a group shares.
    """
    num_episodes = episode_ids.shape[0]
    check_positive("number of episode_ids", num_episodes)
    check_positive("group_size", group_size)
    num_slots = num_episodes if num_slots is None else num_slots
    capacity = _capacity(env, num_episodes, num_slots)
    restart = jax.vmap(lambda i: _start_episode(env, policy, key, i, group_size))
    slots = restart(episode_ids[:num_slots])
    decide = jax.vmap(lambda slot: _decide(env, policy, params, slot, keep_next_obs))
    buffer = _empty_buffer(decide, slots, capacity)

    def unfinished(loop: Loop) -> Array:
        return anywhere(loop.running) & (loop.step < capacity)

    def advance(loop: Loop) -> Loop:
        slots, decision = decide(loop.slots)
        decision = decision._replace(mask=loop.running)
        ends = decision.terminated | decision.truncated
        slots, running, num_started = jax.lax.cond(
            anywhere(ends),
            lambda: _next_episodes(
                restart, slots, ends, episode_ids, loop.num_started, loop.running
            ),
            lambda: (slots, loop.running, loop.num_started),
        )
        buffer = _write(loop.buffer, decision, loop.step)
        return Loop(loop.step + 1, slots, running, num_started, buffer)

    first = Loop(
        jnp.zeros((), jnp.int32),
        slots,
        jnp.ones((num_slots,), bool),
        jnp.asarray(num_slots, jnp.int32),
        buffer,
    )
    return _rows_first(jax.lax.while_loop(unfinished, advance, first).buffer)


def start_segments(
    env: Environment,
    policy: Policy,
    key: PRNGKey,
    num_slots: int,
    slot_ids: Int[Array, "M"] | None = None,
) -> RolloutState:
    """Reset `num_slots` slots for `rollout_segments`.

    Args:
        env: any environment.
        policy: for its initial memory.
        key: the key that all episodes derive from.
        num_slots: slots of the whole batch, on all devices together; at least 1.
        slot_ids: which of them to reset here; None for all.

    Returns:
        The state before the first segment. Of S slots, slot m runs the episodes m,
        m + S, m + 2S, ..., wherever it is.

    Raises:
        ValueError: if `num_slots` is not a positive whole number.
    """
    check_positive("num_slots", num_slots)
    ids = jnp.arange(num_slots, dtype=jnp.int32) if slot_ids is None else slot_ids
    slots = jax.vmap(lambda i: _start_episode(env, policy, key, i))(ids)
    return RolloutState(slots, jnp.full_like(ids, num_slots), jnp.zeros(ids.shape))


def rollout_segments(
    env: Environment,
    policy: Policy,
    params: Params,
    key: PRNGKey,
    state: RolloutState,
    num_steps: int,
    *,
    keep_next_obs: bool = True,
) -> tuple[Trajectory, RolloutState]:
    """Continue every slot for `num_steps` decisions, resetting at ends.

    Args:
        env: any environment.
        policy: chooses the actions.
        params: the policy's parameters.
        key: the key that all episodes derive from; the same one for every segment.
        state: from `start_segments` or the previous segment.
        num_steps: T, at least 1.
        keep_next_obs: whether to keep `next_obs`, needed to bootstrap at truncations.

    Returns:
        A batch of M rows of T decisions, all of them real, and the state after it.

    Raises:
        ValueError: if `num_steps` is not a positive whole number.

    Bias: rows begin and end inside episodes; credit must bootstrap or account for it.
    """
    check_positive("num_steps", num_steps)
    restart = jax.vmap(lambda i: _start_episode(env, policy, key, i))
    decide = jax.vmap(lambda slot: _decide(env, policy, params, slot, keep_next_obs))

    def advance(
        carry: tuple[Slot, Array], _: None
    ) -> tuple[tuple[Slot, Array], Trajectory]:
        slots, episode_return = carry
        slots, decision = decide(slots)
        ends = decision.terminated | decision.truncated

        slots = restart_ended(restart, slots.episode_id + state.stride, ends, slots)
        episode_return = jnp.where(ends, 0.0, episode_return + decision.reward)
        return (slots, episode_return), decision

    first_carry = state.slots.carry
    (slots, episode_return), decisions = jax.lax.scan(
        advance, (state.slots, state.episode_return), None, num_steps
    )
    trajectory = _rows_first(decisions)._replace(carry=first_carry)
    return trajectory, RolloutState(slots, state.stride, episode_return)


def restart_ended(
    restart: Callable[[Array], PyTree],
    ids: Array,
    ends: Bool[Array, "M"],
    slots: PyTree,
) -> PyTree:
    """Slots that have ended begin the episodes `ids`; the others go on.

    Of many slots few end together, and on CPU those few alone are reset: a reset of all
    for their sake halves the rate of fast worlds. Where launching work is what costs,
    all are reset together.

    Args:
        restart: `restart(ids) -> slots` at their episodes' beginnings, of any number.
        ids: of the episodes that may begin, [M].
        ends: whether a slot's episode has ended.
        slots: a tree with M in front.

    Returns:
        The slots before their next decision.

    >>> ids, ends = jnp.arange(3), jnp.array([False, True, False])
    >>> restart_ended(lambda ids: 10 * ids, ids, ends, jnp.ones(3, int)).tolist()
    [1, 10, 1]
    """
    num_slots = ends.shape[0]
    few = num_slots // FEW if jax.default_backend() == "cpu" else 0

    def of_all() -> PyTree:
        return _select(ends, restart(ids), slots)

    def of_few() -> PyTree:
        (which,) = jnp.nonzero(ends, size=few, fill_value=num_slots)
        fresh = restart(ids[which])  # clipped beyond the end, and then dropped
        return jax.tree.map(lambda x, y: x.at[which].set(y, mode="drop"), slots, fresh)

    def of_those() -> PyTree:
        if few == 0:
            return of_all()
        return jax.lax.cond(anywhere(jnp.sum(ends) > few), of_all, of_few)

    return jax.lax.cond(anywhere(ends), of_those, lambda: slots)


def _start_episode(
    env: Environment,
    policy: Policy,
    key: PRNGKey,
    episode_id: Array,
    group_size: int = 1,
) -> Slot:
    key_episode, key_reset = _two_keys(key, episode_id)
    if group_size > 1:  # the reset of the group's first episode, for all of them
        _, key_reset = _two_keys(key, episode_id - episode_id % group_size)
    env_state, obs = env.reset(key_reset)
    time = jnp.zeros((), jnp.int32)
    return Slot(key_episode, env_state, obs, policy.initial_carry(), time, episode_id)


def _decide(
    env: Environment, policy: Policy, params: Params, slot: Slot, keep_next_obs: bool
) -> tuple[Slot, Trajectory]:
    """One decision of one slot: the slot after it, and the facts of it."""
    key_action, key_step = _decision_keys(slot, policy.noise_hold)
    distribution, carry = policy.step(params, slot.carry, slot.obs)
    action = distribution.sample(key_action)
    env_state, output = env.step(key_step, slot.env_state, distribution.to_env(action))
    after = slot._replace(
        env_state=env_state, obs=output.obs, carry=carry, time=slot.time + 1
    )
    return after, _facts(slot, action, distribution, output, keep_next_obs)


def _decision_keys(slot: Slot, noise_hold: int) -> tuple[Array, Array]:
    """Keys of the action and of the world; the former is held over some decisions."""
    key_action, key_step = _two_keys(slot.key, slot.time)
    if noise_hold > 1:
        key_action, _ = _two_keys(slot.key, slot.time // noise_hold)
    return key_action, key_step


def _two_keys(key: PRNGKey, number: Array) -> tuple[PRNGKey, PRNGKey]:
    first, second = jax.random.split(jax.random.fold_in(unrolled(key), number))
    return plain(first), plain(second)


def _facts(
    slot: Slot, action: Any, distribution: Any, output: StepOutput, keep_next_obs: bool
) -> Trajectory:
    return Trajectory(
        obs=slot.obs,
        action=action,
        log_prob=distribution.log_prob(action),
        reward=output.reward,
        terminated=output.terminated,
        truncated=output.truncated,
        mask=jnp.ones((), bool),
        time=slot.time,
        episode_id=slot.episode_id,
        next_obs=output.obs if keep_next_obs else None,
    )


def _next_episodes(
    restart: Any,
    slots: Slot,
    ends: Array,
    episode_ids: Array,
    num_started: Array,
    running: Array,
) -> tuple[Slot, Array, Array]:
    """Hand the queue's next episodes to the slots whose episode ended.

    A slot that finds the queue empty plays its last episode again, masked: its states
    stay ordinary ones, so nothing non-finite can creep into the rows.
    """
    free = ends & running
    place = num_started + jnp.cumsum(free, dtype=jnp.int32) - 1
    has_next = free & (place < episode_ids.shape[0])
    ids = jnp.where(
        has_next,
        episode_ids[jnp.clip(place, 0, episode_ids.shape[0] - 1)],
        slots.episode_id,
    )
    slots = restart_ended(restart, ids, ends, slots)
    num_started = num_started + jnp.sum(free, dtype=jnp.int32)
    return slots, running & (~ends | has_next), num_started


def _select(where: Array, new: PyTree, old: PyTree) -> PyTree:
    def select(x: Array, y: Array) -> Array:
        flags = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
        return jnp.where(jnp.broadcast_to(flags, x.shape), x, y)

    return jax.tree.map(select, new, old)


def _capacity(env: Environment, num_episodes: int, num_slots: int) -> int:
    check_positive("num_slots", num_slots)
    if num_slots > num_episodes:
        raise ValueError(
            f"num_slots is {num_slots}, needs at most {num_episodes}, the number of "
            "episodes that are asked for"
        )
    if env.max_steps is None:
        raise ValueError(
            f"environment {env.name} has no max_steps, so whole episodes may never "
            "end; wrap it in with_time_limit or roll out segments"
        )
    return -(-num_episodes // num_slots) * env.max_steps


def _empty_buffer(decide: Any, slots: Slot, capacity: int) -> Trajectory:
    shapes = jax.eval_shape(decide, slots)[1]
    return jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)


def _write(buffer: Trajectory, decision: Trajectory, step: Array) -> Trajectory:
    def write(rows: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(rows, row, step, 0)

    return jax.tree.map(write, buffer, decision)


def _rows_first(decisions: Trajectory) -> Trajectory:
    """From time-major, as loops write it, to the library's [B, T, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), decisions)
