"""Bootstrapped credit by hand, against loops, and against the exact gradient.

The loops below are written from the definitions as sums, not as recursions. Means over
all trajectories are enumerated in float64; nothing is sampled.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import advantages, exact
from jaxpg.advantages import (
    ValuedRow,
    generalized_advantages,
    lambda_returns,
    n_step_returns,
    next_values_from,
    standardize,
    td_errors,
    vtrace,
    with_values,
)
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import random_mdp
from jaxpg.gradients import score_gradient
from jaxpg.heads import categorical_head
from jaxpg.policies import from_apply, log_prob_fn
from jaxpg.returns import rewards_to_go, step_discounts


def valued(rewards, values, next_values, terminated=(), truncated=(), empty=()):
    """A row from lists, with ends and empty slots given by their index."""
    index = jnp.arange(len(rewards))
    numbers = (jnp.array(x, float) for x in (rewards, values, next_values))
    at = [jnp.isin(index, jnp.array(x, int)) for x in (terminated, truncated, empty)]
    return ValuedRow(*numbers, at[0], at[1], ~at[2])


def steps(row, some):
    return jax.tree.map(lambda x: x[some], row)


# By hand: discount 1/2, lambda 1/2.

REWARDS, VALUES, NEXT = [1.0, 2.0, 4.0], [4.0, 8.0, 2.0], [8.0, 6.0, 10.0]
BY_HAND = {
    # delta2 = 4 + 10/2 - 2 = 7, delta1 = 2 + 6/2 - 8 = -3, delta0 = 1 + 8/2 - 4 = 1
    # A1 = -3 + 7/4 = -1.25, A0 = 1 - 1.25/4 = 0.6875
    # G2 = 9, G1 = 2 + (6 + 9)/4 = 5.75, G0 = 1 + (8 + 5.75)/4 = 4.4375
    "the row's end": ({}, [1, -3, 7], [0.6875, -1.25, 7], [4.4375, 5.75, 9]),
    # delta1 = 2 - 8 = -6; A0 = 1 - 6/4 = -0.5; G1 = 2, G0 = 1 + (8 + 2)/4 = 3.5
    "terminated": ({"terminated": [1]}, [1, -6, 7], [-0.5, -6, 7], [3.5, 2, 9]),
    # A1 = delta1 = -3, A0 = 1 - 3/4; G1 = 2 + 6/2 = 5, G0 = 1 + (8 + 5)/4 = 4.25
    "truncated": ({"truncated": [1]}, [1, -3, 7], [0.25, -3, 7], [4.25, 5, 9]),
    "both at once: terminated wins": (
        {"terminated": [1], "truncated": [1]},
        [1, -6, 7],
        [-0.5, -6, 7],
        [3.5, 2, 9],
    ),
    # delta2 = 4 - 2 = 2; A1 = -3 + 2/4 = -2.5, A0 = 1 - 2.5/4 = 0.375
    # G2 = 4, G1 = 2 + (6 + 4)/4 = 4.5, G0 = 1 + (8 + 4.5)/4 = 4.125
    "terminated last": (
        {"terminated": [2]},
        [1, -3, 2],
        [0.375, -2.5, 2],
        [4.125, 4.5, 4],
    ),
    # Decision 1 is the last and bootstraps: as truncated there.
    "an empty tail": ({"empty": [2]}, [1, -3, 0], [0.25, -3, 0], [4.25, 5, 0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    where, errors, gae, returns = BY_HAND[name]
    row = valued(REWARDS, VALUES, NEXT, **where)
    np.testing.assert_allclose(td_errors(row, 0.5), errors)
    np.testing.assert_allclose(generalized_advantages(row, 0.5, 0.5), gae)
    np.testing.assert_allclose(lambda_returns(row, 0.5, 0.5), returns)


def test_n_step_returns_by_hand():
    row = valued([1, 2, 4, 8, 16, 32], [0] * 6, [8, 6, 10, 4, 2, 12], [2], [4])
    # Two steps, discount 1/2. t = 0: 1 + 2/2 + 6/4 = 3.5.  t = 1: 2 + 4/2 = 4, and
    # terminated.  t = 2: 4.  t = 3: 8 + 16/2 + 2/4 = 16.5.  t = 4: 16 + 2/2 = 17, cut
    # by the truncation.  t = 5: 32 + 12/2 = 38, cut by the row's end.
    returns = n_step_returns(row, 0.5, 2)
    np.testing.assert_allclose(returns, [3.5, 4, 4, 16.5, 17, 38])


def test_vtrace_by_hand():
    row = valued([1, 2], [4, 8], [8, 6])
    targets, actor = vtrace(row, jnp.log(jnp.array([0.5, 4.0])), 0.5, max_rho=2.0)
    # rho = (1/2, 2), c = (1/2, 1); deltas 1 and -3; corrections: 2 * -3 = -6,
    # 1/2 * 1 + 1/2 * 1/2 * -6 = -1; targets 8 - 6 = 2, 4 - 1 = 3
    np.testing.assert_allclose(targets, [3, 2], rtol=1e-6)
    # 1/2 * (1 + 2/2 - 4) = -1;  2 * (2 + 6/2 - 8) = -6
    np.testing.assert_allclose(actor, [-1, -6], rtol=1e-6)


# Against loops, on rows with every kind of end.

CASES = {
    "unbroken": {},
    "several episodes": {"terminated": [1, 5], "truncated": [2, 5, 7]},
    "empty tail inside an episode": {"terminated": [3], "empty": [7, 8]},
    "empty tail after a truncation": {"truncated": [6], "empty": [7, 8]},
    "one decision each": {"terminated": range(9)},
}
LENGTH = 9


def random_row(name, seed=0):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, LENGTH))
    # As a value function gives them: the next slot's value inside an episode.
    next_values = np.append(values[1:], 0.7)
    where = CASES[name]
    for t in range(LENGTH):
        cut = t in where.get("truncated", ()) or t + 1 in where.get("empty", ())
        if cut:
            next_values[t] = rng.normal()
    return valued(rewards, values, next_values, **where)


def host(row):
    return ValuedRow(*map(np.asarray, row))


def last_of(row, t):
    """The last decision of t's episode that the row holds."""
    inside = [u for u in range(t, len(row.mask)) if row.mask[u]]
    for u in inside:
        is_end = row.terminated[u] or row.truncated[u]
        if is_end or u + 1 == len(row.mask) or not row.mask[u + 1]:
            return u
    raise AssertionError


def n_step_by_loop(row, discount, n):
    row, returns = host(row), np.zeros(LENGTH)
    for t in np.flatnonzero(row.mask):
        last = min(t + n - 1, last_of(row, t))
        returns[t] = sum(
            discount ** (u - t) * row.rewards[u] for u in range(t, last + 1)
        )
        if not row.terminated[last]:
            returns[t] += discount ** (last + 1 - t) * row.next_values[last]
    return returns


def mixture_by_loop(row, discount, lambda_):
    """sum_n (1 - lambda) lambda^(n-1) G^(n), the rest on the longest return."""
    by_n = [n_step_by_loop(row, discount, n) for n in range(1, LENGTH + 1)]
    row, returns = host(row), np.zeros(LENGTH)
    for t in np.flatnonzero(row.mask):
        longest = last_of(row, t) - t + 1
        weights = [(1 - lambda_) * lambda_ ** (n - 1) for n in range(1, longest)]
        weights.append(1.0 - sum(weights))
        returns[t] = sum(w * by_n[n][t] for n, w in enumerate(weights))
    return returns


def vtrace_by_loop(row, log_rhos, discount, lambda_, max_rho, max_c):
    """Espeholt et al. 2018, equation 1, as the sum that it is."""
    row = host(row)
    rhos = np.minimum(np.exp(log_rhos), max_rho)
    cs = lambda_ * np.minimum(np.exp(log_rhos), max_c)
    following = np.where(row.terminated, 0.0, row.next_values)
    deltas = rhos * (row.rewards + discount * following - row.values)
    targets, actor = np.zeros(LENGTH), np.zeros(LENGTH)
    for t in np.flatnonzero(row.mask):
        terms = [
            discount ** (u - t) * np.prod(cs[t:u]) * deltas[u]
            for u in range(t, last_of(row, t) + 1)
        ]
        targets[t] = row.values[t] + sum(terms)
    for t in np.flatnonzero(row.mask):
        after = following[t] if last_of(row, t) == t else targets[t + 1]
        actor[t] = rhos[t] * (row.rewards[t] + discount * after - row.values[t])
    return targets, actor


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [1, 2, 3, LENGTH - 1, LENGTH, 50])
@pytest.mark.thinned(3)
def test_n_step_returns_equal_a_loop(name, n, float64):
    row = random_row(name)
    expected = n_step_by_loop(row, 0.9, n)
    np.testing.assert_allclose(n_step_returns(row, 0.9, n), expected, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.thinned(3)
def test_lambda_returns_are_the_mixture_of_n_step_returns(name, lambda_, float64):
    row = random_row(name)
    expected = mixture_by_loop(row, 0.9, lambda_)
    returns = lambda_returns(row, 0.9, lambda_)
    np.testing.assert_allclose(returns, expected, rtol=1e-12)
    gae = np.where(row.mask, expected - row.values, 0.0)
    ours = generalized_advantages(row, 0.9, lambda_)
    np.testing.assert_allclose(ours, gae, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_gae_at_the_limits_of_lambda(name, float64):
    row = random_row(name)
    at_zero = generalized_advantages(row, 0.9, 0.0)
    following = np.where(row.terminated, 0.0, row.next_values)
    errors = row.rewards + 0.9 * following - row.values
    np.testing.assert_allclose(at_zero, np.where(row.mask, errors, 0.0), rtol=1e-12)
    # What is bootstrapped at a cut is one more reward of the last decision.
    cut = np.array([m and last_of(host(row), t) == t for t, m in enumerate(row.mask)])
    rewards = jnp.where(cut, row.rewards + 0.9 * following, row.rewards)
    to_go = rewards_to_go(rewards, step_discounts(jnp.asarray(cut), row.mask, 0.9))
    at_one = np.where(row.mask, to_go - row.values, 0.0)
    ours = generalized_advantages(row, 0.9, 1.0)
    np.testing.assert_allclose(ours, at_one, rtol=1e-12, atol=1e-13)


RATIOS = np.random.default_rng(3).normal(size=LENGTH)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("lambda_", "max_rho", "max_c"),
    [(1.0, 1.0, 1.0), (0.7, 1.0, 1.0), (1.0, 2.0, 0.5), (0.9, 1e9, 1e9)],
)
@pytest.mark.thinned(3)
def test_vtrace_equals_the_papers_sum(name, lambda_, max_rho, max_c, float64):
    row = random_row(name)
    ours = vtrace(
        row,
        jnp.asarray(RATIOS),
        0.9,
        lambda_=lambda_,
        max_rho=max_rho,
        max_c=max_c,
    )
    expected = vtrace_by_loop(row, RATIOS, 0.9, lambda_, max_rho, max_c)
    np.testing.assert_allclose(ours.targets, expected[0], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(ours.advantages, expected[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
@pytest.mark.thinned(3)
def test_vtrace_on_policy_is_the_lambda_return(name, lambda_, float64):
    row = random_row(name)
    ours = vtrace(row, jnp.zeros(LENGTH), 0.9, lambda_=lambda_)
    returns = mixture_by_loop(row, 0.9, lambda_)
    np.testing.assert_allclose(ours.targets, returns, rtol=1e-12)
    if lambda_ == 1.0:
        gae = np.where(row.mask, returns - row.values, 0.0)
        np.testing.assert_allclose(ours.advantages, gae, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_extreme_ratios_stay_finite(name):
    extreme = jnp.array([1e4, -1e4, jnp.inf, -jnp.inf, 0.0, 1e4, 1e4, -1e4, 1e4])
    for bound in (1.0, 2.0):
        ours = vtrace(random_row(name), extreme, 0.9, max_rho=bound, max_c=bound)
        assert np.isfinite(ours.targets).all() and np.isfinite(ours.advantages).all()


# Storage, ends and derivatives, for all of them at once.

FORMS = {
    "td_errors": lambda row, x: td_errors(row, 0.9),
    "generalized_advantages": lambda row, x: generalized_advantages(row, 0.9, 0.8),
    "lambda_returns": lambda row, x: lambda_returns(row, 0.9, 0.8),
    "n_step_returns": lambda row, x: n_step_returns(row, 0.9, 3),
    "vtrace targets": lambda row, x: vtrace(row, x, 0.9).targets,
    "vtrace advantages": lambda row, x: vtrace(row, x, 0.9).advantages,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.thinned(2)
def test_joined_episodes_are_the_same_as_apart(form):
    row, log_rhos = random_row("several episodes"), jnp.asarray(RATIOS, float)
    joined = FORMS[form](row, log_rhos)
    for some in (slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 8), slice(8, 9)):
        apart = FORMS[form](steps(row, some), log_rhos[some])
        np.testing.assert_allclose(joined[some], apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_in_empty_slots_is_not_counted(form):
    row = random_row("empty tail inside an episode")
    wild = jax.tree.map(
        lambda x: x if x.dtype == bool else jnp.where(row.mask, x, jnp.nan), row
    )
    wild = wild._replace(terminated=wild.terminated | ~row.mask)
    log_rhos = jnp.asarray(RATIOS, float)
    calm = FORMS[form](row, log_rhos)
    spoilt = FORMS[form](wild, jnp.where(row.mask, log_rhos, jnp.nan))
    np.testing.assert_array_equal(spoilt, calm)
    np.testing.assert_array_equal(calm[7:], 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_next_values_of_terminated_decisions_are_not_read(form):
    row, log_rhos = random_row("several episodes"), jnp.asarray(RATIOS, float)
    hidden = row._replace(
        next_values=jnp.where(row.terminated, jnp.nan, row.next_values)
    )
    np.testing.assert_array_equal(
        FORMS[form](hidden, log_rhos), FORMS[form](row, log_rhos)
    )


@pytest.mark.parametrize("form", FORMS)
def test_no_derivative_flows_through_credit(form):
    row, log_rhos = random_row("several episodes"), jnp.asarray(RATIOS, float)

    def total(values, next_values, log_rhos):
        changed = row._replace(values=values, next_values=next_values)
        return jnp.sum(FORMS[form](changed, log_rhos) ** 2)

    slopes = jax.grad(total, (0, 1, 2))(row.values, row.next_values, log_rhos)
    np.testing.assert_array_equal(jnp.stack(slopes), 0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.thinned(2)
def test_a_batch_by_vmap_equals_row_by_row(form):
    rows = [random_row(name, seed) for seed, name in enumerate(CASES)]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    log_rhos = jnp.stack([jnp.asarray(np.roll(RATIOS, i), float) for i in range(5)])
    together = jax.jit(jax.vmap(FORMS[form]))(batch, log_rhos)
    for i, row in enumerate(rows):
        alone = FORMS[form](row, log_rhos[i])
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


def test_settings_may_be_traced_and_a_batch_needs_no_lambda():
    rows = jax.tree.map(lambda x: x[None], random_row("unbroken"))
    in_axes = (0, None, None)
    plain = jax.vmap(generalized_advantages, in_axes)(rows, 0.9, 0.8)
    fn = jax.jit(jax.vmap(generalized_advantages, in_axes))
    traced = fn(rows, jnp.array(0.9), jnp.array(0.8))
    np.testing.assert_allclose(traced, plain, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_no_decision_at_all_gives_an_empty_row(form):
    assert FORMS[form](valued([], [], []), jnp.zeros(0)).shape == (0,)


def test_next_values_from_the_row_itself():
    values = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(next_values_from(values, 7.0), [2, 3, 7])
    batch = jax.vmap(next_values_from)(values[None], jnp.array([7.0]))
    np.testing.assert_array_equal(batch, [[2, 3, 7]])


# Standardising.


def test_standardize_over_the_whole_batch_by_hand():
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    values = jnp.array([[1.0, 3.0, jnp.nan], [5.0, 7.0, 1e30]])
    mask = jnp.array([[1, 1, 0], [1, 1, 0]], bool)
    expected = np.array([[-3, -1, 0], [1, 3, 0]]) / np.sqrt(5)
    np.testing.assert_allclose(standardize(values, mask), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("shift", [0.0, -300.0])
def test_standardize_forgets_scale_and_shift(scale, shift):
    values = jax.random.normal(jax.random.key(0), (8, 50))
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (8, 50))
    known = np.asarray(values, np.float64)[mask]
    expected = (known - known.mean()) / known.std()
    ours = standardize(scale * (values + shift), mask)[mask]
    atol = 1e-6 if shift == 0.0 else 1e-4  # the shift has eaten digits of the values
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e30])
def test_equal_advantages_become_zero_not_noise(value):
    values, mask = jnp.full((7, 1001), value), jnp.ones((7, 1001), bool)
    np.testing.assert_array_equal(standardize(values, mask), 0.0)
    rounded = values * (1.0 + 1e-7 * jax.random.normal(jax.random.key(0), mask.shape))
    np.testing.assert_array_equal(standardize(rounded, mask), 0.0)


def test_a_small_but_real_difference_is_kept():
    values = 1.0 + jnp.array([[0.0, 1e-3]])
    ours = standardize(values, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(ours, [[-1, 1]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_standardizing_nothing_gives_zeros(shape):
    ours = standardize(jnp.full(shape, jnp.nan), jnp.zeros(shape, bool))
    np.testing.assert_array_equal(ours, np.zeros(shape))


# Against the exact gradient.

MDP = {"seed": 5, "num_states": 3, "horizon": 3}


def world():
    mdp = random_mdp(**MDP)
    num_states, num_actions = mdp.reward.shape

    def init(key, obs):
        return jax.random.normal(key, (num_states, num_actions))

    head = categorical_head(Discrete(num_actions))
    policy = from_apply(init, lambda table, state: table[state], head)
    return mdp, policy, policy.init(jax.random.key(0), jnp.zeros((), jnp.int32))


def mean_gradient(credit):
    """The exact mean of the estimator that weighs decisions by credit(row)."""
    mdp, policy, params = world()

    def estimate(rows):
        weights = jax.vmap(credit)(rows)
        return score_gradient(log_prob_fn(policy), params, rows, weights)

    mean = exact.expected_estimate(estimate, mdp, policy, params, 1)
    return flat(mean), flat(exact.policy_gradient(mdp, policy, params))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def horizon_is_the_task(row):
    """The horizon's end counted as an end of the task: nothing of value follows."""
    return row._replace(terminated=row.terminated | row.truncated)


ANY_VALUES = np.array([3.0, -1.0, 2.0])


def with_any_values(row):
    table = jnp.asarray(ANY_VALUES)
    return with_values(row, table[row.obs], table[row.next_obs])


def test_gae_at_lambda_1_is_unbiased_with_any_values(float64):
    mean, gradient = mean_gradient(
        lambda row: generalized_advantages(
            horizon_is_the_task(with_any_values(row)), 1.0, 1.0
        )
    )
    assert np.linalg.norm(gradient) > 0.1
    np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12)


def test_values_at_truncations_belong_to_another_objective(float64):
    """Bootstrapping at the horizon is the gradient of J + E[V(last) if truncated]."""
    mean, gradient = mean_gradient(
        lambda row: generalized_advantages(with_any_values(row), 1.0, 1.0)
    )
    mdp, policy, params = world()

    def objective(params):
        probabilities = exact.action_probabilities(mdp, policy, params)
        goes_on = jnp.where(mdp.terminal, 0.0, 1.0)
        values = jnp.asarray(ANY_VALUES)
        for _ in range(mdp.horizon):
            q = mdp.reward + mdp.transition @ (goes_on * values)
            values = jnp.sum(probabilities * q, axis=1)
        return mdp.initial @ values

    expected = flat(jax.grad(objective)(params))
    np.testing.assert_allclose(mean, expected, rtol=1e-10, atol=1e-12)
    assert np.linalg.norm(mean - gradient) > 0.1 * np.linalg.norm(gradient)


def with_exact_values(row):
    mdp, policy, params = world()
    probabilities = exact.action_probabilities(mdp, policy, params)
    q = exact.action_values(mdp, policy, params)
    values = jnp.einsum("sa,tsa->ts", probabilities, q)
    values = jnp.concatenate([values, jnp.zeros((1, mdp.initial.size))])
    now, then = values[row.time, row.obs], values[row.time + 1, row.next_obs]
    return with_values(row, now, then)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0])
@pytest.mark.thinned(3)
def test_gae_is_unbiased_with_exact_values(lambda_, float64):
    """The value after the horizon is exactly 0, so no end needs special treatment."""
    mean, gradient = mean_gradient(
        lambda row: generalized_advantages(with_exact_values(row), 1.0, lambda_)
    )
    np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lambda_", [0.0, 0.5])
def test_gae_is_biased_with_wrong_values_below_lambda_1(lambda_, float64):
    mean, gradient = mean_gradient(
        lambda row: generalized_advantages(
            horizon_is_the_task(with_any_values(row)), 1.0, lambda_
        )
    )
    assert np.linalg.norm(mean - gradient) > 1e-2 * np.linalg.norm(gradient)


@pytest.mark.parametrize(("n", "unbiased"), [(1, False), (2, False), (3, True)])
def test_n_step_credit_is_unbiased_only_when_it_reaches_the_end(n, unbiased, float64):
    mean, gradient = mean_gradient(
        lambda row: n_step_returns(horizon_is_the_task(with_any_values(row)), 1.0, n)
    )
    close = np.allclose(mean, gradient, rtol=1e-10, atol=1e-12)
    assert close == unbiased


def test_unclipped_vtrace_targets_are_unbiased_for_the_other_policys_values(float64):
    """On rows of another policy, with any values, at lambda 1."""
    mdp, policy, behaviour = world()
    params = policy.init(jax.random.key(7), jnp.zeros((), jnp.int32))
    log_probs = log_prob_fn(policy)

    def first_target(rows):
        row = steps(rows, 0)
        valued_row = horizon_is_the_task(with_any_values(row))
        log_rhos = log_probs(params, row) - row.log_prob
        free = {"max_rho": 1e9, "max_c": 1e9}
        clipped = vtrace(valued_row, log_rhos, 1.0).targets[0]
        return vtrace(valued_row, log_rhos, 1.0, **free).targets[0], clipped

    free, clipped = exact.expected_estimate(first_target, mdp, policy, behaviour, 1)
    value = exact.expected_return(mdp, policy, params)
    np.testing.assert_allclose(free, value, rtol=1e-10)
    assert abs(clipped - value) > 1e-2 * abs(value)


# Errors.

ROW = valued([1, 2], [0, 0], [0, 0])


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("td_errors", (ROW, 1.5), r"^discount is 1.5, needs a number in \[0, 1\]"),
        ("td_errors", (steps(ROW, None), 1.0), r"^rewards has shape \(1, 2\).*vmap"),
        ("lambda_returns", (ROW, 1.0, -0.1), r"^lambda_ is -0.1, needs"),
        ("generalized_advantages", (ROW, -1, 1.0), r"^discount is -1, needs"),
        (
            "generalized_advantages",
            (ROW._replace(next_values=jnp.zeros(3)), 1.0, 1.0),
            r"^next_values has shape \(3,\), but rewards has shape \(2,\)",
        ),
        ("n_step_returns", (ROW, 1.0, 0), r"^n is 0, needs a whole number"),
        ("n_step_returns", (ROW, 2.0, 5), r"^discount is 2.0, needs"),
        ("vtrace", (ROW, jnp.zeros(3), 1.0), r"^log_rhos has shape \(3,\)"),
        ("next_values_from", (jnp.zeros((1, 2)), 0.0), r"^values has shape \(1, 2\)"),
        ("next_values_from", (jnp.zeros(2), jnp.zeros(2)), r"^final_value has shape"),
        ("standardize", (jnp.zeros((1, 2)), jnp.ones(2, bool)), r"^mask has shape"),
    ],
)
def test_wrong_input_is_refused(function, arguments, words):
    # Unwrapped: as users have it, without the tests' shape checker.
    call = inspect.unwrap(getattr(advantages, function))
    with pytest.raises(ValueError, match=words):
        call(*arguments)


@pytest.mark.parametrize("name", ["max_rho", "max_c"])
def test_a_bound_of_zero_is_refused(name):
    with pytest.raises(ValueError, match=r"is 0.0, needs a number in \(0"):
        vtrace(ROW, jnp.zeros(2), 1.0, **{name: 0.0})
