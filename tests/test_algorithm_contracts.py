"""One table of algorithms and policies: each pair keeps the contract, and learns."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.algos.base import Episodes, make_task
from jaxpg.algos.registry import RECIPES
from jaxpg.envs.probes import (
    bits,
    endless_reward,
    masked_actions,
    matching_number,
    obs_and_action_reward,
    push_away,
    remember_first,
    two_numbers,
)
from jaxpg.heads import state_dependent_noise_head, tanh_gaussian_head
from jaxpg.networks import gru_network, mlp_network
from jaxpg.policies import from_network, mlp_policy, recurrent_policy
from jaxpg.rollout import rollout_episodes, rollout_segments, start_segments

KEY = jax.random.key(0)
NUM_ENVS = 8

SETTINGS = {
    "reinforce": {"episodes_per_env": 2},
    "a2c": {"num_steps": 4},
    "vtrace": {"num_steps": 4, "behaviour_lag": 2},
    "off-policy": {"episodes_per_env": 2, "num_epochs": 2},
    "npg": {"episodes_per_env": 2, "cg_iterations": 4},
    "enac": {"episodes_per_env": 2, "cg_iterations": 4},
    "trpo": {"num_steps": 4, "cg_iterations": 4, "critic_epochs": 2},
    "ppo": {"num_steps": 4, "num_epochs": 2, "num_minibatches": 2},
}


def mlp_with(env, make_head, **more):
    head = make_head(env.action_space)
    network = mlp_network(env.observation_space, head.num_outputs, hidden=(4,))
    return from_network(network, head, **more)


def usual(env):
    return mlp_policy(env.observation_space, env.action_space, hidden=(4,))


def tanh(env):
    return mlp_with(env, tanh_gaussian_head)


def held_noise(env):
    return mlp_with(
        env, functools.partial(state_dependent_noise_head, num_features=3), noise_hold=4
    )


def recurrent(env):
    return recurrent_policy(
        env.observation_space, env.action_space, hidden=(4,), memory=4
    )


POLICIES = {
    "categorical": (obs_and_action_reward, usual),
    "multi-categorical": (two_numbers, usual),
    "bernoulli": (bits, usual),
    "gaussian": (matching_number, usual),
    "tanh-gaussian": (matching_number, tanh),
    "held-noise": (lambda: push_away(6), held_noise),
    "masked": (lambda: masked_actions(3), usual),
    "recurrent": (lambda: remember_first(3), recurrent),
    "truncated": (lambda: endless_reward(3), usual),
}

NOTHING_TO_TELL = {"truncated", "held-noise"}
"""Where every action earns the same, so that nothing need move: the reward never
changes, or is out of reach."""


def critic_of(env, policy, width=4):
    if policy.is_recurrent:
        return gru_network(
            env.observation_space, 1, hidden=(width,), memory=width, output_scale=1.0
        )
    return mlp_network(env.observation_space, 1, hidden=(width,), output_scale=1.0)


class Learning:
    """An algorithm on a world: `turn` collects and updates."""

    def __init__(self, name, env, policy, settings, num_envs=NUM_ENVS, width=4):
        recipe, self.env, self.num_envs = RECIPES[name], env, num_envs
        critic = critic_of(env, policy, width) if recipe.needs_critic else None
        task = make_task(env, policy, critic=critic, num_updates=10)
        self.critic = critic
        self.algorithm = recipe.make(recipe.settings(**settings), task)

    def init(self, key):
        state = self.algorithm.init(key, self.env.reset(key)[1])
        if isinstance(self.algorithm.collects, Episodes):
            return state, ()
        start = start_segments(self.env, self.algorithm.actor, KEY, self.num_envs)
        return state, start

    def collect(self, key, state, rollout):
        algorithm = self.algorithm
        params = algorithm.actor_params(state)
        if isinstance(algorithm.collects, Episodes):
            number = self.num_envs * algorithm.collects.per_env
            ids = jnp.arange(number, dtype=jnp.int32)
            rows = rollout_episodes(
                self.env, algorithm.actor, params, key, ids, num_slots=self.num_envs
            )
            return rows, ()
        num_steps = algorithm.collects.num_steps
        return rollout_segments(
            self.env,
            algorithm.actor,
            params,
            KEY,
            rollout,
            num_steps,
        )

    def turn(self, carry, key):
        state, rollout = carry
        rows, rollout = self.collect(key, state, rollout)
        state, info = self.algorithm.update(key, state, rows)
        ends = jnp.maximum(jnp.sum(rows.ends), 1).astype(float)
        reward = jnp.sum(jnp.where(rows.mask, rows.reward, 0.0)) / ends
        return (state, rollout), (reward, info)


EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
# Each algorithm once, and each policy once; the rest of the table is asked for by name.
QUICK = {
    *((name, "categorical") for name in RECIPES),
    ("ppo", "recurrent"),
    ("ppo", "tanh-gaussian"),
    ("a2c", "held-noise"),
    ("trpo", "gaussian"),
    ("vtrace", "masked"),
    ("off-policy", "bernoulli"),
    ("npg", "multi-categorical"),
}
PAIRS = [
    pytest.param(name, policy, marks=() if (name, policy) in QUICK else EXHAUSTIVE)
    for policy in POLICIES
    for name in RECIPES
]


@pytest.mark.parametrize(("name", "policy"), PAIRS)
@pytest.mark.thinned(3)
def test_contract(name, policy):
    make_env, make_policy = POLICIES[policy]
    env = make_env()
    learning = Learning(name, env, make_policy(env), SETTINGS[name])
    before = jax.jit(learning.init)(KEY)
    chex.clear_trace_counter()
    turn = jax.jit(chex.assert_max_traces(learning.turn, n=1))
    carry = before
    for key in jax.random.split(KEY, 3):
        carry, (_, info) = turn(carry, key)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, carry)
    assert jax.tree.structure(before) == jax.tree.structure(carry)
    for told, value in info.items():
        assert value.shape == () and np.isfinite(value), told
    counts = {told: int(x) for told, x in info.items() if told.startswith("non_finite")}
    assert {"non_finite_batch", "non_finite_gradient", "non_finite_params"} <= set(
        counts
    )
    assert not any(counts.values())
    moved = jax.tree.map(
        lambda x, y: bool((x != y).any()), before[0].params, carry[0].params
    )
    assert any(jax.tree.leaves(moved)) or policy in NOTHING_TO_TELL


def test_the_table_names_every_algorithm():
    assert SETTINGS.keys() == RECIPES.keys()
    assert {policy for _, policy in QUICK} == POLICIES.keys() - {"truncated"}


# Learning: one world for each algorithm whose optimum only a right one reaches.

FAST = {"learning_rate": 0.03}
CRITIC = {**FAST, "critic_learning_rate": 0.03, "num_steps": 8}
WORLDS = {
    # World, policy, settings, the least mean reward per episode, and the chance's own.
    "reinforce": (obs_and_action_reward, usual, FAST, 0.9, 0.0),
    "a2c": (obs_and_action_reward, usual, CRITIC, 0.9, 0.0),
    "vtrace": (lambda: masked_actions(3), usual, CRITIC, 2.8, 1.5),
    "off-policy": (matching_number, usual, {**FAST, "num_epochs": 4}, -0.1, -1.25),
    "npg": (matching_number, usual, {"max_kl": 0.03}, -0.1, -1.25),
    "enac": (obs_and_action_reward, usual, {"max_kl": 0.03}, 0.9, 0.0),
    "trpo": (
        lambda: masked_actions(3),
        usual,
        {"max_kl": 0.03, "num_steps": 8, "critic_learning_rate": 0.01},
        2.8,
        1.5,
    ),
    "ppo": (
        lambda: remember_first(3),
        recurrent,
        {"num_steps": 12, "learning_rate": 0.02, "critic_learning_rate": 0.02},
        0.9,
        0.0,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.thinned(3)
def test_it_learns(name):
    make_env, make_policy, settings, least, chance = WORLDS[name]
    env = make_env()
    learning = Learning(name, env, make_policy(env), settings, num_envs=32, width=8)

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 150)
        return jax.lax.scan(learning.turn, learning.init(key), keys)[1]

    rewards, info = run(KEY)
    assert not np.asarray(info["non_finite_params"]).any()
    np.testing.assert_allclose(rewards[0], chance, atol=0.6)
    assert np.mean(rewards[-10:]) > least


BOOTSTRAPPING = [name for name in RECIPES if RECIPES[name].needs_critic]


@pytest.mark.slow
@pytest.mark.parametrize("name", BOOTSTRAPPING)
@pytest.mark.thinned(2)
def test_the_value_of_the_endless_world(name):
    """1 / (1 - d) = 10 in episodes of 5 decisions: truncations must be bootstrapped."""
    env = endless_reward(5)
    settings = {"num_steps": 8, "discount": 0.9, "critic_learning_rate": 0.03}
    if name != "trpo":
        settings["learning_rate"] = 0.01
    learning = Learning(name, env, usual(env), settings)

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 300)
        (state, _), _ = jax.lax.scan(learning.turn, learning.init(key), keys)
        known = state.critic.targets
        params, obs = state.critic.params, jnp.zeros(1)
        output = learning.critic.step(params, None, obs)[0][0]
        return known.mean + jnp.sqrt(known.variance) * output

    np.testing.assert_allclose(run(KEY), 10.0, atol=0.5)
