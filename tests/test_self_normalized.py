"""Self-normalised weights by hand, at their extremes, and the objective they serve."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import credit, self_normalized
from jaxpg.credit import CreditConfig
from jaxpg.types import Trajectory

pytestmark = pytest.mark.usefixtures("float64")

# Jitted: every test runs one or two of these, and operation by operation takes longer.
self_normalize = jax.jit(self_normalized.self_normalize, static_argnames="over")
log_normalizers = jax.jit(self_normalized.log_normalizers, static_argnames="over")
regularized_objective = jax.jit(self_normalized.regularized_objective, static_argnums=2)
regularized_weights = jax.jit(self_normalized.regularized_weights, static_argnums=3)
credit_of = jax.jit(credit.credit_of, static_argnums=1)

# One trajectory of two decisions, one of three, and a fourth slot that nobody reaches:
#     A0 A1 -- --
#     B0 B1 B2 --
TIME = np.tile(np.arange(4), (2, 1))
MASK = TIME < np.array([[2], [3]])
ENDS = np.array([1, 2])[:, None] == TIME
WEIGHTS = np.array([[2.0, 6.0, 77.0, 77.0], [0.5, 2.0, 4.0, 77.0]])

# Means by time: (2 + 1/2)/2, (6 + 2)/2; then B's 4 alone or with the 6 that A keeps.
MEANS = {"all": [1.25, 4.0, 5.0, 5.0], "alive": [1.25, 4.0, 4.0, 1.0]}

# The same two in one row, and a row that is empty.
PACKED = {
    "log_weights": np.log([[2.0, 6.0, 0.5, 2.0, 4.0, 77.0], [77.0] * 6]),
    "time": np.array([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]),
    "mask": np.array([[1, 1, 1, 1, 1, 0], [0] * 6], bool),
    "ends": np.array([[0, 1, 0, 0, 1, 0], [0] * 6], bool),
}


def normalize(weights=WEIGHTS, mask=MASK, over="all", call=self_normalize):
    with np.errstate(divide="ignore"):
        logs = np.log(weights)
    return call(*map(jnp.asarray, (logs, TIME, mask, ENDS)), over=over)


@pytest.mark.parametrize("over", MEANS)
def test_normalisers_by_hand(over):
    logs = normalize(over=over, call=log_normalizers)
    np.testing.assert_allclose(jnp.exp(logs), MEANS[over], rtol=1e-12)


@pytest.mark.parametrize("over", MEANS)
def test_weights_are_divided_by_the_mean_at_their_time(over):
    given = normalize(over=over)
    expected = np.where(MASK, WEIGHTS / MEANS[over], 1.0)
    np.testing.assert_allclose(jnp.exp(given), expected, rtol=1e-12)
    np.testing.assert_array_equal(given[~MASK], 0.0)


@pytest.mark.parametrize("over", MEANS)
def test_packed_rows_are_one_per_row(over):
    apart = normalize(over=over)
    joined = self_normalize(*map(jnp.asarray, PACKED.values()), over=over)
    expected = np.concatenate([apart[0, :2], apart[1, :3]])
    np.testing.assert_allclose(joined[PACKED["mask"]], expected, rtol=1e-12)
    np.testing.assert_array_equal(joined[~PACKED["mask"]], 0.0)


def random_batch():
    """Logs that spread over hundreds, lengths 1 .. 6, and one row without an episode"""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 6, 3, 3, 0, 2, 5])[:, None]
    time = np.tile(np.arange(6), (7, 1))
    logs = rng.normal(size=(7, 6)) * 200.0
    return logs, time, time < lengths, time == lengths - 1


def test_alive_weights_have_mean_one_at_every_time():
    logs, time, mask, ends = map(jnp.asarray, random_batch())
    given = jnp.exp(self_normalize(logs, time, mask, ends, over="alive"))
    means = np.where(mask, given, 0.0).sum(axis=0) / np.asarray(mask).sum(axis=0)
    np.testing.assert_allclose(means, 1.0, rtol=1e-12)


def test_all_weights_have_mean_one_once_the_ended_count_with_their_last():
    logs, time, mask, ends = random_batch()
    batch = tuple(map(jnp.asarray, (logs, time, mask, ends)))
    means = np.asarray(log_normalizers(*batch, over="all"))
    lasts = np.maximum(mask.sum(axis=1, keepdims=True) - 1, 0)
    kept = np.where(mask, logs, np.take_along_axis(logs, lasts, axis=1))
    kept = kept[mask.any(axis=1)]
    np.testing.assert_allclose(np.exp(kept - means).mean(axis=0), 1.0, rtol=1e-12)
    given = self_normalize(*batch, over="all")
    np.testing.assert_allclose(given, np.where(mask, logs - means, 0.0), atol=1e-9)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("over", MEANS)
def test_extremes_in_one_batch_give_what_they_should(over, bits):
    # e^10000 and e^-10000 at once: the mean is half the larger, so 2 and 0; alone, 1.
    logs = np.array([[1e4, -1e4, 5.0, 5.0], [-1e4, -1e4, 1e4, 5.0]])
    with jax.enable_x64(bits == 64):
        given = self_normalize(*map(jnp.asarray, (logs, TIME, MASK, ENDS)), over=over)
    assert given.dtype == f"float{bits}"
    last = 2.0 if over == "all" else 1.0
    expected = [[2.0, 1.0, 1.0, 1.0], [0.0, 1.0, last, 1.0]]
    # A log of 10^4 has 10^4 units of rounding: 10^-3 in 32 bits.
    rounding = 2e4 * np.finfo(given.dtype).eps
    np.testing.assert_allclose(np.exp(given), expected, rtol=rounding)


@pytest.mark.parametrize("over", MEANS)
def test_infinite_logs_and_nan_in_empty_slots_do_no_harm(over):
    for empty in (np.nan, np.inf, 0.0):
        weights = np.where(MASK, WEIGHTS, empty)
        weights[0, 0], weights[1, 1] = 0.0, np.inf
        given = normalize(weights, over=over)
        assert not np.isnan(given).any()
        np.testing.assert_allclose(
            jnp.exp(given[:, :2]), [[0.0, 0.0], [2.0, 2.0]], atol=1e-12
        )


@pytest.mark.parametrize("over", MEANS)
def test_a_batch_without_a_decision_is_left_alone(over):
    nobody = np.zeros_like(MASK)
    np.testing.assert_array_equal(normalize(mask=nobody, over=over), 0.0)
    logs = normalize(mask=nobody, over=over, call=log_normalizers)
    np.testing.assert_array_equal(logs, 0.0)


# A factor that all weights share.

FORMS = ("whole", "causal", "future-dropped", "past-dropped-whole", "first-order")


def rows():
    reward = jnp.array([[1.0, -2.0, 9.0, 9.0], [4.0, 8.0, 0.5, 9.0]])
    no = jnp.zeros(MASK.shape, bool)
    zeros, time = jnp.zeros(MASK.shape), jnp.asarray(TIME)
    ends, mask = jnp.asarray(ENDS), jnp.asarray(MASK)
    return Trajectory(zeros, zeros, zeros, reward, ends, no, mask, time, time)


@pytest.mark.parametrize("ratio", FORMS)
@pytest.mark.thinned(2)
def test_a_common_factor_changes_nothing(ratio):
    log_rhos = jnp.asarray(np.log(WEIGHTS))
    scaled = log_rhos.at[:, 0].add(3.0)
    plain, normal = (
        CreditConfig(ratio=ratio, self_normalize=flag) for flag in (False, True)
    )
    before, after = (credit_of(rows(), normal, x) for x in (log_rhos, scaled))
    np.testing.assert_allclose(after.value, before.value, rtol=1e-12)
    np.testing.assert_allclose(after.reach, before.reach, rtol=1e-12)
    grown = credit_of(rows(), plain, scaled).reach
    assert grown[0, 0] > 20.0 * credit_of(rows(), plain, log_rhos).reach[0, 0]


# The regularised objective.

RHOS = np.array([[2.0, 3.0], [1.0, 0.5]])
REWARDS = np.array([[1.0, 2.0], [4.0, 8.0]])
BOTH = jnp.ones((2, 2), bool)


def test_regularised_objective_by_hand():
    # products (2, 6) and (1, 1/2): means 3/2 and 13/4
    # t = 0: (2 * 1 + 1 * 4) / 3 = 2;   t = 1: (6 * 2 + 8 / 2) / (13/2) = 32/13
    logs, rewards = jnp.log(jnp.asarray(RHOS)), jnp.asarray(REWARDS)
    plain = 2 + 32 / 13
    np.testing.assert_allclose(regularized_objective(logs, rewards), plain, rtol=1e-12)
    given = regularized_objective(logs, rewards, 0.7)
    expected = plain + 0.7 * (np.log(3 / 2) + np.log(13 / 4))
    np.testing.assert_allclose(given, expected, rtol=1e-12)


def test_regularised_weights_by_hand():
    # N dPhi / dlog rho = sum_{u >= t} w~[u] (r[u] - mean[u] + c),  w~ = w / mean w
    logs, rewards = jnp.log(jnp.asarray(RHOS)), jnp.asarray(REWARDS)
    shares = np.array([[2 / 1.5, 6 / 3.25], [1 / 1.5, 0.5 / 3.25]])
    slopes = shares * (REWARDS - [[2.0, 32 / 13]] + 0.7)
    expected = np.cumsum(slopes[:, ::-1], axis=1)[:, ::-1]
    given = regularized_weights(logs, rewards, BOTH, 0.7)
    np.testing.assert_allclose(given, expected, rtol=1e-12)


@pytest.mark.parametrize("coefficient", [0.0, 0.7])
def test_regularised_weights_against_finite_differences(coefficient):
    logs, _, mask, _ = random_batch()
    logs = np.where(mask, logs / 200.0, 0.0)
    rewards = np.where(mask, np.random.default_rng(1).normal(size=logs.shape), 0.0)
    objective = jax.jit(
        jax.vmap(lambda x: regularized_objective(x, jnp.asarray(rewards), coefficient))
    )
    nudges = 1e-6 * np.eye(logs.size).reshape(-1, *logs.shape)
    up, down = (objective(logs + sign * nudges) for sign in (1.0, -1.0))
    slopes = np.reshape((up - down) / 2e-6, logs.shape)
    given = regularized_weights(*map(jnp.asarray, (logs, rewards, mask)), coefficient)
    np.testing.assert_allclose(
        given / logs.shape[0], np.where(mask, slopes, 0.0), atol=1e-8
    )
    # An ended product counts on, but nobody decided there: the slope alone is not 0.
    assert np.abs(slopes[~mask]).max() > 0.01
    assert np.abs(slopes).max() > 0.1


def test_a_common_factor_moves_the_objective_by_its_coefficient_alone():
    logs, rewards = jnp.log(jnp.asarray(RHOS)), jnp.asarray(REWARDS)
    scaled = logs.at[:, 0].add(3.0)  # both products of both times are e^3 times larger
    for coefficient in (0.0, 0.7):
        before, after = (
            regularized_objective(x, rewards, coefficient) for x in (logs, scaled)
        )
        np.testing.assert_allclose(after - before, coefficient * 6.0, atol=1e-12)
        one, other = (
            regularized_weights(x, rewards, BOTH, coefficient) for x in (logs, scaled)
        )
        np.testing.assert_allclose(other, one, rtol=1e-12)


def test_rewards_carry_their_own_baseline():
    """Equal rewards at one time tell nobody apart: at coefficient 0 no weight."""
    logs = jnp.log(jnp.asarray(RHOS))
    given = regularized_weights(logs, jnp.full((2, 2), 5.0), BOTH)
    np.testing.assert_allclose(given, 0.0, atol=1e-14)


@pytest.mark.parametrize(
    "logs", [[[1e4, 1e4], [-1e4, -1e4]], [[np.inf, 0.0], [-np.inf, 0.0]]]
)
@pytest.mark.parametrize("bits", [32, 64])
def test_regularised_extremes_are_finite(logs, bits):
    with jax.enable_x64(bits == 64):
        arrays = jnp.asarray(logs, float), jnp.asarray(REWARDS)
        # The heavier has all the weight: 1 and 2. A ratio counts as exp(1e4) at most.
        np.testing.assert_allclose(regularized_objective(*arrays), 3.0, rtol=1e-6)
        log_means = np.cumsum(np.clip(logs[0], -1e4, 1e4)) - np.log(2.0)
        given = regularized_objective(*arrays, 0.5)
        np.testing.assert_allclose(given, 3.0 + 0.5 * log_means.sum(), rtol=1e-6)
        # N * coefficient for this and every later time step, to the heavier alone.
        given = regularized_weights(*arrays, BOTH, 0.5)
        np.testing.assert_allclose(given, [[2.0, 1.0], [0.0, 0.0]], atol=1e-6)


def test_the_log_normaliser_pulls_where_every_sample_is_unlikely():
    log_rhos = jnp.full((2, 200), -0.5).at[1].set(-0.4)
    every = jnp.ones((2, 200), bool)
    weights = regularized_weights(log_rhos, jnp.zeros((2, 200)), every, 1.0)
    # The log-means' shares sum to 1, so their slopes do to the steps that are left.
    np.testing.assert_allclose(weights.sum(axis=0), 2.0 * np.arange(200, 0, -1), 1e-4)


def test_weights_are_numbers():
    slope = jax.grad(
        lambda x: jnp.sum(regularized_weights(x, jnp.asarray(REWARDS), BOTH))
    )
    np.testing.assert_array_equal(slope(jnp.log(jnp.asarray(RHOS))), 0.0)


# What is refused.

YES, ZEROS = np.ones((2, 3), bool), np.zeros((2, 3))
STEPS = np.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "words"),
    [
        (
            "self_normalize",
            (ZEROS, STEPS, YES, YES),
            {"over": "alife"},
            "over is 'alife', unknown; did you mean 'alive'",
        ),
        (
            "log_normalizers",
            (ZEROS, STEPS, YES, YES),
            {"over": "everyone"},
            "over is 'everyone', unknown; choose one of all, alive",
        ),
        (
            "self_normalize",
            (ZEROS[0], STEPS[0], YES[0], YES[0]),
            {"over": "all"},
            r"log_weights has shape \(3,\), needs .*for one row use \[None\]",
        ),
        (
            "self_normalize",
            (ZEROS, STEPS[:, :2], YES, YES),
            {"over": "all"},
            r"time has shape \(2, 2\), but log_weights has shape \(2, 3\)",
        ),
        (
            "self_normalize",
            (ZEROS, STEPS, YES, YES[:1]),
            {"over": "all"},
            r"ends has shape \(1, 3\)",
        ),
        (
            "regularized_objective",
            (ZEROS[0], ZEROS[0]),
            {},
            r"log_rhos has shape \(3,\), needs .*for one row use \[None\]",
        ),
        (
            "regularized_weights",
            (ZEROS, ZEROS[:, :2], YES),
            {},
            r"rewards has shape \(2, 2\), but log_rhos has shape \(2, 3\)",
        ),
        (
            "regularized_weights",
            (ZEROS, ZEROS, YES[:1]),
            {},
            r"mask has shape \(1, 3\), but log_rhos has shape \(2, 3\)",
        ),
    ],
)
def test_wrong_input_is_refused(function, arguments, options, words, monkeypatch):
    # Unwrapped, all of them: as users have them, without the tests' shape checker.
    for name in self_normalized.__all__:
        plain = inspect.unwrap(getattr(self_normalized, name))
        monkeypatch.setattr(self_normalized, name, plain)
    with pytest.raises(ValueError, match=words):
        getattr(self_normalized, function)(*map(jnp.asarray, arguments), **options)
