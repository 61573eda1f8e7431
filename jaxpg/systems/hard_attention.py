"""Hard attention: where to look is drawn, and learned by the score function.

    canvases drawn anew -> the learner's loss -> Adam -> accuracy on held-out canvases

Canvases are a pure function of a key, so no canvas is seen twice, and digits that are
held out are on none of those that are learned from.

Reference: Mnih, Heess, Graves and Kavukcuoglu 2014, "Recurrent models of visual
attention".
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxpg.envs.from_gymnax import default_promotion
from jaxpg.systems.attention_models import cross_entropy, make_learner
from jaxpg.systems.attention_settings import HardAttentionSettings
from jaxpg.systems.base import System
from jaxpg.systems.canvases import Canvases, draw_canvases, fixed_canvases
from jaxpg.systems.digits import DigitData, load_digits, split_off
from jaxpg.systems.gaze_pictures import draw_paths
from jaxpg.types import Params, PRNGKey

__all__ = ["hard_attention"]


def hard_attention(settings: HardAttentionSettings) -> System:
    """The system: canvases in, answers out.

    Args:
        settings: of all of it.

    Returns:
        The system; it reads the data now.

    Raises:
        ValueError: if the digits do not fit on the canvas, or cannot be read.
    """
    data = load_digits(settings.data_dir)
    if settings.held_out == "validation":
        data = split_off(data.train, 0.2, seed=1)
    learner = make_learner(settings)
    held = _held_out_canvases(settings, data)
    optimiser = optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adam(lambda count: learning_rate(settings, count)),
    )

    def init(key: PRNGKey) -> Any:
        params = learner.init(key)
        updates = jnp.zeros((), jnp.int32)
        memory = optimiser.init(params)
        return {"params": params, "optimiser": memory, "updates": updates}

    def update(key: PRNGKey, state: Any) -> Any:
        key_canvases, key_loss = jax.random.split(key)
        spread = share_of_room(settings, state["updates"])
        canvases = training_canvases(key_canvases, settings, data, spread)

        def loss(params: Params) -> Any:
            keys = jax.random.split(key_loss, settings.batch_size)
            over_batch = jax.vmap(learner.loss, (None, 0, 0, 0))
            losses, (logits, errors) = over_batch(
                params, keys, canvases.images, canvases.labels
            )
            return jnp.mean(losses), _numbers(logits, canvases.labels, errors)

        gradient, info = jax.grad(loss, has_aux=True)(state["params"])
        with default_promotion():  # Adam raises a number to the power of its count
            step, opt = optimiser.update(gradient, state["optimiser"], state["params"])
        params = optax.apply_updates(state["params"], step)
        updates = state["updates"] + 1
        return {"params": params, "optimiser": opt, "updates": updates}, info

    def evaluate(key: PRNGKey, state: Any) -> dict[str, Array]:
        keys = jax.random.split(key, held.labels.shape[0])
        predict = jax.vmap(learner.predict, (None, 0, 0))
        # Else XLA works on the patches of these constants for seconds as it compiles.
        images = jax.lax.optimization_barrier(held.images)
        logits = predict(state["params"], keys, images)
        return _numbers(logits, held.labels)

    def picture(state: Any, path: Path) -> None:
        draw_paths(learner.eye, learner.choose, state["params"], held, settings, path)

    show = None if learner.eye is None else picture
    return System(init, update, evaluate, show, "accuracy")


def learning_rate(settings: HardAttentionSettings, count: Array) -> Array:
    """The rate of an update: half a cosine from its start to a twentieth of it."""
    done = jnp.minimum(count.astype(float) / settings.decay_updates, 1.0)
    return settings.learning_rate * (0.05 + 0.475 * (1.0 + jnp.cos(jnp.pi * done)))


def share_of_room(settings: HardAttentionSettings, count: Array) -> Array:
    """How far digits are spread in an update: evenly more, to all of the canvas."""
    return jnp.minimum(1.0, (count.astype(float) + 1.0) / (settings.spread_updates + 1))


def training_canvases(
    key: PRNGKey, settings: HardAttentionSettings, data: DigitData, spread: Array
) -> Canvases:
    """A batch of fresh canvases with digits to learn from."""
    key_which, key = jax.random.split(key)
    number = len(data.train.labels)
    which = jax.random.randint(key_which, (settings.batch_size,), 0, number)
    return draw_canvases(
        key,
        data.train,
        which,
        jnp.asarray(data.train.images),
        size=settings.canvas,
        num_pieces=settings.num_pieces,
        piece=settings.piece,
        spread=spread,
    )


def _held_out_canvases(settings: HardAttentionSettings, data: DigitData) -> Canvases:
    return fixed_canvases(
        data.test,
        jnp.asarray(data.train.images),
        settings.placements,
        seed=0x5EED,
        size=settings.canvas,
        num_pieces=settings.num_pieces,
        piece=settings.piece,
    )


def _numbers(
    logits: Array, labels: Array, errors: Array | None = None
) -> dict[str, Array]:
    right = jnp.argmax(logits, axis=-1) == labels
    told = {
        "accuracy": jnp.mean(right, dtype=logits.dtype),
        "cross_entropy": jnp.mean(jax.vmap(cross_entropy)(logits, labels)),
    }
    return told if errors is None else told | {"baseline_error": jnp.mean(errors)}
