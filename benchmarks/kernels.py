"""Where the gradient's time goes: each kernel of a 2 x 64 tanh network on its own.

    taskset -c 0 python benchmarks/kernels.py [--chunk 256] [--rounds 7]

Every kernel works through cache-sized chunks, as the gradient does, on one core. The
table gives nanoseconds per decision; the sum of the kernels that a forward and backward
pass needs is the ceiling that `throughput.py` runs against.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

NUM_CHUNKS = 1024
WIDTH, INPUTS, OUTPUTS = 64, 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    kernels = build(options.chunk)
    seconds = timing.time_in_turns(
        {name: run for name, (run, _, _) in kernels.items()}, options.rounds
    )
    decisions = NUM_CHUNKS * options.chunk
    table = {}
    for name, (_, uses, flops) in kernels.items():
        each = statistics.median(seconds[name]) / decisions
        table[name] = {"ns": 1e9 * each, "uses": uses, "gflops": flops / each / 1e9}
    total = sum(row["ns"] * row["uses"] for row in table.values())
    for name, row in table.items():
        print(
            f"{name:30} {row['ns']:6.0f} ns x {row['uses']}  "
            f"{100 * row['ns'] * row['uses'] / total:4.0f}%  "
            f"{row['gflops']:5.0f} GFLOP/s"
        )
    print(f"sum {total:.0f} ns, {1e3 / total:.2f}M decisions/s on one core")
    timing.save(
        "kernels-cpu", {"settings": vars(options), "table": table, "sum": total}
    )


def build(chunk: int) -> dict[str, tuple[Callable[[], Any], int, int]]:
    """Each kernel with its number of uses in a pass and its operations per decision."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    hidden, cotangent = (normal(NUM_CHUNKS, WIDTH, chunk) for _ in range(2))
    inputs, outputs = hidden[:, :INPUTS], cotangent[:, :OUTPUTS]
    square = normal(WIDTH, WIDTH)
    narrow = square[:, :OUTPUTS]
    product = 2 * WIDTH * WIDTH
    return {
        "forward, first layer": (
            over_chunks(lambda x: square[:INPUTS].T @ x, inputs),
            1,
            product // 16,
        ),
        "forward, middle layer": (
            over_chunks(lambda x: square.T @ x, hidden),
            1,
            product,
        ),
        "forward, last layer": (
            over_chunks(lambda x: narrow.T @ x, hidden),
            1,
            product // 32,
        ),
        "tanh": (over_chunks(jnp.tanh, hidden), 2, 0),
        "derivative of tanh": (
            over_chunks(lambda x, d: d * (1.0 - x * x), hidden, cotangent),
            2,
            0,
        ),
        "gradient of a bias": (over_chunks(lambda d: d.sum(1), cotangent), 2, 0),
        "gradient of first weights": (
            over_chunks(lambda x, d: x @ d.T, inputs, cotangent),
            1,
            product // 16,
        ),
        "gradient of middle weights": (
            over_chunks(lambda x, d: x @ d.T, hidden, cotangent),
            1,
            product,
        ),
        "gradient of last weights": (
            over_chunks(lambda x, d: x @ d.T, hidden, outputs),
            1,
            product // 32,
        ),
        "gradient into middle layer": (
            over_chunks(lambda d: square @ d, cotangent),
            1,
            product,
        ),
        "gradient into last layer": (
            over_chunks(lambda d: narrow @ d, outputs),
            1,
            product // 32,
        ),
    }


def over_chunks(kernel: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    """A loop over chunks that keeps a running sum, so that nothing can be dropped."""

    @jax.jit
    def run(*arrays: Any) -> Any:
        def add(total: Any, chunks: Any) -> Any:
            return total + kernel(*chunks), None

        shape = jax.eval_shape(kernel, *(x[0] for x in arrays)).shape
        return jax.lax.scan(add, jnp.zeros(shape), arrays)[0]

    return lambda: run(*arrays)


if __name__ == "__main__":
    main()
