"""JAX's own random numbers, bit for bit, drawn faster inside loops on CPU.

On CPU JAX writes Threefry's twenty rounds as a loop, so that they compile fast. A loop
cannot be fused with what surrounds it: inside the scan of a rollout every draw, and
every derived key, runs small kernels of its own, five times over. Written out, the
rounds are part of the kernel that uses them. The bits are the same, so nothing else can
tell.

    key = unrolled(key)                      # here it derives keys and draws faster
    key_action, key_step = jax.random.split(jax.random.fold_in(key, time))
    keep(plain(key))                         # what stays gets the key that JAX knows
    with_unrolled(env.step, key_step, ...)   # others draw faster where they can

What is not a Threefry key as JAX makes them today, or not on CPU, stays as it is.

Reference: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1,
2, 3".
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jaxtyping import Array, UInt32

from jaxpg.types import PRNGKey, PyTree

__all__ = ["plain", "unrolled", "with_unrolled"]

NAME = "threefry2x32"
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = np.uint32(0x1BD11BDA)
MAX_SIZE = 2**32
"""Beyond so many draws at once counters take both words; JAX does that."""

Words = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]


def unrolled(key: PRNGKey) -> PRNGKey:
    """The same key, whose draws and descendants are computed without a loop.

    Args:
        key: any typed key.

    Returns:
        A key of the same bits, for use right here: it should not be kept, nor handed to
        code of others, which may ask for JAX's own kind.

    >>> key = jax.random.key(3)
    >>> bool(jax.random.uniform(unrolled(key)) == jax.random.uniform(key))
    True
    """
    known = str(jax.random.key_impl(key)) == NAME
    # Without it JAX draws other bits, by an older scheme.
    current = getattr(jax.config, "jax_threefry_partitionable", True)
    if not (known and current and jax.default_backend() == "cpu"):
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=UNROLLED)


def plain(key: PRNGKey) -> PRNGKey:
    """The key as JAX has it: the inverse of `unrolled`.

    >>> str(jax.random.key_impl(plain(unrolled(jax.random.key(3)))))
    'threefry2x32'
    """
    if jax.random.key_impl(key) != UNROLLED:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=NAME)


def with_unrolled(fn: Callable[..., PyTree], key: PRNGKey, *args: PyTree) -> PyTree:
    """`fn(key, *args)`, with an unrolled key where `fn` can work with one.

    Args:
        fn: code of others, which may mix the key with keys of its own, draw what JAX
            draws with its own kind alone (Poisson numbers), or keep it.
        key: a typed key.
        *args: what else it is given.

    Returns:
        What `fn` gives; keys in it are plain.

    >>> key = jax.random.key(3)
    >>> int(with_unrolled(jax.random.poisson, key, 4.0) == jax.random.poisson(key, 4.0))
    1
    """
    # What is wrong for another reason is raised by the second call, once.
    with contextlib.suppress(NotImplementedError, TypeError, ValueError):
        found = fn(unrolled(key), *args)
        return jax.tree.map(lambda x: plain(x) if _is_key(x) else x, found)
    return fn(key, *args)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _encrypt(key: UInt32[Array, "2"], counters: Words) -> Words:
    """Threefry-2x32 with twenty rounds."""
    first, second = key[0], key[1]
    schedule = first, second, first ^ second ^ PARITY
    x, y = counters[0] + first, counters[1] + second
    for block in range(5):
        for rotation in ROTATIONS[block % 2]:
            x = x + y
            y = _rotate_left(y, rotation) ^ x
        x = x + schedule[(block + 1) % 3]
        y = y + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def _rotate_left(x: UInt32[Array, "..."], by: int) -> UInt32[Array, "..."]:
    return (x << np.uint32(by)) | (x >> np.uint32(32 - by))


def _counters(shape: tuple[int, ...]) -> Words:
    low = jax.lax.iota(np.uint32, math.prod(shape)).reshape(shape)
    return jnp.zeros_like(low), low


def _split(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    return jnp.stack(_encrypt(key, _counters(shape)), axis=-1)


def _fold_in(key: UInt32[Array, "2"], data: Any) -> UInt32[Array, "2"]:
    return jnp.stack(_encrypt(key, (jnp.zeros((), np.uint32), data.astype(np.uint32))))


def _random_bits(
    key: UInt32[Array, "2"], bit_width: int, shape: tuple[int, ...]
) -> Array:
    if math.prod(shape) >= MAX_SIZE:
        return threefry_prng_impl.random_bits(key, bit_width, shape)
    high, low = _encrypt(key, _counters(shape))
    if bit_width == 64:
        wide = high.astype(np.uint64), low.astype(np.uint64)
        return (wide[0] << np.uint64(32)) | wide[1]
    return (high ^ low).astype(f"uint{bit_width}")


UNROLLED = define_prng_impl(
    key_shape=(2,),
    seed=threefry_prng_impl.seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="jaxpg_threefry2x32",
    tag="unrolled",
)
