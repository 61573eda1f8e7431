r"""Every estimator of the discrete variational autoencoder, behind one interface.

    state = estimator.init(key, image)
    bound, gradient, state = estimator.gradient(params, state, key, images)

The gradient is of the batch's mean cost, to be descended. State is what an estimator
learns to lower its variance by: moving averages, a baseline, a control. What it learns
from a batch it uses from the next one on, so it knows nothing of the batch's own draws.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxpg import stochastic
from jaxpg.stochastic import Loss, Report
from jaxpg.systems.latent_model import (
    apply_network,
    init_network,
    make_program,
    num_features,
)
from jaxpg.systems.latent_settings import DiscreteVAESettings
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["LatentEstimator", "make_estimator", "samples_of"]

CRITIC_HIDDEN = 32


class LatentEstimator(NamedTuple):
    """An estimator of the gradient of a batch's mean cost.

    Attributes:
        init: `init(key, image) -> state`.
        gradient: `gradient(params, state, key, images [B]) -> (bound, gradient,
            state)`: the evidence bound as it was sampled, in nats per image, and the
            gradient of minus the bound that the estimator is for.
    """

    init: Callable[[PRNGKey, Array], PyTree]
    gradient: Callable[..., tuple[Float[Array, ""], Params, PyTree]]


def make_estimator(settings: DiscreteVAESettings) -> LatentEstimator:
    """The estimator that the settings name.

    Args:
        settings: its name, samples and what it learns with.

    Returns:
        The estimator.

    Bias: none for minus the evidence bound, but for gumbel-softmax and straight-through
        (biased), nvil with `scale` (unbiased up to it), and vimco, unbiased for minus
        the bound of several samples.
    """
    program, samples = make_program(settings), samples_of(settings)
    score = partial(stochastic.score_function, program, num_samples=samples)
    relaxed = partial(
        stochastic.gumbel_softmax,
        program,
        temperature=settings.temperature,
        num_samples=samples,
    )
    match settings.estimator:
        case "score":
            return _plain(score())
        case "leave-one-out":
            return _plain(score(leave_one_out=True))
        case "moving-average":
            average = stochastic.moving_average(settings.decay)
            return _with_level(score(), average, settings)
        case "nvil":
            return _with_level(score(), _learned_level(settings), settings)
        case "vimco":
            return _plain(stochastic.vimco(program, num_samples=samples))
        case "arm":
            return _plain(stochastic.arm(program, num_samples=samples))
        case "disarm":
            return _plain(stochastic.disarm(program, num_samples=samples))
        case "rebar":
            loss = stochastic.rebar(program, num_samples=samples)
            return _with_control(loss, settings, with_critic=False)
        case "relax":
            loss = stochastic.relax(program, _criticise, num_samples=samples)
            return _with_control(loss, settings, with_critic=True)
        case "gumbel-softmax":
            return _plain(relaxed())
        case "straight-through":
            return _plain(relaxed(straight_through=True))
    return _enumerated(program)


def samples_of(settings: DiscreteVAESettings) -> int:
    """Samples for each image, so that every estimator runs the model about as often.

    Args:
        settings: estimator, layers, and how often the model may run.

    Returns:
        At least 1.

    >>> samples_of(DiscreteVAESettings(estimator="disarm", num_samples=6))
    3
    """
    layers = settings.num_layers
    runs = {"arm": 1 + layers, "disarm": 1 + layers}
    runs |= {"rebar": 1 + 2 * layers, "relax": 1 + 2 * layers}
    return max(1, settings.num_samples // runs.get(settings.estimator, 1))


def _plain(loss: Loss) -> LatentEstimator:
    def gradient(params: Params, state: PyTree, key: PRNGKey, images: Array) -> Any:
        slope, report = jax.grad(_over_images(loss), has_aux=True)(params, key, images)
        return _bound_of(report), slope, state

    return LatentEstimator(lambda key, image: (), gradient)


def _with_level(
    loss: Loss, level: stochastic.LevelBaseline, settings: DiscreteVAESettings
) -> LatentEstimator:
    """Subtract what was learned from earlier batches, then learn from this one."""
    samples = samples_of(settings)

    def init(key: PRNGKey, image: Array) -> PyTree:
        return level.init(
            key, {name: jnp.zeros(()) for name in _nodes(settings)}, image
        )

    def gradient(params: Params, state: PyTree, key: PRNGKey, images: Array) -> Any:
        levels, scales = jax.vmap(level.predict, (None, 0))(state, images)
        given = {"baselines": levels, "scales": scales}
        mean_loss = partial(_over_images(loss), given=given)
        slope, report = jax.grad(mean_loss, has_aux=True)(params, key, images)
        # A baseline is fitted to single runs, so each run of an image is a datum; all
        # draws of one layer have the same credit.
        runs = images.shape[0] * samples
        credits = {
            name: x.reshape(runs, -1)[:, 0] for name, x in report.credits.items()
        }
        state = level.fit(state, credits, jnp.repeat(images, samples, axis=0))
        return _bound_of(report), slope, state

    return LatentEstimator(init, gradient)


def _learned_level(settings: DiscreteVAESettings) -> stochastic.LevelBaseline:
    nodes = _nodes(settings)

    def init(key: PRNGKey, image: Array) -> Params:
        network = init_network(key, image.shape[0], settings.hidden, len(nodes))
        return jax.tree.map(lambda x: 0.1 * x, network)

    def apply(params: Params, image: Array) -> dict[str, Array]:
        levels = apply_network(params, image)
        return {name: levels[i] for i, name in enumerate(nodes)}

    optimizer = optax.adam(settings.control_learning_rate)
    return stochastic.nvil(
        init, apply, optimizer, decay=settings.decay, normalise=settings.scale
    )


class _ControlState(NamedTuple):
    """What a control variate has learned; its temperature as a logarithm."""

    raw: PyTree
    optimizer: PyTree


def _with_control(
    loss: Loss, settings: DiscreteVAESettings, *, with_critic: bool
) -> LatentEstimator:
    """Descend the gradient's own squared length in the control."""
    optimizer = optax.adam(settings.control_learning_rate)

    def init(key: PRNGKey, image: Array) -> _ControlState:
        temperature = jnp.log(settings.temperature * jnp.ones(()))
        raw = {"scale": jnp.ones(()), "temperature": temperature}
        if with_critic:
            raw["critic"] = _init_critic(settings, key, image.shape[0])
        return _ControlState(raw, optimizer.init(raw))

    def gradient(
        params: Params, state: _ControlState, key: PRNGKey, images: Array
    ) -> Any:
        def squared(raw: PyTree) -> tuple[Array, Any]:
            control = raw | {"temperature": jnp.exp(raw["temperature"])}
            mean_loss = partial(_over_images(loss), shared={"control": control})
            slope, report = jax.grad(mean_loss, has_aux=True)(params, key, images)
            return optax.tree.norm(slope, squared=True), (slope, report)

        change, (slope, report) = jax.grad(squared, has_aux=True)(state.raw)
        steps, memory = optimizer.update(change, state.optimizer)
        state = _ControlState(optax.apply_updates(state.raw, steps), memory)
        return _bound_of(report), slope, state

    return LatentEstimator(init, gradient)


def _init_critic(
    settings: DiscreteVAESettings, key: PRNGKey, num_pixels: int
) -> Params:
    inputs = num_features(settings) + num_pixels
    names = _nodes(settings)
    keys = jax.random.split(key, len(names))
    networks = [init_network(k, inputs, CRITIC_HIDDEN, 1) for k in keys]
    return dict(zip(names, networks, strict=True))


def _criticise(params: Params, name: str, z: Array, image: Array) -> Float[Array, ""]:
    """A guess of the cost from noisy logits and the image."""
    seen = jnp.concatenate([jax.nn.sigmoid(z).ravel(), image])
    return apply_network(params[name], seen)[0]


def _enumerated(program: stochastic.Program) -> LatentEstimator:
    exact = stochastic.exact_expectation(program)

    def gradient(params: Params, state: PyTree, key: PRNGKey, images: Array) -> Any:
        def mean_cost(params: Params) -> Float[Array, ""]:
            each = jax.vmap(exact, (None, None, 0))(params, key, images)
            return jnp.mean(each)

        cost, slope = jax.value_and_grad(mean_cost)(params)
        return -cost, slope, state

    return LatentEstimator(lambda key, image: (), gradient)


def _over_images(loss: Loss) -> Callable[..., tuple[Float[Array, ""], Report]]:
    """The mean loss of a batch; `given` differs between images, `shared` does not."""

    def mean_loss(
        params: Params,
        key: PRNGKey,
        images: Float[Array, "B P"],
        *,
        given: PyTree = None,
        shared: PyTree = None,
    ) -> tuple[Float[Array, ""], Report]:
        def of_one(key: PRNGKey, image: Array, given: PyTree) -> tuple[Array, Report]:
            return loss(params, key, image, **(given or {}), **(shared or {}))

        keys = jax.random.split(key, images.shape[0])
        costs, report = jax.vmap(of_one)(keys, images, given)
        return jnp.mean(costs), report

    return mean_loss


def _bound_of(report: Report) -> Float[Array, ""]:
    means = [jnp.mean(cost) for cost in report.costs.values()]
    return -sum(means, jnp.zeros(()))


def _nodes(settings: DiscreteVAESettings) -> list[str]:
    return [f"layer_{number + 1}" for number in range(settings.num_layers)]
