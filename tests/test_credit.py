"""Credit by hand on one packed row: every ratio form, and what it must not count."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.credit import RATIOS, CreditConfig, credit_of
from jaxpg.types import Trajectory

NAN, INF = float("nan"), float("inf")
DISCOUNT = 0.5

# Two episodes and an empty slot, in one row:  A0 A1 B0 B1 B2 --
TIME = [0, 1, 0, 1, 2, 0]
MASK = [1, 1, 1, 1, 1, 0]
ENDS = [0, 1, 0, 0, 1, 0]
REWARDS = [1.0, 2.0, 4.0, 8.0, 16.0]
RHOS = [2.0, 3.0, 0.5, 4.0, 2.0]
A, B = slice(0, 2), slice(2, 5)


def rows_of(reward, time, mask, ends):
    """A batch with nothing in it but what credit reads."""
    reward, time = jnp.array(reward), jnp.array(time)
    ends, no = jnp.array(ends, bool), jnp.zeros(time.shape, bool)
    zeros, mask = jnp.zeros(time.shape), jnp.array(mask, bool)
    return Trajectory(zeros, zeros, zeros, reward, ends, no, mask, time, time)


def packed(empty_reward=100.0, rewards=REWARDS):
    return rows_of([[*rewards, empty_reward]], [TIME], [MASK], [ENDS])


def log_rhos_of(rhos, empty=7.0):
    return jnp.array([[*np.log(rhos), empty]], float)


def quick(function):
    """`jit` for small programs: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def program(config):
    """One program per form: dozens of tests run each on rows of the same shape."""
    return quick(lambda rows, log_rhos: credit_of(rows, config, log_rhos))


def credit(rows=None, rhos=RHOS, empty=7.0, **settings):
    config = CreditConfig(**{"discount": DISCOUNT, **settings})
    rows = packed() if rows is None else rows
    return program(config)(rows, log_rhos_of(rhos, empty))


def real(values):
    """The real decisions of the one row, once the empty slot is seen to be 0."""
    assert values.shape == (1, 6) and values.dtype == jnp.zeros(()).dtype
    assert values[0, 5] == 0.0
    return np.asarray(values[0, :5])


# G = (1 + 2/2, 2 | 4 + 16/2, 8 + 16/2, 16) = (2, 2 | 12, 16, 16);   R = (2 | 12)
# ratios multiplied up to t: (2, 6 | 1/2, 2, 4);   from t on: (6, 3 | 4, 8, 2)
# causal: r * product = (2, 12 | 2, 16, 64), summed on: (8, 12 | 26, 48, 64)
# past dropped, rho (r + next / 2): (2 (1 + 6/2), 6 | (4 + 96/2) / 2, 4 (8 + 32/2), 32)
BY_HAND = {
    ("reward-to-go", "none"): ([2, 2, 12, 16, 16], [1, 1, 1, 1, 1]),
    ("total-return", "none"): ([2, 2, 12, 12, 12], [1, 1, 1, 1, 1]),
    ("reward-to-go", "whole"): ([12, 12, 48, 64, 64], [6, 6, 4, 4, 4]),
    ("total-return", "whole"): ([12, 12, 48, 48, 48], [6, 6, 4, 4, 4]),
    ("reward-to-go", "causal"): ([8, 12, 26, 48, 64], [2, 6, 0.5, 2, 4]),
    ("reward-to-go", "future-dropped"): ([4, 12, 6, 32, 64], [2, 6, 0.5, 2, 4]),
    ("reward-to-go", "past-dropped"): ([8, 6, 26, 96, 32], [2, 3, 0.5, 4, 2]),
    ("reward-to-go", "past-dropped-whole"): ([12, 6, 48, 128, 32], [6, 3, 4, 8, 2]),
    ("reward-to-go", "first-order"): ([4, 6, 6, 64, 32], [2, 3, 0.5, 4, 2]),
}
TO_GO = [ratio for name, ratio in BY_HAND if name == "reward-to-go"]


def test_every_ratio_has_its_numbers():
    assert set(TO_GO) == set(RATIOS)


@pytest.mark.parametrize(("name", "ratio"), BY_HAND)
def test_value_and_reach_by_hand(name, ratio):
    value, reach = BY_HAND[name, ratio]
    given = credit(credit=name, ratio=ratio)
    np.testing.assert_allclose(real(given.value), value, rtol=1e-5)
    np.testing.assert_allclose(real(given.reach), reach, rtol=1e-5)


@pytest.mark.parametrize("ratio", TO_GO)
def test_the_leading_discount_multiplies_both(ratio):
    value, reach = BY_HAND["reward-to-go", ratio]
    given = credit(ratio=ratio, keep_leading_discount=True)
    factors = np.array([1, 0.5, 1, 0.5, 0.25])
    np.testing.assert_allclose(real(given.value), factors * value, rtol=1e-5)
    np.testing.assert_allclose(real(given.reach), factors * reach, rtol=1e-5)


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_the_ends_of_the_discount(discount):
    given = credit(discount=discount)
    expected = [1, 2, 4, 8, 16] if discount == 0.0 else [3, 2, 28, 24, 16]
    np.testing.assert_allclose(real(given.value), expected)


def test_without_settings_it_is_the_undiscounted_reward_to_go():
    given = credit_of(packed())
    np.testing.assert_allclose(real(given.value), [3, 2, 28, 24, 16])
    np.testing.assert_array_equal(real(given.reach), 1.0)


def test_every_single_ratio_is_truncated_before_they_are_multiplied():
    # min(rho, 5/2) = (2, 5/2 | 1/2, 5/2, 2); multiplied up to t (2, 5 | 1/2, 5/4, 5/2)
    # r * product = (2, 10 | 2, 10, 40), summed on (7, 10 | 17, 30, 40)
    given = credit(ratio="causal", max_rho=2.5)
    np.testing.assert_allclose(real(given.reach), [2, 5, 0.5, 1.25, 2.5], rtol=1e-5)
    np.testing.assert_allclose(real(given.value), [7, 10, 17, 30, 40], rtol=1e-5)


@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_truncated_credit_is_that_of_truncated_ratios(ratio):
    given = credit(ratio=ratio, max_rho=2.5)
    expected = credit(ratio=ratio, rhos=np.minimum(RHOS, 2.5))
    np.testing.assert_allclose(given.value, expected.value, rtol=1e-5)
    np.testing.assert_allclose(given.reach, expected.reach, rtol=1e-5)
    assert not np.allclose(given.reach, credit(ratio=ratio).reach)


# Means by time over A and B; A has ended before t = 2 and keeps its last weight there
# where the product is of the past.
#     up to t: (2 + 1/2)/2, (6 + 2)/2, (6 + 4)/2;   whole: 5, 5, 5
#     from t on, alive alone: (6 + 4)/2, (3 + 8)/2, 2;   own: 5/4, (3 + 4)/2, 2
NORMALIZED = {
    "whole": [6 / 5, 6 / 5, 4 / 5, 4 / 5, 4 / 5],
    "causal": [2 / 1.25, 6 / 4, 0.5 / 1.25, 2 / 4, 4 / 5],
    "future-dropped": [2 / 1.25, 6 / 4, 0.5 / 1.25, 2 / 4, 4 / 5],
    "past-dropped-whole": [6 / 5, 3 / 5.5, 4 / 5, 8 / 5.5, 1],
    "first-order": [2 / 1.25, 3 / 3.5, 0.5 / 1.25, 4 / 3.5, 1],
}


@pytest.mark.parametrize("ratio", NORMALIZED)
def test_self_normalised_by_hand(ratio):
    reach = np.array(NORMALIZED[ratio])
    given = credit(ratio=ratio, self_normalize=True)
    np.testing.assert_allclose(real(given.reach), reach, rtol=1e-5)
    if ratio == "causal":
        r = reach * REWARDS
        value = [r[0] + r[1] / 2, r[1], r[2] + r[3] / 2 + r[4] / 4, r[3] + r[4] / 2]
        value = [*value, r[4]]
    else:
        value = reach * [2, 2, 12, 16, 16]
    np.testing.assert_allclose(real(given.value), value, rtol=1e-5)


EVERY_FORM = [
    *({"credit": name, "ratio": ratio} for name, ratio in BY_HAND),
    *({"ratio": ratio, "self_normalize": True} for ratio in NORMALIZED),
    {"ratio": "past-dropped", "max_rho": 2.5, "keep_leading_discount": True},
]


@pytest.mark.parametrize("settings", EVERY_FORM, ids=str)
@pytest.mark.thinned(3)
def test_no_derivative_flows_through(settings):
    config = CreditConfig(discount=DISCOUNT, **settings)

    def total(reward, log_rhos):
        given = credit_of(packed()._replace(reward=reward), config, log_rhos)
        return jnp.sum(given.value) + jnp.sum(given.reach)

    both = quick(jax.value_and_grad(total, argnums=(0, 1)))
    reward, log_rhos = packed().reward, log_rhos_of(RHOS)
    before, slopes = both(reward, log_rhos)
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0.0)
    assert both(2.0 * reward, log_rhos)[0] != before


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("settings", EVERY_FORM, ids=str)
def test_what_an_empty_slot_holds_is_seen_nowhere(settings, garbage):
    clean = credit(rows=packed(empty_reward=0.0), empty=0.0, **settings)
    dirty = credit(rows=packed(empty_reward=garbage), empty=garbage, **settings)
    for one, other in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(real(one), real(other))


def test_an_empty_slot_that_says_it_ends_something_is_none():
    """A slot that waits for the others plays on, masked, to ends that do not count."""
    rows = packed()._replace(terminated=jnp.array([[*ENDS[:5], 1]], bool))
    for settings in EVERY_FORM:
        one, other = credit(**settings), credit(rows=rows, **settings)
        np.testing.assert_array_equal(one.value, other.value)
        np.testing.assert_array_equal(one.reach, other.reach)


@pytest.mark.parametrize("settings", EVERY_FORM, ids=str)
def test_a_batch_without_a_decision_has_no_credit(settings):
    rows = packed()._replace(mask=jnp.zeros((1, 6), bool))
    given = credit(rows=rows, **settings)
    np.testing.assert_array_equal(given.value, 0.0)
    np.testing.assert_array_equal(given.reach, 0.0)


@pytest.mark.parametrize("settings", EVERY_FORM, ids=str)
@pytest.mark.thinned(3)
def test_packed_is_apart(settings):
    config = CreditConfig(discount=DISCOUNT, **settings)
    apart = rows_of(
        [[1.0, 2.0, 50.0], [4.0, 8.0, 16.0]],
        [[0, 1, 2], [0, 1, 2]],
        [[1, 1, 0], [1, 1, 1]],
        [[0, 1, 0], [0, 0, 1]],
    )
    rhos = jnp.array([[2.0, 3.0, 9.0], [0.5, 4.0, 2.0]])
    given = credit(**settings)
    alone = program(config)(apart, jnp.log(rhos))
    for joined, rows in zip(given, alone, strict=True):
        together = np.concatenate([rows[0, :2], rows[1]])
        np.testing.assert_allclose(real(joined), together, rtol=1e-5)
        assert rows[0, 2] == 0.0


@pytest.mark.parametrize("settings", EVERY_FORM, ids=str)
def test_a_nan_in_a_real_slot_is_not_hidden(settings):
    rewards = [*REWARDS[:4], NAN]
    of_reward = credit(rows=packed(rewards=rewards), **settings)
    assert np.isnan(real(of_reward.value)[B]).all()
    assert np.isfinite(real(of_reward.reach)).all()
    if settings["ratio"] == "none":
        return
    of_ratio = credit(rhos=[*RHOS[:4], NAN], **settings)
    assert np.isnan(real(of_ratio.value)[4]) and np.isnan(real(of_ratio.reach)[4])


@pytest.mark.parametrize("rho", [0.0, INF])
@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_impossible_and_infinite_ratios_give_finite_credit(ratio, rho):
    with np.errstate(divide="ignore"):
        given = credit(rhos=[*RHOS[:2], rho, *RHOS[3:]], ratio=ratio)
    assert np.isfinite(given.value).all() and np.isfinite(given.reach).all()
    np.testing.assert_allclose(
        real(given.value)[A], BY_HAND["reward-to-go", ratio][0][A], rtol=1e-5
    )
    if rho == 0.0:
        assert real(given.value)[2] == 0.0 == real(given.reach)[2]


# What is refused.

REFUSED = [
    ({"discount": 1.5}, r"discount is 1.5, needs a number in \[0, 1\]"),
    ({"discount": -0.1}, r"discount is -0.1, needs a number in \[0, 1\]"),
    ({"discount": NAN}, "discount is nan, needs"),
    ({"ratio": "causal", "max_rho": 0.0}, r"max_rho is 0.0, needs a number in \(0"),
    ({"ratio": "causal", "max_rho": NAN}, "max_rho is nan, needs"),
    (
        {"credit": "total-return", "keep_leading_discount": True},
        "keep_leading_discount is set, but credit is 'total-return'.*leave it out, or "
        "take credit 'reward-to-go'",
    ),
    *(
        (
            {"credit": "total-return", "ratio": ratio},
            f"ratio is '{ratio}', but credit is 'total-return'.*take credit "
            "'reward-to-go', or ratio 'whole'",
        )
        for ratio in RATIOS
        if ratio not in ("none", "whole")
    ),
    *(
        (
            settings,
            "ratio is 'none', so there is nothing to change; choose a ratio of "
            + ", ".join(RATIOS[1:]),
        )
        for settings in ({"self_normalize": True}, {"max_rho": 2.0})
    ),
    (
        {"ratio": "past-dropped", "self_normalize": True},
        "self_normalize is set, but ratio is 'past-dropped'.*take 'past-dropped-whole'",
    ),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        CreditConfig(**settings)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("credit", "reward to go", "credit is 'reward to go', unknown; did you mean"),
        ("ratio", "casual", "ratio is 'casual', unknown; did you mean 'causal'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, value, words):
    config = CreditConfig()
    object.__setattr__(config, name, value)  # past the tests' type checker
    with pytest.raises(ValueError, match=words):
        config.__post_init__()


@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_ratios_without_log_rhos_are_refused(ratio):
    words = f"^log_rhos is None, but ratio is '{ratio}'.*importance.log_ratios makes"
    with pytest.raises(ValueError, match=words):
        credit_of(packed(), CreditConfig(ratio=ratio))


def test_shapes_that_do_not_match_are_refused():
    call = inspect.unwrap(credit_of)  # as users have it, without the shape checker
    config = CreditConfig(ratio="causal")
    with pytest.raises(ValueError, match=r"^log_rhos has shape \(1, 5\), but reward"):
        call(packed(), config, jnp.zeros((1, 5)))
    one_row = jax.tree.map(lambda x: x[0], packed())
    for config in (CreditConfig(), CreditConfig(ratio="causal")):
        with pytest.raises(ValueError, match=r"^reward has shape \(6,\), needs \(B, T"):
            call(one_row, config, jnp.zeros(6))
