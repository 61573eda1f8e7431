"""Networks in Flax NNX: the defaults that policies and critics are built from.

Any other network, in any library, can take their place through `policies.from_apply`,
`from_linen` or `from_nnx`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpg._checks import check_choice, check_positive
from jaxpg.envs.base import Discrete, Space
from jaxpg.types import Params, PRNGKey, PyTree

if TYPE_CHECKING:
    from flax import nnx

__all__ = ["ACTIVATIONS", "Network", "feedforward", "flat_features", "mlp"]


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
) -> Network:
    """A memoryless network from two plain functions of one observation.

    Args:
        init: `init(key, obs) -> params`.
        apply: `apply(params, obs) -> [K]`.

    Returns:
        A network whose memory is None.

    >>> network = feedforward(lambda key, obs: 2.0, lambda scale, obs: scale * obs)
    >>> network.step(2.0, None, jnp.ones(3))[0].tolist()
    [2.0, 2.0, 2.0]
    """

    def step(params: Params, carry: PyTree, obs: PyTree) -> tuple[Array, PyTree]:
        return apply(params, obs), carry

    def unroll(
        params: Params, carry: PyTree, obs: PyTree, starts: Array
    ) -> tuple[Array, PyTree]:
        del starts
        return jax.vmap(apply, (None, 0))(params, obs), carry

    return Network(init, lambda: None, step, unroll)


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


def flat_features(space: Space) -> tuple[Callable[[PyTree], Array], int]:
    """An encoder of one observation as a row of floats, and the row's length."""
    if isinstance(space, Discrete):
        n = space.n
        return (lambda obs: jax.nn.one_hot(obs, n, dtype=float)), n

    def flatten(obs: PyTree) -> Float[Array, "n"]:
        return jnp.reshape(obs, (-1,)).astype(float)

    return flatten, max(1, int(np.prod(space.shape)))
