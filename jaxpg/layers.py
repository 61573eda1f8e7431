r"""Layers in Flax NNX: perceptron, convolutions and a gated memory, as modules.

Weights are normal, with variance scale^2 / inputs. A convolution is a matrix product of
patches, because XLA's own on CPUs is some twenty times slower inside `scan`. The gated
recurrent unit is, with * taken element by element,

    r = sigmoid(W_ir x + b_ir + W_hr h),    z = sigmoid(W_iz x + b_iz + W_hz h)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),    h <- (1 - z) * n + z * h

What of it depends on x alone is one product for all three gates, and can be taken for
a whole row at once; only W_h h must wait for the decision before.

References: Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder"
(with the reset inside, as cuDNN and Flax have it); Andrychowicz et al. 2021, "What
matters for on-policy deep actor-critic methods?" (small last policy layer).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import check_choice, check_positive
from jaxpg.types import Params, PRNGKey, PyTree

if TYPE_CHECKING:
    from flax import nnx

__all__ = [
    "ACTIVATIONS",
    "cnn",
    "flat",
    "gru",
    "mlp",
    "patches",
    "split_module",
]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jax.numpy.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def mlp(
    num_inputs: int,
    hidden: Sequence[int],
    num_outputs: int,
    *,
    rngs: "nnx.Rngs",
    activation: str = "tanh",
    output_scale: float = 0.01,
) -> "nnx.Module":
    """A multilayer perceptron with normal weights of variance scale^2 / inputs.

    Args:
        num_inputs: features that come in.
        hidden: width of each hidden layer.
        num_outputs: features that go out.
        rngs: NNX random streams; `params` is consumed.
        activation: a name of `ACTIVATIONS`.
        output_scale: scale of the last layer; small makes a policy's first actions
            nearly uniform, 1 suits a critic.

    Returns:
        An NNX module that maps [..., num_inputs] to [..., num_outputs].

    Raises:
        ValueError: if a size is not positive or the activation is unknown.

    Reference: Andrychowicz et al. 2021, "What matters for on-policy deep actor-critic
        methods?" (small last policy layer).
    """
    from flax import nnx

    torso, width = _torso((num_inputs,), (), 1, hidden, activation, rngs)
    return nnx.Sequential(*torso, _linear(width, num_outputs, output_scale, rngs))


def cnn(
    image_shape: tuple[int, int, int],
    channels: Sequence[int],
    kernel: int,
    hidden: Sequence[int],
    num_outputs: int,
    *,
    rngs: "nnx.Rngs",
    activation: str = "relu",
    output_scale: float = 0.01,
) -> "nnx.Module":
    """Convolutions without padding in steps of one, then a perceptron.

    Args:
        image_shape: (height, width, channels) of what comes in.
        channels: how many each convolution gives.
        kernel: height and width of each convolution.
        hidden: width of each hidden layer after the convolutions.
        num_outputs: features that go out.
        rngs: NNX random streams; `params` is consumed.
        activation: a name of `ACTIVATIONS`, after every layer but the last.
        output_scale: scale of the last layer.

    Returns:
        An NNX module that maps [..., H, W, C] to [..., num_outputs].

    Raises:
        ValueError: if a size is not positive, the activation is unknown or the image is
            too small for its convolutions.
    """
    from flax import nnx

    torso, width = _torso(image_shape, channels, kernel, hidden, activation, rngs)
    return nnx.Sequential(*torso, _linear(width, num_outputs, output_scale, rngs))


def gru(
    input_shape: tuple[int, ...],
    channels: Sequence[int],
    kernel: int,
    hidden: Sequence[int],
    memory: int,
    num_outputs: int,
    *,
    rngs: "nnx.Rngs",
    activation: str = "tanh",
    output_scale: float = 0.01,
) -> Any:
    """Hidden layers, a gated recurrent unit, and a linear reading of its memory.

    Args:
        input_shape: (features,), or (height, width, channels) with convolutions.
        channels: how many each convolution gives; empty for none.
        kernel: height and width of each convolution.
        hidden: width of each hidden layer before the memory.
        memory: width of the memory.
        num_outputs: features that go out.
        rngs: NNX random streams; `params` is consumed.
        activation: a name of `ACTIVATIONS`, of the layers before the memory.
        output_scale: scale of the last layer.

    Returns:
        An NNX module with three parts: `project` maps [..., *input_shape] to
        [..., 3 memory], `remember(memory, projected)` takes one step of the equations
        above, and `read` maps [..., memory] to [..., num_outputs].

    Raises:
        ValueError: as `cnn`.

    Reference: Cho et al. 2014, "Learning phrase representations using RNN
        encoder-decoder".
    """
    from flax import nnx

    check_positive("memory", memory)
    torso, width = _torso(input_shape, channels, kernel, hidden, activation, rngs)
    return _gated_module()(
        nnx.Sequential(*torso, _linear(width, 3 * memory, 1.0, rngs)),
        _linear(memory, 3 * memory, 1.0, rngs, use_bias=False),
        nnx.Param(jnp.zeros((memory,), float)),
        _linear(memory, num_outputs, output_scale, rngs),
    )


def patches(
    images: Float[Array, "*B H W C"], kernel: int
) -> Float[Array, "*B H-{kernel}+1 W-{kernel}+1 {kernel}*{kernel}*C"]:
    """Every square of `kernel` by `kernel` pixels that lies inside, as one row.

    The row's order is that of a convolution's kernel [kernel, kernel, C, ...] made
    flat, so that `patches(images, kernel) @ flat` is the convolution.

    Args:
        images: with channels last.
        kernel: height and width of a square.

    Returns:
        The squares in the place of their upper left corner.

    >>> patches(jnp.arange(6.0).reshape(2, 3, 1), 2).tolist()
    [[[0.0, 1.0, 3.0, 4.0], [1.0, 2.0, 4.0, 5.0]]]
    """
    height, width = (size - kernel + 1 for size in images.shape[-3:-1])
    corners = itertools.product(range(kernel), range(kernel))
    shifted = [images[..., y : y + height, x : x + width, :] for y, x in corners]
    return jnp.concatenate(shifted, axis=-1)


def flat(images: Float[Array, "*B H W C"]) -> Float[Array, "*B F"]:
    """Each image as one row of features.

    >>> flat(jnp.zeros((5, 2, 3, 4))).shape
    (5, 24)
    """
    return images.reshape(*images.shape[:-3], -1)


def split_module(
    make_module: Callable[[Any], Any],
) -> tuple[Callable[[PRNGKey, PyTree], Params], Callable[[Params], Any]]:
    """Two pure functions from an NNX module: draw its params, and put params into it.

    Parameters cross the boundary as nested dictionaries of arrays, so that no NNX
    object enters a loop. All state is taken for parameters: modules with dropout or
    batch statistics do not fit.

    Args:
        make_module: `make_module(rngs) -> module`.

    Returns:
        `init(key, obs) -> params`, as a `Network` has it, and `bind(params) -> module`.
    """
    from flax import nnx

    def build(key: PRNGKey) -> Any:
        return make_module(nnx.Rngs(params=key))

    def init(key: PRNGKey, obs: PyTree) -> Params:
        del obs  # an NNX module knows its input sizes when it is built
        return nnx.to_pure_dict(nnx.split(build(key))[1])

    @functools.cache
    def structure(dtype: Any) -> Any:
        del dtype  # JAX's default float, by which the state may differ
        return nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))

    def bind(params: Params) -> Any:
        graph, state = structure(jax.numpy.result_type(float))
        state = jax.tree.map(lambda x: x, state)  # the call below writes into it
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    return init, bind


@functools.cache
def _gated_module() -> type:
    """The class of `gru`, made once: it cannot be named before Flax is imported."""
    from flax import nnx

    class Gated(nnx.Module):
        def __init__(self, project: Any, hold: Any, bias: Any, read: Any) -> None:
            self.project, self.hold, self.bias, self.read = project, hold, bias, read

        def remember(self, memory: Array, projected: Array) -> Array:
            size = memory.shape[-1]
            held = self.hold(memory)
            gates = jax.nn.sigmoid(projected[..., : 2 * size] + held[..., : 2 * size])
            reset, keep = gates[..., :size], gates[..., size:]
            bias = jnp.broadcast_to(self.bias[...], memory.shape)
            inner = projected[..., 2 * size :] + reset * (held[..., 2 * size :] + bias)
            new = jnp.tanh(inner)
            return new + keep * (memory - new)

    return Gated


def _torso(
    input_shape: tuple[int, ...],
    channels: Sequence[int],
    kernel: int,
    hidden: Sequence[int],
    activation: str,
    rngs: "nnx.Rngs",
) -> tuple[list, int]:
    """Convolutions if any, then hidden layers; and how many features they give."""
    check_choice("activation", activation, ACTIVATIONS)
    *_, width = input_shape
    layers: list = []
    if channels:
        layers, width = _convolutions(input_shape, channels, kernel, activation, rngs)
    dense, width = _dense_layers(width, hidden, activation, rngs)
    return [*layers, *dense], width


def _convolutions(
    image_shape: tuple[int, ...],
    channels: Sequence[int],
    kernel: int,
    activation: str,
    rngs: "nnx.Rngs",
) -> tuple[list, int]:
    check_positive("kernel", kernel)
    height, width, num_in = image_shape
    lost = len(channels) * (kernel - 1)
    if min(height, width) <= lost:
        raise ValueError(
            f"kernel is {kernel} in {len(channels)} convolutions, needs an image of at "
            f"least {lost + 1} by {lost + 1}, but it has {height} by {width}; use "
            "fewer of them or a smaller kernel"
        )
    layers: list = []
    for num_out in channels:
        check_positive("channels", num_out)
        layers += [functools.partial(patches, kernel=kernel)]
        layers += [_linear(kernel**2 * num_in, num_out, 1.0, rngs)]
        layers += [ACTIVATIONS[activation]]
        num_in = num_out
    layers += [flat]
    return layers, (height - lost) * (width - lost) * num_in


def _dense_layers(
    num_inputs: int, hidden: Sequence[int], activation: str, rngs: "nnx.Rngs"
) -> tuple[list, int]:
    widths = [num_inputs, *hidden]
    layers: list = []
    for num_in, num_out in itertools.pairwise(widths):
        layers += [_linear(num_in, num_out, 1.0, rngs), ACTIVATIONS[activation]]
    return layers, widths[-1]


def _linear(
    num_in: int, num_out: int, scale: float, rngs: "nnx.Rngs", use_bias: bool = True
) -> "nnx.Linear":
    from flax import nnx

    for size in (num_in, num_out):
        check_positive("layer width", size)
    # No orthogonal matrices: their QR factorisations are LAPACK calls that, vmapped
    # over seeds or run by two host devices at once, can wait for each other for
    # ever in XLA's CPU thread pool (seen with jax 0.10.2 on two cores).
    normal = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
    return nnx.Linear(
        num_in,
        num_out,
        use_bias=use_bias,
        kernel_init=normal,
        # Flax's own default stays float32 where JAX computes in float64.
        param_dtype=jax.numpy.result_type(float),
        rngs=rngs,
    )
