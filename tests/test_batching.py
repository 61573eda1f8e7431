"""`anywhere`: one decision for the whole batch. `over_rows`: one row has no axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg._batching import anywhere, over_rows, rows_are_vmapped, vmap_rows

FLAGS = jnp.array([[False, False, True], [False, False, False]])


def program(fn, *args):
    """The program that XLA is given, as text; before it, a batched while looks bare."""
    return jax.jit(fn).lower(*args).as_text()


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (jnp.array(False), False),
        (jnp.array(True), True),
        (jnp.zeros((2, 3), bool), False),
        (FLAGS, True),
    ],
)
def test_without_vmap_it_is_any(flags, answer):
    assert anywhere(flags).shape == ()
    assert bool(anywhere(flags)) is answer
    assert bool(jax.jit(anywhere)(flags)) is answer


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_one_flag_in_any_row_counts_for_all_rows(wrap):
    rows = wrap(jax.vmap(anywhere))
    np.testing.assert_array_equal(rows(FLAGS), [True, True])
    np.testing.assert_array_equal(rows(jnp.zeros_like(FLAGS)), [False, False])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_nested_vmap_looks_along_every_axis(wrap):
    cells = wrap(jax.vmap(jax.vmap(anywhere)))
    assert cells(FLAGS).all()
    assert not cells(jnp.zeros_like(FLAGS)).any()


def test_result_is_not_batched_so_vmap_can_return_it_bare():
    batched, bare = jax.vmap(lambda x: (anywhere(x), anywhere(x)), out_axes=(0, None))(
        FLAGS
    )
    assert batched.shape == (2,) and bare.shape == ()


def test_an_unbatched_flag_under_vmap_is_itself():
    flag = jnp.array(False)
    answers = jax.vmap(lambda x: anywhere(flag) | (x > 1))(jnp.arange(4))
    np.testing.assert_array_equal(answers, [False, False, True, True])


def sine_if(decide):
    """A function whose heavy part (a sine) is wanted where x > 0."""

    def of_one(x):
        return jax.lax.cond(decide(x > 0), jnp.sin, lambda x: x, x)

    return of_one


@pytest.mark.parametrize("nested", [False, True])
def test_cond_stays_cond_under_vmap(nested):
    def batch(decide):
        fn = jax.vmap(sine_if(decide))
        return jax.vmap(fn) if nested else fn

    x = jnp.zeros((2, 3)) if nested else jnp.zeros(3)
    ours = program(batch(anywhere), x)
    usual = program(batch(lambda flag: flag), x)
    assert ".case" in ours and ".select" not in ours
    assert ".case" not in usual and ".select" in usual


def test_cond_takes_the_branch_that_anybody_needs():
    batch = jax.jit(jax.vmap(sine_if(anywhere)))
    np.testing.assert_array_equal(batch(jnp.array([-1.0, -2.0])), [-1.0, -2.0])
    x = jnp.array([-1.0, 2.0])
    np.testing.assert_allclose(batch(x), np.sin(x), rtol=1e-6)


def count_to(decide):
    def of_one(limit):
        def unfinished(carry):
            return decide(carry[0] < limit)

        def advance(carry):
            turns, big = carry
            return turns + 1, big + (turns < limit).astype(big.dtype)

        return jax.lax.while_loop(unfinished, advance, (jnp.array(0), jnp.zeros(7)))

    return of_one


def test_while_loop_runs_until_nobody_needs_it_and_selects_nothing():
    limits = jnp.array([1, 4, 2])
    turns, big = jax.jit(jax.vmap(count_to(anywhere)))(limits)
    np.testing.assert_array_equal(turns, [4, 4, 4])
    np.testing.assert_array_equal(big[:, 0], [1.0, 4.0, 2.0])

    def selects(decide):
        return program(jax.vmap(count_to(decide)), limits).count(".select")

    assert selects(anywhere) == 0
    assert selects(lambda flag: flag) >= 2, "usual vmap copies the whole carry"


def test_code_around_it_can_be_differentiated():
    def loss(x):
        return jnp.sum(jax.vmap(sine_if(anywhere))(x))

    x = jnp.array([-1.0, 2.0])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), np.cos(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(-jnp.abs(x)), [1.0, 1.0])


def test_it_works_inside_scan():
    def step(total, flags):
        return total + jnp.where(anywhere(flags), 1, 0), None

    totals, _ = jax.vmap(lambda rows: jax.lax.scan(step, 0, rows))(
        jnp.array([[False, True, False], [False, False, True]])[..., None]
    )
    np.testing.assert_array_equal(totals, [2, 2])


@pytest.mark.parametrize("count", [1, 3])
def test_over_rows_is_vmap(count):
    rows = {"x": jnp.arange(2.0 * count).reshape(count, 2)}
    found = over_rows(lambda scale, row: (scale * row["x"], 7), 3.0, rows)
    np.testing.assert_array_equal(found[0], 3.0 * rows["x"])
    np.testing.assert_array_equal(found[1], np.full(count, 7))


def test_one_row_is_seen_without_an_axis():
    def dots(count):
        rows = jnp.ones((count, 5, 4))
        text = jax.make_jaxpr(lambda w: over_rows(lambda w, x: w @ x.T, w, rows))(
            jnp.ones((3, 4))
        )
        return [eqn.outvars[0].aval.shape for eqn in text.eqns if "dot" in str(eqn)]

    assert dots(1) == [(3, 5)]
    assert dots(2) != [(3, 5)]


def test_what_is_traced_is_told_of_vmapped_rows():
    told: list[bool] = []

    def fn(scale, row):
        told.append(rows_are_vmapped())
        return scale * row

    rows = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(vmap_rows(fn, (None, 0))(2.0, rows), 2.0 * rows)
    over_rows(fn, 2.0, rows)
    assert told == [True, True]
    over_rows(fn, 2.0, rows[:1])
    fn(2.0, rows)
    assert told[2:] == [False, False], "one long row"


def test_it_is_forgotten_where_tracing_fails():
    def fail(row):
        raise RuntimeError(row.shape)

    with pytest.raises(RuntimeError):
        vmap_rows(fail, (0,))(jnp.ones((2, 2)))
    assert not rows_are_vmapped()
