"""Networks in Flax NNX: the defaults that policies and critics are built from.

Any other network, in any library, can take their place through `policies.from_apply`,
`from_linen` or `from_nnx`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
from jaxtyping import Array

from jaxpg._checks import check_choice, check_positive

if TYPE_CHECKING:
    from flax import nnx

__all__ = ["ACTIVATIONS", "mlp"]

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

    check_choice("activation", activation, ACTIVATIONS)
    for size in (num_inputs, *hidden, num_outputs):
        check_positive("layer width", size)

    def linear(num_in: int, num_out: int, scale: float) -> nnx.Linear:
        # No orthogonal matrices: their QR factorisations are LAPACK calls that, vmapped
        # over seeds or run by two host devices at once, can wait for each other for
        # ever in XLA's CPU thread pool (seen with jax 0.10.2 on two cores).
        normal = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
        # Flax's own default stays float32 where JAX computes in float64.
        dtype = jax.numpy.result_type(float)
        return nnx.Linear(
            num_in, num_out, kernel_init=normal, param_dtype=dtype, rngs=rngs
        )

    layers: list = []
    widths = [num_inputs, *hidden]
    for num_in, num_out in itertools.pairwise(widths):
        layers += [linear(num_in, num_out, 1.0)]
        layers += [ACTIVATIONS[activation]]
    layers += [linear(widths[-1], num_outputs, output_scale)]
    return nnx.Sequential(*layers)
