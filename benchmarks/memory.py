"""Memory and time of a gradient, with its variance, over batches that never exist.

    python benchmarks/memory.py [--sizes 12 14 16 18 20] [--rounds 3]

The gradient of CartPole-v1 with a limit of 200 decisions, from 2^12 to 2^20
trajectories of a policy that is nearly trained (their mean length is stored), masked
after the end; rollout and gradient are fused chunk by chunk (`jaxpg.streams`).

Two parts. `growth`: the peak resident memory of a process of its own for each number of
trajectories, and its time per trajectory, compiled before the clock starts. `methods`:
what each estimator and each statistic costs beside the plain gradient, timed in turns
in one process.

PPO, which stores its batch, has a script of its own, `ppo_memory.py`.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import timing

from jaxpg.algos.reinforce import ReinforceConfig, reinforce
from jaxpg.diagnostics import noise_scale, total_variance
from jaxpg.envs import make
from jaxpg.estimators import Estimator, EstimatorConfig, make_estimator
from jaxpg.policies import mlp_policy
from jaxpg.rollout import rollout_episodes
from jaxpg.streams import StreamedGradient, episode_source, stream_gradient

STEPS = 200
CHUNK = 256
UPDATES = 6  # most episodes last all 200 decisions, and some fail: not all alike
KEY = jax.random.key(0)
ENV = make("CartPole-v1", max_steps=STEPS)
POLICY = mlp_policy(ENV.observation_space, ENV.action_space)

METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "none": ("none", {}),
    "none, chunks": ("none", {"statistics": "chunks"}),
    "none, trajectories": ("none", {"statistics": "trajectories"}),
    "leave-one-out, running sums": ("leave-one-out", {"method": "running-sums"}),
    "leave-one-out": ("leave-one-out", {}),
    "time-dependent": ("time-dependent", {}),
    "time-dependent, chunks": ("time-dependent", {"statistics": "chunks"}),
    "time-dependent, trajectories": ("time-dependent", {"statistics": "trajectories"}),
    "optimal": ("optimal", {}),
    "optimal-time": ("optimal-time", {}),
    "per-parameter": ("per-parameter", {}),
}
GROWING = ("time-dependent, trajectories",)


def main() -> None:
    options = parse()
    if options.child is not None:
        print(json.dumps(one_process(options.child, options.sizes[0])))
        return
    growth = [
        timing.in_a_process(__file__, "--child", name, "--sizes", str(2**size))
        for size in options.sizes
        for name in GROWING
    ]
    methods = compare_methods(2**options.methods_size, options.rounds)
    results = {
        "settings": {"env": ENV.name, "steps": STEPS, "chunk_size": CHUNK},
        "bytes_per_trajectory_stored": bytes_of_one(),
        "growth": growth,
        "methods_trajectories": 2**options.methods_size,
        "methods": methods,
    }
    path = timing.save("memory-cpu", results)
    plot(results)
    print(json.dumps(results, indent=1))
    print(f"stored in {path.name}")


def plot(results: dict[str, Any]) -> None:
    """Peak memory and time per trajectory against the number of trajectories."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = sorted(results["growth"], key=lambda row: row["trajectories"])
    numbers = [row["trajectories"] for row in rows]
    stored = [results["bytes_per_trajectory_stored"] * n / 2**20 for n in numbers]
    figure, (memory, time_each) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=120)
    peaks = [row["peak_bytes"] / 2**20 for row in rows]
    memory.loglog(numbers, stored, "--", color="#D55E00", label="the batch, if stored")
    memory.loglog(numbers, peaks, "o-", color="#0072B2", label="the whole process")
    memory.set(ylabel="memory, MiB", xlabel="trajectories of 200 decisions")
    memory.legend(frameon=False)
    each = [row["microseconds_per_trajectory"] for row in rows]
    time_each.semilogx(numbers, each, "o-", color="#0072B2")
    time_each.set(
        ylabel="time per trajectory, µs",
        xlabel="trajectories of 200 decisions",
        ylim=(0.0, 1.3 * max(each)),
    )
    figure.suptitle("Gradient and its variance, rollout and all")
    figure.tight_layout()
    figure.savefig(timing.RESULTS / "memory.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[12, 14, 16, 18, 20])
    parser.add_argument("--methods-size", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def trained() -> Any:
    """A policy that nearly holds the pole: some updates of REINFORCE."""
    algorithm = reinforce(ReinforceConfig(), POLICY, STEPS)
    first = algorithm.init(KEY, ENV.reset(KEY)[1])

    def update(state: Any, key: Any) -> tuple[Any, None]:
        rows = rollout_episodes(
            ENV, POLICY, state.params, key, jnp.arange(256), num_slots=64
        )
        return algorithm.update(key, state, rows)[0], None

    keys = jax.random.split(KEY, UPDATES)
    return jax.jit(lambda: jax.lax.scan(update, first, keys)[0].params)()


def gradient_of(name: str) -> Callable[[Any, Any], StreamedGradient]:
    """`run(params, ids)` of one method."""
    baseline, options = METHODS[name]
    which = estimator(baseline)
    source = episode_source(ENV, POLICY)
    return jax.jit(
        lambda params, ids: stream_gradient(
            which, source, params, (), KEY, ids, chunk_size=CHUNK, **options
        )
    )


def estimator(baseline: str) -> Estimator:
    return make_estimator(EstimatorConfig(baseline=baseline), POLICY, STEPS)


def one_process(name: str, number: int) -> dict[str, Any]:
    """Peak memory and time of one method at one number of trajectories."""
    params, ids = trained(), jnp.arange(number)
    run = gradient_of(name).lower(params, ids).compile()
    before = timing.peak_bytes()
    began = time.perf_counter()
    streamed = jax.block_until_ready(run(params, ids))
    seconds = time.perf_counter() - began
    peak = timing.peak_bytes()
    known = {}
    if streamed.moments is not None:
        known = {
            "total_variance": float(total_variance(streamed.moments)),
            "noise_scale": float(noise_scale(streamed.moments).noise_scale),
        }
    return {
        "method": name,
        "trajectories": number,
        "peak_bytes": peak,
        "peak_bytes_of_imports_and_compiling": before,
        "working_bytes": run.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
        "microseconds_per_trajectory": 1e6 * seconds / number,
        "mean_return": float(streamed.mean_return),
        **known,
    }


def compare_methods(number: int, rounds: int) -> dict[str, Any]:
    """Seconds of each method beside the plain gradient, timed in turns."""
    params, ids = trained(), jnp.arange(number)
    runs = {name: gradient_of(name) for name in METHODS}
    seconds = timing.time_in_turns(
        {name: lambda run=run: run(params, ids) for name, run in runs.items()}, rounds
    )
    return {
        name: {
            "microseconds_per_trajectory": 1e6 * sorted(each)[rounds // 2] / number,
            "times_the_plain_gradient": timing.ratio(each, seconds["none"]),
        }
        for name, each in seconds.items()
    }


def bytes_of_one() -> int:
    """What one stored trajectory takes."""
    shapes = jax.eval_shape(
        lambda params: rollout_episodes(ENV, POLICY, params, KEY, jnp.arange(1)),
        jax.eval_shape(trained),
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


if __name__ == "__main__":
    main()
