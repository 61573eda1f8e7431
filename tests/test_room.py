"""Work on the turns that are used: which length is taken, and that nothing changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_estimators import ENV, MDP, POLICY, params_of, quick, state_of
from test_estimators import batch as episodes
from test_estimators import estimator as estimator_of

from jaxpg import room
from jaxpg._batching import anywhere
from jaxpg.algos.base import make_task
from jaxpg.algos.off_policy import OffPolicyConfig
from jaxpg.algos.registry import RECIPES
from jaxpg.algos.reinforce import ReinforceConfig, reinforce
from jaxpg.baselines import constant_baseline, stateless
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


ANY_LENGTH = ("none", "batch-mean", "leave-one-out", "time-dependent")


def test_only_means_may_have_their_rows_cut():
    made = {x: estimator_of(x) for x in BASELINES}
    may = [x for x, y in made.items() if y.baseline.any_length and not y.needs_scores]
    assert sorted(may) == sorted([*ANY_LENGTH, "time-dependent-plain"])


@pytest.mark.parametrize("share", [4, LENGTH], ids=["short", "long"])
@pytest.mark.parametrize("baseline", [*ANY_LENGTH, "standardize", "given"])
def test_weights_are_the_same(baseline, share, monkeypatch, float64):
    standardize = baseline == "standardize"
    name = baseline if baseline in ANY_LENGTH else "batch-mean"
    which = estimator_of(name, standardize)
    rows, params, state = roomy(), params_of(), state_of(which)
    credit = credit_of(rows) if baseline == "given" else None

    def weights(rows):
        return estimate_weights(which, params, state, rows, credit=credit)

    expected = weights(rows)
    assert np.count_nonzero(expected) > 0
    set_lengths(monkeypatch, share)
    assert "cond[" in str(jax.make_jaxpr(weights)(rows))
    np.testing.assert_allclose(quick(weights, rows), expected, rtol=1e-9, atol=1e-12)


def test_nothing_else_is_compiled_twice(monkeypatch, float64):
    """What takes scores, asks the policy, or may count a row's turns: one's own."""
    set_lengths(monkeypatch, 4)
    rows, params = roomy(), params_of()
    own = stateless(lambda params, summary, rows, credit: credit.value * 0.0)
    for which in (
        estimator_of("optimal"),
        estimator_of(ratio="causal"),
        estimator_of(own=own),
    ):
        traced = jax.make_jaxpr(
            lambda rows, which=which: estimate_weights(
                which, params, state_of(which), rows
            )
        )(rows)
        assert "cond[" not in str(traced)


def test_shapes_that_do_not_match_are_refused_here_too(float64):
    which, rows = estimator_of("none"), roomy()
    weights = functools.partial(estimate_weights, which, params_of(), ())
    longer = rows._replace(reward=jnp.pad(rows.reward, ((0, 0), (0, 1))))
    with pytest.raises(ValueError, match=r"mask has shape .*, but reward has shape"):
        weights(longer)
    with pytest.raises(ValueError, match=r"mask has shape .*, but reward has shape"):
        credit_of_used(longer)
    with pytest.raises(ValueError, match=r"mask has shape \(12,\), needs \(B, T\)"):
        weights(jax.tree.map(lambda x: x[0], rows))
    with pytest.raises(ValueError, match=r"credit has shape .*, but mask has shape"):
        weights(rows, credit=credit_of(first_turns(rows, 3)))
    with pytest.raises(ValueError, match="ratio is 'causal', needs 'none' on policy"):
        credit_of_used(rows, CreditConfig(ratio="causal"))


def learns_from_scores():
    """A baseline with a state that wants single trajectories, as one's own may be."""
    plain = stateless(
        lambda params, summary, rows, credit: jnp.ones_like(credit.value),
        needs_scores=True,
    )
    return plain._replace(init=lambda key, obs: jnp.zeros(3))


def settings_of(name):
    match name:
        case "linear":
            return ReinforceConfig(baseline="linear")
        case "reinforce":
            return ReinforceConfig()
        case "off-policy":
            credit = {"ratio": "causal", "discount": 0.99}
            return OffPolicyConfig(keep_leading_discount=True, **credit)
        case _:
            return RECIPES[name].settings()


@pytest.mark.parametrize(
    "name",
    [
        "reinforce",
        "off-policy",
        pytest.param("linear", marks=pytest.mark.exhaustive),
        pytest.param("npg", marks=pytest.mark.exhaustive),
        pytest.param("enac", marks=pytest.mark.exhaustive),
    ],
)
def test_training_is_the_same(name, monkeypatch, tmp_path, float64):
    """Two seeds on CartPole, in rows of 800 turns: some batches use less than 160."""
    taken = set()

    def noted(flags):
        is_long = anywhere(flags)
        jax.debug.callback(lambda x: taken.add(bool(x)), is_long)
        return is_long

    def train(worth):
        set_lengths(monkeypatch, 5, worth)
        monkeypatch.setattr(room, "anywhere", noted)
        config = TrainConfig(
            num_envs=2,
            num_seeds=2,
            max_steps=200,
            policy=PolicyConfig(hidden=(3,)),
            algorithm=settings_of(name),
            runs_dir=tmp_path,
            name=f"{name}-{worth}",
        )
        run = create_run(config)
        return jax.block_until_ready(
            run.program.advance(initial_state(run), np.int32(12))
        )

    expected = train(NEVER)
    assert taken == set()
    found = train(512)
    assert taken == {False, True}
    tolerance = 1e-6 if name == "enac" else 1e-9  # rounding grows in its regression
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_a_baseline_that_learns_and_takes_scores_gets_credit_of_episodes(float64):
    rows = episodes(num_slots=5)  # two in a row
    task = make_task(ENV, POLICY)
    algorithm = reinforce(ReinforceConfig(), task, baseline=learns_from_scores())
    state = algorithm.init(jax.random.key(0), jnp.array(0, jnp.int32))
    moved, info = algorithm.update(jax.random.key(1), state, rows)
    alone = reinforce(ReinforceConfig(), task, baseline=constant_baseline(1.0))
    before = alone.init(jax.random.key(0), jnp.array(0, jnp.int32))
    expected, _ = alone.update(jax.random.key(1), before, rows)
    assert info["grad_norm"] > 0.0
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
        moved.params,
        expected.params,
    )
