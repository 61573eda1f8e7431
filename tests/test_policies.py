"""The policy contract, held for a table of policies from every door."""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpg.distributions import Categorical, DiagonalGaussian
from jaxpg.envs import Box, Discrete, MultiDiscrete
from jaxpg.heads import categorical_head, gaussian_head, head_for
from jaxpg.networks import ACTIVATIONS, mlp
from jaxpg.policies import from_apply, from_linen, from_nnx, log_prob_fn, mlp_policy
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


def floats(*shape):
    return lambda key: jax.random.normal(key, shape)


THREE = categorical_head(Discrete(3))
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


def row(obs, action):
    zeros, no = jnp.zeros((T,)), jnp.zeros((T,), bool)
    time = jnp.arange(T)
    return Trajectory(obs, action, zeros, zeros, no, no, ~no, time, time)


def decide(policy, params, obs, key):
    distribution, _ = policy.step(params, policy.initial_carry(), obs)
    action = distribution.sample(key)
    return action, distribution.log_prob(action), distribution


def test_one_decision(case):
    door, policy, params, obs = case
    first = jax.tree.map(lambda x: x[0], obs)
    action, log_prob, distribution = decide(policy, params, first, jax.random.key(1))
    assert isinstance(distribution, door.kind)
    assert action.shape == door.action_shape
    assert log_prob.shape == () and np.isfinite(log_prob)


def test_step_and_unroll_agree_decision_by_decision(case):
    _, policy, params, obs = case
    keys = jax.random.split(jax.random.key(2), T)
    action, log_prob, _ = quick(
        jax.vmap(lambda obs, key: decide(policy, params, obs, key))
    )(obs, keys)
    unrolled = quick(log_prob_fn(policy))(params, row(obs, action))
    assert unrolled.shape == (T,)
    np.testing.assert_allclose(unrolled, log_prob, rtol=1e-5, atol=1e-6)
    assert np.unique(log_prob).size > 1, "decisions must differ for this to say much"


def test_memoryless_policies_say_so(case):
    _, policy, params, obs = case
    first = jax.tree.map(lambda x: x[0], obs)
    assert policy.initial_carry() is None and not policy.is_recurrent
    assert policy.step(params, None, first)[1] is None


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


def test_every_parameter_has_a_gradient(case):
    door, policy, params, obs = case
    action = jnp.ones((T, *door.action_shape))
    action = action.astype(int) if door.kind is Categorical else action
    objective = lambda p: jnp.sum(log_prob_fn(policy)(p, row(obs, action)))  # noqa: E731
    gradient = quick(jax.grad(objective))(params)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


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


def test_it_learns_nothing_from_rows_that_are_not_there(case):
    """An empty slot's observation is zeros: its log-probability must be finite."""
    door, policy, params, obs = case
    zeros = jax.tree.map(jnp.zeros_like, obs)
    action = jnp.zeros((T, *door.action_shape))
    action = action.astype(int) if door.kind is Categorical else action
    assert np.isfinite(quick(log_prob_fn(policy))(params, row(zeros, action))).all()


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
            lambda: head_for(MultiDiscrete((2, 2))),
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
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(call, sentence, monkeypatch):
    from jaxtyping import config

    # As users have it, without the shape checker that the tests wrap around it.
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=sentence):
        call()
