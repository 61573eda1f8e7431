"""Slots: where episodes run, one after the other, side by side with others.

A slot is all that the next decision depends on. One begins an episode, takes a decision
and, where its episode has ended, begins the next; loops over many of them are the
business of `jaxpg.rollout`. Every key derives from the episode's number and the
decision's, so where and beside whom an episode runs changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxpg._batching import anywhere
from jaxpg._unrolled import plain, unrolled, with_unrolled
from jaxpg.envs.base import Environment
from jaxpg.policies import Policy
from jaxpg.types import Params, PRNGKey, PyTree, StepOutput, Trajectory

__all__ = ["FEW", "Slot", "decide", "few_of", "restart_ended", "select", "start_slot"]

FEW = 8
"""Slots are few where they are this part of all, or less."""


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


def few_of(num_slots: int) -> int:
    """How many slots are few, and worked on alone: none where work is launched.

    On CPU the work on a slot costs time, and slots without work are left out; on
    accelerators each launch costs the time, and all slots are worked on together.

    >>> few_of(64) in (0, 8)
    True
    """
    return num_slots // FEW if jax.default_backend() == "cpu" else 0


def start_slot(
    env: Environment,
    policy: Policy,
    key: PRNGKey,
    episode_id: Array,
    group_size: int = 1,
) -> Slot:
    """A slot at the beginning of an episode.

    Args:
        env: the world.
        policy: for its initial memory.
        key: the key that all episodes derive from.
        episode_id: which one begins.
        group_size: episodes i with the same `i // group_size` begin alike.

    Returns:
        The slot before its first decision.
    """
    key_episode, key_reset = _two_keys(key, episode_id)
    if group_size > 1:  # the reset of the group's first episode, for all of them
        _, key_reset = _two_keys(key, episode_id - episode_id % group_size)
    env_state, obs = with_unrolled(env.reset, key_reset)
    time = jnp.zeros((), jnp.int32)
    return Slot(key_episode, env_state, obs, policy.initial_carry(), time, episode_id)


def decide(
    env: Environment, policy: Policy, params: Params, slot: Slot, keep_next_obs: bool
) -> tuple[Slot, Trajectory]:
    """One decision of one slot.

    Args:
        env: the world.
        policy: chooses the action.
        params: the policy's parameters.
        slot: before the decision.
        keep_next_obs: whether its facts have `next_obs`.

    Returns:
        The slot after it, and its facts, of one entry each.
    """
    key_action, key_step = _decision_keys(slot, policy.noise_hold)
    distribution, carry = policy.step(params, slot.carry, slot.obs)
    action = distribution.sample(key_action)
    env_state, output = with_unrolled(
        env.step, key_step, slot.env_state, distribution.to_env(action)
    )
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


def restart_ended(
    restart: Callable[[Array], PyTree],
    ids: Array,
    ends: Bool[Array, " M"],
    slots: PyTree,
) -> PyTree:
    """Slots that have ended begin the episodes `ids`; the others go on.

    Of many slots few end together, and on CPU those are reset a few at a time: a reset
    of all for their sake halves the rate of fast worlds, and one for each case would be
    compiled twice. Where launching work is what costs, all are reset together.

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
    few = few_of(ends.shape[0])
    num_ended = jnp.sum(ends, dtype=jnp.int32)

    def of_all() -> PyTree:
        return select(ends, restart(ids), slots)

    def of_those() -> PyTree:
        return _restarted_few_by_few(restart, ids, ends, slots, few)

    restarted = of_all if few == 0 else of_those
    return jax.lax.cond(anywhere(num_ended > 0), restarted, lambda: slots)


def _restarted_few_by_few(
    restart: Callable[[Array], PyTree],
    ids: Array,
    ends: Bool[Array, " M"],
    slots: PyTree,
    few: int,
) -> PyTree:
    """Those that have ended begin anew, `few` at a time, and are handed out last."""
    num_slots = ends.shape[0]
    room = few * -(-num_slots // few)
    so_far = jnp.cumsum(ends, dtype=jnp.int32)
    num_ended, index = so_far[-1], jnp.arange(num_slots, dtype=jnp.int32)
    # One of indices alone: a scatter goes entry by entry on CPU, and leaf by leaf.
    ended = jnp.zeros((room,), jnp.int32)
    ended = ended.at[jnp.where(ends, so_far - 1, room)].set(index, mode="drop")

    def unfinished(carry: tuple[Array, PyTree]) -> Array:
        return anywhere(carry[0] < num_ended)

    def restart_next(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        done, fresh = carry
        which = jax.lax.dynamic_slice_in_dim(ended, done, few)
        some = restart(ids[which])
        put = jax.lax.dynamic_update_slice_in_dim
        fresh = jax.tree.map(lambda x, y: put(x, y, done, 0), fresh, some)
        return done + few, fresh

    empty = jax.tree.map(
        lambda x: jnp.zeros((room, *x.shape[1:]), x.dtype),
        jax.eval_shape(restart, ids[:few]),
    )
    start = jnp.zeros((), jnp.int32), empty
    _, fresh = jax.lax.while_loop(unfinished, restart_next, start)
    place = jnp.maximum(so_far - 1, 0)
    return select(ends, jax.tree.map(lambda x: x[place], fresh), slots)


def select(where: Bool[Array, " M"], new: PyTree, old: PyTree) -> PyTree:
    """Some slots of one tree, the others of another.

    Args:
        where: which are taken of `new`.
        new: a tree with M in front.
        old: a tree of the same structure.

    Returns:
        A tree of the same structure.

    >>> select(jnp.array([True, False]), jnp.ones((2, 1)), jnp.zeros((2, 1))).tolist()
    [[1.0], [0.0]]
    """

    def of_leaf(x: Array, y: Array) -> Array:
        flags = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
        return jnp.where(jnp.broadcast_to(flags, x.shape), x, y)

    return jax.tree.map(of_leaf, new, old)
