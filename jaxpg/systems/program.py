"""The training program of a system: what runs between two visits of the host.

    init(seeds) -> state      advance(state, update, n) -> (state, info)
    evaluate(state, update) -> numbers

Seeds are a leading axis of everything. Each update's key derives from the seed and the
number of the update, so the state holds no key, and a resumed run draws what an
unbroken one would have drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxpg.systems.base import RunSettings, System
from jaxpg.train.program import over_members
from jaxpg.train.visits import MAX_UPDATES_PER_CALL
from jaxpg.types import PyTree

__all__ = ["SystemProgram", "build_system_program"]


class SystemProgram(NamedTuple):
    """Compiled functions of a system.

    Attributes:
        init: `init() -> state`, before the first update.
        advance: `advance(state, update, n) -> (state, info)` makes n more after the
            first `update` ones, at most `MAX_UPDATES_PER_CALL`; it consumes the state.
            Info is [n_max, S], of which the first n count, with `non_finite_state`,
            the entries of the state that are no numbers.
        evaluate: `evaluate(state, update) -> scalars by name`, [S].
    """

    init: Callable[[], PyTree]
    advance: Callable[[PyTree, Any, Any], tuple[PyTree, dict[str, Array]]]
    evaluate: Callable[[PyTree, Any], dict[str, Array]]


def build_system_program(system: System, settings: RunSettings) -> SystemProgram:
    """Compile nothing yet, but make what can be.

    Args:
        system: to train.
        settings: of the run; its seeds.

    Returns:
        The functions.
    """
    seeds = np.array([member["seed"] for member in settings.members()], np.int32)

    def over_seeds(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return over_members(fn, settings.num_seeds, None)

    def init(seeds: Array) -> PyTree:
        return over_seeds(lambda seed: system.init(_keys(seed)[0]))(seeds)

    def update_one(argument: tuple[Array, PyTree, Array]) -> Any:
        seed, state, update = argument
        key = jax.random.fold_in(_keys(seed)[1], update)
        state, info = system.update(key, state)
        return state, {**info, "non_finite_state": _non_finite(state)}

    def evaluate_one(argument: tuple[Array, PyTree, Array]) -> dict[str, Array]:
        seed, state, update = argument
        return system.evaluate(jax.random.fold_in(_keys(seed)[2], update), state)

    def at(state: PyTree, update: Array) -> tuple[Any, PyTree, Array]:
        return jnp.asarray(seeds), state, jnp.full(len(seeds), update, jnp.int32)

    def advance(state: PyTree, update: Array, count: Array) -> Any:
        def body(i: Array, carry: Any) -> Any:
            state, log = carry
            state, info = over_seeds(update_one)(at(state, update + i))
            return state, jax.tree.map(lambda x, y: x.at[i].set(y), log, info)

        shapes = jax.eval_shape(over_seeds(update_one), at(state, update))[1]
        log = jax.tree.map(
            lambda x: jnp.zeros((MAX_UPDATES_PER_CALL, *x.shape), x.dtype), shapes
        )
        return jax.lax.fori_loop(0, count, body, (state, log))

    compiled_init = jax.jit(init)
    return SystemProgram(
        lambda: compiled_init(seeds),
        jax.jit(advance, donate_argnums=0),
        jax.jit(lambda state, update: over_seeds(evaluate_one)(at(state, update))),
    )


def _keys(seed: Array) -> Key[Array, "3"]:
    """Keys of the first state, of all updates and of all evaluations."""
    return jax.random.split(jax.random.key(seed), 3)


def _non_finite(state: PyTree) -> Array:
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    counts = [jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for x in floats]
    return sum(counts, jnp.zeros((), jnp.int32))
