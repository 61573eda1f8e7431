r"""A variational autoencoder with discrete latent variables, as a stochastic program.

    p(x, z) = p(x | z_1) p(z_1 | z_2) ... p(z_L)         generation, from above
    q(z | x) = q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_L-1)    inference, from below
    cost    = log q(z | x) - log p(x, z),     E_q[-cost] = ELBO <= log p(x)

Latents are bits (a sigmoid belief network) or groups of unit vectors. Each layer pays
log q of its own code less log p of what lies below it, so a draw is credited only with
its own layer and those above. The log q inside the cost depends on the parameters
directly as well; that way has mean zero in the exact gradient, but it is a part of the
program's cost, and is kept.

References: Neal 1992, "Connectionist learning of belief networks"; Mnih and Gregor
2014, "Neural variational inference and learning in belief networks"; Burda et al. 2016,
"Importance weighted autoencoders".
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg import stochastic
from jaxpg.distributions import Bernoulli, OneHotCategorical
from jaxpg.stochastic.enumeration import outcomes_of
from jaxpg.stochastic.execution import trace
from jaxpg.systems.latent_settings import MAX_CODES, DiscreteVAESettings
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = [
    "decode",
    "draw_image",
    "exact_bound",
    "exact_log_likelihood",
    "importance_weighted_bound",
    "init_model",
    "make_program",
    "num_features",
    "reconstruct",
]


def num_features(settings: DiscreteVAESettings) -> int:
    """How many numbers a layer's code has.

    Args:
        settings: of the model.

    Returns:
        Bits, or values of all groups.

    >>> num_features(DiscreteVAESettings(latent="categorical", num_groups=2))
    16
    """
    if settings.latent == "bernoulli":
        return settings.num_bits
    return settings.num_groups * settings.num_values


def init_model(settings: DiscreteVAESettings, key: PRNGKey, num_pixels: int) -> Params:
    """Parameters of inference, prior and generation.

    Args:
        settings: of the model.
        key: consumed.
        num_pixels: of an image.

    Returns:
        `{"inference": networks, "generation": networks, "prior": logits}`, a network
        for each layer, lowest first. The first codes are nearly uniform.
    """
    code = num_features(settings)
    below = [num_pixels] + [code] * (settings.num_layers - 1)
    keys = jax.random.split(key, (2, settings.num_layers))
    return {
        "inference": [
            init_network(k, size, settings.hidden, code)
            for k, size in zip(keys[0], below, strict=True)
        ],
        "generation": [
            init_network(k, code, settings.hidden, size)
            for k, size in zip(keys[1], below, strict=True)
        ],
        "prior": jnp.zeros(code),
    }


def make_program(settings: DiscreteVAESettings) -> stochastic.Program:
    """The negative evidence bound of one image, as a program of one draw a layer.

        cost = sum_l  log q(z_l | z_l-1) - log p(z_l-1 | z_l),  less  log p(z_L)

    Args:
        settings: of the model.

    Returns:
        `program(params, key, image [P]) -> cost` in nats, with nodes "layer_1" (the
        lowest) and so on. An image is of zeros and ones.

    >>> settings = DiscreteVAESettings(num_bits=3, hidden=0)
    >>> params = init_model(settings, jax.random.key(0), 4)
    >>> exact = stochastic.exact_expectation(make_program(settings))
    >>> bool(exact(params, jax.random.key(1), jnp.ones(4)) > 0.0)
    True
    """

    def program(
        params: Params, key: PRNGKey, image: Float[Array, " P"]
    ) -> Float[Array, ""]:
        below, prior = image, _layer(settings, params["prior"])
        keys = jax.random.split(key, settings.num_layers)
        for number, key_draw in enumerate(keys):
            posterior = _layer(
                settings, apply_network(params["inference"][number], below)
            )
            draw = stochastic.sample(key_draw, posterior, name=f"layer_{number + 1}")
            code = jnp.reshape(draw, -1).astype(image.dtype)
            is_image = number == 0
            seen = apply_network(params["generation"][number], code)
            beneath = Bernoulli(seen) if is_image else _layer(settings, seen)
            paid = _log_mass(posterior, code) - _log_mass(beneath, below)
            below = code
            if number < settings.num_layers - 1:
                stochastic.cost(paid, name=f"paid_{number + 1}")
        return paid - _log_mass(prior, code)

    return program


def importance_weighted_bound(
    settings: DiscreteVAESettings,
    params: Params,
    key: PRNGKey,
    image: Float[Array, " P"],
    num_samples: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The evidence bound of one image, and the tighter one of several samples.

        L_K = E[ log 1/K sum_k p(x, z_k) / q(z_k | x) ],   L_1 = ELBO <= L_K <= log p(x)

    Args:
        settings: of the model.
        params: of the model.
        key: consumed.
        image: of zeros and ones.
        num_samples: K.

    Returns:
        Estimates of L_1 and of L_K, in nats, from the same draws.

    Bias: none for the bounds; both are under log p(x) in the mean.

    Reference: Burda et al. 2016, theorem 1.
    """
    run = stochastic.score_function(make_program(settings), num_samples=num_samples)
    _, report = run(params, key, image)
    log_weights = -sum(report.costs.values(), jnp.zeros(num_samples))
    tight = jax.nn.logsumexp(log_weights) - jnp.log(float(num_samples))
    return jnp.mean(log_weights), tight


def exact_bound(
    settings: DiscreteVAESettings,
    params: Params,
    image: Float[Array, " P"],
    *,
    num_samples: Literal[1, 2] = 1,
    max_codes: int = MAX_CODES,
) -> Float[Array, ""]:
    """The evidence bound of one image by enumeration, of one sample or of two.

        L_1 = sum_z q(z) log w(z),   L_2 = sum_z,z' q(z) q(z') log((w(z) + w(z')) / 2)

    Args:
        settings: of the model.
        params: of the model.
        image: of zeros and ones.
        num_samples: 1 or 2; two take the square of the codes' number in memory.
        max_codes: more are refused.

    Returns:
        The bound in nats, differentiable.

    Raises:
        ValueError: if there are more codes than `max_codes`, or more samples than 2.

    Bias: none.
    """
    log_q, cost = _all_codes(settings, params, image, max_codes)
    if num_samples == 1:
        return -jnp.sum(jnp.exp(log_q) * cost)
    if num_samples != 2:
        raise ValueError(
            f"num_samples is {num_samples}, needs 1 or 2: the codes of more "
            "samples are too many; use importance_weighted_bound"
        )
    both = jnp.logaddexp(-cost[:, None], -cost[None, :]) - jnp.log(2.0)
    return jnp.einsum("i,j,ij->", jnp.exp(log_q), jnp.exp(log_q), both)


def exact_log_likelihood(
    settings: DiscreteVAESettings,
    params: Params,
    image: Float[Array, " P"],
    *,
    max_codes: int = MAX_CODES,
) -> Float[Array, ""]:
    """log p(x) of one image, by adding up all codes.

        log p(x) = log sum_z p(x, z)

    Args:
        settings: of the model.
        params: of the model.
        image: of zeros and ones.
        max_codes: more are refused.

    Returns:
        In nats; the inference network cancels.

    Raises:
        ValueError: if there are more codes than `max_codes`.

    Bias: none.
    """
    log_q, cost = _all_codes(settings, params, image, max_codes)
    return jax.nn.logsumexp(log_q - cost)


def draw_image(
    settings: DiscreteVAESettings, params: Params, key: PRNGKey
) -> Float[Array, " P"]:
    """An image from the model itself: from the prior down, as pixels' probabilities.

    Args:
        settings: of the model.
        params: of the model.
        key: consumed.

    Returns:
        The probability of a one, for each pixel.
    """
    top, *keys = jax.random.split(key, settings.num_layers)
    code = _layer(settings, params["prior"]).sample(top)
    for number, key in zip(range(settings.num_layers - 1, 0, -1), keys, strict=True):
        logits = apply_network(params["generation"][number], _flat(code))
        code = _layer(settings, logits).sample(key)
    return decode(params, _flat(code))


def reconstruct(
    settings: DiscreteVAESettings,
    params: Params,
    key: PRNGKey,
    image: Float[Array, " P"],
) -> Float[Array, " P"]:
    """What generation makes of one code that inference drew for an image.

    Args:
        settings: of the model.
        params: of the model.
        key: consumed.
        image: of zeros and ones.

    Returns:
        The probability of a one, for each pixel.
    """
    logits = apply_network(params["inference"][0], image)
    return decode(params, _flat(_layer(settings, logits).sample(key)))


def decode(params: Params, code: Float[Array, " F"]) -> Float[Array, " P"]:
    """Pixels' probabilities of the lowest layer's code.

    Args:
        params: of the model.
        code: flat.

    Returns:
        The probability of a one, for each pixel.
    """
    return jax.nn.sigmoid(apply_network(params["generation"][0], code))


def _all_codes(
    settings: DiscreteVAESettings, params: Params, image: Array, max_codes: int
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """log q(z | x) and cost of every code."""
    key = jax.random.key(0)  # draws nothing
    traced = trace(make_program(settings), params, key, (image,))
    outcomes = outcomes_of(traced, params, key, (image,), max_outcomes=max_codes)
    nodes = outcomes.records.nodes.values()
    log_q = sum((_per_code(node.log_prob) for node in nodes), jnp.zeros(()))
    return log_q, jax.vmap(lambda record: record.total)(outcomes.records)


def _per_code(log_prob: Array) -> Float[Array, " N"]:
    return jnp.sum(log_prob, axis=tuple(range(1, log_prob.ndim)))


def _layer(
    settings: DiscreteVAESettings, logits: Float[Array, " F"]
) -> Bernoulli | OneHotCategorical:
    if settings.latent == "bernoulli":
        return Bernoulli(logits)
    return OneHotCategorical(logits.reshape(settings.num_groups, settings.num_values))


def _log_mass(distribution: Bernoulli | OneHotCategorical, code: Array) -> Array:
    """log p(code), linear in it: relaxed codes between the corners have one as well."""
    logits = distribution.logits
    if isinstance(distribution, OneHotCategorical):
        return jnp.dot(code, jax.nn.log_softmax(logits).ravel())
    return jnp.dot(code, logits) - jnp.sum(jax.nn.softplus(logits))


def _flat(code: Array) -> Float[Array, " F"]:
    return jnp.reshape(code, -1).astype(float)


def init_network(key: PRNGKey, inputs: int, hidden: int, outputs: int) -> PyTree:
    sizes = [inputs, *([hidden] if hidden else []), outputs]
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jax.random.normal(k, (fan_in, fan_out)) / jnp.sqrt(fan_in),
            "bias": jnp.zeros(fan_out),
        }
        for k, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply_network(network: PyTree, inputs: Array) -> Array:
    # Codes and pixels are 0 or 1; -1 or 1 keeps the first layer's inputs centred.
    x = 2.0 * inputs - 1.0
    for layer in network[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ network[-1]["kernel"] + network[-1]["bias"]
