"""Every estimator against the exact gradient, by enumeration of all batches.

Nothing is sampled: the mean over all N-tuples of trajectories of a small world is the
estimator's expectation. A row of the table declares its bias, a factor or "biased":
a biased row must then FAIL to be the exact gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import exact
from jaxpg.algos.reinforce import (
    ReinforceConfig,
    make_baseline,
    reinforce_credit,
    reinforce_gradient,
)
from jaxpg.baselines import constant_baseline
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import random_mdp
from jaxpg.gradients import score_gradient
from jaxpg.policies import categorical_head, from_apply, log_prob_fn

pytestmark = pytest.mark.usefixtures("float64")

UNBIASED = 1.0


class Row(NamedTuple):
    credit: str
    baseline: str
    batch_size: int
    declared: float | str
    settings: tuple = ()


TABLE = [
    Row("total-return", "none", 1, UNBIASED),
    Row("total-return", "none", 2, UNBIASED),
    Row("total-return", "constant", 1, UNBIASED),
    Row("total-return", "leave-one-out", 2, UNBIASED),
    Row("total-return", "leave-one-out", 3, UNBIASED),
    Row("total-return", "batch-mean", 2, 1 / 2),
    Row("total-return", "batch-mean", 3, 2 / 3),
    Row("reward-to-go", "none", 1, UNBIASED),
    Row("reward-to-go", "none", 2, UNBIASED),
    Row("reward-to-go", "constant", 1, UNBIASED),
    Row("reward-to-go", "leave-one-out", 2, UNBIASED),
    Row("reward-to-go", "leave-one-out", 3, UNBIASED),
    Row("reward-to-go", "batch-mean", 2, 1 / 2),
    Row("reward-to-go", "batch-mean", 3, 2 / 3),
    Row("reward-to-go", "time-dependent", 1, UNBIASED),
    Row("reward-to-go", "time-dependent", 2, UNBIASED),
    Row("reward-to-go", "time-dependent", 3, UNBIASED),
    Row("reward-to-go", "time-dependent-plain", 2, "biased"),
    Row("total-return", "time-dependent", 2, UNBIASED),
    Row("reward-to-go", "leave-one-out", 2, "biased", (("standardize", True),)),
    Row("reward-to-go", "none", 2, "biased", (("discount", 0.7),)),
    Row(
        "reward-to-go",
        "none",
        2,
        UNBIASED,
        (("discount", 0.7), ("keep_leading_discount", True)),
    ),
    Row("total-return", "leave-one-out", 2, UNBIASED, (("discount", 0.7),)),
]


def world(batch_size):
    """Small enough for all batches: fewer decisions where batches are larger."""
    num_states, horizon = {1: (3, 4), 2: (3, 2), 3: (2, 2)}[batch_size]
    return random_mdp(seed=3, num_states=num_states, horizon=horizon)


def tabular_policy(mdp):
    num_states, num_actions = mdp.reward.shape

    def init(key, obs):
        return jax.random.normal(key, (num_states, num_actions))

    head = categorical_head(Discrete(num_actions))
    return from_apply(init, lambda table, state: table[state], head)


def make(name, max_steps):
    if name == "constant":
        return constant_baseline(0.8)
    return make_baseline(name, max_steps)


def mean_and_exact(row, config):
    mdp = world(row.batch_size)
    policy = tabular_policy(mdp)
    params = policy.init(jax.random.key(1), jnp.zeros((), jnp.int32))
    baseline = make(row.baseline, mdp.horizon)

    def estimate(trajectories):
        return reinforce_gradient(config, policy, baseline, params, (), trajectories)[0]

    mean = exact.expected_estimate(estimate, mdp, policy, params, row.batch_size)
    gradient = exact.policy_gradient(mdp, policy, params, config.discount)
    return flat(mean), flat(gradient)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("row", TABLE, ids=lambda r: "-".join(map(str, r)))
def test_mean_is_the_exact_gradient_up_to_its_declared_bias(row):
    config = ReinforceConfig(credit=row.credit, chunk_size=None, **dict(row.settings))
    mean, gradient = mean_and_exact(row, config)
    assert np.linalg.norm(gradient) > 0.1, "the test world must have a gradient"
    if row.declared == "biased":
        assert np.linalg.norm(mean - gradient) > 1e-3 * np.linalg.norm(gradient)
    else:
        np.testing.assert_allclose(
            mean, row.declared * gradient, rtol=1e-10, atol=1e-12
        )


def test_plain_time_dependent_baseline_is_scaled_step_by_step():
    """Step t is scaled by 1 - E[1/n_t | alive]: for N = 2, 1 - (1 - P(other)/2)."""
    row = Row("reward-to-go", "time-dependent-plain", 2, "biased")
    mdp = world(2)
    policy = tabular_policy(mdp)
    params = policy.init(jax.random.key(1), jnp.zeros((), jnp.int32))
    paths = exact.enumerate_trajectories(mdp)
    rows = exact.with_log_probs(paths.trajectories, policy, params)
    own = jnp.exp(jnp.sum(jnp.where(rows.mask, rows.log_prob, 0.0), axis=1))
    alive = (paths.world_probability * own) @ rows.mask.astype(float)
    factors = 1.0 - ((1.0 - alive) + alive / 2.0)

    def scaled(trajectories):
        credit = reinforce_credit(trajectories)
        weights = jnp.where(trajectories.mask, credit * factors[trajectories.time], 0.0)
        return score_gradient(log_prob_fn(policy), params, trajectories, weights)

    expected = exact.expected_estimate(scaled, mdp, policy, params, 1)
    mean, _ = mean_and_exact(row, ReinforceConfig(chunk_size=None))
    np.testing.assert_allclose(mean, flat(expected), rtol=1e-10, atol=1e-12)


def test_probabilities_of_all_paths_sum_to_one():
    mdp = world(1)
    policy = tabular_policy(mdp)
    params = policy.init(jax.random.key(1), jnp.zeros((), jnp.int32))
    one = exact.expected_estimate(lambda rows: jnp.ones(()), mdp, policy, params, 2)
    np.testing.assert_allclose(one, 1.0, rtol=1e-12)


def test_dynamic_programming_equals_enumeration():
    mdp = world(1)
    policy = tabular_policy(mdp)
    params = policy.init(jax.random.key(1), jnp.zeros((), jnp.int32))

    def discounted(rows):
        factors = 0.9 ** rows.time.astype(float)
        return jnp.sum(jnp.where(rows.mask, rows.reward * factors, 0.0))

    mean = exact.expected_estimate(discounted, mdp, policy, params, 1)
    value = exact.expected_return(mdp, policy, params, 0.9)
    np.testing.assert_allclose(mean, value, rtol=1e-12)


def test_gradient_equals_finite_differences():
    mdp = world(1)
    policy = tabular_policy(mdp)
    params = policy.init(jax.random.key(1), jnp.zeros((), jnp.int32))
    gradient = exact.policy_gradient(mdp, policy, params)["network"]
    step = 1e-6
    for index in np.ndindex(*gradient.shape):
        up, down = (
            {**params, "network": params["network"].at[index].add(sign * step)}
            for sign in (1.0, -1.0)
        )
        rise = exact.expected_return(mdp, policy, up) - exact.expected_return(
            mdp, policy, down
        )
        np.testing.assert_allclose(gradient[index], rise / (2 * step), atol=1e-8)


def test_a_total_return_is_not_discounted_twice():
    with pytest.raises(ValueError, match="counts discount\\^t already"):
        ReinforceConfig(credit="total-return", discount=0.7, keep_leading_discount=True)
