r"""Perceptrons and convolutions of many inputs, with the inputs last in memory.

From layer to layer what is computed stays [features, N], and images [channels, height,
width, N]. On CPUs that leaves out the transpositions that the gradient of a kernel
[F, K] needs otherwise: it is

    d kernel = features d^T        with features [F, N] and d [K, N] as they lie,

and a patch of an image is copied in runs of N numbers. With a row of ones below the
features the gradient of the bias is one more row of the same product.
"""

import functools
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxpg._batching import rows_are_vmapped
from jaxpg.layers import flat, patches

if TYPE_CHECKING:
    from flax import nnx

__all__ = ["perceive_many"]


FEW = 64
"""Inputs from which on it pays to have them last in memory."""


def perceive_many(
    perceptron: "nnx.Module", inputs: Float[Array, " N *shape"]
) -> Float[Array, "N K"]:
    """perceptron(inputs), computed with the N inputs last in memory.

    Args:
        perceptron: from `mlp` or `cnn`.
        inputs: many rows of features or images; a few are left as they are, and so are
            those of rows side by side, where products of many rows cost more this way,
            and images where nobody has measured it, on accelerators.

    Returns:
        What the perceptron says of each.

    >>> from flax import nnx
    >>> from jaxpg.layers import mlp
    >>> perceptron = mlp(2, (3,), 1, rngs=nnx.Rngs(0), output_scale=1.0)
    >>> inputs = jnp.linspace(-1.0, 1.0, 128).reshape(64, 2)
    >>> bool(jnp.allclose(perceive_many(perceptron, inputs), perceptron(inputs)))
    True
    """
    on_cpu = jax.default_backend() == "cpu"
    of_images = inputs.ndim > 2
    if len(inputs) < FEW or rows_are_vmapped() or (of_images and not on_cpu):
        return perceptron(inputs)
    features = jnp.moveaxis(inputs, (-1, 0), (0, -1))
    for layer in perceptron.layers:
        features = _turned(layer)(features)
    return features.T


def _turned(layer: Any) -> Any:
    """A layer of `mlp` or `cnn`, of features first and inputs last."""
    from flax import nnx

    if isinstance(layer, nnx.Linear):
        return functools.partial(_linear, layer.kernel[...], layer.bias[...])
    if layer is flat:
        return _flat
    if getattr(layer, "func", None) is patches:
        return functools.partial(_patches, **layer.keywords)
    return layer  # an activation


def _linear(
    kernel: Float[Array, "F K"],
    bias: Float[Array, " K"],
    features: Float[Array, " F *N"],
) -> Float[Array, " K *N"]:
    affine = _affine_in_one if jax.default_backend() == "cpu" else _affine
    out = affine(kernel, bias, features.reshape(len(features), -1))
    return out.reshape(-1, *features.shape[1:])


def _flat(planes: Float[Array, "C H W N"]) -> Float[Array, "F N"]:
    """In the order that `flat` gives features, which the next kernel expects."""
    return jnp.moveaxis(planes, 0, 2).reshape(-1, planes.shape[-1])


def _patches(planes: Float[Array, "C H W N"], kernel: int) -> Float[Array, "F h w N"]:
    height, width = (size - kernel + 1 for size in planes.shape[1:3])
    corners = itertools.product(range(kernel), range(kernel))
    shifted = [planes[:, y : y + height, x : x + width] for y, x in corners]
    return jnp.concatenate(shifted)


def _affine(
    kernel: Float[Array, "F K"], bias: Float[Array, " K"], features: Float[Array, "F N"]
) -> Float[Array, "K N"]:
    """kernel^T features + bias."""
    return kernel.T @ features + bias[:, None]


_affine_in_one = jax.custom_jvp(_affine)
"""`_affine`, whose gradients of kernel and bias are one product.

The tangent sees the bias as one more row of the kernel, over features that are always
1. XLA's CPU compiler adds up the gradient of a bias number by number, and multiplies
that of a first layer's few features so too; with one row more both are a product that
runs at the machine's rate.
"""


def _affine_tangent(primals: Any, tangents: Any) -> tuple[Array, Array]:
    kernel, bias, features = primals
    kernel_dot, bias_dot, features_dot = tangents
    out = _affine_in_one(kernel, bias, features)
    out_dot = jnp.zeros_like(out)
    if not (_never_moves(kernel_dot) and _never_moves(bias_dot)):
        kernel_dot = jnp.zeros_like(kernel) if _never_moves(kernel_dot) else kernel_dot
        bias_dot = jnp.zeros_like(bias) if _never_moves(bias_dot) else bias_dot
        ones = jnp.ones((1, features.shape[1]), features.dtype)
        both = jnp.concatenate([kernel_dot, bias_dot.reshape(1, -1)])
        out_dot += both.T @ jnp.concatenate([features, ones])
    if not _never_moves(features_dot):
        out_dot += kernel.T @ features_dot
    return out, out_dot


def _never_moves(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


_affine_in_one.defjvp(_affine_tangent, symbolic_zeros=True)
