"""Hard attention: where to look is drawn, and learned by the score function.

    d/dtheta E[cost] by the score of each place, against a baseline read from the core
    + cross-entropy by backpropagation, of which no place is blamed     (credit: reward)

With `credit="likelihood"` the cross-entropy itself is the cost: places are credited
with it, and one expectation is lowered in all parameters. Beside the attention model
stand three that learn from the same canvases: one that looks at random, and two that
see all of the canvas, convolutional and fully connected.

Reference: Mnih, Heess, Graves and Kavukcuoglu 2014, "Recurrent models of visual
attention".
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxpg import stochastic
from jaxpg._checks import check_choice, check_positive, check_range
from jaxpg.layers import ACTIVATIONS, mlp, patches, split_module
from jaxpg.systems.base import System
from jaxpg.systems.canvases import Canvases, draw_canvases, fixed_canvases
from jaxpg.systems.digits import DigitData, load_digits, split_off
from jaxpg.systems.gaze_pictures import draw_paths
from jaxpg.systems.glimpses import Choose, Eye, make_eye
from jaxpg.types import Params, PRNGKey

__all__ = ["HardAttentionSettings", "Learner", "hard_attention", "make_learner"]

Model = Literal["attention", "random-glimpses", "convolutional", "fully-connected"]
Credit = Literal["reward", "likelihood"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardAttentionSettings:
    """Settings of the attention model and of those beside it."""

    model: Model = "attention"
    """What learns: attention, random-glimpses, convolutional or fully-connected."""
    data_dir: Path | None = None
    """Folder with MNIST's four IDX files. Unset: the digits of scikit-learn."""
    canvas: int = 28
    """Height and width of a canvas, in pixels; with MNIST 60 or more."""
    num_pieces: int = 6
    """Pieces of clutter on each canvas."""
    piece: int = 5
    """Height and width of a piece."""
    num_glimpses: int = 6
    """Looks at a canvas, the first at its middle."""
    glimpse: int = 8
    """Height and width of the window."""
    scales: int = 3
    """Squares of the sensor, each twice as wide as the one before."""
    features: int = 128
    """Width of the layers that see."""
    memory: int = 128
    """Width of the core's memory."""
    std: float = 0.1
    """Standard deviation of a place, in half canvases."""
    credit: Credit = "reward"
    """What places are credited with: whether the answer is right ("reward"), or the
    cross-entropy ("likelihood")."""
    credit_weight: float = 1.0
    """Weight of the score-function term beside the cross-entropy, for "reward"."""
    batch_size: int = 128
    """Canvases of an update, all drawn anew."""
    learning_rate: float = 1e-3
    """Of Adam."""
    decay_updates: int = 3000
    """Updates over which the learning rate falls, by a cosine, to a twentieth."""
    max_grad_norm: float = 5.0
    """Longer gradients are cut to this norm."""
    placements: int = 4
    """Canvases of each held-out digit when evaluated."""
    held_out: Literal["test", "validation"] = "test"
    """What is evaluated on; "validation" takes a fifth of the training digits out of
    training for it, to choose settings by."""

    def __post_init__(self) -> None:
        check_choice("model", self.model, get_args(Model))
        check_choice("credit", self.credit, get_args(Credit))
        check_choice("held_out", self.held_out, ("test", "validation"))
        for name in ("batch_size", "decay_updates", "placements", "num_glimpses"):
            check_positive(name, getattr(self, name))
        check_range("num_pieces", self.num_pieces, 0)
        for name in ("std", "learning_rate", "max_grad_norm"):
            check_range(name, getattr(self, name), 0.0, open_low=True)
        if self.model == "attention" and self.num_glimpses < 2:
            raise ValueError(
                "num_glimpses is 1, needs 2 or more: the first is at the middle, so "
                "there is no place to choose"
            )


class Learner(NamedTuple):
    """A model and its loss on one canvas.

    Attributes:
        init: `init(key) -> params`.
        loss: `loss(params, key, canvas, label) -> (loss, (logits, baseline_error))`;
            its derivative is what is followed.
        predict: `predict(params, key, canvas) -> logits`.
        eye: the model that looks, or None.
        choose: how places come about when it is evaluated, or None.
    """

    init: Callable[[PRNGKey], Params]
    loss: Callable[[Params, PRNGKey, Array, Array], tuple[Array, tuple[Array, Array]]]
    predict: Callable[[Params, PRNGKey, Array], Array]
    eye: Eye | None = None
    choose: Choose | None = None


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
        optax.adam(
            optax.cosine_decay_schedule(
                settings.learning_rate, settings.decay_updates, alpha=0.05
            )
        ),
    )

    def init(key: PRNGKey) -> Any:
        params = learner.init(key)
        return {"params": params, "optimiser": optimiser.init(params)}

    def update(key: PRNGKey, state: Any) -> Any:
        key_canvases, key_loss = jax.random.split(key)
        canvases = training_canvases(key_canvases, settings, data)

        def loss(params: Params) -> Any:
            keys = jax.random.split(key_loss, settings.batch_size)
            over_batch = jax.vmap(learner.loss, (None, 0, 0, 0))
            losses, (logits, errors) = over_batch(
                params, keys, canvases.images, canvases.labels
            )
            return jnp.mean(losses), _numbers(logits, canvases.labels, errors)

        gradient, info = jax.grad(loss, has_aux=True)(state["params"])
        step, opt = optimiser.update(gradient, state["optimiser"], state["params"])
        params = optax.apply_updates(state["params"], step)
        return {"params": params, "optimiser": opt}, info

    def evaluate(key: PRNGKey, state: Any) -> dict[str, Array]:
        keys = jax.random.split(key, held.labels.shape[0])
        predict = jax.vmap(learner.predict, (None, 0, 0))
        logits = predict(state["params"], keys, held.images)
        return _numbers(logits, held.labels)

    def picture(state: Any, path: Path) -> None:
        draw_paths(learner.eye, learner.choose, state["params"], held, settings, path)

    show = None if learner.eye is None else picture
    return System(init, update, evaluate, show, "accuracy")


def training_canvases(
    key: PRNGKey, settings: HardAttentionSettings, data: DigitData
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
    )


def make_learner(settings: HardAttentionSettings) -> Learner:
    """The model that the settings name, with its loss.

    Args:
        settings: of the model.

    Returns:
        Pure functions of one canvas.
    """
    if settings.model == "convolutional":
        return _seeing_all(*_convolutional(settings))
    if settings.model == "fully-connected":
        return _seeing_all(*_fully_connected(settings))
    eye = make_eye(
        num_glimpses=settings.num_glimpses,
        size=settings.glimpse,
        scales=settings.scales,
        features=settings.features,
        memory=settings.memory,
        std=settings.std,
    )
    if settings.model == "random-glimpses":

        def anywhere(key: PRNGKey, distribution: Any, baseline: Array) -> Array:
            return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)

        def at_random(params: Params, key: PRNGKey, canvas: Array) -> Array:
            return eye.gaze(params, key, canvas, anywhere).logits

        learner = _seeing_all(eye.init, at_random)
        return learner._replace(eye=eye, choose=anywhere)

    def at_best(params: Params, key: PRNGKey, canvas: Array) -> Array:
        return eye.gaze(params, key, canvas, most_likely).logits

    loss = attention_loss(eye, settings.credit, settings.credit_weight)
    return Learner(eye.init, loss, at_best, eye, most_likely)


def attention_loss(eye: Eye, credit: Credit, weight: float) -> Any:
    """A loss whose derivative is the score-function estimate, plus what is exact.

    Args:
        eye: the model.
        credit: as in the settings.
        weight: as in the settings.

    Returns:
        `loss(params, key, canvas, label) -> (loss, (logits, baseline_error))`.

    Bias: none for the derivative of E[cross-entropy] with "likelihood". With "reward"
        none for that of weight * E[wrong], of which the classifier knows nothing, plus
        a cross-entropy whose dependence on the places is left out.
    """

    def mark(key: PRNGKey, distribution: Any, baseline: Array) -> Array:
        return stochastic.sample(key, distribution, name="location", baseline=baseline)

    def program(params: Params, key: PRNGKey, canvas: Array, label: Array) -> Any:
        logits = eye.gaze(params, key, canvas, mark).logits
        if credit == "likelihood":
            return cross_entropy(logits, label), logits
        return weight * (jnp.argmax(logits) != label).astype(logits.dtype), logits

    operator = stochastic.score_function(program, has_aux=True)

    def loss(params: Params, key: PRNGKey, canvas: Array, label: Array) -> Any:
        cost, report = operator(params, key, canvas, label)
        gap = report.baselines["location"] - report.credits["location"]
        error = jnp.mean(gap**2)
        supervised = cross_entropy(report.output, label) if credit == "reward" else 0.0
        return cost + supervised + 0.5 * error, (report.output, error)

    return loss


def most_likely(key: PRNGKey, distribution: Any, baseline: Array) -> Array:
    """The middle of the places that might be drawn."""
    del key, baseline
    return distribution.mode()


def cross_entropy(logits: Float[Array, "C"], label: Int[Array, ""]) -> Array:
    """-log p(label), in nats."""
    return -jax.nn.log_softmax(logits)[label]


def _seeing_all(init: Any, predict: Any) -> Learner:
    def loss(params: Params, key: PRNGKey, canvas: Array, label: Array) -> Any:
        logits = predict(params, key, canvas)
        return cross_entropy(logits, label), (logits, jnp.zeros((), logits.dtype))

    return Learner(init, loss, predict)


def _fully_connected(settings: HardAttentionSettings) -> tuple[Any, Any]:
    hidden = (2 * settings.features, 2 * settings.features)
    init, bind = split_module(
        lambda rngs: mlp(
            *(settings.canvas**2, hidden, 10),
            rngs=rngs,
            activation="relu",
            output_scale=1.0,
        )
    )
    return (
        lambda key: init(key, None),
        lambda params, key, canvas: bind(params)(canvas.reshape(-1)),
    )


def _convolutional(settings: HardAttentionSettings) -> tuple[Any, Any]:
    """Convolutions of 16 (5 x 5) and 32 (3 x 3), each halved by the largest of four."""
    side = ((settings.canvas - 4) // 2 - 2) // 2
    shapes = {"first": (25, 16), "second": (9 * 16, 32)}
    parts = {
        name: split_module(
            lambda rngs, s=s: mlp(s[0], (), s[1], rngs=rngs, output_scale=1.4)
        )
        for name, s in shapes.items()
    }
    parts["head"] = split_module(
        lambda rngs: mlp(
            *(side**2 * 32, (settings.features,), 10),
            rngs=rngs,
            activation="relu",
            output_scale=1.0,
        )
    )

    def init(key: PRNGKey) -> Params:
        keys = jax.random.split(key, len(parts))
        return {n: p[0](k, None) for (n, p), k in zip(parts.items(), keys, strict=True)}

    def predict(params: Params, key: PRNGKey, canvas: Array) -> Array:
        first, second, head = (bind(params[name]) for name, (_, bind) in parts.items())
        x = _halved(first(patches(canvas[..., None], 5)))
        x = _halved(second(patches(x, 3)))
        return head(x.reshape(-1))

    return init, predict


def _halved(x: Float[Array, "H W C"]) -> Array:
    """ReLU and the largest of each 2 x 2."""
    height, width, channels = x.shape
    x = x[: height // 2 * 2, : width // 2 * 2]
    x = x.reshape(height // 2, 2, width // 2, 2, channels)
    return ACTIVATIONS["relu"](x.max((1, 3)))


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
