"""What actor-critics share: advantages, gradients and the critic's own steps."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg.algos.a2c import A2CConfig
from jaxpg.algos.base import Task, make_task
from jaxpg.algos.segments import (
    advantages_of,
    check_segments,
    fit_critic,
    needed_critic,
    policy_gradient,
    valued,
)
from jaxpg.critics import follow_targets, init_critic
from jaxpg.envs.base import Box, Discrete
from jaxpg.envs.probes import endless_reward
from jaxpg.networks import feedforward
from jaxpg.policies import mlp_policy
from jaxpg.rollout import rollout_segments, start_segments
from jaxpg.types import Trajectory
from jaxpg.value_functions import TargetStatistics

KEY = jax.random.key(5)
SPACE = Box(-1.0, 1.0, (1,))
POLICY = mlp_policy(SPACE, Discrete(3), hidden=(3,))
# V(o) = scale * o[0] + offset
LINEAR = feedforward(
    lambda key, obs: {"scale": jnp.ones(1), "offset": jnp.zeros(1)},
    lambda params, obs: params["scale"] * obs + params["offset"],
)
TASK = Task(POLICY, SPACE, None, critic=LINEAR)


def settings(**changes):
    fields = {
        "discount": 0.9,
        "lambda_": 0.7,
        "bootstrap_truncated": True,
        "chunk_size": None,
        "entropy_coefficient": 0.0,
        "anneal": False,
    }
    return types.SimpleNamespace(**(fields | changes))


def critic_of(params=None, optimizer=None, task=TASK):
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    state = init_critic(needed_critic(task), optimizer, KEY, jnp.zeros(1))
    known = TargetStatistics(jnp.ones(()), jnp.zeros(()), jnp.ones(()))
    state = state._replace(targets=known)
    return state if params is None else state._replace(params=params)


def rows_of(seed=0, num_rows=6, num_steps=7, num_actions=3):
    rng = np.random.default_rng(seed)
    shape = (num_rows, num_steps)
    terminated, truncated = rng.random(shape) < 0.2, rng.random(shape) < 0.25
    ends, time = terminated | truncated, np.zeros(shape, np.int32)
    time[:, 0] = 4 * rng.integers(0, 2, num_rows)
    for t in range(1, num_steps):
        time[:, t] = np.where(ends[:, t - 1], 0, time[:, t - 1] + 1)
    mask = np.arange(num_steps) < rng.integers(3, num_steps + 3, (num_rows, 1))
    obs, next_obs = rng.normal(size=(2, *shape, 1))
    for t in range(num_steps - 1):  # where nothing ends, what follows is seen next
        goes_on = ~ends[:, t] & mask[:, t + 1]
        next_obs[goes_on, t] = obs[goes_on, t + 1]
    return Trajectory(
        obs=jnp.asarray(obs, float),
        action=jnp.asarray(rng.integers(0, num_actions, shape), jnp.int32),
        log_prob=jnp.asarray(-rng.random(shape), float),
        reward=jnp.asarray(rng.normal(size=shape), float),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        mask=jnp.asarray(mask),
        time=jnp.asarray(time),
        episode_id=jnp.zeros(shape, jnp.int32),
        next_obs=jnp.asarray(next_obs, float),
    )


def by_loop(config, rows, value):
    """GAE in one loop over decisions, from the definition, with every `next_obs`."""
    rows = jax.tree.map(np.asarray, rows)
    shape = rows.mask.shape
    advantages = np.zeros(shape)
    for b in range(shape[0]):
        for t in range(shape[1]):
            if not rows.mask[b, t]:
                continue
            factor = 1.0
            for u in range(t, shape[1]):
                if not rows.mask[b, u]:
                    break
                is_end = rows.terminated[b, u]
                if not config.bootstrap_truncated:
                    is_end = is_end or rows.truncated[b, u]
                later = 0.0 if is_end else value(rows.next_obs[b, u, 0])
                error = rows.reward[b, u] + config.discount * later
                advantages[b, t] += factor * (error - value(rows.obs[b, u, 0]))
                if rows.terminated[b, u] or rows.truncated[b, u]:
                    break
                factor *= config.discount * config.lambda_
    return advantages


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_advantages_are_the_definition(bootstrap, chunk_size):
    config = settings(bootstrap_truncated=bootstrap, chunk_size=chunk_size)
    params = {"scale": jnp.array([2.0]), "offset": jnp.array([0.5])}
    rows = rows_of()
    found = jax.jit(lambda rows: advantages_of(config, TASK, critic_of(params), rows))(
        rows
    )

    def value(obs):
        return 2.0 * obs + 0.5

    expected = by_loop(config, rows, value)
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-4, atol=1e-5)
    values = np.where(rows.mask, value(np.asarray(rows.obs[..., 0])), 0.0)
    np.testing.assert_allclose(found.values, values, rtol=1e-6)
    np.testing.assert_allclose(found.targets, found.advantages + values, rtol=1e-6)


def hand_row(**changes):
    """Two decisions: reward 1 and 10, V = 2 and 3, V' = 5 and 7."""
    no = jnp.zeros((1, 2), bool)
    row = Trajectory(
        obs=jnp.array([[[2.0], [3.0]]]),
        action=jnp.zeros((1, 2), jnp.int32),
        log_prob=jnp.zeros((1, 2)),
        reward=jnp.array([[1.0, 10.0]]),
        terminated=no,
        truncated=no,
        mask=~no,
        time=jnp.array([[3, 4]], jnp.int32),
        episode_id=jnp.zeros((1, 2), jnp.int32),
        next_obs=jnp.array([[[5.0], [7.0]]]),
    )
    return row._replace(**changes)


FIRST = jnp.array([[True, False]])
RESET = jnp.array([[3, 0]], jnp.int32)


@pytest.mark.parametrize(
    ("row", "bootstrap", "expected"),
    [
        # Goes on: 1 + 3/2 - 2 + (10 + 7/2 - 3) / 4, 10 + 7/2 - 3 (discount, lambda 1/2)
        (hand_row(), True, [0.5 + 10.5 / 4, 10.5]),
        # A truncation is worth its own V' = 5: 1 + 5/2 - 2; without bootstrap 1 - 2.
        (hand_row(truncated=FIRST, time=RESET), True, [1.5, 10.5]),
        (hand_row(truncated=FIRST, time=RESET), False, [-1.0, 10.5]),
        (hand_row(terminated=FIRST, time=RESET), True, [-1.0, 10.5]),
        # Both flags: terminated wins.
        (hand_row(terminated=FIRST, truncated=FIRST, time=RESET), True, [-1.0, 10.5]),
        # A segment's end is no end, whatever is bootstrapped.
        (hand_row(), False, [0.5 + 10.5 / 4, 10.5]),
    ],
)
def test_truncations_by_hand(row, bootstrap, expected):
    config = settings(discount=0.5, lambda_=0.5, bootstrap_truncated=bootstrap)
    found = advantages_of(config, TASK, critic_of(), row)
    np.testing.assert_allclose(found.advantages, [expected], rtol=1e-6)


@pytest.mark.parametrize(("bootstrap", "limit"), [(True, 10.0), (False, None)])
def test_the_endless_world_tells_whether_truncations_are_bootstrapped(bootstrap, limit):
    """V of the one observation: 1 / (1 - d), or the mean of what is left of 5 steps."""
    env = endless_reward(5)
    # The observation is 0: one number is all that the critic can learn.
    policy = mlp_policy(env.observation_space, env.action_space, hidden=(2,))
    task = make_task(env, policy, critic=LINEAR)
    config = settings(bootstrap_truncated=bootstrap, lambda_=1.0)
    optimizer = optax.sgd(0.5)
    if limit is None:
        # Whole episodes in every row: the mean over t < 5 of sum_{u < 5 - t} 0.9^u.
        limit = np.mean([sum(0.9**u for u in range(n)) for n in range(1, 6)])

    @jax.jit
    def run():
        params = policy.init(KEY, jnp.zeros(1))
        rows, _ = rollout_segments(
            env, policy, params, KEY, start_segments(env, policy, KEY, 4), 10
        )

        def update(critic, key):
            estimate = advantages_of(config, task, critic, rows)
            critic = follow_targets(critic, estimate.targets, rows.mask)
            critic, _ = fit_critic(
                task, optimizer, critic, key, rows, estimate.targets, num_epochs=8
            )
            return critic, advantages_of(config, task, critic, rows).values[0, 0]

        start = init_critic(LINEAR, optimizer, KEY, jnp.zeros(1))
        return jax.lax.scan(update, start, jax.random.split(KEY, 150))[1]

    np.testing.assert_allclose(run()[-1], limit, rtol=0.02)
    assert abs(limit - 10.0) < 0.1 or limit < 4.0


def test_the_policy_gradient_is_the_derivative_of_the_mean():
    config = settings(entropy_coefficient=0.3)
    rows = rows_of(1)
    params = POLICY.init(KEY, jnp.zeros(1))
    params = jax.tree.map(lambda x: x + 0.3, params)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=rows.mask.shape), float)
    weights = jnp.where(rows.mask, weights, 1e9)

    def plainly(params):
        def logits(obs):
            return POLICY.step(params, None, obs)[0].logits

        log_probs = jax.nn.log_softmax(jax.vmap(jax.vmap(logits))(rows.obs))
        chosen = jnp.take_along_axis(log_probs, rows.action[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        each = jnp.where(rows.mask, weights * chosen + 0.3 * entropy, 0.0)
        real = jnp.where(rows.mask, entropy, 0.0)
        count = jnp.sum(rows.mask.astype(float))
        return jnp.sum(each) / count, jnp.sum(real) / count

    expected, entropy = jax.jit(jax.grad(plainly, has_aux=True))(params)
    for chunk_size in (None, 5):
        config.chunk_size = chunk_size
        found, measured = jax.jit(
            lambda params, config=config: policy_gradient(
                config, TASK, params, rows, weights, KEY
            )
        )(params)
        np.testing.assert_allclose(measured, entropy, rtol=1e-5)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert optax.tree.norm(expected) > 0.1


def test_one_step_of_the_critic_by_hand():
    """V = 0 at first; SGD at rate 0.1 down the mean of 1/2 (V - target)^2."""
    params = {"scale": jnp.zeros(1), "offset": jnp.zeros(1)}
    critic = critic_of(params)
    targets = jnp.array([[4.0, 8.0]])
    fitted, loss = fit_critic(
        TASK, optax.sgd(0.1), critic, KEY, hand_row(), targets, num_epochs=1
    )
    np.testing.assert_allclose(loss, (16 + 64) / 4, rtol=1e-6)
    # Observations 2 and 3: slopes -(4 * 2 + 8 * 3) / 2 and -(4 + 8) / 2.
    np.testing.assert_allclose(fitted.params["scale"], [1.6], rtol=1e-6)
    np.testing.assert_allclose(fitted.params["offset"], [0.6], rtol=1e-6)
    assert fitted.targets == critic.targets


def test_the_critic_makes_as_many_steps_as_it_is_told():
    counted = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32),
        lambda updates, state, params=None: (updates, state + 1),
    )
    rows = rows_of(num_rows=4, num_steps=6)
    fitted, _ = fit_critic(
        TASK,
        counted,
        critic_of(optimizer=counted),
        KEY,
        rows,
        rows.reward,
        num_epochs=3,
        num_minibatches=4,
    )
    assert fitted.opt_state == 12


def test_without_bootstrap_truncated_decisions_count_as_terminated():
    rows = rows_of()
    row, _ = valued(settings(bootstrap_truncated=False), TASK, critic_of(), rows)
    np.testing.assert_array_equal(row.terminated, rows.terminated | rows.truncated)
    np.testing.assert_array_equal(row.truncated, rows.truncated)


# What is refused.


def test_a_missing_critic_is_refused():
    with pytest.raises(ValueError, match=r"^task.critic is None, .* mlp_network"):
        check_segments(A2CConfig(), TASK._replace(critic=None))


def test_bootstrapping_what_cannot_be_told_is_refused():
    blind = TASK._replace(tells_truncation=False)
    with pytest.raises(ValueError, match=r"^bootstrap_truncated is set, but the env"):
        check_segments(A2CConfig(), blind)
    check_segments(A2CConfig(bootstrap_truncated=False), blind)


def test_annealing_over_a_run_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match=r"^anneal is set, but num_updates is None"):
        check_segments(A2CConfig(anneal=True), TASK)
    check_segments(A2CConfig(anneal=True), TASK._replace(num_updates=3))
