"""What devices tell each other in an update, read off the programs that run.

Gradients must be exchanged, as one vector each, and sums for statistics. Nothing whose
size grows with the batch may be: no row ever moves to another device.
"""

import math
import re

import jax
import numpy as np
import pytest

from jaxpg.algos.registry import RECIPES
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.run import create_run, initial_state

NUM_ENVS, NUM_STEPS, DEVICES = 64, 24, 4
HIDDEN = 7
NUM_PARAMS = (4 * HIDDEN + HIDDEN) + (2 * HIDDEN + 2)
NUM_CRITIC_PARAMS = (4 * HIDDEN + HIDDEN) + (HIDDEN + 1)
INSTRUCTION = re.compile(
    r"= (?P<shape>.+?) (?P<name>all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)
ARRAY = re.compile(r"(?:f32|s32|u32|pred)\[([\d,]*)\]")


def compiled(name, folder, **settings):
    """The whole program of some updates on several devices."""
    if name in ("ppo", "trpo", "a2c", "vtrace"):
        settings["num_steps"] = NUM_STEPS
    config = TrainConfig(
        num_envs=NUM_ENVS,
        num_devices=DEVICES,
        max_steps=NUM_STEPS,
        policy=PolicyConfig(hidden=(HIDDEN,)),
        algorithm=RECIPES[name].settings(**settings),
        runs_dir=folder,
        name=name,
    )
    run = create_run(config)
    state = jax.eval_shape(lambda: initial_state(run))
    shardings = jax.tree.map(lambda x: x.sharding, initial_state(run))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings,
    )
    return run.program.advance.lower(state, np.int32(1)).compile().as_text()


def exchanges(text):
    """(name, sizes of the arrays) of every exchange in a program."""
    found = []
    for line in text.splitlines():
        match = INSTRUCTION.search(line)
        if match:
            arrays = ARRAY.findall(match["shape"])
            sizes = [math.prod(int(n) for n in x.split(",") if n) for x in arrays]
            found.append((match["name"], sizes))
    return found


@pytest.mark.parametrize("name", ["ppo", "trpo", "vtrace", "reinforce"])
def test_only_sums_are_exchanged_and_none_grows_with_the_batch(name, tmp_path):
    found = exchanges(compiled(name, tmp_path))
    assert {kind for kind, _ in found} == {"all-reduce"}
    largest = max(size for _, sizes in found for size in sizes)
    # A gradient with its sums, or for every decision time a sum in eight folds.
    gradient, statistics = NUM_PARAMS + NUM_CRITIC_PARAMS + 8, 8 * NUM_STEPS
    assert NUM_PARAMS <= largest <= max(gradient, statistics) < NUM_ENVS * NUM_STEPS / 4


def test_a_step_of_ppo_exchanges_one_vector_and_nothing_else(tmp_path):
    text = compiled("ppo", tmp_path, standardize="none")
    vectors = [sizes for _, sizes in exchanges(text) if max(sizes) >= NUM_PARAMS]
    (vector,) = vectors
    both = NUM_PARAMS + NUM_CRITIC_PARAMS
    sums = ("kl", "clip_fraction", "entropy", "critic_loss", "count")
    assert vector == [both + len(sums)]
