"""Linear baselines: against NumPy's solver, by enumeration, and on many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import exact, importance
from jaxpg.baselines import apply_baseline
from jaxpg.credit import Credit, CreditConfig, credit_of
from jaxpg.envs import Box, Discrete
from jaxpg.envs.tabular import random_mdp
from jaxpg.gradients import score_gradient
from jaxpg.linear_baselines import (
    linear_baseline,
    plain_linear_baseline,
    polynomial_features,
    solve_ridge,
)
from jaxpg.policies import log_prob_fn, tabular_policy
from jaxpg.train.sharding import place
from jaxpg.types import Trajectory

KEY = jax.random.key(0)
MAX_STEPS, NUM_ROWS, OBS = 4, 16, Box(-np.inf, np.inf, (2,))
RIDGE = 1e-3


def rows_of(rng, num_rows=NUM_ROWS):
    """One episode per row, of random length, with random observations."""
    shape = (num_rows, MAX_STEPS)
    time = np.broadcast_to(np.arange(MAX_STEPS, dtype=np.int32), shape)
    mask = time < rng.integers(1, MAX_STEPS + 1, num_rows)[:, None]
    ids = np.broadcast_to(np.arange(num_rows, dtype=np.int32)[:, None], shape)
    zeros, no = jnp.zeros(shape), jnp.zeros(shape, bool)
    obs = jnp.asarray(3 * rng.normal(size=(*shape, 2)), float)
    facts = map(jnp.asarray, (mask, time, ids))
    return Trajectory(obs, zeros, zeros, zeros, no, no, *facts)


def random_batch(seed=0):
    """Rows, and credit with a reach that varies, as it does off policy."""
    rng = np.random.default_rng(seed)
    rows = rows_of(rng)
    reach = np.where(rows.mask, rng.exponential(size=rows.mask.shape), 0.0)
    returns = 100.0 + 20.0 * rng.normal(size=rows.mask.shape)
    credit = Credit(jnp.asarray(reach * returns, float), jnp.asarray(reach, float))
    return rows, credit


def numpy_fit(rows, credit, where=True):
    """Coefficients in float64, features and equations written out anew."""
    o = np.clip(np.asarray(rows.obs, np.float64), -10, 10)
    t = np.asarray(rows.time, np.float64)[..., None] / MAX_STEPS
    phi = np.concatenate([o, o**2, t, t**2, t**3, np.ones_like(t)], axis=-1)
    some = np.asarray(rows.mask) & where
    x, weight = phi[some], np.asarray(credit.reach, np.float64)[some]
    matrix = x.T @ (weight[:, None] * x)
    vector = x.T @ np.asarray(credit.value, np.float64)[some]
    ridges = np.full(len(vector), RIDGE)
    ridges[-1] = 0.0  # the constant is free
    return phi, np.linalg.solve(matrix + np.diag(ridges * np.diag(matrix)), vector)


def test_a_constant_return_is_predicted_as_it_is():
    """With a ridge on the constant as well, every prediction would be short of it."""
    matrix, vector = jnp.full((1, 1), 100.0), jnp.full((1,), 100.0 * 1e4)
    np.testing.assert_allclose(
        solve_ridge(matrix, vector, 1e-3, free_last=True), [1e4], rtol=1e-6
    )


def predict(baseline, state, rows, credit):
    summary = baseline.summarize(None, rows, credit)
    return baseline.predict(None, state, summary, rows, credit)


def test_features_are_those_of_duan():
    features, size = polynomial_features(OBS, 4)
    rows = jax.tree.map(lambda x: x[:1, 1:2], random_batch()[0])
    rows = rows._replace(obs=jnp.array([[[2.0, -30.0]]]))
    by_hand = [2.0, -10.0, 4.0, 100.0, 0.25, 0.0625, 0.015625, 1.0]
    assert size == 8
    np.testing.assert_allclose(features(rows), [[by_hand]])


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_fitted_on_earlier_batches_it_is_weighted_ridge_regression(precision):
    with jax.enable_x64(precision == "float64"):
        rows, credit = random_batch()
        baseline = linear_baseline(OBS, MAX_STEPS, ridge=RIDGE)
        state = baseline.init(KEY, jnp.zeros(2))
        np.testing.assert_array_equal(predict(baseline, state, rows, credit), 0.0)
        state, info = jax.jit(baseline.fit)(state, rows, credit)
        phi, coefficients = numpy_fit(rows, credit)
        found = predict(baseline, state, rows, credit)
        assert found.dtype == credit.value.dtype and not baseline.needs_batch
        rtol = 1e-10 if precision == "float64" else 2e-3
        np.testing.assert_allclose(found, phi @ coefficients, rtol=rtol)
        # Before the fit it was 0: 1 - E[target^2] / Var[target], about -25 here.
        reach, targets = np.asarray(credit.reach), 0.0
        targets = np.asarray(credit.value) / np.where(rows.mask, reach, 1.0)
        mean = np.average(targets, weights=reach)
        variance = np.average((targets - mean) ** 2, weights=reach)
        by_hand = 1 - np.average(targets**2, weights=reach) / variance
        assert by_hand < -10
        explained = info["baseline_explained_variance"]
        np.testing.assert_allclose(explained, by_hand, rtol=1e-4)
        explained = baseline.fit(state, rows, credit)[1]["baseline_explained_variance"]
        assert 0.0 < explained < 1.0


def test_the_plain_form_is_fitted_on_the_batch_itself(float64):
    rows, credit = random_batch()
    phi, coefficients = numpy_fit(rows, credit)
    found = predict(
        plain_linear_baseline(OBS, MAX_STEPS, ridge=RIDGE), (), rows, credit
    )
    np.testing.assert_allclose(found, phi @ coefficients, rtol=1e-10)


@pytest.mark.parametrize("num_folds", [2, 3, 20])
@pytest.mark.thinned(2)
def test_a_fold_is_predicted_by_the_others(num_folds, float64):
    rows, credit = random_batch()
    baseline = linear_baseline(OBS, MAX_STEPS, ridge=RIDGE, num_folds=num_folds)
    found = predict(baseline, (), rows, credit)
    fold = np.asarray(rows.episode_id) % num_folds
    for k in range(min(num_folds, NUM_ROWS)):
        phi, coefficients = numpy_fit(rows, credit, fold != k)
        own = fold == k
        np.testing.assert_allclose(found[own], phi[own] @ coefficients, rtol=1e-9)
    assert baseline.needs_batch and baseline.min_trajectories == 2


@pytest.mark.parametrize("make", [plain_linear_baseline, linear_baseline])
def test_summaries_of_parts_add_up(make, float64):
    extra = {"num_folds": 3} if make is linear_baseline else {}
    baseline = make(OBS, MAX_STEPS, **extra)
    rows, credit = random_batch()
    whole = baseline.summarize(None, rows, credit)
    parts = [
        baseline.summarize(None, *jax.tree.map(lambda x, some=some: x[some], both))
        for both in [(rows, credit)]
        for some in (slice(5), slice(5, None))
    ]
    summed = jax.tree.map(jnp.add, *parts)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


def test_alone_in_the_batch_the_baseline_is_zero():
    rows, credit = jax.tree.map(lambda x: x[:1], random_batch())
    baseline = linear_baseline(OBS, MAX_STEPS, num_folds=2)
    np.testing.assert_array_equal(predict(baseline, (), rows, credit), 0.0)


# The solver.


def random_system(size, num_rows=50):
    phi = np.random.default_rng(size).normal(size=(num_rows, size))
    return phi.T @ phi, phi.T @ np.ones(num_rows)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_it_solves_what_numpy_solves(size, float64):
    matrix, vector = random_system(size)
    expected = np.linalg.solve(matrix + 1e-6 * np.diag(np.diag(matrix)), vector)
    found = jax.jit(solve_ridge, static_argnums=2)(matrix, vector, 1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_units_of_features_do_not_matter_in_float32():
    """Features from 1e-8 to 1e8: squared, their weights span 32 decades."""
    matrix, vector = random_system(9)
    units = 10.0 ** np.arange(-8, 9, 2)
    expected = np.linalg.solve(matrix + 1e-3 * np.diag(np.diag(matrix)), vector)
    scaled = units[:, None] * matrix * units[None, :]
    found = solve_ridge(
        jnp.asarray(scaled, jnp.float32), jnp.asarray(units * vector, jnp.float32), 1e-3
    )
    np.testing.assert_allclose(np.asarray(found) * units, expected, rtol=1e-4)


@pytest.mark.parametrize("ridge", [1e-3, 1e-12])
def test_features_that_say_the_same_are_harmless_in_float32(ridge):
    """Two equal features, one that is their sum, one that is never seen."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000))
    phi = np.stack([a, a, 2 * a, b, 0 * b, np.ones(1000)], axis=1)
    targets = 500 + 3 * a - 2 * b
    matrix = jnp.asarray(phi.T @ phi, jnp.float32)
    vector = jnp.asarray(phi.T @ targets, jnp.float32)
    found = np.asarray(solve_ridge(matrix, vector, ridge))
    assert np.isfinite(found).all() and found[4] == 0.0
    assert np.abs(found[:3]).max() < 10.0
    np.testing.assert_allclose(phi @ found, targets, atol=500 * 2e-3)


# Bias, by enumeration.


def mean_and_exact(make, batch_size, state=(), off_policy=False):
    """The estimate's mean, the gradient, and how much smaller the weights are."""
    num_states, horizon = {1: (3, 3), 2: (3, 2), 3: (2, 2)}[batch_size]
    mdp = random_mdp(seed=3, num_states=num_states, horizon=horizon)
    policy = tabular_policy(Discrete(num_states), Discrete(2))
    params = policy.init(jax.random.key(1), jnp.zeros((), jnp.int32))
    behaviour = jax.tree.map(lambda x: 0.5 * x, params) if off_policy else params
    baseline, fn = make(Discrete(num_states), horizon), log_prob_fn(policy)

    def credit(rows):
        if not off_policy:
            return credit_of(rows)
        log_probs = jax.vmap(fn, (None, 0))(params, rows)
        log_rhos = jax.vmap(importance.log_ratios)(log_probs, rows.log_prob, rows.mask)
        return credit_of(rows, CreditConfig(ratio="causal"), log_rhos)

    def estimate(rows):
        value, _ = credit(rows)
        weights = apply_baseline(baseline, params, state, rows, credit(rows))
        change = jnp.sum((weights - value) ** 2) / jnp.sum(value**2)
        return score_gradient(fn, params, rows, weights), change

    mean, change = exact.expected_estimate(estimate, mdp, policy, behaviour, batch_size)
    gradient = np.ravel(exact.policy_gradient(mdp, policy, params)["network"])
    assert np.linalg.norm(gradient) > 0.1 and change > 1e-3
    return np.ravel(mean["network"]), gradient


@pytest.mark.parametrize(
    ("num_folds", "batch_size", "off_policy"),
    [(2, 2, False), (2, 3, False), (3, 3, False), (2, 2, True)],
)
@pytest.mark.thinned(2)
def test_across_folds_it_is_unbiased(num_folds, batch_size, off_policy, float64):
    make = functools.partial(linear_baseline, num_folds=num_folds)
    mean, gradient = mean_and_exact(make, batch_size, off_policy=off_policy)
    np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12)


def test_whatever_it_has_learned_it_is_unbiased(float64):
    state = jax.random.normal(KEY, (2 * 3 + 4,))
    mean, gradient = mean_and_exact(linear_baseline, 1, state)
    np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12)


def test_the_plain_form_is_biased(float64):
    mean, gradient = mean_and_exact(plain_linear_baseline, 2)
    assert np.linalg.norm(mean - gradient) > 0.1 * np.linalg.norm(gradient)


# Many seeds, many devices.

FORMS = {
    "earlier": lambda: linear_baseline(OBS, MAX_STEPS),
    "folds": lambda: linear_baseline(OBS, MAX_STEPS, num_folds=3),
    "plain": lambda: plain_linear_baseline(OBS, MAX_STEPS),
}


def one_round(baseline):
    """Fit, then predict: all that a state and a summary can come to."""

    def run(rows, credit):
        state, info = baseline.fit(baseline.init(KEY, jnp.zeros(2)), rows, credit)
        return predict(baseline, state, rows, credit), state, info

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("form", FORMS)
def test_rows_spread_over_devices_change_nothing(form, float64):
    mesh = place(8, rows=NUM_ROWS).replicated.mesh
    over_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    batch = random_batch()
    run = one_round(FORMS[form]())
    spread = run(*jax.device_put(batch, over_rows))
    assert len(spread[0].sharding.device_set) == 8
    alone = jax.tree.leaves(run(*batch))
    assert np.abs(alone[0]).max() > 1.0
    for x, y in zip(jax.tree.leaves(spread), alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_over_seeds_by_vmap_it_equals_separate_calls(form, float64):
    batches = [random_batch(seed) for seed in range(3)]
    run = one_round(FORMS[form]())
    together = jax.vmap(run)(*jax.tree.map(lambda *x: jnp.stack(x), *batches))
    for i, batch in enumerate(batches):
        apart = jax.tree.leaves(run(*batch))
        for x, y in zip(jax.tree.leaves(together), apart, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: linear_baseline(OBS, 3, num_folds=1),
            "^num_folds is 1, needs a number in .2, inf.; one fold has no others",
        ),
        (lambda: linear_baseline(OBS, 0), "^max_steps is 0, needs a whole number"),
        (lambda: linear_baseline(OBS, 3, ridge=0.0), "^ridge is 0.0, needs a number"),
        (
            lambda: plain_linear_baseline(OBS, 3, ridge=-1.0),
            "^ridge is -1.0, needs a n",
        ),
    ],
)
def test_what_cannot_work_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
