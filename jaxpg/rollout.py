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
On CPU the last few are moved together and played to their ends alone, for the longest
of many episodes is several times as long as most.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg._batching import anywhere
from jaxpg._checks import check_positive
from jaxpg._tracing import traced_once
from jaxpg.envs.base import Environment
from jaxpg.pages import empty_rows, page_of, turned, with_page, written
from jaxpg.policies import Policy
from jaxpg.slots import Slot, decide, few_of, restart_ended, select, start_slot
from jaxpg.types import Params, PRNGKey, Trajectory

__all__ = [
    "RolloutState",
    "rollout_episodes",
    "rollout_segments",
    "start_segments",
]


WORTH_MOVING = 64
"""Slots from which on the last few that run are played apart. With less there is little
to gain for a second loop, which takes a second to compile."""


class RolloutState(NamedTuple):
    """What continuing segments hand on: the slots, and each one's running return.

    Attributes:
        slots: M slots.
        stride: what an episode's number grows by when its slot begins the next, [M].
        episode_return: undiscounted reward of the running episode so far, [M].
    """

    slots: Slot
    stride: Int[Array, " M"]
    episode_return: Float[Array, " M"]


class Loop(NamedTuple):
    """What the episode loop carries.

    Attributes:
        step: turns of the loop so far.
        slots: M slots.
        running: whether a slot's episode is one of those asked for, [M].
        num_started: episodes taken from the queue.
        decisions: so far, time first on a page and in rows elsewhere.
    """

    step: Array
    slots: Slot
    running: Array
    num_started: Array
    decisions: Trajectory


Moved = tuple[Slot, Array, Array]
"""Slots, whether they run, and how many episodes have started, for the next turn."""


def rollout_episodes(
    env: Environment,
    policy: Policy,
    params: Params,
    key: PRNGKey,
    episode_ids: Int[Array, " N"],
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
    restart = jax.vmap(lambda i: start_slot(env, policy, key, i, group_size))
    decide_all = traced_once(
        jax.vmap(lambda x: decide(env, policy, params, x, keep_next_obs))
    )

    def take_next(loop: Loop, slots: Slot, ends: Array) -> Moved:
        return _next_episodes(restart, episode_ids, loop, slots, ends)

    def play(loop: Loop, until: int, move: Callable[..., Moved]) -> Loop:
        def unfinished(loop: Loop) -> Array:
            many = anywhere(jnp.sum(loop.running) > until)
            return many & (loop.step < capacity)

        def play_page(loop: Loop) -> Loop:
            page, first = page_of(loop.decisions, loop.step)
            end = first + page.mask.shape[0]

            def advance(loop: Loop) -> Loop:
                slots, decision = decide_all(loop.slots)
                decision = decision._replace(mask=loop.running)
                ends = decision.terminated | decision.truncated
                page = written(loop.decisions, decision, loop.step - first)
                return Loop(loop.step + 1, *move(loop, slots, ends), page)

            played = jax.lax.while_loop(
                lambda loop: unfinished(loop) & (loop.step < end),
                advance,
                loop._replace(decisions=page),
            )
            return played._replace(
                decisions=with_page(loop.decisions, played.decisions, first)
            )

        return jax.lax.while_loop(unfinished, play_page, loop)

    slots = restart(episode_ids[:num_slots])
    loop = Loop(
        jnp.zeros((), jnp.int32),
        slots,
        jnp.ones((num_slots,), bool),
        jnp.asarray(num_slots, jnp.int32),
        empty_rows(decide_all, slots, capacity),
    )
    few = few_of(num_slots) if num_slots >= WORTH_MOVING else 0
    loop = play(loop, few, _hold if num_slots == num_episodes else take_next)
    if few == 0:
        return loop.decisions
    return _with_last(few, loop, lambda last: play(last, 0, _hold))


def start_segments(
    env: Environment,
    policy: Policy,
    key: PRNGKey,
    num_slots: int,
    slot_ids: Int[Array, " M"] | None = None,
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
    slots = jax.vmap(lambda i: start_slot(env, policy, key, i))(ids)
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
    restart = jax.vmap(lambda i: start_slot(env, policy, key, i))
    decide_all = jax.vmap(lambda x: decide(env, policy, params, x, keep_next_obs))

    def advance(
        carry: tuple[Slot, Array], _: None
    ) -> tuple[tuple[Slot, Array], Trajectory]:
        slots, episode_return = carry
        slots, decision = decide_all(slots)
        ends = decision.terminated | decision.truncated

        slots = restart_ended(restart, slots.episode_id + state.stride, ends, slots)
        episode_return = jnp.where(ends, 0.0, episode_return + decision.reward)
        return (slots, episode_return), decision

    first_carry = state.slots.carry
    (slots, episode_return), decisions = jax.lax.scan(
        advance, (state.slots, state.episode_return), None, num_steps
    )
    trajectory = turned(decisions)._replace(carry=first_carry)
    return trajectory, RolloutState(slots, state.stride, episode_return)


def _hold(loop: Loop, slots: Slot, ends: Array) -> Moved:
    """Slots that have ended take their last decision again and again, masked.

    So their states stay ordinary ones, and nothing non-finite creeps into the rows.
    """
    running = loop.running & ~ends
    return select(running, slots, loop.slots), running, loop.num_started


def _next_episodes(
    restart: Callable[[Array], Slot],
    episode_ids: Array,
    loop: Loop,
    slots: Slot,
    ends: Array,
) -> Moved:
    """Hand the queue's next episodes to the slots whose episode ended.

    A slot that finds the queue empty plays its last episode again, masked.
    """
    free = ends & loop.running
    place = loop.num_started + jnp.cumsum(free, dtype=jnp.int32) - 1
    has_next = free & (place < episode_ids.shape[0])
    ids = jnp.where(
        has_next,
        episode_ids[jnp.clip(place, 0, episode_ids.shape[0] - 1)],
        slots.episode_id,
    )
    slots = restart_ended(restart, ids, ends, slots)
    num_started = loop.num_started + jnp.sum(free, dtype=jnp.int32)
    return slots, loop.running & (~ends | has_next), num_started


def _with_last(few: int, loop: Loop, play: Callable[[Loop], Loop]) -> Trajectory:
    """The rows after the last few episodes, which are played in slots of their own.

    The queue is empty by then, or all slots would be running.
    """
    which = jnp.argsort(~loop.running)[:few]
    slots, running, rows = jax.tree.map(
        lambda x: x[which], (loop.slots, loop.running, loop.decisions)
    )
    last = play(loop._replace(slots=slots, running=running, decisions=rows))
    return jax.tree.map(lambda x, y: x.at[which].set(y), loop.decisions, last.decisions)


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
