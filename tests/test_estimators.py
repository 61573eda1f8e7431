"""Estimators by name: what they are made of, what they refuse, and how parts agree.

Their means are in the oracle's table (test_unbiased.py), their streams in
test_streams.py.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.baselines import constant_baseline
from jaxpg.chunks import Chunks
from jaxpg.credit import RATIOS, CreditConfig
from jaxpg.envs.tabular import canonical_mdp, tabular_environment
from jaxpg.estimators import (
    BASELINES,
    PER_PARAMETER,
    EstimatorConfig,
    estimate_credit,
    estimate_gradient,
    estimate_terms,
    estimate_weights,
    make_baseline,
    make_estimator,
    summarize_batch,
)
from jaxpg.gradients import score_gradient, score_gradients
from jaxpg.policies import log_prob_fn, tabular_policy
from jaxpg.rollout import rollout_episodes

MDP = canonical_mdp()
ENV = tabular_environment(MDP)
POLICY = tabular_policy(ENV.observation_space, ENV.action_space)
NUMBER = 10
SEES_OBSERVATIONS = ("linear", "linear-folds", "linear-plain", "value-network")


def quick(function, *arguments):
    """`jit` for programs that run once: compiling them costs more than running."""
    compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return compiled(*arguments)


def estimator(baseline="time-dependent", standardize=False, own=None, **credit):
    config = EstimatorConfig(
        baseline=baseline, standardize=standardize, credit=CreditConfig(**credit)
    )
    return make_estimator(
        config,
        POLICY,
        MDP.horizon,
        observation_space=ENV.observation_space,
        baseline=own,
    )


def params_of(seed=1):
    return POLICY.init(jax.random.key(seed), jnp.array(0, jnp.int32))


def state_of(which):
    return which.baseline.init(jax.random.key(0), jnp.array(0, jnp.int32))


@functools.cache
def batch(acting=1, num_slots=None):
    """Episodes of the mine in double precision, whatever the test's own."""

    def roll():
        ids = jnp.arange(NUMBER, dtype=jnp.int32)
        key, params = jax.random.key(0), params_of(acting)
        return rollout_episodes(ENV, POLICY, params, key, ids, num_slots=num_slots)

    with jax.enable_x64(True):
        return quick(roll)


def close(one, other, rtol=1e-10, atol=1e-12):
    chex.assert_trees_all_close(one, other, rtol=rtol, atol=atol)


def mean(terms):
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), terms)


# What they are made of.

ONE_IS_ENOUGH = {
    "time-dependent-plain",
    "batch-mean",
    "none",
    "optimal-plain",
    "optimal-time-plain",
    "optimal-termwise-plain",
    "peters-schaal-plain",
    "per-parameter-plain",
    "linear",
    "linear-plain",
    "value-network",
}
NEEDS_NO_BATCH = {"none", "linear", "value-network"}
NEEDS_SCORES = {
    name
    for name in BASELINES
    if name.startswith(("optimal", "peters-schaal", "per-parameter"))
}


@pytest.mark.parametrize("name", BASELINES)
def test_each_name_says_what_it_needs(name):
    which = estimator(name)
    assert which.min_trajectories == (1 if name in ONE_IS_ENOUGH else 2)
    assert which.needs_batch == (name not in NEEDS_NO_BATCH)
    assert which.needs_scores == (name in NEEDS_SCORES)
    assert which.is_per_parameter == (name in PER_PARAMETER)
    assert which.cut_rows, "a memoryless policy's rows may be cut"


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.thinned(3)
def test_what_needs_no_batch_has_no_summary(name, float64):
    which, rows = estimator(name), batch()
    summary = jax.eval_shape(lambda p: summarize_batch(which, p, rows), params_of())
    assert bool(jax.tree.leaves(summary)) == which.needs_batch


def test_rows_of_a_recurrent_policy_are_not_cut():
    recurrent = POLICY._replace(is_recurrent=True)
    which = make_estimator(EstimatorConfig(baseline="none"), recurrent, 3)
    assert not which.cut_rows


def test_a_baseline_of_ones_own_takes_the_names_place(float64):
    own = constant_baseline(0.25)
    for name in ("time-dependent", "linear", "per-parameter"):
        config = EstimatorConfig(baseline=name)
        which = make_estimator(config, POLICY, MDP.horizon, baseline=own)
        assert which.baseline is own and not which.is_per_parameter
        assert which.min_trajectories == 1 and not which.needs_scores
    rows = batch()
    plain, shifted = (
        quick(lambda r, w=w: estimate_weights(w, None, (), r), rows)
        for w in (estimator("none"), estimator(own=own))
    )
    np.testing.assert_allclose(
        shifted, np.where(rows.mask, plain - 0.25, 0.0), rtol=1e-12
    )


# What they refuse.


def put(config, **changes):
    """Past the tests' type checker, which would refuse names before we do."""
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    config.__post_init__()


def test_an_unknown_baseline_is_refused_with_the_nearest():
    words = "baseline is 'leave-one', unknown; did you mean 'leave-one-out'"
    with pytest.raises(ValueError, match=words):
        put(EstimatorConfig(), baseline="leave-one")
    with pytest.raises(ValueError, match=words):
        make_baseline("leave-one", POLICY, 3)


@pytest.mark.parametrize("name", PER_PARAMETER)
def test_per_parameter_baselines_make_no_weights(name, float64):
    with pytest.raises(ValueError, match=f"baseline is '{name}', unknown"):
        make_baseline(name, POLICY, 3)
    with pytest.raises(ValueError, match=f"standardize is set.*'{name}'.*leave it out"):
        EstimatorConfig(baseline=name, standardize=True)
    words = f"^baseline is '{name}', which makes no weights.*estimate_gradient or"
    with pytest.raises(ValueError, match=words):
        estimate_weights(estimator(name), params_of(), (), batch())


@pytest.mark.parametrize("name", SEES_OBSERVATIONS)
def test_a_missing_observation_space_is_refused(name):
    words = f"^baseline is '{name}', which sees observations, but observation_space is"
    with pytest.raises(ValueError, match=words + " None; give the environment's"):
        make_estimator(EstimatorConfig(baseline=name), POLICY, 3)


@pytest.mark.parametrize("name", ["time-dependent", "optimal-time", "linear"])
def test_wrong_max_steps_are_refused(name):
    with pytest.raises(ValueError, match="max_steps is 0, needs a whole number"):
        make_baseline(name, POLICY, 0, observation_space=ENV.observation_space)


# How the parts agree.

REPRESENTATIVE = [
    *({"baseline": name} for name in BASELINES),
    {"baseline": "none", "credit": "total-return", "discount": 0.5},
    {"baseline": "leave-one-out", "discount": 0.5, "keep_leading_discount": True},
    {"baseline": "time-dependent", "standardize": True},
    {"baseline": "time-dependent", "ratio": "causal"},
    {"baseline": "per-parameter", "ratio": "whole"},
    {"baseline": "optimal", "ratio": "first-order", "self_normalize": True},
    {"baseline": "leave-one-out", "ratio": "past-dropped", "max_rho": 2.0},
]


@functools.cache
def both_forms():
    """Terms and gradient of each, off policy, in one program."""

    def all_of_them(params, rows):
        return [
            (
                estimate_terms(which, params, state_of(which), rows),
                estimate_gradient(which, params, state_of(which), rows),
            )
            for which in (estimator(**settings) for settings in REPRESENTATIVE)
        ]

    return quick(all_of_them, params_of(), batch(acting=2))


@pytest.mark.parametrize("index", range(len(REPRESENTATIVE)))
@pytest.mark.thinned(9)
def test_the_mean_of_the_terms_is_the_gradient(index, float64):
    terms, gradient = both_forms()[index]
    assert {x.shape[0] for x in jax.tree.leaves(terms)} == {NUMBER}
    close(mean(terms), gradient)
    assert np.abs(gradient["network"]).max() > 1e-3


def test_names_mean_different_estimators(float64):
    flat = [np.ravel(gradient["network"]) for _, gradient in both_forms()]
    distance = np.linalg.norm(np.array(flat)[:, None] - np.array(flat)[None], axis=-1)
    same = np.argwhere(np.triu(distance < 1e-9, 1)).tolist()
    # What is fitted on earlier batches is 0 before the first, as none is.
    names = {REPRESENTATIVE[i]["baseline"] for pair in same for i in pair}
    assert names == NEEDS_NO_BATCH


@pytest.mark.parametrize("name", ["leave-one-out", "per-parameter"])
def test_the_number_of_trajectories_is_what_the_sum_is_divided_by(name, float64):
    which, rows = estimator(name), batch()

    def three(params, n):
        return [
            estimate_gradient(which, params, (), rows, num_trajectories=count)
            for count in (None, 4, n)
        ]

    counted, given, traced = quick(three, params_of(), jnp.array(5))
    close(given, jax.tree.map(lambda x: x * NUMBER / 4.0, counted))
    close(traced, jax.tree.map(lambda x: x * NUMBER / 5.0, counted))


@pytest.mark.parametrize("name", ["time-dependent", "per-parameter"])
def test_empty_rows_are_not_counted(name, float64):
    which, rows = estimator(name), batch()
    more = jax.tree.map(lambda x: jnp.concatenate([x, x[:3]]), rows)
    more = more._replace(mask=more.mask.at[NUMBER:].set(False))
    gradient = functools.partial(estimate_gradient, which, params_of(), ())
    close(quick(gradient, more), quick(gradient, rows))


def test_packed_rows_have_the_same_gradient(float64):
    which = estimator("time-dependent", discount=0.5)
    gradient = functools.partial(estimate_gradient, which, params_of(), ())
    packed = batch(num_slots=3)
    assert packed.mask.shape[0] == 3
    close(quick(gradient, packed), quick(gradient, batch()))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_chunks_do_not_change_the_gradient(size, float64):
    which, rows = estimator("time-dependent"), batch()
    whole, cut = (
        quick(
            lambda p, chunks=chunks: estimate_gradient(
                which, p, (), rows, chunks=chunks
            ),
            params_of(),
        )
        for chunks in (Chunks(), Chunks(size))
    )
    close(cut, whole)


@pytest.mark.parametrize("name", ["time-dependent", "optimal", "per-parameter"])
def test_a_part_is_weighed_with_the_whole_batchs_summary(name, float64):
    which, rows, half = estimator(name), batch(), slice(0, NUMBER // 2)
    some = jax.tree.map(lambda x: x[half], rows)

    def terms(params):
        summary = summarize_batch(which, params, rows)
        return (
            estimate_terms(which, params, (), some, summary=summary),
            estimate_terms(which, params, (), rows),
            estimate_terms(which, params, (), some),
        )

    part, whole, alone = quick(terms, params_of())
    close(part, jax.tree.map(lambda x: x[half], whole))
    assert not np.allclose(part["network"], alone["network"])


@pytest.mark.parametrize("num_slots", [None, 3])
def test_standardised_weights_have_mean_zero_and_deviation_one(num_slots, float64):
    rows = batch(num_slots=num_slots)
    plain, standard = (
        np.asarray(
            quick(
                lambda r, flag=flag: estimate_weights(
                    estimator("leave-one-out", flag), None, (), r
                ),
                rows,
            )
        )
        for flag in (False, True)
    )
    mask = np.asarray(rows.mask)
    assert (standard[~mask] == 0.0).all() and not mask.all()
    np.testing.assert_allclose(standard[mask].mean(), 0.0, atol=1e-12)
    np.testing.assert_allclose(standard[mask].std(), 1.0, rtol=1e-12)
    expected = (plain[mask] - plain[mask].mean()) / plain[mask].std()
    np.testing.assert_allclose(standard[mask], expected, rtol=1e-10)


# Ratios.


@functools.cache
def credits(acting):
    """Credit of every ratio of params 1 over whoever acted."""
    fn = jax.vmap(log_prob_fn(POLICY), (None, 0))

    def all_of_them(params, acted, rows):
        rows = rows._replace(log_prob=fn(acted, rows))
        return [
            estimate_credit(estimator("none", ratio=ratio), params, rows)
            for ratio in RATIOS
        ]

    given = quick(all_of_them, params_of(), params_of(acting), batch())
    return dict(zip(RATIOS, given, strict=True))


@pytest.mark.parametrize("ratio", RATIOS)
def test_on_policy_every_ratio_is_exactly_one(ratio, float64):
    rows, given = batch(), credits(acting=1)
    np.testing.assert_array_equal(given[ratio].reach, np.where(rows.mask, 1.0, 0.0))
    np.testing.assert_allclose(given[ratio].value, given["none"].value, rtol=1e-12)


def test_off_policy_the_ratio_is_that_of_params_over_who_acted(float64):
    rows, given = batch(), credits(acting=2)["first-order"]
    tables = (params_of(seed)["network"] for seed in (1, 2))
    ours, theirs = (
        np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
        for x in map(np.asarray, tables)
    )
    expected = (ours / theirs)[np.asarray(rows.obs), np.asarray(rows.action)]
    mask = np.asarray(rows.mask)
    np.testing.assert_allclose(given.reach[mask], expected[mask], rtol=1e-10)
    assert np.ptp(expected[mask]) > 0.1


def test_weights_are_constants_for_differentiation(float64):
    which = estimator("time-dependent", ratio="causal")

    def total(params):
        credit = estimate_credit(which, params, rows)
        weights = estimate_weights(which, params, (), rows)
        return jnp.sum(weights) + jnp.sum(credit.value) + jnp.sum(credit.reach)

    rows = batch(acting=2)
    slopes = quick(jax.grad(total), params_of())
    np.testing.assert_array_equal(slopes["network"], 0.0)


# Many weightings of the same rows.

K, B, T = 3, 4, 6


def gaussian(params, row):
    """Two parameters; the scores are u (x - a - u b) and (x - a)."""
    residual = row["x"] - params["a"] - row["u"] * params["b"]
    return -0.5 * residual**2


def gaussian_batch():
    x, u = jax.random.normal(jax.random.key(0), (2, B, T))
    weights = jax.random.normal(jax.random.key(1), (K, B, T))
    # One decision that a single weighting counts, one that none does, an empty row.
    weights = weights.at[1:, 0, 2].set(0.0).at[:, 1, 3].set(0.0).at[:, 2].set(0.0)
    weights = weights.at[2].set(0.0).at[2, 3, 5].set(1.0)
    return {"a": jnp.array(0.3), "b": jnp.array(-0.2)}, {"x": x, "u": u}, weights


def by_hand(params, rows, weights, count):
    residual = rows["x"] - params["a"] - rows["u"] * params["b"]
    a, b = (
        np.einsum("kbt,bt->k", weights, score) / count
        for score in (residual, rows["u"] * residual)
    )
    return {"a": a, "b": b}


def test_each_weighting_has_its_score_gradient(float64):
    params, rows, weights = gaussian_batch()
    together = quick(lambda: score_gradients(gaussian, params, rows, weights))
    close(together, by_hand(params, rows, weights, B))
    for k in range(K):
        alone = quick(lambda k=k: score_gradient(gaussian, params, rows, weights[k]))
        close(jax.tree.map(lambda x, k=k: x[k], together), alone)


@pytest.mark.parametrize("count", [7, "traced"])
def test_gradients_are_divided_by_the_number_of_trajectories(count, float64):
    params, rows, weights = gaussian_batch()
    given = quick(
        lambda n: score_gradients(
            gaussian,
            params,
            rows,
            weights,
            num_trajectories=n if count == "traced" else count,
        ),
        jnp.array(7),
    )
    close(given, by_hand(params, rows, weights, 7))


@pytest.mark.parametrize("cut_rows", [False, True])
def test_gradients_of_every_chunk_size_are_the_whole(cut_rows, float64):
    params, rows, weights = gaussian_batch()
    sizes = [1, 2, 4, 5, 6, 7, 12, 13, 18, 23, 24, 100]

    def every_size(weights):
        return [
            score_gradients(
                gaussian, params, rows, weights, chunks=Chunks(size, cut_rows)
            )
            for size in sizes
        ]

    for given in quick(every_size, weights):
        close(given, by_hand(params, rows, weights, B))


def test_gradients_of_a_real_policy_and_one_weighting(float64):
    rows, fn = batch(), log_prob_fn(POLICY)
    weights = quick(lambda r: estimate_weights(estimator(), None, (), r), rows)
    together, alone = quick(
        lambda p, w: (
            score_gradients(fn, p, rows, w[None]),
            score_gradient(fn, p, rows, w),
        ),
        params_of(),
        weights,
    )
    close(jax.tree.map(lambda x: x[0], together), alone)


def test_a_weight_of_zero_hides_an_infinite_log_prob():
    def fn(mean, x):  # as of an action that is impossible
        return jnp.where(x < 0.0, -jnp.inf, -0.5 * (x - mean) ** 2)

    x = jnp.array([[1.0, -1.0], [3.0, 4.0]])
    weights = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])
    # debug_nans: 0 * -inf must not even pass by.
    with jax.debug_nans(True):
        for chunks in (Chunks(), Chunks(1, cut_rows=True)):
            given = score_gradients(fn, jnp.array(0.0), x, weights, chunks=chunks)
            np.testing.assert_allclose(given, [(1.0 + 3.0) / 2, 2.0 * 4.0 / 2])


def test_the_weightings_carry_no_derivative(float64):
    params, rows, weights = gaussian_batch()
    slope = quick(
        jax.grad(lambda w: jnp.sum(score_gradients(gaussian, params, rows, w)["a"])),
        weights,
    )
    np.testing.assert_array_equal(slope, 0.0)


def test_the_forward_pass_is_one_for_all_weightings():
    params, rows, weights = gaussian_batch()

    def calls(number):
        seen = []

        def counting(params, row):
            seen.append(1)
            return jnp.exp(gaussian(params, row))

        text = jax.jit(lambda w: score_gradients(counting, params, rows, w)).lower(
            weights[:number]
        )
        return len(seen), text.as_text().count("stablehlo.exponential")

    assert calls(1) == calls(K) == (1, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda fn, x, w: (fn, x, w[0]),
            r"weights has shape \(4, 6\), needs \(K, B",
        ),
        (lambda fn, x, w: (fn, x[:3], w), r"rows have a leaf of shape \(3, 6\).*B = 4"),
        (
            lambda fn, x, w: (lambda m, r: fn(m, r)[:, None], x, w),
            r"weights have shape \(4, 6\), but log_prob_fn gives \(4, 6, 1\)",
        ),
    ],
)
def test_wrong_weightings_are_refused(change, words):
    call = inspect.unwrap(score_gradients)  # without the tests' shape checker

    def fn(mean, x):
        return -0.5 * (x - mean) ** 2

    fn, x, weights = change(fn, jnp.ones((B, T)), jnp.ones((K, B, T)))
    with pytest.raises(ValueError, match=words):
        call(fn, jnp.array(0.0), x, weights)
    with pytest.raises(ValueError, match="chunk size is 0, needs a whole number"):
        call(
            lambda m, r: -0.5 * (r - m) ** 2,
            jnp.array(0.0),
            jnp.ones((B, T)),
            jnp.ones((K, B, T)),
            chunks=Chunks(0),
        )
