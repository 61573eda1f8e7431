"""Value functions: what they are fitted to, in which units, and what they save."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg import exact
from jaxpg.baselines import apply_baseline, no_baseline
from jaxpg.credit import Credit, credit_of
from jaxpg.envs import Box
from jaxpg.envs.tabular import random_mdp, tabular_environment
from jaxpg.gradients import score_gradient
from jaxpg.policies import log_prob_fn, tabular_policy
from jaxpg.rollout import rollout_episodes
from jaxpg.train.sharding import place
from jaxpg.types import Trajectory
from jaxpg.value_functions import from_value_function, value_network_baseline

KEY = jax.random.key(0)
NUM_ROWS, LENGTH, OBS = 16, 5, Box(-np.inf, np.inf, (2,))


def quick(function, *static):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(
        functools.partial(function, *static),
        compiler_options={"xla_backend_optimization_level": 0},
    )


def batch(seed=0, scale=1.0, shift=0.0):
    """Rows whose return depends on the observation, with a reach that varies."""
    rng = np.random.default_rng(seed)
    shape = (NUM_ROWS, LENGTH)
    time = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    mask = jnp.asarray(time < rng.integers(1, LENGTH + 1, NUM_ROWS)[:, None])
    obs = rng.normal(size=(*shape, 2))
    returns = np.sin(obs[..., 0]) + obs[..., 1] + 0.1 * rng.normal(size=shape)
    reach = np.where(mask, rng.exponential(size=shape), 0.0)
    zeros, no = jnp.zeros(shape), jnp.zeros(shape, bool)
    rows = Trajectory(
        jnp.asarray(obs, float),
        *(zeros, zeros, zeros, no, no, mask),
        jnp.asarray(time),
        jnp.zeros(shape, jnp.int32),
    )
    value = reach * (shift + scale * returns)
    return rows, Credit(jnp.asarray(value, float), jnp.asarray(reach, float))


@functools.cache
def network(**settings):
    settings = {"hidden": (8,), "learning_rate": 0.03, **settings}
    return value_network_baseline(OBS, **settings)


@functools.cache
def compiled_fit(baseline):
    return quick(baseline.fit)


def fits(baseline, rows, credit, number=1):
    """The state after several fits to one batch, and the last one's info."""
    state = baseline.init(KEY, jnp.zeros(2))
    for _ in range(number):
        state, info = compiled_fit(baseline)(state, rows, credit)
    return state, info


def predict(baseline, state, rows, credit):
    return baseline.predict(None, state, (), rows, credit)


def error(levels, credit):
    """Mean squared error, weighted by reach, in float64."""
    some = np.asarray(credit.reach) > 0
    levels = np.broadcast_to(levels, some.shape)
    value, reach, levels = (np.asarray(x, float)[some] for x in (*credit, levels))
    return np.average((value / reach - levels) ** 2, weights=reach)


def test_before_any_fit_it_is_zero():
    rows, credit = batch()
    baseline = network()
    state = baseline.init(KEY, jnp.zeros(2))
    assert baseline.summarize(None, rows, credit) == () and not baseline.needs_batch
    levels = predict(baseline, state, rows, credit)
    assert levels.shape == rows.mask.shape and levels.dtype == credit.value.dtype
    np.testing.assert_array_equal(levels, 0.0)


def test_fits_lower_the_error_on_data_of_their_own_and_on_others():
    baseline, train, test = network(num_steps=50), batch(0), batch(1)
    errors = []
    for number in (1, 2, 4):
        state, info = fits(baseline, *train, number)
        errors += [error(predict(baseline, state, *train), train[1])]
    variance = error(0.0, train[1])
    assert variance > errors[0] > errors[1] > errors[2] and errors[2] < 0.1 * variance
    others = error(predict(baseline, state, *test), test[1])
    assert others < 0.4 * error(0.0, test[1])
    assert -0.5 <= info["baseline_loss"] < -0.45, "-1/2 is no error at all"


def test_explained_with_offset_is_that_before_the_fit():
    baseline = network(num_steps=50)
    rows, credit = batch(shift=3.0)
    some = np.asarray(credit.reach) > 0
    value, reach = (np.asarray(x, float)[some] for x in credit)
    mean = np.sum(value) / np.sum(reach)
    variance = np.average((value / reach - mean) ** 2, weights=reach)
    _, info = fits(baseline, rows, credit)
    by_hand = 1 - error(0.0, credit) / variance
    assert by_hand < -1
    np.testing.assert_allclose(info["baseline_explained_variance"], by_hand, rtol=1e-5)
    state, _ = fits(baseline, rows, credit)
    _, info = compiled_fit(baseline)(state, rows, credit)
    by_hand = 1 - error(predict(baseline, state, rows, credit), credit) / variance
    assert 0.5 < by_hand < 1
    np.testing.assert_allclose(info["baseline_explained_variance"], by_hand, rtol=1e-4)


@pytest.mark.parametrize(
    ("scale", "shift"), [(1000.0, -500.0), (1e-4, 0.0), (0.1, 1e3)]
)
def test_units_of_the_return_do_not_matter(scale, shift, float64):
    baseline = network()
    for number in (1, 3):
        state, _ = fits(baseline, *batch(), number)
        other, _ = fits(baseline, *batch(scale=scale, shift=shift), number)
        plain = predict(baseline, state, *batch())
        expected = shift + scale * plain
        found = predict(baseline, other, *batch())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


def test_statistics_of_targets_by_hand(float64):
    """DECAY 0.9: the second batch counts 0.1 / 0.19, the first 0.09 / 0.19."""
    baseline = network(num_steps=1)
    state = baseline.init(KEY, jnp.zeros(2))
    pooled = []
    for seed, shift in ((0, 7.0), (1, 9.0)):
        rows, credit = batch(seed, shift=shift)
        state, _ = compiled_fit(baseline)(state, rows, credit)
        some = np.asarray(credit.reach) > 0
        value, reach = (np.asarray(x)[some] for x in credit)
        moments = [np.average((value / reach) ** k, weights=reach) for k in (1, 2)]
        pooled += [np.array(moments)]
        if len(pooled) == 1:
            np.testing.assert_allclose(state.targets.mean, moments[0])
    mean, square = (0.09 * pooled[0] + 0.1 * pooled[1]) / 0.19
    np.testing.assert_allclose(state.targets.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(state.targets.variance, square - mean**2, rtol=1e-9)


def test_targets_that_do_not_vary_are_predicted_at_once():
    rows, credit = batch()
    credit = Credit(1e6 * credit.reach, credit.reach)
    baseline = network()
    for number in (1, 2):
        state, info = fits(baseline, rows, credit, number)
        levels = np.asarray(predict(baseline, state, rows, credit))
        np.testing.assert_allclose(levels, 1e6, rtol=1e-5)
        assert np.isfinite(info["baseline_loss"])


def test_a_batch_without_reach_changes_nothing_into_nan():
    rows, credit = batch()
    nothing = Credit(*(jnp.zeros_like(x) for x in credit))
    state, info = fits(network(), rows, nothing)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, info)))


def test_empty_slots_do_not_count(float64):
    rows, credit = batch()
    other = rows._replace(obs=jnp.where(rows.mask[..., None], rows.obs, 7.0))
    assert not np.array_equal(other.obs, rows.obs)
    state, _ = fits(network(), rows, credit)
    same, _ = fits(network(), other, credit)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


# A table of values: its fit is known.


def table(optimizer, **settings):
    return from_value_function(
        lambda key, obs: jnp.zeros(3),
        lambda values, obs: values[obs],
        optimizer,
        **settings,
    )


def test_of_a_table_it_finds_the_mean_target_of_each_state(float64):
    """By reach: of state 0 (1 * 10 + 3 * 2) / 4, of state 1 8, of state 2 nothing."""
    rows = jax.tree.map(lambda x: x[:1, :3], batch()[0])
    rows = rows._replace(obs=jnp.array([[0, 0, 1]]), mask=jnp.ones((1, 3), bool))
    credit = Credit(jnp.array([[10.0, 6.0, 16.0]]), jnp.array([[1.0, 3.0, 2.0]]))
    baseline = table(optax.sgd(1.0), num_steps=100)
    state = baseline.init(KEY, jnp.array(0))
    state, info = compiled_fit(baseline)(state, rows, credit)
    levels = predict(baseline, state, rows, credit)
    np.testing.assert_allclose(levels, [[4.0, 4.0, 8.0]], rtol=1e-9)
    # Mean 32/6 and, by state, 4 and 8: explained is what their spread makes of it all.
    mean, spread = 32 / 6, 4 * 4 + 2 * 8**2 - 32**2 / 6 + 4 * 4 * 3
    whole = 10**2 + 3 * 2**2 + 2 * 8**2 - 6 * mean**2
    assert spread == pytest.approx(4 * 4**2 + 2 * 8**2 - 6 * mean**2)
    assert info["baseline_loss"] == pytest.approx(-spread / whole / 2)


def test_a_step_is_the_optimizers_own(float64):
    """One SGD step on targets that are +-1: half the way to each is rate / 2."""
    rows = jax.tree.map(lambda x: x[:1, :2], batch()[0])
    rows = rows._replace(obs=jnp.array([[0, 1]]), mask=jnp.ones((1, 2), bool))
    credit = Credit(jnp.array([[4.0, 6.0]]), jnp.ones((1, 2)))
    baseline = table(optax.sgd(0.5), num_steps=1)
    state, info = baseline.fit(baseline.init(KEY, jnp.array(0)), rows, credit)
    np.testing.assert_allclose(state.params, [-0.25, 0.25, 0.0])
    np.testing.assert_allclose(predict(baseline, state, rows, credit), [[4.75, 5.25]])
    assert info["baseline_loss"] == 0.0


# What it saves, exactly.


def test_the_gradient_stays_unbiased_and_its_variance_falls(float64):
    """By a third: exact, over all trajectories of a world."""
    mdp = random_mdp(3, num_states=3, horizon=3)
    env = tabular_environment(mdp)
    policy = tabular_policy(env.observation_space, env.action_space)
    params = policy.init(jax.random.key(3), jnp.array(0))
    ids = jnp.arange(64, dtype=jnp.int32)
    rows = quick(rollout_episodes, env, policy)(params, KEY, ids)
    baseline = value_network_baseline(
        env.observation_space, hidden=(8,), learning_rate=0.03
    )
    state = baseline.init(KEY, jnp.array(0))
    for _ in range(3):
        state, _ = compiled_fit(baseline)(state, rows, credit_of(rows))

    def estimate(rows):
        def gradient(baseline, state):
            weights = apply_baseline(baseline, params, state, rows, credit_of(rows))
            return score_gradient(log_prob_fn(policy), params, rows, weights)["network"]

        return gradient(no_baseline(), ()), gradient(baseline, state)

    moments = exact.estimate_moments(estimate, mdp, policy, params, 1)
    gradient = exact.policy_gradient(mdp, policy, params)["network"]
    assert np.linalg.norm(gradient) > 0.1
    np.testing.assert_allclose(moments.mean[1], gradient, rtol=1e-9, atol=1e-12)
    without, with_values = map(np.sum, moments.variance)
    assert with_values < 0.7 * without


# Chunks, devices, seeds, what is refused.


def one_round(baseline):
    def run(rows, credit):
        state = baseline.init(KEY, jnp.zeros(2))
        state, info = baseline.fit(state, rows, credit)
        return predict(baseline, state, rows, credit), state, info

    return quick(run)


def assert_same(some, other, rtol=1e-8):
    assert np.abs(jax.tree.leaves(other)[0]).max() > 0.1
    leaves = map(jax.tree.leaves, (some, other))
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_change_nothing(chunk_size, float64):
    whole = one_round(network())(*batch())
    assert_same(one_round(network(chunk_size=chunk_size))(*batch()), whole)


@pytest.mark.parametrize("by_hand", [False, True], ids=["partitioned", "summed"])
def test_rows_spread_over_devices_change_nothing(by_hand, float64):
    placement = place(8, rows=NUM_ROWS)
    over_rows = jax.sharding.NamedSharding(
        placement.replicated.mesh, jax.sharding.PartitionSpec("rows")
    )
    spread = jax.device_put(batch(), over_rows)
    settings = {"chunk_size": 3, "sum_over_rows": placement.sum_over_rows}
    found = one_round(network(**(settings if by_hand else {})))(*spread)
    assert len(found[0].sharding.device_set) == 8
    assert_same(found, one_round(network())(*batch()))


def test_over_seeds_by_vmap_it_equals_separate_calls(float64):
    batches = [batch(seed) for seed in range(2)]
    run = one_round(network())
    together = jax.vmap(run)(*jax.tree.map(lambda *x: jnp.stack(x), *batches))
    for i, some in enumerate(batches):
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), run(*some))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: network(num_steps=0), "^num_steps is 0, needs a whole number"),
        (lambda: network(chunk_size=0), "^chunk_size is 0, needs a whole number"),
        (lambda: network(learning_rate=0.0), "^learning_rate is 0.0, needs a number"),
        (
            lambda: network(activation="tahn").init(KEY, jnp.zeros(2)),
            "^activation is 'tahn', unknown; did you mean 'tanh'",
        ),
        (
            lambda: from_value_function(
                lambda key, obs: (), lambda params, obs: obs, optax.sgd(1.0)
            ).init(KEY, jnp.zeros(2)),
            r"^apply\(params, obs\) has shape \(2,\), needs \(\) = one number; take ou",
        ),
    ],
)
def test_what_cannot_work_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
