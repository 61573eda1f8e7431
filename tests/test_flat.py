"""Trees as vectors: nothing is lost on the way, and nothing is computed otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg._flat import as_vectors, on_vectors, scan_into_vectors
from jaxpg.algos.measures import count_non_finite, global_norm

TREE = {
    "kernel": jnp.arange(6.0).reshape(2, 3),
    "count": jnp.array(7, jnp.int32),
    "bias": (jnp.array(9.0), jnp.zeros((0,))),
    "flags": jnp.array([True, False]),
}


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


def test_a_tree_comes_back_as_it_was():
    vectors, back = as_vectors(TREE)
    assert len({x.dtype for x in vectors}) == len(vectors) == 3
    same(back(vectors), TREE)


def test_axes_in_front_stay_there():
    vectors, back = as_vectors(TREE)
    twice = [jnp.stack([x, x]) for x in vectors]
    same(back(twice), jax.tree.map(lambda x: jnp.stack([x, x]), TREE))


def test_nothing_is_no_vector():
    vectors, back = as_vectors(())
    assert vectors == [] and back([]) == ()


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam()),
        optax.adamw(0.1, weight_decay=0.3),
    ],
    ids=["clipped-adam", "adamw"],
)
def test_an_optimiser_does_on_vectors_what_it_does_on_trees(inner):
    """Clipping looks at all numbers together, decay at the parameters."""
    params = {"a": jnp.array([[1.0, -2.0]]), "b": (jnp.array(3.0), jnp.array([0.5]))}
    there = here = params
    states = inner.init(params), on_vectors(inner).init(params)
    with jax.numpy_dtype_promotion("standard"):
        for step in range(4):
            slope = jax.tree.map(lambda x, t=step: jnp.sin(x + t), params)
            moves, first = inner.update(slope, states[0], there)
            there = optax.apply_updates(there, moves)
            moves, second = on_vectors(inner).update(slope, states[1], here)
            here = optax.apply_updates(here, moves)
            states = first, second
    for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert any(
        bool(jnp.any(x != y))
        for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(params), strict=True)
    )


def test_a_scan_tells_the_same_in_fewer_arrays():
    def step(carry, x):
        told = {"x": x, "sum": carry + x, "even": x % 2 == 0, "pair": jnp.stack([x, x])}
        return carry + x, told

    numbers = jnp.arange(5.0)
    same(
        scan_into_vectors(step, jnp.array(1.0), numbers),
        jax.lax.scan(step, jnp.array(1.0), numbers),
    )
    text = jax.jit(lambda x: scan_into_vectors(step, 1.0, x)).lower(numbers).as_text()
    assert text.count("dynamic_update_slice") == 2, "one of numbers, one of flags"


def test_lengths_and_counts_are_over_all_leaves():
    tree = {
        "a": jnp.array([[3.0, jnp.nan]]),
        "b": jnp.array(-jnp.inf),
        "c": jnp.ones(2),
    }
    assert count_non_finite(tree).item() == 2
    assert count_non_finite(()).item() == 0
    assert global_norm({"a": jnp.array([3.0]), "b": jnp.array(4.0)}).item() == 5.0
