"""A2C is its parts, put together once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg._flat import on_vectors
from jaxpg.advantages import standardize
from jaxpg.algos.a2c import A2CConfig, a2c
from jaxpg.algos.base import make_task
from jaxpg.algos.segments import advantages_of
from jaxpg.critics import follow_targets
from jaxpg.envs.probes import endless_reward, obs_and_action_reward
from jaxpg.envs.tabular import random_mdp, tabular_environment
from jaxpg.networks import mlp_network
from jaxpg.policies import tabular_policy
from jaxpg.rollout import rollout_segments, start_segments

pytestmark = pytest.mark.usefixtures("float64")

CONFIG = A2CConfig(
    num_steps=7,
    entropy_coefficient=0.1,
    learning_rate=0.1,
    critic_learning_rate=0.05,
    max_grad_norm=None,
    chunk_size=None,
)
change = dataclasses.replace


def setting():
    """A tabular world with ends of both kinds, its policy, and a critic."""
    mdp = random_mdp(1, num_states=3, horizon=4)
    env = tabular_environment(mdp)
    policy = tabular_policy(env.observation_space, env.action_space)
    critic = mlp_network(env.observation_space, 1, hidden=(), output_scale=1.0)
    return env, make_task(env, policy, critic=critic, num_updates=2)


def collect(env, task, params):
    @jax.jit
    def run(params):
        state = start_segments(env, task.policy, jax.random.key(2), 6)
        return rollout_segments(
            env, task.policy, params, jax.random.key(2), state, CONFIG.num_steps
        )[0]

    return run(params)


@pytest.fixture(scope="module")
def known():
    """A state that has learned something, and rows of its own."""
    with jax.enable_x64(True):
        env, task = setting()
        algorithm = a2c(CONFIG, task)
        update = jax.jit(algorithm.update)
        state = algorithm.init(jax.random.key(0), jnp.int32(0))
        rows = collect(env, task, state.params)
        state, _ = update(jax.random.key(1), state, rows)
        rows = collect(env, task, state.params)
        assert (rows.truncated & ~rows.terminated).any() and rows.terminated.any()
        return task, state, rows, update(jax.random.key(3), state, rows)


def close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


def test_an_update_is_its_parts(known):
    task, state, rows, (after, info) = known
    estimate = advantages_of(CONFIG, task, state.critic, rows)
    real = np.asarray(rows.mask)
    weights = np.asarray(estimate.advantages)
    weights = (weights - weights[real].mean()) / weights[real].std()

    def objective(params):
        table = jax.nn.log_softmax(params["network"])
        every = table[rows.obs]
        chosen = jnp.take_along_axis(every, rows.action[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
        return jnp.mean(weights * chosen + 0.1 * entropy), jnp.mean(entropy)

    gradient, entropy = jax.grad(objective, has_aux=True)(state.params)
    np.testing.assert_allclose(info["grad_norm"], optax.tree.norm(gradient), rtol=1e-9)
    np.testing.assert_allclose(info["entropy"], entropy, rtol=1e-9)

    adam = on_vectors(optax.adam(0.1))
    with jax.numpy_dtype_promotion("standard"):
        first = jax.tree.map(jnp.negative, gradient)
        moves, _ = adam.update(first, (state.opt_state[0], *adam.init(())[1:]))
    close(after.params, optax.apply_updates(state.params, moves))


def test_the_critic_descends_to_its_targets_twice(known):
    task, state, rows, (after, info) = known
    estimate = advantages_of(CONFIG, task, state.critic, rows)
    critic = follow_targets(state.critic, estimate.targets, rows.mask)
    assert critic.targets.weight > state.critic.targets.weight
    close(after.critic.targets, critic.targets)
    mean, std = critic.targets.mean, jnp.sqrt(critic.targets.variance)
    wanted = (estimate.targets - mean) / std

    def loss(params):
        outputs = jax.vmap(jax.vmap(lambda obs: task.critic.step(params, None, obs)[0]))
        return jnp.mean((outputs(rows.obs)[..., 0] - wanted) ** 2) / 2

    adam = on_vectors(optax.adam(0.05))
    params = critic.params
    opt_state, losses = (critic.opt_state[0], *adam.init(())[1:]), []
    for _ in range(CONFIG.critic_epochs):
        now, slope = jax.value_and_grad(loss)(params)
        losses.append(now)
        with jax.numpy_dtype_promotion("standard"):
            moves, opt_state = adam.update(slope, opt_state)
        params = optax.apply_updates(params, moves)
    close(after.critic.params, params)
    np.testing.assert_allclose(info["critic_loss"], np.mean(losses), rtol=1e-9)
    gap = np.asarray(estimate.targets - estimate.values)
    explained = 1 - gap.var() / np.asarray(estimate.targets).var()
    np.testing.assert_allclose(info["explained_variance"], explained, rtol=1e-9)


def test_advantages_see_the_critic_of_before(known):
    """Bootstrapping from values that were fitted to the very batch would be another."""
    task, state, rows, (after, _) = known
    before = advantages_of(CONFIG, task, state.critic, rows).advantages
    fitted = advantages_of(CONFIG, task, after.critic, rows).advantages
    assert np.abs(standardize(before - fitted, rows.mask)).max() > 0.1


def test_the_rate_follows_the_kl_of_the_last_step(known):
    """The state keeps the KL that a step made; the next one is scaled by it."""
    task, _, rows, _ = known
    algorithm = a2c(change(CONFIG, adapt_to_kl=1e-6), task)
    update = jax.jit(algorithm.update)
    fresh = algorithm.init(jax.random.key(0), jnp.int32(0))
    assert fresh.kl == 0.0
    first, info = update(jax.random.key(1), fresh, rows)
    every = [jax.nn.log_softmax(x.params["network"])[rows.obs] for x in (fresh, first)]
    kl = jnp.mean(jnp.sum(jnp.exp(every[0]) * (every[0] - every[1]), axis=-1))
    np.testing.assert_allclose([first.kl, info["kl"]], [kl, kl], rtol=1e-8)
    assert kl > 2e-6
    scales = [state.opt_state[1].scale for state in (fresh, first)]
    second, _ = update(jax.random.key(1), first, rows)
    scales.append(second.opt_state[1].scale)
    np.testing.assert_allclose(scales, [1.0, 1.0, 1 / 1.5], rtol=1e-12)


def test_the_rate_falls_to_zero_over_the_run(known):
    task, _, rows, _ = known
    algorithm = a2c(change(CONFIG, anneal=True), task)
    update, sizes = jax.jit(algorithm.update), []
    state = algorithm.init(jax.random.key(0), jnp.int32(0))
    for _ in range(3):
        after, _ = update(jax.random.key(1), state, rows)
        table = after.params["network"] - state.params["network"]
        sizes.append(np.abs(table).max())
        state = after
    assert 0.09 < sizes[0] < 0.11 and 0.03 < sizes[1] < 0.055 and sizes[2] == 0.0


def test_numbers_that_are_none_are_counted(known):
    task, state, rows, _ = known
    spoilt = rows._replace(reward=rows.reward.at[0, 0].set(jnp.inf))
    algorithm = a2c(change(CONFIG, standardize=False), task)
    _, info = jax.jit(algorithm.update)(jax.random.key(1), state, spoilt)
    assert info["non_finite_batch"] > 0
    assert info["non_finite_gradient"] > 0 and info["non_finite_params"] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"critic_epochs": 0}, "^critic_epochs is 0, needs a whole number"),
        ({"adapt_to_kl": 0.0}, r"^adapt_to_kl is 0.0, needs a number in \(0"),
        ({"entropy_coefficient": -0.1}, "^entropy_coefficient is -0.1, needs"),
        ({"critic_learning_rate": 0.0}, "^critic_learning_rate is 0.0, needs"),
        ({"num_steps": 0}, "^num_steps is 0, needs a whole number"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence, monkeypatch):
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        A2CConfig(**settings)


def test_what_the_task_lacks_is_refused():
    env = obs_and_action_reward()
    policy = tabular_policy(*[tabular_environment(random_mdp(0)).action_space] * 2)
    with pytest.raises(ValueError, match=r"^task\.critic is None"):
        a2c(A2CConfig(), make_task(env, policy))
    critic = mlp_network(env.observation_space, 1)
    blind = make_task(endless_reward(), policy, critic=critic, tells_truncation=False)
    with pytest.raises(ValueError, match=r"^bootstrap_truncated is set"):
        a2c(A2CConfig(), blind)
