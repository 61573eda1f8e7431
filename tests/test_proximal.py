"""Proximal surrogates by hand, and their derivative where pi = mu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import exact
from jaxpg.credit import credit_of
from jaxpg.distributions import Categorical
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import canonical_mdp
from jaxpg.policies import log_prob_fn, tabular_policy
from jaxpg.proximal import clipped_surrogate, kl_penalty_surrogate

YES = jnp.ones((1, 1), bool)


@pytest.mark.parametrize(
    ("rho", "advantage", "value", "slope"),
    [
        # slope: d/d log pi = rho A where it is not clipped, else 0
        (1.1, 2.0, 2.2, 2.2),
        (3.0, 2.0, 2.4, 0.0),  # gone far enough up: held at 1.2
        (3.0, -2.0, -6.0, -6.0),  # gone up by mistake: pulled back
        (0.5, 2.0, 1.0, 1.0),  # gone down by mistake: pulled back
        (0.5, -2.0, -1.6, 0.0),  # gone far enough down: held at 0.8
    ],
)
def test_clipping_by_hand(rho, advantage, value, slope):
    def surrogate(log_prob):
        return clipped_surrogate(
            log_prob, jnp.zeros((1, 1)), jnp.full((1, 1), advantage), YES
        )

    log_prob = jnp.full((1, 1), np.log(rho), jnp.float32)
    found, derivative = jax.value_and_grad(surrogate)(log_prob)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(derivative[0, 0], slope, rtol=1e-6)


def mine():
    mdp = canonical_mdp()
    policy = tabular_policy(*(Discrete(n) for n in mdp.reward.shape))
    params, other = (
        policy.init(jax.random.key(i), jnp.array(0, jnp.int32)) for i in (1, 2)
    )
    return mdp, policy, params, other


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def kls_of(policy, params, behaviour, rows):
    old = jax.vmap(policy.unroll, (None, 0))(behaviour, rows)
    new = jax.vmap(policy.unroll, (None, 0))(params, rows)
    return jax.vmap(jax.vmap(Categorical.kl))(old, new)


def derivative(name, policy, params, behaviour, rows):
    def surrogate(params):
        log_probs = jax.vmap(log_prob_fn(policy), (None, 0))(params, rows)
        arguments = (log_probs, rows.log_prob, credit_of(rows).value)
        if name == "clipped":
            return clipped_surrogate(*arguments, rows.mask)
        kls = kls_of(policy, params, behaviour, rows)
        return kl_penalty_surrogate(*arguments, kls, rows.mask, coefficient=5.0)

    return jax.grad(surrogate)(params)


@pytest.mark.parametrize("name", ["clipped", "penalised"])
def test_where_the_policies_agree_it_is_the_policy_gradient(name, float64):
    mdp, policy, params, _ = mine()
    mean = exact.expected_estimate(
        lambda rows: derivative(name, policy, params, params, rows),
        mdp,
        policy,
        params,
        1,
    )
    gradient = exact.policy_gradient(mdp, policy, params)
    np.testing.assert_allclose(flat(mean), flat(gradient), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["clipped", "penalised"])
def test_elsewhere_it_is_biased(name, float64):
    mdp, policy, params, behaviour = mine()
    mean = exact.expected_estimate(
        lambda rows: derivative(name, policy, params, behaviour, rows),
        mdp,
        policy,
        behaviour,
        1,
    )
    gradient = flat(exact.policy_gradient(mdp, policy, params))
    assert np.linalg.norm(flat(mean) - gradient) > 1e-2 * np.linalg.norm(gradient)


@pytest.mark.parametrize("log_rho", [-1e4, 1e4, np.inf, -np.inf])
def test_extreme_ratios_and_empty_slots_leave_it_finite(log_rho):
    log_probs = jnp.array([[log_rho, jnp.nan]], jnp.float32)
    mask = jnp.array([[True, False]])
    advantages = jnp.array([[2.0, jnp.nan]])

    def surrogate(x):
        return clipped_surrogate(x, jnp.zeros((1, 2)), advantages, mask)

    value, slope = jax.value_and_grad(surrogate)(log_probs)
    assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0, needs"),
        ({"advantages": jnp.array([[jnp.nan]])}, "advantages has 1 entries that are"),
        ({"advantages": jnp.ones((1, 2))}, "advantages has shape"),
    ],
)
def test_wrong_input_is_refused(changes, words, monkeypatch):
    from jaxtyping import config

    # As users have it, without the shape checker that the tests wrap around it.
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    arguments = {
        "log_probs": jnp.zeros((1, 1)),
        "behaviour_log_probs": jnp.zeros((1, 1)),
        "advantages": jnp.ones((1, 1)),
        "mask": YES,
    }
    with pytest.raises(ValueError, match=words):
        clipped_surrogate(**(arguments | changes))
