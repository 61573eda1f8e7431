"""Environment steps per second of REINFORCE's whole loop, beside its ceilings.

    python benchmarks/ceilings.py [--num-envs 2048] [--rounds 5] [--num-devices 2]

Timed is one update: rollout, returns, gradient, Adam. Only real decisions count
(mask = 1). The policy is held where it is by a vanishing learning rate, and there is no
baseline, so that no weight is zero and the gradient's work is never skipped. Fresh
policies make short episodes and trained ones long ones; both are timed, on whole
episodes (the queue, and one row per episode) and on 128-step segments.

Ceilings, in the same process: the environment with random actions and nothing else, the
policy's forward pass alone, forward and backward alone, and the arithmetic one, which
is the machine's float32 matrix product rate over the operations that a decision needs
(one forward in the rollout, one forward and backward in the gradient).

`throughput.py` has every algorithm and size, without these details.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from jaxpg import envs
from jaxpg.algos.base import make_task
from jaxpg.algos.reinforce import ReinforceConfig, reinforce
from jaxpg.chunks import Chunks
from jaxpg.envs.base import Environment
from jaxpg.gradients import score_gradient
from jaxpg.policies import log_prob_fn, mlp_policy
from jaxpg.returns import rewards_to_go, step_discounts
from jaxpg.rollout import rollout_episodes, rollout_segments, start_segments
from jaxpg.slots import restart_ended
from jaxpg.train.sharding import Placement, place
from jaxpg.types import Trajectory

HIDDEN = (64, 64)
HELD = 1e-12  # a learning rate at which the policy stays as it is


def main() -> None:
    options = parse()
    jax.config.update("jax_num_cpu_devices", options.num_devices)
    bench = Bench(options)
    seconds = timing.time_in_turns(bench.variants, options.rounds)
    flops = timing.matmul_flops_per_second()
    results = bench.report(seconds, flops)
    path = timing.save(f"ceilings-{jax.default_backend()}", results)
    print_table(results)
    print(f"stored in {path.name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--num-envs", type=int, default=2048)
    parser.add_argument("--num-steps", type=int, default=128)
    parser.add_argument("--episodes-per-env", type=int, default=4)
    parser.add_argument("--num-devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


class Bench:
    """The variants that are timed, and how many real steps each one makes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.env = envs.make(options.env)
        self.policy = mlp_policy(
            self.env.observation_space, self.env.action_space, hidden=HIDDEN
        )
        self.placement = place(options.num_devices, num_envs=options.num_envs)
        self.steps: dict[str, int] = {}
        self.variants: dict[str, Any] = {}
        self.busy: dict[str, float] = {}
        policies = {"fresh": self.fresh(), **self.trained()}
        for name, params in policies.items():
            per_env = options.episodes_per_env
            self.add_episodes(f"episodes, queue, {name}", params, per_env)
            self.add_episodes(f"episodes, a row each, {name}", params, 1)
            self.add_segments(f"segments, {name}", params)
        self.add_ceilings(policies["fresh"])

    def fresh(self) -> Any:
        _, obs = self.env.reset(jax.random.key(1))
        return self.policy.init(jax.random.key(0), obs)

    def trained(self) -> dict[str, Any]:
        """Policies on the way up, with episodes of all lengths, and at the top."""
        algorithm = self.algorithm(ReinforceConfig())
        _, obs = self.env.reset(jax.random.key(1))
        state = algorithm.init(jax.random.key(0), obs)
        step = jax.jit(lambda key, state: self.update(algorithm, key, state, 256, 64))
        found: dict[str, Any] = {}
        for key in jax.random.split(jax.random.key(2), 40):
            before = state.params
            state, rows = step(key, state)
            length = float(rows.num_decisions) / 256
            if length > self.env.max_steps / 4 and "half-trained" not in found:
                found["half-trained"] = before
                print(f"half-trained policy: episodes of {length:.1f} decisions")
        print(f"trained policy: episodes of {length:.1f} decisions")
        return {**found, "trained": state.params}

    def algorithm(self, config: ReinforceConfig) -> Any:
        task = make_task(
            self.env,
            self.policy,
            sum_over_rows=self.placement.sum_over_rows,
            map_rows=self.placement.map_rows,
        )
        return reinforce(config, task)

    def update(
        self, algorithm: Any, key: Any, state: Any, num_episodes: int, num_slots: int
    ) -> Any:
        def on_one_device(shared: Any, ids: Any) -> Any:
            params, key = shared
            slots = num_slots // self.placement.num_devices
            return rollout_episodes(
                self.env, self.policy, params, key, ids, num_slots=slots
            )

        ids = jnp.arange(num_episodes, dtype=jnp.int32)
        rows = self.placement.map_rows(on_one_device, (state.params, key), ids)
        state, _ = algorithm.update(key, state, rows)
        return state, rows

    def add_episodes(self, name: str, params: Any, per_env: int) -> None:
        algorithm = self.algorithm(ReinforceConfig(baseline="none", learning_rate=HELD))
        num_slots = self.options.num_envs
        _, obs = self.env.reset(jax.random.key(1))
        state = algorithm.init(jax.random.key(0), obs)._replace(params=params)

        @jax.jit
        def step(key: Any, state: Any) -> Any:
            num_episodes = num_slots * per_env
            state, rows = self.update(algorithm, key, state, num_episodes, num_slots)
            turns = jnp.sum(jnp.any(rows.mask, axis=0))
            return state, rows.num_decisions, turns

        key = jax.random.key(3)
        _, num_steps, turns = step(key, state)
        self.steps[name] = int(num_steps)
        self.busy[name] = float(num_steps) / (float(turns) * num_slots)
        self.variants[name] = lambda: step(key, state)

    def add_segments(self, name: str, params: Any) -> None:
        num_steps, num_slots = self.options.num_steps, self.options.num_envs
        chunks = Chunks(ReinforceConfig().chunk_size, cut_rows=True)
        log_probs = log_prob_fn(self.policy)
        # Slots in mid-episode, as in a run that has gone on for long.
        state = self.segments(params, None, 500)[1]

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            rows, state = self.segments(params, state, num_steps)
            weights = jax.vmap(self.to_go)(rows)
            gradient = score_gradient(
                log_probs,
                params,
                rows,
                weights,
                chunks=chunks,
                sum_over_rows=self.placement.sum_over_rows,
            )
            params = jax.tree.map(lambda p, g: p + HELD * g, params, gradient)
            return params, state

        self.steps[name] = num_slots * num_steps
        self.variants[name] = lambda: step(params, state)

    def to_go(self, row: Any) -> Any:
        return rewards_to_go(row.reward, step_discounts(row.ends, row.mask, 0.99))

    def segments(self, params: Any, state: Any, num_steps: int) -> Any:
        def on_one_device(shared: Any, part: Any) -> Any:
            params, key = shared
            if state is None:
                part = start_segments(
                    self.env, self.policy, key, self.options.num_envs, part
                )
            return rollout_segments(
                self.env, self.policy, params, key, part, num_steps, keep_next_obs=False
            )

        part = (
            jnp.arange(self.options.num_envs, dtype=jnp.int32)
            if state is None
            else state
        )
        shared = (params, jax.random.key(4))
        return self.placement.map_rows(on_one_device, shared, part)

    def add_ceilings(self, params: Any) -> None:
        num_steps, num_slots = self.options.num_steps, self.options.num_envs
        amount = num_steps * num_slots
        obs = jnp.asarray(
            np.random.default_rng(0).normal(size=(amount, *self.obs_shape())),
            jnp.float32,
        )
        spread = self.placement.map_rows
        forward = jax.jit(lambda p, x: spread(self.forward, p, x))
        gradient = jax.jit(lambda p, x: self.gradient(p, x))
        alone = environment_alone(self.env, num_slots, num_steps, self.placement)
        self.variants["environment alone"] = alone
        self.variants["forward alone"] = lambda: forward(params, obs)
        self.variants["forward and backward alone"] = lambda: gradient(params, obs)
        for name in list(self.variants)[-3:]:
            self.steps[name] = amount

    def obs_shape(self) -> tuple[int, ...]:
        return self.env.observation_space.shape

    def forward(self, params: Any, obs: Any) -> Any:
        """Log-probabilities of action 0, as many at a time as environments."""
        batches = obs.reshape((self.options.num_steps, -1, *obs.shape[1:]))

        def of_batch(batch: Any) -> Any:
            distribution, _ = jax.vmap(self.policy.step, (None, None, 0))(
                params, None, batch
            )
            return distribution.log_prob(jnp.zeros(batch.shape[:1], jnp.int32))

        return jax.lax.map(of_batch, batches).reshape(-1)

    def gradient(self, params: Any, obs: Any) -> Any:
        """What the trainer does with a batch of real decisions, and nothing else."""
        rows = self.decisions(obs.reshape((-1, self.options.num_steps, *obs.shape[1:])))
        return score_gradient(
            log_prob_fn(self.policy),
            params,
            rows,
            rows.reward,
            chunks=Chunks(ReinforceConfig().chunk_size, cut_rows=True),
            sum_over_rows=self.placement.sum_over_rows,
        )

    def decisions(self, obs: Any) -> Trajectory:
        """Rows with action 0 and reward 1 everywhere."""
        ones = jnp.ones(obs.shape[:2])
        number, flag = ones.astype(jnp.int32), ones == 1.0
        return Trajectory(
            obs, 0 * number, ones, ones, ~flag, ~flag, flag, number, number
        )

    def report(self, seconds: dict[str, list[float]], flops: float) -> dict[str, Any]:
        sizes = [int(np.prod(self.obs_shape())), *HIDDEN, 2]
        forward, both = timing.mlp_flops(sizes)
        arithmetic = flops / (forward + both)
        table = {
            name: timing.rates(seconds[name], steps) | {"steps": steps}
            for name, steps in self.steps.items()
        }
        for name, row in table.items():
            row["of_arithmetic_ceiling"] = row["median"] / arithmetic
            row["slots_busy"] = self.busy.get(name)
        return {
            "settings": vars(self.options),
            "matmul_gflops": flops / 1e9,
            "flops_per_step": {"forward": forward, "forward_and_backward": both},
            "arithmetic_ceiling_steps_per_second": arithmetic,
            "table": table,
        }


def environment_alone(
    env: Environment, num_envs: int, num_steps: int, placement: Placement
) -> Callable[[], Any]:
    """The environment with actions drawn beforehand; resets where one ended."""

    def steps(key: Any, ids: Any) -> Any:
        key_reset, key_action = jax.random.split(key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_reset, ids)
        restart = jax.vmap(env.reset)
        state, _ = restart(keys)
        draws = jax.random.split(key_action, num_steps * ids.shape[0])
        actions = jax.vmap(env.action_space.sample)(draws)
        actions = actions.reshape((num_steps, ids.shape[0], *actions.shape[1:]))

        def step(state: Any, action: Any) -> Any:
            after, output = jax.vmap(env.step)(keys, state, action)
            ends = output.terminated | output.truncated

            after = restart_ended(lambda keys: restart(keys)[0], keys, ends, after)
            return after, (jnp.sum(output.obs), output.reward)

        sums, rewards = jax.lax.scan(step, state, actions)[1]
        return jnp.swapaxes(rewards, 0, 1) + jnp.sum(sums)

    compiled = jax.jit(lambda k, ids: placement.map_rows(steps, k, ids))
    return lambda: compiled(jax.random.key(5), jnp.arange(num_envs))


def print_table(results: dict[str, Any]) -> None:
    ceiling = results["arithmetic_ceiling_steps_per_second"]
    print(f"matmul {results['matmul_gflops']:.0f} GFLOP/s", end=", ")
    print(f"arithmetic ceiling {ceiling / 1e6:.2f}M steps/s")
    for name, row in results["table"].items():
        print(
            f"{name:34} {row['median'] / 1e6:6.2f}M steps/s  "
            f"({row['low'] / 1e6:.2f} - {row['high'] / 1e6:.2f})  "
            f"busy {row['slots_busy'] or 1.0:.2f}  "
            f"{100 * row['of_arithmetic_ceiling']:5.1f}% of the ceiling"
        )


if __name__ == "__main__":
    main()
