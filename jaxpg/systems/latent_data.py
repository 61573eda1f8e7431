"""Handwritten digits as zeros and ones: 8x8 pixels, 1797 images, from scikit-learn.

A pixel's intensity, in sixteenths, is its probability of being a one. Training images
are binarised anew each time that they are seen; test images once and for all, so that
every bound is of the same data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg.systems.digits import load_digits
from jaxpg.types import PRNGKey

__all__ = ["SIDE", "BinaryDigits", "binarise", "load_binary_digits"]

SIDE = 8
BINARY_SEED = 0


class BinaryDigits(NamedTuple):
    """Digits to learn from, and digits to be judged by.

    Attributes:
        intensities: of training images, in [0, 1], [N, 64].
        train: as many of them as there are test images, binarised once.
        test: binarised once, [M, 64].
    """

    intensities: Float[Array, "N P"]
    train: Float[Array, "M P"]
    test: Float[Array, "M P"]


def load_binary_digits() -> BinaryDigits:
    """The digits of scikit-learn, one in five of each class held out.

    Returns:
        Training and test images.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    train, test = (
        jnp.asarray(part.images.reshape(len(part.images), -1)) for part in load_digits()
    )
    key_train, key_test = jax.random.split(jax.random.key(BINARY_SEED))
    some = train[: len(test)]
    return BinaryDigits(train, binarise(key_train, some), binarise(key_test, test))


def binarise(key: PRNGKey, intensities: Float[Array, "*B P"]) -> Float[Array, "*B P"]:
    """Zeros and ones, each pixel a one with its intensity as probability.

    Args:
        key: consumed.
        intensities: in [0, 1].

    Returns:
        Of the same shape and type.
    """
    bits = jax.random.bernoulli(key, intensities)
    return bits.astype(intensities.dtype)
