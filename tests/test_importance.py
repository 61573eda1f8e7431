"""Off-policy weights against the exact gradient and against their own exact limits.

Trajectories of a behaviour policy are enumerated in float64; nothing is sampled. The
exact forms must match the gradient of the policy that is asked about; a form that drops
ratios must match the gradient with the states and values that it keeps, and must NOT
match the exact one.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpg import exact, importance
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import random_mdp
from jaxpg.gradients import score_gradient
from jaxpg.policies import log_prob_fn, tabular_policy
from jaxpg.returns import episode_returns, rewards_to_go, step_discounts

MDP_SETTINGS = {"seed": 5, "num_states": 3, "horizon": 3}


def make_policy(mdp):
    return tabular_policy(*(Discrete(n) for n in mdp.reward.shape))


def whole_total(row, log_rhos, discounts):
    weights = importance.to_weights(
        importance.episode_log_rhos(log_rhos, row.ends, row.time)
    )
    return weights * episode_returns(row.reward, discounts, row.time)


def whole_to_go(row, log_rhos, discounts):
    weights = importance.to_weights(
        importance.episode_log_rhos(log_rhos, row.ends, row.time)
    )
    return weights * rewards_to_go(row.reward, discounts)


def causal(row, log_rhos, discounts):
    return importance.causal_weights(row.reward, discounts, log_rhos, row.time)


def future_dropped(row, log_rhos, discounts):
    weights = importance.to_weights(importance.cumulative_log_rhos(log_rhos, row.time))
    return weights * rewards_to_go(row.reward, discounts)


def past_dropped(row, log_rhos, discounts):
    return importance.past_dropped_weights(row.reward, discounts, log_rhos)


def past_dropped_whole(row, log_rhos, discounts):
    """prod_{u >= t} rho[u] * G[t]: the non-causal form of the same thing."""
    del discounts
    later = rewards_to_go(log_rhos, step_discounts(row.ends, row.mask, 1.0))
    to_go = rewards_to_go(row.reward, step_discounts(row.ends, row.mask, 1.0))
    return importance.to_weights(later) * to_go


def first_order(row, log_rhos, discounts):
    return importance.to_weights(log_rhos) * rewards_to_go(row.reward, discounts)


def double_counted(row, log_rhos, discounts):
    """The causal form as slides print it, with the inner product from u = t on."""
    return importance.to_weights(log_rhos) * causal(row, log_rhos, discounts)


TARGET, BEHAVIOUR = "target", "behaviour"
EXACT = (TARGET, TARGET)
TABLE = {
    "whole trajectory, total return": (whole_total, EXACT),
    "whole trajectory, reward-to-go": (whole_to_go, EXACT),
    "causal": (causal, EXACT),
    "future dropped": (future_dropped, (TARGET, BEHAVIOUR)),
    "past dropped": (past_dropped, (BEHAVIOUR, TARGET)),
    "past dropped, not causal": (past_dropped_whole, (BEHAVIOUR, TARGET)),
    "first order": (first_order, (BEHAVIOUR, BEHAVIOUR)),
    "counted twice": (double_counted, None),
}


def mean_of(form, max_rho=None):
    """The form's exact mean, and the two policies' parameters."""
    mdp = random_mdp(**MDP_SETTINGS)
    policy = make_policy(mdp)
    obs = jnp.zeros((), jnp.int32)
    params = {
        name: policy.init(jax.random.key(i), obs)
        for i, name in enumerate((TARGET, BEHAVIOUR))
    }
    log_probs = log_prob_fn(policy)

    def estimate(rows):
        def weights(row):
            log_rhos = importance.log_ratios(
                log_probs(params[TARGET], row), row.log_prob, row.mask
            )
            if max_rho is not None:
                log_rhos = importance.truncate_log_rhos(log_rhos, max_rho)
            discounts = step_discounts(row.ends, row.mask, 1.0)
            return jnp.where(row.mask, form(row, log_rhos, discounts), 0.0)

        return score_gradient(log_probs, params[TARGET], rows, jax.vmap(weights)(rows))

    mean = exact.expected_estimate(estimate, mdp, policy, params[BEHAVIOUR], 1)
    return flat(mean), mdp, policy, params


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.thinned(3)
def test_mean_is_the_declared_limit(name, float64):
    form, limit = TABLE[name]
    mean, mdp, policy, params = mean_of(form)
    gradient = flat(exact.policy_gradient(mdp, policy, params[TARGET]))
    if limit is not None:
        states, values = (params[who] for who in limit)
        expected = exact.mixed_gradient(mdp, policy, params[TARGET], states, values)
        np.testing.assert_allclose(mean, flat(expected), rtol=1e-10, atol=1e-12)
    if limit == EXACT:
        np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12)
    else:
        distance = np.linalg.norm(mean - gradient)
        assert distance > 1e-2 * np.linalg.norm(gradient)


def test_truncation_biases_where_it_binds_and_nowhere_else(float64):
    mean, mdp, policy, params = mean_of(causal, max_rho=1.2)
    gradient = flat(exact.policy_gradient(mdp, policy, params[TARGET]))
    assert np.linalg.norm(mean - gradient) > 1e-2 * np.linalg.norm(gradient)
    mean, *_ = mean_of(causal, max_rho=1e6)
    np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12)


def test_values_and_visits_give_the_return(float64):
    mdp = random_mdp(**MDP_SETTINGS)
    policy = make_policy(mdp)
    params = policy.init(jax.random.key(0), jnp.zeros((), jnp.int32))
    probabilities = exact.action_probabilities(mdp, policy, params)
    visits = exact.occupancies(mdp, policy, params)
    value = exact.expected_return(mdp, policy, params)
    rewards = jnp.einsum("ts,sa,sa->", visits, probabilities, mdp.reward)
    np.testing.assert_allclose(rewards, value, rtol=1e-12)
    q = exact.action_values(mdp, policy, params)
    start = jnp.einsum("s,sa,sa->", mdp.initial, probabilities, q[0])
    np.testing.assert_allclose(start, value, rtol=1e-12)


def packed_row():
    """Two episodes, of two and of three decisions, then an empty slot."""
    time = jnp.array([0, 1, 0, 1, 2, 0])
    ends = jnp.array([False, True, False, False, True, False])
    mask = jnp.array([True] * 5 + [False])
    return time, ends, mask


def test_joined_episodes_are_the_same_as_apart():
    time, ends, mask = packed_row()
    log_rhos = jnp.where(mask, jnp.arange(6.0) - 2.0, 0.0)
    rewards = jnp.where(mask, jnp.arange(6.0) + 1.0, 0.0)
    discounts = step_discounts(ends, mask, 0.9)

    def all_forms(some):
        t, e, r, d, x = (v[some] for v in (time, ends, rewards, discounts, log_rhos))
        return [
            importance.cumulative_log_rhos(x, t),
            importance.episode_log_rhos(x, e, t),
            importance.causal_weights(r, d, x, t),
            importance.past_dropped_weights(r, d, x),
        ]

    parts = zip(all_forms(slice(0, 2)), all_forms(slice(2, 5)), strict=True)
    for joined, apart in zip(all_forms(slice(0, 5)), parts, strict=True):
        np.testing.assert_allclose(joined, np.concatenate(apart), rtol=1e-6)


@given(
    st.lists(
        st.sampled_from([-np.inf, -1e4, -50.0, 0.0, 50.0, 1e4, np.inf]),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([-1e3, 0.0, 1e3]),
)
@settings(max_examples=60, deadline=None)
def test_extreme_ratios_give_finite_weights(values, reward):
    padded = jnp.asarray(values + [0.0] * (6 - len(values)), jnp.float32)
    mask = jnp.arange(6) < len(values)
    for weights in _all_weights(padded, mask, reward):
        assert np.isfinite(weights).all()


@jax.jit
def _all_weights(log_rhos, mask, reward):
    time = jnp.arange(6)
    ends = mask & ~jnp.concatenate([mask[1:], jnp.zeros(1, bool)])
    rewards = jnp.where(mask, reward, 0.0).astype(jnp.float32)
    discounts = step_discounts(ends, mask, 1.0)
    to_weights = importance.to_weights
    return [
        to_weights(importance.cumulative_log_rhos(log_rhos, time)) * rewards,
        to_weights(importance.episode_log_rhos(log_rhos, ends, time)) * rewards,
        importance.causal_weights(rewards, discounts, log_rhos, time),
        importance.past_dropped_weights(rewards, discounts, log_rhos),
        importance.effective_sample_size(log_rhos),
    ]


def test_an_impossible_action_does_not_spoil_its_neighbours():
    time, ends = jnp.array([0, 0]), jnp.array([True, True])
    log_rhos = jnp.array([-jnp.inf, 0.5])
    cumulative = importance.to_weights(importance.cumulative_log_rhos(log_rhos, time))
    whole = importance.episode_log_rhos(log_rhos, ends, time)
    expected = [0.0, np.exp(0.5)]
    np.testing.assert_allclose(cumulative, expected, rtol=1e-6)
    np.testing.assert_allclose(importance.to_weights(whole), expected, rtol=1e-6)


def test_effective_sample_size_by_hand():
    # weights 1 and 3: (1 + 3)^2 / (1 + 9) = 1.6; one giant is worth one sample
    log_weights = jnp.log(jnp.array([1.0, 3.0]))
    value = importance.effective_sample_size(log_weights)
    np.testing.assert_allclose(value, 1.6, rtol=1e-6)
    giant = importance.effective_sample_size(jnp.array([0.0, 1e4]))
    np.testing.assert_allclose(giant, 1.0)


def test_no_derivative_flows_through_ratios():
    def loss(log_prob):
        row = jnp.stack([log_prob, log_prob])
        return importance.log_ratios(row, jnp.zeros(2), jnp.ones(2, bool)).sum()

    assert jax.grad(loss)(1.0) == 0.0


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        ("truncate_log_rhos", (jnp.zeros(2), -1.0), "max_rho is -1.0, needs"),
        ("log_of_ratios", (jnp.array([1.0, -2.0]),), "rhos holds -2, needs"),
        ("log_of_ratios", (jnp.array([jnp.nan]),), "rhos has 1 entries that are NaN"),
        ("cumulative_log_rhos", (jnp.zeros(2), jnp.zeros(3, int)), "time has shape"),
        ("cumulative_log_rhos", (jnp.zeros((1, 2)), jnp.zeros((1, 2), int)), "vmap"),
        ("effective_sample_size", (jnp.zeros((1, 2)),), "log_weights has shape"),
    ],
)
def test_wrong_input_is_refused(function, arguments, words):
    # Unwrapped: as users have it, without the tests' shape checker.
    call = inspect.unwrap(getattr(importance, function))
    with pytest.raises(ValueError, match=words):
        call(*arguments)
