"""The study says what the oracle says, and known covariances come back."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpg.credit import RATIOS
from jaxpg.envs.tabular import canonical_mdp, tabular_environment
from jaxpg.estimators import BASELINES
from jaxpg.study.laws import (
    Law,
    exact_leave_one_out_law,
    exact_term_law,
    fit_law,
    fit_slope,
    has_independent_terms,
    pooled_errors,
)
from jaxpg.study.measure import Contender, make_contenders, measure_batches
from jaxpg.study.naming import parse_estimator
from jaxpg.study.sampling import Sampler
from jaxpg.study.statistics import (
    compare_bias,
    compare_variance,
    exact_reference,
    sampled_reference,
    summarize,
)
from jaxpg.study.subjects import Subject
from jaxpg.train.sharding import place

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
oracle_table = importlib.import_module("oracle_table")
timing = importlib.import_module("timing")

ROWS = [
    row
    for row in oracle_table.TABLE
    if not dict(row.settings).get("discount")
    and row.baseline not in ("constant", "value")
    if row.ratio == "none" or row.baseline == "none"
    if row.credit == "reward-to-go"
]
STORED = {row["name"]: row for row in timing.load("oracle-table")["rows"]}
PAIRS = 2048
KEY = jax.random.key(5)


def world():
    return oracle_table.world_of(canonical_mdp())


def subject():
    mdp, policy, target, behaviour = world()
    return Subject(tabular_environment(mdp), policy, target, behaviour, mdp, "the mine")


def sampler(of, acting, chunk_size, placement=None):
    return Sampler(of, acting, KEY, chunk_size, placement or place(1), 2**28)


@pytest.fixture(scope="module")
def measured():
    """Every estimator of the table on the same pairs of trajectories, and the truth."""
    with jax.enable_x64(True):
        mine, found = subject(), {}
        truth = exact_reference(oracle_table.flat(oracle_table.target_of(world(), 1.0)))
        for off in (False, True):
            rows = [row for row in ROWS if (row.ratio != "none") == off]
            contenders = [
                Contender(row.name, *oracle_table.estimator_of(world(), row))
                for row in rows
            ]
            acting = mine.behaviour if off else mine.params
            chunks = sampler(mine, acting, PAIRS)
            found |= measure_batches(
                contenders, mine, chunks, place(1), 2, PAIRS
            ).gradients
        return found, truth


def test_every_estimator_is_measured():
    assert {row.baseline for row in ROWS} == set(BASELINES)
    assert {row.ratio for row in ROWS} == set(RATIOS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bias_and_variance_are_the_oracles(row, measured):
    gradients, truth = measured
    mine = gradients[row.name]
    assert mine.shape == (PAIRS, 6)
    cell = summarize(mine, 2, truth, {"all": slice(0, 6)})
    stored = STORED[row.name]
    off = 2.0 * cell["variance"] - stored["variance"]
    assert abs(off) < 4.0 * 2.0 * cell["variance_error"]
    off = cell["bias_norm_sq"] - stored["bias"] ** 2
    assert abs(off) < 4.0 * cell["bias_norm_sq_error"]
    if row.claim == oracle_table.UNBIASED:
        assert abs(cell["bias"]) < 4.0 * cell["bias_error"]
        error, off = mine.std(0, ddof=1) / PAIRS**0.5, mine.mean(0) - truth.gradient
        assert (np.abs(off) <= 4.0 * error + 1e-12).all()


NAMED = ("reward-to-go/none", "reward-to-go/leave-one-out", "reward-to-go/batch-mean")


def contenders(names, of):
    return make_contenders(of, {name: parse_estimator(name) for name in names})


def laws(of):
    found = {}
    for each in contenders(
        (*NAMED, "total-return/none", "total-return/leave-one-out"), of
    ):
        alone = has_independent_terms(each.estimator.config)
        found[each.name] = (
            exact_term_law(of, each.estimator, each.state)
            if alone
            else exact_leave_one_out_law(of, each.estimator)
        )
    return found


def test_exact_laws_give_the_oracles_variance_of_pairs(float64):
    """a/N + c/(N(N-1)) at N = 2 against the enumeration of all pairs."""
    for name, law in laws(subject()).items():
        stored = STORED[", ".join([*name.split("/"), "none"])]["variance"]
        np.testing.assert_allclose(2.0 * law.variance(2), stored, rtol=1e-9)


def test_variance_falls_with_the_batch_as_theory_says(float64):
    mine, sizes = subject(), (4, 16, 64)
    chunks = sampler(mine, mine.params, 1024)
    truth = exact_reference(oracle_table.flat(oracle_table.target_of(world(), 1.0)))
    exact_laws, cells = laws(mine), {name: [] for name in NAMED}
    for size in sizes:
        found = measure_batches(
            contenders(NAMED, mine), mine, chunks, place(1), size, 256
        )
        for name in NAMED:
            cell = summarize(found.gradients[name], size, truth, {"all": slice(0, 6)})
            off = cell["variance"] - exact_laws[name].variance(size)
            assert abs(off) < 4.0 * cell["variance_error"]
            cells[name].append(cell)
    variances, errors, batches = (
        [cell[part] for cell in cells["reward-to-go/none"]]
        for part in ("variance", "variance_error", "batches")
    )
    slope = fit_slope(sizes, variances, pooled_errors(variances, errors, batches))
    assert abs(slope.value + 1.0) < 4.0 * slope.error < 0.3


@pytest.mark.exhaustive
def test_chunks_and_devices_do_not_change_a_gradient(float64):
    names = (
        "leave-one-out",
        "optimal-time",
        "per-parameter",
        "peters-schaal",
        "linear-folds",
        "total-return",
    )
    mine = subject()

    def gradients(chunk_size, placement):
        chunks = sampler(mine, mine.params, chunk_size, placement)
        found = measure_batches(contenders(names, mine), mine, chunks, placement, 16, 2)
        return found.gradients

    whole = gradients(16, place(1))
    for other in (gradients(8, place(1)), gradients(8, place(2))):
        for name in names:
            np.testing.assert_allclose(other[name], whole[name], rtol=1e-9, atol=1e-12)


# Synthetic gradients of known mean and covariance.

DIMENSIONS, BATCHES, SIZE = 12, 4000, 32
MEAN = np.linspace(-1.0, 1.0, DIMENSIONS)
SPREAD = np.linspace(0.5, 4.0, DIMENSIONS)
BLOCKS = {"first": slice(0, 5), "second": slice(5, DIMENSIONS)}


def synthetic(seed, batches=BATCHES, mean=MEAN):
    """Gradients of batches of SIZE trajectories, each of standard deviation SPREAD."""
    noise = np.random.default_rng(seed).normal(size=(batches, DIMENSIONS))
    return mean + noise * SPREAD / SIZE**0.5


def test_known_covariance_gives_known_statistics():
    cell = summarize(synthetic(0), SIZE, exact_reference(MEAN), BLOCKS)
    total, signal = (SPREAD**2).sum(), MEAN @ MEAN
    known = {
        "variance": total / SIZE,
        "noise_scale": total / signal,
        "snr": SIZE * signal / total,
        "bias": 0.0,
        "bias_norm_sq": 0.0,
        "error": total / SIZE / signal,
    }
    for name, value in known.items():
        assert abs(cell[name] - value) < 4.0 * cell[f"{name}_error"], name
    for name, block in BLOCKS.items():
        expected = (SPREAD[block] ** 2).sum() / SIZE
        np.testing.assert_allclose(cell["variance_by_block"][name], expected, rtol=0.1)
    assert cell["variance_low"] < cell["variance"] < cell["variance_high"]


def test_two_gradients_by_hand():
    """Mean 1, variance ((0 - 1)^2 + (2 - 1)^2) / 1 = 2; |G|^2 = 1."""
    gradients = np.array([[0.0, 3.0], [2.0, 3.0]])
    truth = exact_reference(np.array([1.0, 0.0]))
    cell = summarize(gradients, 8, truth, {"one": slice(0, 1), "other": slice(1, 2)})
    assert cell["variance"] == 2.0 and cell["noise_scale"] == 16.0
    assert cell["variance_by_block"] == {"one": 2.0, "other": 0.0}
    assert cell["bias"] == 0.0 and cell["bias_error"] == 1.0
    assert cell["bias_norm_sq"] == 9.0 - 1.0  # off by (0, 3), less V / K
    assert cell["snr"] == (10.0 - 1.0) / 2.0
    assert cell["error"] == 10.0  # (1 + 9 + 1 + 9) / 2
    np.testing.assert_allclose(cell["cosine"], 0.5 * 2 / 13**0.5)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    known = {"variance": (SPREAD**2).sum() / SIZE, "noise_scale": (SPREAD**2).sum()}
    known["noise_scale"] /= MEAN @ MEAN
    held = {name: 0 for name in known}
    for seed in range(100):
        cell = summarize(synthetic(seed, 40), SIZE, exact_reference(MEAN), BLOCKS)
        for name, value in known.items():
            held[name] += cell[f"{name}_low"] < value < cell[f"{name}_high"]
    # 95% is meant; 40 batches give a little less, 84 is 5 standard errors below.
    assert all(84 <= count for count in held.values())


def test_a_sampled_references_own_error_is_taken_off():
    few = [sampled_reference(synthetic(seed, 8), 8 * SIZE) for seed in range(200)]
    norms = np.array([reference.norm_sq for reference in few])
    # Left in, it would add tr / (8 N) = 0.29; 200 references know it to 0.05.
    assert abs(norms.mean() - MEAN @ MEAN) < 4.0 * norms.std() / 200**0.5 < 0.25
    reference = sampled_reference(synthetic(1, 32), 32 * SIZE)
    cell = summarize(synthetic(2), SIZE, reference, BLOCKS)
    assert abs(cell["bias"]) < 4.0 * cell["bias_error"]
    assert abs(cell["bias_norm_sq"]) < 4.0 * cell["bias_norm_sq_error"]
    shifted = summarize(synthetic(2, mean=1.5 * MEAN), SIZE, reference, BLOCKS)
    assert shifted["bias"] > 8.0 * shifted["bias_error"]


@pytest.mark.parametrize("mean", [0.0 * MEAN, 0.01 * MEAN])
def test_a_gradient_that_is_not_seen_gives_no_ratios(mean):
    reference = sampled_reference(synthetic(1, 8, mean), 8 * SIZE)
    assert not reference.is_seen
    for batches in (4, 40):
        gradients = synthetic(2, batches, mean)
        cell = summarize(gradients, SIZE, reference, BLOCKS)
        for name in ("bias", "bias_error", "bias_norm_sq", "noise_scale", "cosine"):
            assert cell[name] is None, name
        assert cell["variance"] > 0.0 and cell["snr"] is not None
        paired = compare_bias(gradients, [0.5 * gradients], reference)
        assert paired["paired_bias"] is None
    still = summarize(np.zeros((9, DIMENSIONS)), SIZE, exact_reference(mean), BLOCKS)
    assert still["variance"] == 0.0


def test_pairs_see_what_luck_hides():
    base = synthetic(3, 64)
    shrunk = base * (1.0 - 1.0 / 16)
    paired = compare_bias(shrunk, [synthetic(4, 64), base], exact_reference(MEAN))
    assert abs(paired["paired_bias"] + 1.0 / 16) < 4.0 * paired["paired_bias_error"]
    assert paired["paired_bias_error"] < 0.002
    ratio = compare_variance(shrunk, base)
    np.testing.assert_allclose(ratio["relative_variance"], (15 / 16) ** 2, rtol=1e-12)
    assert compare_bias(shrunk, [], exact_reference(MEAN))["paired_bias"] is None


def test_laws_are_fitted():
    sizes = [2, 4, 8, 16, 32]
    law = Law(3.0, 5.0)
    values = law.variance(sizes)
    fitted = fit_law(sizes, values, 0.1 * values)
    np.testing.assert_allclose(fitted[:2], law[:2], rtol=1e-9)
    assert law.critical_batch_size(1.0) == pytest.approx(
        next(n for n in np.arange(1.001, 20, 1e-4) if law.variance(n) <= 1.0), rel=1e-3
    )
    assert Law(3.0).critical_batch_size(-1.0) is None
    assert fit_slope([4], [1.0], [0.1]) is None


def test_lost_batches_are_counted():
    gradients = synthetic(5, 16)
    gradients[3, 0] = np.nan
    cell = summarize(gradients, SIZE, exact_reference(MEAN), BLOCKS)
    assert (cell["batches"], cell["non_finite_batches"]) == (15, 1)
    assert np.isfinite(cell["variance"])
    one = summarize(gradients[:1], SIZE, exact_reference(MEAN), BLOCKS)
    assert one["variance"] is None and one["variance_low"] is None
