"""The discrete variational autoencoder of handwritten digits, as a system to train.

    gradient of minus the evidence bound -> Adam,     any estimator of `ESTIMATORS`

Its evaluation is on images that training never sees: the bound, the importance-weighted
one, and where codes are few the exact log-likelihood that both of them are under.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxpg.systems.base import System
from jaxpg.systems.latent_data import SIDE, BinaryDigits, binarise, load_binary_digits
from jaxpg.systems.latent_estimators import make_estimator
from jaxpg.systems.latent_model import (
    draw_image,
    exact_log_likelihood,
    importance_weighted_bound,
    init_model,
    reconstruct,
)
from jaxpg.systems.latent_settings import DiscreteVAESettings, num_codes
from jaxpg.train.axes import save_figure
from jaxpg.types import Params, PRNGKey, PyTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DiscreteVAEState", "discrete_vae", "evaluate_model", "show_images"]

FEW_CODES = 2**10
"""Up to here the evaluation adds up all codes of every test image."""

AT_ONCE = 60
"""Images that are evaluated side by side."""


class DiscreteVAEState(NamedTuple):
    """What the next update needs.

    Attributes:
        params: of the model.
        optimizer: Adam's memory.
        estimator: what the estimator has learned.
    """

    params: Params
    optimizer: PyTree
    estimator: PyTree


def discrete_vae(
    settings: DiscreteVAESettings, digits: BinaryDigits | None = None
) -> System:
    """A discrete variational autoencoder to be trained.

    Args:
        settings: model, estimator and optimiser.
        digits: the data; None for those of scikit-learn.

    Returns:
        The system. Its updates report `bound`, of the training images as they were
        sampled, and `grad_norm`.

    Raises:
        ValueError: if the data cannot be read.

    Bias: that of the estimator.
    """
    digits = load_binary_digits() if digits is None else digits
    estimator = make_estimator(settings)
    optimizer = optax.adam(settings.learning_rate)
    num_images, num_pixels = digits.intensities.shape

    def init(key: PRNGKey) -> DiscreteVAEState:
        key_model, key_estimator = jax.random.split(key)
        params = init_model(settings, key_model, num_pixels)
        learned = estimator.init(key_estimator, digits.intensities[0])
        return DiscreteVAEState(params, optimizer.init(params), learned)

    def update(
        key: PRNGKey, state: DiscreteVAEState
    ) -> tuple[DiscreteVAEState, dict[str, Array]]:
        key_batch, key_bits, key_draws = jax.random.split(key, 3)
        chosen = jax.random.randint(key_batch, (settings.batch_size,), 0, num_images)
        images = binarise(key_bits, digits.intensities[chosen])
        bound, gradient, learned = estimator.gradient(
            state.params, state.estimator, key_draws, images
        )
        steps, memory = optimizer.update(gradient, state.optimizer)
        params = optax.apply_updates(state.params, steps)
        info = {"bound": bound, "grad_norm": optax.tree.norm(gradient)}
        return DiscreteVAEState(params, memory, learned), info

    def evaluate(key: PRNGKey, state: DiscreteVAEState) -> dict[str, Array]:
        return evaluate_model(settings, state.params, key, digits)

    def picture(state: DiscreteVAEState, path: Path) -> None:
        _picture(settings, state.params, digits, path)

    return System(init, update, evaluate, picture, "test_bound")


def evaluate_model(
    settings: DiscreteVAESettings, params: Params, key: PRNGKey, digits: BinaryDigits
) -> dict[str, Float[Array, ""]]:
    """Mean bounds per image, in nats.

    Args:
        settings: of the model; `evaluation_samples` is K.
        params: of the model.
        key: consumed.
        digits: the data.

    Returns:
        `train_bound`, `test_bound` and `test_tight_bound` (of K samples); with few
        codes also `test_log_likelihood`, exactly.

    Bias: none for the bounds, which are all under the log-likelihood in the mean.
    """

    def bounds(images: Float[Array, "N P"], key: PRNGKey) -> tuple[Array, Array]:
        keys = jax.random.split(key, len(images))
        one, tight = _map(
            lambda key, image: importance_weighted_bound(
                settings, params, key, image, settings.evaluation_samples
            ),
            keys,
            images,
        )
        return jnp.mean(one), jnp.mean(tight)

    key_train, key_test = jax.random.split(key)
    train_bound, _ = bounds(digits.train, key_train)
    test_bound, tight = bounds(digits.test, key_test)
    found = {
        "train_bound": train_bound,
        "test_bound": test_bound,
        "test_tight_bound": tight,
    }
    if num_codes(settings) <= FEW_CODES:
        exact = _map(partial(exact_log_likelihood, settings, params), digits.test)
        found["test_log_likelihood"] = jnp.mean(exact)
    return found


def _map(fn: Any, *inputs: PyTree) -> PyTree:
    return jax.lax.map(lambda x: fn(*x), inputs, batch_size=AT_ONCE)


def show_images(axis: "Axes", images: Float[Array, "R C P"], title: str) -> None:
    """Rows of digits on one axis, a pixel's darkness its probability of a one.

    Args:
        axis: of matplotlib.
        images: R rows of C.
        title: above them.
    """
    rows, columns, _ = images.shape
    framed = np.full((rows, columns, SIDE + 1, SIDE + 1), np.nan)
    framed[..., 1:, 1:] = np.asarray(images).reshape(rows, columns, SIDE, SIDE)
    size = (rows * (SIDE + 1), columns * (SIDE + 1))
    tiles = framed.transpose(0, 2, 1, 3).reshape(size)
    tiles = np.pad(tiles, ((0, 1), (0, 1)), constant_values=np.nan)
    axis.set_facecolor("#56B4E9")
    axis.imshow(tiles, cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=10)


def _picture(
    settings: DiscreteVAESettings, params: Params, digits: BinaryDigits, path: Path
) -> None:
    """Test images over their reconstructions, and images of the model's own."""
    from matplotlib.figure import Figure

    keys = jax.random.split(jax.random.key(0), (6, 12))
    seen = digits.test[:36].reshape(3, 12, -1)
    again = jax.vmap(jax.vmap(partial(reconstruct, settings, params)))(keys[:3], seen)
    drawn = jax.vmap(jax.vmap(partial(draw_image, settings, params)))(keys)
    both = jnp.stack([seen, again], axis=1).reshape(6, 12, -1)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    show_images(left, both, "test images, each over its reconstruction")
    show_images(right, drawn, "samples of the model: a code from the prior, decoded")
    save_figure(figure, path)
