"""Which layout, random numbers and resets a rollout should have: one change at a time.

    python benchmarks/rollout_variants.py [--num-envs 2048] [--rounds 5]

Each variant rolls out 128-step segments of a fresh policy and takes one score-function
gradient of them, for cheap rollouts that slow the rest down are no gain. The first
variant is what `jaxpg.rollout` does; the others differ from it in one respect. They run
on one device, and what is compared is the ratio to the first, round by round.
"""

import argparse
import statistics
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import timing

from jaxpg import envs
from jaxpg._unrolled import plain, unrolled
from jaxpg.chunks import Chunks
from jaxpg.distributions import discrete
from jaxpg.gradients import score_gradient
from jaxpg.policies import log_prob_fn, mlp_policy
from jaxpg.slots import restart_ended
from jaxpg.types import Trajectory

ENV = envs.make("CartPole-v1")
POLICY = mlp_policy(ENV.observation_space, ENV.action_space)


class Variant(NamedTuple):
    random: str = "by episode and decision"
    reset: str = "of what has ended"
    layout: str = "time first, swapped once"
    rounds: str = "written out"
    implementation: str = "threefry2x32"


VARIANTS = {
    "as in jaxpg": Variant(),
    "JAX's loop over the rounds": Variant(rounds="a loop"),
    "keys split at every step": Variant(random="split at every step"),
    "all uniforms drawn before": Variant(random="drawn before"),
    "rbg keys": Variant(implementation="rbg"),
    "unsafe_rbg keys": Variant(implementation="unsafe_rbg"),
    "reset of all under one cond": Variant(reset="under one cond"),
    "reset at every step": Variant(reset="at every step"),
    "rows first, written in place": Variant(layout="rows first"),
}


def rollout(variant: Variant, params: Any, key: Any, slots: Any, num_steps: int) -> Any:
    """`num_steps` decisions of every slot; slots are (key, state, obs, time)."""
    num_slots = slots[2].shape[0]
    rounds = unrolled if variant.rounds == "written out" else _as_it_is
    drawn = jax.random.uniform(key, (num_steps, num_slots))

    def pair(key: Any) -> tuple[Any, Any]:
        first, second = jax.random.split(key)
        return plain(first), plain(second)

    def sample(distribution: Any, key: Any) -> Any:
        with mock.patch.object(discrete, "unrolled", rounds):
            return distribution.sample(key)

    def decide(slot: Any, key_step: Any, uniform: Any) -> Any:
        slot_key, state, obs, time = slot
        distribution, _ = POLICY.step(params, None, obs)
        if variant.random == "drawn before":
            key_env = slot_key
            probability = jax.nn.sigmoid(
                distribution.logits[0] - distribution.logits[1]
            )
            action = (uniform >= probability).astype(jnp.int32)
        elif variant.random == "split at every step":
            key_action, key_env = pair(rounds(key_step))
            action = sample(distribution, key_action)
        else:
            key_action, key_env = pair(jax.random.fold_in(rounds(slot_key), time))
            action = sample(distribution, key_action)
        state, output = ENV.step(key_env, state, action)
        decision = Trajectory(
            obs,
            action,
            distribution.log_prob(action),
            output.reward,
            output.terminated,
            output.truncated,
            jnp.ones((), bool),
            time,
            time,
        )
        return (slot_key, state, output.obs, time + 1), decision

    def restart(slot: Any) -> Any:
        key_next, key_reset = pair(jax.random.fold_in(rounds(slot[0]), slot[3]))
        state, obs = ENV.reset(key_reset)
        return key_next, state, obs, jnp.zeros((), jnp.int32)

    def advance(carry: Any, inputs: Any) -> Any:
        slots, key, rows = carry
        index, uniforms = inputs
        key, key_step = jax.random.split(key)
        keys = jax.random.split(key_step, num_slots)
        slots, decision = jax.vmap(decide)(slots, keys, uniforms)
        ends = decision.terminated | decision.truncated

        def reset() -> Any:
            return jax.tree.map(
                lambda x, y: jnp.where(
                    jnp.expand_dims(ends, tuple(range(1, x.ndim))), x, y
                ),
                jax.vmap(restart)(slots),
                slots,
            )

        def reset_some(ids: Any) -> Any:
            return jax.vmap(restart)(jax.tree.map(lambda x: x[ids], slots))

        if variant.reset == "at every step":
            slots = reset()
        elif variant.reset == "of what has ended":
            ids = jnp.arange(num_slots, dtype=jnp.int32)
            slots = restart_ended(reset_some, ids, ends, slots)
        else:
            slots = jax.lax.cond(jnp.any(ends), reset, lambda: slots)
        if variant.layout != "rows first":
            return (slots, key, rows), decision
        rows = jax.tree.map(lambda x, y: x.at[:, index].set(y), rows, decision)
        return (slots, key, rows), None

    rows = None
    if variant.layout == "rows first":
        shapes = jax.eval_shape(jax.vmap(decide), slots, slots[0], drawn[0])[1]
        rows = jax.tree.map(
            lambda x: jnp.zeros((num_slots, num_steps, *x.shape[1:]), x.dtype), shapes
        )
    inputs = (jnp.arange(num_steps), drawn)
    (slots, _, rows), decisions = jax.lax.scan(advance, (slots, key, rows), inputs)
    if rows is None:
        rows = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), decisions)
    return rows, slots


def _as_it_is(key: Any) -> Any:
    return key


def build(variant: Variant, num_envs: int, num_steps: int) -> dict[str, Any]:
    """The variant's rollout, and its rollout with a gradient behind it."""
    key = jax.random.key(0, impl=variant.implementation)
    state, obs = jax.vmap(ENV.reset)(jax.random.split(key, num_envs))
    slots = (
        jax.random.split(key, num_envs),
        state,
        obs,
        jnp.zeros(num_envs, jnp.int32),
    )
    params = POLICY.init(jax.random.key(1), obs[0])
    log_probs = log_prob_fn(POLICY)
    run = jax.jit(lambda params, slots: rollout(variant, params, key, slots, num_steps))

    @jax.jit
    def loop(params: Any, slots: Any) -> Any:
        rows, slots = rollout(variant, params, key, slots, num_steps)
        weights = jnp.cumsum(rows.reward[:, ::-1], axis=1)[:, ::-1]
        chunks = Chunks(1024, cut_rows=True)
        return score_gradient(log_probs, params, rows, weights, chunks=chunks), slots

    return {
        "rollout": lambda: run(params, slots),
        "whole loop": lambda: loop(params, slots),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-envs", type=int, default=2048)
    parser.add_argument("--num-steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    amount = options.num_envs * options.num_steps
    runs = {
        (name, part): run
        for name, variant in VARIANTS.items()
        for part, run in build(variant, options.num_envs, options.num_steps).items()
    }
    seconds = timing.time_in_turns(runs, options.rounds)
    table = {}
    for name in VARIANTS:
        table[name] = {
            part: {
                "steps_per_second": amount / statistics.median(seconds[name, part]),
                "speed_up": timing.ratio(
                    seconds["as in jaxpg", part], seconds[name, part]
                ),
            }
            for part in ("rollout", "whole loop")
        }
        cells = [
            f"{part} {cell['steps_per_second'] / 1e6:5.2f}M steps/s "
            f"x{cell['speed_up']['median']:.2f}"
            for part, cell in table[name].items()
        ]
        print(f"{name:30} {'   '.join(cells)}")
    timing.save("rollout-variants-cpu", {"settings": vars(options), "table": table})


if __name__ == "__main__":
    main()
