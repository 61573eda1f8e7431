"""Spaces, time limits, probe worlds and names."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import envs
from jaxpg.envs import (
    PROBES,
    Box,
    Discrete,
    Environment,
    Masked,
    MaskedObs,
    MultiBinary,
    MultiDiscrete,
    make,
    register,
    registry,
    with_time_limit,
)
from jaxpg.envs.probes import (
    delayed_reward,
    endless_reward,
    masked_actions,
    push_away,
    remember_first,
)
from jaxpg.types import StepOutput

KEYS = jax.random.split(jax.random.key(0), 500)


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def draw(space):
    return quick(jax.vmap(space.sample))(KEYS)


# Spaces.


@pytest.mark.parametrize(
    ("space", "values"),
    [
        (Discrete(3), {0, 1, 2}),
        (MultiDiscrete((2, 3)), {(a, b) for a in range(2) for b in range(3)}),
        (Box(-1, 2, (), jnp.int32), {-1, 0, 1, 2}),
        (MultiBinary(2), {(0, 0), (0, 1), (1, 0), (1, 1)}),
    ],
)
def test_samples_of_finite_spaces_are_all_their_values(space, values):
    draws = draw(space)
    assert draws.shape == (500, *space.shape) and draws.dtype == jnp.int32
    assert jax.vmap(space.contains)(draws).all()
    seen = draws.tolist()
    assert {tuple(x) if isinstance(x, list) else x for x in seen} == values


def test_images_reach_both_ends_of_their_range():
    space = Box(0, 255, (4, 4), jnp.uint8)
    draws = draw(space)
    assert draws.dtype == jnp.uint8
    assert draws.min() == 0 and draws.max() == 255


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-2.0, 3.0),
        (-np.inf, np.inf),
        (5.0, np.inf),
        (-np.inf, -5.0),
        (np.array([-1.0, -np.inf, 7.0]), np.array([1.0, -3.0, np.inf])),
        (-np.finfo(np.float32).max, np.finfo(np.float32).max),
    ],
)
def test_samples_of_boxes_lie_inside(low, high):
    space = Box(low, high, (3,))
    draws = draw(space)
    assert draws.shape == (500, 3) and draws.dtype == jnp.float32
    assert np.isfinite(draws).all()
    assert jax.vmap(space.contains)(draws).all()
    # Uniform on [-2, 3] has a spread of 1.44, a half normal 0.6: none is constant.
    assert (draws.std(axis=0) > 0.4).all()


def test_uniform_draws_fill_the_box():
    draws = draw(Box(-2.0, 3.0, ()))
    assert draws.min() < -1.9 and draws.max() > 2.9
    # Mean 0.5, standard error 1.44 / sqrt(500) = 0.065.
    assert abs(draws.mean() - 0.5) < 4 * 0.065


@pytest.mark.parametrize(
    ("space", "outside"),
    [
        (Discrete(3), jnp.int32(3)),
        (Discrete(3), jnp.int32(-1)),
        (MultiDiscrete((2, 3)), jnp.array([2, 0])),
        (MultiBinary(2), jnp.array([0, 2])),
        (MultiBinary(2), jnp.array([-1, 0])),
        (Box(0.0, 1.0, (2,)), jnp.array([0.5, 1.5])),
        (Box(0.0, 1.0, (2,)), jnp.array([-0.5, 0.5])),
        (Box(0, 1, (2,), jnp.int32), jnp.array([0, 2])),
        (Box(np.zeros(2), np.array([1.0, 2.0]), (2,)), jnp.array([1.5, 1.5])),
    ],
)
def test_what_is_outside(space, outside):
    assert not space.contains(outside)
    assert space.contains(jnp.zeros_like(outside))


def test_boxes_with_array_bounds_compare_and_hash():
    """So that an environment may be a static argument of `jit`."""
    bound = np.array([1.0, 2.0])
    one, other = Box(-bound, bound, (2,)), Box(-bound, bound, (2,), np.float32)
    assert one == other and hash(one) == hash(other)
    assert one != Box(-bound, 2 * bound, (2,)) and one != Discrete(2)
    assert Box(0.0, 1.0, (2,)) == Box(np.zeros(2), 1, (2,)) != Box(0.0, 1.0, (3,))


def test_bits_are_drawn_from_fair_coins_apart_from_each_other():
    draws = draw(MultiBinary(2)).astype(float)
    assert draws.shape == (500, 2)
    # Standard errors: 0.5 / sqrt(500) = 0.022 and 0.25 / sqrt(500) = 0.011.
    assert (abs(draws.mean(axis=0) - 0.5) < 4 * 0.022).all()
    assert abs(((draws[:, 0] - 0.5) * (draws[:, 1] - 0.5)).mean()) < 4 * 0.011


def test_masked_samples_are_features_with_every_action_allowed():
    space = Masked(Box(5.0, 6.0, (2,)), 3)
    assert space.shape == (2,)
    draws = draw(space)
    assert isinstance(draws, MaskedObs)
    assert draws.features.shape == (500, 2) and (draws.features >= 5.0).all()
    assert draws.action_mask.shape == (500, 3) and draws.action_mask.dtype == bool
    assert draws.action_mask.all() and jax.vmap(space.contains)(draws).all()


@pytest.mark.parametrize(
    ("features", "mask", "inside"),
    [
        (1, [True, False], True),
        (2, [True, False], False),
        (1, [False, False], False),
    ],
)
def test_masked_spaces_need_fitting_features_and_an_allowed_action(
    features, mask, inside
):
    obs = MaskedObs(jnp.int32(features), jnp.array(mask))
    assert Masked(Discrete(2), 2).contains(obs) == inside


@pytest.mark.parametrize(
    "space",
    [
        Discrete,
        MultiBinary,
        lambda n: MultiDiscrete((2, n)),
        lambda n: Masked(Discrete(2), n),
    ],
)
def test_empty_spaces_are_refused(space):
    with pytest.raises(ValueError, match="is 0, needs a whole number of at least 1"):
        space(0)


# Probes: every path by hand.


def play(env, actions, key=0, obs=None):
    """Observations (first one included), rewards, terminated, truncated."""
    key = jax.random.key(key)
    state, first = env.reset(key)
    if obs is not None:  # look for a start with this observation
        while first[0] != obs:
            key, _ = jax.random.split(key)
            state, first = env.reset(key)
    seen, rewards, terminated, truncated = [first[0]], [], [], []
    for action in actions:
        state, output = env.step(key, state, jnp.asarray(action))
        assert env.observation_space.contains(output.obs)
        seen.append(output.obs[0])
        rewards.append(output.reward)
        terminated.append(output.terminated)
        truncated.append(output.truncated)
    return tuple(np.array(x).tolist() for x in (seen, rewards, terminated, truncated))


@pytest.mark.parametrize("action", [0, 1])
def test_constant_reward(action):
    env = make("Probe-ConstantReward-v0")
    assert play(env, [action]) == ([0.0, 0.0], [1.0], [True], [False])


@pytest.mark.parametrize("obs", [-1.0, 1.0])
@pytest.mark.parametrize("action", [0, 1])
def test_probes_of_the_observation(obs, action):
    env = make("Probe-ObsDependentReward-v0")
    assert play(env, [action], obs=obs)[1:] == ([obs], [True], [False])
    env = make("Probe-ObsAndActionReward-v0")
    reward = 1.0 if (action == 1) == (obs == 1.0) else -1.0
    assert play(env, [action], obs=obs)[1:] == ([reward], [True], [False])


@pytest.mark.parametrize(("action", "reward"), [(0, -1.0), (1, 1.0)])
def test_action_dependent_reward(action, reward):
    env = make("Probe-ActionDependentReward-v0")
    assert play(env, [action]) == ([0.0, 0.0], [reward], [True], [False])


@pytest.mark.parametrize("actions", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_delayed_reward(actions):
    expected = ([0.0, 1.0, 1.0], [0.0, 1.0], [False, True], [False, False])
    assert play(delayed_reward(), actions) == expected


def test_endless_reward_only_truncates():
    env = endless_reward(3)
    expected = ([0.0] * 4, [1.0] * 3, [False] * 3, [False, False, True])
    assert play(env, [0, 1, 0]) == expected
    assert env.max_steps == 3


@pytest.mark.parametrize("cue", [-1.0, 1.0])
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_remember_first(cue, first, last):
    """Only the last action counts, and only the first observation tells it."""
    reward = cue * (1.0 if last == 1 else -1.0)
    expected = ([cue, 0.0, 0.0], [0.0, reward], [False, True], [False, False])
    assert play(remember_first(2), [first, last], obs=cue) == expected


@pytest.mark.parametrize(
    ("action", "reward"), [(0.5, 0.0), (-1.0, -2.25), (1.0, -0.25), (2.5, -4.0)]
)
def test_matching_number(action, reward):
    env = make("Probe-MatchingNumber-v0")
    assert play(env, [[action]]) == ([0.0, 0.0], [reward], [True], [False])
    assert env.action_space == Box(-1.0, 1.0, (1,))


@pytest.mark.parametrize(
    ("name", "action", "reward"),
    [
        # Right: 2 of 2, 1 of 2 (either part), none; an action is right by its place.
        ("Probe-TwoNumbers-v0", lambda i, j: (i, j), lambda i, j: 1.0),
        ("Probe-TwoNumbers-v0", lambda i, j: (1 - i, j), lambda i, j: 0.5),
        ("Probe-TwoNumbers-v0", lambda i, j: (i, (j + 1) % 3), lambda i, j: 0.5),
        ("Probe-TwoNumbers-v0", lambda i, j: (1 - i, (j + 2) % 3), lambda i, j: 0.0),
        ("Probe-TwoNumbers-v0", lambda i, j: (j, i), lambda i, j: float(i == j)),
        ("Probe-Bits-v0", lambda a, b, c: (a, b, c), lambda a, b, c: 1.0),
        ("Probe-Bits-v0", lambda a, b, c: (a, 1 - b, c), lambda a, b, c: 2 / 3),
        ("Probe-Bits-v0", lambda a, b, c: (1 - a, b, 1 - c), lambda a, b, c: 1 / 3),
        (
            "Probe-Bits-v0",
            lambda a, b, c: (0, 0, 0),
            lambda a, b, c: 1 - (a + b + c) / 3,
        ),
    ],
)
def test_probes_that_are_copied(name, action, reward):
    env = make(name)
    states, obs = jax.vmap(env.reset)(KEYS[:60])
    seen = obs.astype(int).tolist()
    sizes = {"Probe-TwoNumbers-v0": 2 * 3, "Probe-Bits-v0": 2**3}
    assert len({tuple(x) for x in seen}) == sizes[name]
    assert jax.vmap(env.observation_space.contains)(obs).all()
    actions = jnp.array([action(*x) for x in seen], jnp.int32)
    _, output = jax.vmap(env.step)(KEYS[:60], states, actions)
    expected = [reward(*x) for x in seen]
    np.testing.assert_allclose(output.reward, expected, rtol=1e-6)
    assert output.terminated.all() and not output.truncated.any()


def test_masked_actions():
    """All 6 masks with both signs, every action; the next mask is the complement."""
    env = masked_actions(2)
    states, obs = jax.vmap(env.reset)(KEYS[:100])
    signs, masks = np.array(obs.features[:, 0]), np.array(obs.action_mask)
    step = quick(jax.vmap(env.step))
    met = {(sign, *mask) for sign, mask in zip(signs, masks.tolist(), strict=True)}
    assert len(met) == 2 * 6 and (masks.sum(axis=1) == 2).all()
    for action in range(4):
        actions = jnp.full((100,), action, jnp.int32)
        after, output = step(KEYS[:100], states, actions)
        for i, mask in enumerate(masks):
            lower, higher = np.flatnonzero(mask)
            asked_for = lower if signs[i] == -1.0 else higher
            allowed = action in (lower, higher)
            reward = float(action == asked_for) if allowed else -10.0
            assert output.reward[i] == reward
        np.testing.assert_array_equal(output.obs.action_mask, ~masks)
        assert set(output.obs.features[:, 0].tolist()) == {-1.0, 1.0}
        assert not output.terminated.any()
        _, last = step(KEYS[:100], after, actions)
        # What was forbidden is allowed now, and the reverse.
        np.testing.assert_array_equal(last.reward == -10.0, masks[:, action])
        assert last.terminated.all() and not last.truncated.any()


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_push_away_ends_at_the_sixteenth_full_push(side):
    expected = (
        [side * t / 16 for t in range(17)],
        [0.0] * 15 + [1.0],
        [False] * 15 + [True],
        [False] * 16,
    )
    assert play(push_away(), [[side]] * 16) == expected
    assert play(push_away(), [[side * 7.0]] * 16) == expected  # clipped to one push
    seen, rewards, terminated, truncated = play(push_away(3), [[side / 2]] * 3)
    assert (seen[-1], rewards) == (side * 3 / 32, [0.0] * 3)
    assert (terminated, truncated) == ([False] * 3, [False, False, True])


@pytest.mark.parametrize(
    ("held", "low", "high"),
    [
        # Clipped N(0, 1) numbers have a spread of 0.718, 48 of them pushed by 1/16
        # 0.311: by convolution they reach 1 or -1 with probability 0.0019.
        (1, 0.0, 0.02),
        # Held for 8 decisions: 0.393 by convolution; standard error 0.011.
        (8, 0.393 - 4 * 0.011, 0.393 + 4 * 0.011),
        # Held throughout: |action| > 1/3, probability 0.739; standard error 0.010.
        (48, 0.739 - 4 * 0.010, 0.739 + 4 * 0.010),
    ],
)
def test_push_away_needs_noise_that_lasts(held, low, high):
    env = push_away()

    def reached(key):
        noise = jnp.repeat(jax.random.normal(key, (48 // held, 1)), held, axis=0)
        state, _ = env.reset(key)
        _, output = jax.lax.scan(lambda s, a: env.step(key, s, a), state, noise)
        return output.terminated.any()

    assert (
        low <= quick(jax.vmap(reached))(jax.random.split(KEYS[0], 2000)).mean() <= high
    )


def test_the_coin_is_fair():
    _, obs = jax.vmap(make("Probe-ObsDependentReward-v0").reset)(KEYS)
    # 500 signs: standard error of their mean 1 / sqrt(500) = 0.045.
    assert set(obs[:, 0].tolist()) == {-1.0, 1.0} and abs(obs.mean()) < 4 * 0.045


def types(tree, batch_axes=0):
    """Dtypes and shapes without the batch, for observations of any structure."""
    return jax.tree.map(lambda x: f"{x.dtype}{x.shape[batch_axes:]}", tree)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.thinned(2)
def test_probes_keep_the_contract(name):
    """Named by its id, stable types, ends exactly at `max_steps`, finite beyond."""
    env = make(name)
    assert env.name == name and env.tells_truncation

    def run(key):
        state, obs = env.reset(key)

        def one_step(state, key):
            return env.step(key, state, env.action_space.sample(key))

        keys = jax.random.split(key, env.max_steps + 3)
        return obs, jax.lax.scan(one_step, state, keys)[1]

    obs, output = quick(jax.vmap(run))(KEYS[:3])
    declared = types(jax.eval_shape(env.observation_space.sample, KEYS[0]))
    assert types(obs, 1) == types(output.obs, 2) == declared
    assert jax.vmap(env.observation_space.contains)(obs).all()
    assert output.reward.dtype == jnp.float32 and np.isfinite(output.reward).all()
    ends = output.terminated | output.truncated
    assert ends.dtype == bool
    assert (ends.argmax(axis=1) + 1 == env.max_steps).all()


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.thinned(3)
def test_probes_follow_double_precision(name, float64):
    env = make(name)
    state, obs = env.reset(jax.random.key(0))
    action = env.action_space.sample(jax.random.key(1))
    _, output = env.step(jax.random.key(2), state, action)
    declared = types(jax.eval_shape(env.observation_space.sample, jax.random.key(3)))
    assert types(obs) == types(output.obs) == declared
    features = obs.features if isinstance(obs, MaskedObs) else obs
    assert features.dtype == output.reward.dtype == jnp.float64


@pytest.mark.parametrize(
    "probe", [endless_reward, remember_first, masked_actions, push_away]
)
@pytest.mark.parametrize("wrong", [0, -1, 2.0, True])
def test_probe_lengths_are_checked(probe, wrong):
    with pytest.raises((ValueError, TypeError)):
        probe(wrong)


# Time limits.


def test_time_limit_truncates_and_keeps_termination():
    """Both flags at once: the task ended as the clock struck, and both are told."""
    env = with_time_limit(remember_first(3), 2)
    assert env.max_steps == 2
    assert play(env, [0, 0])[2:] == ([False, False], [False, True])
    env = with_time_limit(remember_first(3), 3)
    assert play(env, [0, 0, 0])[2:] == ([False] * 2 + [True], [False] * 2 + [True])
    env = with_time_limit(remember_first(3), 9)
    assert env.max_steps == 3
    assert play(env, [0, 0, 0])[2:] == ([False] * 2 + [True], [False] * 3)


def test_the_nearer_of_two_time_limits_counts():
    env = with_time_limit(with_time_limit(endless_reward(9), 2), 4)
    assert env.max_steps == 2
    assert play(env, [0, 0])[3] == [False, True]


def test_time_limit_bounds_what_nothing_bounds():
    def step(key, state, action):
        no = jnp.zeros((), bool)
        return state, StepOutput(jnp.zeros((1,)), jnp.ones(()), no, no)

    env = Environment(
        "open", lambda key: ((), jnp.zeros((1,))), step, Box(0, 1, (1,)), Discrete(2)
    )
    assert env.max_steps is None
    assert with_time_limit(env, 4).max_steps == 4


@pytest.mark.parametrize("wrong", [0, -3])
def test_time_limits_are_checked(wrong):
    with pytest.raises(ValueError, match=f"max_steps is {wrong}, needs a whole number"):
        with_time_limit(delayed_reward(), wrong)
    with pytest.raises(ValueError, match=f"max_steps is {wrong}, needs a whole number"):
        make("Probe-DelayedReward-v0", max_steps=wrong)


# Names.


def test_names_are_ours_and_gymnax_s():
    known = envs.names()
    assert known[: len(PROBES)] == list(PROBES)
    assert {"CartPole-v1", "MNISTBandit-bsuite", "Seaquest-MinAtar"} < set(known)
    ours = known[len(PROBES) : len(PROBES) + 2]
    assert ours == ["CartPoleNoVelocity-v1", "PendulumNoVelocity-v1"]
    assert len(known) == len(set(known)) == len(PROBES) + 2 + 26


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("cartpole", "CartPole-v1"),
        ("Probe-ConstantRewards", "Probe-ConstantReward-v0"),
        ("FrozenLake-v1", "FrozenLake-misc"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(wrong, meant):
    with pytest.raises(ValueError, match=f"name is '{wrong}', unknown; .*'{meant}'"):
        make(wrong)


def test_keywords_reach_parameters_and_classes():
    assert make("CartPole-v1", max_steps_in_episode=700).max_steps == 700
    assert make("DeepSea-bsuite", size=20).max_steps == 20
    lake = make("FrozenLake-misc", map_name="8x8", is_slippery=False)
    assert (lake.observation_space, lake.max_steps) == (Discrete(64), 200)
    assert make("FrozenLake-misc", map_name="8x8", max_steps=50).max_steps == 50
    assert make("Probe-RememberFirst-v0", num_steps=6).max_steps == 6
    assert make("Probe-EndlessReward-v0", max_steps=30).max_steps == 30

    heavy = make("Pendulum-v1", g=0.0)
    state, _ = heavy.reset(jax.random.key(0))
    after, _ = heavy.step(jax.random.key(1), state, jnp.zeros((1,)))
    # No gravity and no torque: the speed stays as it was.
    assert after.theta_dot == state.theta_dot != 0.0


@pytest.mark.parametrize(
    ("name", "source", "seen"),
    [
        ("CartPoleNoVelocity-v1", "CartPole-v1", [0, 2]),
        ("PendulumNoVelocity-v1", "Pendulum-v1", [0, 1]),
    ],
)
def test_worlds_without_velocities(name, source, seen):
    """The same episodes, of which less is seen."""
    env, full = make(name), make(source)
    assert (env.name, env.max_steps) == (name, full.max_steps)
    assert env.action_space == full.action_space
    high = np.asarray(full.observation_space.high)[seen]
    assert env.observation_space == Box(-high, high, (2,))
    keys = jax.random.split(jax.random.key(0))
    state, obs = env.reset(keys[0])
    full_state, full_obs = full.reset(keys[0])
    np.testing.assert_array_equal(obs, full_obs[np.array(seen)])
    action = env.action_space.sample(keys[0])
    _, output = env.step(keys[1], state, action)
    _, full_output = full.step(keys[1], full_state, action)
    np.testing.assert_array_equal(output.obs, full_output.obs[np.array(seen)])
    assert output.reward == full_output.reward


def test_worlds_without_velocities_take_gymnax_s_keywords():
    env = make("CartPoleNoVelocity-v1", max_steps_in_episode=700)
    assert env.max_steps == 700
    assert make("CartPoleNoVelocity-v1", max_steps=50).max_steps == 50
    with pytest.raises(ValueError, match=r"gravitas is no parameter .*gravity"):
        make("CartPoleNoVelocity-v1", gravitas=1.0)


def test_time_limit_for_any_world():
    env = make("CartPole-v1", max_steps=2)
    state, _ = env.reset(jax.random.key(0))
    state, first = env.step(jax.random.key(1), state, jnp.int32(0))
    state, second = env.step(jax.random.key(2), state, jnp.int32(1))
    assert (first.truncated, second.truncated) == (False, True)
    assert not second.terminated and env.max_steps == 2


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("CartPole-v1", "gravity, .*masscart, .*max_steps"),
        ("FrozenLake-misc", "is_slippery, map_name, max_steps"),
        ("Probe-RememberFirst-v0", "it has: max_steps, num_steps$"),
        ("Probe-ConstantReward-v0", "it has: max_steps$"),
    ],
)
def test_unknown_keywords_are_answered_with_the_valid_ones(name, known):
    with pytest.raises(
        ValueError, match=f"gravitas is no parameter of {name};.*{known}"
    ):
        make(name, gravitas=1.0)


def test_values_that_a_class_refuses_are_told():
    with pytest.raises(ValueError, match=r"FrozenLake-misc cannot load: .*map_name"):
        make("FrozenLake-misc", map_name="3x3")


@pytest.fixture
def no_mnist(monkeypatch, tmp_path):
    """MNIST is not there and cannot be had: the state of an offline machine."""
    from gymnax.utils import load_mnist

    def offline(directory=str(tmp_path / "nowhere")):
        raise OSError("no route to host")

    monkeypatch.setattr(load_mnist, "load_mnist", offline)


def test_worlds_that_cannot_load_say_why(no_mnist):
    problem = envs.load_problem("MNISTBandit-bsuite")
    assert problem == "needs the MNIST images, which gymnax downloads when it is made"
    with pytest.raises(ValueError, match=f"^MNISTBandit-bsuite {problem}: OSError: no"):
        make("MNISTBandit-bsuite")
    assert "MNISTBandit-bsuite" in envs.names()


def test_mnist_is_no_problem_where_its_files_are(monkeypatch, tmp_path):
    from gymnax.utils import load_mnist

    def stub(directory=str(tmp_path)):
        raise AssertionError("asking must not load")

    monkeypatch.setattr(load_mnist, "load_mnist", stub)
    for part in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        assert envs.load_problem("MNISTBandit-bsuite") is not None
        (tmp_path / f"{part}-idx-ubyte.gz").touch()
    assert envs.load_problem("MNISTBandit-bsuite") is None


@pytest.mark.parametrize("name", ["Probe-DelayedReward-v0", "CartPole-v1"])
def test_most_worlds_have_no_problem(name):
    assert envs.load_problem(name) is None


def test_own_factories_are_registered_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    register("Mine-v0", remember_first)
    assert make("Mine-v0", num_steps=3, max_steps=2).max_steps == 2
    assert "Mine-v0" in envs.names()
    with pytest.raises(ValueError, match="'Mine-v0' is taken"):
        register("Mine-v0", endless_reward)
    register("CartPole-v1", endless_reward)
    assert make("CartPole-v1").name == "Probe-EndlessReward-v0"
    assert envs.names().count("CartPole-v1") == 1
    with pytest.raises(ValueError, match="name is ''"):
        register("", endless_reward)


def test_probes_cost_no_gymnax():
    code = """
import sys, jaxpg.envs
jaxpg.envs.make("Probe-EndlessReward-v0", max_steps=3)
heavy = {"gymnax", "matplotlib", "flax"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
