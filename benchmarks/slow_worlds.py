"""What gymnax's slow worlds cost, and what of it an adapter can save.

    python benchmarks/slow_worlds.py [--num-envs 512] [--rounds 3]

    never               ended episodes step on: the world's own cost
    never, in blocks    the same, 32 worlds at a time: states that fit the cache
    what has ended      those alone are reset where they are few: what jaxpg's rollouts
                        do on CPU
    all when any has    all are reset once one has ended, under one `cond`
    gymnax's own step   resets every world at every step

Random actions, one device, in turns. What is left without resets is the world's own
step, which no adapter can make cheaper without writing the world anew.
"""

import argparse
from collections.abc import Callable
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import timing

from jaxpg import envs
from jaxpg.slots import restart_ended

WORLDS = [
    "CartPole-v1",
    "Breakout-MinAtar",
    "Asterix-MinAtar",
    "Freeway-MinAtar",
    "SpaceInvaders-MinAtar",
    "Seaquest-MinAtar",
]
NUM_STEPS = 64
BLOCK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num-envs", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = {}
    for name in WORLDS:
        table[name] = of_world(name, options.num_envs, options.rounds)
        print(name, table[name], flush=True)
        timing.save("slow-worlds-cpu", {"settings": vars(options), "table": table})


def of_world(name: str, num_envs: int, rounds: int) -> dict[str, Any]:
    """Steps per second of each way to reset."""
    env = envs.make(name)
    programs: dict[str, Callable[[], Any]] = {
        "never": steps_of(env, num_envs, never),
        "never, in blocks": steps_of(env, num_envs, never, in_blocks),
        "what has ended": steps_of(env, num_envs, of_what_has_ended),
        "all when any has": steps_of(env, num_envs, all_when_any),
        "gymnax's own step": gymnax_steps(name, num_envs),
    }
    seconds = timing.time_in_turns(programs, rounds)
    amount = num_envs * NUM_STEPS
    return {name: timing.rates(each, amount) for name, each in seconds.items()}


Reset = Callable[[Any, Any, Any, Any], Any]
"""`reset(env, keys, ended, state) -> state`, fresh where it has ended."""


def never(env: Any, keys: Any, ended: Any, state: Any) -> Any:
    return state


def reset_all(env: Any, keys: Any, ended: Any, state: Any) -> Any:
    fresh, _ = jax.vmap(env.reset)(keys)
    return jax.tree.map(lambda x, y: _select(ended, x, y), fresh, state)


def all_when_any(env: Any, keys: Any, ended: Any, state: Any) -> Any:
    return jax.lax.cond(
        jnp.any(ended), lambda: reset_all(env, keys, ended, state), lambda: state
    )


def of_what_has_ended(env: Any, keys: Any, ended: Any, state: Any) -> Any:
    return restart_ended(lambda keys: jax.vmap(env.reset)(keys)[0], keys, ended, state)


Over = Callable[[Any, Any], Any]
"""`over(step, arguments)`: one step of every world."""


def at_once(step: Any, arguments: Any) -> Any:
    return jax.vmap(step)(*arguments)


def in_blocks(step: Any, arguments: Any) -> Any:
    return jax.lax.map(lambda x: step(*x), arguments, batch_size=BLOCK)


def steps_of(
    env: Any, num_envs: int, reset: Reset, over: Over = at_once
) -> Callable[[], Any]:
    """Random decisions of every world in step."""

    @jax.jit
    def run(key: Any) -> Any:
        keys = jax.random.split(key, num_envs)
        state, _ = jax.vmap(env.reset)(keys)

        def step(state: Any, number: Any) -> Any:
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            action = jax.vmap(env.action_space.sample)(now)
            after, output = over(env.step, (now, state, action))
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


def _select(where: Any, new: Any, old: Any) -> Any:
    return jnp.where(where.reshape(-1, *[1] * (new.ndim - 1)), new, old)


if __name__ == "__main__":
    main()
