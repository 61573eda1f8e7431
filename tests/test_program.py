"""The training program: what it tells, what it hands on, and what it observes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.algos.a2c import A2CConfig
from jaxpg.algos.base import make_task
from jaxpg.algos.natural import ENACConfig
from jaxpg.algos.off_policy import OffPolicyConfig
from jaxpg.algos.ppo import PPOConfig
from jaxpg.algos.registry import RECIPES
from jaxpg.algos.vtrace import VTraceConfig
from jaxpg.critics import policy_rows
from jaxpg.envs.probes import endless_reward, obs_and_action_reward, remember_first
from jaxpg.episodes import ended_episodes
from jaxpg.train import program
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.models import build_critic, build_policy
from jaxpg.train.program import Collector, build_program
from jaxpg.train.run import initial_seeds
from jaxpg.train.sharding import place
from jaxpg.types import Trajectory

TINY = PolicyConfig(hidden=(3,))


def config_of(algorithm, **changes):
    settings = {"num_envs": 4, "policy": TINY, "algorithm": algorithm}
    return TrainConfig(**(settings | changes))


def program_of(config, env):
    policy, critic = build_policy(config, env), build_critic(config, env)
    return build_program(config, env, policy, critic, place(1))


# What it tells.


def rows_of(reward, terminated, truncated, mask, time):
    shape = np.shape(reward)
    return Trajectory(
        obs=jnp.zeros((*shape, 1)),
        action=jnp.zeros(shape, jnp.int32),
        log_prob=jnp.zeros(shape),
        reward=jnp.array(reward, float),
        terminated=jnp.array(terminated, bool),
        truncated=jnp.array(truncated, bool),
        mask=jnp.array(mask, bool),
        time=jnp.array(time, jnp.int32),
        episode_id=jnp.zeros(shape, jnp.int32),
    )


def test_statistics_of_segments_by_hand():
    rows = rows_of(
        reward=[[1, 2, 4, 8], [16, 32, 64, 128]],
        terminated=[[0, 1, 0, 0], [0, 0, 0, 0]],
        truncated=[[0, 0, 0, 1], [0, 0, 0, 0]],
        mask=np.ones((2, 4)),
        time=[[7, 8, 0, 1], [0, 1, 2, 3]],
    )
    told = program._of_segments(ended_episodes(rows, jnp.array([100.0, 1000.0])))
    # Ended: one that brought 100 and took 9 decisions in all, and one of 4 + 8.
    assert told["mean_return"] == (103.0 + 12.0) / 2
    assert told["mean_length"] == (9 + 2) / 2
    assert told["num_episodes"] == 2 and told["num_steps"] == 8


def test_where_no_episode_ended_there_is_no_mean():
    rows = rows_of([[1, 2]], [[0, 0]], [[0, 0]], [[1, 1]], [[0, 1]])
    told = program._of_segments(ended_episodes(rows, jnp.zeros(1)))
    assert np.isnan(told["mean_return"]) and np.isnan(told["mean_length"])
    assert told["num_episodes"] == 0 and told["num_steps"] == 2


def test_statistics_of_whole_episodes_by_hand():
    # Episodes (1, 2), (4) and (8), and an empty slot that holds 100.
    rows = rows_of(
        reward=[[1, 2, 4], [8, 100, 100]],
        terminated=[[0, 1, 1], [1, 1, 1]],
        truncated=np.zeros((2, 3)),
        mask=[[1, 1, 1], [1, 0, 0]],
        time=[[0, 1, 0], [0, 0, 0]],
    )
    told = program._of_episodes(rows)
    np.testing.assert_allclose(told["mean_return"], 15 / 3)
    np.testing.assert_allclose(told["mean_length"], 4 / 3)
    assert told["num_episodes"] == 3 and told["num_steps"] == 4


def test_segments_go_on_where_the_last_ones_stopped():
    """Episodes of 5 decisions and reward 5, met in segments of 3."""
    config = config_of(A2CConfig(num_steps=3))
    run = program_of(config, endless_reward(5))
    state = run.init(initial_seeds(config))
    times, told = [], []
    for _ in range(4):
        state, metrics = run.advance(state, 1)
        times.append(np.asarray(state.rollout.slots.time[0]))
        told.append({name: float(x[0, 0]) for name, x in metrics.items()})
    np.testing.assert_array_equal(times, np.array([[3], [1], [4], [2]]) + np.zeros(4))
    assert [row["num_episodes"] for row in told] == [0, 4, 0, 4]
    assert np.isnan([told[0]["mean_return"], told[2]["mean_return"]]).all()
    assert [told[i]["mean_return"] for i in (1, 3)] == [5.0, 5.0]
    assert [told[i]["mean_length"] for i in (1, 3)] == [5.0, 5.0]
    np.testing.assert_array_equal(state.rollout.episode_return, np.full((1, 4), 2.0))
    assert state.update == 4


def test_updates_in_one_call_are_updates_in_several():
    config = config_of(A2CConfig(num_steps=3), num_seeds=2)
    run = program_of(config, endless_reward(5))
    one, first = run.advance(run.init(initial_seeds(config)), 3)
    state, rows = run.init(initial_seeds(config)), []
    for _ in range(3):
        state, metrics = run.advance(state, 1)
        rows.append(metrics["critic_loss"][0])
    for x, y in zip(
        jax.tree.leaves(one.algorithm), jax.tree.leaves(state.algorithm), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(first["critic_loss"][:3], np.stack(rows))


# Statistics of observations.


class Learning:
    """A member's updates, one at a time, with the rows that each has seen."""

    def __init__(self, algorithm, env, policy=TINY):
        settings = dataclasses.replace(policy, normalize_observations=True)
        self.config = config_of(algorithm, policy=settings)
        self.critic = build_critic(self.config, env)
        self.policy = build_policy(self.config, env)
        task = make_task(env, self.policy, critic=self.critic, num_updates=9)
        made = RECIPES[self.config.algorithm_name].make(algorithm, task)
        self.collector = Collector(self.config, env, made, place(1))
        self.state = jax.jit(self.collector.init)(jnp.int32(0))

    @functools.cached_property
    def _turn(self):
        collector = self.collector

        def turn(state):
            params = collector.algorithm.actor_params(state.algorithm)
            key = jax.random.fold_in(state.key, program.EPISODES)
            rows, _ = collector._segments(params, key, state.rollout)
            return rows, *collector.update(state)

        return jax.jit(turn)

    def update(self):
        """The rows that an update saw, and the algorithm's state before it."""
        before = self.state
        rows, self.state, self.info = self._turn(before)
        return rows, before.algorithm


def statistics_in(params):
    return params["network"]["observations"]


def assert_statistics_of(statistics, obs):
    """Those of all observations that were ever made, by NumPy."""
    seen = np.concatenate([np.asarray(x, np.float64).reshape(-1, 1) for x in obs])
    assert statistics.num_samples == len(seen)
    np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    variance = statistics.squares / statistics.num_samples
    np.testing.assert_allclose(variance, seen.var(0), rtol=1e-4)


def test_observations_are_counted_once_and_frozen_meanwhile():
    """With memory in policy and critic, over segments that cut episodes."""
    policy = PolicyConfig(hidden=(3,), memory=3)
    settings = {"num_steps": 3, "num_epochs": 1, "num_minibatches": 1}
    algorithm = PPOConfig(learning_rate=0.1, **settings)
    learning = Learning(algorithm, remember_first(4), policy)
    unroll = jax.jit(jax.vmap(learning.policy.unroll, (None, 0)))
    seen = []
    for number in range(3):
        rows, before = learning.update()
        # Whoever is asked at the old parameters says what was said while collecting.
        own = policy_rows(learning.critic, rows)
        log_probs = unroll(before.params, own).log_prob(rows.action)
        np.testing.assert_allclose(log_probs, rows.log_prob, rtol=1e-5, atol=1e-6)
        # And so does the update: at its only step every ratio is 1 but for rounding.
        assert learning.info["kl"] < 1e-11 and learning.info["clip_fraction"] == 0.0
        seen.append(rows.obs)
        state = learning.state.algorithm
        assert_statistics_of(statistics_in(state.params), seen)
        assert_statistics_of(state.critic.params["observations"], seen)
        assert statistics_in(before.params).num_samples == 12 * number
    # So that the test can fail: with the later statistics it says something else.
    moved = {**before.params, "network": {**before.params["network"]}}
    moved["network"]["observations"] = statistics_in(state.params)
    log_probs = unroll(moved, own).log_prob(rows.action)
    assert np.abs(log_probs - rows.log_prob).max() > 1e-4


@pytest.mark.parametrize("lag", [1, 2])
def test_an_older_self_keeps_its_statistics_until_it_is_renewed(lag):
    learning = Learning(
        VTraceConfig(num_steps=3, behaviour_lag=lag, num_epochs=1, learning_rate=0.1),
        endless_reward(4) if lag > 2 else remember_first(4),
    )
    states = [learning.state.algorithm]
    for _ in range(4):
        learning.update()
        states.append(learning.state.algorithm)
    for number, state in enumerate(states):
        renewed = states[number - number % lag]
        for x, y in zip(
            jax.tree.leaves(state.behaviour.params),
            jax.tree.leaves(renewed.params),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
    assert statistics_in(states[4].params).num_samples == 4 * 12


# Settings that are swept.


def test_swept_values_reach_the_algorithm():
    """Adam's first step is as long as the rate, whatever the gradient."""
    rates = (0.001, 0.01, 0.1)
    config = config_of(
        A2CConfig(num_steps=4),
        num_seeds=2,
        sweep=(("learning_rate", rates),),
    )
    run = program_of(config, obs_and_action_reward())
    before = run.init(initial_seeds(config))
    weights = jax.tree.map(np.asarray, before.algorithm.params)
    after, _ = run.advance(before, 1)
    moved = jax.tree.map(
        lambda x, y: np.abs(np.asarray(x) - y).reshape(6, -1).max(1),
        after.algorithm.params,
        weights,
    )
    longest = np.max([x for x in jax.tree.leaves(moved) if x.size], axis=0)
    np.testing.assert_allclose(longest, np.repeat(rates, 2), rtol=0.02)


def test_swept_discounts_reach_the_critic():
    """Endless reward of 1 with lambda 1: targets are sums of discount^t."""
    config = config_of(
        A2CConfig(num_steps=4, lambda_=1.0, bootstrap_truncated=False),
        sweep=(("discount", (0.0, 0.5)),),
    )
    run = program_of(config, endless_reward(4))
    state, _ = run.advance(run.init(initial_seeds(config)), 1)
    means = state.algorithm.critic.targets.mean
    # 1; and the mean of 1.875, 1.75, 1.5 and 1.
    np.testing.assert_allclose(means, [1.0, 6.125 / 4], rtol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("algorithm", "who"),
    [
        (ENACConfig(episodes_per_env=1), "enac"),
        (OffPolicyConfig(episodes_per_env=1, baseline="leave-one-out"), "baseline"),
    ],
)
def test_too_few_episodes_are_refused(algorithm, who):
    config = config_of(algorithm, num_envs=1)
    with pytest.raises(
        ValueError, match=f"episodes_per_env is 1, but {who}.* at least"
    ):
        program_of(config, obs_and_action_reward())
