"""PPO against a plain implementation of its own, and its edges one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg.algos.base import Task
from jaxpg.algos.minibatches import (
    plan_minibatches,
    shuffle_into_minibatches,
    take_minibatch,
)
from jaxpg.algos.ppo import PPOConfig, ppo
from jaxpg.envs.base import Box, Discrete
from jaxpg.networks import feedforward
from jaxpg.policies import mlp_policy
from jaxpg.train.config import with_values_unchecked
from jaxpg.train.sharding import place
from jaxpg.types import Trajectory
from jaxpg.value_functions import TargetStatistics

pytestmark = pytest.mark.usefixtures("float64")

SPACE = Box(-1.0, 1.0, (1,))
POLICY = mlp_policy(SPACE, Discrete(3), hidden=(3,))
# V(o) = scale * o[0] + offset, in standard deviations of the targets
LINEAR = feedforward(
    lambda key, obs: {"scale": jnp.full(1, 0.7), "offset": jnp.full(1, 0.2)},
    lambda params, obs: params["scale"] * obs + params["offset"],
)
TASK = Task(POLICY, SPACE, None, critic=LINEAR, num_updates=2)
BASE = PPOConfig(
    num_steps=6,
    num_epochs=1,
    num_minibatches=1,
    learning_rate=0.1,
    critic_learning_rate=0.1,
    max_grad_norm=None,
    chunk_size=None,
)
change = dataclasses.replace


def key():
    return jax.random.key(11)


def rows_of(seed=0, num_rows=8, num_steps=6):
    """Segments of the first policy, with ends of both kinds."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, num_steps)
    terminated, truncated = rng.random(shape) < 0.2, rng.random(shape) < 0.2
    ends, time = terminated | truncated, np.zeros(shape, np.int32)
    for t in range(1, num_steps):
        time[:, t] = np.where(ends[:, t - 1], 0, time[:, t - 1] + 1)
    obs, next_obs = rng.normal(size=(2, *shape, 1))
    for t in range(num_steps - 1):
        next_obs[~ends[:, t], t] = obs[~ends[:, t], t + 1]
    rows = Trajectory(
        obs=jnp.asarray(obs),
        action=jnp.asarray(rng.integers(0, 3, shape), jnp.int32),
        log_prob=jnp.zeros(shape),
        reward=jnp.asarray(rng.normal(size=shape)),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        mask=jnp.ones(shape, bool),
        time=jnp.asarray(time),
        episode_id=jnp.zeros(shape, jnp.int32),
        next_obs=jnp.asarray(next_obs),
    )
    return rows._replace(log_prob=log_softmax_of(first_params(), rows)[1])


@functools.cache
def first_params():
    params = jax.jit(POLICY.init)(jax.random.key(1), jnp.zeros(1))
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
    )


def log_softmax_of(params, rows):
    """Log-probabilities of all actions and of those taken, from the logits."""

    def logits(obs):
        return POLICY.step(params, None, obs)[0].logits

    every = jax.nn.log_softmax(jax.vmap(jax.vmap(logits))(rows.obs))
    return every, jnp.take_along_axis(every, rows.action[..., None], -1)[..., 0]


def first_state(config, task=TASK):
    state = ppo(config, task).init(key(), jnp.zeros(1))
    known = TargetStatistics(jnp.ones(()), jnp.array(0.3), jnp.array(4.0))
    return state._replace(
        params=first_params(), critic=state.critic._replace(targets=known)
    )


@functools.cache
def updater(config, names=(), num_devices=1):
    """A compiled update, whose settings `names` are arguments: one for many values."""
    task = TASK
    if num_devices > 1:
        placement = place(num_devices)
        task = TASK._replace(
            map_rows=placement.map_rows, sum_over_rows=placement.sum_over_rows
        )

    @jax.jit
    def update(values, key, state, rows):
        settings = with_values_unchecked(config, values)
        return ppo(settings, task).update(key, state, rows)

    def call(state, rows, **values):
        assert tuple(values) == names
        state, info = update(values, key(), state, rows)
        return state, {name: np.asarray(x) for name, x in info.items()}

    return call


def update(config, rows=None, **values):
    rows = rows_of() if rows is None else rows
    return updater(config, tuple(values))(first_state(config), rows, **values)


def steps_of(after, before):
    flat = jax.flatten_util.ravel_pytree
    return np.asarray(flat(after)[0] - flat(before)[0])


# The plain implementation.


def plain_advantages(config, state, rows):
    """GAE in a loop, and V, from the definitions."""
    mean, std = state.critic.targets.mean, np.sqrt(state.critic.targets.variance)
    scale, offset = (state.critic.params[name][0] for name in ("scale", "offset"))

    def value(obs):
        return np.asarray(mean + std * (scale * obs[..., 0] + offset))

    values, later = value(rows.obs), value(rows.next_obs)
    later = np.where(rows.terminated, 0.0, later)
    errors = np.asarray(rows.reward) + config.discount * later - values
    ends = np.asarray(rows.terminated | rows.truncated)
    advantages, running = np.zeros_like(errors), np.zeros(len(errors))
    for t in reversed(range(errors.shape[1])):
        decay = config.discount * config.lambda_ * ~ends[:, t]
        running = errors[:, t] + decay * running
        advantages[:, t] = running
    return advantages, values


def plain_losses(config, beta, old, mean, std, params, part):
    rows, advantages, targets, old_values = part
    if config.standardize == "minibatch":
        advantages = (advantages - advantages.mean()) / advantages.std()
    every, chosen = log_softmax_of(params["policy"], rows)
    before, _ = log_softmax_of(old, rows)
    rhos = jnp.exp(chosen - rows.log_prob)
    if config.form == "clip":
        near = jnp.clip(rhos, 1 - config.clip_eps, 1 + config.clip_eps)
        gains = jnp.minimum(rhos * advantages, near * advantages)
    else:
        kls = jnp.sum(jnp.exp(before) * (before - every), axis=-1)
        gains = rhos * advantages - beta * kls
    entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
    scale, offset = (params["critic"][name][0] for name in ("scale", "offset"))
    outputs = scale * rows.obs[..., 0] + offset
    wanted, held = (targets - mean) / std, (old_values - mean) / std
    errors = (outputs - wanted) ** 2
    if config.clip_values is not None:
        near = held + jnp.clip(outputs - held, -config.clip_values, config.clip_values)
        errors = jnp.maximum(errors, (near - wanted) ** 2)
    policy_loss = -jnp.mean(gains) - config.entropy_coefficient * jnp.mean(entropy)
    return policy_loss + jnp.mean(errors) / 2


def plain_update(config, state, rows):
    advantages, values = plain_advantages(config, state, rows)
    targets = advantages + values
    if config.standardize == "batch":
        advantages = (advantages - advantages.mean()) / advantages.std()
    # The statistics' weight is 1 here: the batch counts a hundredth.
    gap = targets.mean() - state.critic.targets.mean
    mean = state.critic.targets.mean + 0.01 * gap
    variance = 0.99 * (state.critic.targets.variance + 0.01 * gap**2)
    std = jnp.sqrt(variance + 0.01 * targets.var())
    cut = plan_minibatches(8, 6, config.num_minibatches, cut_rows=True)
    whole = rows._replace(next_obs=None), advantages, targets, values
    whole = jax.tree.map(jnp.asarray, whole)
    params = {"policy": state.params, "critic": state.critic.params}
    clip = optax.identity()
    if config.max_grad_norm is not None:
        clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = {
        name: optax.chain(clip, optax.adam(rate))
        for name, rate in (
            ("policy", config.learning_rate),
            ("critic", config.critic_learning_rate),
        )
    }
    states = {name: adam[name].init(params[name]) for name in adam}
    slope = jax.jit(
        jax.grad(
            functools.partial(
                plain_losses, config, state.kl_coefficient, state.params, mean, std
            )
        )
    )
    for epoch_key in jax.random.split(key(), config.num_epochs):
        parts = shuffle_into_minibatches(jax.random.split(epoch_key)[0], cut, whole)
        for number in range(config.num_minibatches):
            part = take_minibatch(parts, jnp.int32(number))
            found = slope(params, part)
            for name in adam:
                with jax.numpy_dtype_promotion("standard"):
                    moves, states[name] = adam[name].update(found[name], states[name])
                params[name] = optax.apply_updates(params[name], moves)
    return params


PLAIN = {
    "clip": change(
        BASE,
        num_epochs=2,
        num_minibatches=2,
        entropy_coefficient=0.05,
        clip_values=0.3,
        max_grad_norm=0.2,
    ),
    "kl-penalty": change(
        BASE, form="kl-penalty", kl_coefficient=3.0, num_epochs=3, standardize="batch"
    ),
    "plain": change(BASE, num_epochs=3, standardize="none", clip_eps=0.05),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.thinned(2)
def test_an_update_is_the_plain_implementations(name):
    config = PLAIN[name]
    state, info = update(config)
    expected = plain_update(config, first_state(config), rows_of())
    found = {"policy": state.params, "critic": state.critic.params}
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-9)
    assert np.abs(steps_of(state.params, first_params())).max() > 0.1
    assert info["kl"] > 1e-3 and info["clip_fraction"] > 0.05, "it must have moved"
    assert info["skipped_steps"] == info["non_finite_batch"] == 0


def test_the_first_gradient_by_hand():
    """At the old policy no ratio is clipped: g = mean A grad log pi."""
    config = change(BASE, standardize="none")
    _, info = update(config)
    advantages, _ = plain_advantages(config, first_state(config), rows_of())

    def objective(params):
        return jnp.mean(advantages * log_softmax_of(params, rows_of())[1])

    gradient = jax.grad(objective)(first_params())
    np.testing.assert_allclose(info["grad_norm"], optax.tree.norm(gradient), rtol=1e-9)
    np.testing.assert_allclose(info["kl"], 0.0, atol=1e-12)
    assert info["clip_fraction"] == 0.0


# What holds it back.


def adam_of(opt_state):
    kind = optax.ScaleByAdamState
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return next(leaf for leaf in leaves if isinstance(leaf, kind))


def test_clipping_bounds_the_global_norm():
    """Adam's first moment is a tenth of the gradient that it was given."""
    free, _ = update(change(BASE, standardize="none"))
    held, info = update(change(BASE, standardize="none", max_grad_norm=1e-2))
    for after, before in (
        (held.opt_state, free.opt_state),
        (held.critic.opt_state, free.critic.opt_state),
    ):
        long = steps_of(adam_of(before).mu, adam_of(before).nu) + np.asarray(
            jax.flatten_util.ravel_pytree(adam_of(before).nu)[0]
        )
        short = np.asarray(jax.flatten_util.ravel_pytree(adam_of(after).mu)[0])
        assert np.linalg.norm(long) > 0.1 * 1.1e-2
        np.testing.assert_allclose(np.linalg.norm(short), 0.1 * 1e-2, rtol=1e-6)
        np.testing.assert_allclose(
            short / np.linalg.norm(short), long / np.linalg.norm(long), atol=1e-9
        )
    assert info["grad_norm"] > 1e-2, "what is told is the norm before"


def test_an_early_stop_leaves_everything_where_it_was():
    once, _ = update(BASE)
    config = change(BASE, num_epochs=4)
    state, info = update(config, stop_at_kl=1e-6)
    # The first step sees a KL of 0 and is made; the second sees more and stops.
    np.testing.assert_allclose(steps_of(state.params, once.params), 0.0, atol=1e-12)
    np.testing.assert_allclose(
        steps_of(state.critic.params, once.critic.params), 0.0, atol=1e-12
    )
    assert adam_of(state.opt_state).count == 1 and info["skipped_steps"] == 3
    assert info["kl"] > 1e-6
    further, info = update(config, stop_at_kl=1e6)
    assert info["skipped_steps"] == 0
    assert np.abs(steps_of(further.params, once.params)).max() > 0.01


def test_a_member_that_has_stopped_tells_the_same_in_company():
    """The other one's rewards are all alike: its KL is 0, so it goes on to the end."""
    config = change(BASE, num_epochs=4, num_minibatches=2, stop_at_kl=1e-4)
    alike = rows_of()._replace(reward=jnp.zeros((8, 6)))
    state = first_state(config)
    zero = TargetStatistics(*jnp.zeros(3))
    idle = state._replace(critic=state.critic._replace(targets=zero))
    algorithm = ppo(config, TASK)

    def both(state, rows):
        return jax.vmap(algorithm.update, (None, 0, 0))(key(), state, rows)

    def stack(x, y):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), x, y)

    states, infos = jax.jit(both)(stack(state, idle), stack(rows_of(), alike))
    alone, info = updater(config)(state, rows_of())
    assert infos["skipped_steps"][1] == 0 < info["skipped_steps"]
    for name, value in info.items():
        np.testing.assert_allclose(infos[name][0], value, rtol=1e-9, err_msg=name)
    chosen = jax.tree.map(lambda x: x[0], states)
    np.testing.assert_allclose(steps_of(chosen.params, alone.params), 0.0, atol=1e-12)


def test_the_penalty_follows_the_kl():
    config = change(PLAIN["kl-penalty"], kl_coefficient=0.5)
    rows = rows_of()

    def coefficient(target, state=None):
        state = first_state(config) if state is None else state
        run = updater(config, ("kl_target",))
        after, info = run(state, rows, kl_target=jnp.array(target))
        assert info["kl_coefficient"] == after.kl_coefficient
        return float(after.kl_coefficient), float(info["kl"])

    _, kl = coefficient(1.0)
    assert kl > 1e-3
    assert coefficient(kl / 1.51)[0] == 1.0 and coefficient(kl / 1.49)[0] == 0.5
    assert coefficient(kl * 1.49)[0] == 0.5 and coefficient(kl * 1.51)[0] == 0.25
    # It can come back from where it ends.
    least = first_state(config)._replace(kl_coefficient=jnp.array(0.5 / 1024))
    assert coefficient(1e9, least)[0] == 0.5 / 1024
    most = first_state(config)._replace(kl_coefficient=jnp.array(512.0))
    assert coefficient(1e-9, most)[0] == 512.0


def test_the_clipped_form_leaves_the_coefficient_alone():
    assert update(PLAIN["plain"])[0].kl_coefficient == 1.0


def test_both_rates_fall_to_zero_over_the_run():
    config = change(BASE, anneal=True, num_epochs=2)
    run, state, sizes = updater(config), first_state(config), []
    for _ in range(3):
        after, _ = run(state, rows_of())
        sizes.append(
            [
                np.abs(steps_of(after.params, state.params)).max(),
                np.abs(steps_of(after.critic.params, state.critic.params)).max(),
            ]
        )
        state = after
    # 2 updates of 2 steps: rates 1, 3/4 and 1/2, 1/4 of 0.1, then none.
    assert 0.1 < sizes[0][0] <= 0.1751 and 0.02 < sizes[1][0] <= 0.0751
    assert 0.02 < sizes[1][1] <= 0.0751
    assert sizes[2] == [0.0, 0.0]


def test_the_step_follows_the_kl():
    config = change(BASE, num_epochs=2, learning_rate=0.02)
    once, _ = update(change(config, num_epochs=1))
    plain, info = update(config)
    second = steps_of(plain.params, once.params)
    # The first step sees a KL of 0 and is left alone; the second is 1.5 times longer
    # or shorter where the KL is under half or over twice the target.
    assert info["kl"] > 1e-6
    for target, factor in ((1e3, 1.5), (1e-9, 1 / 1.5)):
        adapted, _ = update(change(config, adapt_to_kl=target))
        np.testing.assert_allclose(
            steps_of(adapted.params, once.params), factor * second, rtol=1e-6, atol=1e-9
        )


# What must change nothing.


@pytest.fixture(scope="module")
def several():
    config = PLAIN["clip"]

    def run(config, num_devices=1):
        state, infos = first_state(config), []
        for seed in range(3):
            step = updater(config, num_devices=num_devices)
            state, info = step(state, rows_of(seed))
            infos.append(info)
        return jax.tree.map(np.asarray, (state, infos))

    with jax.enable_x64(True):
        return config, run, run(config)


@pytest.mark.parametrize(
    ("chunk_size", "num_devices"),
    [(3, 1), pytest.param(None, 8, marks=pytest.mark.exhaustive), (2, 8)],
)
@pytest.mark.thinned(2)
def test_chunks_and_devices_change_nothing(several, chunk_size, num_devices):
    config, run, expected = several
    found = run(change(config, chunk_size=chunk_size), num_devices)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10)


# What is counted and what is refused.


def test_numbers_that_are_none_are_counted():
    rows = rows_of()
    spoilt = rows._replace(reward=rows.reward.at[2, 3].set(jnp.nan))
    _, info = update(BASE, spoilt)
    assert info["non_finite_batch"] >= 2, "the reward, and the advantages that see it"
    _, info = update(change(BASE, standardize="none"), spoilt)
    assert info["non_finite_gradient"] > 0 and info["non_finite_params"] > 0
    _, info = update(BASE)
    assert info["non_finite_batch"] == info["non_finite_params"] == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"clip_eps": 0.0}, r"^clip_eps is 0.0, needs a number in \(0, 1\]"),
        ({"num_minibatches": 0}, "^num_minibatches is 0, needs a whole number"),
        ({"form": "klip"}, "^form is 'klip', unknown; did you mean 'clip'"),
        ({"standardize": "rows"}, "^standardize is 'rows', unknown"),
        ({"kl_target": 0.0}, r"^kl_target is 0.0, needs a number in \(0"),
        ({"stop_at_kl": 0.0}, r"^stop_at_kl is 0.0, needs a number in \(0"),
        ({"adapt_to_kl": -1.0}, r"^adapt_to_kl is -1.0, needs a number in \(0"),
        ({"entropy_coefficient": -1.0}, "^entropy_coefficient is -1.0, needs"),
        ({"lambda_": 1.1}, r"^lambda_ is 1.1, needs a number in \[0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence, monkeypatch):
    from jaxtyping import config

    # As users have it, without the shape checker that the tests wrap around it.
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        PPOConfig(**settings)


def test_minibatches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"^num_minibatches is 5, needs a divisor of"):
        update(change(BASE, num_minibatches=5))
