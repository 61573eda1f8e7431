"""The engine: chunks, skipping, per-trajectory gradients, and what it refuses."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxpg._batching import rows_are_vmapped
from jaxpg.chunks import Chunks, map_over_chunks, sum_over_chunks
from jaxpg.distributions import Categorical
from jaxpg.envs import Box, Discrete
from jaxpg.gradients import score_gradient, trajectory_gradients
from jaxpg.grids import PIECE, needed_first
from jaxpg.policies import log_prob_fn, mlp_policy
from jaxpg.skipping import TOGETHER
from jaxpg.types import Trajectory

B, T = 4, 6


def quick(function, **options):
    """`jit` for programs that run once: compiling them costs more than running."""
    level = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=level, **options)


def gaussian(mean, row):
    """Score of one decision: x - mean. A row is {"x": [T]}."""
    return -0.5 * (row["x"] - mean) ** 2


def gaussian_batch(key=0):
    x, weights = jax.random.normal(jax.random.key(key), (2, B, T))
    return {"x": x}, weights


def mlp_batch(num_rows=B, length=T):
    """A real network and decisions of its own, in the dtype of the moment."""
    policy = mlp_policy(Box(-1, 1, (3,)), Discrete(3), hidden=(8, 8))
    keys = jax.random.split(jax.random.key(3), 4)
    params = quick(policy.init)(keys[0], jnp.zeros(3))
    # The default last layer is nearly zero, which would hide errors in the first ones.
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(keys[0], x.shape), params
    )
    obs = jax.random.normal(keys[1], (num_rows, length, 3))
    action = jax.random.randint(keys[2], (num_rows, length), 0, 3)
    weights = jax.random.normal(keys[3], (num_rows, length))
    zeros, no = jnp.zeros(action.shape), jnp.zeros(action.shape, bool)
    rows = Trajectory(obs, action, zeros, zeros, no, no, ~no, action, action)
    return log_prob_fn(policy), params, rows, weights


def halve(x):
    """From 64 bits to 32."""
    halves = {"float64": jnp.float32, "int64": jnp.int32}
    return x.astype(halves.get(str(x.dtype), x.dtype))


def assert_trees_close(x, y, **tolerance):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)


# The value.


def test_score_gradient_by_hand():
    # scores x - 1: (0, 1) and (2, 3); weights (1, 10) and (100, 0)
    # ((0 * 1 + 1 * 10) + (2 * 100 + 3 * 0)) / 2 = 105
    rows = {"x": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    weights = jnp.array([[1.0, 10.0], [100.0, 0.0]])
    mean = jnp.array(1.0)
    assert score_gradient(gaussian, mean, rows, weights).item() == 105.0
    given = score_gradient(gaussian, mean, rows, weights, num_trajectories=7)
    np.testing.assert_allclose(given, 210 / 7, rtol=1e-6)
    traced = jax.jit(
        lambda n: score_gradient(gaussian, mean, rows, weights, num_trajectories=n)
    )(jnp.array(7))
    np.testing.assert_allclose(traced, 210 / 7, rtol=1e-6)


def test_trajectory_gradients_by_hand():
    # 0 * 1 + 1 * 10 = 10;  2 * 100 + 3 * 0 = 200
    rows = {"x": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    weights = jnp.array([[1.0, 10.0], [100.0, 0.0]])
    each = trajectory_gradients(gaussian, jnp.array(1.0), rows, weights)
    np.testing.assert_allclose(each, [10.0, 200.0])


def test_mean_of_trajectory_gradients_is_the_score_gradient():
    fn, params, rows, weights = mlp_batch()
    each = quick(trajectory_gradients, static_argnums=0)(fn, params, rows, weights)
    whole = quick(score_gradient, static_argnums=0)(fn, params, rows, weights)
    assert all(x.shape[0] == B for x in jax.tree.leaves(each))
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), each)
    assert_trees_close(mean, whole, rtol=1e-5, atol=1e-6)


def test_trajectories_stand_side_by_side_and_chunks_are_one_row():
    """Networks lay out their activations by it."""
    fn, params, rows, weights = mlp_batch()
    told: list[bool] = []

    def watched(params, row):
        told.append(rows_are_vmapped())
        return fn(params, row)

    trajectory_gradients(watched, params, rows, weights)
    assert set(told) == {True}
    told.clear()
    score_gradient(watched, params, rows, weights, chunks=Chunks(5, cut_rows=True))
    assert set(told) == {False}


def test_float32_trajectory_gradients_against_float64_entry_by_entry():
    with jax.enable_x64(True):
        fn, params, rows, weights = mlp_batch()
        each = quick(trajectory_gradients, static_argnums=0)
        exact = each(fn, params, rows, weights)
        assert {x.dtype for x in jax.tree.leaves(exact)} == {jnp.dtype("float64")}
        params, rows, weights = jax.tree.map(halve, (params, rows, weights))
    fn32 = mlp_batch()[0]
    rounded = each(fn32, params, rows, weights)
    assert {x.dtype for x in jax.tree.leaves(rounded)} == {jnp.dtype("float32")}
    for entry, reference in zip(*map(jax.tree.leaves, (rounded, exact)), strict=True):
        scale = np.abs(reference).max()
        assert scale > 0.01
        np.testing.assert_allclose(entry, reference, rtol=1e-4, atol=1e-6 * scale)


def test_score_gradient_is_the_derivative_of_weighted_log_probs():
    """Against finite differences in float64, on a real network."""
    with jax.enable_x64(True):
        fn, params, rows, weights = mlp_batch()
        gradient = quick(lambda p: score_gradient(fn, p, rows, weights))(params)
        flat, unravel = ravel_pytree(params)

        @quick
        def objective(flat):
            log_probs = jax.vmap(fn, (None, 0))(unravel(flat), rows)
            return jnp.sum(weights * log_probs) / B

        step = 1e-6
        for i in range(0, flat.size, 7):
            nudge = jnp.zeros_like(flat).at[i].set(step)
            rise = (objective(flat + nudge) - objective(flat - nudge)) / (2 * step)
            slope = ravel_pytree(gradient)[0][i]
            np.testing.assert_allclose(slope, rise, atol=1e-8)


def test_order_of_rows_does_not_matter():
    fn, params, rows, weights = mlp_batch()
    order = jnp.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[order], (rows, weights))
    gradient = quick(
        lambda rows, weights: score_gradient(
            fn, params, rows, weights, chunks=Chunks(5, cut_rows=True)
        )
    )
    assert_trees_close(
        gradient(*shuffled), gradient(rows, weights), rtol=1e-5, atol=1e-6
    )


def test_weights_carry_no_derivative():
    rows, weights = gaussian_batch()

    def gradient(mean, scale_of_params):
        own = weights * (1.0 + scale_of_params * mean)
        return score_gradient(gaussian, mean, rows, own)

    # g(m) = mean_i sum_t w (x - m); with w = w0 (1 + m), dg/dm would gain a term.
    held = jax.grad(gradient)(jnp.array(0.0), 1.0)
    np.testing.assert_allclose(held, -jnp.sum(weights) / B, rtol=1e-5)
    surrogate_total = jax.grad(
        lambda w: jnp.sum(score_gradient(gaussian, jnp.array(0.5), rows, w))
    )(weights)
    np.testing.assert_array_equal(surrogate_total, 0.0)
    each = jax.grad(
        lambda w: jnp.sum(trajectory_gradients(gaussian, jnp.array(0.5), rows, w))
    )(weights)
    np.testing.assert_array_equal(each, 0.0)


def test_zero_weights_hide_infinite_log_probs():
    """A masked action of an empty slot: its log-probability is -inf, its score 0."""
    logits = jnp.array([0.5, -jnp.inf, 1.0])
    rows = jnp.array([[0, 1], [2, 1]])
    weights = jnp.array([[1.0, 0.0], [5.0, 0.0]])

    def fn(logits, actions):
        return jax.vmap(Categorical(logits).log_prob)(actions)

    # 0 * -inf must not even pass by: with debug_nans on, JAX would stop there.
    with jax.debug_nans(True):
        for engine in (score_gradient, trajectory_gradients):
            gradient = np.atleast_2d(engine(fn, logits, rows, weights))
            assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1


def test_observations_of_higher_rank_and_trees():
    def fn(params, row):
        flat = jnp.sum(row["image"] * params["image"], axis=(1, 2, 3))
        return flat + jnp.sum(row["goal"] * params["goal"], axis=1)

    key = jax.random.key(0)
    rows = {
        "image": jax.random.normal(key, (B, T, 2, 3, 1)),
        "goal": jax.random.normal(key, (B, T, 2)),
    }
    params = {"image": jnp.ones((1, 2, 3, 1)), "goal": jnp.ones((1, 2))}
    weights = jax.random.normal(key, (B, T))
    expected = {
        name: np.einsum("bt,bt...->...", weights, rows[name])[None] / B for name in rows
    }
    for chunks in (Chunks(), Chunks(5), Chunks(5, cut_rows=True)):
        gradient = score_gradient(fn, params, rows, weights, chunks=chunks)
        assert_trees_close(gradient, expected, rtol=1e-4, atol=1e-5)


# Chunks.


@pytest.mark.parametrize("cut_rows", [False, True])
@pytest.mark.parametrize("size", range(1, 3 * 4 + 2))
@pytest.mark.thinned(5)
def test_every_chunk_size_gives_the_whole(size, cut_rows, float64):
    rows, weights = jax.tree.map(lambda x: x[:3, :4], gaussian_batch())
    mean = jnp.array(0.3)
    expected = np.sum(weights * (rows["x"] - 0.3)) / 3
    gradient = quick(
        lambda: score_gradient(
            gaussian, mean, rows, weights, chunks=Chunks(size, cut_rows)
        )
    )()
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)


@pytest.mark.parametrize("cut_rows", [False, True])
@pytest.mark.parametrize("size", [1, 7, 13, 64])
@pytest.mark.thinned(3)
def test_chunks_of_a_real_network_in_rows_of_prime_length(size, cut_rows):
    fn, params, rows, weights = mlp_batch(num_rows=3, length=13)
    whole = quick(lambda: score_gradient(fn, params, rows, weights))()
    cut = quick(
        lambda: score_gradient(fn, params, rows, weights, chunks=Chunks(size, cut_rows))
    )()
    assert_trees_close(cut, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 15, 17, 32, 33, 48, 64])
def test_pieces_that_divide_neither_rows_nor_time(size):
    """Three rows of 19: pieces of at most 16 leave a rest in both directions."""
    worth = jax.random.normal(jax.random.key(0), (3, 19))
    total = quick(
        lambda: sum_over_chunks(
            lambda _, chunk: (jnp.sum(chunk), jnp.array(chunk.size)),
            None,
            worth,
            worth > -9.0,
            Chunks(size, cut_rows=True),
        )
    )()
    np.testing.assert_allclose(total[0], jnp.sum(worth), rtol=1e-5)
    assert total[1] == 3 * 19, "each decision once"


@pytest.mark.parametrize("cut_rows", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 24])
def test_inactive_rows_are_skipped_and_the_sum_is_right(size, cut_rows):
    """Each decision is worth a power of two: the sum says which ones were counted."""
    worth = 2.0 ** jnp.arange(B * T, dtype=float).reshape(B, T)
    active = jnp.zeros((B, T), bool).at[1, 2].set(True).at[3, 5].set(True)
    contribution = jnp.where(active, worth, 0.0)
    total = sum_over_chunks(
        lambda _, chunk: jnp.sum(chunk),
        None,
        contribution,
        active,
        Chunks(size, cut_rows),
    )
    assert total.item() == worth[1, 2] + worth[3, 5]


def visited(size, cut_rows, active):
    """Which decisions `fn` was really called on, by a callback from inside."""
    seen = []

    def fn(_, chunk):
        jax.debug.callback(lambda ids: seen.extend(ids.ravel().tolist()), chunk)
        return jnp.sum(chunk)

    ids = jnp.arange(B * T).reshape(B, T)
    jax.jit(lambda: sum_over_chunks(fn, None, ids, active, Chunks(size, cut_rows)))()
    jax.effects_barrier()
    return sorted(seen)


@pytest.mark.parametrize("cut_rows", [True, False])
@pytest.mark.parametrize("size", [1, 5, 24, 100, None])
def test_where_all_can_contribute_nothing_is_planned(size, cut_rows):
    """The same sum, rests of rows and steps included, by chunks in order."""
    rows = {"obs": jnp.arange(7 * 18 * 2.0).reshape(7, 18, 2), "own": jnp.ones((7, 18))}

    def fn(scale, chunk):
        return {
            "sum": scale * jnp.sum(chunk["obs"] ** 2, axis=(0, 1)),
            "count": jnp.sum(chunk["own"]),
        }

    def total(active):
        chunks = Chunks(size, cut_rows)
        return sum_over_chunks(fn, 1e-3, rows, active, chunks)

    everything = jnp.ones((7, 18), bool)
    found, expected = quick(lambda: (total(None), total(everything)))()
    assert found["count"] == 7 * 18
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    text = jax.jit(lambda: total(None)).lower().as_text()
    assert "scatter" not in text and "stablehlo.case" not in text


def test_skipped_chunks_do_no_work():
    active = jnp.zeros((B, T), bool).at[1].set(True)
    assert visited(T, False, active) == list(range(6, 12))
    assert visited(2 * T, False, active) == list(range(12))
    assert visited(3 * T, False, active) == list(range(18)), "the rest is skipped, too"
    assert visited(3 * T, False, active.at[3, 0].set(True)) == list(range(24))
    assert visited(None, False, active) == list(range(24))
    assert visited(T, False, jnp.zeros((B, T), bool)) == []


def test_cut_rows_skip_the_empty_tails():
    """Pieces come in order of time, so the tails of all rows share chunks."""
    active = jnp.broadcast_to(jnp.arange(T) < 2, (B, T))
    heads = sorted(row * T + t for row in range(B) for t in range(3))
    assert visited(3 * B, True, active) == list(range(24)), "one piece is a whole row"
    assert visited(3, True, active) == heads


def test_a_chunk_that_would_be_nan_is_never_computed():
    rows, weights = gaussian_batch()
    x = rows["x"].at[2].set(jnp.nan)
    weights = weights.at[2].set(0.0)
    chunked = score_gradient(
        gaussian, jnp.array(0.0), {"x": x}, weights, chunks=Chunks(T)
    )
    whole = score_gradient(gaussian, jnp.array(0.0), {"x": x}, weights)
    expected = np.nansum(weights * x) / B
    np.testing.assert_allclose(chunked, expected, rtol=1e-5)
    assert np.isnan(whole), "so that the test above can fail"


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("cut_rows", [False, True])
@pytest.mark.parametrize("size", [None, 1, 15, 17, 32, 33, 64])
@pytest.mark.thinned(4)
def test_mapped_chunks_put_every_number_in_its_place(size, cut_rows, asked):
    """Three rows of 19: pieces of at most 16 leave a rest in both directions."""
    worth = jax.random.normal(jax.random.key(0), (3, 19))
    found = quick(
        lambda: map_over_chunks(
            lambda scale, chunk: {"own": scale * chunk, "large": chunk > 0.0},
            2.0,
            worth,
            worth > -9.0 if asked else None,
            Chunks(size, cut_rows),
        )
    )()
    np.testing.assert_array_equal(found["own"], 2.0 * worth)
    np.testing.assert_array_equal(found["large"], worth > 0.0)


@pytest.mark.parametrize("cut_rows", [False, True])
def test_mapped_chunks_without_anything_active_are_skipped(cut_rows):
    active = jnp.zeros((B, T), bool).at[1, 2].set(True)
    visited: list[int] = []

    def watch(_, chunk):
        jax.debug.callback(lambda x: visited.extend(map(int, x.reshape(-1))), chunk)
        return chunk

    numbers = jnp.arange(B * T).reshape(B, T)
    found = map_over_chunks(watch, None, numbers, active, Chunks(T, cut_rows))
    jax.effects_barrier()
    assert sorted(visited) == list(range(T, 2 * T)), "the second row alone"
    np.testing.assert_array_equal(found, jnp.where(numbers // T == 1, numbers, 0))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 1.0])
@pytest.mark.parametrize("rest", [0, 7])
def test_mapped_pieces_are_visited_in_any_company(share, rest):
    """Few of many chunks, and each of their numbers where its decision is."""
    shape = 40, 12 * PIECE + rest  # 120 chunks of four pieces, and a smaller part
    some = jax.random.uniform(jax.random.key(1), (40, 12)) < share
    active = jnp.pad(jnp.repeat(some, PIECE, axis=1), ((0, 0), (0, rest)))
    numbers = jnp.arange(1.0, 1.0 + shape[0] * shape[1]).reshape(shape)
    found, visited = jax.jit(
        lambda active: map_over_chunks(
            lambda two, x: (two * x, jnp.ones_like(x)),
            2.0,
            numbers,
            active,
            Chunks(4 * PIECE, cut_rows=True),
        )
    )(active)
    np.testing.assert_array_equal(found, 2.0 * numbers * visited)
    assert np.all(visited[active] == 1.0)
    needed = int(jnp.sum(some))
    assert np.sum(visited) == 4 * PIECE * -(-needed // 4)


def test_mapped_over_seeds_it_equals_separate_calls():
    numbers = jnp.arange(2.0 * B * T).reshape(2, B, T)
    active = jnp.zeros((2, B, T), bool).at[0, 1].set(True).at[1, 3].set(True)

    def double(rows, active):
        chunks = Chunks(4, cut_rows=True)
        return map_over_chunks(lambda two, x: two * x, 2.0, rows, active, chunks)

    together = jax.vmap(double)(numbers, active)
    for i in range(2):
        alone = double(numbers[i], active[i])
        counted = np.asarray(active[i])
        np.testing.assert_array_equal(together[i][counted], alone[counted])
        np.testing.assert_array_equal(alone[counted], 2.0 * numbers[i][counted])


def test_sums_keep_the_tree_and_the_dtypes():
    def fn(_, chunk):
        return {"sum": jnp.sum(chunk), "count": jnp.array(chunk.size, jnp.int32)}

    ones = jnp.ones((B, T))
    total = sum_over_chunks(fn, None, ones, ones > 0, Chunks(5, cut_rows=True))
    assert total == {"sum": 24.0, "count": 24}
    assert total["count"].dtype == jnp.int32


def program(fn, *args):
    return jax.jit(fn).lower(*args).as_text()


def over_seeds():
    x, weights = jax.random.normal(jax.random.key(1), (2, 3, B, T))
    weights = weights.at[:, 2:].set(0.0).at[0, 2].set(1.0)
    means = jnp.arange(3.0)

    def gradient(mean, x, weights):
        return score_gradient(gaussian, mean, {"x": x}, weights, chunks=Chunks(T))

    return gradient, (means, x, weights)


def test_over_seeds_by_vmap_it_equals_separate_calls():
    gradient, arguments = over_seeds()
    together = jax.jit(jax.vmap(gradient))(*arguments)
    for i in range(3):
        alone = gradient(*(x[i] for x in arguments))
        np.testing.assert_allclose(together[i], alone, rtol=1e-5)


def test_over_seeds_by_vmap_skipping_stays_a_branch(monkeypatch):
    gradient, arguments = over_seeds()
    ours = program(jax.vmap(gradient), *arguments)
    monkeypatch.setattr("jaxpg.grids.anybody", lambda flags: flags)
    usual = program(jax.vmap(gradient), *arguments)
    assert ".case" in ours and ".case" not in usual


def test_over_seeds_a_chunk_is_skipped_only_where_no_seed_needs_it():
    active = jnp.zeros((3, B, T), bool).at[0, 1].set(True).at[2, 3].set(True)
    seen = []

    def fn(_, chunk):
        jax.debug.callback(lambda ids: seen.extend(ids.ravel().tolist()), chunk)
        return jnp.sum(chunk)

    ids = jnp.broadcast_to(jnp.arange(B * T).reshape(B, T), (3, B, T))
    jax.vmap(lambda ids, active: sum_over_chunks(fn, None, ids, active, Chunks(T)))(
        ids, active
    )
    jax.effects_barrier()
    assert sorted(set(seen)) == [*range(6, 12), *range(18, 24)]


def test_chunks_bound_what_is_held_at_once():
    """The program works on arrays of the chunk's size and of no larger one."""
    fn, params, rows, weights = mlp_batch(num_rows=32, length=T)
    text = program(
        lambda params: score_gradient(fn, params, rows, weights, chunks=Chunks(2 * T)),
        params,
    )
    assert "x8xf32>" in text and f"tensor<2x{T}x8xf32>" in text
    assert f"tensor<32x{T}x8xf32>" not in text


# Errors.


@pytest.mark.parametrize("engine", [score_gradient, trajectory_gradients])
def test_wrong_rows_and_log_probs_are_refused(engine):
    rows, weights = gaussian_batch()
    mean = jnp.array(0.0)
    with pytest.raises(
        ValueError, match=r"^rows have a leaf of shape \(3, 6\), .*B = 4"
    ):
        engine(gaussian, mean, {"x": rows["x"][:3]}, weights)
    with pytest.raises(
        ValueError, match=r"^weights have shape \(.*6,?\), but log_prob"
    ):
        engine(lambda mean, row: gaussian(mean, row)[:, None], mean, rows, weights)


@pytest.mark.parametrize("engine", [score_gradient, trajectory_gradients])
def test_weights_of_one_row_are_refused_with_the_cure(engine):
    engine = inspect.unwrap(engine)  # as users have it, without the shape checker
    with pytest.raises(
        ValueError, match=r"^weights have shape \(6,\).*weights\[None\]"
    ):
        engine(gaussian, jnp.array(0.0), {"x": jnp.ones(T)}, jnp.ones(T))


@pytest.mark.parametrize("size", [0, -1, True])
def test_wrong_chunk_sizes_are_refused(size):
    rows, weights = gaussian_batch()
    with pytest.raises(ValueError, match=r"^chunk size is .*, needs a whole number"):
        score_gradient(gaussian, jnp.array(0.0), rows, weights, chunks=Chunks(size))


def test_chunks_that_may_be_cut_come_as_one_row():
    seen = []

    def shapes(shared, chunk):
        seen.append(chunk.shape)
        return shared * jnp.sum(chunk)

    rows, active = jnp.ones((6, 32, 2)), jnp.ones((6, 32), bool)
    for chunks in (Chunks(48, cut_rows=True), Chunks(64), Chunks(None, cut_rows=True)):
        assert sum_over_chunks(shapes, 1.0, rows, active, chunks) == 6 * 32 * 2
    assert set(seen[:-1]) == {(1, 48, 2), (2, 32, 2)} and seen[-1] == (1, 192, 2)


def test_the_size_that_suits_the_device(monkeypatch):
    assert Chunks("auto", cut_rows=True).number == 256
    assert Chunks("auto").number > Chunks("auto", cut_rows=True).number
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert Chunks("auto", cut_rows=True).number > 10_000
    assert Chunks(7).number == 7 and Chunks(None).number is None


@pytest.mark.parametrize("length", [TOGETHER - 5, 2 * TOGETHER + 5, 5 * TOGETHER])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.thinned(4)
def test_chunks_that_nobody_needs_are_skipped_together(length, share):
    """Many chunks: summed are those with anything active, each once."""
    active = jax.random.uniform(jax.random.key(length), (2, length)) < share
    numbers = jnp.arange(2.0 * length).reshape(2, length)

    def total(scale, x):
        return scale * jnp.sum(x), jnp.ones((), int)

    chunks = Chunks(size=1, cut_rows=True)

    def of(scale):
        return sum_over_chunks(total, scale, numbers, active, chunks)

    found, count = jax.jit(of)(2.0)
    assert found == 2.0 * jnp.sum(jnp.where(active, numbers, 0.0))
    assert count == jnp.sum(active)
    # Reverse derivatives go through, as through any sum.
    assert jax.grad(lambda scale: of(scale)[0])(2.0) == found / 2.0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_needed_comes_first_and_in_order(share):
    needed = jax.random.uniform(jax.random.key(0), (1000,)) < share
    order, count = jax.jit(needed_first)(needed)
    assert order.tolist() == jnp.argsort(~needed).tolist()
    assert count == jnp.sum(needed)


def test_members_skip_what_none_of_them_needs():
    active = jnp.zeros((2, 1, 4 * TOGETHER), bool).at[0, 0, 3].set(True)
    active = active.at[1, 0, 77].set(True)
    numbers = jnp.ones(active.shape[1:])
    visits = jax.vmap(
        lambda active: sum_over_chunks(
            lambda _, x: jnp.sum(x), None, numbers, active, Chunks(1, cut_rows=True)
        )
    )(active)
    assert visits.tolist() == [2.0, 2.0]  # one's work is done beside the other's


def test_pieces_of_unlike_rows_fill_chunks_together():
    """Every fifth of 40 rows has something, in its third piece: 8 pieces, 2 chunks."""
    active = jnp.zeros((40, 70), bool).at[::5, 33].set(True)
    numbers = jnp.arange(40.0 * 70).reshape(40, 70)
    rows = numbers, active

    def seen(_, chunk):
        return jnp.ones(()), jnp.sum(jnp.where(chunk[1], chunk[0], 0.0))

    chunks = Chunks(4 * PIECE, cut_rows=True)
    visits, total = sum_over_chunks(seen, None, rows, active, chunks)
    assert visits == 2.0
    assert total == jnp.sum(jnp.where(active, numbers, 0.0))
    by_rows = Chunks(4 * 70)
    assert sum_over_chunks(seen, None, rows, active, by_rows)[0] == 8.0


@pytest.mark.parametrize("size", [1, 4 * PIECE])
def test_chunks_are_counted_in_double_precision_too(float64, size):
    active = jnp.zeros((40, 200), bool).at[::5, 33].set(True)
    numbers = jnp.arange(40.0 * 200).reshape(40, 200)
    found = sum_over_chunks(
        lambda _, chunk: jnp.sum(jnp.where(chunk[1], chunk[0], 0.0)),
        None,
        (numbers, active),
        active,
        Chunks(size, cut_rows=True),
    )
    assert found == jnp.sum(jnp.where(active, numbers, 0.0))
