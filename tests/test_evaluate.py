"""Evaluation: every episode counts once, and Gymnasium's world is the same as ours."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import envs
from jaxpg.distributions import Categorical
from jaxpg.envs.base import Box, Discrete, Environment
from jaxpg.heads import categorical_head
from jaxpg.policies import Policy, from_apply, mlp_policy
from jaxpg.train.evaluate import (
    EpisodeResults,
    evaluate,
    evaluate_in_gymnasium,
    summarize,
)
from jaxpg.types import StepOutput

EMPTY: dict = {"network": {}, "head": {}}  # the params of a policy without any


def constant_policy(*logits):
    """The same distribution whatever it sees."""
    head = categorical_head(Discrete(len(logits)))
    return from_apply(lambda key, obs: {}, lambda params, obs: jnp.array(logits), head)


def alternating_policy():
    """Left, right, left, ...: its memory is how often it has acted."""

    def step(params, carry, obs):
        logits = jnp.where(jnp.arange(2) == carry % 2, 30.0, -30.0)
        return Categorical(logits), carry + 1

    def unroll(params, trajectory):
        raise NotImplementedError

    def start():
        return jnp.zeros((), jnp.int32)

    return Policy(lambda key, obs: EMPTY, start, step, unroll, is_recurrent=True)


def of_drawn_length() -> Environment:
    """An episode of 1 .. 9 decisions, drawn at reset; decision t earns t + 1."""

    def reset(key):
        length = jax.random.randint(key, (), 1, 10)
        return (length, jnp.zeros((), jnp.int32)), jnp.zeros((1,))

    def step(key, state, action):
        length, time = state
        last, no = time + 1 >= length, jnp.zeros((), bool)
        reward = time.astype(float) + 1
        return (length, time + 1), StepOutput(jnp.zeros((1,)), reward, last, no)

    space = Box(-1.0, 1.0, (1,))
    return Environment("DrawnLength", reset, step, space, Discrete(2), max_steps=9)


def lengths_by_hand(key, num_episodes):
    """Episode i resets with the second half of fold_in(key, i)."""
    lengths = []
    for i in range(num_episodes):
        _, key_reset = jax.random.split(jax.random.fold_in(key, i))
        lengths.append(int(of_drawn_length().reset(key_reset)[0][0]))
    return np.array(lengths)


@pytest.mark.parametrize("num_envs", [1, 3, 256])
def test_every_episode_is_counted_once(num_envs):
    key, count = jax.random.key(3), 11
    results = evaluate(
        of_drawn_length(),
        constant_policy(0.0, 0.0),
        EMPTY,
        key,
        count,
        num_envs=num_envs,
    )
    expected = lengths_by_hand(key, count)
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(results.lengths, expected)
    # 1 + 2 + ... + L
    np.testing.assert_array_equal(results.returns, expected * (expected + 1) / 2)


@pytest.mark.parametrize("name", ["num_episodes", "num_envs"])
def test_counts_are_positive(name):
    counts = {"num_episodes": 2, "num_envs": 2} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        evaluate(
            of_drawn_length(),
            constant_policy(0.0, 0.0),
            {},
            jax.random.key(0),
            **counts,
        )


def test_greedy_takes_the_mode():
    # Action 1 earns 1 and action 0 costs 1: the mode is right, three draws in ten not.
    env = envs.make("Probe-ActionDependentReward-v0")
    policy = constant_policy(math.log(0.3), math.log(0.7))
    greedy = evaluate(env, policy, EMPTY, jax.random.key(0), 400, greedy=True)
    assert (greedy.returns == 1.0).all()
    drawn = evaluate(env, policy, EMPTY, jax.random.key(0), 400)
    # n = 400, mean 0.4, standard deviation 2 sqrt(0.3 0.7) = 0.917
    assert abs(drawn.returns.mean() - 0.4) < 4 * 0.917 / math.sqrt(400)
    assert (
        evaluate(env, constant_policy(1.0, 0.0), EMPTY, jax.random.key(0), 5).returns
        != greedy.returns[:5]
    ).any()


# --- against Gymnasium itself

CARTPOLE_POLICIES = {
    "coin": (constant_policy(0.0, 0.0), False),
    "left, drawn 7 of 10": (constant_policy(math.log(0.7), math.log(0.3)), False),
    "left, by its mode": (constant_policy(math.log(0.7), math.log(0.3)), True),
    "left and right in turn": (alternating_policy(), False),
}


@pytest.mark.parametrize("name", CARTPOLE_POLICIES)
@pytest.mark.thinned(2)
def test_cartpole_is_gymnasiums(name):
    """|difference of means| under 4 standard errors; n = 1000 ours, 300 Gymnasium's."""
    pytest.importorskip("gymnasium")
    policy, greedy = CARTPOLE_POLICIES[name]
    env = envs.make("CartPole-v1")
    ours = evaluate(env, policy, EMPTY, jax.random.key(1), 1000, greedy=greedy)
    theirs = evaluate_in_gymnasium("CartPole-v1", policy, EMPTY, 2, 300, greedy=greedy)
    assert len(ours.returns) == 1000 and len(theirs.returns) == 300
    # One point for each decision.
    np.testing.assert_array_equal(ours.returns, ours.lengths)
    np.testing.assert_array_equal(theirs.returns, theirs.lengths)
    first, second = summarize(ours), summarize(theirs)
    error = math.hypot(first["standard_error"], second["standard_error"])
    z = (first["mean"] - second["mean"]) / error
    assert abs(z) < 4, f"n = 1000 and 300, z = {z:.2f}, {first}, {second}"


def test_cartpole_tells_these_policies_apart():
    """Or the comparison above could not fail: their means differ by far more."""
    env, means = envs.make("CartPole-v1"), []
    for policy, greedy in CARTPOLE_POLICIES.values():
        results = evaluate(env, policy, EMPTY, jax.random.key(1), 300, greedy=greedy)
        means.append(results.returns.mean())
    coin, drawn, mode, turns = means
    assert mode < 10 < drawn - 2 and drawn + 2 < coin < turns - 2


def test_gymnasium_runs_as_many_episodes_as_asked():
    pytest.importorskip("gymnasium")
    policy = constant_policy(0.0, 0.0)
    seven = evaluate_in_gymnasium("CartPole-v1", policy, EMPTY, 0, 7, num_envs=3)
    assert seven.returns.shape == seven.lengths.shape == (7,)
    again = evaluate_in_gymnasium("CartPole-v1", policy, EMPTY, 0, 7, num_envs=3)
    np.testing.assert_array_equal(seven.returns, again.returns)
    other = evaluate_in_gymnasium("CartPole-v1", policy, EMPTY, 1, 7, num_envs=3)
    assert (seven.returns != other.returns).any()
    one = evaluate_in_gymnasium("CartPole-v1", policy, EMPTY, 0, 1)
    assert one.returns.shape == (1,) and one.lengths[0] >= 8


def test_gymnasium_keeps_the_runs_own_time_limit():
    pytest.importorskip("gymnasium")
    policy = constant_policy(0.0, 0.0)
    short = evaluate_in_gymnasium("CartPole-v1", policy, EMPTY, 0, 4, max_steps=5)
    assert short.lengths.tolist() == [5] * 4


def test_continuous_actions_are_clipped_to_gymnasiums_box():
    pytest.importorskip("gymnasium")
    env = envs.make("Pendulum-v1")
    policy = mlp_policy(env.observation_space, env.action_space, hidden=(4,))
    params = policy.init(jax.random.key(0), jnp.zeros(3))
    results = evaluate_in_gymnasium("Pendulum-v1", policy, params, 0, 2)
    assert results.lengths.tolist() == [200, 200] and (results.returns < -100).all()


def test_unknown_to_gymnasium():
    pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match=r"cannot start 'CartPol-v1'.*--gymnasium"):
        evaluate_in_gymnasium("CartPol-v1", constant_policy(0.0, 0.0), EMPTY, 0, 1)


# --- summaries


def test_summary_by_hand():
    # deviations from 3: -2, -1, 3; variance (4 + 1 + 9) / 2 = 7
    results = EpisodeResults(np.array([1.0, 2.0, 6.0]), np.array([4, 4, 10]))
    assert summarize(results) == pytest.approx(
        {
            "episodes": 3,
            "mean": 3.0,
            "standard_error": math.sqrt(7 / 3),
            "median": 2.0,
            "min": 1.0,
            "max": 6.0,
            "mean_length": 6.0,
            "length_min": 4.0,
            "length_max": 10.0,
        }
    )


def test_summary_of_one_episode():
    summary = summarize(EpisodeResults(np.array([2.5]), np.array([3])))
    assert summary["mean"] == summary["median"] == 2.5
    assert math.isnan(summary["standard_error"])
