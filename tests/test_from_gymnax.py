"""The catalogue of gymnax, world by world, and the adapter against gymnax itself."""

import functools
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs import Box, Discrete, from_gymnax, make
from jaxpg.envs.from_gymnax import import_gymnax

gymnax = import_gymnax()

# Every world with its true bound, read from its source, and whether it ever terminates.
CATALOGUE = {
    "CartPole-v1": (500, True),
    "Pendulum-v1": (200, False),
    "Acrobot-v1": (500, True),
    "MountainCar-v0": (200, True),
    "MountainCarContinuous-v0": (999, True),
    "Asterix-MinAtar": (1000, True),
    "Breakout-MinAtar": (1000, True),
    "Freeway-MinAtar": (2500, False),
    "Seaquest-MinAtar": (1000, True),
    "SpaceInvaders-MinAtar": (1000, True),
    "Catch-bsuite": (9, True),
    "DeepSea-bsuite": (8, True),
    "MemoryChain-bsuite": (6, True),
    "UmbrellaChain-bsuite": (10, True),
    "DiscountingChain-bsuite": (100, False),
    "SimpleBandit-bsuite": (1, True),
    "FourRooms-misc": (500, True),
    "MetaMaze-misc": (200, True),
    "PointRobot-misc": (100, False),
    "BernoulliBandit-misc": (100, False),
    "GaussianBandit-misc": (100, False),
    "Reacher-misc": (100, False),
    "Swimmer-misc": (500, False),
    "Pong-misc": (1000, True),
    "FrozenLake-misc": (100, True),
}
LEAVE_THEIR_BOX = {
    "GaussianBandit-misc",
    "MemoryChain-bsuite",
    "MetaMaze-misc",
    "UmbrellaChain-bsuite",
}


QUICK_TO_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

made = functools.cache(make)


# Long episodes are looked at from so many decisions before their time limit.
LAST_STEPS = 200
OWN_BOUND = {name for name, (max_steps, _) in CATALOGUE.items() if max_steps <= 10}


def draw_keys(rng, *shape):
    """Keys from NumPy's numbers: nothing to compile."""
    data = rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32)
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def draw_actions(rng, space, *shape):
    if isinstance(space, Discrete):
        return rng.integers(0, space.n, shape).astype(np.int32)
    draws = rng.uniform(space.low, space.high, (*shape, *space.shape))
    return draws.astype(np.float32)


def random_run(env, num_steps, num_envs=3):
    """`num_envs` copies up to their bound, without resets; leaves [T, B, ...]."""
    rng = np.random.default_rng(0)
    actions = draw_actions(rng, env.action_space, num_steps, num_envs)
    skipped = env.max_steps - num_steps

    def one_step(state, inputs):
        key, action = inputs
        state, output = jax.vmap(env.step)(key, state, action)
        inside = jax.vmap(env.observation_space.contains)(output.obs)
        return state, (output, inside)

    # Types are judged here, not speed: unoptimised programs compile faster.
    @jax.jit(compiler_options=QUICK_TO_COMPILE)
    def run(key_reset, inputs):
        state, obs = jax.vmap(env.reset)(key_reset)
        if skipped:
            state = state.replace(time=state.time + skipped)
        return obs, *jax.lax.scan(one_step, state, inputs)[1]

    keys = draw_keys(rng, num_steps, num_envs)
    return run(draw_keys(rng, num_envs), (keys, actions))


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.thinned(6)
def test_catalogue(name):
    """Types are stable, observations are as declared, episodes end when they must."""
    max_steps, terminates = CATALOGUE[name]
    env = made(name)
    assert (env.name, env.max_steps, env.tells_truncation) == (name, max_steps, True)
    num_steps = min(max_steps, LAST_STEPS)
    obs, output, inside = random_run(env, num_steps)
    space = env.observation_space
    assert obs.shape == (3, *space.shape)
    assert output.obs.shape == (num_steps, 3, *space.shape)
    assert obs.dtype == output.obs.dtype == jnp.dtype(space.dtype)
    assert output.reward.dtype == jnp.float32
    assert output.terminated.dtype == output.truncated.dtype == bool
    assert np.all(np.isfinite(output.obs)) and np.all(np.isfinite(output.reward))

    terminated, truncated = map(np.asarray, output[2:])
    ends = terminated | truncated
    assert ends[-1].all()  # nobody goes beyond the bound ...
    assert not truncated[:-1].any()  # ... and no clock strikes before
    if name in OWN_BOUND:
        assert terminated[-1].all() and not ends[:-1].any()
    if not terminates:
        assert not terminated.any()
    alive = np.arange(num_steps)[:, None] <= ends.argmax(axis=0)
    if name not in LEAVE_THEIR_BOX:
        assert np.asarray(inside)[alive].all()


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.thinned(3)
def test_reset_has_the_strong_types_of_step(name):
    env = made(name)
    key = jax.random.key(0)
    action = jax.ShapeDtypeStruct(env.action_space.shape, env.action_space.dtype)
    state, obs = jax.eval_shape(env.reset, key)
    after, output = jax.eval_shape(env.step, key, state, action)
    again, _ = jax.eval_shape(env.step, key, after, action)

    def types_of(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    assert types_of(state) == types_of(after) == types_of(again)
    assert types_of(obs) == types_of(output.obs)
    assert not any(x.weak_type for x in jax.tree.leaves((state, output)))


def test_catalogue_is_complete():
    assert {*CATALOGUE, "MNISTBandit-bsuite"} == set(gymnax.registered_envs)


def test_cartpole_agrees_with_gymnax_up_to_its_time_limit():
    """Balanced to the limit of 500 and beyond it: gymnax resets there, we do not."""
    theirs, params = gymnax.make("CartPole-v1")
    env = from_gymnax(theirs)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        start_obs, start = theirs.reset(jax.random.key(3), params)
    state, obs = env.reset(jax.random.key(3))
    np.testing.assert_array_equal(obs, start_obs)

    def balance(obs):
        force = obs @ jnp.array([0.1, 0.5, 3.0, 1.0])
        return (force > 0).astype(jnp.int32)

    @jax.jit
    def both(key, their_state, state, obs):
        action = balance(obs)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            answer = theirs.step(key, their_state, action, params)
        key_step, _ = jax.random.split(key)
        state, output = env.step(key_step, state, action)
        return answer, state, output

    their_state = start
    for t in range(500):
        key = jax.random.fold_in(jax.random.key(4), t)
        answer, state, output = both(key, their_state, state, obs)
        after_reset, their_state, reward, terminated, truncated, info = answer
        np.testing.assert_array_equal(output.obs, info["final_observation"])
        assert output.reward == reward == 1.0
        assert output.terminated == terminated == False  # noqa: E712
        assert output.truncated == truncated == (t == 499)
        obs = output.obs
    assert not np.array_equal(after_reset, output.obs)
    assert their_state.time == 0 and state.time == 500


def hold(env, state, action, num_steps):
    """Flags of `num_steps` equal actions from `state`."""

    @jax.jit
    def run(state):
        def one_step(state, key):
            state, output = env.step(key, state, action)
            return state, (output.terminated, output.truncated)

        return jax.lax.scan(
            one_step, state, jax.random.split(jax.random.key(0), num_steps)
        )[1]

    return (np.asarray(flags) for flags in run(state))


def test_cartpole_terminates_before_the_clock():
    env = made("CartPole-v1")
    state, _ = env.reset(jax.random.key(0))
    terminated, truncated = hold(env, state, jnp.int32(1), 20)
    # One-sided force tips the pole after about ten steps.
    assert 5 < terminated.argmax() < 15
    assert not truncated.any()


def test_pendulum_only_truncates():
    env = made("Pendulum-v1")
    state, _ = env.reset(jax.random.key(0))
    terminated, truncated = hold(env, state, jnp.ones((1,)), 200)
    assert not terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(truncated), [199])


def test_mountain_car_tells_goal_from_clock():
    env = made("MountainCar-v0")
    state, _ = env.reset(jax.random.key(0))
    terminated, truncated = hold(env, state, jnp.int32(1), 200)
    assert not terminated.any() and np.flatnonzero(truncated).tolist() == [199]
    # One step short of the goal, at the top speed, and at the last tick of the clock.
    near = state.replace(position=jnp.float32(0.45), velocity=jnp.float32(0.07))
    terminated, truncated = hold(env, near, jnp.int32(2), 1)
    assert terminated.all() and not truncated.any()
    late = near.replace(time=jnp.int32(199))
    terminated, truncated = hold(env, late, jnp.int32(2), 1)
    assert terminated.all() and truncated.all()


def test_asked_for_actions_are_not_clipped():
    """MountainCarContinuous charges 0.1 * action^2, also out of the box."""
    env = made("MountainCarContinuous-v0")
    state, _ = env.reset(jax.random.key(0))
    _, output = env.step(jax.random.key(1), state, jnp.array([3.0]))
    np.testing.assert_allclose(output.reward, -0.9, rtol=1e-6)


def test_spaces_are_converted():
    assert made("FrozenLake-misc").observation_space == Discrete(16)
    assert made("CartPole-v1").action_space == Discrete(2)
    assert made("Pendulum-v1").action_space == Box(-2.0, 2.0, (1,))
    assert made("Catch-bsuite").observation_space == Box(0.0, 1.0, (10, 5))
    assert made("FourRooms-misc").observation_space == Box(1.0, 11.0, (4,))
    high = np.array([1.0, 1.0, 8.0], np.float32)
    assert made("Pendulum-v1").observation_space == Box(-high, high, (3,))


def test_parameters_move_the_bound():
    theirs, params = gymnax.make("MemoryChain-bsuite")
    long = from_gymnax(theirs, params.replace(memory_length=20))
    assert long.max_steps == 21
    cut = from_gymnax(theirs, params.replace(max_steps_in_episode=3), name="short")
    assert (cut.max_steps, cut.name) == (3, "short")
    with pytest.raises(ValueError, match=r"max_steps_in_episode of MemoryChain.* 0"):
        from_gymnax(theirs, params.replace(max_steps_in_episode=0))


@pytest.mark.parametrize(
    "wrong", [gymnax.environments.CartPole, gymnax.make("CartPole-v1"), None]
)
def test_other_objects_are_refused(wrong):
    with pytest.raises(TypeError, match="needs an object of a subclass of gymnax's"):
        from_gymnax(wrong)


def test_wrappers_are_refused():
    from gymnax.wrappers.purerl import LogWrapper

    with pytest.raises(TypeError, match="without wrappers"):
        from_gymnax(LogWrapper(gymnax.environments.CartPole()))


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("CartPole-v1", jnp.zeros((1,), jnp.int32)),
        ("CartPole-v1", jnp.float32(1.0)),
        ("Pendulum-v1", jnp.float32(1.0)),
    ],
)
def test_actions_of_another_shape_or_kind_are_refused(name, action):
    env = made(name)
    state, _ = env.reset(jax.random.key(0))
    with pytest.raises(ValueError, match=f"action has shape .*{name} needs shape"):
        env.step(jax.random.key(1), state, action)


class Drifting(gymnax.environments.CartPole):
    """Answers with integers where it was given floats, by turns."""

    def step_env(self, key, state, action, params):
        x = state.x
        other = jnp.int32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        obs = jnp.zeros(4)
        return obs, state.replace(x=x.astype(other)), 0.0, False, {}


class Misdeclared(gymnax.environments.CartPole):
    """Declares observations of another shape."""

    def observation_space(self, params):
        return gymnax.environments.spaces.Box(0, 1, (5,))


class SelfWilled(gymnax.environments.CartPole):
    """Says itself when to stop."""

    def is_truncated(self, state, params):
        return state.time >= 7


def test_foreign_worlds_are_checked():
    with pytest.raises(ValueError, match="changes its shapes or dtypes"):
        from_gymnax(Drifting())
    with pytest.raises(ValueError, match=r"observation space of .* has shape \(5,\)"):
        from_gymnax(Misdeclared())


def test_nothing_is_known_of_a_world_that_truncates_by_itself():
    assert from_gymnax(SelfWilled()).max_steps is None


def in_a_new_process(code):
    code = textwrap.dedent(code)
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_drawing_libraries_wait_until_they_are_used():
    """As if nobody had asked; then real imports and gymnax's own drawing work."""
    in_a_new_process("""
        import sys
        import jaxpg.envs
        assert "gymnax" not in sys.modules
        jaxpg.envs.make("Probe-ConstantReward-v0")
        assert "gymnax" not in sys.modules
        env = jaxpg.envs.make("Catch-bsuite")
        absent = {"matplotlib.pyplot", "seaborn", "pandas", "scipy.stats"}
        assert not absent & set(sys.modules), absent & set(sys.modules)

        import matplotlib
        matplotlib.use("agg")
        import matplotlib.pyplot as plt
        import matplotlib.pyplot
        assert type(plt).__name__ == "module" and plt is matplotlib.pyplot
        assert sys.modules["matplotlib.pyplot"] is plt
        plt.close(plt.figure())
        import seaborn
        assert seaborn.color_palette("cubehelix", 3)

        import gymnax, jax
        theirs, params = gymnax.make("Pong-misc")
        _, state = theirs.reset(jax.random.key(0), params)
        theirs.render(state, params)
        assert plt.get_fignums()
    """)


def test_loaded_libraries_stay_as_they_are():
    in_a_new_process("""
        import matplotlib.pyplot as plt
        from jaxpg.envs.from_gymnax import import_gymnax
        gymnax = import_gymnax()
        from gymnax.environments.bsuite import catch
        import sys
        assert catch.plt is plt is sys.modules["matplotlib.pyplot"]
        assert import_gymnax() is gymnax
    """)


def test_gymnax_draws_first():
    """The stand-in, not the user, imports the real module."""
    in_a_new_process("""
        import sys
        from jaxpg.envs.from_gymnax import import_gymnax
        import_gymnax()
        from gymnax.environments.bsuite import catch
        subplots = catch.plt.subplots
        import matplotlib.pyplot as plt
        assert subplots is plt.subplots and catch.plt is not plt
    """)


def test_stand_ins_step_aside_while_in_use():
    """Somebody who meets the stand-in in `sys.modules` gets the real module's names."""
    from jaxpg.envs.from_gymnax import _deferred

    sys.modules.pop("this", None)
    name = "antigravity_of_jaxpg"
    real = types.ModuleType(name)
    real.answer = 42
    with _deferred(name):
        stand_in = sys.modules[name]
        finder = types.SimpleNamespace(
            find_spec=lambda fullname, path=None, target=None: (
                importlib_spec(fullname, real) if fullname == name else None
            )
        )
        sys.meta_path.insert(0, finder)
        try:
            assert stand_in.answer == 42
            assert sys.modules[name] is real
        finally:
            sys.meta_path.remove(finder)
    assert sys.modules.pop(name) is real


def importlib_spec(name, module):
    from importlib.machinery import ModuleSpec

    loader = types.SimpleNamespace(
        create_module=lambda spec: module, exec_module=lambda module: None
    )
    return ModuleSpec(name, loader)
