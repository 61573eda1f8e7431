"""Moments against float64, under every cutting and order, and where rounding bites."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpg.moments import (
    BLOCK,
    Moments,
    merge,
    merge_over_axis,
    moments_of,
    no_moments,
    variance,
)

N = 13


def quick(function, **options):
    """`jit` for programs that run once: compiling them costs more than running."""
    level = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=level, **options)


quick_moments_of, quick_merge = quick(moments_of), quick(merge)


def samples_of(number, seed=0, around=0.0):
    """A tree of two leaves with different spreads, float32, and its float64 twin."""
    rng = np.random.default_rng(seed)
    tree = {
        "w": around + rng.normal(2.0, 3.0, (number, 2, 3)),
        "b": around + rng.normal(-5.0, 0.1, (number,)),
    }
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    return tree, jax.tree.map(lambda x: x.astype(np.float64), tree)


def rows(tree, index):
    return jax.tree.map(lambda x: jnp.asarray(x[index]), tree)


def assert_are_moments_of(moments, tree, rtol=1e-5):
    """Mean and variance are numpy's in float64."""
    number = len(tree["b"])
    assert int(moments.num_samples) == number
    for name, x in tree.items():
        near = 1e-6 * np.abs(x).max()
        np.testing.assert_allclose(moments.mean[name], x.mean(0), rtol=rtol, atol=near)
        spread = variance(moments, ddof=0)[name]
        np.testing.assert_allclose(spread, x.var(0), rtol=rtol, atol=1e-30)


# By hand.


def test_by_hand():
    # mean 3; deviations -2, -1, 3; 4 + 1 + 9 = 14; / 2 = 7, / 3 = 4.667
    moments = moments_of(jnp.array([1.0, 2.0, 6.0]))
    assert (moments.mean, moments.squares, moments.num_samples) == (3.0, 14.0, 3)
    assert variance(moments) == 7.0
    np.testing.assert_allclose(variance(moments, ddof=0), 14 / 3, rtol=1e-6)


def test_merging_by_hand():
    # {1, 3} has mean 2 and squares 2; {8} joins: mean 4, 9 + 1 + 16 = 26
    merged = merge(moments_of(jnp.array([1.0, 3.0])), moments_of(jnp.array([8.0])))
    assert (merged.mean, merged.squares, merged.num_samples) == (4.0, 26.0, 3)


def test_one_sample_has_no_variance_and_is_said_to_have_none():
    moments = moments_of(jnp.array([5.0]))
    assert moments.mean == 5.0 and np.isnan(variance(moments))
    assert variance(moments, ddof=0) == 0.0
    assert np.isnan(variance(no_moments(jnp.zeros(())), ddof=0))


@pytest.mark.parametrize("value", [0.1, 1e4 / 3])
def test_equal_samples_spread_by_exactly_nothing(value):
    moments = moments_of(jnp.full((5 * BLOCK + 3,), value))
    assert moments.squares == 0.0 and moments.squares_rest == 0.0
    assert moments.mean == jnp.float32(value)


# Chunks, order, masks.


@pytest.mark.parametrize("number", [1, 2, BLOCK, BLOCK + 1, 3 * BLOCK, BLOCK**2 + 70])
def test_any_number_at_once(number):
    tree, exact = samples_of(number)
    assert_are_moments_of(quick_moments_of(rows(tree, slice(None))), exact)


@given(st.lists(st.integers(0, N), max_size=6), st.permutations(range(N)), st.data())
@settings(max_examples=40, deadline=None)
def test_chunks_in_any_cutting_and_order_are_the_whole(cuts, order, data):
    """Chunks may be empty; they are joined in any order, to either side."""
    tree, exact = samples_of(N, around=100.0)
    edges = [0, *sorted(cuts), N]
    chunks = [
        quick_moments_of(rows(tree, np.array(order[low:high], int)))
        for low, high in itertools.pairwise(edges)
    ]
    total = no_moments(rows(tree, 0))
    for chunk in data.draw(st.permutations(chunks)):
        pair = (total, chunk) if data.draw(st.booleans()) else (chunk, total)
        total = quick_merge(*pair)
    assert_are_moments_of(total, exact)


@given(st.lists(st.booleans(), min_size=N, max_size=N))
@settings(max_examples=40, deadline=None)
def test_masked_samples_do_not_count_whatever_they_are(mask):
    tree, exact = samples_of(N)
    mask = np.array(mask)
    for x in tree.values():
        x[~mask] = np.nan
    moments = quick_moments_of(rows(tree, slice(None)), jnp.asarray(mask))
    if mask.any():
        return assert_are_moments_of(moments, jax.tree.map(lambda x: x[mask], exact))
    empty = no_moments(rows(tree, 0))
    jax.tree.map(np.testing.assert_array_equal, moments, empty)


def test_a_mask_over_several_blocks():
    tree, exact = samples_of(3 * BLOCK + 5)
    mask = np.arange(3 * BLOCK + 5) % 3 == 1
    mask[BLOCK : 2 * BLOCK] = False  # a block with nothing in it
    moments = quick_moments_of(rows(tree, slice(None)), jnp.asarray(mask))
    assert_are_moments_of(moments, jax.tree.map(lambda x: x[mask], exact))


def test_merging_nothing_changes_nothing():
    tree, _ = samples_of(N, around=1e4)
    moments = moments_of(rows(tree, slice(None)))
    assert np.any(moments.mean_rest["w"] != 0.0)  # else the test could not see it lost
    nothing = no_moments(rows(tree, 0))
    for merged in (merge(moments, nothing), merge(nothing, moments)):
        jax.tree.map(np.testing.assert_array_equal, merged, moments)
    twice_nothing = merge(nothing, nothing)
    jax.tree.map(np.testing.assert_array_equal, twice_nothing, nothing)


def test_no_samples_at_all():
    empty = moments_of({"w": jnp.zeros((0, 2))})
    nothing = no_moments({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
    jax.tree.map(np.testing.assert_array_equal, empty, nothing)
    none = jax.tree.map(lambda x: x[None][:0], nothing)
    jax.tree.map(np.testing.assert_array_equal, merge_over_axis(none), nothing)


# Under JAX's transformations, and on devices.


def test_a_scan_over_chunks():
    tree, exact = samples_of(60)
    chunks = jax.tree.map(lambda x: jnp.asarray(x.reshape(12, 5, *x.shape[1:])), tree)

    def visit(total, chunk):
        return merge(total, moments_of(chunk)), None

    start = no_moments(rows(tree, 0))
    total, _ = quick(lambda: jax.lax.scan(visit, start, chunks))()
    assert_are_moments_of(total, exact)


@pytest.mark.parametrize("number", [1, 2, 7, 200])
def test_many_moments_of_unequal_samples_at_once(number):
    """K-way equals the sample as a whole; sizes 0 to 4 differ."""
    tree, exact = samples_of(4 * number, around=10.0)
    mask = np.random.default_rng(1).random((number, 4)) < 0.6
    mask[0, 0] = True
    parts = jax.tree.map(
        lambda x: jnp.asarray(x.reshape(number, 4, *x.shape[1:])), tree
    )
    stacked = quick(jax.vmap(moments_of))(parts, jnp.asarray(mask))
    merged = quick(merge_over_axis)(stacked)
    assert_are_moments_of(merged, jax.tree.map(lambda x: x[mask.ravel()], exact))


@pytest.mark.parametrize("how", ["gathered", "spread"])
def test_over_devices(how):
    tree, exact = samples_of(64)
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    data = jax.device_put(rows(tree, slice(None)), NamedSharding(mesh, P("d")))

    def of_device(local):
        moments = moments_of(local)
        if how == "gathered":
            return merge_over_axis(jax.lax.all_gather(moments, "d"))
        return jax.tree.map(lambda x: x[None], moments)

    specs = P() if how == "gathered" else P("d")
    mapped = quick(
        jax.shard_map(
            of_device, mesh=mesh, in_specs=P("d"), out_specs=specs, check_vma=False
        )
    )
    moments = mapped(data)
    if how == "spread":
        moments = quick(merge_over_axis)(moments)
    assert_are_moments_of(moments, exact)


# Where rounding bites.


def merge_without_rests(a, b):
    merged = merge(a, b)
    zero = jax.tree.map(jnp.zeros_like, merged.mean_rest)
    return merged._replace(mean_rest=zero, squares_rest=zero)


def fold(merge, stacked):
    start = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), stacked)
    return jax.lax.scan(lambda a, b: (merge(a, b), None), start, stacked)[0]


@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_a_million_merges_around_a_big_mean_in_float32(spread):
    """One part in 1e6 of the variance; without the rests the mean is stuck far off."""
    rng = np.random.default_rng(0)
    x = (1e4 + spread * rng.standard_normal((10**6, 2))).astype(np.float32)
    exact = x.astype(np.float64)
    stacked = jax.jit(jax.vmap(moments_of))(jnp.asarray(x))
    moments = jax.jit(fold, static_argnums=0)(merge, stacked)
    np.testing.assert_allclose(variance(moments), exact.var(ddof=1), rtol=1e-6)
    mean = np.float64(moments.mean) + np.float64(moments.mean_rest)
    assert abs(mean - exact.mean()) < 1e-5 * spread
    assert moments.mean == np.float32(exact.mean())
    plain = jax.jit(fold, static_argnums=0)(merge_without_rests, stacked)
    assert abs(plain.mean - exact.mean()) > 5e-3 * spread


def test_a_million_equal_parts_lose_nothing():
    """Each adds the same squares: what rounding takes then adds up to one side."""
    part = moments_of(jnp.array([0.05, 0.15]))

    def visit(total, _):
        return merge(total, part), None

    total, _ = jax.jit(lambda: jax.lax.scan(visit, part, length=10**6 - 1))()
    assert int(total.num_samples) == 2 * 10**6
    np.testing.assert_allclose(variance(total, ddof=0), 0.0025, rtol=1e-6)


def test_a_big_sample_at_once_around_a_big_mean():
    rng = np.random.default_rng(0)
    x = (1e4 + rng.standard_normal(300_000)).astype(np.float32)
    moments = jax.jit(moments_of)(jnp.asarray(x))
    np.testing.assert_allclose(variance(moments), x.var(ddof=1, dtype=float), rtol=1e-6)


def test_joining_many_keeps_what_rounding_took():
    """Floats near 2e8 are 16 apart: what was kept beside them is still there."""
    two = jnp.full(2, 1.0), jnp.full(2, 0.0), jnp.full(2, 1e8), jnp.full(2, 3.0)
    merged = merge_over_axis(Moments(jnp.full(2, 5, jnp.uint32), *two))
    assert float(merged.squares) + float(merged.squares_rest) == 200000006.0


def test_the_count_is_exact_beyond_float32_and_int32():
    def counted(number):
        zero = jnp.zeros(())
        return Moments(jnp.uint32(number), zero, zero, zero, zero)

    one = moments_of(jnp.array([0.0]))
    for number in (2**24, 2**31 - 1, 2**32 - 2):
        assert int(merge(counted(number), one).num_samples) == number + 1
    stacked = jax.tree.map(lambda *x: jnp.stack(x), counted(2**31), counted(3))
    assert int(merge_over_axis(stacked).num_samples) == 2**31 + 3


def test_a_late_sample_still_moves_the_mean():
    """After 2^31 samples at 0, one at 2^31 + 1 makes the mean 1."""
    zero = jnp.zeros(())
    before = Moments(jnp.uint32(2**31), zero, zero, zero, zero)
    after = merge(before, moments_of(jnp.array([2.0**31 + 1])))
    np.testing.assert_allclose(after.mean, 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, bool])
def test_narrow_numbers_are_widened(dtype):
    x = jnp.array([0, 1, 1, 0] * 100).astype(dtype)
    moments = quick_moments_of(x)
    assert moments.mean.dtype == moments.squares.dtype == jnp.float32
    assert moments.mean == 0.5 and moments.squares == 100.0
    assert no_moments(x[0]).mean.dtype == jnp.float32


def test_double_precision_stays(float64):
    x = np.random.default_rng(0).normal(1e8, 1.0, 1000)
    moments = quick_moments_of(jnp.asarray(x))
    assert moments.mean.dtype == jnp.float64
    assert moments.num_samples.dtype == jnp.uint32
    np.testing.assert_allclose(variance(moments), x.var(ddof=1), rtol=1e-12)


# Refused.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({},), "samples hold no array"),
        (({"a": jnp.zeros(2), "b": jnp.zeros(3)},), r"shapes \[\(2,\), \(3,\)\], need"),
        ((jnp.zeros(()),), r"for one sample use x\[None\]"),
        ((jnp.zeros(2), jnp.ones(3, bool)), r"mask \(3,\)"),
    ],
)
def test_wrong_samples_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(moments_of)(*arguments)
