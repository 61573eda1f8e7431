"""What PPO's large batches cost: stored, and played again.

    python benchmarks/ppo_memory.py [--sizes 11 12 13 14 15] [--rounds 5]

`growth`: bytes of a stored step, what the compiled program asks for, and the peak
resident memory of a process of its own, at 2^11 to 2^15 environments of CartPole-v1 on
one device; with `replay_envs` the batch is played again, 256 environments at a time.

`cost`: whole updates of both forms in turns, on as many devices as a run would take, on
a world that is cheap to play and on one that is not. Both standardise advantages over
the batch. Policies are fresh, and held there.
"""

import argparse
import json
from typing import Any

import jax
import numpy as np
import timing
from throughput import NUM_STEPS, Program, make_run

from jaxpg.envs import make
from jaxpg.policies import mlp_policy
from jaxpg.rollout import rollout_segments, start_segments
from jaxpg.train.run import initial_state

RESULT = "memory-ppo-cpu"
REPLAY_ENVS = 256
FORMS: dict[str, dict[str, Any]] = {
    "stored": {"standardize": "batch"},
    "replayed": {"standardize": "batch", "replay_envs": REPLAY_ENVS},
}
PLACES = [("CartPole-v1", 2048), ("SpaceInvaders-MinAtar", 512)]


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(of_this_process(options.child, 2 ** options.sizes[0])))
        return
    jax.config.update("jax_num_cpu_devices", 2)  # before JAX computes anything
    found: dict[str, Any] = {
        "settings": {"replay_envs": REPLAY_ENVS, "rounds": options.rounds},
        "stored_bytes_per_step": bytes_of_a_step(),
        "rows": [],
        "cost": [],
    }
    for size in options.sizes:
        for form in FORMS:
            words = ["--child", form, "--sizes", str(size)]
            found["rows"].append(timing.in_a_process(__file__, *words))
            timing.save(RESULT, found)
    for env, num_envs in PLACES:
        found["cost"].append(cost(env, num_envs, options.rounds))
        timing.save(RESULT, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def of_this_process(form: str, num_envs: int) -> dict[str, Any]:
    """One update of PPO's whole training program on one device."""
    run = make_run("CartPole-v1", num_envs, "ppo", num_devices=1, **FORMS[form])
    state = initial_state(run)
    advance = run.program.advance.lower(state, np.int32(1)).compile()
    before = timing.peak_bytes()
    jax.block_until_ready(advance(state, np.int32(1)))
    working = advance.memory_analysis().temp_size_in_bytes
    return {
        "form": form,
        "num_envs": num_envs,
        "peak_bytes": timing.peak_bytes(),
        "peak_bytes_of_imports_and_compiling": before,
        "working_bytes": working,
        "working_bytes_per_step": working / (num_envs * NUM_STEPS),
    }


def cost(env: str, num_envs: int, rounds: int) -> dict[str, Any]:
    """Seconds of a decision in both forms, and their ratio."""
    programs = {
        form: Program(env, num_envs, "ppo", **changes)
        for form, changes in FORMS.items()
    }
    count = programs["stored"].count
    programs["replayed"].count = count
    seconds = timing.time_in_turns(programs, rounds)
    steps = count * num_envs * NUM_STEPS
    row = {
        "env": env,
        "num_envs": num_envs,
        "steps_per_second": {k: timing.rates(x, steps) for k, x in seconds.items()},
        "times_as_long": timing.ratio(seconds["replayed"], seconds["stored"]),
        "working_bytes": {k: program.working_bytes for k, program in programs.items()},
    }
    print(row, flush=True)
    return row


def bytes_of_a_step() -> int:
    """The rollout's own arrays, and what PPO adds: advantage, target and value."""
    key, env = jax.random.key(0), make("CartPole-v1")
    policy = mlp_policy(env.observation_space, env.action_space)

    def one_segment() -> Any:
        params = policy.init(key, env.reset(key)[1])
        start = start_segments(env, policy, key, 1)
        return rollout_segments(env, policy, params, key, start, NUM_STEPS)

    rows, _ = jax.eval_shape(one_segment)
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows)) // NUM_STEPS
    return stored + 3 * 4


if __name__ == "__main__":
    main()
