"""Leaving oneself out in float32, where one trajectory can outweigh all others."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.baselines import (
    apply_baseline,
    leave_one_out_baseline,
    time_dependent_baseline,
)
from jaxpg.credit import Credit
from jaxpg.leave_out import (
    FOLDS,
    fold_of,
    mean_of_others,
    other_folds,
    sums_by_time,
    sums_of_rows,
    whole,
)
from jaxpg.optimal import optimal_baseline
from jaxpg.types import Trajectory


def one_step(number):
    """Rows of one decision each, with episodes numbered."""
    zeros, yes = jnp.zeros((number, 1)), jnp.ones((number, 1), bool)
    steps = jnp.zeros((number, 1), jnp.int32)
    ids = jnp.arange(number, dtype=jnp.int32)[:, None]
    return Trajectory(zeros, zeros, zeros, zeros, yes, ~yes, yes, steps, ids)


BASELINES = {
    "leave-one-out": leave_one_out_baseline(),
    "time-dependent": time_dependent_baseline(1),
    "optimal": optimal_baseline(lambda params, row: params * row.obs),
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_bandit_whose_ratios_differ_by_a_million_stays_unbiased(name):
    """Both arms pay 1, so the gradient is 0; pi = (.1, .9), mu(1) = 1e-6, N = 2.

    A baseline that is dropped where the OWN ratio is giant has a mean of about .09.
    """
    pi, mu = np.array([0.1, 0.9]), np.array([1 - 1e-6, 1e-6])
    scores = np.array([-0.9, 0.1])  # of the second arm's logit
    baseline, mean = BASELINES[name], 0.0
    for arms in itertools.product((0, 1), repeat=2):
        arms = np.array(arms)
        reach = jnp.asarray((pi / mu)[arms], jnp.float32)[:, None]
        rows = one_step(2)._replace(obs=jnp.asarray(scores[arms], jnp.float32)[:, None])
        weights = apply_baseline(
            baseline, jnp.array(1.0), (), rows, Credit(reach, reach)
        )
        estimate = (np.asarray(weights)[:, 0] * scores[arms]).mean()
        mean += mu[arms].prod() * estimate
    assert abs(mean) < 1e-6


def test_the_one_that_outweighs_all_has_the_others_mean():
    # The others weigh a ten millionth: their mean is 9 all the same.
    reach = jnp.array([1e7, 1.0, 1.0, 1.0])
    own = Credit(reach * jnp.array([10.0, 9.0, 9.0, 9.0]), reach)
    fold = fold_of(jnp.arange(4))
    sums = jax.tree.map(lambda x: sums_of_rows(x, fold), own)
    levels = mean_of_others(sums, own, fold)
    np.testing.assert_allclose(levels, [9.0, 10.0, 10.0, 10.0], rtol=1e-6)


def test_in_one_fold_with_a_giant_one_the_others_are_not_its_rounding():
    reach = jnp.array([1e9, 1.0])
    own = Credit(3.0 * reach, reach)
    fold = jnp.zeros(2, jnp.int32)
    sums = jax.tree.map(lambda x: sums_of_rows(x, fold), own)
    np.testing.assert_allclose(mean_of_others(sums, own, fold), [0.0, 3.0])


def test_other_folds_are_added_up_anew():
    sums = jnp.arange(FOLDS, dtype=jnp.float32) ** 2
    expected = [sum(k**2 for k in range(FOLDS) if k != f) for f in range(FOLDS)]
    np.testing.assert_array_equal(other_folds(sums), expected)
    np.testing.assert_array_equal(whole(sums), sum(k**2 for k in range(FOLDS)))


def test_a_large_batch_keeps_its_digits():
    """Added one after another, 2^18 returns of 1e4 are off by a dozen."""
    number = 2**18
    rows, returns = one_step(number), 1e4 + np.arange(number) % 3 - 1.0
    sums = sums_by_time(jnp.asarray(returns[:, None], jnp.float32), rows, 1)
    exact = returns.sum()
    np.testing.assert_allclose(float(whole(sums)[0]), exact, rtol=1e-6)


def test_decisions_later_than_max_steps_have_no_baseline_and_no_part():
    rows = jax.tree.map(lambda x: jnp.tile(x, (1, 3)), one_step(3))
    rows = rows._replace(time=jnp.tile(jnp.arange(3, dtype=jnp.int32), (3, 1)))
    value = jnp.arange(9.0).reshape(3, 3)

    def weights(value):
        credit = Credit(value, jnp.ones((3, 3)))
        return apply_baseline(time_dependent_baseline(2), None, (), rows, credit)

    np.testing.assert_array_equal(weights(value)[:, 2], value[:, 2])
    changed = weights(value.at[:, 2].add(5.0))
    np.testing.assert_array_equal(changed[:, :2], weights(value)[:, :2])
