"""Keys whose draws are written out are JAX's own keys, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg._unrolled import plain, unrolled, with_unrolled
from jaxpg.distributions import Categorical, DiagonalGaussian

KEYS = [jax.random.key(0), jax.random.key(2**31 + 5)]
SHAPES = [(), (1,), (5,), (3, 4)]


def bits(key):
    return jax.random.key_data(key)


def assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("number", [0, 1, 77, 2**31 - 1])
def test_derived_keys_are_jaxs(number):
    for key in KEYS:
        ours = jax.random.fold_in(unrolled(key), number)
        assert_same(bits(ours), bits(jax.random.fold_in(key, number)))
        for shape in ((2,), (3, 4)):
            parts = jax.random.split(unrolled(key), shape)
            assert_same(bits(parts), bits(jax.random.split(key, shape)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_bits_are_jaxs(dtype, float64):
    for key in KEYS:
        for shape in SHAPES:
            ours = jax.random.bits(unrolled(key), shape, dtype)
            assert_same(ours, jax.random.bits(key, shape, dtype))


@pytest.mark.parametrize(
    "draw",
    [
        jax.random.uniform,
        jax.random.normal,
        lambda key: jax.random.permutation(key, 9),
        lambda key: jax.random.randint(key, (3,), 0, 1000),
        lambda key: jax.random.uniform(key, (4,), jnp.float16),
    ],
)
def test_draws_are_jaxs_under_every_transformation(draw):
    many = jax.random.split(KEYS[0], 6)
    expected = jax.vmap(draw)(many)
    inside = jax.jit(jax.vmap(lambda key: draw(unrolled(key))))
    assert_same(inside(many), expected)
    turns = jax.lax.scan(lambda _, key: (None, draw(unrolled(key))), None, many)[1]
    assert_same(turns, expected)


def test_double_precision_draws_are_jaxs(float64):
    ours = jax.random.normal(unrolled(KEYS[0]), (7,), float)
    assert_same(ours, jax.random.normal(KEYS[0], (7,), float))


def test_nothing_is_a_loop_any_more():
    def draw(key):
        return jax.random.uniform(unrolled(key))

    text = jax.jit(draw).lower(KEYS[0]).as_text()
    assert "while" not in text
    assert "while" in jax.jit(jax.random.uniform).lower(KEYS[0]).as_text()


def test_policies_draw_with_it():
    """Everything that is drawn in a rollout's loop by the library's distributions."""
    for made in (
        Categorical(jnp.zeros(3)),
        DiagonalGaussian(jnp.zeros(2), jnp.zeros(2)),
    ):
        assert "while" not in jax.jit(made.sample).lower(KEYS[0]).as_text()


def draw_and_keep(key):
    """A world that draws, and keeps a key in its state."""
    first, kept = jax.random.split(key)
    return jax.random.uniform(first), kept


def test_code_of_others_draws_without_a_loop_and_keeps_plain_keys():
    drawn, kept = with_unrolled(draw_and_keep, KEYS[0])
    expected, theirs = draw_and_keep(KEYS[0])
    assert_same(drawn, expected)
    assert jax.random.key_impl(kept) == jax.random.key_impl(theirs)
    assert_same(bits(kept), bits(theirs))
    inside = jax.jit(lambda key: with_unrolled(draw_and_keep, key))
    assert "while" not in inside.lower(KEYS[0]).as_text()


@pytest.mark.parametrize(
    "draw",
    [
        lambda key: jax.random.poisson(key, 4.0),
        lambda key: jax.random.key_data(jnp.where(jnp.asarray(True), key, KEYS[1])),
    ],
    ids=["only with JAX's own", "mixed with a plain one"],
)
def test_code_that_needs_jaxs_own_keys_gets_them(draw):
    assert_same(with_unrolled(draw, KEYS[0]), draw(KEYS[0]))


def test_errors_of_others_stay_theirs():
    def broken(key):
        raise TypeError("not about keys")

    with pytest.raises(TypeError, match="not about keys") as raised:
        with_unrolled(broken, KEYS[0])
    assert raised.value.__context__ is None


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_other_keys_stay_as_they_are(implementation):
    key = jax.random.key(1, impl=implementation)
    assert unrolled(key) is key and plain(key) is key


def test_the_older_scheme_stays_as_it_is():
    with jax.threefry_partitionable(False):
        assert unrolled(KEYS[0]) is KEYS[0]


def test_there_and_back():
    key = plain(unrolled(KEYS[1]))
    assert jax.random.key_impl(key) == jax.random.key_impl(KEYS[1])
    assert_same(bits(key), bits(KEYS[1]))
    assert plain(KEYS[1]) is KEYS[1]
    many = jax.vmap(lambda key: plain(unrolled(key)))(jax.random.split(key, 3))
    assert_same(bits(many), bits(jax.random.split(key, 3)))
