"""Batches played again are the stored ones: same update, less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.algos.base import make_task
from jaxpg.algos.ppo import PPOConfig, ppo
from jaxpg.envs import make
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.models import build_critic, build_policy
from jaxpg.train.program import Collector
from jaxpg.train.run import create_run, initial_state, open_run
from jaxpg.train.sharding import place

ENV = make("CartPole-v1", max_steps=12)  # cut off by the clock, now and then
NUM_ENVS, NUM_STEPS = 16, 16
STORED = PPOConfig(
    num_steps=NUM_STEPS,
    num_epochs=2,
    num_minibatches=2,
    standardize="batch",
    chunk_size=16,
)
SETTINGS = {
    "plain": {},
    "not standardised": {"standardize": "none"},
    "a penalty": {"form": "kl-penalty", "clip_values": 0.5, "entropy_coefficient": 0.1},
    "stopped": {"stop_at_kl": 1e-6, "learning_rate": 0.1},
    "with memory": {"memory": 3},
    "normalised": {"normalize_observations": True},
}
POLICY_SETTINGS = ("memory", "normalize_observations")


def split(settings):
    policy = {name: settings[name] for name in POLICY_SETTINGS if name in settings}
    return policy, {k: x for k, x in settings.items() if k not in POLICY_SETTINGS}


def collector(settings, replay_envs=None, num_devices=1, num_envs=NUM_ENVS):
    """A run's updates; rows stay whole in both forms, so that minibatches are alike.

    Replayed rows do by themselves; stored ones do as if the policy had a memory.
    """
    policy_settings, settings = split(settings)
    algorithm = dataclasses.replace(STORED, replay_envs=replay_envs, **settings)
    config = TrainConfig(
        env="CartPole-v1",
        num_envs=num_envs,
        algorithm=algorithm,
        policy=PolicyConfig(hidden=(4,), **policy_settings),
    )
    policy = build_policy(config, ENV)
    if replay_envs is None:
        policy = policy._replace(is_recurrent=True)
    placement = place(num_devices, num_envs=num_envs)
    task = make_task(
        ENV,
        policy,
        critic=build_critic(config, ENV),
        num_updates=3,
        sum_over_rows=placement.sum_over_rows,
        map_rows=placement.map_rows,
        num_rows=num_envs,
        num_devices=num_devices,
    )
    return Collector(config, ENV, ppo(algorithm, task), placement)


def after_three(settings, **how):
    """State and numbers after three updates, as plain arrays."""
    updates = collector(settings, **how)
    state, update = jax.jit(updates.init)(jnp.int32(5)), jax.jit(updates.update)
    for _ in range(3):
        state, told = update(state)
    slots = state.rollout.slots
    slots = slots._replace(key=jax.random.key_data(slots.key))
    state = state._replace(key=None, rollout=state.rollout._replace(slots=slots))
    return jax.tree.map(np.asarray, (state, told))


@functools.cache
def stored(name):
    with jax.enable_x64(True):
        return after_three(SETTINGS[name])


# Environments that are replayed together, and devices. Three leave a rest.
SOME, REST, ALL, SPREAD = (4, 1), (3, 1), (64, 1), (2, 4)


@pytest.mark.thinned(8)
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("plain", SPREAD),
        ("plain", SOME),
        ("plain", ALL),
        ("with memory", REST),
        ("stopped", SOME),
        ("not standardised", SOME),
        ("a penalty", SOME),
        ("normalised", SPREAD),
    ],
)
def test_an_update_is_the_stored_batches(name, how, float64):
    replay_envs, num_devices = how
    expected = stored(name)
    found = after_three(
        SETTINGS[name], replay_envs=replay_envs, num_devices=num_devices
    )
    assert expected[1]["num_episodes"] > 0
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            x, y, rtol=1e-8, atol=1e-9, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.exhaustive
def test_memory_is_that_of_the_rows_played_together():
    def working(num_envs, replay_envs):
        updates = collector({}, replay_envs=replay_envs, num_envs=num_envs)
        state = jax.eval_shape(updates.init, jnp.int32(5))
        compiled = jax.jit(updates.update).lower(state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    slots = 200  # bytes of a slot and its numbers, an upper bound
    batch = 256 * NUM_STEPS * 40  # less than what is stored of so many rows
    few, many = working(64, 16), working(1024, 16)
    assert many - few < slots * (1024 - 64)
    assert working(1024, None) > few + batch


@pytest.mark.exhaustive
def test_numbers_that_are_none_are_counted_as_in_the_stored_form():
    def step(key, state, action):
        after, output = ENV.step(key, state, action)
        broken = jnp.abs(output.obs[0]) > 0.05
        return after, output._replace(reward=jnp.where(broken, jnp.nan, output.reward))

    broken = ENV._replace(step=step)

    def counted(replay_envs):
        updates = collector({}, replay_envs=replay_envs)._replace(env=broken)
        told = jax.jit(lambda: updates.update(updates.init(jnp.int32(5)))[1])()
        return int(told["non_finite_batch"])

    assert counted(None) > 0
    # The survey's variance is none either, and counts as one more.
    assert counted(4) == counted(None) + 1


@pytest.mark.exhaustive
def test_a_swept_run_on_two_devices_goes_on_alone(tmp_path):
    """Members side by side, several devices, and any number of them afterwards."""
    config = TrainConfig(
        env="CartPole-v1",
        num_envs=12,
        num_devices=2,
        num_updates=4,
        num_seeds=2,
        sweep=(("discount", (0.9, 0.99)),),
        algorithm=dataclasses.replace(STORED, replay_envs=5, num_minibatches=3),
        policy=PolicyConfig(hidden=(4,)),
        runs_dir=tmp_path,
        name="run",
    )
    run = create_run(config)
    _, told = run.program.advance(initial_state(run), np.int32(2))
    assert np.isfinite(np.asarray(told["kl"])[:2]).all()
    assert (np.asarray(told["num_steps"])[:2] == 12 * NUM_STEPS).all()
    again = open_run(run.folder, num_devices=1)
    _, told_alone = again.program.advance(initial_state(again), np.int32(2))
    for name in ("kl", "mean_return", "explained_variance"):
        np.testing.assert_allclose(told[name][:2], told_alone[name][:2], rtol=1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"standardize is 'minibatch', .* 'batch'"):
        PPOConfig(replay_envs=4)
    with pytest.raises(ValueError, match="replay_envs is 0"):
        PPOConfig(replay_envs=0, standardize="batch")
    with pytest.raises(ValueError, match=r"needs a divisor of num_envs = 3, .* replay"):
        collector({}, replay_envs=4, num_envs=3)
