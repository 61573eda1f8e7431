"""Fisher-vector products against matrices of scores, and the regression against F^-1 g.

The matrices are built from log-probabilities alone, over all actions of every decision
(for normals over the nodes of a quadrature that is exact for squared scores); no KL,
and none of the code under test, is in them. Float64 but where another type is named.
"""

import functools
import inspect
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_batch import packed
from jax.flatten_util import ravel_pytree

from jaxpg import exact
from jaxpg.chunks import Chunks
from jaxpg.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    TanhGaussian,
)
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import canonical_mdp, canonical_pomdp, random_mdp
from jaxpg.exact.paths import enumerate_trajectories, with_chances
from jaxpg.fisher import COUNTED, FORMS, episodic_natural_gradient
from jaxpg.fisher import fisher_vector_product as fisher_product
from jaxpg.policies import log_prob_fn, tabular_policy
from jaxpg.train.sharding import place
from jaxpg.types import Trajectory

close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
forms = pytest.mark.parametrize("form", FORMS)

D, A, B, T = 3, 4, 8, 5


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


# Policies of observations [T, D], from a matrix [D, A] and an offset [A].


def may(obs):
    """Which actions are allowed: the first always."""
    return jnp.concatenate([jnp.ones((len(obs), 1), bool), obs[:, :1] > 0.0], axis=1)


def outputs(params, row):
    return jnp.tanh(row.obs @ params["weights"]) + params["offset"][None]


def masked(params, row):
    logits = outputs(params, row)
    allowed = jnp.repeat(may(row.obs), A // 2, axis=1)
    return Categorical(jnp.where(allowed, logits, -jnp.inf))


def several(params, row):
    x = outputs(params, row)
    return MultiCategorical((x[:, :2], jnp.stack([x[:, 2], x[:, 3], x[:, 0]], axis=1)))


def gaussian(params, row):
    x = outputs(params, row)
    return DiagonalGaussian(x[:, :2], 0.5 * x[:, 2:])


def squashed(params, row):
    """Its bounds are Python numbers, for the whole row."""
    return TanhGaussian(*gaussian(params, row), low=-2.0, high=3.0)


def recurrent(params, row):
    """A gated memory of the inputs, reset where an episode starts."""

    def advance(carry, inputs):
        x, start = inputs
        carry = jnp.where(start, 0.0, carry)
        gate = jax.nn.sigmoid(x + carry * params["offset"])
        carry = gate * carry + (1.0 - gate) * jnp.tanh(x - 0.5 * carry)
        return carry, carry

    seen = row.obs @ params["weights"]
    return Categorical(jax.lax.scan(advance, row.carry, (seen, row.starts))[1])


class Numbered(NamedTuple):
    """A categorical that carries whole numbers along, which have no derivative."""

    logits: Any
    order: Any

    def log_prob(self, action):
        return Categorical(self.logits).log_prob(action)

    def kl(self, other):
        ordered = (jnp.take_along_axis(x.logits, x.order, -1) for x in (self, other))
        first, second = map(Categorical, ordered)
        return first.kl(second)


def numbered(params, row):
    logits = outputs(params, row)
    return Numbered(logits, jnp.argsort(logits, axis=-1))


POLICIES = {
    "categorical": lambda params, row: Categorical(outputs(params, row)),
    "masked": masked,
    "multi-categorical": several,
    "bernoulli": lambda params, row: Bernoulli(outputs(params, row)),
    "gaussian": gaussian,
    "tanh": squashed,
    "recurrent": recurrent,
    "with integers": numbered,
}
policies = pytest.mark.parametrize("name", POLICIES)


def batch(seed=0):
    """Rows of one or two episodes, some with empty slots; every third row is full."""
    rng = np.random.default_rng(seed)
    zeros = jnp.zeros((B, T))
    filled = (
        np.arange(T) < np.where(np.arange(B) % 3, rng.integers(1, T, B), T)[:, None]
    )
    second = rng.integers(1, T, (B, 1))  # where another episode starts
    steps = np.arange(T)[None]
    time = np.where(steps >= second, steps - second, steps)
    return Trajectory(
        obs=jnp.asarray(rng.normal(size=(B, T, D)).astype(zeros.dtype)),
        action=jnp.zeros((B, T), jnp.int32),
        log_prob=zeros,
        reward=zeros,
        terminated=zeros > 0,
        truncated=zeros > 0,
        mask=jnp.asarray(filled),
        time=jnp.asarray(time.astype(np.int32)),
        episode_id=jnp.zeros((B, T), jnp.int32),
        carry=jnp.zeros((B, A)),
    )


def make_params(seed=1, dtype=float):
    keys = jax.random.split(jax.random.key(seed))
    weights = jax.random.normal(keys[0], (D, A), dtype)
    return {"weights": weights, "offset": jax.random.normal(keys[1], (A,), dtype)}


# Matrices from scores.


def actions_and_chances(distribution):
    """All actions of a row's decisions, [K, T, ...], and their chances, [K, T]."""
    if isinstance(distribution, (DiagonalGaussian, TanhGaussian)):
        return _nodes(distribution)
    if isinstance(distribution, MultiCategorical):
        ranges = [range(x.shape[-1]) for x in distribution.logits]
        each = list(itertools.product(*ranges))
    elif isinstance(distribution, Bernoulli):
        each = list(itertools.product(range(2), repeat=A))
    else:
        each = list(range(distribution.logits.shape[-1]))
    each = jnp.asarray(np.array(each, np.int32))
    actions = jnp.repeat(each[:, None], T, axis=1)
    return actions, jnp.exp(jax.vmap(distribution.log_prob)(actions))


def _nodes(distribution):
    """Nodes of Gauss and Hermite: five are exact for a score squared, of degree 4."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(nodes, repeat=2)))
    chances = np.array([a * b for a, b in itertools.product(weights, repeat=2)])
    std = jnp.exp(distribution.log_std)
    actions = distribution.mean[None] + std[None] * jnp.asarray(grid)[:, None]
    return actions, jnp.repeat(jnp.asarray(chances)[:, None], T, axis=1)


def sum_of_squared_scores(unroll, params, rows):
    vector, unravel = ravel_pytree(params)

    def of_row(row):
        actions, chances = actions_and_chances(unroll(params, row))

        def of_action(action):
            def log_probs(vector):
                return unroll(unravel(vector), row).log_prob(action)

            return jax.jacrev(log_probs)(vector)

        scores = jax.vmap(of_action)(actions)
        scores = jnp.where(chances[..., None] > 0.0, scores, 0.0)
        weights = jnp.where(row.mask[None], chances, 0.0)
        return jnp.einsum("kt,ktp,ktq->pq", weights, scores, scores)

    return np.asarray(quick(lambda rows: jax.vmap(of_row)(rows).sum(0))(rows))


def columns(product, params):
    """The matrix, by its products with the unit vectors."""
    vector, unravel = ravel_pytree(params)
    units = jnp.eye(len(vector), dtype=vector.dtype)
    one = lambda unit: ravel_pytree(product(unravel(unit)))[0]  # noqa: E731
    return np.asarray(quick(jax.vmap(one, out_axes=1))(units))


@policies
@forms
@pytest.mark.thinned(3)
def test_both_forms_are_the_mean_of_squared_scores(name, form, float64):
    unroll, rows, params = POLICIES[name], batch(), make_params()
    expected = sum_of_squared_scores(unroll, params, rows)
    assert np.linalg.norm(expected) > 1.0
    found = columns(
        lambda v: fisher_product(unroll, params, rows, v, form=form), params
    )
    close(found, expected / int(rows.mask.sum()))


@pytest.mark.parametrize(
    ("options", "divide", "add"),
    [
        ({"per": "trajectory"}, 15, 0.0),
        ({"per": "trajectory", "num": 7}, 7, 0.0),
        ({"num": 11, "damping": 0.25}, 11, 0.25),
        ({"num": jnp.array(11), "damping": jnp.array(0.25)}, 11, 0.25),
    ],
)
def test_what_it_is_a_mean_over(options, divide, add, float64):
    unroll, rows, params = POLICIES["categorical"], batch(), make_params()
    assert rows.starts.sum() != rows.mask.sum() != B
    if divide == 15:
        divide = int(rows.starts.sum())
        assert divide > B, "some rows must hold two episodes"
    expected = sum_of_squared_scores(unroll, params, rows) / divide
    expected = expected + add * np.eye(len(expected))
    close(
        columns(lambda v: fisher_product(unroll, params, rows, v, **options), params),
        expected,
    )


WORLDS = {
    "mine": canonical_mdp,
    "mine in the dark": canonical_pomdp,
    "random": lambda: random_mdp(3, horizon=3),
}
worlds = pytest.mark.parametrize("make_mdp", WORLDS.values(), ids=WORLDS)


def tabular(make_mdp, seed=1):
    mdp = make_mdp()
    seen = mdp.reward if mdp.emission is None else mdp.emission.T
    policy = tabular_policy(Discrete(len(seen)), Discrete(mdp.reward.shape[1]))
    return mdp, policy, policy.init(jax.random.key(seed), jnp.int32(0))


@worlds
@forms
@pytest.mark.thinned(3)
def test_over_all_paths_it_is_the_oracles_matrix(make_mdp, form, float64):
    mdp, policy, params = tabular(make_mdp)
    vector = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=float)).reshape(x.shape), params
    )

    def estimate(rows):
        return fisher_product(
            policy.unroll, params, rows, vector, form=form, per="trajectory"
        )

    mean = exact.expected_estimate(estimate, mdp, policy, params, 1)
    close(flat(mean), exact.fisher_matrix(mdp, policy, params) @ flat(vector))


CUTS = [Chunks(3), Chunks(7), Chunks(15), Chunks(10**6), Chunks(7, cut_rows=True)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("chunks", CUTS)
@pytest.mark.parametrize("per", COUNTED)
@forms
def test_chunks_change_nothing(chunks, per, form, float64):
    unroll, rows, params = POLICIES["masked"], batch(), make_params()
    vector = make_params(2)

    def product(chunks):
        options = {"form": form, "per": per, "chunks": chunks}
        return quick(
            lambda v: fisher_product(
                unroll, params, rows._replace(carry=None), v, **options
            )
        )(vector)

    close(flat(product(chunks)), flat(product(Chunks())))


@pytest.mark.parametrize("name", ["recurrent", "tanh"])
@pytest.mark.thinned(2)
def test_whole_rows_may_have_memory_and_bounds(name, float64):
    unroll, rows, params = POLICIES[name], batch(), make_params()
    vector = make_params(2)
    whole = fisher_product(unroll, params, rows, vector)
    close(
        flat(fisher_product(unroll, params, rows, vector, chunks=Chunks(12))),
        flat(whole),
    )


@forms
def test_many_devices_give_what_one_gives(form, float64):
    unroll, rows, params = POLICIES["recurrent"], batch(), make_params()
    vector = make_params(2)

    def product(placement):
        return quick(
            lambda v: fisher_product(
                unroll,
                params,
                rows,
                v,
                form=form,
                chunks=Chunks(5),
                sum_over_rows=placement.sum_over_rows,
            )
        )(vector)

    close(flat(product(place(8))), flat(product(place(1))))


COLLECTIVE = r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\("


def collectives(compiled):
    """Names of the operations in which devices talk, in the program that runs."""
    text = re.sub(r"\([^()]*\) (?=all-|collective-)", "tuple ", compiled.as_text())
    return re.findall(COLLECTIVE, text)


@pytest.mark.parametrize("options", [{}, {"num": 30}, {"per": "trajectory"}])
def test_a_sharded_product_costs_one_all_reduce(options):
    placement = place(8)
    spread = jax.sharding.NamedSharding(
        placement.replicated.mesh, jax.sharding.PartitionSpec("rows")
    )
    rows = jax.device_put(batch(), spread)
    params, vector = jax.device_put(
        (make_params(), make_params(2)), placement.replicated
    )

    def program(sum_over_rows):
        def product(params, rows, vector):
            return fisher_product(
                POLICIES["categorical"],
                params,
                rows,
                vector,
                chunks=Chunks(3),
                **options,
                **sum_over_rows,
            )

        return jax.jit(product).lower(params, rows, vector).compile()

    ours = program({"sum_over_rows": placement.sum_over_rows})
    assert collectives(ours) == ["all-reduce"]
    # The partitioner left to itself: so that the count above can fail.
    assert collectives(program({})) != ["all-reduce"]


# What must not be seen.


@forms
def test_empty_slots_are_not_seen(form, float64):
    unroll, rows, params = POLICIES["categorical"], batch(), make_params()
    vector = make_params(2)
    other = jnp.where(rows.mask[..., None], rows.obs, 1e3)
    expected = fisher_product(unroll, params, rows, vector, form=form)
    found = fisher_product(unroll, params, rows._replace(obs=other), vector, form=form)
    close(flat(found), flat(expected))


def test_an_empty_slot_may_forbid_every_action(float64):
    rows, params, vector = batch(), make_params(), make_params(2)
    some = jnp.broadcast_to(jnp.arange(A) != 1, (T, A))

    def unroll(params, row, everywhere=False):
        allowed = some & (row.mask[:, None] | everywhere)
        # Added, so that what is NaN would find its way back into the parameters.
        return Categorical(outputs(params, row) + jnp.where(allowed, 0.0, -jnp.inf))

    assert jnp.isnan(unroll(params, jax.tree.map(lambda x: x[1], rows)).entropy()).any()
    found = flat(fisher_product(unroll, params, rows, vector))
    clean = functools.partial(unroll, everywhere=True)
    close(found, flat(fisher_product(clean, params, rows, vector)))


@forms
@pytest.mark.parametrize("per", COUNTED)
def test_without_a_decision_it_is_zero(form, per):
    unroll, rows, params = POLICIES["categorical"], batch(), make_params()
    rows = rows._replace(mask=jnp.zeros_like(rows.mask))
    found = fisher_product(unroll, params, rows, params, form=form, per=per)
    assert not flat(found).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types_are_kept(dtype):
    rows = batch()
    rows = rows._replace(obs=rows.obs.astype(dtype))
    params, vector = make_params(1, dtype), make_params(2, dtype)
    found = fisher_product(POLICIES["categorical"], params, rows, vector, damping=0.5)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    rows = batch()
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (params, vector)]
    expected = flat(
        fisher_product(POLICIES["categorical"], wide[0], rows, wide[1], damping=0.5)
    )
    coarse = 1e-6 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(flat(found).astype(np.float32), expected, atol=coarse)


def test_bad_arguments_are_refused():
    unroll, rows, params = POLICIES["categorical"], batch(), make_params()

    def product(vector=params, rows=rows, unroll=unroll, **options):
        return fisher_product(unroll, params, rows, vector, **options)

    with pytest.raises(ValueError, match="form is 'gauss', unknown; did you mean"):
        product(form="gauss")
    with pytest.raises(ValueError, match="per is 'row', unknown; choose one of dec"):
        product(per="row")
    with pytest.raises(ValueError, match=r"damping is -0\.1, needs a number in"):
        product(damping=-0.1)
    with pytest.raises(ValueError, match=r"vector is a tree of .*, needs .*offset"):
        product({"weights": params["weights"]})
    with pytest.raises(
        ValueError, match=r"rows\.mask has shape \(5,\), needs \(B, T\)"
    ):
        product(rows=jax.tree.map(lambda x: x[0], rows))
    with pytest.raises(ValueError, match=r"kl has shape \(\), needs \(5,\) = one per"):
        product(unroll=lambda params, row: Categorical(params["offset"]))


# The episodic natural actor-critic.


def all_paths(mdp, policy, params, discount):
    rows, chances = with_chances(enumerate_trajectories(mdp), policy, params)
    factors = discount ** jnp.arange(mdp.horizon, dtype=float)
    returns = jnp.sum(jnp.where(rows.mask, rows.reward, 0.0) * factors[None], axis=1)
    return rows, chances, returns


@pytest.mark.thinned(10)
@worlds
@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_over_all_paths_the_regression_is_the_natural_gradient(
    make_mdp, discount, damping, float64
):
    mdp, policy, params = tabular(make_mdp)
    rows, chances, returns = all_paths(mdp, policy, params, discount)
    result = quick(
        lambda params: episodic_natural_gradient(
            log_prob_fn(policy),
            params,
            rows,
            100.0 + returns,  # the offset must not matter
            damping=damping,
            num_iterations=30,
            tolerance=1e-24,
            chances=3.0 * chances,  # nor the unit of the chances
            chunks=Chunks(2, cut_rows=True),  # whatever the cut
        )
    )(params)
    expected = exact.natural_gradient(mdp, policy, params, discount, damping)
    assert np.linalg.norm(flat(expected)) > 0.1
    np.testing.assert_allclose(
        flat(result.solution), flat(expected), rtol=1e-8, atol=1e-9
    )
    assert result.residual < 1e-10


def test_it_is_the_regression_that_it_says(float64):
    """Ridge regression by LAPACK, on features that are written out."""
    mdp, policy, params = tabular(lambda: random_mdp(5, horizon=3))
    rows, _, returns = all_paths(mdp, policy, params, 1.0)
    picked = np.random.default_rng(0).choice(len(returns), 24)
    rows, returns = jax.tree.map(lambda x: x[picked], rows), returns[picked]
    weights = 0.8 ** jnp.broadcast_to(jnp.arange(3.0), rows.mask.shape)
    vector, unravel = ravel_pytree(params)

    def feature(row, weight):
        def total(vector):
            log_probs = log_prob_fn(policy)(unravel(vector), row)
            return jnp.sum(jnp.where(row.mask, weight * log_probs, 0.0))

        return jax.grad(total)(vector)

    features = np.asarray(jax.vmap(feature)(rows, weights))
    centred = features - features.mean(0)
    left = centred.T @ centred / 24 + 0.1 * np.eye(len(vector))
    expected = np.linalg.solve(left, centred.T @ (returns - returns.mean()) / 24)

    def solve(sum_over_rows):
        return quick(
            lambda params: episodic_natural_gradient(
                log_prob_fn(policy),
                params,
                rows,
                returns,
                damping=0.1,
                num_iterations=30,
                tolerance=1e-26,
                decision_weights=weights,
                sum_over_rows=sum_over_rows,
            )
        )(params)

    for placement in (place(1), place(8)):
        close(flat(solve(placement.sum_over_rows).solution), expected)


@pytest.mark.parametrize(
    "chunks", [Chunks(), Chunks(3), Chunks(3, cut_rows=True)], ids=str
)
@pytest.mark.thinned(2)
def test_packed_episodes_are_rows_of_their_own(chunks, float64):
    mdp, policy, params = tabular(canonical_mdp)
    rows, chances, returns = all_paths(mdp, policy, params, 1.0)
    some = slice(0, len(returns) // 3 * 3)
    rows, chances, returns = jax.tree.map(lambda x: x[some], (rows, chances, returns))
    weights = 0.8 ** rows.time.astype(float)
    assert not rows.mask.all(), "lengths differ, or packing moves nothing"

    def solve(rows, returns, chances, weights):
        return quick(
            lambda: episodic_natural_gradient(
                log_prob_fn(policy),
                params,
                rows,
                returns,
                damping=0.1,
                num_iterations=30,
                tolerance=1e-24,
                decision_weights=weights,
                chances=chances,
                chunks=chunks,
            )
        )()

    alone = solve(rows, returns, chances, weights)
    everywhere = [
        jnp.broadcast_to(x[:, None], rows.mask.shape) for x in (returns, chances)
    ]
    fields = rows._replace(reward=everywhere[0], log_prob=everywhere[1])
    shared = packed(fields, 3)
    together = solve(
        packed(rows, 3),
        shared.reward,
        shared.log_prob,
        0.8 ** shared.time.astype(float),
    )
    close(flat(together.solution), flat(alone.solution))


def test_rows_that_do_not_count_may_be_anything(float64):
    mdp, policy, params = tabular(canonical_mdp)
    rows, chances, returns = all_paths(mdp, policy, params, 1.0)
    chances = chances.at[0].set(0.0)

    def solve(rows, returns, chances):
        program = quick(
            lambda params: episodic_natural_gradient(
                log_prob_fn(policy), params, rows, returns, chances=chances, damping=0.1
            )
        )
        return flat(program(params).solution)

    without = [x[1:] for x in (returns, chances)]
    expected = solve(jax.tree.map(lambda x: x[1:], rows), *without)
    close(solve(rows, returns.at[0].set(50.0), chances), expected)


def test_float32_is_enough():
    mdp, policy, params = tabular(canonical_mdp)
    rows, chances, returns = all_paths(mdp, policy, params, 1.0)
    result = quick(
        lambda params: episodic_natural_gradient(
            log_prob_fn(policy), params, rows, returns, chances=chances, damping=0.1
        )
    )(params)
    expected = exact.natural_gradient(mdp, policy, params, damping=0.1)
    np.testing.assert_allclose(
        flat(result.solution), flat(expected), rtol=1e-4, atol=1e-5
    )
    assert result.solution["network"].dtype == jnp.float32


def test_bad_arguments_of_the_regression_are_refused():
    mdp, policy, params = tabular(canonical_mdp)
    rows, chances, returns = all_paths(mdp, policy, params, 1.0)
    call = inspect.unwrap(episodic_natural_gradient)  # without the shape checker
    solve = functools.partial(call, log_prob_fn(policy), params, rows)
    with pytest.raises(ValueError, match=r"damping is -1\.0, needs a number in"):
        solve(returns, damping=-1.0)
    with pytest.raises(ValueError, match=r"returns have shape .*need \(B,\) or"):
        solve(returns[1:])
    with pytest.raises(ValueError, match=r"decision_weights \(\d+, 2\), need \(B,\)"):
        solve(returns, decision_weights=jnp.ones((len(returns), 2)))
    with pytest.raises(
        ValueError, match=r"chances have shape .*need .* = one per return"
    ):
        solve(returns, chances=chances[1:])
    with pytest.raises(ValueError, match="num_iterations is 0"):
        solve(returns, num_iterations=0)
