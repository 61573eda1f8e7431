"""The policy contract, held for a table of policies from every door."""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpg.distributions import Categorical, DiagonalGaussian, MultiCategorical
from jaxpg.envs import (
    Box,
    Discrete,
    Masked,
    MaskedObs,
    MultiBinary,
    MultiDiscrete,
)
from jaxpg.heads import categorical_head, gaussian_head, head_for
from jaxpg.networks import ACTIVATIONS, gru_network, mlp, mlp_network
from jaxpg.policies import (
    cnn_policy,
    from_apply,
    from_linen,
    from_network,
    from_nnx,
    log_prob_fn,
    mlp_policy,
    recurrent_policy,
)
from jaxpg.types import Trajectory

T = 5


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, obs):
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(obs)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 4, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((3,)))
        self.last = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, obs):
        return self.last(nnx.relu(self.first(obs))) * self.scale[...]


def plain_init(key, obs):
    return {"w": 0.5 * jax.random.normal(key, (obs["a"].size + 1, 3))}


def plain_apply(params, obs):
    flat = jnp.concatenate([obs["a"].ravel(), obs["b"][None]])
    return flat @ params["w"]


class Door(NamedTuple):
    """A policy, how to draw an observation for it, and what it must answer with."""

    make: object
    obs: object
    kind: type
    action_shape: tuple = ()
    is_recurrent: bool = False


def floats(*shape):
    return lambda key: jax.random.normal(key, shape)


def masked(draw, *allowed):
    """Observations of which some actions are allowed, the second one among them."""
    return lambda key: MaskedObs(draw(key), jnp.array(allowed, bool))


THREE = categorical_head(Discrete(3))
SMALL = {"hidden": (4,), "memory": 3}
DOORS = {
    "mlp": Door(
        lambda: mlp_policy(Box(-1, 1, (2,)), Discrete(3), hidden=(4,)),
        floats(2),
        Categorical,
    ),
    "mlp-image": Door(
        lambda: mlp_policy(Box(0, 9, (2, 3, 1)), Discrete(3), hidden=(4, 4)),
        floats(2, 3, 1),
        Categorical,
    ),
    "mlp-number": Door(
        lambda: mlp_policy(Box(-1, 1, ()), Discrete(3), hidden=()),
        floats(),
        Categorical,
    ),
    "mlp-integers": Door(
        lambda: mlp_policy(
            Box(0, 9, (2,), jnp.int32), Discrete(3), hidden=(4,), activation="relu"
        ),
        lambda key: jax.random.randint(key, (2,), 0, 9),
        Categorical,
    ),
    "mlp-discrete-obs": Door(
        lambda: mlp_policy(Discrete(6), Discrete(3), hidden=(4,)),
        lambda key: jax.random.randint(key, (), 0, 6),
        Categorical,
    ),
    "mlp-gaussian": Door(
        lambda: mlp_policy(Box(-1, 1, (2,)), Box(-1, 1, (3,)), hidden=(4,)),
        floats(2),
        DiagonalGaussian,
        (3,),
    ),
    "from-apply": Door(
        lambda: from_apply(plain_init, plain_apply, THREE),
        lambda key: {"a": jax.random.normal(key, (2, 2)), "b": jnp.ones(())},
        Categorical,
    ),
    "from-apply-gaussian": Door(
        lambda: from_apply(
            plain_init, plain_apply, gaussian_head(Box(-1, 1, (3,)), -0.5)
        ),
        lambda key: {"a": jax.random.normal(key, (2, 2)), "b": jnp.ones(())},
        DiagonalGaussian,
        (3,),
    ),
    "from-linen": Door(lambda: from_linen(LinenNet(), THREE), floats(2), Categorical),
    "from-nnx": Door(lambda: from_nnx(NnxNet, THREE), floats(2), Categorical),
    "cnn": Door(
        lambda: cnn_policy(
            Box(0, 1, (4, 4, 2)), Discrete(3), channels=(2,), hidden=(4,)
        ),
        floats(4, 4, 2),
        Categorical,
    ),
    "masked": Door(
        lambda: mlp_policy(Masked(Box(-1, 1, (2,)), 3), Discrete(3), hidden=(4,)),
        masked(floats(2), 1, 1, 0),
        Categorical,
    ),
    "masked-multi": Door(
        lambda: mlp_policy(
            Masked(MultiDiscrete((2, 3)), 5), MultiDiscrete((2, 3)), hidden=(4,)
        ),
        masked(lambda key: jax.random.randint(key, (2,), 0, 2), 1, 1, 0, 1, 1),
        MultiCategorical,
        (2,),
    ),
    "recurrent": Door(
        lambda: recurrent_policy(Box(-1, 1, (2,)), Discrete(3), **SMALL),
        floats(2),
        Categorical,
        is_recurrent=True,
    ),
    "recurrent-gaussian": Door(
        lambda: recurrent_policy(Box(-1, 1, (2,)), Box(-1, 1, (3,)), **SMALL),
        floats(2),
        DiagonalGaussian,
        (3,),
        is_recurrent=True,
    ),
    "recurrent-masked-image": Door(
        lambda: recurrent_policy(
            Masked(Box(0, 1, (3, 3, 1)), 3), Discrete(3), channels=(2,), **SMALL
        ),
        masked(floats(3, 3, 1), 0, 1, 1),
        Categorical,
        is_recurrent=True,
    ),
}


@pytest.fixture(params=DOORS, scope="module")
def case(request):
    """A door, its policy, parameters that depend on every entry, and observations."""
    door = DOORS[request.param]
    policy = door.make()
    keys = jax.random.split(jax.random.key(0), T)
    obs = jax.vmap(door.obs)(keys)
    params = quick(policy.init)(keys[0], jax.tree.map(lambda x: x[0], obs))
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(keys[1], x.shape), params
    )
    return door, policy, params, obs


def row(obs, action, time=None, carry=None):
    zeros, no = jnp.zeros((T,)), jnp.zeros((T,), bool)
    time = jnp.arange(T) if time is None else jnp.array(time)
    return Trajectory(obs, action, zeros, zeros, no, no, ~no, time, time, carry=carry)


def some_action(door):
    """The second of each number, or the number 1: allowed wherever masks are drawn."""
    is_discrete = door.kind in (Categorical, MultiCategorical)
    action = jnp.ones((T, *door.action_shape))
    return action.astype(int) if is_discrete else action


def decide(policy, params, obs, key):
    distribution, _ = policy.step(params, policy.initial_carry(), obs)
    action = distribution.sample(key)
    return action, distribution.log_prob(action), distribution


@pytest.mark.thinned(6)
def test_one_decision(case):
    door, policy, params, obs = case
    first = jax.tree.map(lambda x: x[0], obs)
    action, log_prob, distribution = decide(policy, params, first, jax.random.key(1))
    assert isinstance(distribution, door.kind)
    assert action.shape == door.action_shape
    assert log_prob.shape == () and np.isfinite(log_prob)


def player(policy, params):
    """Rows of actions and log-probabilities from `step` alone, compiled once."""

    @quick
    def act(carry, obs, key):
        distribution, carry = policy.step(params, carry, obs)
        action = distribution.sample(key)
        return carry, action, distribution.log_prob(action)

    def play(obs, time, carry):
        actions, log_probs = [], []
        for t, key in enumerate(jax.random.split(jax.random.key(2), T)):
            carry = policy.initial_carry() if time[t] == 0 else carry
            here = jax.tree.map(lambda x, t=t: x[t], obs)
            carry, action, log_prob = act(carry, here, key)
            actions += [action]
            log_probs += [log_prob]
        return jnp.stack(actions), jnp.stack(log_probs)

    return play


HISTORIES = [[0, 1, 2, 3, 4], [0, 1, 0, 0, 1], [7, 8, 0, 1, 2]]
"""Decisions since the start: one episode, several, and a row that begins in one."""


@pytest.mark.thinned(3)
def test_step_and_unroll_agree_decision_by_decision(case):
    door, policy, params, obs = case
    play, log_probs = player(policy, params), quick(log_prob_fn(policy))
    start = policy.initial_carry()
    memories = [(None, start)]
    if door.is_recurrent:
        memories += [(start + 0.6, start + 0.6)]
    for time in HISTORIES:
        for kept, memory in memories:
            action, by_step = play(obs, time, memory)
            unrolled = log_probs(params, row(obs, action, time, kept))
            assert unrolled.shape == (T,)
            np.testing.assert_allclose(unrolled, by_step, rtol=1e-5, atol=1e-6)
            assert np.unique(by_step).size > 1, "or this would not say much"


@pytest.mark.thinned(4)
def test_batches_of_rows_are_unrolled_as_rows(case):
    door, policy, params, obs = case
    carry = jax.tree.map(lambda x: x + 0.6, policy.initial_carry())
    rows = [
        row(obs, some_action(door), [3, 4, 0, 1, 0], carry),
        row(
            jax.tree.map(lambda x: x[::-1], obs),
            some_action(door),
            [0, 1, 2, 0, 1],
            policy.initial_carry(),
        ),
    ]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    log_probs = log_prob_fn(policy)
    together = quick(jax.vmap(log_probs, (None, 0)))(params, batch)
    alone = [quick(log_probs)(params, one) for one in rows]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.thinned(4)
def test_policies_say_whether_they_remember(case):
    door, policy, params, obs = case
    first = jax.tree.map(lambda x: x[0], obs)
    carry = policy.initial_carry()
    after = quick(lambda params: policy.step(params, carry, first)[1])(params)
    assert policy.is_recurrent == door.is_recurrent
    assert (carry is None) == (after is None) == (not door.is_recurrent)
    if door.is_recurrent:
        assert after.shape == carry.shape == (3,)
        assert after.dtype == carry.dtype and np.abs(after).max() > 0


def test_params_are_plain_nested_dicts_of_arrays(case):
    _, _, params, _ = case

    def visit(node):
        if type(node) is dict:
            assert all(type(key) in (str, int) for key in node)
            return sum(visit(child) for child in node.values())
        assert isinstance(node, jax.Array) and jnp.issubdtype(node.dtype, jnp.floating)
        return 1

    assert set(params) == {"network", "head"}
    assert visit(params) > 0


def test_params_depend_on_the_key_and_on_nothing_else(case):
    _, policy, _, obs = case
    first = jax.tree.map(lambda x: x[0], obs)
    init = quick(policy.init)
    keys = jax.random.split(jax.random.key(7))
    one, again, other = (init(key, first) for key in (keys[0], keys[0], keys[1]))
    chex.assert_trees_all_equal(one, again)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), one, other)
    assert not all(jax.tree.leaves(same))


@pytest.mark.thinned(3)
def test_every_parameter_has_a_gradient(case):
    door, policy, params, obs = case
    kept = row(obs, some_action(door))
    objective = lambda p: jnp.sum(log_prob_fn(policy)(p, kept))  # noqa: E731
    gradient = quick(jax.grad(objective))(params)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


@pytest.mark.thinned(9)
def test_init_and_step_over_seeds_equal_separate_calls(case):
    _, policy, _, obs = case
    keys = jax.random.split(jax.random.key(3), 3)
    first = jax.tree.map(lambda x: x[0], obs)

    def log_prob(key):
        return decide(policy, policy.init(key, first), first, key)[:2]

    together = quick(jax.vmap(log_prob))(keys)
    for i in range(2):
        alone = quick(log_prob)(keys[i])
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5, atol=1e-6
        )


@pytest.mark.thinned(3)
def test_step_compiles_once(case):
    _, policy, params, obs = case
    chex.clear_trace_counter()
    step = jax.jit(
        chex.assert_max_traces(
            lambda params, obs, key: decide(policy, params, obs, key)[:2], n=1
        )
    )
    for i, key in enumerate(jax.random.split(jax.random.key(4), 2)):
        step(params, jax.tree.map(lambda x, i=i: x[i], obs), key)


@pytest.mark.thinned(3)
def test_it_learns_nothing_from_rows_that_are_not_there(case):
    """An empty slot's observation is zeros: its log-probability must be finite."""
    door, policy, params, obs = case
    empty = jax.tree.map(jnp.zeros_like, row(obs, some_action(door)))

    def total(params):
        log_probs = log_prob_fn(policy)(params, empty)
        return jnp.sum(log_probs), log_probs

    slope, log_probs = quick(jax.grad(total, has_aux=True))(params)
    assert np.isfinite(log_probs).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


# Known values.


def test_a_fresh_policy_is_nearly_uniform():
    policy = mlp_policy(Box(-1, 1, (2,)), Discrete(4))
    params = quick(policy.init)(jax.random.key(0), jnp.ones(2))
    distribution, _ = policy.step(params, None, jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(distribution.entropy(), np.log(4), atol=1e-3)


def test_a_gaussian_starts_at_its_initial_scale():
    head = gaussian_head(Box(-2, 2, (2,)), initial_log_std=-1.0)
    policy = from_apply(lambda key, obs: {}, lambda params, obs: obs, head)
    obs = jnp.array([0.5, -0.5])
    distribution, _ = policy.step(policy.init(jax.random.key(0), obs), None, obs)
    np.testing.assert_allclose(distribution.mean, obs)
    np.testing.assert_allclose(distribution.log_std, [-1.0, -1.0])


def test_discrete_observations_are_one_hot():
    policy = mlp_policy(Discrete(3), Discrete(2), hidden=())
    params = quick(policy.init)(jax.random.key(0), jnp.array(0))
    kernel, bias = (x for x in sorted(jax.tree.leaves(params), key=lambda x: -x.ndim))
    for state in range(3):
        distribution, _ = policy.step(params, None, jnp.array(state))
        np.testing.assert_allclose(
            distribution.logits, kernel[state] + bias, rtol=1e-6, atol=1e-7
        )


def test_weights_have_their_variance_and_the_last_layer_is_small():
    network = mlp(64, (256, 256), 32, rngs=nnx.Rngs(params=0))
    kernels = [x for x in jax.tree.leaves(nnx.state(network)) if x.ndim == 2]
    assert sorted(k.shape for k in kernels) == [(64, 256), (256, 32), (256, 256)]
    for kernel in kernels:
        scale = 0.01 if kernel.shape[1] == 32 else 1.0
        # The standard deviation of n normal draws is off by 1 / sqrt(2 n): 0.008 here.
        expected = scale / np.sqrt(kernel.shape[0])
        np.testing.assert_allclose(np.std(kernel), expected, rtol=0.04)


def test_initialisation_calls_no_lapack():
    """Two host devices that factorise at once can wait for each other for ever."""
    policy = mlp_policy(Box(-1, 1, (4,)), Discrete(2))
    lowered = jax.jit(policy.init).lower(jax.random.key(0), jnp.zeros(4))
    assert "lapack" not in lowered.as_text()


def test_double_precision_reaches_every_parameter(float64):
    policy = mlp_policy(Box(-1, 1, (2,)), Box(-1, 1, (1,)), hidden=(4,))
    params = quick(policy.init)(jax.random.key(0), jnp.zeros(2))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float64")}
    distribution, _ = policy.step(params, None, jnp.ones(2, jnp.float32))
    assert distribution.mean.dtype == jnp.float64


@pytest.mark.parametrize("name", ["recurrent", "recurrent-gaussian", "cnn", "masked"])
@pytest.mark.thinned(2)
def test_step_and_unroll_agree_in_double_precision(name, float64):
    door = DOORS[name]
    policy = door.make()
    obs = jax.vmap(door.obs)(jax.random.split(jax.random.key(0), T))
    params = quick(policy.init)(jax.random.key(1), jax.tree.map(lambda x: x[0], obs))
    params = jax.tree.map(lambda x: x + 0.3, params)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float64")}
    time, carry = [4, 5, 0, 1, 0], policy.initial_carry()
    carry = jax.tree.map(lambda x: x + 0.6, carry)
    action, log_prob = player(policy, params)(obs, time, carry)
    unrolled = quick(log_prob_fn(policy))(params, row(obs, action, time, carry))
    assert unrolled.dtype == jnp.float64
    np.testing.assert_allclose(unrolled, log_prob, rtol=1e-12)


def test_a_memory_tells_apart_what_an_observation_cannot():
    """Two histories with one last observation: only the memory knows the first."""
    policy = recurrent_policy(Box(-1, 1, (1,)), Discrete(2), hidden=(), memory=4)
    params = quick(policy.init)(jax.random.key(0), jnp.zeros(1))
    obs = jnp.array([[1.0], [0.0], [0.0], [-1.0], [0.0]])
    action = jnp.zeros((T,), int)
    log_probs = quick(log_prob_fn(policy))
    two = log_probs(params, row(obs, action, [0, 1, 2, 0, 1]))
    joined = log_probs(params, row(obs, action, [0, 1, 2, 3, 4]))
    assert np.abs(two[1] - two[4]) > 1e-5
    np.testing.assert_allclose(two[:3], joined[:3], rtol=1e-6)
    assert np.abs(two[3:] - joined[3:]).min() > 1e-6


def test_noise_is_not_held_unless_it_is_asked_for():
    network = mlp_network(BOX, 3, hidden=())
    assert from_network(network, THREE).noise_hold == 1
    assert from_network(network, THREE, noise_hold=8).noise_hold == 8
    assert mlp_policy(BOX, INTEGERS).noise_hold == 1


# Masks.


def masked_logits(space, mask):
    """The distribution that a head makes of the logits 0, 1, 2, ... under a mask."""
    head = head_for(space)
    policy = from_apply(
        lambda key, obs: jnp.arange(float(head.num_outputs)),
        lambda logits, obs: logits,
        head,
    )
    obs = MaskedObs(jnp.zeros(()), jnp.array(mask, bool))
    params = policy.init(jax.random.key(0), obs)

    def distribution(logits):
        return policy.step({**params, "network": logits}, None, obs)[0]

    return distribution, params["network"]


def test_what_is_not_allowed_has_no_probability():
    distribution, logits = masked_logits(Discrete(4), [1, 0, 1, 0])
    got = jax.vmap(distribution(logits).log_prob)(jnp.arange(4))
    # 1 / (1 + e^2) and e^2 / (1 + e^2) of the logits 0 and 2.
    z = np.log1p(np.exp(2.0))
    np.testing.assert_allclose(got, [-z, -np.inf, 2.0 - z, -np.inf], rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 200)
    draws = jax.vmap(distribution(logits).sample)(keys)
    assert set(np.unique(draws)) == {0, 2}


MASKS = {
    "discrete": (Discrete(4), [1, 0, 1, 0], jnp.array(2)),
    "discrete-single": (Discrete(3), [0, 1, 0], jnp.array(1)),
    "multi": (MultiDiscrete((2, 3)), [1, 0, 0, 1, 1], jnp.array([0, 2])),
    "bits": (MultiBinary(3), [1, 0, 1], jnp.array([1, 0, 0])),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.thinned(2)
def test_gradients_stay_finite_under_masks(name):
    space, mask, action = MASKS[name]
    distribution, logits = masked_logits(space, mask)
    other = logits * 0.5 - 0.2
    measures = [
        lambda x: distribution(x).log_prob(action),
        lambda x: distribution(x).entropy(),
        lambda x: distribution(x).kl(distribution(other)),
        lambda x: distribution(other).kl(distribution(x)),
    ]
    forbidden = ~np.array(mask, bool)
    is_certain = name == "discrete-single"
    for measure in measures:
        value, slope = jax.value_and_grad(measure)(logits)
        assert np.isfinite(value) and np.isfinite(slope).all()
        np.testing.assert_array_equal(slope[forbidden], 0.0)
        assert is_certain or np.abs(slope).max() > 1e-3


def test_masks_of_rows_differ_between_decisions():
    policy = mlp_policy(Masked(Box(-1, 1, (1,)), 2), Discrete(2), hidden=())
    masks = jnp.array([[1, 1], [1, 0], [0, 1], [1, 0], [1, 1]], bool)
    obs = MaskedObs(jnp.zeros((T, 1)), masks)
    params = quick(policy.init)(jax.random.key(0), jax.tree.map(lambda x: x[0], obs))
    got = log_prob_fn(policy)(params, row(obs, jnp.zeros((T,), int)))
    half = -np.log(2.0)  # biases begin at zero
    np.testing.assert_allclose(got, [half, 0.0, -np.inf, 0.0, half], rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_ones_they_are_named_after(name):
    policy = mlp_policy(Box(-1, 1, (2,)), Discrete(2), hidden=(3,), activation=name)
    params = quick(policy.init)(jax.random.key(0), jnp.zeros(2))
    kernels = [x for x in jax.tree.leaves(params) if x.ndim == 2]
    first, last = sorted(kernels, key=lambda x: x.shape[1], reverse=True)
    obs = jnp.array([0.3, -2.0])
    by_hand = {
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
        "gelu": jax.nn.gelu,
        "silu": lambda x: x / (1 + np.exp(-x)),
    }
    logits = by_hand[name](np.asarray(obs @ first)) @ last  # biases begin at zero
    np.testing.assert_allclose(
        policy.step(params, None, obs)[0].logits, logits, rtol=1e-4, atol=1e-7
    )


# What is refused.


BOX, INTEGERS = Box(-1, 1, (2,)), Discrete(3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: gaussian_head(INTEGERS), r"^space is Discrete.*needs a Box"),
        (lambda: gaussian_head(Box(-1, 1, ())), r"needs a Box with shape \(D,\)"),
        (lambda: gaussian_head(Box(-1, 1, (2, 2))), r"needs a Box with shape \(D,\)"),
        (lambda: categorical_head(BOX), r"^space is Box.*needs a Discrete; .*gaussian"),
        (
            lambda: head_for(Masked(Discrete(2), 2)),
            r"no usual head fits it; build a Head",
        ),
        (
            lambda: quick(mlp_policy(BOX, INTEGERS, activation="thanh").init)(
                jax.random.key(0), jnp.zeros(2)
            ),
            "activation is 'thanh', unknown; did you mean 'tanh'",
        ),
        (
            lambda: quick(mlp_policy(BOX, INTEGERS, hidden=(4, 0)).init)(
                jax.random.key(0), jnp.zeros(2)
            ),
            "layer width is 0, needs a whole number of at least 1",
        ),
        (
            lambda: from_apply(
                lambda key, obs: {}, lambda params, obs: obs, THREE
            ).init(jax.random.key(0), jnp.zeros(2)),
            r"outputs of shape \(2,\), but the head for Discrete.* needs \(3,\)",
        ),
        (
            lambda: from_linen(LinenNet(), categorical_head(Discrete(4))).init(
                jax.random.key(0), jnp.zeros(2)
            ),
            r"outputs of shape \(3,\), but the head .* needs \(4,\)",
        ),
        (
            lambda: from_nnx(NnxNet, gaussian_head(BOX)).init(
                jax.random.key(0), jnp.zeros(2)
            ),
            r"outputs of shape \(3,\), but the head .* needs \(2,\)",
        ),
        (
            lambda: from_network(gru_network(BOX, 4), THREE).init(
                jax.random.key(0), jnp.zeros(2)
            ),
            r"outputs of shape \(4,\), but the head .* needs \(3,\)",
        ),
        (
            lambda: from_network(mlp_network(BOX, 3), THREE, noise_hold=0),
            "noise_hold is 0, needs a whole number of at least 1",
        ),
        (
            lambda: mlp_policy(Masked(BOX, 2), BOX),
            "mask 2 actions, but the action space is Box.*give the policy obs.features",
        ),
        (
            lambda: recurrent_policy(Masked(BOX, 2), INTEGERS),
            r"action_mask has length 2, but the head for Discrete.* needs 3",
        ),
        (
            lambda: from_apply(
                lambda key, obs: {}, lambda params, obs: jnp.zeros(3), THREE
            ).init(jax.random.key(0), MaskedObs(jnp.zeros(2), jnp.ones(4, bool))),
            r"action_mask has length 4, but the head for Discrete.* needs 3",
        ),
        (
            lambda: cnn_policy(BOX, INTEGERS),
            r"^observation_space is Box.*needs a Box with shape \(height",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(call, sentence, monkeypatch):
    from jaxtyping import config

    # As users have it, without the shape checker that the tests wrap around it.
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        call()
