"""What learns from canvases: a window that moves, one that does not choose, two nets.

    d/dtheta E[cross-entropy], places credited with it                (likelihood)
    d/dtheta E[wrong] by the score of each place alone
    + cross-entropy by backpropagation, of which no place is blamed   (reward)

The baseline of each place is read from the core. Beside the attention model stand one
that looks at random, and two that see all of the canvas, convolutional and fully
connected.

References: Mnih, Heess, Graves and Kavukcuoglu 2014, "Recurrent models of visual
attention" (reward); Ba, Mnih and Kavukcuoglu 2015, "Multiple object recognition with
visual attention" (likelihood).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpg import stochastic
from jaxpg.layers import mlp, patches, split_module
from jaxpg.systems.attention_settings import Credit, HardAttentionSettings
from jaxpg.systems.glimpses import Choose, Eye, halved, linear_part, make_eye
from jaxpg.types import Params, PRNGKey

__all__ = [
    "NUM_CLASSES",
    "Learner",
    "attention_loss",
    "cross_entropy",
    "make_learner",
    "most_likely",
]

NUM_CLASSES = 10


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
        first_baseline=cost_of_a_guess(settings),
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


def cost_of_a_guess(settings: HardAttentionSettings) -> float:
    """What places are credited with before anything is learned.

    Args:
        settings: of the model.

    Returns:
        The cost of an answer that knows nothing.

    >>> cost_of_a_guess(HardAttentionSettings(credit="reward", credit_weight=0.5))
    0.45
    """
    if settings.credit == "likelihood":
        return math.log(NUM_CLASSES)
    return settings.credit_weight * (1.0 - 1.0 / NUM_CLASSES)


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


def cross_entropy(logits: Float[Array, " C"], label: Int[Array, ""]) -> Array:
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
            *(settings.canvas**2, hidden, NUM_CLASSES),
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
    parts = {"first": linear_part(25, 16, 1.4), "second": linear_part(144, 32, 1.4)}
    parts["head"] = split_module(
        lambda rngs: mlp(
            *(side**2 * 32, (settings.features,), NUM_CLASSES),
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
        x = halved(first(patches(canvas[..., None], 5)))
        x = halved(second(patches(x, 3)))
        return head(x.reshape(-1))

    return init, predict
