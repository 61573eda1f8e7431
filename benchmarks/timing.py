"""What every benchmark shares: timing in turns, ceilings, a stamp of the machine.

Variants are timed in turns, A B C A B C ..., so that a slow minute of the machine falls
on all of them; medians over the rounds are quoted, and ratios are taken round by round.
"""

import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg.train.provenance import describe, write_json_atomically

RESULTS = Path(__file__).parent / "results"


def time_in_turns(
    variants: dict[Any, Callable[[], Any]], rounds: int
) -> dict[Any, list[float]]:
    """Seconds of each variant in each round, after one call that is not counted."""
    for run in variants.values():
        jax.block_until_ready(run())
    seconds: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return seconds


def rates(seconds: list[float], amount: float) -> dict[str, float]:
    """Median, lowest and highest rate over the rounds."""
    each = [amount / s for s in seconds]
    return {
        "median": statistics.median(each),
        "low": min(each),
        "high": max(each),
        "rounds": len(each),
    }


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Round-by-round ratio of two variants' seconds."""
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(each), "low": min(each), "high": max(each)}


def in_a_process(script: str, *words: str) -> dict[str, Any]:
    """What a script prints last, as JSON, in a process of its own."""
    command = [sys.executable, script, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_flops_per_second(size: int = 1024, rounds: int = 9) -> float:
    """The machine's float32 matrix product, all devices' cores together."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    seconds = time_in_turns({"matmul": lambda: product(x)}, rounds)["matmul"]
    return 2.0 * size**3 / statistics.median(seconds)


def mlp_flops(sizes: list[int]) -> tuple[int, int]:
    """Floating-point operations per sample: forward alone, forward and backward.

    The backward pass makes two products of each layer's size, but for the first layer,
    whose input needs no gradient.
    """
    products = [2 * a * b for a, b in itertools.pairwise(sizes)]
    forward = sum(products)
    return forward, 3 * forward - products[0]


def save(name: str, results: dict[str, Any]) -> Path:
    """Store results with the machine and versions they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    stamp = {"date": time.strftime("%Y-%m-%d"), "provenance": describe()}
    write_json_atomically(path, {**stamp, **results})
    return path


def load(name: str) -> dict[str, Any]:
    """Stored results."""
    return json.loads((RESULTS / f"{name}.json").read_text())
