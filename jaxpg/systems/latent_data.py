"""Handwritten digits as zeros and ones: 8x8 pixels, 1797 images, from scikit-learn.

A pixel's intensity, in sixteenths, is its probability of being a one. Training images
are binarised anew each time that they are seen; test images once and for all, so that
every bound is of the same data.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxpg.types import PRNGKey

__all__ = ["SIDE", "BinaryDigits", "binarise", "load_binary_digits"]

SIDE = 8
NUM_TEST = 360
SPLIT_SEED = 0


class BinaryDigits(NamedTuple):
    """Digits to learn from, and digits to be judged by.

    Attributes:
        intensities: of training images, in [0, 1], [1437, 64].
        train: the first `NUM_TEST` of them, binarised once.
        test: binarised once, [360, 64].
    """

    intensities: Float[Array, "N P"]
    train: Float[Array, "M P"]
    test: Float[Array, "M P"]


def load_binary_digits() -> BinaryDigits:
    """The digits that ship in scikit-learn, shuffled and split by a fixed seed.

    Returns:
        Training and test images.

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits ship in scikit-learn, which is not installed; needs pip "
            "install 'jaxpg[digits]'"
        ) from error
    images = load_digits().data.astype(np.float32) / 16.0
    images = images[np.random.default_rng(SPLIT_SEED).permutation(len(images))]
    rest, held_out = images[:-NUM_TEST], images[-NUM_TEST:]
    keys = jax.random.split(jax.random.key(SPLIT_SEED), 2)
    return BinaryDigits(
        jax.numpy.asarray(rest),
        binarise(keys[0], jax.numpy.asarray(rest[:NUM_TEST])),
        binarise(keys[1], jax.numpy.asarray(held_out)),
    )


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
