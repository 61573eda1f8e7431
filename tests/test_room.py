"""Work on the turns that are used: which length is taken, and that nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_estimators import MDP, params_of, quick, state_of
from test_estimators import batch as episodes
from test_estimators import estimator as estimator_of

from jaxpg import room
from jaxpg.algos.reinforce import ReinforceConfig
from jaxpg.credit import CreditConfig, credit_of, credit_of_used
from jaxpg.estimators import BASELINES, estimate_weights
from jaxpg.room import at_used_length, first_turns, with_room
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.run import create_run, initial_state

LENGTH = 4 * MDP.horizon
NEVER = 10**9


def roomy():
    """The mine's episodes with three times their room behind them."""
    rows = episodes()._replace(next_obs=None, carry=None)
    return jax.tree.map(lambda x: with_room(x, LENGTH), rows)


def set_lengths(monkeypatch, share, worth=2):
    monkeypatch.setattr(room, "SHARE", share)
    monkeypatch.setattr(room, "WORTH_A_BRANCH", worth)


def length_of(mask):
    return at_used_length(lambda n: jnp.asarray(n, jnp.int32), mask)


@pytest.mark.parametrize(("last", "expected"), [(0, 64), (63, 64), (64, 512)])
def test_the_short_length_is_taken_if_nothing_comes_after_it(last, expected):
    mask = jnp.zeros((3, 512), bool).at[1, last].set(True)
    assert jax.jit(length_of)(mask) == expected


def test_short_rows_and_known_ones_have_no_branch():
    assert jax.jit(length_of)(jnp.zeros((1, 511), bool)) == 511
    assert length_of(jnp.zeros((1, 512), bool)) == 512


def test_members_of_a_population_take_one_length_together():
    masks = jnp.zeros((2, 1, 512), bool).at[1, 0, 100].set(True)
    assert jax.jit(jax.vmap(length_of))(masks).tolist() == [512, 512]
    assert jax.jit(jax.vmap(length_of))(masks[:1]).tolist() == [64]


def test_a_rows_memory_has_no_turns():
    rows = roomy()._replace(carry=jnp.ones((10, 3)))
    assert first_turns(rows, 2).carry.shape == (10, 3)
    assert first_turns(rows, 2).mask.shape == (10, 2)


@pytest.mark.parametrize("share", [4, LENGTH], ids=["short", "long"])
@pytest.mark.parametrize("credit", ["reward-to-go", "total-return"])
def test_credit_is_the_same(credit, share, monkeypatch, float64):
    rows, config = roomy(), CreditConfig(credit=credit, discount=0.9)
    expected = credit_of(rows, config)
    set_lengths(monkeypatch, share)
    found = quick(lambda rows: credit_of_used(rows, config), rows)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


WITHOUT_SCORES = [
    name
    for name in BASELINES
    if not estimator_of(name).needs_scores  # those are not worked out twice
]


@pytest.mark.parametrize("share", [4, LENGTH], ids=["short", "long"])
@pytest.mark.parametrize("baseline", [*WITHOUT_SCORES, "standardize"])
def test_weights_are_the_same(baseline, share, monkeypatch, float64):
    standardize = baseline == "standardize"
    which = estimator_of("batch-mean" if standardize else baseline, standardize)
    rows, params, state = roomy(), params_of(), state_of(which)

    def weights(rows):
        return estimate_weights(which, params, state, rows)

    expected = weights(rows)
    assert np.count_nonzero(expected) > 0
    set_lengths(monkeypatch, share)
    assert "cond[" in str(jax.make_jaxpr(weights)(rows))
    np.testing.assert_allclose(quick(weights, rows), expected, rtol=1e-9, atol=1e-12)


def test_what_takes_scores_or_asks_the_policy_is_compiled_once(monkeypatch, float64):
    set_lengths(monkeypatch, 4)
    rows, params = roomy(), params_of()
    for which in (estimator_of("optimal"), estimator_of(ratio="causal")):
        traced = jax.make_jaxpr(
            lambda rows, which=which: estimate_weights(
                which, params, state_of(which), rows
            )
        )(rows)
        assert "cond[" not in str(traced)


@pytest.mark.parametrize("baseline", ["time-dependent", "linear"])
def test_training_is_the_same(baseline, monkeypatch, tmp_path, float64):
    """CartPole in rows of 800 turns, of which a new policy uses an eighth or so."""

    def train(worth):
        monkeypatch.setattr(room, "WORTH_A_BRANCH", worth)
        config = TrainConfig(
            num_envs=2,
            max_steps=200,
            policy=PolicyConfig(hidden=(3,)),
            algorithm=ReinforceConfig(baseline=baseline),
            runs_dir=tmp_path,
            name=f"{baseline}-{worth}",
        )
        run = create_run(config)
        return run.program.advance(initial_state(run), np.int32(12))

    found, expected = train(512), train(NEVER)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
