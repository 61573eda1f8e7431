"""The oracle against hand arithmetic, plain loops, enumeration and finite differences.

Its parts check each other: dynamic programming over states, enumeration of whole paths
and NumPy loops share no code. Float64 throughout; nothing is sampled, but for the
environment that the worlds are rolled out with.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxpg import exact
from jaxpg.distributions import Categorical
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import (
    canonical_mdp,
    canonical_pomdp,
    check_mdp,
    random_mdp,
    tabular_environment,
)
from jaxpg.heads import categorical_head
from jaxpg.policies import Policy, from_apply, log_prob_fn

pytestmark = pytest.mark.usefixtures("float64")

close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)


def table_policy(mdp):
    """One logit per observation and action."""
    num_obs = (mdp.reward if mdp.emission is None else mdp.emission.T).shape[0]
    num_actions = mdp.reward.shape[1]

    def init(key, obs):
        return jax.random.normal(key, (num_obs, num_actions))

    head = categorical_head(Discrete(num_actions))
    return from_apply(init, lambda table, obs: table[obs], head)


def set_up(make_mdp, seed=1):
    mdp = make_mdp()
    policy = table_policy(mdp)
    return mdp, policy, policy.init(jax.random.key(seed), jnp.int32(0))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def uniform(params):
    return jax.tree.map(jnp.zeros_like, params)


WORLDS = {
    "mine": canonical_mdp,
    "mine in the dark": canonical_pomdp,
    "random": lambda: random_mdp(3, horizon=3),
    "random, two looks": lambda: random_mdp(3, horizon=2, num_observations=2),
    "random, four looks": lambda: random_mdp(4, 2, horizon=2, num_observations=4),
}
worlds = pytest.mark.parametrize("make_mdp", WORLDS.values(), ids=WORLDS)


# By hand: the mine under uniform actions.
#
# One decision left   V(surface) = (1 + 0) / 2 = 0.5      V(seam) = (4 - 1) / 2 = 1.5
# Two left            Q(surface, take) = 1 + 0.5 / 2 = 1.25
#                     Q(surface, dig)  = (0.5 + 1.5) / 2 = 1        V = 1.125
#                     Q(seam) = 4 and -1 + 0.5 = -0.5               V = 1.75
# Three left          Q(surface, take) = 1 + 1.125 / 2 = 1.5625
#                     Q(surface, dig)  = (1.125 + 1.75) / 2 = 1.4375      V = J = 1.5
# At the surface      1, then 1/4 + 1/4 = 0.5, then 0.5 / 2 + 0.25 / 2 = 0.375
# In the seam         0, then 1/4, then 0.5 / 4 = 0.125
#
# d J / d logit(s, take) = sum_t d[t, s] pi(take) A[t, s, take]
#   surface: (1 * 0.0625 + 0.5 * 0.125 + 0.375 * 0.5) / 2 = 0.15625
#   seam:    (0.25 * 2.25 + 0.125 * 2.5) / 2 = 0.4375, and the opposite for dig.
# The Fisher block of a state with n visits is n / 4 [[1, -1], [-1, 1]]; on (g, -g) it
# is n / 2, so the natural gradient is 2 g / n: surface n = 1.875, seam n = 0.375.


def test_values_by_hand():
    mdp, policy, params = set_up(canonical_mdp)
    params = uniform(params)
    close(exact.expected_return(mdp, policy, params), 1.5)
    values = exact.state_values(mdp, policy, params)
    close(values[:, :2], [[1.5, (4 - 1 + 1.125) / 2], [1.125, 1.75], [0.5, 1.5]])
    close(exact.action_values(mdp, policy, params)[0, 0], [1.5625, 1.4375])
    close(exact.advantages(mdp, policy, params)[1, :2, 0], [0.125, 2.25])
    visits = [[1, 0, 0], [0.5, 0.25, 0], [0.375, 0.125, 0]]
    close(exact.occupancies(mdp, policy, params), visits)


def test_gradients_by_hand():
    mdp, policy, params = set_up(canonical_mdp)
    params = uniform(params)
    gradient = exact.policy_gradient(mdp, policy, params)["network"]
    by_hand = np.array([0.15625, 0.4375, 0.0])
    close(gradient, np.stack([by_hand, -by_hand], axis=1))
    natural = exact.natural_gradient(mdp, policy, params)["network"]
    close(natural[:, 0], [1 / 6, 7 / 3, 0.0])
    fisher = exact.fisher_matrix(mdp, policy, params)
    close(fisher[:2, :2], 1.875 / 4 * np.array([[1, -1], [-1, 1]]))


def test_the_best_policy_of_the_mine_digs_first():
    mdp, policy, _ = set_up(canonical_mdp)
    plans = [[[a, -a], [b, -b], [0.0, 0.0]] for a in (-99, 99) for b in (-99, 99)]
    worth = [
        exact.expected_return(mdp, policy, {"network": jnp.array(plan), "head": {}})
        for plan in plans
    ]
    # One plan for all times, dig above and take below: worth (2 + 4) / 2, where 4 / 2
    # is the surface with two left. Taking above at the last makes that (1 + 4) / 2, and
    # the whole (2.5 + 4) / 2.
    close(worth[1], (4 + (4 + 0) / 2) / 2)
    assert np.argmax(worth) == 1
    best = np.zeros(3)
    for _ in range(3):
        future = np.asarray(mdp.transition) @ np.where(mdp.terminal, 0.0, best)
        best = np.max(np.asarray(mdp.reward) + future, axis=1)
    close(best[0], 3.25)


def test_long_horizons_equal_plain_loops():
    mdp = random_mdp(7, num_states=5, num_actions=3, horizon=200, num_observations=4)
    policy = table_policy(mdp)
    params = policy.init(jax.random.key(0), jnp.int32(0))
    logits = np.asarray(params["network"])
    seen = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    initial, transition, reward, terminal = map(np.asarray, mdp[:4])
    alive, total, emission = initial, 0.0, np.asarray(mdp.emission)
    for t in range(200):
        arrived = np.zeros(5)
        for s in range(5):
            for o in range(4):
                for a in range(3):
                    chance = alive[s] * emission[s, o] * seen[o, a]
                    total += 0.99**t * chance * reward[s, a]
                    arrived += chance * transition[s, a]
        alive = np.where(terminal, 0.0, arrived)
    assert 1e-30 < alive.sum() < 1.0, "the last decisions must count"
    close(exact.expected_return(mdp, policy, params, 0.99), total)


# Enumeration against dynamic programming.


@worlds
@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.thinned(4)
def test_enumerated_return_and_its_gradient(make_mdp, discount):
    mdp, policy, params = set_up(make_mdp)

    def enumerated(params):
        return exact.enumerated_return(mdp, policy, params, discount)

    value, gradient = jax.jit(jax.value_and_grad(enumerated))(params)
    close(value, exact.expected_return(mdp, policy, params, discount))
    expected = flat(exact.policy_gradient(mdp, policy, params, discount))
    assert np.linalg.norm(expected) > 0.05
    close(flat(gradient), expected)


def test_mixed_gradient_of_one_policy_is_the_gradient_in_the_dark_too():
    mdp, policy, params = set_up(canonical_pomdp)
    mixed = exact.mixed_gradient(mdp, policy, params, params, params)
    close(flat(mixed), flat(exact.policy_gradient(mdp, policy, params)))


@worlds
@pytest.mark.thinned(2)
def test_fisher_matrix_is_the_mean_of_squared_scores(make_mdp):
    mdp, policy, params = set_up(make_mdp)
    vector, unravel = ravel_pytree(params)

    def squared_scores(rows):
        row = jax.tree.map(lambda x: x[0], rows)
        log_probs = lambda v: log_prob_fn(policy)(unravel(v), row)  # noqa: E731
        scores = jax.jacrev(log_probs)(vector) * row.mask[:, None].astype(float)
        return scores.T @ scores

    expected = exact.expected_estimate(squared_scores, mdp, policy, params, 1)
    close(exact.fisher_matrix(mdp, policy, params), expected)


@worlds
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.thinned(3)
def test_natural_gradient_solves_its_equation(make_mdp, damping):
    mdp, policy, params = set_up(make_mdp)
    natural = exact.natural_gradient(mdp, policy, params, 0.9, damping)
    assert jax.tree.structure(natural) == jax.tree.structure(params)
    gradient = flat(exact.policy_gradient(mdp, policy, params, 0.9))
    fisher = np.asarray(exact.fisher_matrix(mdp, policy, params))
    close(fisher @ flat(natural) + damping * flat(natural), gradient)
    # The shortest solution has no part that F does not see.
    table = np.asarray(natural["network"])
    close(table.sum(axis=1), np.zeros(len(table)))


@worlds
@pytest.mark.thinned(2)
def test_records_of_all_paths(make_mdp):
    mdp, policy, params = set_up(make_mdp)
    paths = exact.enumerate_trajectories(mdp)
    rows = exact.with_log_probs(paths.trajectories, policy, params)
    own = np.sum(np.where(rows.mask, rows.log_prob, 0.0), axis=1)
    chances = np.asarray(paths.world_probability) * np.exp(own)
    close(chances.sum(), 1.0)
    assert np.where(rows.mask[:, 1:], rows.next_obs[:, :-1] == rows.obs[:, 1:], 1).all()
    facts = (rows.obs, rows.action, rows.reward, rows.terminated, rows.next_obs)
    records = np.stack(list(map(np.asarray, facts)), axis=2)
    records = np.where(rows.mask[..., None], records, -1.0).reshape(len(chances), -1)
    assert len(np.unique(records, axis=0)) == len(records), "rows are told apart"
    # What is seen at each decision, and after the last one.
    hidden = mdp.emission is not None
    emission = np.asarray(mdp.emission) if hidden else np.eye(len(mdp.initial))
    looks = np.eye(emission.shape[1])
    visits = np.asarray(exact.occupancies(mdp, policy, params))
    shown = looks[np.asarray(rows.obs)] * np.asarray(rows.mask)[..., None]
    close(np.einsum("p,pto->to", chances, shown), visits @ emission)
    probabilities = exact.action_probabilities(mdp, policy, params)
    arrived = np.einsum("s,sa,sax->x", visits[-1], probabilities, mdp.transition)
    last = looks[np.asarray(rows.next_obs)[:, -1]] * np.asarray(rows.mask)[:, -1:]
    close(chances @ last, arrived @ emission)


# Memory.


def recurrent_policy():
    """A leaky sum of what was seen shifts the logits: three parameters for it."""

    def init(key, obs):
        keys = jax.random.split(key)
        table = jax.random.normal(keys[0], (3, 2))
        return {"table": table, "memory": jax.random.normal(keys[1], (3,))}

    def step(params, carry, obs):
        keep, shift, seen = params["memory"]
        carry = jnp.tanh(keep * carry + seen * (jnp.asarray(obs, float) - 1.0))
        push = jnp.stack([shift * carry, -shift * carry])
        return Categorical(params["table"][obs] + push), carry

    def unroll(params, row):
        def advance(carry, inputs):
            obs, time = inputs
            carry = jnp.where(time == 0, 0.0, carry)
            distribution, carry = step(params, carry, obs)
            return carry, distribution.logits

        return Categorical(jax.lax.scan(advance, row.carry, (row.obs, row.time))[1])

    return Policy(init, lambda: jnp.zeros(()), step, unroll, is_recurrent=True)


def walk(mdp, policy, params, state, obs, carry, left):
    """The value of a hidden state with a memory, by plain recursion over `step`."""
    distribution, carry = policy.step(params, carry, obs)
    logits = np.asarray(distribution.logits)
    total = 0.0
    for a, chance in enumerate(np.exp(logits) / np.exp(logits).sum()):
        total += chance * mdp.reward[state, a]
        for x in np.flatnonzero(mdp.transition[state, a]):
            if left == 1 or mdp.terminal[x]:
                continue
            for o in np.flatnonzero(mdp.emission[x]):
                value = walk(mdp, policy, params, x, o, carry, left - 1)
                arrival = mdp.transition[state, a, x] * mdp.emission[x, o]
                total += chance * arrival * value
    return total


def test_return_of_a_policy_with_memory_by_plain_recursion():
    mdp, policy = canonical_pomdp(), recurrent_policy()
    params = policy.init(jax.random.key(2), jnp.int32(0))
    world = mdp._replace(**{k: np.asarray(v) for k, v in mdp._asdict().items()})
    quick = policy._replace(step=jax.jit(policy.step))
    value = sum(
        world.emission[0, o] * walk(world, quick, params, 0, o, jnp.zeros(()), 3)
        for o in (0, 1)
    )
    close(exact.enumerated_return(mdp, policy, params), value)


def test_gradient_of_a_policy_with_memory_by_finite_differences():
    mdp, policy = canonical_pomdp(), recurrent_policy()
    params = policy.init(jax.random.key(2), jnp.int32(0))
    vector, unravel = ravel_pytree(params)
    value = jax.jit(lambda v: exact.enumerated_return(mdp, policy, unravel(v), 0.9))
    gradient = jax.grad(value)(vector)
    assert np.linalg.norm(unravel(gradient)["memory"]) > 1e-2, "memory must matter"
    step = 1e-5 * np.eye(len(vector))
    rises = [value(vector + e) - value(vector - e) for e in step]
    np.testing.assert_allclose(gradient, np.array(rises) / 2e-5, atol=1e-9)


def test_estimators_see_the_first_memory():
    mdp, policy = canonical_pomdp(), recurrent_policy()
    params = policy.init(jax.random.key(2), jnp.int32(0))
    rows = []
    exact.expected_estimate(
        lambda some: rows.append(some) or some.reward, mdp, policy, params, 1
    )
    assert rows[0].carry.shape == (1,)


# Moments of estimators.


def score_times_return(policy, params, rows):
    def of_row(params, row):
        log_probs = log_prob_fn(policy)(params, row)
        total = jnp.sum(row.reward) + 1e4  # far from 0: cancellation would show
        return jnp.sum(jnp.where(row.mask, log_probs, 0.0)) * total

    each = jax.vmap(jax.grad(of_row), (None, 0))(params, rows)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), each)


@pytest.mark.parametrize("make_mdp", [canonical_mdp, canonical_pomdp])
@pytest.mark.thinned(2)
def test_variance_of_a_mean_falls_as_one_over_n(make_mdp):
    mdp, policy, params = set_up(lambda: make_mdp()._replace(horizon=2))
    estimate = functools.partial(score_times_return, policy, params)
    one, *others = (
        exact.estimate_moments(estimate, mdp, policy, params, n) for n in (1, 2, 3)
    )
    gradient = exact.policy_gradient(mdp, policy, params)
    np.testing.assert_allclose(flat(one.mean), flat(gradient), atol=1e-9)
    assert one.total_variance > 1.0
    for n, moments in zip((2, 3), others, strict=True):
        close(flat(moments.variance), flat(one.variance) / n, atol=1e-6)
        close(moments.total_variance, one.total_variance / n)


def test_moments_by_plain_sums():
    mdp, policy, params = set_up(canonical_mdp)
    paths = exact.enumerate_trajectories(mdp)
    rows = exact.with_log_probs(paths.trajectories, policy, params)
    own = np.sum(np.where(rows.mask, rows.log_prob, 0.0), axis=1)
    chances = np.asarray(paths.world_probability) * np.exp(own)
    returns = np.asarray(rows.reward.sum(axis=1)) + 1e4
    moments = exact.estimate_moments(
        lambda some: {"r": some.reward.sum() + 1e4, "n": some.num_decisions},
        mdp,
        policy,
        params,
        1,
    )
    close(moments.mean["r"], chances @ returns)
    spread = chances @ (returns - chances @ returns) ** 2
    close(moments.variance["r"], spread)
    lengths = np.asarray(rows.mask.sum(axis=1))
    close(moments.mean["n"], chances @ lengths)
    total = spread + chances @ lengths**2 - (chances @ lengths) ** 2
    close(moments.total_variance, total)


def test_order_and_repetition_of_a_batch_matter_to_an_estimator():
    """E[R0 R1^2] = E[R] E[R^2], and P(both rows are one path) = sum p^2."""
    mdp, policy, params = set_up(canonical_mdp)

    def estimate(rows):
        one, two = rows.reward.sum(axis=1)
        same = (rows.reward[0] == rows.reward[1]) & (rows.action[0] == rows.action[1])
        distinct = rows.episode_id[0, 0] != rows.episode_id[1, 0]
        same &= rows.next_obs[0] == rows.next_obs[1]
        return one * two**2, jnp.all(same).astype(float), distinct.astype(float)

    first, second = (
        exact.expected_estimate(
            lambda rows, k=k: rows.reward.sum() ** k, mdp, policy, params, 1
        )
        for k in (1, 2)
    )
    product, same, distinct = exact.expected_estimate(estimate, mdp, policy, params, 2)
    close(product, first * second)
    paths = exact.enumerate_trajectories(mdp)
    rows = exact.with_log_probs(paths.trajectories, policy, params)
    own = np.sum(np.where(rows.mask, rows.log_prob, 0.0), axis=1)
    close(same, np.sum((np.asarray(paths.world_probability) * np.exp(own)) ** 2))
    close(distinct, 1.0)


def test_many_batches_and_ragged_chunks(monkeypatch):
    """28^3 = 21952 batches in pieces that do not fit: the variance is still Var / 3."""
    monkeypatch.setattr(exact.enumeration, "CHUNK", 1000)
    mdp, policy, params = set_up(canonical_mdp)
    mean = lambda rows: rows.reward.sum() / rows.reward.shape[0] + 1e3  # noqa: E731
    one, three = (exact.estimate_moments(mean, mdp, policy, params, n) for n in (1, 3))
    close(three.mean, 1e3 + exact.expected_return(mdp, policy, params))
    close(three.variance, one.variance / 3)


def test_impossible_batches_do_not_count():
    mdp, policy, params = set_up(canonical_mdp)
    params = {**params, "network": jnp.array([[0.0, -jnp.inf], [0.0, 0.0], [0.0, 0.0]])}

    def estimate(rows):
        digs = jnp.any((rows.obs == 0) & (rows.action == 1) & rows.mask)
        return jnp.where(digs, jnp.nan, rows.reward.sum())

    # Only taking: 1 + 1/2 + 1/4.
    close(exact.expected_estimate(estimate, mdp, policy, params, 1), 1.75)
    assert np.isfinite(exact.fisher_matrix(mdp, policy, params)).all()


# The continuing world.


def test_long_run_by_hand():
    # Uniform actions: surface -> surface 1/2, seam 1/4, end 1/4; seam -> surface 1/2,
    # end 1/2; end -> surface. d = (8, 2, 3) / 13, eta = (8 * 0.5 + 2 * 1.5) / 13.
    mdp, policy, params = set_up(canonical_mdp)
    params = uniform(params)
    visits = exact.stationary_distribution(mdp, policy, params)
    close(visits, np.array([8, 2, 3]) / 13)
    close(exact.average_reward(mdp, policy, params), 7 / 13)


@worlds
@pytest.mark.thinned(2)
def test_long_run_by_walking(make_mdp):
    mdp, policy, params = set_up(make_mdp)
    probabilities = exact.action_probabilities(mdp, policy, params)
    chain = np.einsum("sa,sax->sx", probabilities, mdp.transition)
    walked = np.linalg.matrix_power(chain, 10_000)
    visits = exact.stationary_distribution(mdp, policy, params)
    close(walked, np.broadcast_to(visits, walked.shape))
    vector, unravel = ravel_pytree(params)
    eta = lambda v: exact.average_reward(mdp, policy, unravel(v))  # noqa: E731
    gradient = flat(exact.average_reward_gradient(mdp, policy, params))
    steps = 1e-5 * np.eye(len(vector))
    rises = np.array([eta(vector + e) - eta(vector - e) for e in steps])
    np.testing.assert_allclose(gradient, rises / 2e-5, atol=1e-9)


def baxter_bartlett(mdp, policy, params, entered, beta):
    """d^T (grad P) J_beta for rewards of states, as they write it."""
    vector, unravel = ravel_pytree(params)

    def chain(v):
        probabilities = exact.action_probabilities(mdp, policy, unravel(v))
        return jnp.einsum("sa,sax->sx", probabilities, mdp.transition)

    values = np.linalg.solve(np.eye(len(entered)) - beta * chain(vector), entered)
    visits = exact.stationary_distribution(mdp, policy, params)
    return np.einsum("s,sxp,x->p", visits, jax.jacrev(chain)(vector), values)


@worlds
@pytest.mark.thinned(2)
def test_discounted_approximation_is_baxter_and_bartletts(make_mdp):
    mdp, policy, params = set_up(make_mdp)
    paid = np.arange(1.0, len(mdp.initial) + 1) ** 2
    theirs = baxter_bartlett(mdp, policy, params, paid, 0.8)
    entered = jnp.asarray(np.asarray(mdp.transition) @ paid)
    ours = exact.discounted_approximation(
        mdp._replace(reward=entered), policy, params, 0.8
    )
    close(flat(ours), theirs)
    left = jnp.broadcast_to(paid[:, None], mdp.reward.shape)
    late = exact.discounted_approximation(
        mdp._replace(reward=left), policy, params, 0.8
    )
    close(flat(late), 0.8 * theirs)


@worlds
def test_discounted_approximation_tends_to_the_gradient(make_mdp):
    mdp, policy, params = set_up(make_mdp)
    gradient = flat(exact.average_reward_gradient(mdp, policy, params))

    def error(beta):
        approximation = exact.discounted_approximation(mdp, policy, params, beta)
        return np.linalg.norm(flat(approximation) - gradient)

    assert error(0.5) > 1e-2 * np.linalg.norm(gradient)
    errors = np.array([error(1.0 - gap) for gap in (1e-3, 1e-4, 1e-5)])
    np.testing.assert_allclose(errors[:-1] / errors[1:], 10.0, rtol=0.02)
    assert error(1.0) < 1e-11


# Importance weights.


def path_weights(mdp, policy, params, behaviour_params):
    """W[t] of every path, held after its end, and the paths' probabilities."""
    paths = exact.enumerate_trajectories(mdp)
    pi, mu = (
        exact.with_log_probs(paths.trajectories, policy, p)
        for p in (params, behaviour_params)
    )
    log_rhos = np.where(pi.mask, pi.log_prob - mu.log_prob, 0.0)
    own = np.sum(np.where(mu.mask, mu.log_prob, 0.0), axis=1)
    chances = np.asarray(paths.world_probability) * np.exp(own)
    return np.exp(np.cumsum(log_rhos, axis=1)), chances


@pytest.mark.parametrize(
    "make_mdp",
    [
        lambda: canonical_mdp()._replace(horizon=4),
        lambda: canonical_pomdp()._replace(horizon=4),
        lambda: random_mdp(3, horizon=4),
        lambda: random_mdp(3, 2, horizon=4, num_observations=3),
    ],
)
@pytest.mark.thinned(2)
def test_second_moments_of_weights_are_those_of_all_paths(make_mdp):
    mdp, policy, params = set_up(make_mdp)
    behaviour = policy.init(jax.random.key(5), jnp.int32(0))
    weights, chances = path_weights(mdp, policy, params, behaviour)
    close(chances @ weights, np.ones(4))
    moments = exact.weight_second_moments(mdp, policy, params, behaviour)
    assert moments[-1] > 1.1
    close(moments, chances @ weights**2)
    close(exact.weight_second_moments(mdp, policy, params, params), np.ones(4))
    longer = mdp._replace(horizon=200)
    long_run = exact.weight_second_moments(longer, policy, params, behaviour)
    close(long_run[:4], moments)
    assert np.isfinite(long_run).all() and (np.diff(long_run) > -1e-12).all()


@pytest.mark.parametrize("num_observations", [None, 2])
def test_weights_grow_at_their_rate(num_observations):
    mdp, policy, params = set_up(
        lambda: random_mdp(
            6, 4, horizon=200, num_terminal=0, num_observations=num_observations
        )
    )
    behaviour = policy.init(jax.random.key(5), jnp.int32(0))
    moments = exact.weight_second_moments(mdp, policy, params, behaviour)
    rate = exact.weight_growth_rate(mdp, policy, params, behaviour)
    assert rate > 0.05
    close(np.log(moments[-1] / moments[-2]), rate)
    assert abs(np.log(moments[1] / moments[0]) - rate) > 1e-6, "it has to converge"
    close(exact.weight_growth_rate(mdp, policy, params, params), 0.0)


def test_growth_rate_is_the_spectral_radius_of_the_living():
    mdp, policy, params = set_up(lambda: random_mdp(2, 5, horizon=3, num_terminal=2))
    behaviour = policy.init(jax.random.key(5), jnp.int32(0))
    pi, mu = (exact.action_probabilities(mdp, policy, p) for p in (params, behaviour))
    step = np.einsum("sa,sax->sx", pi**2 / mu, mdp.transition)[:3, :3]
    rate = exact.weight_growth_rate(mdp, policy, params, behaviour)
    close(rate, np.log(np.max(np.abs(np.linalg.eigvals(step)))))


def test_episodes_of_one_decision_have_no_growth_at_all():
    mdp, policy, params = set_up(lambda: random_mdp(2, 2, horizon=3))
    ending = jnp.zeros((2, 2, 2)).at[:, :, 1].set(1.0)
    rate = exact.weight_growth_rate(
        mdp._replace(transition=ending), policy, params, params
    )
    assert rate == -np.inf


def test_what_the_behaviour_never_does_does_not_count():
    mdp, policy, params = set_up(canonical_mdp)
    behaviour = {**params, "network": jnp.array([[0.0, -jnp.inf], [0, 0], [0, 0]])}
    moments = exact.weight_second_moments(mdp, policy, params, behaviour)
    take = exact.action_probabilities(mdp, policy, params)[0, 0]
    close(moments[0], take**2)


# The environment.


def test_observations_are_drawn_from_the_emission():
    """|z| < 4.5 in each of 21 frequencies: a false alarm in 7000 runs; seed 0."""
    mdp = random_mdp(3, 4, num_terminal=1, num_observations=3)
    env = tabular_environment(mdp)
    assert env.observation_space == Discrete(3)
    keys = jax.random.split(jax.random.key(0), (2, 20_000))
    state, first = jax.vmap(env.reset)(keys[0])
    actions = jnp.zeros(20_000, jnp.int32)
    after, output = jax.vmap(env.step)(keys[1], state, actions)
    assert after.state.min() == 0 and after.state.max() == 3
    for states, seen in ((state.state, first), (after.state, output.obs)):
        for s in np.unique(states):
            shown = np.asarray(seen)[np.asarray(states) == s]
            chance = np.asarray(mdp.emission[s])
            counts = np.bincount(shown, minlength=3)
            spread = np.sqrt(len(shown) * chance * (1 - chance))
            assert (np.abs(counts - len(shown) * chance) < 4.5 * spread).all()


def test_an_emission_hides_the_same_world():
    plain, hidden = random_mdp(8), random_mdp(8, num_observations=2)
    assert plain.emission is None and hidden.emission.shape == (3, 2)
    for one, other in zip(plain[:4], hidden[:4], strict=True):
        np.testing.assert_array_equal(one, other)
    # As it was before worlds had emissions: old seeds keep their worlds.
    close(random_mdp(0).reward[0], [1.3664634705496859, -0.6651946734866135])


# Bad input.


def broken(**changes):
    fields = {k: v(getattr(canonical_pomdp(), k)) for k, v in changes.items()}
    return canonical_pomdp()._replace(**fields)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": lambda x: x[0]}, r"reward has shape \(2,\), needs \(S, A\)"),
        ({"initial": lambda x: x[:2]}, r"initial has shape \(2,\), needs \(S,\) = \(3"),
        ({"transition": lambda x: x[0]}, r"transition has shape \(2, 3\), needs"),
        ({"terminal": lambda x: x[None]}, r"terminal has shape \(1, 3\)"),
        ({"emission": lambda x: x[:2]}, r"emission has shape \(2, 3\), needs \(S, O\)"),
        ({"emission": lambda x: x[0]}, r"emission has shape \(3,\), needs"),
        ({"horizon": lambda x: 0}, "horizon is 0, needs a whole number"),
        ({"initial": lambda x: x * 0.5}, r"initial sums to 0.5, needs 1; divide"),
        (
            {"transition": lambda x: x.at[0, 1, 0].set(0.25)},
            r"transition\[0, 1\] sums to 0.75",
        ),
        (
            {"emission": lambda x: x.at[0].set(jnp.array([1.5, -0.5, 0.0]))},
            "emission holds -0.5, needs prob",
        ),
        ({"emission": lambda x: x * jnp.nan}, "emission holds nan"),
        ({"initial": lambda x: x[::-1]}, "terminal states probability 1, needs 0"),
    ],
)
@pytest.mark.parametrize("door", ["check", "environment", "dynamic", "enumerate"])
def test_worlds_that_are_none_are_refused(changes, words, door):
    mdp = broken(**changes)
    policy = table_policy(canonical_pomdp())
    params = policy.init(jax.random.key(0), jnp.int32(0))
    doors = {
        "check": check_mdp,
        "environment": tabular_environment,
        "dynamic": lambda mdp: exact.expected_return(mdp, policy, params),
        "enumerate": exact.enumerate_trajectories,
    }
    with pytest.raises(ValueError, match=words):
        doors[door](mdp)


def test_traced_worlds_pass_where_they_can():
    mdp, policy, params = set_up(canonical_pomdp)

    def value(reward):
        return exact.expected_return(mdp._replace(reward=reward), policy, params)

    slope = jax.jit(jax.grad(value))(mdp.reward)
    visits = exact.occupancies(mdp, policy, params).sum(axis=0)
    close(slope, visits[:, None] * exact.action_probabilities(mdp, policy, params))
    with pytest.raises(ValueError, match="mdp is traced, needs known numbers"):
        jax.jit(lambda r: exact.enumerate_trajectories(mdp._replace(reward=r)))(
            mdp.reward
        )


@pytest.mark.parametrize(
    "call",
    [
        exact.expected_return,
        exact.policy_gradient,
        exact.occupancies,
        exact.advantages,
        exact.fisher_matrix,
        exact.natural_gradient,
        exact.average_reward_gradient,
        lambda *world: exact.discounted_approximation(*world, 0.5),
        lambda *world: exact.weight_growth_rate(*world, world[-1]),
    ],
)
def test_memory_is_sent_to_the_enumeration(call):
    policy = recurrent_policy()
    params = policy.init(jax.random.key(0), jnp.int32(0))
    with pytest.raises(ValueError, match=r"recurrent.*use exact\.enumerated_return"):
        call(canonical_mdp(), policy, params)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("expected_return", (1.5,), "discount is 1.5, needs"),
        ("enumerated_return", (-0.1,), "discount is -0.1, needs"),
        ("natural_gradient", (1.0, -1.0), "damping is -1.0, needs"),
        ("discounted_approximation", (1.1,), "beta is 1.1, needs"),
    ],
)
def test_numbers_out_of_range_are_refused(name, arguments, words):
    call = inspect.unwrap(getattr(exact, name))
    with pytest.raises(ValueError, match=words):
        call(*set_up(canonical_mdp), *arguments)


@pytest.mark.parametrize(
    ("batch_size", "words"),
    [(0, "batch_size is 0, needs"), (7, "of 28 trajectories there are 1.3e.10 batch")],
)
def test_batch_sizes_that_cannot_be_are_refused(batch_size, words):
    world = set_up(canonical_mdp)
    with pytest.raises(ValueError, match=words):
        exact.estimate_moments(lambda rows: rows.reward.sum(), *world, batch_size)


@pytest.mark.parametrize("horizon", [20, 5000])
def test_worlds_of_too_many_paths_are_refused(horizon):
    with pytest.raises(ValueError, match=r"trajectories.*shorten the horizon"):
        exact.enumerate_trajectories(random_mdp(0, horizon=horizon))


def test_chains_that_fall_apart_are_refused():
    mdp, policy, params = set_up(canonical_mdp)
    apart = jnp.broadcast_to(jnp.eye(3)[:, None], (3, 2, 3))
    mdp = mdp._replace(transition=apart)
    for call in (exact.stationary_distribution, exact.average_reward_gradient):
        with pytest.raises(ValueError, match="has 3 recurrent classes, needs one"):
            call(mdp, policy, params)


@pytest.mark.parametrize("value", [0, -1])
def test_numbers_of_observations_that_are_none_are_refused(value):
    call = inspect.unwrap(random_mdp)
    with pytest.raises(ValueError, match="num_observations is"):
        call(0, num_observations=value)


def test_all_public_names_are_the_files_own():
    files = [exact.dynamic, exact.paths, exact.enumeration]
    files += [exact.stationary, exact.weights]
    assert exact.__all__ == sorted(name for file in files for name in file.__all__)
