"""Surrogates against the engine, the distributions and the exact derivatives of J.

Trajectories are enumerated in float64 where a mean is claimed: first, second and third
derivatives of the magic-box objective must match those of the exact return, while the
plain surrogate's second derivative must not.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxpg import exact, surrogate
from jaxpg.distributions import Categorical, DiagonalGaussian, TanhGaussian
from jaxpg.envs import Box, Discrete
from jaxpg.envs.tabular import random_mdp
from jaxpg.gradients import score_gradient
from jaxpg.heads import Head, categorical_head
from jaxpg.policies import from_apply, log_prob_fn
from jaxpg.returns import leading_discounts, rewards_to_go, step_discounts
from jaxpg.surrogate import (
    behaviour_cloning,
    cross_entropy,
    dice_objective,
    entropy_bonus,
    entropy_rewards,
    magic_box,
    squared_error,
)
from jaxpg.types import Trajectory

MDP = {"seed": 3, "num_states": 3, "horizon": 3}


def tabular_policy(mdp):
    num_states, num_actions = mdp.reward.shape

    def init(key, obs):
        return jax.random.normal(key, (num_states, num_actions))

    head = categorical_head(Discrete(num_actions))
    return from_apply(init, lambda table, state: table[state], head)


def one_parameter_policy(mdp):
    """Logits theta * features[state]: cheap to differentiate three times."""
    features = jnp.asarray(np.random.default_rng(0).normal(size=mdp.reward.shape))
    head = categorical_head(Discrete(mdp.reward.shape[1]))
    return from_apply(
        lambda key, obs: jnp.array(0.7), lambda x, state: x * features[state], head
    )


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def world(make_policy=tabular_policy, **changes):
    mdp = random_mdp(**{**MDP, **changes})
    policy = make_policy(mdp)
    params = policy.init(jax.random.key(1), jnp.zeros((), jnp.int32))
    return mdp, policy, params


def on_vectors(fn, params):
    """`fn` of a flat vector, and the vector: Hessians become plain matrices."""
    vector, unravel = ravel_pytree(params)
    return (lambda x: fn(unravel(x))), vector


def mean_over_paths(mdp, policy, params, estimate):
    return exact.expected_estimate(estimate, mdp, policy, params, 1)


def all_rows(mdp, policy, params):
    paths = exact.enumerate_trajectories(mdp)
    return exact.with_log_probs(paths.trajectories, policy, params)


def state_values(mdp, policy, params, discount):
    """V[t, s]: a good baseline that knows the past only."""
    q = exact.action_values(mdp, policy, params, discount)
    return jnp.einsum("sa,tsa->ts", exact.action_probabilities(mdp, policy, params), q)


def close(x, y, **tolerance):
    np.testing.assert_allclose(x, y, **{"rtol": 1e-10, "atol": 1e-12, **tolerance})


def differ(x, y, share=1e-2):
    return np.linalg.norm(x - y) > share * np.linalg.norm(y)


# The plain surrogate.


def gaussian(mean, row):
    return -0.5 * (row - mean) ** 2


def test_surrogate_by_hand():
    # log-probs at mean 1: 0, -1/2 and -2, -9/2; weights (1, 10) and (100, 0)
    # (0 - 5 - 200 - 0) / 2 = -102.5, and over three trajectories -205 / 3
    rows = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    weights = jnp.array([[1.0, 10.0], [100.0, 0.0]])
    value = surrogate.surrogate(gaussian, jnp.array(1.0), rows, weights)
    assert value.item() == -102.5
    of_three = surrogate.surrogate(
        gaussian, jnp.array(1.0), rows, weights, num_trajectories=3
    )
    np.testing.assert_allclose(of_three, -205 / 3, rtol=1e-6)


@pytest.mark.parametrize("num_trajectories", [None, 7])
def test_its_derivative_is_the_score_gradient(num_trajectories, float64):
    mdp, policy, params = world()
    rows, fn = all_rows(mdp, policy, params), log_prob_fn(policy)
    weights = jax.random.normal(jax.random.key(2), rows.mask.shape)
    weights = jnp.where(rows.mask, weights, 0.0)
    count = {"num_trajectories": num_trajectories}

    @jax.jit
    def both(params):
        slope = jax.grad(surrogate.surrogate, 1)(fn, params, rows, weights, **count)
        return slope, score_gradient(fn, params, rows, weights, **count)

    slope, gradient = map(lambda tree: ravel_pytree(tree)[0], both(params))
    assert np.linalg.norm(gradient) > 1e-2
    close(slope, gradient, rtol=1e-12, atol=1e-14)


def test_no_derivative_flows_through_weights():
    rows = jnp.array([[1.0, 2.0]])

    def value(mean):
        weights = mean * jnp.ones((1, 2))
        return surrogate.surrogate(gaussian, mean, rows, weights)

    # scores 1 - 3 and 2 - 3, weighed by 3
    assert jax.grad(value)(3.0).item() == 3.0 * (-2.0 - 1.0)


def test_a_weight_of_zero_hides_an_impossible_action_and_nan_hides_nothing():
    def log_probs(logits, row):
        return jnp.full(row.shape, -jnp.inf).at[0].set(logits * row[0])

    rows, weights = jnp.array([[3.0, 1.0]]), jnp.array([[2.0, 0.0]])
    value = jax.value_and_grad(surrogate.surrogate, 1)
    assert [x.item() for x in value(log_probs, 1.0, rows, weights)] == [6.0, 6.0]
    bad = jnp.array([[2.0, jnp.nan]])
    assert np.isnan(
        jax.jit(surrogate.surrogate, static_argnums=0)(gaussian, 1.0, rows, bad)
    )


# Its two visible forms.


def decisions(num_outputs, draw):
    """Observations, a linear network, and weights; outputs [B, T, num_outputs]."""
    keys = jax.random.split(jax.random.key(4), 4)
    obs = jax.random.normal(keys[0], (4, 5, 3))
    params = jax.random.normal(keys[1], (3, num_outputs))
    weights = jax.random.normal(keys[2], (4, 5))
    return params, obs, draw(keys[3]), weights


def test_cross_entropy_is_minus_the_surrogate_of_a_categorical(float64):
    params, obs, actions, weights = decisions(
        3, lambda key: jax.random.randint(key, (4, 5), 0, 3)
    )

    def likelihood(params, row):
        obs, actions = row
        return Categorical(obs @ params).log_prob(actions)

    def loss(params):
        return jnp.sum(weights * cross_entropy(obs @ params, actions)) / 4

    def minus(params):
        return -surrogate.surrogate(likelihood, params, (obs, actions), weights)

    for x, y in zip(
        all_derivatives(loss, params), all_derivatives(minus, params), strict=True
    ):
        close(x, y)


def test_cross_entropy_of_masked_and_unknown_actions():
    logits = jnp.log(jnp.array([0.0, 0.25, 0.75]))
    losses = jax.vmap(cross_entropy, (None, 0))(logits, jnp.array([0, 1, 2, 3, -1]))
    expected = [np.inf, -np.log(0.25), -np.log(0.75), np.inf, np.inf]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    # softmax minus one-hot, and nothing at the masked logit
    slope = jax.grad(cross_entropy)(logits, jnp.array(1))
    np.testing.assert_allclose(slope, [0.0, -0.75, 0.75], rtol=1e-6)


@pytest.mark.parametrize("scale", [0.5, np.array([0.5, 2.0])], ids=["one", "each"])
def test_squared_error_is_minus_the_surrogate_of_a_fixed_gaussian(scale, float64):
    params, obs, actions, weights = decisions(
        2, lambda key: jax.random.normal(key, (4, 5, 2))
    )
    scale = scale if isinstance(scale, float) else jnp.asarray(scale)
    log_std = jnp.broadcast_to(jnp.log(scale), (5, 2))

    def likelihood(params, row):
        obs, actions = row
        return DiagonalGaussian(obs @ params, log_std).log_prob(actions)

    def loss(params):
        return jnp.sum(weights * squared_error(obs @ params, actions, scale)) / 4

    def minus(params):
        return -surrogate.surrogate(likelihood, params, (obs, actions), weights)

    close(quick(jax.grad(loss))(params), quick(jax.grad(minus))(params))
    constant = jnp.sum(log_std[0]) + jnp.log(2 * jnp.pi)
    close(minus(params) - loss(params), constant * jnp.sum(weights) / 4)


def test_squared_error_gives_a_learned_scale_no_derivative_but_the_likelihood_does():
    means, actions = jnp.zeros((1, 2)), jnp.array([[2.0, 4.0]])
    # (1 + 4) / 2 at scale 2
    assert squared_error(means, actions, 2.0).tolist() == [2.5]

    def error(scale):
        return squared_error(means, actions, jnp.exp(scale))[0]

    def full(scale):
        log_std = jnp.broadcast_to(scale, (1, 2))
        return -DiagonalGaussian(means, log_std).log_prob(actions)[0]

    assert jax.grad(error)(0.0) == 0.0
    # d/d log_std of z²/2 + log_std per dimension: (1 - 4) + (1 - 16)
    np.testing.assert_allclose(jax.grad(full)(0.0), -18.0, rtol=1e-6)


# Behaviour cloning.


def demonstrations():
    """Three rows of (state, action) of different lengths; the tails are junk."""
    state = jnp.array([[0, 1, 0, 0], [1, 0, 2, 2], [1, 1, 0, 2]])
    action = jnp.array([[0, 1, 1, 1], [0, 2, 0, 0], [0, 2, 0, 1]])
    mask = jnp.array([[True] * 4, [True, True, False, False], [True] * 3 + [False]])
    # state 0: actions 0, 1, 1, 2, 0; state 1: actions 1, 0, 0, 2; state 2: never
    counts = jnp.array([[2.0, 2.0, 1.0], [2.0, 1.0, 1.0]])
    return (state, action), mask, counts


def table_log_probs(table, row):
    state, action = row
    return Categorical(table[state]).log_prob(action)


def test_cloning_recovers_the_demonstrators_frequencies(float64):
    rows, mask, counts = demonstrations()
    table = jax.random.normal(jax.random.key(0), (3, 3))
    slope = jax.grad(behaviour_cloning, 1)

    def step(table, _):
        return table + slope(table_log_probs, table, rows, mask), None

    found = jax.jit(lambda x: jax.lax.scan(step, x, None, 1000)[0])(table)
    frequencies = counts / jnp.sum(counts, axis=1, keepdims=True)
    close(jax.nn.softmax(found)[:2], frequencies, rtol=1e-9)
    close(found[2], table[2])  # nobody showed what to do there


@pytest.mark.parametrize(("per", "divisor"), [("trajectory", 3), ("decision", 9)])
def test_cloning_has_its_closed_form_at_the_maximum(per, divisor, float64):
    rows, mask, counts = demonstrations()
    frequencies = counts / jnp.sum(counts, axis=1, keepdims=True)
    best = jnp.concatenate([jnp.log(frequencies), jnp.zeros((1, 3))])

    def value(table):
        return behaviour_cloning(table_log_probs, table, rows, mask, per=per)

    close(value(best), jnp.sum(counts * jnp.log(frequencies)) / divisor)
    close(jax.grad(value)(best), jnp.zeros((3, 3)), atol=1e-14)
    assert np.linalg.norm(jax.grad(value)(0.5 * best)) > 1e-2


def test_cloning_of_packed_rows_and_of_nothing():
    rows, mask, _ = demonstrations()
    table = jax.random.normal(jax.random.key(0), (3, 3))
    apart = behaviour_cloning(table_log_probs, table, rows, mask)
    packed, packed_mask = jax.tree.map(lambda x: x.reshape(1, -1), (rows, mask))
    joined = behaviour_cloning(
        table_log_probs, table, packed, packed_mask, num_trajectories=jnp.array(3)
    )
    np.testing.assert_allclose(joined, apart, rtol=1e-6)
    for per in ("trajectory", "decision"):
        assert 0.0 == behaviour_cloning(
            table_log_probs, table, rows, jnp.zeros_like(mask), per=per
        )


# Entropy.


def test_entropy_bonus_by_hand():
    half = np.log(2.0)
    policy = from_apply(
        lambda key, obs: (), lambda _, obs: obs, categorical_head(Discrete(2))
    )
    params = policy.init(jax.random.key(0), jnp.zeros(2))
    obs = jnp.array([[[0.0, 0.0], [-jnp.inf, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    rows = bare_rows(obs, jnp.array([[True, True], [True, False]]))
    value = entropy_bonus(policy, params, rows)
    np.testing.assert_allclose(value, (half + 0.0 + half) / 2, rtol=1e-6)
    single = entropy_bonus(policy, params, rows, num_trajectories=1)
    np.testing.assert_allclose(single, 2 * half, rtol=1e-6)


def bare_rows(obs, mask):
    zeros, index = jnp.zeros(mask.shape), jnp.zeros(mask.shape, jnp.int32)
    no = jnp.zeros(mask.shape, bool)
    time = index + jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    return Trajectory(obs, index, zeros, zeros, no, no, mask, time, index)


def entropies(mdp, policy, params):
    p = exact.action_probabilities(mdp, policy, params)
    return -jnp.sum(p * jnp.log(p), axis=1)


def test_entropy_bonus_holds_the_visits_constant(float64):
    """Its derivative is that with the states' distribution held, not the whole one."""
    mdp, policy, params = world()
    visits = exact.occupancies(mdp, policy, params)

    def held(params):
        return jnp.einsum("ts,s->", visits, entropies(mdp, policy, params))

    def whole(params):
        now = exact.occupancies(mdp, policy, params)
        return jnp.einsum("ts,s->", now, entropies(mdp, policy, params))

    def bonus(rows):
        return jax.value_and_grad(entropy_bonus, 1)(policy, params, rows)

    value, slope = mean_over_paths(mdp, policy, params, bonus)
    close(value, whole(params))
    slope, held, whole = (
        ravel_pytree(x)[0]
        for x in (slope, quick(jax.grad(held))(params), quick(jax.grad(whole))(params))
    )
    close(slope, held)
    assert differ(slope, whole)


def regularised(mdp, policy, params, discount, temperature):
    """E[sum_t discount^t (r + temperature * H)], every path with its probability."""
    paths = exact.enumerate_trajectories(mdp)
    rows, entropy = paths.trajectories, entropies(mdp, policy, params)
    log_probs = exact.with_log_probs(rows, policy, params).log_prob
    chance = jnp.exp(jnp.sum(jnp.where(rows.mask, log_probs, 0.0), axis=1))
    gains = (
        rows.reward + temperature * entropy[rows.obs]
    ) * discount ** rows.time.astype(float)
    returns = jnp.sum(jnp.where(rows.mask, gains, 0.0), axis=1)
    return jnp.sum(paths.world_probability * chance * returns)


def to_go_weights(rows, rewards, discount):
    """discount^t times the reward-to-go, 0 in empty slots."""

    def of_row(row, rewards):
        discounts = step_discounts(row.ends, row.mask, discount)
        to_go = rewards_to_go(jnp.where(row.mask, rewards, 0.0), discounts)
        factors = leading_discounts(row.time, discount)
        return jnp.where(row.mask, factors * to_go, 0.0)

    return jax.vmap(of_row)(rows, rewards)


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_entropy_rewards_give_the_exact_regularised_gradient(discount, float64):
    mdp, policy, params = world()
    temperature, fn = 0.7, log_prob_fn(policy)

    def estimate(rows):
        added = entropy_rewards(rows.log_prob, rows.mask, temperature)
        weights = to_go_weights(rows, rows.reward + added, discount)
        return score_gradient(fn, params, rows, weights)

    mean = mean_over_paths(mdp, policy, params, estimate)
    objective = jax.grad(lambda p: regularised(mdp, policy, p, discount, temperature))
    expected = ravel_pytree(quick(objective)(params))[0]
    close(ravel_pytree(mean)[0], expected)
    plain = exact.policy_gradient(mdp, policy, params, discount)
    assert differ(ravel_pytree(plain)[0], expected), "the entropy must matter here"


def test_entropy_rewards_are_numbers_and_nothing_in_empty_slots():
    log_probs, mask = jnp.array([-2.0, jnp.nan]), jnp.array([True, False])
    assert entropy_rewards(log_probs, mask, 0.5).tolist() == [1.0, 0.0]
    slope = jax.grad(lambda x: jnp.sum(entropy_rewards(x, mask, 0.5)))(log_probs)
    assert slope.tolist() == [0.0, 0.0]


def squashed_policy():
    def distribution(params, mean):
        return TanhGaussian(mean, jnp.broadcast_to(params, mean.shape))

    box = Box(-1, 1, (1,))
    head = Head(1, lambda: jnp.array(-0.5), distribution, box)
    return from_apply(lambda key, obs: (), lambda _, obs: obs, head)


def test_sampled_entropy_is_unbiased_and_differs_from_slot_to_slot():
    """Within 4 standard errors of quadrature; 4096 keys from key(0)."""
    policy = squashed_policy()
    params = policy.init(jax.random.key(0), jnp.zeros(1))
    rows = bare_rows(jnp.full((1, 2, 1), 0.3), jnp.ones((1, 2), bool))
    keys = jax.random.split(jax.random.key(0), 4096)

    def value(params, key):
        return entropy_bonus(policy, params, rows, key=key)

    draws = jax.vmap(value, (None, 0))(params, keys)
    z = np.linspace(-8, 8, 20001)
    normal = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    pre = 0.3 + np.exp(-0.5) * z
    log_density = np.log(normal) + 0.5 - np.log(1 - np.tanh(pre) ** 2)
    expected = -2 * np.sum(normal * log_density) * (z[1] - z[0])
    error = np.std(draws) / np.sqrt(4096)
    assert abs(np.mean(draws) - expected) < 4 * error
    # two slots with draws of their own: variances add, not standard deviations
    single = bare_rows(rows.obs[:, :1], rows.mask[:, :1])
    lone = jax.vmap(lambda k: entropy_bonus(policy, params, single, key=k))(keys)
    np.testing.assert_allclose(np.var(draws), 2 * np.var(lone), rtol=0.15)


# The magic box.


def test_magic_box_is_one_and_differentiates_like_a_likelihood_ratio():
    """All derivatives of p(theta) / p(now), here of theta², at now = 3."""

    def ratio(x):
        return magic_box(2.0 * jnp.log(x))

    first, second = jax.grad(ratio), jax.grad(jax.grad(ratio))
    values = [fn(3.0).item() for fn in (ratio, first, second, jax.grad(second))]
    np.testing.assert_allclose(values, [1.0, 6 / 9, 2 / 9, 0.0], atol=1e-6)
    assert magic_box(jnp.array([-1e30, 1e4])).tolist() == [1.0, 1.0]


def hessians(fn, params):
    of_vector, vector = on_vectors(fn, params)
    return jax.hessian(of_vector)(vector)


def derivatives(fn, params):
    of_vector, vector = on_vectors(fn, params)
    return (
        of_vector(vector),
        jax.grad(of_vector)(vector),
        jax.hessian(of_vector)(vector),
    )


def all_derivatives(objective, params):
    return quick(lambda p: derivatives(objective, p))(params)


def with_each_baseline(b):
    """Settings of the objective: no baseline, and both orders of one."""
    return {
        "none": {},
        "any": {"baseline": b, "baseline_order": "any"},
        "first": {"baseline": b, "baseline_order": "first"},
    }


@pytest.mark.parametrize("discount", [1.0, 0.8])
@pytest.mark.thinned(2)
def test_value_gradient_and_hessian_are_exact_in_the_mean(discount, float64):
    mdp, policy, params = world()
    fn = log_prob_fn(policy)
    values = state_values(mdp, policy, params, discount)

    def estimate(rows):
        def of(settings):
            return derivatives(
                lambda p: dice_objective(fn, p, rows, discount=discount, **settings),
                params,
            )

        cases = with_each_baseline(values[rows.time, rows.obs])
        return {name: of(settings) for name, settings in cases.items()}

    means = mean_over_paths(mdp, policy, params, estimate)
    expected = all_derivatives(
        lambda p: exact.expected_return(mdp, policy, p, discount), params
    )
    assert min(np.linalg.norm(x) for x in expected[1:]) > 0.1
    for mean in means.values():
        for got, wanted in zip(mean, expected, strict=True):
            close(got, wanted, atol=1e-11)


def test_third_derivative_is_exact_in_the_mean(float64):
    mdp, policy, params = world(one_parameter_policy)
    fn = log_prob_fn(policy)
    values = state_values(mdp, policy, params, 1.0)

    def third(objective):
        of_vector, vector = on_vectors(objective, params)
        return jax.grad(jax.grad(jax.grad(lambda x: of_vector(x[None]))))(vector[0])

    def estimate(rows):
        b = values[rows.time, rows.obs]
        return [
            third(lambda p: dice_objective(fn, p, rows)),
            third(lambda p: dice_objective(fn, p, rows, baseline=b)),
        ]

    expected = quick(lambda: third(lambda p: exact.expected_return(mdp, policy, p)))()
    assert abs(expected) > 1e-3
    for got in mean_over_paths(mdp, policy, params, estimate):
        close(got, expected)


def test_the_plain_surrogates_second_derivative_is_wrong(float64):
    mdp, policy, params = world()
    fn = log_prob_fn(policy)

    def estimate(rows):
        weights = to_go_weights(rows, rows.reward, 1.0)
        return hessians(lambda p: surrogate.surrogate(fn, p, rows, weights), params)

    mean = mean_over_paths(mdp, policy, params, estimate)
    *_, expected = all_derivatives(
        lambda p: exact.expected_return(mdp, policy, p), params
    )
    assert differ(mean, expected, share=0.3)


def test_its_first_derivative_is_the_score_gradient_row_by_row(float64):
    """Not only in the mean: discount^t (reward-to-go - b), in every sample."""
    mdp, policy, params = world()
    rows, fn = all_rows(mdp, policy, params), log_prob_fn(policy)
    factors = jnp.where(rows.mask, 0.8 ** rows.time.astype(float), 0.0)
    to_go = to_go_weights(rows, rows.reward, 0.8)
    b = jax.random.normal(jax.random.key(3), rows.mask.shape)

    def of_path(row, b, weights, factors):
        row, b = jax.tree.map(lambda x: x[None], (row, b))
        slopes = {
            name: jax.value_and_grad(
                lambda p, s=settings: dice_objective(fn, p, row, discount=0.8, **s)
            )(params)
            for name, settings in with_each_baseline(b).items()
        }
        without = score_gradient(fn, params, row, weights[None])
        with_b = score_gradient(fn, params, row, weights[None] - factors[None] * b)
        return slopes, without["network"], with_b["network"]

    slopes, without, with_b = quick(jax.vmap(of_path))(rows, b, to_go, factors)
    assert differ(with_b, without)
    for name, (value, slope) in slopes.items():
        close(value, jnp.sum(factors * rows.reward, axis=1))
        close(slope["network"], without if name == "none" else with_b)


def test_the_any_order_baseline_calms_the_hessian_more_than_the_first_order_one(
    float64,
):
    mdp, policy, params = world()
    fn = log_prob_fn(policy)
    values = state_values(mdp, policy, params, 1.0)

    def estimate(rows):
        def square(settings):
            hessian = hessians(
                lambda p: dice_objective(fn, p, rows, **settings), params
            )
            return jnp.sum(hessian**2)

        cases = with_each_baseline(values[rows.time, rows.obs])
        return {name: square(settings) for name, settings in cases.items()}

    means = mean_over_paths(mdp, policy, params, estimate)
    assert means["any"] < 0.8 * means["first"] and means["any"] < 0.8 * means["none"]


def test_rewards_that_depend_on_the_parameters_are_differentiated(float64):
    """With -log pi of theta as reward the Hessian is exact too; held constant not."""
    mdp, policy, params = world(horizon=2)
    fn = log_prob_fn(policy)

    def estimate(rows):
        def dice(p, hold):
            log_probs = jax.vmap(fn, (None, 0))(p, rows)
            held = entropy_rewards(log_probs, rows.mask, 0.7)
            reward = rows.reward + (held if hold else -0.7 * log_probs)
            return dice_objective(fn, p, rows._replace(reward=reward))

        return [hessians(lambda p, h=h: dice(p, h), params) for h in (False, True)]

    exact_one, held = mean_over_paths(mdp, policy, params, estimate)
    *_, expected = all_derivatives(
        lambda p: regularised(mdp, policy, p, 1.0, 0.7), params
    )
    close(exact_one, expected, atol=1e-11)
    assert differ(held, expected)


def test_no_derivative_flows_through_a_baseline():
    """Its slope is that of the same numbers given from outside."""
    fn, params, rows = plain_rows()
    rows = rows._replace(reward=jnp.ones((4, 3)))

    def value(x, baseline):
        return dice_objective(fn, x, rows, baseline=baseline)

    def inside(x):
        return value(x, x**2 * jnp.ones((4, 3)))  # 1 at x = 1, with a slope of 2

    outside = jax.grad(jax.grad(value))(params, jnp.ones((4, 3)))
    np.testing.assert_allclose(jax.grad(jax.grad(inside))(params), outside, rtol=1e-6)


# Storage: packed, padded, batched.


def a_few(num_rows=4):
    """Rows of different lengths, with a baseline."""
    mdp, policy, params = world()
    rows = all_rows(mdp, policy, params)
    some = jnp.linspace(0, rows.mask.shape[0] - 1, num_rows).astype(int)
    rows = jax.tree.map(lambda x: x[some], rows)
    assert len(set(jnp.sum(rows.mask, axis=1).tolist())) > 1
    baseline = jax.random.normal(jax.random.key(5), rows.mask.shape)
    return log_prob_fn(policy), params, rows, baseline


def dice(fn, rows, baseline, order="any", **settings):
    """The objective as a function of the parameters."""

    def objective(params):
        return dice_objective(
            *(fn, params, rows),
            discount=0.9,
            baseline=baseline,
            baseline_order=order,
            **settings,
        )

    return objective


@pytest.mark.parametrize("order", ["any", "first"])
def test_packed_episodes_are_the_same_as_apart(order, float64):
    fn, params, rows, baseline = a_few()
    apart = all_derivatives(dice(fn, rows, baseline, order), params)
    packed, joint = jax.tree.map(lambda x: x.reshape(2, -1), (rows, baseline))
    count = jnp.sum(packed.starts)
    assert count == 4
    joined = dice(fn, packed, joint, order, num_trajectories=count)
    for x, y in zip(all_derivatives(joined, params), apart, strict=True):
        close(x, y)


def test_what_lies_in_empty_slots_is_never_read(float64):
    fn, params, rows, baseline = a_few()
    clean = all_derivatives(dice(fn, rows, baseline), params)
    junk = rows._replace(
        reward=jnp.where(rows.mask, rows.reward, jnp.nan),
        action=jnp.where(rows.mask, rows.action, 99),  # log-probability -inf
        time=jnp.where(rows.mask, rows.time, 0),
    )
    dirty = dice(fn, junk, jnp.where(rows.mask, baseline, jnp.nan))
    for x, y in zip(all_derivatives(dirty, params), clean, strict=True):
        close(x, y)


def test_jit_and_vmap_change_nothing(float64):
    fn, params, rows, baseline = a_few()
    one = jax.jit(lambda p, r, b: jax.value_and_grad(dice(fn, r, b))(p))
    value, slope = jax.value_and_grad(dice(fn, rows, baseline))(params)
    jitted = one(params, rows, baseline)
    close(jitted[0], value)
    close(jitted[1]["network"], slope["network"])
    assert one._cache_size() == 1
    seeds = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
    both = jax.vmap(one, (0, None, None))(seeds, rows, baseline)
    half = one(jax.tree.map(lambda x: 0.5 * x, params), rows, baseline)
    close(both[0], jnp.stack([value, half[0]]))
    close(both[1]["network"], jnp.stack([slope["network"], half[1]["network"]]))


def test_nan_under_jit_shows_in_the_result():
    fn, params, rows, baseline = a_few()
    spoilt = baseline.at[0, 0].set(jnp.nan)
    value = jax.jit(lambda b: dice(fn, rows, b)(params))
    assert np.isfinite(value(baseline)) and np.isnan(value(spoilt))
    with pytest.raises(ValueError, match="baseline has 1 entries that are NaN"):
        jax.jit(dice(fn, rows, spoilt))(params)  # a constant: seen while tracing


# Refusals.


def refuse(name, *arguments, **settings):
    # Unwrapped: as users have it, without the tests' shape checker.
    return inspect.unwrap(getattr(surrogate, name))(*arguments, **settings)


def plain_rows():
    """Four rows of three decisions, and log-probabilities of one parameter."""
    rows = bare_rows(jnp.zeros((4, 3)), jnp.ones((4, 3), bool))
    return (lambda x, row: x * row.reward), 1.0, rows


ROWS, NANS = jnp.ones((2, 3)), jnp.full((2, 3), jnp.nan)
YES = jnp.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: refuse("surrogate", gaussian, 0.0, ROWS, ROWS[0]), r"weights\[None\]"),
        (lambda: refuse("surrogate", gaussian, 0.0, ROWS[:1], ROWS), "same B in front"),
        (lambda: refuse("surrogate", gaussian, 0.0, ROWS, ROWS[:, 1:]), "log_prob_fn"),
        (lambda: refuse("surrogate", gaussian, 0.0, ROWS, NANS), "weights has 6.*NaN"),
        (
            lambda: refuse("surrogate", gaussian, 0.0, ROWS, ROWS, num_trajectories=0),
            "num_trajectories is 0, needs",
        ),
        (lambda: refuse("cross_entropy", ROWS, jnp.zeros(3, int)), "one integer per"),
        (lambda: refuse("squared_error", ROWS, ROWS[0]), "actions has shape"),
        (lambda: refuse("squared_error", ROWS, ROWS, ROWS[0, :2]), "broadcast_to"),
        (lambda: refuse("squared_error", ROWS, ROWS, 0.0), "scale is 0.0, needs"),
        (lambda: refuse("squared_error", ROWS, ROWS, np.nan), "scale is nan, needs"),
        (
            lambda: refuse("behaviour_cloning", gaussian, 0.0, ROWS, ROWS),
            r"mask is float32, needs booleans; use mask.astype",
        ),
        (
            lambda: refuse("behaviour_cloning", gaussian, 0.0, ROWS, YES[0]),
            r"mask has shape \(3,\), needs \(B, T\)",
        ),
        (
            lambda: refuse("behaviour_cloning", gaussian, 0.0, ROWS, YES, per="step"),
            "per is 'step', unknown",
        ),
        (
            lambda: refuse(
                "behaviour_cloning",
                *(gaussian, 0.0, ROWS, YES),
                per="decision",
                num_trajectories=2,
            ),
            "leave num_trajectories out",
        ),
        (lambda: refuse("entropy_rewards", ROWS, YES[0], 1.0), "mask has shape"),
        (lambda: refuse("entropy_rewards", ROWS, YES, -1.0), "temperature is -1.0"),
        (lambda: refuse("entropy_rewards", ROWS, YES, np.nan), "temperature is nan"),
    ],
)
def test_wrong_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"baseline": ROWS[0]}, r"baseline has shape \(3,\)"),
        ({"baseline": NANS[0, 0] * jnp.ones((4, 3))}, "baseline has .* NaN"),
        ({"baseline_order": "second"}, "baseline_order is 'second', unknown"),
        ({"discount": 1.5}, "discount is 1.5, needs"),
        ({"discount": np.nan}, "discount is nan, needs"),
        ({"num_trajectories": 0}, "num_trajectories is 0"),
    ],
)
def test_dice_refuses_wrong_settings(settings, words):
    fn, params, rows = plain_rows()
    with pytest.raises(ValueError, match=words):
        refuse("dice_objective", fn, params, rows, **settings)


def test_dice_refuses_wrong_rows():
    fn, params, rows = plain_rows()
    one = jax.tree.map(lambda x: x[0], rows)
    with pytest.raises(ValueError, match=r"rows.reward has shape \(3,\), needs"):
        refuse("dice_objective", fn, params, one)
    with pytest.raises(ValueError, match="log_prob_fn gives has shape"):
        refuse("dice_objective", lambda p, row: fn(p, row)[1:], params, rows)
    bad = rows._replace(reward=jnp.full_like(rows.reward, jnp.nan))
    with pytest.raises(ValueError, match=r"rows.reward has .* NaN"):
        refuse("dice_objective", fn, params, bad)


def test_entropy_bonus_refuses_missing_and_idle_keys_and_lone_rows():
    policy, key = squashed_policy(), jax.random.key(0)
    params = policy.init(key, jnp.zeros(1))
    rows = bare_rows(jnp.zeros((1, 2, 1)), jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match=r"TanhGaussian has no closed.*pass key="):
        refuse("entropy_bonus", policy, params, rows)
    closed = from_apply(
        lambda key, obs: (), lambda _, obs: obs, categorical_head(Discrete(1))
    )
    mine = closed.init(key, jnp.zeros(1))
    with pytest.raises(ValueError, match=r"Categorical has a closed.*leave it out"):
        refuse("entropy_bonus", closed, mine, rows, key=key)
    with pytest.raises(ValueError, match=r"rows.mask has shape \(2,\), needs"):
        refuse("entropy_bonus", closed, mine, jax.tree.map(lambda x: x[0], rows))
