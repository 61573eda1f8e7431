"""Wrappers of observations: what is seen changes, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs import (
    Box,
    Discrete,
    Environment,
    add_observation_noise,
    hide_components,
    map_observations,
    stack_frames,
    with_time_limit,
)
from jaxpg.envs.probes import endless_reward, masked_actions
from jaxpg.envs.tabular import random_mdp, tabular_environment
from jaxpg.policies import mlp_policy
from jaxpg.rollout import rollout_episodes, rollout_segments, start_segments
from jaxpg.types import StepOutput

KEY = jax.random.key(3)
KEYS = jax.random.split(KEY, 500)
LENGTH = 3


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def counter(low=-1.0, high=9.0, make_obs=lambda t: jnp.stack([t, 10.0 + t, 20.0 + t])):
    """Terminates after 3 decisions; at time t it shows (t, 10 + t, 20 + t)."""

    def reset(key):
        return jnp.zeros(()), make_obs(jnp.zeros(()))

    def step(key, state, action):
        time = state + 1.0
        over, no = time >= LENGTH, jnp.zeros((), bool)
        return time, StepOutput(make_obs(time), time, over, no)

    shape = jax.eval_shape(make_obs, jnp.zeros(())).shape
    box = Box(low, high, shape, jnp.result_type(float))
    return Environment("Counter", reset, step, box, Discrete(2), LENGTH)


def play(env, num_steps=LENGTH):
    """Everything seen, the first observation included."""
    state, obs = env.reset(KEY)
    seen = [obs]
    for t in range(num_steps):
        state, output = env.step(KEYS[t], state, jnp.int32(0))
        seen.append(output.obs)
    return np.stack(seen)


def wrapped(env):
    """All three at once: two of three components, noise, two frames."""
    return stack_frames(add_observation_noise(hide_components(env, (1,)), 0.5), 2)


# Functions of observations.


def test_functions_of_observations():
    env = map_observations(counter(), lambda obs: obs[0] * 2.0, Box(0.0, 6.0, ()))
    np.testing.assert_array_equal(play(env), [0.0, 2.0, 4.0, 6.0])
    assert env.observation_space == Box(0.0, 6.0, ())
    assert (env.name, env.max_steps, env.action_space) == ("Counter", 3, Discrete(2))


@pytest.mark.parametrize(
    ("function", "came"),
    [
        (lambda obs: obs, r"float32\[3\]"),
        (lambda obs: obs[:2].astype(jnp.int32), r"int32\[2\]"),
        (lambda obs: (obs[:2],), r"\('float32\[2\]',\)"),
    ],
)
def test_answers_that_do_not_fit_the_space_are_refused(function, came):
    need = rf"function makes {came} of an observation of Counter, needs float32\[2\]"
    with pytest.raises(ValueError, match=need):
        map_observations(counter(), function, Box(0.0, 1.0, (2,)))


# Hidden components.


@pytest.mark.parametrize(
    ("hidden", "first", "last"),
    [
        ((1,), [0.0, 20.0], [3.0, 23.0]),
        ([2, 0, 2], [10.0], [13.0]),
        ((), [0.0, 10.0, 20.0], [3.0, 13.0, 23.0]),
    ],
)
def test_hidden_components_are_gone(hidden, first, last):
    seen = play(hide_components(counter(), hidden))
    assert (seen[0].tolist(), seen[-1].tolist()) == (first, last)


def test_bounds_are_cut_like_observations():
    env = counter(low=np.array([-1.0, -2.0, -3.0]), high=np.array([4.0, 5.0, np.inf]))
    space = hide_components(env, (0,)).observation_space
    assert space == Box(np.array([-2.0, -3.0]), np.array([5.0, np.inf]), (2,))
    assert hide_components(counter(), (1,)).observation_space == Box(-1.0, 9.0, (2,))


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ((3,), "hidden has the entry 3, needs components from 0 to 2"),
        ((0, -1), "hidden has the entry -1, needs components from 0 to 2"),
        ((False, True, False), "hidden has the entry False, needs components"),
        ((0, 1, 2), r"hidden is \(0, 1, 2\), which is all 3 components"),
    ],
)
def test_components_that_cannot_be_hidden(hidden, message):
    with pytest.raises(ValueError, match=message):
        hide_components(counter(), hidden)


# Noise.


def test_noise_has_the_asked_for_spread_in_every_component():
    env = add_observation_noise(counter(), (0.0, 1.0, 3.0))

    def seen(key):
        state, obs = env.reset(key)
        return obs, env.step(key, state, jnp.int32(0))[1].obs

    first, second = quick(jax.vmap(seen))(KEYS)
    for time, obs in ((0.0, first), (1.0, second)):
        noise = np.array(obs) - (time + np.array([0.0, 10.0, 20.0]))
        assert (noise[:, 0] == 0.0).all()
        # Standard errors for std 1: mean 1 / sqrt(500) = 0.045, spread 0.032.
        scaled = noise[:, 1:] / np.array([1.0, 3.0])
        assert (abs(scaled.mean(axis=0)) < 4 * 0.045).all()
        assert (abs(scaled.std(axis=0) - 1.0) < 4 * 0.032).all()
        assert abs((scaled[:, 0] * scaled[:, 1]).mean()) < 4 * 0.045


def test_noise_is_fresh_at_every_decision_and_the_same_for_equal_keys():
    env = add_observation_noise(counter(), 1.0)
    seen = play(env)
    noise = seen - play(counter())
    assert len(np.unique(noise)) == noise.size == 4 * 3
    np.testing.assert_array_equal(seen, play(env))


def test_noise_does_not_enter_the_state():
    env = add_observation_noise(counter(), 5.0)
    state, _ = env.reset(KEY)
    state, output = env.step(KEY, state, jnp.int32(0))
    assert state == 1.0 and output.reward == 1.0


def test_noise_is_not_a_draw_that_the_world_makes_itself():
    """A world whose observations are normal draws from its key and its key's children.

    Apart from each other the variances add up to 2; the same draw twice has 4.
    """

    def draws(key):
        child, other = jax.random.split(key)
        keys = (key, child, other)
        return jnp.stack([jax.random.normal(k, (3,))[i] for i, k in enumerate(keys)])

    def step(key, state, action):
        no = jnp.zeros((), bool)
        return state, StepOutput(draws(key), jnp.zeros(()), no, no)

    box = Box(-np.inf, np.inf, (3,))
    world = Environment("Draws", lambda key: ((), draws(key)), step, box, Discrete(2))
    env = add_observation_noise(world, 1.0)
    first = quick(jax.vmap(lambda key: env.reset(key)[1]))(KEYS)
    later = quick(jax.vmap(lambda key: env.step(key, (), jnp.int32(0))[1].obs))(KEYS)
    for obs in (first, later):
        # Standard error of a variance of 2 from 500 draws: 2 sqrt(2 / 500) = 0.126.
        assert (abs(obs.var(axis=0) - 2.0) < 4 * 0.126).all()


def test_noise_leaves_no_bounds_and_may_be_traced():
    env = add_observation_noise(counter(), np.ones(3))
    assert env.observation_space == Box(-np.inf, np.inf, (3,))

    def first(std):
        return add_observation_noise(counter(), std).reset(KEY)[1]

    small, large = jax.vmap(first)(jnp.array([1.0, 2.0]))
    clean = jnp.array([0.0, 10.0, 20.0])
    # Numbers up to 24 are rounded to 2e-6.
    np.testing.assert_allclose(large - clean, 2.0 * (small - clean), atol=1e-5)
    assert (abs(small - clean) > 1e-2).all()


@pytest.mark.parametrize(
    ("std", "message"),
    [
        (-0.1, "std is -0.1, needs finite numbers of at least 0"),
        (float("nan"), "std is nan, needs finite"),
        ((0.0, 1.0, float("inf")), "inf.*needs finite"),
        ((1.0, 1.0), r"std has shape \(2,\), needs .* shape \(3,\)"),
        (np.ones((1, 3)), r"std has shape \(1, 3\)"),
    ],
)
def test_spreads_that_make_no_sense(std, message):
    with pytest.raises(ValueError, match=message):
        add_observation_noise(counter(), std)


# Stacked frames.


def test_frames_start_with_the_first_and_end_with_the_true_last():
    env = stack_frames(counter(make_obs=lambda t: jnp.stack([t, 10.0 + t])), 3)
    expected = [
        [0, 10, 0, 10, 0, 10],
        [0, 10, 0, 10, 1, 11],
        [0, 10, 1, 11, 2, 12],
        [1, 11, 2, 12, 3, 13],
    ]
    np.testing.assert_array_equal(play(env), expected)


def test_images_are_stacked_by_channel():
    def image(t):
        return t + jnp.arange(4.0).reshape(2, 1, 2) * 10.0

    low = np.array([0.0, -1.0])  # one bound per channel
    env = stack_frames(counter(low=low, make_obs=image), 2)
    assert env.observation_space == Box(
        np.array([0.0, -1.0, 0.0, -1.0]), 9.0, (2, 1, 4)
    )
    np.testing.assert_array_equal(play(env)[2], [[[1, 11, 2, 12]], [[21, 31, 22, 32]]])


def test_one_frame_changes_nothing():
    env = stack_frames(counter(), 1)
    np.testing.assert_array_equal(play(env), play(counter()))
    assert env.observation_space == counter().observation_space


@pytest.mark.parametrize("wrong", [0, -1, True])
def test_numbers_of_frames_are_checked(wrong):
    with pytest.raises(ValueError, match=f"num_frames is {wrong}, needs a whole"):
        stack_frames(counter(), wrong)


# All of them.


@pytest.mark.parametrize(
    ("wrap", "need"),
    [
        (lambda env: hide_components(env, (0,)), r"a Box with shape \(D,\)"),
        (lambda env: add_observation_noise(env, 1.0), "a Box with a floating dtype"),
        (lambda env: stack_frames(env, 2), "a Box with rank one or more"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(wrap, need):
    table = tabular_environment(random_mdp(0))
    scalar = counter(make_obs=lambda t: t.astype(jnp.int32))
    scalar = scalar._replace(observation_space=Box(0, 9, (), jnp.int32))
    for env in (table, scalar, masked_actions()):
        message = rf"observation space of {env.name} is .*, needs {need}; .*map_obs"
        with pytest.raises(ValueError, match=message):
            wrap(env)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: hide_components(env, (0,)),
        lambda env: add_observation_noise(env, 1.0),
        lambda env: stack_frames(env, 2),
        wrapped,
    ],
)
def test_the_rest_of_the_world_stays(wrap):
    env = counter()._replace(tells_truncation=False)
    around = wrap(env)
    assert not around.tells_truncation
    assert (around.name, around.max_steps) == (env.name, env.max_steps)
    assert around.action_space == env.action_space


def test_float64_stays(float64):
    env = wrapped(counter())
    assert play(env).dtype == env.observation_space.dtype == jnp.float64


def test_time_limits_within_and_around():
    for env in (
        with_time_limit(wrapped(counter()), 2),
        wrapped(with_time_limit(counter(), 2)),
    ):
        assert env.max_steps == 2
        state, _ = env.reset(KEY)
        state, first = env.step(KEYS[0], state, jnp.int32(0))
        _, second = env.step(KEYS[1], state, jnp.int32(0))
        assert (first.truncated, second.truncated) == (False, True)
        assert second.obs.shape == env.observation_space.shape == (4,)


# Inside rollouts: noise of std 0.5 aside, episodes show
# (0, 20, 0, 20), (0, 20, 1, 21), (1, 21, 2, 22) and, as the last, (2, 22, 3, 23).
SHOWN = [[0, 20, 0, 20], [0, 20, 1, 21], [1, 21, 2, 22], [2, 22, 3, 23]]


def check_rows(rows, num_rows):
    """Whole episodes follow one another, each stack beginning anew."""
    num_episodes = rows.obs.shape[1] // LENGTH
    expected = np.tile(SHOWN[:-1], (num_episodes, 1))
    expected_next = np.tile(SHOWN[1:], (num_episodes, 1))
    assert rows.obs.shape == (num_rows, num_episodes * LENGTH, 4)
    # 4.5 deviations; there are about 100 draws.
    assert abs(rows.obs - expected).max() < 4.5 * 0.5
    assert abs(rows.next_obs - expected_next).max() < 4.5 * 0.5
    inner = rows.time < LENGTH - 1
    after = np.roll(rows.obs, -1, axis=1)
    np.testing.assert_array_equal(after[inner], rows.next_obs[inner])
    first = rows.obs[rows.time == 0]
    np.testing.assert_array_equal(first[:, :2], first[:, 2:])
    assert len(np.unique(first[:, 0])) == len(first)
    np.testing.assert_array_equal(rows.terminated, rows.time == LENGTH - 1)


@pytest.mark.parametrize("kind", ["episodes", "segments"])
def test_wrapped_worlds_roll_out(kind):
    env = wrapped(counter())
    policy = mlp_policy(env.observation_space, env.action_space, hidden=(4,))
    params = quick(policy.init)(KEY, jnp.zeros(4))

    def episodes(params):
        ids = jnp.arange(6, dtype=jnp.int32)
        return rollout_episodes(
            env, policy, params, KEY, ids, num_slots=3, keep_next_obs=True
        )

    def segments(params):
        state = start_segments(env, policy, KEY, 3)
        return rollout_segments(env, policy, params, KEY, state, 2 * LENGTH)[0]

    rows = quick({"episodes": episodes, "segments": segments}[kind])(params)
    assert rows.mask.all()
    check_rows(jax.tree.map(np.array, rows), num_rows=3)


def test_endless_worlds_with_noise_differ_only_in_what_is_seen():
    env = add_observation_noise(endless_reward(2), 1.0)
    state, _ = env.reset(KEY)
    state, first = env.step(KEYS[0], state, jnp.int32(0))
    _, second = env.step(KEYS[1], state, jnp.int32(0))
    assert first.obs[0] != second.obs[0] != 0.0
    assert (first.reward, second.reward) == (1.0, 1.0)
    assert (first.truncated, second.truncated) == (False, True)
