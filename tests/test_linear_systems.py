"""Conjugate gradients against LAPACK, and where they must stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.linear_systems import check_like, conjugate_gradient, largest_entry


def positive_matrix(size, condition, seed=0):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (rotation * np.geomspace(1.0, condition, size)) @ rotation.T


def times(matrix):
    matrix = jnp.asarray(matrix)
    return lambda x: matrix @ x


def true_residual(matrix, x, target):
    return np.linalg.norm(target - matrix @ x) / np.linalg.norm(target)


def test_solves_as_lapack_does(float64):
    matrix = positive_matrix(30, 100.0)
    target = np.random.default_rng(1).normal(size=30)
    result = conjugate_gradient(
        times(matrix), jnp.asarray(target), num_iterations=60, tolerance=1e-26
    )
    expected = np.linalg.solve(matrix, target)
    np.testing.assert_allclose(result.solution, expected, rtol=1e-10, atol=1e-12)
    assert 25 <= result.num_iterations < 60, "the tolerance stops it, not the limit"
    assert result.residual <= 1e-12


def test_trees_are_one_vector(float64):
    matrix = jnp.asarray(positive_matrix(7, 10.0))
    target = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.array(-2.0)}
    flat, unravel = jax.flatten_util.ravel_pytree(target)

    def product(tree):
        return unravel(matrix @ jax.flatten_util.ravel_pytree(tree)[0])

    result = conjugate_gradient(product, target, num_iterations=7, tolerance=0.0)
    found = jax.flatten_util.ravel_pytree(result.solution)[0]
    np.testing.assert_allclose(found, np.linalg.solve(matrix, flat), rtol=1e-9)


def test_the_iterations_are_those_of_the_textbook(float64):
    """x after k steps minimises x A x / 2 - x b in the k-th Krylov space."""
    matrix, target = positive_matrix(6, 50.0), np.ones(6)
    krylov = np.stack([np.linalg.matrix_power(matrix, i) @ target for i in range(3)], 1)
    inside = np.linalg.solve(krylov.T @ matrix @ krylov, krylov.T @ target)
    result = conjugate_gradient(times(matrix), jnp.asarray(target), num_iterations=3)
    np.testing.assert_allclose(result.solution, krylov @ inside, rtol=1e-8)
    assert result.num_iterations == 3
    expected = true_residual(matrix, np.asarray(result.solution), target)
    np.testing.assert_allclose(result.residual, expected, rtol=1e-10)
    assert result.residual > 1e-3, "the residual must be worth reporting"


@pytest.mark.parametrize("condition", [30.0, 1e3])
def test_four_thousand_parameters_in_float32(condition):
    diagonal = np.geomspace(1.0, condition, 4096).astype(np.float32)
    direction = np.random.default_rng(0).normal(size=4096).astype(np.float32) / 64
    target = np.random.default_rng(1).normal(size=4096).astype(np.float32)
    scale, ray = jnp.asarray(diagonal), jnp.asarray(direction)

    def product(x):
        return scale * x + 5.0 * ray * jnp.sum(ray * x)

    @jax.jit
    def solve(target):
        return conjugate_gradient(product, target, num_iterations=400)

    result = solve(jnp.asarray(target))
    x = np.asarray(result.solution, np.float64)
    left = target - diagonal * x - 5.0 * direction * np.dot(direction.astype(float), x)
    honest = np.linalg.norm(left) / np.linalg.norm(target)
    # Rounding of A x itself is about 1e-7 in the worst of these.
    np.testing.assert_allclose(result.residual, honest, rtol=0.02, atol=3e-7)
    assert honest < 3e-5


def test_the_residual_is_of_the_solution_and_not_of_a_recurrence():
    """In float32 the recurrence goes on to fall where the truth cannot."""
    matrix = positive_matrix(60, 1e5).astype(np.float32)
    target = np.ones(60, np.float32)
    result = conjugate_gradient(
        times(matrix), jnp.asarray(target), num_iterations=2000, tolerance=1e-16
    )
    x = np.asarray(result.solution, np.float64)
    honest = true_residual(matrix.astype(np.float64), x, target)
    assert honest > 1e-6
    np.testing.assert_allclose(result.residual, honest, rtol=0.3)


@pytest.mark.parametrize(
    ("diagonal", "solution", "residual"),
    [
        ([1.0, -1.0], [0.0, 0.0], 1.0),  # p A p = 0 at once
        ([-1.0, -2.0], [0.0, 0.0], 1.0),
        # p = (1, 1): p A p = 1, so x = (2, 2) and b - A x = (-3, 3). Next
        # p = (-3, 3) + 9 (1, 1) = (6, 12), and p A p = 72 - 144 < 0.
        ([2.0, -1.0], [2.0, 2.0], 3.0),
        ([1.0, np.nan], [0.0, 0.0], np.nan),
    ],
)
def test_no_step_without_positive_curvature(diagonal, solution, residual):
    result = conjugate_gradient(lambda x: jnp.array(diagonal) * x, jnp.ones(2))
    np.testing.assert_allclose(result.solution, solution)
    np.testing.assert_allclose(result.residual, residual, rtol=1e-6)
    assert result.num_iterations == (1 if solution[0] else 0)


def test_a_singular_matrix_gives_the_shortest_solution(float64):
    """Long after the end, only rounding is left to search along."""
    for seed in range(5):
        half = np.random.default_rng(seed).normal(size=(9, 5))
        matrix = half @ half.T
        target = matrix @ np.ones(9)
        result = conjugate_gradient(
            times(matrix), jnp.asarray(target), num_iterations=500, tolerance=0.0
        )
        expected = np.linalg.pinv(matrix, hermitian=True) @ target
        np.testing.assert_allclose(result.solution, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("start", [None, jnp.array([1.0, 2.0])])
def test_a_target_of_zero_has_the_solution_zero(start):
    result = conjugate_gradient(lambda x: 2.0 * x, jnp.zeros(2), start=start)
    assert result.solution.tolist() == [0.0, 0.0]
    assert (result.residual, result.num_iterations) == (0.0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_target_that_is_no_number_is_reported(bad):
    result = conjugate_gradient(lambda x: 2.0 * x, jnp.array([1.0, bad]))
    assert result.solution.tolist() == [0.0, 0.0]
    assert np.isnan(result.residual) and result.num_iterations == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(size):
    matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    target = size * jnp.array([4.0, 7.0])
    for start in (None, size * jnp.array([1.0, 1.0])):
        result = conjugate_gradient(times(matrix), target, start=start)
        np.testing.assert_allclose(result.solution / size, [1.0, 2.0], rtol=1e-5)


def test_a_start_is_where_it_starts(float64):
    matrix, target = positive_matrix(8, 20.0), np.arange(1.0, 9.0)
    answer = np.linalg.solve(matrix, target)
    done = conjugate_gradient(times(matrix), target, start=jnp.asarray(answer))
    assert done.num_iterations == 0
    np.testing.assert_allclose(done.solution, answer, rtol=1e-12)
    near = answer + 1e-3 * np.ones(8)
    one = {"num_iterations": 2}
    warm = conjugate_gradient(times(matrix), target, start=jnp.asarray(near), **one)
    cold = conjugate_gradient(times(matrix), target, **one)
    assert warm.residual < 0.01 * cold.residual


def test_many_systems_at_once():
    matrices = jnp.stack([jnp.eye(3), jnp.diag(jnp.array([1.0, 2.0, 4.0]))])
    targets = jnp.ones((2, 3))

    def solve(matrix, target):
        return conjugate_gradient(lambda x: matrix @ x, target)

    together = jax.jit(jax.vmap(solve))(matrices, targets)
    assert together.num_iterations.tolist() == [1, 3]
    np.testing.assert_allclose(together.solution[1], [1, 0.5, 0.25], rtol=1e-5)
    np.testing.assert_allclose(together.solution[0], np.ones(3), rtol=1e-6)


def test_arguments_out_of_range_are_refused():
    solve, target = (lambda x: x), jnp.ones(2)
    with pytest.raises(ValueError, match="num_iterations is 0, needs a whole number"):
        conjugate_gradient(solve, target, num_iterations=0)
    with pytest.raises(ValueError, match="tolerance is -1, needs a number in"):
        conjugate_gradient(solve, target, tolerance=-1)
    with pytest.raises(ValueError, match=r"start is a tree of \(\(3,\), 'float32'\)"):
        conjugate_gradient(solve, target, start=jnp.ones(3))
    with pytest.raises(ValueError, match=r"x is a tree of .*, needs"):
        check_like("x", {"a": target}, {"b": target})


def test_the_largest_entry_of_an_empty_leaf_is_no_entry():
    assert largest_entry({"a": jnp.zeros((0,)), "b": jnp.array([-2.0])}) == 2.0
