"""Heads: outputs in their order, scales as stated, one answer for a row and a batch."""

import inspect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    StateDependentGaussian,
    TanhGaussian,
)
from jaxpg.envs.base import Box, Discrete, Masked, MultiBinary, MultiDiscrete
from jaxpg.heads import (
    LOG_STD_RANGE,
    Head,
    bernoulli_head,
    categorical_head,
    gaussian_head,
    head_for,
    multi_categorical_head,
    state_dependent_noise_head,
    tanh_gaussian_head,
)

BOX = Box(-1, 1, (3,))
UNEVEN = Box(np.array([-1.0, 0.0, 5.0]), np.array([1.0, 0.5, 9.0]), (3,))


class Case(NamedTuple):
    """A head, how many outputs it wants, and what it must make of them."""

    head: Head
    num_outputs: int
    kind: type
    keeps_to_space: bool


CASES = {
    "categorical": Case(categorical_head(Discrete(3)), 3, Categorical, True),
    "multi": Case(
        multi_categorical_head(MultiDiscrete((2, 4, 3))), 9, MultiCategorical, True
    ),
    "multi-one": Case(
        multi_categorical_head(MultiDiscrete((3,))), 3, MultiCategorical, True
    ),
    "bernoulli": Case(bernoulli_head(MultiBinary(4)), 4, Bernoulli, True),
    "gaussian": Case(gaussian_head(BOX, -0.5), 3, DiagonalGaussian, False),
    "gaussian-state": Case(gaussian_head(BOX, -0.5, True), 6, DiagonalGaussian, False),
    "tanh": Case(tanh_gaussian_head(BOX, -0.5), 3, TanhGaussian, True),
    "tanh-uneven": Case(tanh_gaussian_head(UNEVEN), 3, TanhGaussian, True),
    "tanh-state": Case(tanh_gaussian_head(UNEVEN, -0.5, True), 6, TanhGaussian, True),
    "noise": Case(
        state_dependent_noise_head(BOX, 5, -0.5), 8, StateDependentGaussian, False
    ),
}


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.thinned(2)
def test_outputs_become_the_distribution_of_the_space(case):
    assert case.head.num_outputs == case.num_outputs
    policy = case.head.distribution(case.head.init(), normal(0, case.num_outputs))
    assert type(policy) is case.kind
    action = policy.sample(jax.random.key(0))
    assert action.shape == policy.mode().shape == case.head.space.shape
    assert policy.log_prob(action).shape == ()
    if case.keeps_to_space:
        draws = jax.vmap(policy.sample)(jax.random.split(jax.random.key(1), 100))
        assert all(case.head.space.contains(policy.to_env(a)) for a in draws)


# 3 rows and 3 dimensions: bounds must not be taken for one number per row.
@pytest.mark.parametrize("batch", [(3,), (2, 3)], ids=str)
@pytest.mark.thinned(9)
def test_a_batch_is_its_rows(case, batch):
    params = jax.tree.map(lambda x: x + normal(1, *x.shape), case.head.init())
    outputs = normal(0, *batch, case.num_outputs)
    whole = case.head.distribution(params, outputs)
    rows = lambda x: case.head.distribution(params, x)  # noqa: E731
    for _ in batch:
        rows = jax.vmap(rows)
    vmapped = jax.jit(rows)(outputs)
    action = whole.sample(jax.random.key(2))
    first = (0,) * len(batch)
    alone = case.head.distribution(params, outputs[first])
    assert whole.log_prob(action).shape == batch
    for policy in (whole, vmapped):
        log_prob, squashed = policy.log_prob(action), policy.to_env(action)
        np.testing.assert_allclose(log_prob, whole.log_prob(action), rtol=1e-5)
        close = dict(rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            log_prob[first], alone.log_prob(action[first]), **close
        )
        np.testing.assert_allclose(
            squashed[first], alone.to_env(action[first]), **close
        )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.thinned(3)
def test_numbers_have_the_type_of_the_outputs(case, dtype, float64):
    def numbers(outputs, key):
        policy = case.head.distribution(case.head.init(), outputs)
        action = policy.sample(key)
        return policy.log_prob(action), policy.kl(policy), policy.to_env(action)

    outputs = jnp.zeros((2, case.num_outputs), dtype)
    found = jax.eval_shape(numbers, outputs, jax.random.key(0))
    is_discrete = case.kind in (Categorical, MultiCategorical, Bernoulli)
    assert [x.dtype for x in found[:2]] == [dtype, dtype]
    assert found[2].dtype == ("int32" if is_discrete else dtype)


@pytest.mark.thinned(2)
def test_scores_are_finite_and_reach_all_that_is_learned(case):
    outputs, params = 30 * normal(0, case.num_outputs), case.head.init()

    def log_prob(params, outputs):
        policy = case.head.distribution(params, outputs)
        action = jax.lax.stop_gradient(policy.sample(jax.random.key(0)))
        return policy.log_prob(action)

    slopes, of_outputs = jax.grad(log_prob, (0, 1))(params, outputs)
    assert np.all(np.isfinite(of_outputs))
    assert all(np.all(np.isfinite(s)) & np.all(s != 0) for s in slopes.values())
    assert set(slopes) == (set() if not params else {"log_std"})


def test_components_take_their_logits_in_order():
    head = multi_categorical_head(MultiDiscrete((2, 4, 3)))
    policy = head.distribution({}, jnp.arange(9.0))
    assert [x.tolist() for x in policy.logits] == [[0, 1], [2, 3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("make", [gaussian_head, tanh_gaussian_head])
@pytest.mark.parametrize("state_dependent", [False, True])
def test_first_scale_is_the_one_asked_for(make, state_dependent):
    head = make(BOX, -0.5, state_dependent)
    mean = jnp.array([1.0, -2.0, 3.0])
    extra = jnp.zeros(3 if state_dependent else 0)
    policy = head.distribution(head.init(), jnp.concatenate([mean, extra]))
    np.testing.assert_array_equal(policy.mean, mean)
    np.testing.assert_allclose(policy.log_std, -0.5, rtol=1e-6)


@pytest.mark.parametrize("make", [gaussian_head, tanh_gaussian_head])
@pytest.mark.parametrize("centre", [-3.0, 0.0, 1.5])
def test_state_dependent_scale_is_kept_in_range_and_can_come_back(make, centre):
    head = make(Box(-1, 1, (1,)), centre, True)
    params = head.init()

    def log_std(offset, bias):
        outputs = jnp.stack([jnp.zeros(()), offset])
        return head.distribution({"log_std": bias[None]}, outputs).log_std[0]

    bias = params["log_std"][0]
    offsets = jnp.linspace(-200.0, 40.0, 400)
    numbers = jax.vmap(log_std, (0, None))(offsets, bias)
    slopes = jax.vmap(jax.grad(log_std, (0, 1)), (0, None))(offsets, bias)
    low, high = LOG_STD_RANGE
    assert low == -20 and high == 2
    assert np.all((numbers >= low) & (numbers <= high))
    assert numbers[0] < low + 0.2 and numbers[-1] > high - 0.1  # nearly reached
    np.testing.assert_array_equal(*slopes)  # the learned number and the output add up
    u = np.asarray(offsets, np.float64)
    u = u / np.where(u > 0, high - centre, centre - low)
    np.testing.assert_allclose(slopes[0], (1 + u**2) ** -1.5, rtol=1e-2)
    # Slope 1 and no curvature at the centre: x -> x up to third order.
    for near in (-0.01, 0.01):
        x = jnp.asarray(near)
        np.testing.assert_allclose(log_std(x, bias), centre + near, atol=1e-5)
        np.testing.assert_allclose(jax.grad(log_std)(x, bias), 1, atol=1e-3)
    for wild in (-1e30, 1e30):
        assert low <= log_std(jnp.asarray(wild), bias) <= high


def test_squashed_actions_fill_an_uneven_box():
    head = tanh_gaussian_head(UNEVEN)
    policies = jax.vmap(head.distribution, (None, 0))(head.init(), jnp.zeros((3, 3)))
    pre = jnp.broadcast_to(jnp.array([[-40.0], [0.0], [40.0]]), (3, 3))
    middle = 0.5 * (UNEVEN.low + UNEVEN.high)
    expected = np.stack([UNEVEN.low, middle, UNEVEN.high])
    np.testing.assert_allclose(policies.to_env(pre), expected, rtol=1e-6, atol=1e-6)


# Squares of the first and the last leave float32's range.
@pytest.mark.parametrize("size", [0.0, 1e-30, 0.01, 1.0, 1e30])
def test_first_noise_has_its_scale_whatever_the_network_puts_out(size):
    head = state_dependent_noise_head(BOX, 4, -0.5)
    features = size * jnp.array([0.5, -1.0, 0.0, 2.0])
    outputs = jnp.concatenate([jnp.ones(3), features])
    policy = head.distribution(head.init(), outputs)
    np.testing.assert_allclose(jnp.sum(policy.features**2), 1, rtol=1e-6)
    direction = (
        np.array([0.5, -1, 0, 2]) / math.sqrt(5.25) if size else 0.5 * np.ones(4)
    )
    np.testing.assert_allclose(policy.features, direction, rtol=1e-5)
    expected = DiagonalGaussian(jnp.ones(3), jnp.full(3, -0.5))
    np.testing.assert_allclose(policy.entropy(), expected.entropy(), rtol=1e-5)
    assert policy.log_std.shape == (4, 3)


def test_no_gradient_bends_the_features_to_the_noise():
    head, action = state_dependent_noise_head(BOX, 4), jnp.array([1.0, -2.0, 0.5])
    params, outputs = head.init(), normal(0, 7)

    def log_prob(params, outputs):
        return head.distribution(params, outputs).log_prob(action)

    slopes, of_outputs = jax.grad(log_prob, (0, 1))(params, outputs)
    assert np.all(of_outputs[:3] != 0)
    np.testing.assert_array_equal(of_outputs[3:], 0)
    assert np.all(slopes["log_std"] != 0)


def test_one_key_holds_the_noise_and_follows_the_features():
    head, key = state_dependent_noise_head(BOX, 4), jax.random.key(0)

    def noise(seed, key):
        outputs = normal(seed, 7)
        policy = head.distribution(head.init(), outputs)
        return np.asarray(policy.features), np.asarray(policy.sample(key) - policy.mean)

    rows, noises = zip(*(noise(seed, key) for seed in range(8)), strict=True)
    # Eight states, one matrix of four rows: a least-squares fit leaves nothing but the
    # floor's constant, for which a column of ones stands.
    rows = np.column_stack([np.stack(rows), np.ones(8)])
    fit = np.linalg.lstsq(rows, np.stack(noises), rcond=None)[0]
    np.testing.assert_allclose(rows @ fit, np.stack(noises), atol=1e-5)
    assert np.abs(fit[:4]).max() > 0.5
    assert np.all(noise(0, jax.random.key(1))[1] != noises[0])


@pytest.mark.parametrize(
    "space, kind",
    [
        (Discrete(3), Categorical),
        (MultiDiscrete((2, 3)), MultiCategorical),
        (MultiBinary(2), Bernoulli),
        (BOX, DiagonalGaussian),
    ],
    ids=str,
)
def test_usual_head_of_a_space(space, kind):
    head = head_for(space)
    assert head.space == space
    outputs = jnp.zeros(head.num_outputs)
    assert type(head.distribution(head.init(), outputs)) is kind


def untyped(function):
    """Without the annotations' check, which is there in tests but not for users."""
    return inspect.unwrap(function)


REFUSED = {
    "categorical": (
        lambda: untyped(categorical_head)(BOX),
        "needs a Discrete; for a Box use",
    ),
    "multi": (
        lambda: untyped(multi_categorical_head)(Discrete(2)),
        "needs a MultiDiscrete of",
    ),
    "multi, empty": (
        lambda: multi_categorical_head(MultiDiscrete(())),
        "at least one component",
    ),
    "bernoulli": (
        lambda: untyped(bernoulli_head)(Discrete(2)),
        "needs a MultiBinary; for a",
    ),
    "gaussian": (lambda: gaussian_head(Box(-1, 1, (2, 2))), r"needs a Box with shape"),
    "gaussian, discrete": (
        lambda: untyped(gaussian_head)(Discrete(2)),
        r"shape \(D,\); flat",
    ),
    "scale at the edge": (
        lambda: gaussian_head(BOX, 2.0, state_dependent=True),
        r"initial_log_std is 2.0, needs a number in \[-19.9, 1.9\]; for another scale",
    ),
    "tanh": (lambda: tanh_gaussian_head(Box(-1, 1, ())), r"needs a Box with shape"),
    "tanh, infinite": (
        lambda: tanh_gaussian_head(Box(-1, np.inf, (2,))),
        "needs finite bounds with low < high; without bounds use gaussian_head",
    ),
    "tanh, as good as infinite": (
        lambda: tanh_gaussian_head(Box(-1, np.finfo(np.float32).max, (2,))),
        "needs finite bounds",
    ),
    "tanh, one swapped": (
        lambda: tanh_gaussian_head(Box(np.zeros(2), np.array([1.0, 0.0]), (2,))),
        "low < high",
    ),
    "noise": (
        lambda: untyped(state_dependent_noise_head)(Discrete(2), 3),
        "needs a Box",
    ),
    "noise without features": (
        lambda: state_dependent_noise_head(BOX, 0),
        "num_features is 0, needs a whole number of at least 1",
    ),
    "no usual head": (
        lambda: head_for(Masked(BOX, 3)),
        "no usual head fits it; build a Head and pass it",
    ),
}


@pytest.mark.parametrize("call, sentence", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
