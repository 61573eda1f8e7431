"""Every estimator against the exact gradient, by enumeration of all batches.

Nothing is sampled: the mean over all N-tuples of trajectories of a small world is the
estimator's expectation. A row of the table (`benchmarks/oracle_table.py`) declares what
it claims to be: what claims a bias must then FAIL to be the exact gradient.
"""

import functools
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import exact
from jaxpg.credit import CreditConfig, credit_of
from jaxpg.envs.tabular import canonical_mdp, canonical_pomdp, random_mdp
from jaxpg.estimators import (
    EstimatorConfig,
    estimate_credit,
    estimate_weights,
    make_estimator,
)
from jaxpg.gradients import score_gradient
from jaxpg.importance import log_ratios
from jaxpg.policies import log_prob_fn
from jaxpg.self_normalized import regularized_objective, regularized_weights

pytestmark = pytest.mark.usefixtures("float64")

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
oracle_table = importlib.import_module("oracle_table")
timing = importlib.import_module("timing")
sys.path.remove(BENCHMARKS)
UNBIASED, BIASED, SHRUNK, LIMITS, Row = (
    getattr(oracle_table, name)
    for name in ("UNBIASED", "BIASED", "SHRUNK", "LIMITS", "Row")
)

# World, batch size. Small enough for all batches: fewer decisions where there are more.
WORLDS = {
    "the mine": (canonical_mdp, 2),
    "the mine in the dark": (lambda: canonical_pomdp()._replace(horizon=2), 2),
    "random, three": (lambda: random_mdp(seed=3, num_states=2, horizon=2), 3),
}
ON_POLICY, OFF_POLICY = oracle_table.ON_POLICY, oracle_table.OFF_POLICY


def rows_for(world):
    """All rows on the mine; elsewhere one of each kind, for compiling takes long."""
    if world == "the mine":
        return ON_POLICY, OFF_POLICY
    sees_state = world != "the mine in the dark"
    return (
        [
            row
            for row in ON_POLICY
            if sees_state or row.baseline != "value"
            if row.credit == "reward-to-go" or row.baseline in ("none", "leave-one-out")
            if sees_state or not (row.settings or row.baseline.endswith("-plain"))
        ],
        [row for row in OFF_POLICY if row.baseline == "none"],
    )


@functools.cache
def verdicts(name):
    """Each row's verdict on one world, all enumerated together in float64."""
    make, batch_size = WORLDS[name]
    world = oracle_table.world_of(make())
    return {
        row: verdict
        for rows in rows_for(name)
        for row, verdict in zip(
            rows, oracle_table.judge(world, rows, batch_size), strict=True
        )
    }


# A batch of three is a matter of counting; no estimator sees what the dark hides.
EXHAUSTIVE = {"random, three", "the mine in the dark"}
CASES = [
    pytest.param(
        world,
        row,
        id=f"{world}: {row.name}",
        marks=pytest.mark.exhaustive if world in EXHAUSTIVE else (),
    )
    for world in WORLDS
    for rows in rows_for(world)
    for row in rows
]


@pytest.mark.parametrize(("world", "row"), CASES)
@pytest.mark.thinned(2)
def test_mean_is_what_the_row_claims(world, row):
    verdict, batch_size = verdicts(world)[row], WORLDS[world][1]
    size = np.linalg.norm(verdict.exact)
    assert size > 0.05, "the world must have a gradient"
    if row.claim == UNBIASED:
        expected = verdict.exact
    elif row.claim == SHRUNK:
        expected = (1.0 - 1.0 / batch_size) * verdict.exact
    else:
        assert np.linalg.norm(verdict.mean - verdict.exact) > 1e-3 * size
        expected = verdict.limit
    if expected is not None:
        np.testing.assert_allclose(verdict.mean, expected, rtol=1e-10, atol=1e-11)


STORED = timing.load("oracle-table")


@pytest.mark.parametrize(
    "kind", ["one of each", pytest.param("all", marks=pytest.mark.exhaustive)]
)
def test_stored_bias_and_variance_are_what_the_code_gives(kind):
    known = verdicts("the mine")
    chosen = (ON_POLICY, OFF_POLICY) if kind == "all" else one_of_each()
    now = [
        line
        for rows in chosen
        for line in oracle_table.lines_of(mine(), rows, [known[row] for row in rows])
    ]
    by_name = {row["name"]: row for row in STORED["rows"]}
    for name in ("bias", "variance", "limit_variance"):
        stored, given = (
            np.array([row[name] for row in rows], float)  # None becomes NaN
            for rows in ([by_name[row["name"]] for row in now], now)
        )
        np.testing.assert_allclose(stored, given, rtol=1e-9, atol=1e-10)


def one_of_each():
    """Each baseline with reward-to-go, and each ratio without a baseline."""
    return tuple(
        [row for row in rows if row.credit == "reward-to-go"]
        for rows in rows_for("random, three")
    )


def test_every_row_is_stored():
    names = [row["name"] for row in STORED["rows"]]
    assert names == [row.name for row in oracle_table.TABLE]
    assert len(set(names)) == len(names)


def mine():
    return oracle_table.world_of(canonical_mdp())


def mean_of(estimate, world, batch_size=1, acts="target"):
    mean = exact.expected_estimate(
        estimate, world.mdp, world.policy, getattr(world, acts), batch_size
    )
    return oracle_table.flat(mean)


def test_plain_time_dependent_baseline_is_scaled_step_by_step():
    """Step t is scaled by 1 - E[1/n_t | alive]: for N = 2, 1 - (1 - P(other)/2)."""
    world = mine()
    paths = exact.enumerate_trajectories(world.mdp)
    rows = exact.with_log_probs(paths.trajectories, world.policy, world.target)
    own = jnp.exp(jnp.sum(jnp.where(rows.mask, rows.log_prob, 0.0), axis=1))
    alive = (paths.world_probability * own) @ rows.mask.astype(float)
    factors = 1.0 - ((1.0 - alive) + alive / 2.0)

    def scaled(rows):
        weights = credit_of(rows).value * factors[rows.time]
        return score_gradient(log_prob_fn(world.policy), world.target, rows, weights)

    row = Row("reward-to-go", "time-dependent-plain", BIASED)
    np.testing.assert_allclose(
        verdicts("the mine")[row].mean, mean_of(scaled, world), rtol=1e-10, atol=1e-12
    )


NORMALIZED = ("whole", "causal", "future-dropped", "past-dropped-whole", "first-order")


@pytest.mark.parametrize("ratio", NORMALIZED)
def test_the_mean_weight_is_one_at_every_time(ratio):
    """So self-normalising changes nothing in the limit of a large batch."""
    world = mine()
    config = CreditConfig(ratio=ratio)
    estimator = make_estimator(
        EstimatorConfig(credit=config, baseline="none"), world.policy, world.mdp.horizon
    )
    past = ratio in ("whole", "causal", "future-dropped")

    def sums(rows):
        ones = rows._replace(reward=jnp.zeros_like(rows.reward))
        reach = estimate_credit(estimator, world.target, ones).reach[0]
        if not past:
            return jnp.where(rows.mask[0], reach, 0.0), rows.mask[0].astype(float)
        # One that has ended counts on with its last weight.
        last = jnp.max(jnp.where(rows.mask[0], rows.time[0], 0))
        kept = jnp.where(rows.mask[0], reach, reach[last])
        return kept, jnp.ones_like(kept)

    weight, count = exact.expected_estimate(
        sums, world.mdp, world.policy, world.behaviour, 1
    )
    np.testing.assert_allclose(weight / count, 1.0, rtol=1e-12)


def test_the_bias_of_self_normalised_weights_falls_with_the_batch():
    row = Row("total-return", "none", BIASED, "whole", (("self_normalize", True),))
    world = mine()
    errors = []
    for batch_size in (1, 2, 3):
        (verdict,) = oracle_table.judge(world, [row], batch_size)
        errors.append(np.linalg.norm(verdict.mean - verdict.exact))
    assert errors[0] > errors[1] > errors[2]


def test_regularised_objective_is_its_own_gradient():
    """regularized_weights through the engine = autodiff of Phi in the parameters."""
    world = mine()
    paths = exact.enumerate_trajectories(world.mdp)
    rows = exact.with_log_probs(paths.trajectories, world.policy, world.behaviour)
    log_probs = jax.vmap(log_prob_fn(world.policy), (None, 0))

    def objective(params):
        log_rhos = jnp.where(rows.mask, log_probs(params, rows) - rows.log_prob, 0.0)
        return regularized_objective(log_rhos, rows.reward, 0.3)

    log_rhos = jax.vmap(log_ratios)(
        log_probs(world.target, rows), rows.log_prob, rows.mask
    )
    weights = regularized_weights(log_rhos, rows.reward, rows.mask, 0.3)
    gradient = score_gradient(log_prob_fn(world.policy), world.target, rows, weights)
    np.testing.assert_allclose(
        oracle_table.flat(gradient),
        oracle_table.flat(jax.grad(objective)(world.target)),
        rtol=1e-10,
        atol=1e-12,
    )


def test_counting_the_own_ratio_twice_is_biased():
    """The causal form as slides print it, with the inner product from u = t on."""
    world = mine()
    row = Row("reward-to-go", "none", UNBIASED, "causal")
    config = CreditConfig(ratio="causal")
    estimator = make_estimator(
        EstimatorConfig(credit=config, baseline="none"), world.policy, world.mdp.horizon
    )
    log_probs = log_prob_fn(world.policy)

    def twice(rows):
        once = estimate_weights(estimator, world.target, (), rows)
        rhos = jnp.exp(jax.vmap(log_probs, (None, 0))(world.target, rows))
        rhos = rhos / jnp.exp(rows.log_prob)
        return score_gradient(log_probs, world.target, rows, once * rhos)

    exact_gradient = verdicts("the mine")[row].exact
    distance = np.linalg.norm(mean_of(twice, world, acts="behaviour") - exact_gradient)
    assert distance > 1e-2 * np.linalg.norm(exact_gradient)


@pytest.mark.exhaustive
def test_a_permutation_of_the_batch_changes_nothing():
    world = mine()
    # One of each baseline and of each ratio; folds of a regression know their order.
    rows = [
        row for rows in one_of_each() for row in rows if row.baseline != "linear-folds"
    ]
    estimates = [oracle_table.make_estimate(world, row) for row in rows]

    @jax.jit
    def all_estimates(trajectories):
        return [estimate(trajectories) for estimate in estimates]

    paths = exact.enumerate_trajectories(world.mdp).trajectories
    batch = exact.with_log_probs(paths, world.policy, world.behaviour)
    order = np.random.default_rng(0).permutation(batch.mask.shape[0])
    shuffled = jax.tree.map(lambda x: x[order], batch)
    for one, other in zip(all_estimates(batch), all_estimates(shuffled), strict=True):
        np.testing.assert_allclose(
            oracle_table.flat(one), oracle_table.flat(other), rtol=1e-9, atol=1e-11
        )
