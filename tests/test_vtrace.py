"""The V-trace actor-critic against loops over decisions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg.algos.base import make_task
from jaxpg.algos.vtrace import VTraceConfig, vtrace
from jaxpg.critics import follow_targets
from jaxpg.envs.tabular import random_mdp, tabular_environment
from jaxpg.networks import gru_network, mlp_network
from jaxpg.policies import tabular_policy
from jaxpg.rollout import rollout_segments, start_segments

pytestmark = pytest.mark.usefixtures("float64")

with jax.enable_x64(True):
    ENV = tabular_environment(random_mdp(1, num_states=3, horizon=2))
POLICY = tabular_policy(ENV.observation_space, ENV.action_space)
CRITIC = mlp_network(ENV.observation_space, 1, hidden=(), output_scale=1.0)
TASK = make_task(ENV, POLICY, critic=CRITIC, num_updates=2)
BASE = VTraceConfig(
    num_steps=7,
    num_epochs=1,
    behaviour_lag=1,
    max_rho=1.3,
    max_c=0.9,
    standardize=False,
    learning_rate=0.1,
    critic_learning_rate=0.05,
    max_grad_norm=None,
    chunk_size=None,
)
change = dataclasses.replace


@functools.cache
def updater(config):
    run = jax.jit(vtrace(config, TASK).update)

    def update(state, rows):
        state, info = run(jax.random.key(1), state, rows)
        return state, {name: np.asarray(x) for name, x in info.items()}

    return update


def collect(params, seed=2):
    @jax.jit
    def run(params):
        state = start_segments(ENV, POLICY, jax.random.key(seed), 6)
        return rollout_segments(ENV, POLICY, params, jax.random.key(seed), state, 7)[0]

    return run(params)


@pytest.fixture(scope="module")
def known():
    """A state whose critic has learned something, and rows of an older policy."""
    with jax.enable_x64(True):
        state = vtrace(BASE, TASK).init(jax.random.key(0), jnp.int32(0))
        rows = collect(state.params)
        assert (rows.truncated & ~rows.terminated).any() and rows.terminated.any()
        state, _ = updater(BASE)(state, rows)
        table = jnp.array([[0.5, -0.5], [-0.9, 0.4], [0.0, 0.3]])
        older = {**state.params, "network": state.params["network"] + table}
        return state, collect(older)


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def adam_of(state):
    kind = optax.ScaleByAdamState
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next(leaf for leaf in leaves if isinstance(leaf, kind))


def given_gradient(before, after):
    """From Adam's moments: m' = 0.9 m + 0.1 of minus the gradient."""
    return 9.0 * flat(adam_of(before).mu) - 10.0 * flat(adam_of(after).mu)


def plain_vtrace(config, state, rows):
    """Targets, advantages, values and ratios by loops, from the paper's equation 1."""
    outputs = jax.vmap(lambda obs: CRITIC.step(state.critic.params, None, obs)[0][0])
    of_state = outputs(jnp.arange(3, dtype=jnp.int32))
    known = state.critic.targets
    of_state = np.asarray(known.mean + jnp.sqrt(known.variance) * of_state)
    table = np.asarray(jax.nn.log_softmax(state.params["network"]))
    rows = jax.tree.map(np.asarray, rows)
    values, after = of_state[rows.obs], of_state[rows.next_obs]
    after = np.where(rows.terminated, 0.0, after)
    rhos = np.exp(table[rows.obs, rows.action] - rows.log_prob)
    held, decays = np.minimum(rhos, config.max_rho), np.minimum(rhos, config.max_c)
    errors = held * (rows.reward + config.discount * after - values)
    targets, advantages = np.zeros_like(values), np.zeros_like(values)
    num_rows, length = values.shape
    for b in range(num_rows):
        for t in range(length):
            total, factor = 0.0, 1.0
            for u in range(t, length):
                total += factor * errors[b, u]
                if rows.terminated[b, u] or rows.truncated[b, u]:
                    break
                factor *= config.discount * config.lambda_ * decays[b, u]
            targets[b, t] = values[b, t] + total
    for b in range(num_rows):
        for t in range(length):
            ends = rows.terminated[b, t] or rows.truncated[b, t] or t + 1 == length
            later = after[b, t] if ends else targets[b, t + 1]
            error = rows.reward[b, t] + config.discount * later - values[b, t]
            advantages[b, t] = held[b, t] * error
    return targets, advantages, values, rhos


def policy_gradient_of(params, rows, weights):
    def objective(params):
        table = jax.nn.log_softmax(params["network"])
        return jnp.mean(weights * table[rows.obs, rows.action])

    return flat(jax.grad(objective)(params))


def test_an_update_is_its_parts(known):
    state, rows = known
    after, info = updater(BASE)(state, rows)
    targets, advantages, values, rhos = plain_vtrace(BASE, state, rows)
    assert (rhos > 1.3).any() and (rhos < 0.9).any(), "both clips must bind"
    expected = policy_gradient_of(state.params, rows, advantages)
    np.testing.assert_allclose(
        given_gradient(state, after), expected, rtol=1e-8, atol=1e-10
    )
    assert np.linalg.norm(expected) > 0.01
    np.testing.assert_allclose(info["mean_ratio"], rhos.mean(), rtol=1e-9)
    explained = 1 - (targets - values).var() / targets.var()
    np.testing.assert_allclose(info["explained_variance"], explained, rtol=1e-8)

    critic = follow_targets(state.critic, jnp.asarray(targets), rows.mask)
    for x, y in zip(after.critic.targets, critic.targets, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)
    wanted = (targets - critic.targets.mean) / jnp.sqrt(critic.targets.variance)

    def loss(params):
        outputs = jax.vmap(jax.vmap(lambda obs: CRITIC.step(params, None, obs)[0][0]))
        return jnp.mean((outputs(rows.obs) - wanted) ** 2) / 2

    now, slope = jax.value_and_grad(loss)(critic.params)
    np.testing.assert_allclose(info["critic_loss"], now, rtol=1e-8)
    moments = [adam_of(x.critic).mu for x in (after, state)]
    np.testing.assert_allclose(
        10.0 * flat(moments[0]) - 9.0 * flat(moments[1]),
        flat(slope),
        rtol=1e-7,
        atol=1e-9,
    )


def test_on_policy_it_is_the_n_step_advantage(known):
    """Lag 1, one pass, lambda 1: A = r + d r' + ... + V' - V, up to the next end."""
    config = change(BASE, lambda_=1.0, max_rho=1.0, max_c=1.0)
    state, _ = known
    rows = collect(state.params, seed=4)
    after, info = updater(config)(state, rows)
    np.testing.assert_allclose(info["mean_ratio"], 1.0, rtol=1e-12)
    _, _, values, _ = plain_vtrace(config, state, rows)
    known_targets = state.critic.targets
    outputs = jax.vmap(jax.vmap(lambda o: CRITIC.step(state.critic.params, None, o)[0]))
    later = (
        known_targets.mean
        + jnp.sqrt(known_targets.variance) * outputs(rows.next_obs)[..., 0]
    )
    running = np.asarray(later)[:, -1]
    returns = np.zeros_like(values)
    for t in reversed(range(7)):
        follow = np.where(rows.truncated[:, t], later[:, t], running)
        follow = np.where(rows.terminated[:, t], 0.0, follow)
        running = np.asarray(rows.reward)[:, t] + 0.99 * follow
        returns[:, t] = running
    expected = policy_gradient_of(state.params, rows, returns - values)
    np.testing.assert_allclose(
        given_gradient(state, after), expected, rtol=1e-8, atol=1e-10
    )


def test_two_passes_are_two_updates_on_the_same_rows(known):
    """Ratios, values and targets are taken anew: nothing of the first pass is kept."""
    state, rows = known
    twice, info = updater(change(BASE, num_epochs=2))(state, rows)
    once, first = updater(BASE)(state, rows)
    again, second = updater(BASE)(once, rows)
    np.testing.assert_allclose(flat(twice.params), flat(again.params), rtol=1e-9)
    np.testing.assert_allclose(
        flat(twice.critic.params), flat(again.critic.params), rtol=1e-9
    )
    for name in ("grad_norm", "mean_ratio", "critic_loss"):
        mean = (first[name] + second[name]) / 2
        np.testing.assert_allclose(info[name], mean, rtol=1e-9)
    assert abs(first["grad_norm"] - second["grad_norm"]) > 1e-5


@pytest.mark.parametrize("lag", [1, 3])
def test_who_collects_is_renewed_every_so_many_updates(lag):
    config = change(BASE, behaviour_lag=lag)
    algorithm = vtrace(config, TASK)
    state = algorithm.init(jax.random.key(0), jnp.int32(0))
    rows = collect(state.params)
    learned, seen = [flat(state.params)], []
    for _ in range(6):
        seen.append(flat(algorithm.actor_params(state)))
        state, _ = updater(config)(state, rows)
        learned.append(flat(state.params))
    for number, params in enumerate(seen):
        np.testing.assert_array_equal(params, learned[number - number % lag])
    assert np.abs(learned[0] - learned[3]).max() > 0.1


def test_a_critic_with_memory_acts_along():
    memory = gru_network(ENV.observation_space, 1, hidden=(), memory=2)
    algorithm = vtrace(BASE, TASK._replace(critic=memory))
    state = algorithm.init(jax.random.key(0), jnp.int32(0))
    assert algorithm.actor_params(state).keys() == {"policy", "critic"}
    np.testing.assert_array_equal(
        flat(algorithm.actor_params(state)["critic"]), flat(state.critic.params)
    )


def test_the_rate_falls_to_zero_over_the_passes_of_the_run(known):
    _, rows = known
    config = change(BASE, anneal=True, num_epochs=2)
    state = vtrace(config, TASK).init(jax.random.key(0), jnp.int32(0))
    sizes = []
    for _ in range(3):
        after, _ = updater(config)(state, rows)
        sizes.append(np.abs(flat(after.params) - flat(state.params)).max())
        state = after
    # 2 updates of 2 passes: 1, 3/4 and 1/2, 1/4 of 0.1, then none.
    assert 0.1 < sizes[0] < 0.18 and 0.02 < sizes[1] < 0.08 and sizes[2] == 0.0


def test_numbers_that_are_none_are_counted(known):
    state, rows = known
    spoilt = rows._replace(reward=rows.reward.at[0, 0].set(jnp.nan))
    _, info = updater(BASE)(state, spoilt)
    assert info["non_finite_batch"] > 0
    assert info["non_finite_gradient"] > 0 and info["non_finite_params"] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"behaviour_lag": 0}, "^behaviour_lag is 0, needs a whole number"),
        ({"max_rho": 0.0}, r"^max_rho is 0.0, needs a number in \(0"),
        ({"max_c": -1.0}, r"^max_c is -1.0, needs a number in \(0"),
        ({"num_epochs": 0}, "^num_epochs is 0, needs a whole number"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence, monkeypatch):
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        VTraceConfig(**settings)
