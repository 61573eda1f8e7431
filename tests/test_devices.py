"""Every algorithm learns the same on eight devices as on one, but for rounding."""

import jax
import numpy as np
import pytest

from jaxpg.algos.registry import RECIPES
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.run import create_run, initial_state

SEGMENTS = ("ppo", "trpo", "a2c", "vtrace")
NUM_STEPS = 8


def after(name, num_devices, count, folder):
    """The algorithm's state after some updates, and what was told of them."""
    settings = {"num_steps": NUM_STEPS} if name in SEGMENTS else {"episodes_per_env": 1}
    config = TrainConfig(
        num_envs=16,
        num_devices=num_devices,
        max_steps=40,  # so that some episodes end before, and returns differ
        policy=PolicyConfig(hidden=(3,)),
        algorithm=RECIPES[name].settings(**settings),
        runs_dir=folder,
        name=f"{name}-{num_devices}",
    )
    run = create_run(config)
    state, metrics = run.program.advance(initial_state(run), np.int32(count))
    assert metrics["num_steps"][count - 1] > 0
    first = jax.tree.leaves(initial_state(run).algorithm.params)
    return leaves(first), leaves(state.algorithm), leaves(metrics)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_the_same(name, count, tolerance, folder):
    before, *alone = after(name, 1, count, folder)
    _, *together = after(name, 8, count, folder)
    moved = zip(before, alone[0], strict=False)
    assert any(x.shape != y.shape or np.abs(x - y).max() > 1e-3 for x, y in moved)
    for ours, theirs in zip(together, alone, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_updates_in_float64(name, tmp_path, float64):
    assert_the_same(name, 20, 1e-8, tmp_path)


def test_one_update_in_float32(tmp_path):
    assert_the_same("ppo", 1, 1e-4, tmp_path)
