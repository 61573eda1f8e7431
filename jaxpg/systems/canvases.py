"""Digits at random places of larger canvases, among pieces of other digits.

    canvas = pieces of other digits, then the digit itself over them

Most of a canvas says nothing, and the clutter is made of the same strokes as digits
are, so it pays to look in the right place. A canvas is a pure function of a key.

Reference: Mnih et al. 2014, "Recurrent models of visual attention", section 4.1
(cluttered translated digits).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_range
from jaxpg.systems.digits import Digits
from jaxpg.types import PRNGKey

__all__ = ["Canvases", "draw_canvases", "fixed_canvases"]


class Canvases(NamedTuple):
    """Canvases, and what they show where.

    Attributes:
        images: ink in [0, 1], [..., H, W].
        labels: what the digit is, [...].
        corners: row and column of the digit's upper left corner, [..., 2].
    """

    images: Float[Array, "*B H W"]
    labels: Int[Array, "*B"]
    corners: Int[Array, "*B 2"]


def draw_canvases(
    key: PRNGKey,
    digits: Digits,
    which: Int[Array, " B"],
    clutter: Float[Array, "N h w"],
    *,
    size: int = 28,
    num_pieces: int = 6,
    piece: int = 5,
    spread: Float[Array, ""] | float = 1.0,
) -> Canvases:
    """Put each of some digits on a canvas of its own.

    Args:
        key: consumed.
        digits: that may be shown.
        which: of them are, by number.
        clutter: images that the pieces are cut from; of the digits learned from, also
            where others are shown.
        size: height and width of a canvas in pixels.
        num_pieces: of clutter on each.
        piece: height and width of one.
        spread: share of the room that digits are spread over, in [0, 1]: 1 puts them
            anywhere, 0 in the middle. Clutter is anywhere.

    Returns:
        The canvases.

    Raises:
        ValueError: if a digit does not fit on its canvas, or a piece into a digit, or
            the spread is out of range.
    """
    height, width = digits.images.shape[-2:]
    check_range(
        "canvas size", size, max(height, width), cure="the digits must fit on it"
    )
    check_range("piece", piece, 1, min(height, width), cure="it is cut from a digit")
    check_range("spread", spread, 0.0, 1.0, cure="it is a share of the room")
    images, labels, source = map(jnp.asarray, (*digits, clutter))

    def one(key: PRNGKey, index: Array) -> Canvases:
        key_corner, *keys = jax.random.split(key, num_pieces + 1)
        canvas = jnp.zeros((size, size), images.dtype)
        for key in keys:
            canvas = _paste_piece(key, canvas, source, piece)
        corner = _corner(key_corner, (size - height, size - width), spread)
        # Last, and over all that is there: the digit itself is never damaged.
        canvas = jax.lax.dynamic_update_slice(canvas, images[index], tuple(corner))
        return Canvases(canvas, labels[index], corner)

    return jax.vmap(one)(jax.random.split(key, which.shape[0]), which)


def fixed_canvases(
    digits: Digits,
    clutter: Float[Array, "N h w"],
    placements: int,
    *,
    seed: int,
    size: int = 28,
    num_pieces: int = 6,
    piece: int = 5,
) -> Canvases:
    """Every digit at several places: canvases to evaluate on, the same at every call.

    Args:
        digits: that are shown.
        clutter: as for `draw_canvases`.
        placements: canvases for each digit.
        seed: of places and clutter.
        size: as for `draw_canvases`.
        num_pieces: as for `draw_canvases`.
        piece: as for `draw_canvases`.

    Returns:
        `placements` canvases of every digit, one round of all digits after another.
    """
    which = jnp.tile(jnp.arange(len(np.asarray(digits.labels))), placements)
    draw = jax.jit(
        lambda key: draw_canvases(
            key, digits, which, clutter, size=size, num_pieces=num_pieces, piece=piece
        )
    )
    return draw(jax.random.key(seed))


def _paste_piece(key: PRNGKey, canvas: Array, source: Array, piece: int) -> Array:
    """A square of a random image, at a random place; the darker ink stays."""
    key_image, key_from, key_to = jax.random.split(key, 3)
    image = source[jax.random.randint(key_image, (), 0, len(source))]
    begin = _corner(key_from, tuple(n - piece for n in image.shape))
    cut = jax.lax.dynamic_slice(image, tuple(begin), (piece, piece))
    target = _corner(key_to, tuple(n - piece for n in canvas.shape))
    under = jax.lax.dynamic_slice(canvas, tuple(target), (piece, piece))
    darker = jnp.maximum(under, cut)
    return jax.lax.dynamic_update_slice(canvas, darker, tuple(target))


def _corner(
    key: PRNGKey, highest: tuple[int, ...], spread: Array | float = 1.0
) -> Int[Array, "2"]:
    """Row and column from 0 to `highest`, ends included, or of their middle part."""
    room = jnp.array(highest, float)
    first = 0.5 * (1.0 - spread) * room
    drawn = first + jax.random.uniform(key, (2,)) * (spread * room + 1.0)
    # Rounding can reach the number that the draws stay below.
    return jnp.minimum(jnp.floor(drawn), room).astype(jnp.int32)
