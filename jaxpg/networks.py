"""Networks: functions of what was observed, with or without memory, as pure functions.

    init(key, obs) -> params
    step(params, carry, obs) -> (outputs [K], carry)               one decision
    unroll(params, carry, obs [T], starts [T]) -> (outputs [T, K], carries [T])

Policies put a head on one and critics read it as it is. The builders here choose
layers from an observation space; any other network, in any library, can take their
place through `feedforward`, or through `policies.from_apply` and its neighbours.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpg._checks import check_positive
from jaxpg.envs.base import Box, Discrete, Masked, MultiDiscrete, Space
from jaxpg.layers import ACTIVATIONS, cnn, gru, mlp, split_module
from jaxpg.layout import perceive_many
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = [
    "ACTIVATIONS",
    "Network",
    "cnn_network",
    "feedforward",
    "flat_features",
    "gru_network",
    "mlp",
    "mlp_network",
]


class Network(NamedTuple):
    """A function of what was observed, with or without memory, as pure functions.

    Policies and critics are both made of one: a policy puts a head on it.

    Attributes:
        init: `init(key, obs) -> params`, from one observation.
        initial_carry: the memory at an episode's start; None without memory.
        step: `step(params, carry, obs) -> (outputs [K], carry)` for one decision.
        unroll: `unroll(params, carry, obs [T], starts [T]) -> (outputs [T, K], carries
            [T])` for one row: `carry` is the memory before the row's first decision,
            `starts[t]` puts the initial memory in its place before decision t, and
            `carries[t]` is the memory after decision t. It agrees with `step`.
        is_recurrent: whether memory matters; rows of a memoryless one may be cut.
    """

    init: Callable[[PRNGKey, PyTree], Params]
    initial_carry: Callable[[], PyTree]
    step: Callable[[Params, PyTree, PyTree], tuple[Array, PyTree]]
    unroll: Callable[[Params, PyTree, PyTree, Array], tuple[Array, PyTree]]
    is_recurrent: bool = False


def feedforward(
    init: Callable[[PRNGKey, PyTree], Params],
    apply: Callable[[Params, PyTree], Array],
    apply_to_many: Callable[[Params, PyTree], Array] | None = None,
) -> Network:
    """A memoryless network from two plain functions of one observation.

    Args:
        init: `init(key, obs) -> params`.
        apply: `apply(params, obs) -> [K]`.
        apply_to_many: `apply(params, obs) -> [N, K]` of N observations, where there is
            a faster way than one by one.

    Returns:
        A network whose memory is None.

    >>> network = feedforward(lambda key, obs: 2.0, lambda scale, obs: scale * obs)
    >>> network.step(2.0, None, jnp.ones(3))[0].tolist()
    [2.0, 2.0, 2.0]
    """

    many = apply_to_many or jax.vmap(apply, (None, 0))

    def step(params: Params, carry: PyTree, obs: PyTree) -> tuple[Array, PyTree]:
        return apply(params, obs), carry

    def unroll(
        params: Params, carry: PyTree, obs: PyTree, starts: Array
    ) -> tuple[Array, PyTree]:
        del starts
        return many(params, obs), carry

    return Network(init, lambda: None, step, unroll)


def mlp_network(
    observation_space: Space,
    num_outputs: int,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    output_scale: float = 0.01,
) -> Network:
    """A multilayer perceptron on the flattened observation.

    Args:
        observation_space: what `flat_features` makes a row of floats of.
        num_outputs: K.
        hidden: width of each hidden layer.
        activation: a name of `ACTIVATIONS`.
        output_scale: scale of the last layer; small makes a policy's first actions
            nearly uniform, 1 suits a critic.

    Returns:
        A memoryless network.

    Raises:
        ValueError: at `init`, if a size is not positive or the activation is unknown.

    >>> network = mlp_network(Discrete(3), 2, hidden=())
    >>> params = network.init(jax.random.key(0), jnp.array(0))
    >>> network.step(params, None, jnp.array(0))[0].shape
    (2,)
    """
    encode, num_features = flat_features(observation_space)

    def make(rngs: Any) -> Any:
        return mlp(
            num_features,
            hidden,
            num_outputs,
            rngs=rngs,
            activation=activation,
            output_scale=output_scale,
        )

    return _feedforward_module(make, encode)


def cnn_network(
    observation_space: Space,
    num_outputs: int,
    *,
    channels: Sequence[int] = (16,),
    kernel: int = 3,
    hidden: Sequence[int] = (128,),
    activation: str = "relu",
    output_scale: float = 0.01,
) -> Network:
    """Convolutions on an image, then a multilayer perceptron.

    Pixels are taken as they are: scale bytes in the environment, or use
    `normalizers.normalized`.

    Args:
        observation_space: a `Box` of shape (height, width, channels), masked or not.
        num_outputs: K.
        channels: how many each convolution gives; they are without padding, in steps
            of one.
        kernel: height and width of each convolution.
        hidden: width of each hidden layer after the convolutions.
        activation: a name of `ACTIVATIONS`.
        output_scale: scale of the last layer.

    Returns:
        A memoryless network.

    Raises:
        ValueError: if the space is no image; at `init`, if a size is not positive, the
            activation is unknown, or the image is too small for its convolutions.

    Reference: Young and Tian 2019, "MinAtar" (one convolution of 16 and a layer of
        128).

    >>> network = cnn_network(Box(0, 1, (10, 10, 4)), 6)
    >>> image = jnp.zeros((10, 10, 4))
    >>> params = network.init(jax.random.key(0), image)
    >>> network.step(params, None, image)[0].shape
    (6,)
    """
    encode, image_shape = _image(observation_space)

    def make(rngs: Any) -> Any:
        return cnn(
            image_shape,
            channels,
            kernel,
            hidden,
            num_outputs,
            rngs=rngs,
            activation=activation,
            output_scale=output_scale,
        )

    return _feedforward_module(make, encode)


def gru_network(
    observation_space: Space,
    num_outputs: int,
    *,
    hidden: Sequence[int] = (64,),
    memory: int = 64,
    channels: Sequence[int] = (),
    kernel: int = 3,
    activation: str = "tanh",
    output_scale: float = 0.01,
) -> Network:
    """Hidden layers, a gated recurrent unit, and a linear reading of its memory.

    Over a row, all that does not wait for the memory is taken for all decisions at
    once; see `layers` for the equations.

    Args:
        observation_space: what `flat_features` makes a row of floats of; with
            convolutions a `Box` of shape (height, width, channels), masked or not.
        num_outputs: K.
        hidden: width of each hidden layer before the memory.
        memory: width of the memory, zeros at an episode's start.
        channels: how many each convolution gives; without any, none is made and the
            observation is flattened.
        kernel: height and width of each convolution.
        activation: a name of `ACTIVATIONS`, of the layers before the memory.
        output_scale: scale of the last layer.

    Returns:
        A recurrent network.

    Raises:
        ValueError: if `memory` is not positive or the space is no image where there are
            convolutions; at `init`, as `cnn_network`.

    Reference: Cho et al. 2014, "Learning phrase representations using RNN
        encoder-decoder".

    >>> network = gru_network(Box(-1, 1, (2,)), 3, hidden=(4,), memory=5)
    >>> params, start = network.init(jax.random.key(0), jnp.ones(2)), jnp.arange(7) == 0
    >>> outputs, carries = network.unroll(
    ...     params, network.initial_carry(), jnp.ones((7, 2)), start
    ... )
    >>> outputs.shape, carries.shape
    ((7, 3), (7, 5))
    """
    check_positive("memory", memory)
    encode: Callable[[PyTree], Array]
    input_shape: tuple[int, ...]
    if channels:
        encode, input_shape = _image(observation_space)
    else:
        encode, num_features = flat_features(observation_space)
        input_shape = (num_features,)

    def make(rngs: Any) -> Any:
        return gru(
            input_shape,
            channels,
            kernel,
            hidden,
            memory,
            num_outputs,
            rngs=rngs,
            activation=activation,
            output_scale=output_scale,
        )

    return _recurrent_module(make, encode, memory)


def flat_features(space: Space) -> tuple[Callable[[PyTree], Array], int]:
    """An encoder of one observation as a row of floats, and the row's length.

    Args:
        space: numbers (`Discrete`, `MultiDiscrete`) are one-hot coded, arrays and bits
            flattened; of `Masked` observations the features alone are encoded.

    Returns:
        `encode(obs) -> [length]` and the length, at least 1.

    >>> encode, length = flat_features(MultiDiscrete((2, 3)))
    >>> encode(jnp.array([1, 0])).tolist()
    [0.0, 1.0, 1.0, 0.0, 0.0]
    """
    if isinstance(space, Masked):
        encode, length = flat_features(space.features)
        return (lambda obs: encode(obs.features)), length
    if isinstance(space, Discrete):
        n = space.n
        return (lambda obs: jax.nn.one_hot(obs, n, dtype=float)), n
    if isinstance(space, MultiDiscrete):
        return _one_hots(space.nvec), sum(space.nvec)

    def flatten(obs: PyTree) -> Float[Array, "n"]:
        return jnp.reshape(obs, (-1,)).astype(float)

    return flatten, max(1, int(np.prod(space.shape)))


def _one_hots(nvec: tuple[int, ...]) -> Callable[[Array], Array]:
    def encode(obs: Array) -> Array:
        rows = [jax.nn.one_hot(obs[i], n, dtype=float) for i, n in enumerate(nvec)]
        return jnp.concatenate(rows)

    return encode


def _image(space: Space) -> tuple[Callable[[PyTree], Array], tuple[int, int, int]]:
    """An encoder of one observation as an image of floats, and the image's shape."""
    if isinstance(space, Masked):
        encode, shape = _image(space.features)
        return (lambda obs: encode(obs.features)), shape
    if not isinstance(space, Box) or len(space.shape) != 3:
        raise ValueError(
            f"observation_space is {space!r}, needs a Box with shape (height, width, "
            "channels); for others use mlp_network, or gru_network without channels"
        )
    return (lambda obs: jnp.asarray(obs).astype(float)), space.shape


def _feedforward_module(
    make_module: Callable[[Any], Any], encode: Callable[[PyTree], Array]
) -> Network:
    init, bind = split_module(make_module)
    return feedforward(
        init,
        lambda params, obs: bind(params)(encode(obs)),
        lambda params, obs: perceive_many(bind(params), jax.vmap(encode)(obs)),
    )


def _recurrent_module(
    make_module: Callable[[Any], Any], encode: Callable[[PyTree], Array], memory: int
) -> Network:
    init, bind = split_module(make_module)

    def initial_carry() -> Array:
        return jnp.zeros((memory,), float)

    def step(params: Params, carry: Array, obs: PyTree) -> tuple[Array, Array]:
        module = bind(params)
        carry = module.remember(carry, module.project(encode(obs)))
        return module.read(carry), carry

    def unroll(
        params: Params, carry: Array, obs: PyTree, starts: Array
    ) -> tuple[Array, Array]:
        module = bind(params)
        projected = module.project(jax.vmap(encode)(obs))

        def remember(memory: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            projected, start = at
            memory = jnp.where(start, initial_carry(), memory)
            memory = module.remember(memory, projected)
            return memory, memory

        _, carries = jax.lax.scan(remember, carry, (projected, starts))
        return module.read(carries), carries

    return Network(init, initial_carry, step, unroll, is_recurrent=True)
