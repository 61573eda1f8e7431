"""Looking through a small window: the sensor, and the network that moves it.

    x[t] = sensor(canvas, l[t]),  h[t] = GRU(h[t-1], features(x[t], l[t]))
    l[t+1] ~ N(tanh(W h[t]), std² I),    logits = V h[T]

A place l is (row, column) in [-1, 1]², the canvas from edge pixel to edge pixel. The
sensor takes a square of `size` pixels there, and ever larger ones around it, each
averaged down to `size`; off the canvas there is no ink. It is no differentiable
function of the place: how to move the window is learned from the score alone.

Reference: Mnih, Heess, Graves and Kavukcuoglu 2014, "Recurrent models of visual
attention".
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import check_positive, check_range
from jaxpg.distributions import DiagonalGaussian
from jaxpg.layers import gru, mlp, patches, split_module
from jaxpg.types import Params, PRNGKey

__all__ = ["Choose", "Eye", "Gaze", "halved", "linear_part", "look", "make_eye"]

CHANNELS = 16
"""Filters of 3 x 3 that all squares are seen through; twice as many see what they give,
halved."""

CONTRAST = 2.0
"""Ink counts this much: most of a square is empty, and its features would be faint."""

Choose = Callable[[PRNGKey, DiagonalGaussian, Array], Array]
"""`choose(key, distribution, baseline) -> place [2]`: where to look next."""


class Gaze(NamedTuple):
    """What came of a look at a canvas.

    Attributes:
        logits: of the classes.
        places: where the window stood, [T, 2], in [-1, 1].
    """

    logits: Float[Array, "*B C"]
    places: Float[Array, "*B T 2"]


class Eye(NamedTuple):
    """The attention model, as pure functions of one canvas.

    Attributes:
        init: `init(key) -> params`.
        gaze: `gaze(params, key, canvas, choose) -> Gaze`.
    """

    init: Callable[[PRNGKey], Params]
    gaze: Callable[[Params, PRNGKey, Array, Choose], Gaze]


def look(
    canvas: Float[Array, "H W"], place: Float[Array, "2"], size: int, scales: int
) -> Float[Array, "{scales} {size} {size}"]:
    """The sensor: squares of `size`, 2 `size`, 4 `size`, ... pixels, each as `size`².

    Args:
        canvas: ink.
        place: middle of the squares, in [-1, 1]; rounded to whole pixels.
        size: pixels of a square's side, after averaging.
        scales: how many squares.

    Returns:
        The squares, the smallest first.

    >>> look(jnp.arange(16.0).reshape(4, 4), jnp.zeros(2), 2, 2)[0].tolist()
    [[5.0, 6.0], [9.0, 10.0]]
    """

    def weights(where: Array, length: int, factor: int) -> Array:
        """Which share of each of `length` pixels each of the `size` ones gets."""
        middle = (where + 1.0) / 2.0 * (length - 1)
        start = jnp.floor(middle - (size * factor - 1) / 2.0 + 0.5).astype(jnp.int32)
        owner = (jnp.arange(length) - start) // factor
        return jnp.where(jnp.arange(size)[:, None] == owner[None], 1.0 / factor, 0.0)

    factors = [2**i for i in range(scales)]
    rows = jnp.stack([weights(place[0], canvas.shape[0], f) for f in factors])
    columns = jnp.stack([weights(place[1], canvas.shape[1], f) for f in factors])
    # Products of matrices, because gathers are slow on CPUs and worse under vmap.
    return jnp.einsum("sgw,skw->sgk", rows @ canvas, columns)


def halved(x: Float[Array, "*B H W C"]) -> Float[Array, "*B H//2 W//2 C"]:
    """What is above 0, and of each 2 x 2 the largest.

    Args:
        x: features of a convolution.

    Returns:
        Half as many rows and columns; an odd last one is left out.

    >>> halved(jnp.array([[-1.0, 2.0], [1.0, 0.0]])[..., None]).tolist()
    [[[2.0]]]
    """
    *batch, height, width, channels = x.shape
    x = x[..., : height // 2 * 2, : width // 2 * 2, :]
    x = x.reshape(*batch, height // 2, 2, width // 2, 2, channels)
    return jax.nn.relu(x.max((-4, -2)))


def make_eye(
    *,
    num_classes: int = 10,
    num_glimpses: int = 4,
    size: int = 12,
    scales: int = 2,
    features: int = 128,
    memory: int = 128,
    std: float = 0.1,
    first_baseline: float = 0.0,
) -> Eye:
    """The recurrent attention model.

    Args:
        num_classes: of what is shown.
        num_glimpses: looks at each canvas, the first at its middle.
        size: pixels of the window's side, 8 or more.
        scales: of the sensor.
        features: width of the glimpse network.
        memory: width of the core.
        std: standard deviation of a place, half canvases.
        first_baseline: what every place is expected to cost before anything is learned.

    Returns:
        The model.

    Raises:
        ValueError: if a number is not positive.
    """
    sizes = {"num_glimpses": num_glimpses, "size": size, "scales": scales}
    for name, value in (sizes | {"features": features, "memory": memory}).items():
        check_positive(name, value)
    check_range(
        "size", size, 8, cure="two filters of 3 x 3 see it, halved between them"
    )
    strokes = scales * ((size - 2) // 2 - 2) ** 2 * 2 * CHANNELS
    parts: dict[str, tuple[Any, Any]] = {
        "filters": linear_part(9, CHANNELS, output_scale=1.4),
        "shapes": linear_part(9 * CHANNELS, 2 * CHANNELS, output_scale=1.4),
        "what": linear_part(strokes, features, output_scale=1.4),
        "where": linear_part(2, features),
        "core": split_module(
            lambda rngs: gru(
                *((features,), (), 1, (features,), memory, num_classes),
                rngs=rngs,
                activation="relu",
                output_scale=1.0,
            )
        ),
        "location": linear_part(memory, 2, output_scale=0.1),
        "baseline": linear_part(memory, 1, output_scale=0.0),
    }

    def init(key: PRNGKey) -> Params:
        keys = jax.random.split(key, len(parts))
        return {
            name: part[0](key, None)
            for (name, part), key in zip(parts.items(), keys, strict=True)
        }

    def gaze(params: Params, key: PRNGKey, canvas: Array, choose: Choose) -> Gaze:
        filters, shapes, what, where, core, location, baseline = (
            bind(params[name]) for name, (_, bind) in parts.items()
        )

        def remember(memory: Array, place: Array) -> Array:
            squares = CONTRAST * look(canvas, place, size, scales)
            strokes = halved(filters(patches(squares[..., None], 3)))
            seen = what(jax.nn.relu(shapes(patches(strokes, 3))).reshape(-1))
            return core.remember(memory, core.project(jax.nn.relu(seen + where(place))))

        def move(carry: tuple[Array, Array], key: PRNGKey) -> Any:
            memory, place = carry
            memory = remember(memory, place)
            mean = jnp.tanh(location(memory))
            # What to expect is read off the core, and does not shape it.
            expected = first_baseline + baseline(jax.lax.stop_gradient(memory))[0]
            log_std = jnp.full((2,), math.log(std), mean.dtype)
            drawn = choose(key, DiagonalGaussian(mean, log_std), expected)
            return (memory, jnp.clip(drawn, -1.0, 1.0)), place

        start = jnp.zeros((memory,), canvas.dtype), jnp.zeros((2,), canvas.dtype)
        keys = jax.random.split(key, num_glimpses - 1)
        (last, place), places = jax.lax.scan(move, start, keys)
        logits = core.read(remember(last, place))
        return Gaze(logits, jnp.concatenate([places, place[None]]))

    return Eye(init, gaze)


def linear_part(num_inputs: int, num_outputs: int, output_scale: float = 1.0) -> Any:
    """One linear layer as two pure functions.

    Args:
        num_inputs: features that come in.
        num_outputs: features that go out.
        output_scale: scale of its weights.

    Returns:
        `init` and `bind` of `layers.split_module`.
    """
    return split_module(
        lambda rngs: mlp(
            num_inputs, (), num_outputs, rngs=rngs, output_scale=output_scale
        )
    )
