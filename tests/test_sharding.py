"""Many devices give what one gives, and talk to each other once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.algos.base import make_task
from jaxpg.algos.reinforce import ReinforceConfig, reinforce
from jaxpg.chunks import Chunks, sum_over_chunks
from jaxpg.envs import Discrete, with_time_limit
from jaxpg.envs.probes import obs_and_action_reward
from jaxpg.envs.tabular import random_mdp, tabular_environment
from jaxpg.gradients import score_gradient
from jaxpg.policies import log_prob_fn, mlp_policy
from jaxpg.rollout import rollout_episodes
from jaxpg.train.sharding import largest_device_count, place

DEVICES, NUM_EPISODES = 8, 32
CONFIG = ReinforceConfig(chunk_size=8)


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def world():
    env = with_time_limit(
        tabular_environment(random_mdp(1, num_states=4, horizon=5)), 5
    )
    return env, mlp_policy(Discrete(4), env.action_space, hidden=(8,))


def one_update(placement, config=CONFIG):
    """Rollout, gradient and step; every device packs its part of the episodes."""
    env, policy = world()
    task = make_task(
        env,
        policy,
        sum_over_rows=placement.sum_over_rows,
        map_rows=placement.map_rows,
    )
    algorithm = reinforce(config, task)
    per_device = NUM_EPISODES // placement.num_devices

    def rows(params, ids):
        key = jax.random.key(1)
        slots = per_device // 2
        return rollout_episodes(env, policy, params, key, ids, num_slots=slots)

    def update(key):
        state = algorithm.init(key, jnp.array(0, jnp.int32))
        ids = jnp.arange(NUM_EPISODES, dtype=jnp.int32)
        trajectories = placement.map_rows(rows, state.params, ids)
        after, info = algorithm.update(key, state, trajectories)
        # Adam's first step is the gradient's sign alone: the norm says more.
        return after, info, trajectories.num_decisions

    return update


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_updates_agree(rtol, config):
    key = jax.random.key(0)
    alone = quick(one_update(place(1), config))(key)
    spread = quick(one_update(place(DEVICES, num_episodes=NUM_EPISODES), config))(key)
    assert alone[2] == spread[2] > NUM_EPISODES
    assert alone[1]["grad_norm"] > 1e-3
    for x, y in zip(leaves(alone), leaves(spread), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "config",
    [
        # test_devices has it for every algorithm.
        pytest.param(CONFIG, marks=pytest.mark.exhaustive),
        ReinforceConfig(chunk_size=None, baseline="batch-mean", standardize=True),
    ],
    ids=["default", "whole-batch statistics"],
)
def test_one_update_equals_one_devices_in_float64(config, float64):
    assert_updates_agree(1e-10, config)


@pytest.mark.exhaustive
def test_one_update_equals_one_devices_in_float32():
    assert_updates_agree(1e-5, CONFIG)


def batch():
    env, policy = world()
    key = jax.random.key(0)
    params = quick(policy.init)(key, jnp.array(0, jnp.int32))
    ids = jnp.arange(NUM_EPISODES, dtype=jnp.int32)
    rows = quick(
        lambda params: rollout_episodes(env, policy, params, key, ids, num_slots=16)
    )(params)
    weights = jnp.where(rows.mask, jax.random.normal(key, rows.mask.shape), 0.0)
    return log_prob_fn(policy), params, rows, weights


@pytest.mark.parametrize("chunks", [Chunks(), Chunks(7), Chunks(7, cut_rows=True)])
@pytest.mark.thinned(2)
def test_sharded_gradient_equals_the_whole(chunks):
    fn, params, rows, weights = batch()
    sharded = quick(
        lambda params, rows, weights: score_gradient(
            fn,
            params,
            rows,
            weights,
            chunks=chunks,
            sum_over_rows=place(DEVICES, rows=16).sum_over_rows,
        )
    )(params, rows, weights)
    whole = quick(lambda p, r, w: score_gradient(fn, p, r, w))(params, rows, weights)
    for x, y in zip(leaves(sharded), leaves(whole), strict=True):
        assert np.abs(y).max() > 0
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


COLLECTIVE = r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\("


def collectives(compiled):
    """Names of the operations in which devices talk, in the program that runs."""
    text = re.sub(r"\([^()]*\) (?=all-|collective-)", "tuple ", compiled.as_text())
    return re.findall(COLLECTIVE, text)


def test_a_sharded_gradient_costs_one_all_reduce():
    fn, params, rows, weights = batch()
    placement = place(DEVICES, rows=16)
    over_rows = jax.sharding.NamedSharding(
        placement.replicated.mesh, jax.sharding.PartitionSpec("rows")
    )
    rows, weights = jax.device_put((rows, weights), over_rows)
    params = jax.device_put(params, placement.replicated)
    gradient = jax.jit(
        lambda params, rows, weights: score_gradient(
            fn,
            params,
            rows,
            weights,
            chunks=Chunks(7, cut_rows=True),
            sum_over_rows=placement.sum_over_rows,
        )
    )
    compiled = gradient.lower(params, rows, weights).compile()
    assert collectives(compiled) == ["all-reduce"]
    # The partitioner left to itself: so that the count above can fail.
    left_alone = jax.jit(
        lambda params, rows, weights: score_gradient(
            fn, params, rows, weights, chunks=Chunks(7, cut_rows=True)
        )
    )
    talk = collectives(left_alone.lower(params, rows, weights).compile())
    assert talk != ["all-reduce"]


def test_a_rollout_costs_no_talk_at_all():
    env, policy = world()
    placement = place(DEVICES, num_episodes=NUM_EPISODES)

    def rows(params, ids):
        key = jax.random.key(1)
        return rollout_episodes(env, policy, params, key, ids, num_slots=2)

    params = jax.device_put(batch()[1], placement.replicated)
    spread = jax.jit(
        lambda params: placement.map_rows(
            rows, params, jnp.arange(NUM_EPISODES, dtype=jnp.int32)
        )
    )
    assert collectives(spread.lower(params).compile()) == []


def test_over_seeds_by_vmap_it_equals_separate_runs():
    keys = jax.random.split(jax.random.key(3))
    update = one_update(place(DEVICES, num_episodes=NUM_EPISODES))
    together = quick(jax.vmap(update))(keys)
    alone = quick(update)(keys[1])
    for x, y in zip(leaves(together), leaves(alone), strict=True):
        np.testing.assert_allclose(x[1], y, rtol=1e-4, atol=1e-5)


def test_one_device_wraps_nothing():
    placement = place(1, num_envs=3)
    assert placement.sum_over_rows is sum_over_chunks
    assert placement.map_rows(lambda a, b: (a, b), 1, 2) == (1, 2)
    assert placement.replicated.device_set == {jax.devices()[0]}


def test_devices_used_are_the_first_ones():
    assert place(3, num_envs=6).replicated.device_set == set(jax.devices()[:3])


@pytest.mark.parametrize(
    ("available", "counts", "most"),
    [
        (8, (12, 100), 4),
        (8, (64,), 8),
        (8, (7,), 7),
        (6, (7,), 1),
        (1, (64,), 1),
        (8, (12, 9), 3),
        (3, (4,), 2),
    ],
)
def test_largest_device_count(available, counts, most):
    assert largest_device_count(available, *counts) == most


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: place(9),
            "^num_devices is 9, but JAX sees 8; .*--num-devices.*jax_num_cpu_devices",
        ),
        (
            lambda: place(8, num_envs=12),
            "^num_devices is 8, needs a divisor of num_envs = 12; the nearest is 6",
        ),
        (
            lambda: place(8, num_envs=16, episodes=4),
            "^num_devices is 8, needs a divisor of episodes = 4; the nearest is 4",
        ),
        (lambda: place(0), "^num_devices is 0, needs a whole number of at least 1"),
    ],
)
def test_what_does_not_divide_is_refused_with_a_cure(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_probe_world_rows_stay_on_their_devices():
    env = obs_and_action_reward()
    policy = mlp_policy(env.observation_space, env.action_space, hidden=())
    params = quick(policy.init)(jax.random.key(0), jnp.zeros(1))
    placement = place(4, num_episodes=8)
    spread = jax.jit(
        lambda params: placement.map_rows(
            lambda p, ids: rollout_episodes(env, policy, p, jax.random.key(0), ids),
            params,
            jnp.arange(8, dtype=jnp.int32),
        )
    )(params)
    parts = [np.ravel(part.data) for part in spread.episode_id.addressable_shards]
    np.testing.assert_array_equal(parts, np.arange(8).reshape(4, 2))
