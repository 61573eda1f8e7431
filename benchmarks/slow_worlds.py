"""What gymnax's slow worlds cost, and what of it is resets.

    python benchmarks/slow_worlds.py [--num-envs 2048] [--rounds 3]

    never                    ended episodes step on: the world's own cost
    all when any has ended   what jaxpg's rollouts do
    a 32nd at a time         only so many are reset as have ended, rounded up
    gymnax's own step        resets every world at every step

Random actions, one device, in turns. What is left without resets is the world's own
step, which no adapter can make cheaper.
"""

import argparse
from collections.abc import Callable
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import timing

from jaxpg import envs

WORLDS = [
    "CartPole-v1",
    "Breakout-MinAtar",
    "Asterix-MinAtar",
    "Freeway-MinAtar",
    "SpaceInvaders-MinAtar",
    "Seaquest-MinAtar",
]
NUM_STEPS = 64
PARTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num-envs", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = {}
    for name in WORLDS:
        table[name] = of_world(name, options.num_envs, options.rounds)
        print(name, table[name], flush=True)
        timing.save("slow-worlds-cpu", {"settings": vars(options), "table": table})


def of_world(name: str, num_envs: int, rounds: int) -> dict[str, Any]:
    """Steps per second of each way to reset, and of resets alone."""
    env = envs.make(name)
    programs: dict[str, Callable[[], Any]] = {
        "never": steps_of(env, num_envs, never),
        "all when any has ended": steps_of(env, num_envs, all_when_any),
        f"a {PARTS}nd of the slots at a time": steps_of(env, num_envs, in_parts),
        "gymnax's own step": gymnax_steps(name, num_envs),
        "resets alone": resets(env, num_envs),
    }
    seconds = timing.time_in_turns(programs, rounds)
    amount = num_envs * NUM_STEPS
    return {name: timing.rates(each, amount) for name, each in seconds.items()}


Reset = Callable[[Any, Any, Any, Any], Any]
"""`reset(env, keys, ended, state) -> state`, fresh where it has ended."""


def never(env: Any, keys: Any, ended: Any, state: Any) -> Any:
    return state


def all_when_any(env: Any, keys: Any, ended: Any, state: Any) -> Any:
    def reset() -> Any:
        fresh, _ = jax.vmap(env.reset)(keys)
        return jax.tree.map(lambda x, y: _select(ended, x, y), fresh, state)

    return jax.lax.cond(jnp.any(ended), reset, lambda: state)


def in_parts(env: Any, keys: Any, ended: Any, state: Any) -> Any:
    """The first few that have ended, until none is left: resets are as many as ends."""
    size = ended.shape[0] // PARTS

    def some(carry: Any) -> Any:
        ended, state = carry
        (which,) = jnp.nonzero(ended, size=size, fill_value=ended.shape[0])
        fresh, _ = jax.vmap(env.reset)(keys[which])
        put = jax.tree.map(lambda x, y: x.at[which].set(y, mode="drop"), state, fresh)
        return ended.at[which].set(False, mode="drop"), put

    return jax.lax.while_loop(lambda c: jnp.any(c[0]), some, (ended, state))[1]


def steps_of(env: Any, num_envs: int, reset: Reset) -> Callable[[], Any]:
    """Random decisions of every world in step."""

    @jax.jit
    def run(key: Any) -> Any:
        keys = jax.random.split(key, num_envs)
        state, _ = jax.vmap(env.reset)(keys)

        def step(state: Any, number: Any) -> Any:
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            action = jax.vmap(env.action_space.sample)(now)
            after, output = jax.vmap(env.step)(now, state, action)
            ended = output.terminated | output.truncated
            total = jnp.sum(output.obs, dtype=float), jnp.sum(output.reward)
            return reset(env, now, ended, after), total

        return jax.lax.scan(step, state, jnp.arange(NUM_STEPS))[1]

    return lambda: run(jax.random.key(0))


def gymnax_steps(name: str, num_envs: int) -> Callable[[], Any]:
    """The same with gymnax's `step`."""
    env, params = gymnax.make(name)
    space = env.action_space(params)

    @jax.jit
    def run(key: Any) -> Any:
        keys = jax.random.split(key, num_envs)
        _, state = jax.vmap(env.reset, (0, None))(keys, params)

        def step(state: Any, number: Any) -> Any:
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            action = jax.vmap(space.sample)(now)
            obs, state, reward, *_ = jax.vmap(env.step, (0, 0, 0, None))(
                now, state, action, params
            )
            return state, (jnp.sum(obs, dtype=float), jnp.sum(reward))

        return jax.lax.scan(step, state, jnp.arange(NUM_STEPS))[1]

    return lambda: run(jax.random.key(0))


def resets(env: Any, num_envs: int) -> Callable[[], Any]:
    """As many resets as the others make decisions."""

    @jax.jit
    def run(key: Any) -> Any:
        def again(total: Any, number: Any) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, number), num_envs)
            state, obs = jax.vmap(env.reset)(keys)
            leaves = [jnp.sum(x, dtype=float) for x in jax.tree.leaves(state)]
            return total + sum(leaves) + jnp.sum(obs, dtype=float), None

        return jax.lax.scan(again, jnp.zeros(()), jnp.arange(NUM_STEPS))[0]

    return lambda: run(jax.random.key(0))


def _select(where: Any, new: Any, old: Any) -> Any:
    return jnp.where(where.reshape(-1, *[1] * (new.ndim - 1)), new, old)


if __name__ == "__main__":
    main()
