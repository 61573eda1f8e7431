"""Every algorithm on eight devices: it learns what one learns, and little is exchanged.

What devices tell each other in an update is read off the programs that run. Gradients
must be exchanged, as one vector each, and sums for statistics. Nothing whose size grows
with the batch may be: no row ever moves to another device.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpg import room
from jaxpg.algos.registry import RECIPES
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.run import create_run, initial_state

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from exchanges import exchanges

SEGMENTS = ("ppo", "trpo", "a2c", "vtrace")
NUM_ENVS, NUM_STEPS, HIDDEN = 16, 8, 3
MAX_STEPS = 40  # some episodes end before, so that returns differ
NUM_PARAMS = (4 * HIDDEN + HIDDEN) + (2 * HIDDEN + 2)
NUM_CRITIC_PARAMS = (4 * HIDDEN + HIDDEN) + (HIDDEN + 1)
BOTH = NUM_PARAMS + NUM_CRITIC_PARAMS


def train(name, num_devices, count, folder):
    """First params, the state and the numbers after some updates, and the exchanges."""
    name, replayed = name.removesuffix(" replayed"), name.endswith(" replayed")
    settings = {"num_steps": NUM_STEPS} if name in SEGMENTS else {"episodes_per_env": 2}
    if replayed:
        settings |= {"replay_envs": 1, "standardize": "batch", "num_minibatches": 2}
    config = TrainConfig(
        num_envs=NUM_ENVS,
        num_devices=num_devices,
        max_steps=MAX_STEPS,
        policy=PolicyConfig(hidden=(HIDDEN,)),
        algorithm=RECIPES[name].settings(**settings),
        runs_dir=folder,
        name=f"{name}-{num_devices}",
    )
    run = create_run(config)
    state = initial_state(run)
    before = leaves(state.algorithm.params)
    advance = run.program.advance.lower(state, np.int32(count)).compile()
    state, metrics = advance(state, np.int32(count))
    assert metrics["num_steps"][count - 1] > 0
    after = leaves((state.algorithm, metrics))
    return before, after, exchanges(advance.as_text())


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_the_same(name, count, tolerance, folder):
    """Returns what eight devices exchange."""
    before, alone, silence = train(name, 1, count, folder)
    _, together, talk = train(name, 8, count, folder)
    assert silence == []
    params = alone[: len(before)]  # they come first in every state
    moved = [np.abs(x - y).max() for x, y in zip(before, params, strict=True)]
    assert max(moved) > 1e-3
    for x, y in zip(together, alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    return talk


# Every day what collects episodes, what solves with Fisher products, and minibatches;
# the others are made of the same parts.
DAILY = ("reinforce", "trpo", "ppo")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DAILY else pytest.mark.exhaustive)
        for name in (*RECIPES, "ppo replayed")
    ],
)
def test_twenty_updates_are_one_devices_and_no_row_is_exchanged(
    name, tmp_path, float64
):
    # A regression in which some directions hardly show magnifies rounding.
    tolerance = 1e-6 if name == "enac" else 1e-8
    talk = assert_the_same(name, 20, tolerance, tmp_path)
    assert {x.kind for x in talk} == {"all-reduce"}
    largest = max(size for x in talk for size in x.sizes)
    # Gradients with their sums, or for every decision time two sums in eight folds.
    assert NUM_PARAMS <= largest <= max(BOTH + 8, 2 * 8 * MAX_STEPS)
    assert largest < NUM_ENVS * (
        NUM_STEPS if name.split()[0] in SEGMENTS else 2 * MAX_STEPS
    )
    if name == "ppo":
        assert_one_vector_a_step(talk)


def assert_one_vector_a_step(talk):
    sums = ("kl", "clip_fraction", "entropy", "critic_loss", "count")
    (gradient,) = (x for x in talk if max(x.sizes) >= NUM_PARAMS)
    assert gradient.sizes == [BOTH + len(sums)]
    assert gradient.num_bytes == 8 * gradient.sizes[0]
    assert gradient.times == 16, "four epochs of four minibatches"


def test_rows_with_room_exchange_no_more(tmp_path, float64, monkeypatch):
    """Weights and statistics at both lengths that they may be worked out for."""
    monkeypatch.setattr(room, "WORTH_A_BRANCH", 1)
    monkeypatch.setattr(room, "SHARE", 2)
    talk = assert_the_same("reinforce", 20, 1e-8, tmp_path)
    assert {x.kind for x in talk} == {"all-reduce"}
    tables = [x for x in talk if max(x.sizes) > NUM_PARAMS]
    assert [x.sizes for x in tables] == 2 * [[2 * 8 * MAX_STEPS]], "one of each branch"


def test_one_update_in_float32(tmp_path):
    assert_the_same("ppo", 1, 1e-4, tmp_path)
