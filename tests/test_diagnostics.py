"""Diagnostics: unbiased by enumeration in float64, known truths, hands, extremes."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpg import diagnostics, drift, importance
from jaxpg.moments import moments_of, no_moments


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


# Gradients, by hand.

HAND = {"w": [[1.0, 0.0], [3.0, 0.0]], "b": [2.0, 6.0]}


def hand_moments():
    """Mean (2, 0, 4), |g|^2 = 20; variances 2, 0, 8; N = 2."""
    return quick(moments_of)(jax.tree.map(jnp.array, HAND, is_leaf=is_list))


def is_list(x):
    return isinstance(x, list)


def test_variance_and_signal_by_hand():
    moments = hand_moments()
    assert diagnostics.total_variance(moments) == 10.0  # 2 + 0 + 8
    assert diagnostics.variance_of_mean(moments) == 5.0  # 10 / 2
    assert diagnostics.gradient_norm_sq(moments) == 15.0  # 20 - 5
    assert diagnostics.signal_to_noise(moments) == 3.0  # 15 / 5; plain: 20 / 5
    pair = diagnostics.noise_scale(moments)
    assert pair == (15.0, 10.0)
    np.testing.assert_allclose(pair.noise_scale, 10 / 15, rtol=1e-6)


def test_a_batch_that_shows_no_gradient_says_so_with_a_negative_sign():
    # gradients -1 and 1: |g|^2 = 0, variance 2, of the mean 1
    moments = moments_of(jnp.array([-1.0, 1.0]))
    assert diagnostics.gradient_norm_sq(moments) == -1.0
    assert diagnostics.signal_to_noise(moments) == -1.0
    assert diagnostics.noise_scale(moments).noise_scale == -2.0


def test_without_noise_or_gradient():
    alike, zero = moments_of(jnp.full(4, 3.0)), moments_of(jnp.zeros(4))
    assert diagnostics.signal_to_noise(alike) == np.inf
    assert diagnostics.noise_scale(alike).noise_scale == 0.0
    assert diagnostics.signal_to_noise(zero) == 0.0
    assert diagnostics.noise_scale(zero).noise_scale == 0.0
    just_hidden = diagnostics.NoiseScale(jnp.array(0.0), jnp.array(2.0))
    assert just_hidden.noise_scale == np.inf


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_trajectories_know_nothing(number):
    moments = moments_of(jnp.ones((1, 2))) if number else no_moments(jnp.ones(2))
    for name in ("total_variance", "variance_of_mean", "signal_to_noise"):
        assert np.isnan(getattr(diagnostics, name)(moments))


# Gradients, by enumeration: the mean over every batch that there can be.

VECTORS = np.array([[1.0, -2.0], [0.5, 0.0], [-3.0, 1.0]])
PROBABILITIES = np.array([0.5, 0.3, 0.2])
MEAN = PROBABILITIES @ VECTORS
NORM_SQ = MEAN @ MEAN
TRACE = PROBABILITIES @ np.sum((VECTORS - MEAN) ** 2, axis=1)


def every_batch(size):
    """All batches of `size` vectors, [number, size, 2], and their probabilities."""
    index = np.array(list(itertools.product(range(3), repeat=size)))
    return jnp.asarray(VECTORS[index]), PROBABILITIES[index].prod(axis=1)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_estimates_are_unbiased(float64, size):
    batches, probability = every_batch(size)

    def estimates(batch):
        moments = moments_of({"x": batch[:, 0], "y": batch[:, 1:]})
        pair = diagnostics.noise_scale(moments)
        of_mean = diagnostics.variance_of_mean(moments)
        plain = jnp.sum(jnp.mean(batch, axis=0) ** 2)
        return jnp.stack([*pair, of_mean, plain])

    means = probability @ np.asarray(quick(jax.vmap(estimates))(batches))
    exact = [NORM_SQ, TRACE, TRACE / size, NORM_SQ + TRACE / size]
    np.testing.assert_allclose(means, exact, rtol=1e-10)


@pytest.mark.parametrize(("small", "big"), [(1, 2), (2, 5)])
def test_two_batches_give_an_unbiased_pair_though_one_contains_the_other(
    float64, small, big
):
    batches, probability = every_batch(big)

    def estimates(batch):
        norms = [jnp.sum(jnp.mean(b, axis=0) ** 2) for b in (batch[:small], batch)]
        return jnp.stack(diagnostics.two_batch_noise_scale(*norms, small, big))

    means = probability @ np.asarray(quick(jax.vmap(estimates))(batches))
    np.testing.assert_allclose(means, [NORM_SQ, TRACE], rtol=1e-10)


def test_two_batches_by_hand():
    # (4 * 2 - 5) / 3 = 1; (5 - 2) / (1 - 1/4) = 4
    norms = jnp.array(5.0), jnp.array(2.0)
    pair = diagnostics.two_batch_noise_scale(*norms, 1, 4)
    assert pair == (1.0, 4.0) and pair.noise_scale == 4.0


def test_averaged_pairs_give_the_ratio_of_averages():
    # ratios 1, 9 and mean 5; averages 2 and 6: ratio 3
    pairs = diagnostics.NoiseScale(jnp.array([3.0, 1.0]), jnp.array([3.0, 9.0]))
    assert jax.tree.map(jnp.mean, pairs).noise_scale == 3.0
    assert pairs.noise_scale.tolist() == [1.0, 9.0]


# Gradients, sampled: a normal law of known mean and independent entries.


def test_known_normal_gradients_within_four_standard_errors():
    """n = 4000 trajectories, 50 entries, seed 0; errors as the normal law has them."""
    n, rng = 4000, np.random.default_rng(0)
    mean, scale = rng.normal(size=50), rng.uniform(0.5, 3.0, 50)
    samples = (mean + scale * rng.standard_normal((n, 50))).astype(np.float32)
    norm_sq, trace = np.sum(mean**2), np.sum(scale**2)
    error_trace = np.sqrt(2 * np.sum(scale**4) / (n - 1))
    error_norm = np.sqrt(4 * mean**2 @ scale**2 / n + 2 * np.sum(scale**4) / n**2)

    moments = quick(moments_of)({"w": jnp.asarray(samples)})
    pair = diagnostics.noise_scale(moments)
    assert abs(pair.total_variance - trace) < 4 * error_trace
    assert abs(pair.gradient_norm_sq - norm_sq) < 4 * error_norm
    # A ratio's relative error is at most the sum of the relative errors.
    relative = 4 * (error_trace / trace + error_norm / norm_sq)
    assert relative < 0.2
    assert abs(pair.noise_scale * norm_sq / trace - 1.0) < relative
    snr = diagnostics.signal_to_noise(moments)
    assert abs(snr * trace / (n * norm_sq) - 1.0) < relative


def test_two_batches_agree_with_known_normal_gradients():
    """400 pairs of 10 and 100 trajectories, averaged; within 4 empirical errors."""
    rng = np.random.default_rng(1)
    mean, scale = rng.normal(size=20), rng.uniform(0.5, 3.0, 20)
    big = mean + scale * rng.standard_normal((400, 100, 20))
    norms = [np.sum(x.mean(1) ** 2, axis=1) for x in (big[:, :10], big)]
    as_float32 = [jnp.asarray(x.astype(np.float32)) for x in norms]
    pairs = diagnostics.two_batch_noise_scale(*as_float32, 10, 100)
    exact = np.sum(mean**2), np.sum(scale**2)
    for estimates, truth in zip(pairs, exact, strict=True):
        error = np.std(estimates) / np.sqrt(400)
        assert abs(np.mean(estimates) - truth) < 4 * error
    ratio = jax.tree.map(jnp.mean, pairs).noise_scale
    np.testing.assert_allclose(ratio, exact[1] / exact[0], rtol=0.1)


# Cosines.


def test_cosine_by_hand():
    # <(1, 2, 2), (2, 0, 0)> = 2; norms 3 and 2
    a = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(2.0)}
    b = {"w": jnp.array([2.0, 0.0]), "b": jnp.array(0.0)}
    np.testing.assert_allclose(diagnostics.cosine(a, b), 1 / 3, rtol=1e-6)
    assert diagnostics.cosine(a, jax.tree.map(lambda x: -x, a)) == -1.0


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_cosines_of_gradients_of_any_size(size):
    a = jnp.array([1.0, 1.0])
    cosine = diagnostics.cosine(size * a, jnp.array([size, 0.0]))
    np.testing.assert_allclose(cosine, np.sqrt(0.5), rtol=1e-6)


def test_cosine_with_nothing_is_nothing():
    a, zero = jnp.ones(3), jnp.zeros(3)
    assert diagnostics.cosine(a, zero) == diagnostics.cosine(zero, zero) == 0.0


# KL estimators.

MU, PI = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.3, 0.3, 0.3, 0.1])


def expected_kls(mu, pi, batch):
    """Means of k1, k2, k3 over every batch of actions of mu, at one time step."""
    index = np.array(list(itertools.product(range(len(mu)), repeat=batch)))
    log_rhos = jnp.asarray(np.log(pi / mu)[index])[..., None]
    mask = jnp.ones((batch, 1), bool)
    of_batch = quick(jax.vmap(lambda x: drift.kl_estimators(x, mask)[:3]))
    means = np.asarray(jnp.stack(of_batch(log_rhos)))[..., 0]
    return means @ mu[index].prod(axis=1)


def kl(mu, pi):
    return mu @ np.log(mu / pi)


@pytest.mark.parametrize("batch", [1, 3])
def test_expected_kl_estimators(float64, batch):
    k1, k2, k3 = expected_kls(MU, PI, batch)
    exact = kl(MU, PI)
    np.testing.assert_allclose([k1, k3], exact, rtol=1e-10)
    assert abs(k2 / exact - 1.0) > 0.01
    assert abs(kl(PI, MU) / exact - 1.0) > 0.01  # the directions can be told apart


def test_k2_errs_by_the_third_order(float64):
    """Half the distance: the KL falls by 4, the error of k2 by 8."""

    def error(size):
        pi = MU + size * np.array([0.05, -0.02, -0.02, -0.01])
        exact = kl(MU, pi)
        return exact, expected_kls(MU, pi, 1)[1] - exact

    (far_kl, far), (near_kl, near) = error(0.02), error(0.01)
    np.testing.assert_allclose([far_kl / near_kl, far / near], [4.0, 8.0], rtol=0.02)
    assert abs(near) < 0.01 * near_kl


def test_kl_estimators_by_hand_with_a_mask():
    # t = 0: log rho of 1 and -1; t = 1: only 0.5 is alive; t = 2: nothing is
    nan = jnp.nan
    log_rhos = jnp.array([[1.0, 0.5, nan], [-1.0, nan, nan]])
    estimates = drift.kl_estimators(log_rhos, ~jnp.isnan(log_rhos))
    assert estimates.num_alive.tolist() == [2, 1, 0]
    np.testing.assert_allclose(estimates.k1, [0.0, -0.5, 0.0])
    np.testing.assert_allclose(estimates.k2, [0.5, 0.125, 0.0])
    # (e - 2 + 1/e) / 2 = cosh(1) - 1; e^0.5 - 1.5
    k3 = [np.cosh(1.0) - 1.0, np.exp(0.5) - 1.5, 0.0]
    np.testing.assert_allclose(estimates.k3, k3, rtol=1e-6)
    pooled = estimates.pooled
    assert int(pooled.num_alive) == 3
    expected = [-0.5 / 3, 1.125 / 3, (2 * k3[0] + k3[1]) / 3]
    np.testing.assert_allclose(jnp.stack(pooled[:3]), expected, rtol=1e-6)


def test_k3_keeps_its_digits_and_its_sign_near_zero():
    log_rhos = jnp.array([[1e-3, -1e-3, 3e-5, -3e-5, 0.0]])
    k3 = drift.kl_estimators(log_rhos, jnp.ones((1, 5), bool)).k3
    exact = np.array([5e-7, 5e-7, 4.5e-10, 4.5e-10, 0.0])
    assert (k3 >= 0.0).all()
    np.testing.assert_allclose(k3, exact, rtol=1e-3, atol=5e-12)


# Ratios.


def test_ratio_diagnostics_by_hand_with_a_mask():
    # t = 0: weights 1, 3, 4; t = 1: only 5; t = 2: nothing
    weights = jnp.array([[1.0, 5.0, 9.0], [3.0, 9.0, 9.0], [4.0, 9.0, 9.0]])
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [1, 0, 0]], bool)
    found = drift.ratio_diagnostics(jnp.log(weights), mask)
    assert found.num_alive.tolist() == [3, 1, 0]
    close = {"rtol": 1e-6}
    np.testing.assert_allclose(found.ess, [64 / 26, 1.0, 0.0], **close)
    np.testing.assert_allclose(found.max_share, [0.5, 1.0, 0.0], **close)
    np.testing.assert_allclose(found.max_weight, [4.0, 5.0, 0.0], **close)
    np.testing.assert_allclose(found.mean_ratio, [8 / 3, 5.0, 0.0], **close)
    spread = np.std(np.log([1.0, 3.0, 4.0]))
    np.testing.assert_allclose(found.log_weight_std, [spread, 0.0, 0.0], **close)


EXTREMES = [-np.inf, -1e4, -50.0, 0.0, 0.3, 50.0, 1e4, np.inf]
B, T = 3, 4


@given(
    st.lists(st.sampled_from(EXTREMES), min_size=B * T, max_size=B * T),
    st.lists(st.booleans(), min_size=B * T, max_size=B * T),
)
@settings(max_examples=60, deadline=None)
def test_extreme_ratios_and_any_mask_stay_finite_and_in_range(values, mask):
    log_rhos = jnp.array(values, jnp.float32).reshape(B, T)
    mask = np.array(mask).reshape(B, T)
    found = all_of_ratios(jnp.where(mask, log_rhos, jnp.nan), mask)
    ratios, kls, pooled = jax.tree.map(np.asarray, found)
    for x in jax.tree.leaves((ratios, kls, pooled)):
        assert np.isfinite(x).all()
    n = mask.sum(0)
    np.testing.assert_array_equal(ratios.num_alive, n)
    alive = n > 0
    slack = 1e-5
    assert (ratios.ess[alive] >= 1 - slack).all() and (ratios.ess <= n + slack).all()
    assert (ratios.max_share[alive] * n[alive] >= 1 - slack).all()
    assert (ratios.max_share <= 1).all() and (kls.k3 >= 0).all() and (kls.k2 >= 0).all()
    for x in (*ratios, *kls):
        assert (x[~alive] == 0).all()


@quick
def all_of_ratios(log_rhos, mask):
    kls = drift.kl_estimators(log_rhos, mask)
    return drift.ratio_diagnostics(log_rhos, mask), kls, kls.pooled


def test_one_giant_among_dwarfs():
    log_weights = jnp.array([[1e4], [-1e4], [-1e4]])
    found = drift.ratio_diagnostics(log_weights, jnp.ones((3, 1), bool))
    assert (found.ess, found.max_share) == (1.0, 1.0)
    bound = np.exp(importance.MAX_LOG_WEIGHT)
    np.testing.assert_allclose(found.max_weight, bound, rtol=1e-5)
    np.testing.assert_allclose(found.mean_ratio, bound, rtol=1e-5)
    # deviations 2/3, -1/3, -1/3 of 2e4: sqrt((4 + 1 + 1) / 27) = sqrt(2) / 3
    spread = 2e4 * np.sqrt(2) / 3
    np.testing.assert_allclose(found.log_weight_std, spread, rtol=1e-6)


def test_what_is_small_everywhere_still_has_an_effective_size():
    """Sums over long episodes fall far below what exp can say; masks stay apart."""
    log_weights = jnp.array([[-3e5], [-3e5], [0.0]])
    mask = jnp.array([[True], [True], [False]])
    found = drift.ratio_diagnostics(log_weights, mask)
    assert (found.ess, found.max_share, found.mean_ratio) == (2.0, 0.5, 0.0)


def test_the_effective_sizes_of_both_rooms_agree():
    log_weights = jax.random.normal(jax.random.key(0), (7, 3)) * 3.0
    found = drift.ratio_diagnostics(log_weights, jnp.ones((7, 3), bool))
    single = jax.vmap(importance.effective_sample_size, in_axes=1)(log_weights)
    np.testing.assert_allclose(found.ess, single, rtol=1e-5)


# Explained variance.


def test_explained_variance_by_hand():
    # targets 0, 2, 4: variance 8/3; residuals 0, 1, -1: 2/3; the fourth is masked
    targets = jnp.array([[0.0, 2.0], [4.0, 100.0]])
    predictions = jnp.array([[0.0, 1.0], [5.0, jnp.nan]])
    mask = jnp.array([[True, True], [True, False]])
    value = quick(diagnostics.explained_variance)(predictions, targets, mask)
    np.testing.assert_allclose(value, 0.75, rtol=1e-6)


@pytest.mark.parametrize("number", [1, 3, 100])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_constant_targets_have_nothing_to_explain(number, value):
    targets = jnp.full((number,), value)
    noise = jax.random.normal(jax.random.key(0), (number,))
    value = quick(diagnostics.explained_variance)(noise, targets, noise == noise)
    assert value == 0.0


def test_nothing_to_explain_at_all():
    x = jnp.ones(3)
    assert diagnostics.explained_variance(x, x, jnp.zeros(3, bool)) == 0.0


def test_a_constant_explains_nothing_and_a_wrong_sign_less():
    targets, mask = jnp.array([-1.0, 1.0]), jnp.ones(2, bool)
    assert diagnostics.explained_variance(jnp.full(2, 7.0), targets, mask) == 0.0
    assert diagnostics.explained_variance(-targets, targets, mask) == -3.0  # 1 - 4


# Refused.

PAIR = (jnp.array(1.0), jnp.array(1.0))


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("two_batch_noise_scale", (*PAIR, 4, 4), "batch_big is 4, needs"),
        ("two_batch_noise_scale", (*PAIR, 0, 4), "batch_small is 0, needs"),
        ("kl_estimators", (jnp.zeros(3), jnp.ones(3, bool)), "log_rhos has shape"),
        ("kl_estimators", (jnp.zeros((2, 3)), jnp.ones((3, 2), bool)), "mask has"),
        ("ratio_diagnostics", (jnp.zeros(3), jnp.ones(3, bool)), "log_weights has"),
        ("cosine", (jnp.zeros(3), jnp.zeros(2)), "tree_b has shape"),
        ("explained_variance", (jnp.zeros(3), jnp.zeros(2), jnp.zeros(3)), "targets"),
    ],
)
def test_wrong_input_is_refused(function, arguments, words):
    with pytest.raises(ValueError, match=words):
        room = drift if hasattr(drift, function) else diagnostics
        inspect.unwrap(getattr(room, function))(*arguments)
