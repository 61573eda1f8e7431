"""Groups that share a start state: by hand, by enumeration, and when they tie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import exact
from jaxpg.baselines import apply_baseline
from jaxpg.credit import Credit, credit_of
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import random_mdp
from jaxpg.gradients import score_gradient
from jaxpg.groups import (
    group_index,
    group_leave_one_out_baseline,
    group_standardize,
)
from jaxpg.policies import log_prob_fn, tabular_policy
from jaxpg.returns import rewards_to_go
from jaxpg.train.sharding import place
from jaxpg.types import Trajectory


def rows_of(time, mask, episode_id):
    time, mask = jnp.array(time), jnp.array(mask, bool)
    zeros, no = jnp.zeros(time.shape), jnp.zeros(time.shape, bool)
    return Trajectory(
        zeros, zeros, zeros, zeros, no, no, mask, time, jnp.array(episode_id)
    )


# Two groups of two, {4, 5} and {6, 7}, on two rows with an empty slot each.
#     row 0:  4 4 6 --        row 1:  5 7 7 --
PACKED = rows_of(
    time=[[0, 1, 0, 0], [0, 0, 1, 0]],
    mask=[[1, 1, 1, 0], [1, 1, 1, 0]],
    episode_id=[[4, 4, 6, 6], [5, 7, 7, 7]],
)
ON_POLICY = Credit(
    jnp.array([[5.0, 3.0, 7.0, 0.0], [1.0, 9.0, 4.0, 0.0]]), PACKED.mask.astype(float)
)


def one_step(returns, reach=None, dtype=jnp.float32):
    """Episodes of one decision, one per row."""
    returns = jnp.asarray(returns, dtype)[:, None]
    rows = rows_of(
        jnp.zeros(returns.shape, int),
        jnp.ones(returns.shape, bool),
        jnp.arange(len(returns))[:, None],
    )
    reach = jnp.ones_like(returns) if reach is None else jnp.array(reach)[:, None]
    return rows, Credit(returns * reach, reach)


def leave_one_out(rows, credit, group_size, num_groups):
    baseline = group_leave_one_out_baseline(group_size, num_groups)
    weights = jax.jit(lambda r, c: apply_baseline(baseline, None, (), r, c))
    return weights(rows, credit)


standardize = jax.jit(group_standardize, static_argnums=(2, 3))


def test_leave_one_out_by_hand():
    # Returns 5, 1 and 7, 9: each episode's baseline is the other's.
    expected = [[5 - 1, 3 - 1, 7 - 9, 0], [1 - 5, 9 - 7, 4 - 7, 0]]
    np.testing.assert_array_equal(leave_one_out(PACKED, ON_POLICY, 2, 2), expected)


def test_off_policy_the_mean_is_importance_weighted():
    rows, credit = one_step([1.0, 2.0, 6.0], reach=[1.0, 3.0, 0.5])
    # Others of 0: (3 * 2 + 0.5 * 6) / 3.5; of 1: (1 + 3) / 1.5; of 2: (1 + 6) / 4.
    means = np.array([9 / 3.5, 4 / 1.5, 7 / 4])
    expected = np.array([1.0, 3.0, 0.5]) * (np.array([1.0, 2.0, 6.0]) - means)
    found = leave_one_out(rows, credit, 3, 1)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_summaries_of_parts_add_up():
    baseline = group_leave_one_out_baseline(2, 2)
    whole = baseline.summarize(None, PACKED, ON_POLICY)  # by fold
    np.testing.assert_array_equal(whole.value.sum(axis=0), [6.0, 16.0])
    np.testing.assert_array_equal(whole.reach.sum(axis=0), [2.0, 2.0])
    parts = [
        baseline.summarize(
            None, *jax.tree.map(lambda x, i=i: x[i : i + 1], (PACKED, ON_POLICY))
        )
        for i in range(2)
    ]
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(jnp.add, *parts))
    assert baseline.needs_batch and baseline.min_trajectories == 2


def test_batches_later_in_a_run_have_the_same_groups():
    ids = jnp.arange(12, 24)[None]
    expected = [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
    np.testing.assert_array_equal(group_index(ids, 3, 4), expected)


def test_standardized_by_hand():
    # Means 3 and 8, standard deviations 2 and 1.
    expected = [[1, 0, -1, 0], [-1, 1, -4, 0]]
    weights = standardize(PACKED, ON_POLICY, 2, 2)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)


def test_standardized_off_policy_by_hand():
    rows, credit = one_step([1.0, 5.0], reach=[3.0, 1.0])
    # Mean (3 + 5) / 4 = 2, variance (3 * 1 + 9) / 4 = 3.
    expected = np.array([3 * (1 - 2), 5 - 2]) / np.sqrt(3)
    found = standardize(rows, credit, 2, 1)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Ties.

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [0.0, 1e-30, 0.1, 1e6 + 0.1, -1e6, 1e30])
def test_a_group_that_ties_weighs_exactly_nothing(size):
    """A sum of 64 equal numbers, over 64, is not that number again."""
    rows, credit = one_step([size] * 64 + [1.0, 2.0] * 32)
    weights = standardize(rows, credit, 64, 2)[:, 0]
    np.testing.assert_array_equal(weights[:64], 0.0)
    np.testing.assert_allclose(weights[64:], [-1.0, 1.0] * 32, rtol=1e-6)


@pytest.mark.parametrize("size", [3.0, 1e6, 1e-20])
def test_last_places_are_no_differences(size):
    """The next number up, and the one after it, are equal but for rounding."""
    up = np.nextafter(np.float32(size), np.float32(np.inf))
    upper = np.nextafter(up, np.float32(np.inf))
    rows, credit = one_step([size, up, upper, size])
    assert len(np.unique(credit.value)) == 3
    np.testing.assert_array_equal(standardize(rows, credit, 4, 1), 0.0)


def test_equal_rewards_in_another_order_tie():
    """500 rewards, shuffled: the sums differ in their last places, and say nothing."""
    rewards = RNG.normal(size=500) + 1.0
    orders = np.stack([RNG.permutation(rewards) for _ in range(8)]).astype(np.float32)
    shape = orders.shape
    time = np.broadcast_to(np.arange(500, dtype=np.int32), shape)
    ids = np.broadcast_to(np.arange(8, dtype=np.int32)[:, None], shape)
    rows = rows_of(time, np.ones(shape), ids)
    value = jax.vmap(rewards_to_go)(jnp.asarray(orders), jnp.ones(shape))
    assert len(np.unique(value[:, 0])) > 1
    weights = standardize(rows, Credit(value, jnp.ones(shape)), 8, 1)
    np.testing.assert_array_equal(weights, 0.0)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_true_differences_count_whatever_their_size(scale):
    rows, credit = one_step(np.array([1e4, 1e4 + 1, 1e4 + 2]) * scale)
    found = standardize(rows, credit, 3, 1)[:, 0]
    expected = np.array([-1.0, 0.0, 1.0]) * np.sqrt(3 / 2)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # 1e4 + 1 in float32


@pytest.mark.parametrize("reach", [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1e26, 1.0, 1.0]])
def test_where_one_return_has_all_the_reach_nothing_differs(reach):
    rows, credit = one_step([7.0, 2.0, 2.0], reach=reach)
    np.testing.assert_array_equal(standardize(rows, credit, 3, 1), 0.0)


# Bias, by enumeration.


def mean_and_exact(weigh, mdp, batch_size, chance_of_starts=lambda rows: 1.0):
    """Means under the law of groups: batches weighed by how much likelier they are."""
    policy = tabular_policy(Discrete(mdp.reward.shape[0]), Discrete(2))
    params = policy.init(jax.random.key(1), jnp.zeros((), jnp.int32))

    def estimate(rows):
        weights = weigh(rows, credit_of(rows))
        gradient = score_gradient(log_prob_fn(policy), params, rows, weights)
        factor = jnp.asarray(chance_of_starts(rows), float)
        return jax.tree.map(lambda x: factor * x, (gradient["network"], jnp.ones(())))

    mean, one = exact.expected_estimate(estimate, mdp, policy, params, batch_size)
    np.testing.assert_allclose(one, 1.0, rtol=1e-12)
    return mean, exact.policy_gradient(mdp, policy, params)["network"]


def one_start():
    mdp = random_mdp(seed=3, num_states=3, horizon=2)
    return mdp._replace(initial=jnp.array([1.0, 0.0, 0.0]))


def test_leave_one_out_is_unbiased(float64):
    baseline = group_leave_one_out_baseline(2, 1)
    mean, gradient = mean_and_exact(
        lambda rows, credit: apply_baseline(baseline, None, (), rows, credit),
        one_start(),
        2,
    )
    assert np.linalg.norm(gradient) > 0.1
    np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12)


def test_leave_one_out_is_unbiased_where_groups_start_in_different_states(float64):
    """Two groups of two; the law of groups is the batch's, given equal starts."""
    mdp = random_mdp(seed=3, num_states=3, horizon=1)
    baseline = group_leave_one_out_baseline(2, 2)

    def likelier(rows):
        first = rows.obs[:, 0].reshape(2, 2)
        alike = first[:, 0] == first[:, 1]
        return jnp.prod(jnp.where(alike, 1.0 / mdp.initial[first[:, 0]], 0.0))

    mean, gradient = mean_and_exact(
        lambda rows, credit: apply_baseline(baseline, None, (), rows, credit),
        mdp,
        4,
        likelier,
    )
    assert np.count_nonzero(mdp.initial) == 2 and np.linalg.norm(gradient) > 0.05
    np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-12)


def test_standardized_weights_are_biased(float64):
    mean, gradient = mean_and_exact(
        lambda rows, credit: group_standardize(rows, credit, 2, 1), one_start(), 2
    )
    assert np.linalg.norm(mean - gradient) > 0.1 * np.linalg.norm(gradient)
    # Not even a multiple of the gradient.
    cosine = np.sum(mean * gradient) / np.linalg.norm(mean) / np.linalg.norm(gradient)
    assert cosine < 0.999


# Many seeds, many devices, what is refused.


def weights_of(rows, credit):
    baseline = group_leave_one_out_baseline(4, 4)
    loo = apply_baseline(baseline, None, (), rows, credit)
    return loo, group_standardize(rows, credit, 4, 4)


def test_rows_spread_over_devices_change_nothing():
    mesh = place(8, rows=16).replicated.mesh
    over_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    batch = one_step(RNG.normal(size=16))
    spread = jax.jit(weights_of)(*jax.device_put(batch, over_rows))
    for x, y in zip(spread, weights_of(*batch), strict=True):
        assert len(x.sharding.device_set) == 8 and np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_over_seeds_by_vmap_it_equals_separate_calls():
    batches = [one_step(RNG.normal(size=16)) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    together = jax.vmap(weights_of)(*stacked)
    for i, batch in enumerate(batches):
        for x, y in zip(together, weights_of(*batch), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("group_size", "num_groups", "sentence"),
    [
        (1, 4, "^group_size is 1, needs a number in .2, inf.; one trajectory has no o"),
        (0, 4, "^group_size is 0, needs a whole number"),
        (2, 0, "^num_groups is 0, needs a whole number"),
    ],
)
def test_what_cannot_work_is_refused(group_size, num_groups, sentence):
    with pytest.raises(ValueError, match=sentence):
        group_leave_one_out_baseline(group_size, num_groups)
    with pytest.raises(ValueError, match=sentence):
        group_standardize(PACKED, ON_POLICY, group_size, num_groups)
