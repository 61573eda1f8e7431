"""Networks and layers, against XLA's convolution, Flax's cell and single steps."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpg._batching import vmap_rows
from jaxpg.envs import Box, Discrete, Masked, MaskedObs, MultiBinary, MultiDiscrete
from jaxpg.layers import cnn, gru, mlp, patches
from jaxpg.layout import FEW, _affine, _affine_in_one, perceive_many
from jaxpg.networks import (
    cnn_network,
    feedforward,
    flat_features,
    gru_network,
    mlp_network,
)

T = 6
IMAGE = Box(0, 1, (4, 5, 2))
VECTOR = Box(-1, 1, (3,))


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


NETWORKS = {
    "mlp": (lambda: mlp_network(VECTOR, 2, hidden=(4,)), (3,)),
    "cnn": (
        lambda: cnn_network(IMAGE, 2, channels=(3, 2), kernel=2, hidden=(4,)),
        None,
    ),
    "gru": (lambda: gru_network(VECTOR, 2, hidden=(4,), memory=5), (3,)),
    "gru-bare": (lambda: gru_network(VECTOR, 2, hidden=(), memory=5), (3,)),
    "gru-cnn": (
        lambda: gru_network(IMAGE, 2, hidden=(4,), memory=5, channels=(3,), kernel=2),
        None,
    ),
}


@pytest.fixture(params=NETWORKS, scope="module")
def case(request):
    """A network, params that depend on every entry, and a row of observations."""
    make, shape = NETWORKS[request.param]
    network = make()
    keys = jax.random.split(jax.random.key(0), 3)
    obs = jax.random.normal(keys[0], (T, *(shape or IMAGE.shape)))
    params = quick(network.init)(keys[1], obs[0])
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(keys[2], x.shape), params
    )
    return network, params, obs


def step_by_step(network, params, carry, obs, starts):
    """What `unroll` must answer, from `step` alone."""
    outputs, carries = [], []
    step = quick(network.step)
    for t in range(T):
        carry = network.initial_carry() if starts[t] else carry
        output, carry = step(params, carry, obs[t])
        outputs += [output]
        carries += [carry]
    return jnp.stack(outputs), jax.tree.map(lambda *x: jnp.stack(x), *carries)


@pytest.mark.parametrize(
    "starts", [[1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1], [0] * 6, [1] * 6]
)
@pytest.mark.thinned(3)
def test_step_and_unroll_agree_across_episodes(case, starts):
    network, params, obs = case
    starts = jnp.array(starts, bool)
    carry = jax.tree.map(lambda x: x + 0.7, network.initial_carry())
    outputs, carries = quick(network.unroll)(params, carry, obs, starts)
    by_step, memories = step_by_step(network, params, carry, obs, starts)
    np.testing.assert_allclose(outputs, by_step, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(carries, memories, rtol=1e-5, atol=1e-6)


def test_memory_matters_where_it_is_said_to(case):
    network, params, obs = case
    no = jnp.zeros((T,), bool)
    zeros = network.initial_carry()
    other = jax.tree.map(lambda x: x + 0.7, zeros)
    unroll = quick(network.unroll)
    first, second = (unroll(params, carry, obs, no)[0] for carry in (zeros, other))
    assert network.is_recurrent == (zeros is not None)
    assert network.is_recurrent == bool((jnp.abs(first - second) > 1e-4).any())


def test_batches_equal_rows(case):
    network, params, obs = case
    starts = jnp.array([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]], bool)
    rows = jnp.stack([obs, obs[::-1] + 0.1])
    carry = jax.tree.map(lambda x: jnp.stack([x, x + 0.5]), network.initial_carry())

    def outputs(*row):
        return network.unroll(params, *row)[0]

    together = quick(jax.vmap(outputs))(carry, rows, starts)
    for i in range(2):
        memory = jax.tree.map(lambda x, i=i: x[i], carry)
        alone = quick(outputs)(memory, rows[i], starts[i])
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-6)


PERCEPTRONS = {
    "mlp": ((3,), lambda **how: mlp(3, (5, 4), 2, **how)),
    "cnn": ((6, 5, 3), lambda **how: cnn((6, 5, 3), (4, 2), 2, (5,), 2, **how)),
}


@pytest.mark.parametrize("kind", PERCEPTRONS)
@pytest.mark.parametrize("count", [FEW - 1, FEW, 3 * FEW])
def test_a_perceptron_says_the_same_of_many(count, kind, float64):
    shape, make = PERCEPTRONS[kind]
    graph, params = nnx.split(make(rngs=nnx.Rngs(0), output_scale=1.0))
    inputs = jax.random.normal(jax.random.key(1), (count, *shape))
    weights = jax.random.normal(jax.random.key(2), (count, 2))

    def weighed(params, way):
        return jnp.sum(weights * way(nnx.merge(graph, params), inputs))

    one_by_one = jax.grad(weighed)(params, lambda module, x: jax.vmap(module)(x))
    together = jax.grad(weighed)(params, perceive_many)
    for x, y in zip(
        jax.tree.leaves(together), jax.tree.leaves(one_by_one), strict=True
    ):
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("moving", [(0,), (2,), (0, 1, 2)])
def test_kernel_and_bias_in_one_derive_as_they_do_apart(moving, float64):
    """Forward, backward and twice, with respect to some and to all."""
    shapes = (3, 5), (5,), (3, 7)
    keys = jax.random.split(jax.random.key(0), 6)
    places = [jax.random.normal(k, x) for k, x in zip(keys[:3], shapes, strict=True)]
    ways = [jax.random.normal(k, x) for k, x in zip(keys[3:], shapes, strict=True)]

    def some(affine):
        def of(*those):
            arguments = list(places)
            for i, x in zip(moving, those, strict=True):
                arguments[i] = x
            return jnp.tanh(affine(*arguments))

        return of

    at, way = ([x[i] for i in moving] for x in (places, ways))
    each = range(len(moving))

    def derivatives(affine):
        def total(*those):
            return jnp.sum(some(affine)(*those) ** 3)

        forward = jax.jvp(some(affine), at, way)
        return forward, jax.grad(total, each)(*at), jax.hessian(total, each)(*at)

    found, expected = derivatives(_affine_in_one), derivatives(_affine)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.abs(y).max() > 0.01
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_kernel_and_its_bias_is_one_product(monkeypatch):
    """On CPU; where sums are cheap and memory is not, they stay two."""
    graph, params = nnx.split(mlp(3, (5,), 2, rngs=nnx.Rngs(0)))

    def products_and_sums():
        def total(params):
            return jnp.sum(perceive_many(nnx.merge(graph, params), jnp.ones((FEW, 3))))

        text = str(jax.make_jaxpr(jax.grad(total))(params))
        return text.count("dot_general"), text.count("reduce_sum")

    two_forward_two_of_kernels_one_of_features = 5
    assert products_and_sums() == (two_forward_two_of_kernels_one_of_features, 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    products, sums = products_and_sums()
    assert products == two_forward_two_of_kernels_one_of_features and sums > 1


def test_many_are_kept_last_in_memory():
    perceptron = mlp(3, (5,), 2, rngs=nnx.Rngs(0))
    text = str(
        jax.make_jaxpr(lambda x: perceive_many(perceptron, x))(jnp.ones((FEW, 3)))
    )
    assert f"f32[5,{FEW}] = tanh" in text and f"[{FEW},5]" not in text


def test_images_are_kept_with_the_inputs_last_on_cpus(monkeypatch):
    perceptron = cnn((4, 5, 3), (2,), 2, (), 6, rngs=nnx.Rngs(0))

    def program():
        way = jax.make_jaxpr(lambda x: perceive_many(perceptron, x))
        return str(way(jnp.ones((FEW, 4, 5, 3))))

    assert f"f32[2,3,4,{FEW}]" in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert f"f32[2,3,4,{FEW}]" not in program()


def test_rows_side_by_side_are_not_turned_over():
    perceptron = mlp(3, (5,), 2, rngs=nnx.Rngs(0))
    way = vmap_rows(lambda x: perceive_many(perceptron, x), (0,))
    text = str(jax.make_jaxpr(way)(jnp.ones((2, FEW, 3))))
    assert f"f32[2,{FEW},5] = tanh" in text and f",5,{FEW}]" not in text


def test_every_parameter_has_a_gradient(case):
    network, params, obs = case
    starts = jnp.arange(T) == 3

    def total(params):
        outputs, _ = network.unroll(params, network.initial_carry(), obs, starts)
        return jnp.sum(outputs**2)

    gradient = quick(jax.grad(total))(params)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


def test_double_precision_reaches_everything(float64):
    for make, shape in NETWORKS.values():
        network = make()
        obs = jnp.ones((2, *(shape or IMAGE.shape)), jnp.float32)
        params = jax.eval_shape(network.init, jax.random.key(0), obs[0])
        answer = jax.eval_shape(
            network.unroll, params, network.initial_carry(), obs, jnp.zeros(2, bool)
        )
        leaves = jax.tree.leaves((params, answer))
        assert {x.dtype for x in leaves} == {jnp.dtype("float64")}


def test_initialisation_calls_no_lapack():
    network = gru_network(IMAGE, 2, channels=(3,))
    lowered = jax.jit(network.init).lower(jax.random.key(0), jnp.zeros(IMAGE.shape))
    assert "lapack" not in lowered.as_text()


def test_weights_have_their_variance_and_the_last_layer_is_small():
    network = gru_network(
        Box(0, 1, (6, 6, 8)), 40, channels=(64,), hidden=(100,), memory=100
    )
    params = quick(network.init)(jax.random.key(0), None)
    kernels = [x for x in jax.tree.leaves(params) if x.ndim == 2]
    # Patches 3 * 3 * 8, pixels 4 * 4 * 64; two kernels have the shape (100, 300).
    shapes = [(72, 64), (100, 40), (100, 300), (100, 300), (1024, 100)]
    assert sorted(x.shape for x in kernels) == shapes
    for kernel in kernels:
        scale = 0.01 if kernel.shape[1] == 40 else 1.0
        # Of n draws the standard deviation is off by 1 / sqrt(2 n): 0.011 at most.
        expected = scale / np.sqrt(kernel.shape[0])
        np.testing.assert_allclose(np.std(kernel), expected, rtol=0.05)


# Convolutions.


def convolve(images, flat, kernel):
    weights = flat.reshape(kernel, kernel, images.shape[-1], -1)
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        images, weights, (1, 1), "VALID", dimension_numbers=names
    )


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_patches_times_a_matrix_are_a_convolution(kernel):
    keys = jax.random.split(jax.random.key(kernel))
    images = jax.random.normal(keys[0], (3, 4, 6, 2))
    flat = jax.random.normal(keys[1], (kernel**2 * 2, 5))
    got = patches(images, kernel) @ flat
    np.testing.assert_allclose(
        got, convolve(images, flat, kernel), rtol=1e-4, atol=1e-5
    )


def test_the_network_is_convolutions_and_then_layers():
    network = cnn_network(IMAGE, 3, channels=(4, 6), kernel=2, hidden=(5,))
    keys = jax.random.split(jax.random.key(1), 3)
    params = quick(network.init)(keys[0], None)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(keys[1], x.shape), params
    )
    image = jax.random.normal(keys[2], IMAGE.shape)
    first, second, dense, last = params["layers"].values()
    x = image[None]
    for layer in (first, second):
        bias = layer["bias"][None, None, None]
        x = jnp.maximum(convolve(x, layer["kernel"], 2) + bias, 0.0)
    x = jnp.maximum(x.ravel() @ dense["kernel"] + dense["bias"], 0.0)
    expected = x @ last["kernel"] + last["bias"]
    got = quick(network.step)(params, None, image)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def products(function, *args):
    """(left, right shapes, batch dimensions) of every matrix product in a program."""
    for equation in jax.make_jaxpr(function)(*args).eqns:
        yield from products_of(equation)


def products_of(equation):
    if equation.primitive.name == "dot_general":
        _, batched = equation.params["dimension_numbers"]
        yield *(x.aval.shape for x in equation.invars), batched
    for inner in equation.params.values():
        program = getattr(inner, "jaxpr", inner)
        for deeper in getattr(program, "eqns", ()):
            yield from products_of(deeper)


def test_a_batch_of_images_is_one_product():
    network = cnn_network(IMAGE, 3, channels=(4,), kernel=2, hidden=())
    params = quick(network.init)(jax.random.key(0), None)
    no = jnp.zeros((T,), bool)
    unroll = jax.vmap(lambda obs: network.unroll(params, None, obs, no)[0])
    found = list(products(unroll, jnp.zeros((7, T, *IMAGE.shape))))
    none = ((), ())
    assert found[0] == ((7, T, 3, 4, 8), (8, 4), none)
    assert [batched for *_, batched in found] == [none, none]


# The memory.


def gated(num_inputs, memory, key):
    """A gated module of random params, and a function from its memory and input."""
    module = gru(
        (num_inputs,), (), 1, (), memory, 1, rngs=nnx.Rngs(params=0), activation="tanh"
    )
    graph, state = nnx.split(module)
    keys = iter(jax.random.split(key, 10))
    state = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), state)
    params = nnx.to_pure_dict(state)
    module = nnx.merge(graph, state)
    return params, lambda h, x: module.remember(h, module.project(x))


def test_the_memory_is_flax_linens_gated_recurrent_unit():
    params, remember = gated(3, 4, jax.random.key(0))
    project, hold = params["project"]["layers"][0], params["hold"]["kernel"]
    copied = {}
    for i, gate in enumerate("rzn"):
        part = slice(4 * i, 4 * (i + 1))
        copied[f"i{gate}"] = {
            "kernel": project["kernel"][:, part],
            "bias": project["bias"][part],
        }
        copied[f"h{gate}"] = {"kernel": hold[:, part]}
    copied["hn"]["bias"] = params["bias"]
    h, x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    expected, _ = nn.GRUCell(4).apply({"params": copied}, h, x[:, :3])
    np.testing.assert_allclose(remember(h, x[:, :3]), expected, rtol=1e-5, atol=1e-6)


def test_the_memory_is_flax_nnx_gated_recurrent_unit():
    """That one has no bias on what is held, so ours is taken out."""
    module = gru((3,), (), 1, (), 4, 1, rngs=nnx.Rngs(params=1), activation="tanh")
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(params=2))
    (project,) = module.project.layers
    project.bias[...] = jax.random.normal(jax.random.key(3), (12,))
    cell.dense_i.kernel[...] = project.kernel[...]
    cell.dense_i.bias[...] = project.bias[...]
    cell.dense_h.kernel[...] = module.hold.kernel[...]
    h, x = jax.random.normal(jax.random.key(4), (2, 5, 4))
    expected, _ = cell(h, x[:, :3])
    got = module.remember(h, module.project(x[:, :3]))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_only_what_is_held_waits_for_the_memory():
    network = gru_network(VECTOR, 2, hidden=(4,), memory=5)
    params = quick(network.init)(jax.random.key(0), None)
    obs, starts = jnp.zeros((T, 3)), jnp.zeros(T, bool)
    carry = network.initial_carry()
    found = [(a, b) for a, b, _ in products(network.unroll, params, carry, obs, starts)]
    assert ((5,), (5, 15)) in found  # in the scan, for one decision
    assert sorted(found) == sorted(
        [((T, 3), (3, 4)), ((T, 4), (4, 15)), ((5,), (5, 15)), ((T, 5), (5, 2))]
    )


def test_memory_starts_at_zero():
    network = gru_network(VECTOR, 2, memory=7)
    np.testing.assert_array_equal(network.initial_carry(), np.zeros(7))


# Encoders.


@pytest.mark.parametrize(
    ("space", "obs", "features"),
    [
        (Discrete(3), 1, [0, 1, 0]),
        (MultiDiscrete((2, 3)), [1, 2], [0, 1, 0, 0, 1]),
        (MultiDiscrete((1, 1, 2)), [0, 0, 0], [1, 1, 1, 0]),
        (MultiBinary(3), [1, 0, 1], [1, 0, 1]),
        (Box(0, 9, (2, 2), jnp.int32), [[1, 2], [3, 4]], [1, 2, 3, 4]),
        (Box(0, 9, ()), 4.0, [4]),
    ],
)
def test_observations_become_rows_of_floats(space, obs, features):
    obs = jnp.array(obs, space.dtype)
    mask = jnp.array([True, False])
    for kind, given in ((space, obs), (Masked(space, 2), MaskedObs(obs, mask))):
        encode, length = flat_features(kind)
        got = encode(given)
        assert got.dtype == jnp.float32 and got.shape == (length,)
        np.testing.assert_array_equal(got, features)


def test_masked_images_are_images():
    network = cnn_network(Masked(IMAGE, 2), 2, channels=(3,), hidden=())
    plain = cnn_network(IMAGE, 2, channels=(3,), hidden=())
    image = jax.random.normal(jax.random.key(0), IMAGE.shape)
    params = quick(network.init)(jax.random.key(1), None)
    obs = MaskedObs(image, jnp.array([True, False]))
    np.testing.assert_array_equal(
        network.step(params, None, obs)[0], plain.step(params, None, image)[0]
    )


def test_plain_functions_have_no_memory():
    network = feedforward(lambda key, obs: 3.0, lambda scale, obs: scale * obs)
    outputs, carries = network.unroll(3.0, None, jnp.ones((T, 2)), jnp.zeros(T, bool))
    assert carries is None and not network.is_recurrent
    np.testing.assert_array_equal(outputs, np.full((T, 2), 3.0))


# What is refused.


def begin(network):
    return network.init(jax.random.key(0), None)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: cnn_network(VECTOR, 2),
            r"^observation_space is Box.*needs a Box with",
        ),
        (lambda: cnn_network(Discrete(3), 2), r"Discrete.*for others use mlp_network"),
        (lambda: gru_network(VECTOR, 2, channels=(3,)), "without channels"),
        (
            lambda: begin(cnn_network(IMAGE, 2, channels=(3, 3))),
            "kernel is 3 in 2 convolutions, needs an image of at least 5 by 5, but it "
            "has 4 by 5",
        ),
        (lambda: begin(cnn_network(IMAGE, 2, channels=(0,))), "channels is 0"),
        (lambda: begin(cnn_network(IMAGE, 2, kernel=0)), "kernel is 0"),
        (lambda: gru_network(VECTOR, 2, memory=0), "memory is 0, needs a whole number"),
        (
            lambda: begin(gru_network(VECTOR, 2, activation="thanh")),
            "activation is 'thanh', unknown; did you mean 'tanh'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
