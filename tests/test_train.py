"""Training in this process: what a run leaves, and when it refuses or stops."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxpg.algos.natural import ENACConfig
from jaxpg.algos.ppo import PPOConfig
from jaxpg.algos.reinforce import ReinforceConfig
from jaxpg.algos.vtrace import VTraceConfig
from jaxpg.envs.base import Box, Discrete, Environment
from jaxpg.envs.probes import action_dependent_reward, obs_and_action_reward
from jaxpg.heads import categorical_head
from jaxpg.policies import from_apply
from jaxpg.train.config import (
    ALGORITHMS,
    PolicyConfig,
    TrainConfig,
    config_from_json,
    config_to_json,
)
from jaxpg.train.log import read_rows
from jaxpg.train.loop import NonFiniteError, resume, train
from jaxpg.train.records import find_non_finite
from jaxpg.train.run import (
    create_run,
    initial_seeds,
    initial_state,
    load_params,
    open_run,
    read_config,
    restore_state,
)
from jaxpg.train.tuned import tuned, tuned_pairs
from jaxpg.types import StepOutput


@pytest.fixture(scope="module", autouse=True)
def shared_compilations(tmp_path_factory):
    """Many runs here compile the same program: let them share it."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in names}
    folder = str(tmp_path_factory.mktemp("compilations"))
    for name, value in zip(names, (folder, 0.0, "none"), strict=True):
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def tiny(folder, **changes):
    settings = {
        "env": "Probe-ObsAndActionReward-v0",
        "policy": PolicyConfig(hidden=(8,)),
        "num_envs": 8,
        "num_updates": 6,
        "checkpoint_every": 2,
        "num_devices": 1,
        "eval_episodes": 0,
        "runs_dir": Path(folder),
        "name": "run",
    }
    return TrainConfig(**(settings | changes))


def assert_same_bits(first, second):
    def bits(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def last_params(folder, which="latest", **own):
    return load_params(open_run(folder, num_devices=1, **own), which)[1]


# --- what a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds, DelayedReward: every episode has two decisions and return 1."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny(
        folder,
        env="Probe-DelayedReward-v0",
        num_seeds=2,
        seed=3,
        num_updates=5,
        eval_episodes=7,
    )
    return train(config, show=False)


def test_files_of_a_run(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "metrics.csv",
        "checkpoints",
        "learning_curve.png",
        "evaluation.json",
    }
    png = (finished.folder / "learning_curve.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n") and len(png) > 5000
    steps = sorted(path.name for path in (finished.folder / "checkpoints").iterdir())
    assert steps == [f"step_{n:010d}" for n in (2, 4, 5)]
    assert finished.update == 5 and finished.stopped_by is None


def test_rows_are_updates_times_seeds(finished):
    rows = read_rows(finished.folder)
    assert [(row["update"], row["seed"]) for row in rows] == [
        (update, seed) for update in (1, 2, 3, 4, 5) for seed in (3, 4)
    ]
    # 8 environments * 4 episodes * 2 decisions = 64 steps for each update and seed
    for row in rows:
        assert row["num_episodes"] == 32 and row["num_steps"] == 64
        assert row["env_steps"] == 64 * row["update"]
        assert row["mean_return"] == 1.0 and row["mean_length"] == 2.0
        assert row["non_finite_params"] == row["non_finite_gradient"] == 0
        assert row["non_finite_batch"] == 0
        assert row["seconds"] > 0 and row["steps_per_second"] > 0
        assert abs(row["entropy"] - math.log(2)) < 0.1  # estimated from samples
    assert len(finished.metrics["env_steps"]) == 10
    lines = (finished.folder / "metrics.csv").read_text().splitlines()
    assert lines[0].split(",") == list(rows[0]) and len(lines) == 11


def test_evaluation_of_each_seed(finished):
    rows = json.loads((finished.folder / "evaluation.json").read_text())
    assert rows == finished.evaluation
    assert [row["seed"] for row in rows] == [3, 4]
    for row in rows:
        assert row["episodes"] == 7 and row["mean"] == 1.0 and row["mean_length"] == 2


@pytest.mark.exhaustive
def test_one_evaluation_episode_has_no_standard_error(tmp_path):
    result = train(tiny(tmp_path, num_updates=1, eval_episodes=1), show=False)
    (row,) = json.loads((result.folder / "evaluation.json").read_text())
    assert row["standard_error"] is None and row["episodes"] == 1
    assert math.isnan(result.evaluation[0]["standard_error"])


def through_json(config):
    return config_from_json(json.loads(json.dumps(config_to_json(config))))


def test_settings_survive_json():
    policy = PolicyConfig(
        network="cnn",
        hidden=(3, 2, 1),
        channels=(5, 4),
        memory=6,
        activation="relu",
        normalize_observations=True,
        head="tanh",
        state_dependent_std=True,
        initial_log_std=-0.5,
        noise_hold=2,
    )
    algorithm = PPOConfig()
    config = TrainConfig(
        env="Probe-DelayedReward-v0",
        max_steps=7,
        seed=11,
        num_seeds=2,
        sweep=(("learning_rate", (0.5, 0.25)), ("clip_eps", (0.125, 0.75))),
        members_at_once=3,
        num_envs=6,
        num_updates=5,
        policy=policy,
        num_devices=2,
        checkpoint_every=9,
        keep_checkpoints=8,
        eval_episodes=0,
        runs_dir=Path("elsewhere"),
        name="named",
        algorithm=algorithm,
    )
    for mine, default in ((policy, PolicyConfig()), (config, TrainConfig())):
        for field in dataclasses.fields(mine):  # or this test could miss one
            assert getattr(mine, field.name) != getattr(default, field.name)
    assert through_json(config) == config


def another_value(kind, value):
    """Of a setting's type, and not its default."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return choices[choices.index(value) - 1]
    if type(None) in choices:
        return None if value is not None else {float: 0.5, int: 3}[choices[0]]
    return {bool: not value, int: value + 1, float: value / 2 or 0.5}[kind]


# Settings that need another one beside them.
TOGETHER = {
    ("off-policy", "credit"): {"ratio": "whole"},
    ("ppo", "replay_envs"): {"standardize": "batch"},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_setting_of_every_algorithm_survives_json(name):
    kind = ALGORITHMS[name]
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = another_value(types[field.name], field.default)
        assert value != field.default
        settings = {field.name: value} | TOGETHER.get((name, field.name), {})
        config = TrainConfig(algorithm=kind(**settings))
        again = through_json(config)
        assert again == config and type(again.algorithm) is kind
        assert getattr(again.algorithm, field.name) == value


def test_settings_of_another_version_are_refused():
    tree = config_to_json(TrainConfig())
    with pytest.raises(ValueError, match=r"num_env.*did you mean 'num_envs'"):
        config_from_json(tree | {"num_env": 3})
    tree["algorithm"]["name"] = "reinforcer"
    with pytest.raises(ValueError, match="did you mean 'reinforce'"):
        config_from_json(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_seeds": 0}, "num_seeds is 0"),
        ({"num_envs": -1}, "num_envs is -1"),
        ({"num_updates": 0}, "num_updates is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"num_devices": 0}, "num_devices is 0"),
        ({"eval_episodes": -1}, "eval_episodes is -1"),
        ({"members_at_once": 0}, "members_at_once is 0"),
        ({"sweep": (("learning_rat", (0.1,)),)}, "did you mean 'learning_rate'"),
        ({"sweep": (("chunk_size", (8.0,)),)}, "swept setting is 'chunk_size'"),
        ({"sweep": (("baseline", (1.0,)),)}, "swept setting is 'baseline'"),
        ({"sweep": (("discount", ()),)}, r"discount has the values \(\), needs"),
        ({"sweep": (("discount", (0.5, 0.5)),)}, "needs different ones"),
        ({"sweep": (("discount", (0.5, 1.5)),)}, "discount is 1.5"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": (8, 0)}, "hidden is 0"),
        ({"channels": (0,)}, "channels is 0"),
        ({"memory": -1}, "memory is -1"),
        ({"noise_hold": 0}, "noise_hold is 0"),
        ({"activation": "tahn"}, "did you mean 'tanh'"),
        ({"network": "nlp"}, "did you mean 'mlp'"),
        ({"head": "tan"}, "did you mean 'tanh'"),
    ],
)
def test_bad_settings_of_networks(changes, message, monkeypatch):
    from jaxtyping import config

    # As users have it, without the shape checker that the tests wrap around it.
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**changes)


# --- seeds side by side


@pytest.mark.exhaustive
def test_seeds_side_by_side_equal_single_runs(tmp_path):
    together = train(tiny(tmp_path, seed=5, num_seeds=3, name="all"), show=False)
    rows = read_rows(together.folder)
    firsts = []
    for index, seed in enumerate((5, 6, 7)):
        alone = train(tiny(tmp_path, seed=seed, name=f"{seed}"), show=False)
        (expected,) = last_params(alone.folder)
        params = last_params(together.folder)[index]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, expected
        )
        mine = [row for row in rows if row["seed"] == seed]
        for row, single in zip(mine, read_rows(alone.folder), strict=True):
            assert row["update"] == single["update"] and row["seed"] == single["seed"]
            for name in ("env_steps", "mean_return", "grad_norm", "entropy"):
                assert row[name] == pytest.approx(single[name], rel=1e-5), name
        firsts.append(mine[0]["grad_norm"])
    assert len(set(firsts)) == 3  # or equality of all seeds would pass for it


# --- values of settings side by side


SWEPT = [(rate, seed) for rate in (0.02, 0.01) for seed in (5, 6)]


@pytest.fixture(scope="module")
def single_runs(tmp_path_factory):
    """One run for each member of the sweep below."""
    folder = tmp_path_factory.mktemp("single")
    return {
        (rate, seed): train(
            tiny(
                folder,
                seed=seed,
                algorithm=ReinforceConfig(learning_rate=rate),
                name=f"{rate}-{seed}",
            ),
            show=False,
        ).folder
        for rate, seed in SWEPT
    }


@pytest.mark.parametrize("at_once", [None, 1], ids=["side by side", "in turn"])
@pytest.mark.thinned(2)
def test_a_sweep_equals_single_runs(tmp_path, single_runs, at_once):
    config = tiny(
        tmp_path,
        seed=5,
        num_seeds=2,
        sweep=(("learning_rate", (0.02, 0.01)),),
        members_at_once=at_once,
        eval_episodes=3,
    )
    result = train(config, show=False)
    rows = read_rows(result.folder)
    members = [(row["learning_rate"], row["seed"]) for row in rows]
    assert members == config.num_updates * SWEPT
    assert [(row["learning_rate"], row["seed"]) for row in result.evaluation] == SWEPT
    lasts = []
    for index, (rate, seed) in enumerate(SWEPT):
        folder = single_runs[rate, seed]
        params, (expected,) = last_params(result.folder)[index], last_params(folder)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, expected
        )
        mine = [
            row for row in rows if (row["learning_rate"], row["seed"]) == (rate, seed)
        ]
        for row, single in zip(mine, read_rows(folder), strict=True):
            assert set(row) == {*single, "learning_rate"}
            for name in ("update", "env_steps", "mean_return", "grad_norm", "entropy"):
                assert row[name] == pytest.approx(single[name], rel=1e-4), name
        lasts.append(mine[-1]["grad_norm"])
    assert len(set(lasts)) == 4  # or equality of all members would pass for it


def test_members_are_all_combinations_of_values_and_seeds():
    config = TrainConfig(
        seed=3,
        num_seeds=2,
        sweep=(("discount", (0.5, 1.0)), ("learning_rate", (0.1, 0.2, 0.3))),
    )
    members = config.members()
    assert config.num_members == len(members) == 12
    assert members[:3] == [
        {"seed": 3, "discount": 0.5, "learning_rate": 0.1},
        {"seed": 4, "discount": 0.5, "learning_rate": 0.1},
        {"seed": 3, "discount": 0.5, "learning_rate": 0.2},
    ]
    assert config.swept_values()["discount"] == [0.5] * 6 + [1.0] * 6
    assert len({tuple(member.items()) for member in members}) == 12


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.thinned(6)
def test_every_number_of_every_algorithm_can_be_swept(tmp_path, name, monkeypatch):
    """Traced in place of numbers; nothing is compiled."""
    from jaxtyping import config as checker

    # Settings are annotated as the numbers that they are without a sweep.
    monkeypatch.setattr(checker, "jaxtyping_disable", True)
    kind = ALGORITHMS[name]
    types = typing.get_type_hints(kind)
    optional = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is None and float in typing.get_args(types[field.name])
    ]
    algorithm = kind(**dict.fromkeys(optional, 0.5))
    numbers = {n: x for n, x in vars(algorithm).items() if isinstance(x, float)}
    sweep = tuple((n, (x / 2 or 0.5, x)) for n, x in numbers.items())
    assert len(numbers) >= 3 and all(name in numbers for name in optional)
    for setting in sweep:  # one by one they are fine
        config = tiny(tmp_path, algorithm=algorithm, sweep=(setting,))
        assert config.num_members == 2
    one_each = tuple((n, values[:1]) for n, values in sweep)
    config = tiny(tmp_path, algorithm=algorithm, sweep=one_each)
    run = create_run(config)
    state = jax.eval_shape(run.program.init, initial_seeds(config))
    after, metrics = jax.eval_shape(run.program.advance, state, np.int32(1))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"mean_return", "non_finite_params"} <= set(metrics)


# --- every algorithm


# Their updates are traced for each algorithm and each world once; all else is of all.
TRACED = {(env, name) for env, name in tuned_pairs() if name != "ppo"}
TRACED |= {pair for pair in tuned_pairs() if pair[0] not in dict(TRACED)}


def built(pair, folder):
    """The run that the stored settings of a pair make, and its first state's shapes."""
    config = dataclasses.replace(tuned(*pair), runs_dir=folder, num_devices=1)
    run = create_run(config)
    return run, jax.eval_shape(run.program.init, initial_seeds(config))


@pytest.mark.parametrize("pair", tuned_pairs(), ids="/".join)
@pytest.mark.thinned(3)
def test_stored_settings_build(tmp_path, pair):
    env, algorithm = pair
    config = tuned(env, algorithm)
    assert config.env == env and config.algorithm_name == algorithm
    assert through_json(config) == config
    built(pair, tmp_path)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(x, marks=() if x in TRACED else pytest.mark.exhaustive)
        for x in tuned_pairs()
    ],
    ids="/".join,
)
@pytest.mark.thinned(8)
def test_an_update_with_stored_settings_can_be_traced(tmp_path, pair):
    run, state = built(pair, tmp_path)
    after, metrics = jax.eval_shape(run.program.advance, state, np.int32(1))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert "mean_return" in metrics


def test_settings_of_a_pair_that_none_are_stored_for():
    config = tuned("Probe-Bits-v0", "vtrace")
    assert config == TrainConfig(env="Probe-Bits-v0", algorithm=VTraceConfig())
    with pytest.raises(ValueError, match="did you mean 'ppo'"):
        tuned("CartPole-v1", "pppo")


# --- environments and policies of one's own


def countdown(max_steps: int | None = 3) -> Environment:
    """Three decisions; reward is the first feature's sign times the action's."""

    def observe(time):
        return jnp.stack([jnp.cos(time * 1.0), time * 1.0, jnp.ones(())])

    def reset(key):
        return jnp.zeros((), jnp.int32), observe(0)

    def step(key, state, action):
        reward = jnp.where(action == 1, 1.0, -1.0)
        obs = observe(state.astype(float) + 1)
        last = state >= (2 if max_steps else 10**6)
        return state + 1, StepOutput(obs, reward, last, jnp.zeros((), bool))

    space = Box(-9.0, 9.0, (3,))
    return Environment("Countdown", reset, step, space, Discrete(2), max_steps)


def linear_policy(scale=0.1):
    def init(key, obs):
        return {"w": scale * jax.random.normal(key, (obs.shape[0], 2))}

    return from_apply(
        init, lambda params, obs: obs @ params["w"], categorical_head(Discrete(2))
    )


def test_own_environment_and_policy(tmp_path):
    own = {"env": countdown(), "policy": linear_policy()}
    config = tiny(tmp_path, num_updates=4, eval_episodes=5, name=None)
    result = train(config, show=False, **own)
    assert result.folder.name.startswith("Countdown-reinforce-seed0-")
    assert read_config(result.folder)[0].env == "Countdown"
    (params,) = last_params(result.folder, **own)
    assert params["network"]["w"].shape == (3, 2)
    assert result.evaluation[0]["mean_length"] == 3
    whole = train(tiny(tmp_path, num_updates=6, name="whole"), show=False, **own)
    longer = resume(result.folder, num_updates=6, show=False, **own)
    assert longer.update == 6
    assert_same_bits(
        last_params(result.folder, **own), last_params(whole.folder, **own)
    )


def test_own_objects_must_be_given_again(tmp_path):
    # The same observations as a registered one: nothing but the name tells them apart.
    env = action_dependent_reward()._replace(name="Probe-ConstantReward-v0")
    folder = train(tiny(tmp_path, num_updates=1), env=env, show=False).folder
    before = contents(folder)
    with pytest.raises(ValueError, match="env = an object of your own"):
        open_run(folder)
    with pytest.raises(ValueError, match="env = an object of your own"):
        resume(folder, num_updates=2, show=False)
    assert contents(folder) == before
    assert open_run(folder, env).env.step is env.step


# --- the compiled program


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.thinned(2)
def test_visits_of_the_host_change_no_bit(tmp_path, num_devices):
    config = tiny(tmp_path, num_seeds=2, num_devices=num_devices)
    init, advance = create_run(config).program
    seeds = initial_seeds(config)
    at_once, metrics = advance(init(seeds), np.int32(5))
    state, singles = init(seeds), []
    for _ in range(5):
        state, row = advance(state, np.int32(1))
        singles.append(jax.tree.map(lambda x: np.asarray(x)[0], row))
    assert_same_bits(state, at_once)
    np.testing.assert_array_equal(state.update, [5, 5])
    for name, values in metrics.items():
        expected = np.stack([row[name] for row in singles])
        np.testing.assert_array_equal(np.asarray(values)[:5], expected)
    assert np.ptp(np.asarray(metrics["grad_norm"])[:5, 0]) > 0


def test_number_of_updates_compiles_once(tmp_path):
    traces = []
    inner = obs_and_action_reward()

    def step(key, state, action):
        traces.append(1)
        return inner.step(key, state, action)

    config = tiny(tmp_path)
    run = create_run(config, env=inner._replace(step=step))
    state = initial_state(run)
    state, _ = run.program.advance(state, np.int32(1))
    first = len(traces)
    assert first > 0
    for count in (5, 3, 64):
        state, _ = run.program.advance(state, np.int32(count))
    assert len(traces) == first
    assert run.program.advance._cache_size() == 1
    assert int(state.update[0]) == 1 + 5 + 3 + 64


def test_a_long_run_traces_no_more_than_a_short_one(tmp_path):
    traces = []
    inner = obs_and_action_reward()

    def step(key, state, action):
        traces.append(1)
        return inner.step(key, state, action)

    counts = []
    for num_updates in (1, 30):
        traces.clear()
        config = tiny(tmp_path, num_updates=num_updates, name=f"{num_updates}")
        train(config, env=inner._replace(step=step), show=False)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


# --- numbers that are none


def fragile_policy(limit: float):
    """One parameter w, logits (0, w); their gradient is NaN once w exceeds limit."""

    def init(key, obs):
        return {"w": jnp.zeros(())}

    def apply(params, obs):
        w = params["w"]
        return jnp.stack([jnp.zeros(()), w + 0.0 * jnp.sqrt(limit - w)])

    return from_apply(init, apply, categorical_head(Discrete(2)))


def test_training_stops_at_the_first_nan(tmp_path):
    # Adam's first steps are about 0.5 each: w is 0, 0.5, 1.0, 1.5 before updates 1-4.
    env, policy = action_dependent_reward(), fragile_policy(1.2)
    algorithm = ReinforceConfig(learning_rate=0.5)
    config = tiny(tmp_path, num_updates=40, seed=7, algorithm=algorithm)
    with pytest.raises(NonFiniteError) as caught:
        train(config, env=env, policy=policy, show=False)
    message = str(caught.value)
    folder = tmp_path / "run"
    assert "NaN or infinity at update 4, seed 7" in message
    # The batch alone: every reward is the same, so every weight, which hides, is 0.
    assert "32 entries of the batch" in message
    assert f"last good checkpoint is that of update 2 in {folder}" in message
    assert "learning rate" in message
    rows = read_rows(folder)
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    assert [row["non_finite_batch"] for row in rows] == [0, 0, 0, 32]
    assert rows[3]["entropy"] is None  # JSON has no NaN

    run = open_run(folder, env, policy)
    assert run.checkpoints.steps() == [2]
    short = dataclasses.replace(config, num_updates=2, name="short")
    train(short, env=env, policy=policy, show=False)
    reference = open_run(tmp_path / "short", env, policy)
    assert_same_bits(restore_state(run, 2), restore_state(reference, 2))


def test_nan_before_any_checkpoint(tmp_path):
    def step(key, state, action):
        state, output = action_dependent_reward().step(key, state, action)
        return state, output._replace(reward=output.reward * jnp.nan)

    env = action_dependent_reward()._replace(step=step)
    with pytest.raises(NonFiniteError, match=r"update 1, .*no checkpoint was made"):
        train(tiny(tmp_path), env=env, show=False)
    assert [row["update"] for row in read_rows(tmp_path / "run")] == [1]


def test_absurd_learning_rate(tmp_path):
    algorithm = ReinforceConfig(learning_rate=1e38)
    with pytest.raises(NonFiniteError, match="Try a smaller learning rate"):
        train(tiny(tmp_path, num_updates=30, algorithm=algorithm), show=False)


def test_the_first_bad_update_and_its_seed_are_named(tmp_path):
    run = create_run(tiny(tmp_path, num_seeds=3, seed=5))
    zeros = np.zeros((6, 3), np.int32)
    columns = {"non_finite_gradient": zeros, "non_finite_params": zeros.copy()}
    assert find_non_finite(run, columns, 10) is None
    assert len(columns["non_finite_params"]) == 6
    columns["non_finite_params"][2, 1] = 4  # update 10 + 3, seed 5 + 1
    columns["non_finite_params"][3:] = 9
    message = find_non_finite(run, columns, 10)
    assert "update 13, seed 6: 4 entries of the params;" in message
    assert {name: len(x) for name, x in columns.items()} == dict.fromkeys(columns, 3)


# --- refusals


def test_an_existing_folder_is_never_written_to(tmp_path, finished):
    before = contents(finished.folder)
    config = tiny(finished.folder.parent)
    with pytest.raises(ValueError, match=r"exists already.*--resume"):
        train(config, show=False)
    assert contents(finished.folder) == before
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        train(tiny(tmp_path), show=False)
    assert not any((tmp_path / "run").iterdir())


def test_endless_episodes_need_max_steps(tmp_path):
    env = countdown(max_steps=None)
    with pytest.raises(ValueError, match=r"Countdown has no time limit.*--max-steps"):
        train(tiny(tmp_path), env=env, show=False)
    assert not (tmp_path / "run").exists()
    result = train(tiny(tmp_path, num_updates=1, max_steps=5), env=env, show=False)
    assert result.metrics["mean_length"].tolist() == [5.0]


def test_leaving_one_out_needs_two_episodes(tmp_path):
    algorithm = ReinforceConfig(episodes_per_env=1, baseline="leave-one-out")
    config = tiny(tmp_path, num_envs=1, algorithm=algorithm)
    with pytest.raises(ValueError, match=r"is 1, but baseline 'leave-one-out' needs"):
        train(config, show=False)
    assert not (tmp_path / "run").exists()


def test_a_regression_needs_two_episodes(tmp_path):
    algorithm = ENACConfig(episodes_per_env=1)
    config = tiny(tmp_path, num_envs=1, algorithm=algorithm)
    with pytest.raises(ValueError, match=r"is 1, but enac needs at least 2 episodes"):
        train(config, show=False)
    assert not (tmp_path / "run").exists()


def test_devices_must_divide_the_environments(tmp_path):
    with pytest.raises(ValueError, match="num_devices is 3"):
        train(tiny(tmp_path, num_devices=3), show=False)
    with pytest.raises(ValueError, match="num_devices is 16, but JAX sees 8"):
        train(tiny(tmp_path, num_devices=16, num_envs=16), show=False)


def test_no_run_no_resume(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        resume(tmp_path, show=False)
    (tmp_path / "config.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="not of schema 1"):
        resume(tmp_path, show=False)


# --- going on


def test_resuming_a_finished_run_changes_nothing(finished):
    before = contents(finished.folder)
    again = resume(finished.folder, show=False)
    assert again.update == 5 and again.evaluation == finished.evaluation
    assert contents(finished.folder) == before


def test_a_run_can_be_made_longer(tmp_path):
    short = train(tiny(tmp_path, num_updates=3, num_seeds=2), show=False)
    longer = resume(short.folder, num_updates=7, show=False)
    whole = train(tiny(tmp_path, num_updates=7, num_seeds=2, name="whole"), show=False)
    assert longer.update == 7
    assert_same_bits(last_params(short.folder), last_params(whole.folder))
    for name in set(whole.metrics) - {"seconds", "steps_per_second"}:
        np.testing.assert_array_equal(longer.metrics[name], whole.metrics[name])
    # Whoever resumes it after an interruption goes on to the new length.
    assert read_config(short.folder)[0].num_updates == 7


def test_a_damaged_checkpoint_is_passed_over_on_request(tmp_path):
    whole = train(tiny(tmp_path, name="whole"), show=False)
    train(tiny(tmp_path), show=False)
    folder = tmp_path / "run"
    largest = max(
        (
            p
            for p in (folder / "checkpoints" / "step_0000000006").rglob("*")
            if p.is_file()
        ),
        key=lambda p: p.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[:-1])
    before = contents(folder)
    with pytest.raises(ValueError, match="4"):
        resume(folder, num_updates=8, show=False)
    assert contents(folder) == before, "a failed resume touches nothing"
    result = resume(folder, from_update=4, show=False)
    assert result.update == 6
    assert_same_bits(last_params(folder), last_params(whole.folder))
    assert [row["update"] for row in read_rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_run_cannot_become_shorter_than_it_is(tmp_path):
    train(tiny(tmp_path), show=False)
    with pytest.raises(ValueError, match="num_updates is 3, but the run has made 6"):
        resume(tmp_path / "run", num_updates=3, show=False)


def test_an_annealed_run_keeps_its_length(tmp_path):
    algorithm = ReinforceConfig(anneal=True)
    folder = train(
        tiny(tmp_path, num_updates=2, algorithm=algorithm), show=False
    ).folder
    with pytest.raises(ValueError, match="anneals"):
        resume(folder, num_updates=3, show=False)
    assert resume(folder, num_updates=2, show=False).update == 2
    (mine,) = last_params(folder, "2")
    plain = train(tiny(tmp_path, num_updates=2, name="plain"), show=False).folder
    (other,) = last_params(plain)
    different = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), mine, other)
    assert any(jax.tree.leaves(different))  # the rate did fall


def test_other_software_is_warned_of(tmp_path):
    folder = train(tiny(tmp_path, num_updates=1), show=False).folder
    stored = json.loads((folder / "config.json").read_text())
    stored["provenance"]["jaxlib"] = "0.0.1"
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match=r"same bits: jaxlib was 0\.0\.1"):
        resume(folder, show=False)
