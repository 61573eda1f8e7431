"""Streamed gradients are those of the batch in memory, whatever the chunk."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import streams
from jaxpg.chunks import Chunks
from jaxpg.credit import CreditConfig
from jaxpg.envs.tabular import canonical_mdp, tabular_environment
from jaxpg.estimators import (
    BASELINES,
    EstimatorConfig,
    estimate_gradient,
    estimate_terms,
    make_estimator,
)
from jaxpg.moments import variance
from jaxpg.policies import tabular_policy
from jaxpg.rollout import rollout_episodes
from jaxpg.streams import batch_source, episode_source, stream_gradient

pytestmark = pytest.mark.usefixtures("float64")

MDP = canonical_mdp()
ENV = tabular_environment(MDP)
POLICY = tabular_policy(ENV.observation_space, ENV.action_space)
KEY = jax.random.key(0)
NUMBER = 12


def params(seed=1):
    return POLICY.init(jax.random.key(seed), jnp.array(0, jnp.int32))


def ids(number=NUMBER):
    return jnp.arange(number, dtype=jnp.int32)


def estimator(baseline="time-dependent", **credit):
    config = EstimatorConfig(baseline=baseline, credit=CreditConfig(**credit))
    return make_estimator(
        config, POLICY, MDP.horizon, observation_space=ENV.observation_space
    )


def quick(function, *arguments):
    """`jit` for programs that run once: compiling them costs more than running."""
    compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return compiled(*arguments)


@functools.cache
def batch(acting=1):
    return quick(
        lambda params: rollout_episodes(ENV, POLICY, params, KEY, ids()), params(acting)
    )


def whole_gradient(which, rows=None):
    return quick(
        lambda params, rows: estimate_gradient(which, params, state_of(which), rows),
        params(),
        batch() if rows is None else rows,
    )


def close(one, other):
    chex.assert_trees_all_close(one, other, rtol=1e-9, atol=1e-12)


def state_of(which):
    return which.baseline.init(jax.random.key(0), jnp.array(0, jnp.int32))


def stream(which, chunk_size, source=None, **options):
    source = episode_source(ENV, POLICY) if source is None else source
    return quick(
        lambda params: stream_gradient(
            which,
            source,
            params,
            state_of(which),
            KEY,
            ids(),
            chunk_size=chunk_size,
            **options,
        ),
        params(),
    )


@pytest.mark.parametrize(
    "baseline", [name for name in BASELINES if not name.endswith("-plain")]
)
@pytest.mark.thinned(8)
def test_streamed_is_whole(baseline, float64):
    which = estimator(baseline)
    close(stream(which, 4).gradient, whole_gradient(which))


@pytest.mark.parametrize("chunk_size", [1, 6, 12])
def test_the_chunk_does_not_matter(chunk_size, float64):
    which = estimator("time-dependent")
    close(stream(which, chunk_size).gradient, whole_gradient(which))


@pytest.mark.parametrize("statistics", ["chunks", "trajectories"])
@pytest.mark.parametrize("baseline", ["none", "time-dependent", "per-parameter"])
@pytest.mark.thinned(4)
def test_moments_are_those_of_the_samples(baseline, statistics, float64):
    which, chunk_size = estimator(baseline), 3
    terms = quick(lambda rows: estimate_terms(which, params(), (), rows), batch())
    if statistics == "chunks":
        terms = jax.tree.map(
            lambda x: x.reshape(-1, chunk_size, *x.shape[1:]).mean(axis=1), terms
        )
    streamed = stream(which, chunk_size, statistics=statistics)
    close(streamed.gradient, jax.tree.map(lambda x: x.mean(axis=0), terms))
    expected = jax.tree.map(lambda x: x.var(axis=0, ddof=1), terms)
    close(variance(streamed.moments), expected)


@pytest.mark.parametrize(
    ("baseline", "credit"),
    [("leave-one-out", "reward-to-go"), ("batch-mean", "total-return")],
)
def test_running_sums_are_the_replayed_pass(baseline, credit, float64):
    which = estimator(baseline, credit=credit, discount=0.7)
    replayed = stream(which, 4)
    once = stream(which, 4, method="running-sums")
    close(once.gradient, replayed.gradient)
    assert np.abs(jax.tree.leaves(once.gradient)[0]).max() > 1e-3


def test_running_sums_keep_the_leading_discount(float64):
    which = estimator("leave-one-out", discount=0.7, keep_leading_discount=True)
    # b is the mean of values over reaches at the starts, where both discounts are 1.
    close(stream(which, 6, method="running-sums").gradient, stream(which, 6).gradient)


def test_another_policy_can_act(float64):
    acting = params(seed=2)
    which = estimator("leave-one-out", ratio="causal")
    source = episode_source(ENV, POLICY, acting=acting)
    whole = whole_gradient(which, batch(acting=2))
    close(stream(which, 3, source).gradient, whole)


def test_a_stored_batch_is_a_source(float64):
    which = estimator("optimal")
    streamed = stream(which, 4, batch_source(batch()))
    close(streamed.gradient, whole_gradient(which))


def test_what_is_seen_on_the_way(float64):
    rows, streamed = batch(), stream(estimator("none"), 4, chunks=Chunks(2))
    assert int(streamed.num_decisions) == int(rows.num_decisions)
    assert int(streamed.num_non_finite) == 0
    mean = np.asarray(rows.reward)[np.asarray(rows.mask)].sum() / NUMBER
    np.testing.assert_allclose(streamed.mean_return, mean, rtol=1e-12)
    assert streamed.moments is None


def test_memory_does_not_grow_with_the_batch():
    def temporary_bytes(number):
        run = jax.jit(
            lambda params, ids: stream_gradient(
                estimator("time-dependent"),
                episode_source(ENV, POLICY),
                params,
                (),
                KEY,
                ids,
                chunk_size=8,
                statistics="trajectories",
            )
        )
        analysis = run.lower(params(), ids(number)).compile().memory_analysis()
        return analysis.temp_size_in_bytes - 4 * number  # the ids themselves

    assert temporary_bytes(8192) < 1.1 * temporary_bytes(64) + 4 * 8192


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_size": 5}, "chunk_size is 5, needs a divisor of number of ids = 12"),
        ({"chunk_size": 0}, "chunk_size is 0, needs a whole number"),
        ({"chunk_size": 4, "statistics": "all"}, "statistics is 'all', unknown"),
        ({"chunk_size": 4, "method": "sums"}, "method is 'sums', unknown"),
        (
            {"chunk_size": 4, "method": "running-sums"},
            "baseline is 'time-dependent'.*take method 'replay'",
        ),
    ],
)
def test_wrong_options_are_refused(options, words):
    call = inspect.unwrap(streams.stream_gradient)
    source = episode_source(ENV, POLICY)
    with pytest.raises(ValueError, match=words):
        call(estimator(), source, params(), (), KEY, ids(), **options)


@pytest.mark.parametrize(
    "config",
    [
        EstimatorConfig(standardize=True),
        EstimatorConfig(credit=CreditConfig(ratio="causal", self_normalize=True)),
    ],
)
def test_what_chunks_cannot_add_up_is_refused(config):
    which = make_estimator(config, POLICY, MDP.horizon)
    source = episode_source(ENV, POLICY)
    with pytest.raises(ValueError, match="use estimate_gradient on a batch in memory"):
        stream_gradient(which, source, params(), (), KEY, ids(), chunk_size=4)
