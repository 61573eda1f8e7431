"""Heads for a flat `Box`: raw outputs are means, and a scale is learned beside them.

    gaussian_head                log_std is a parameter, or has offsets from the network
    tanh_gaussian_head           the same, squashed into the box
    state_dependent_noise_head   noise is a random function of the network's features

Outputs are [..., num_outputs]; whatever leads is the distribution's batch. The part of
the scale that does not depend on the observation is the head's own parameter.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpg._checks import check_positive, check_range
from jaxpg.distributions import (
    DiagonalGaussian,
    Distribution,
    StateDependentGaussian,
    TanhGaussian,
)
from jaxpg.envs.base import Box, Space
from jaxpg.heads.base import Head
from jaxpg.types import Params

__all__ = [
    "LOG_STD_RANGE",
    "gaussian_head",
    "state_dependent_noise_head",
    "tanh_gaussian_head",
]

LOG_STD_RANGE = (-20.0, 2.0)
"""Where a log standard deviation that depends on the state is kept."""


def gaussian_head(
    space: Box, initial_log_std: float = 0.0, state_dependent: bool = False
) -> Head:
    """A diagonal Gaussian around the network's means.

    log_std = a learned number per dimension, or, with `state_dependent`,
    log_std = squeeze(learned number + outputs[D:]), see below.

    Actions are not clipped here: gradients belong to the action that was drawn, and
    what lies outside the box is the environment's to clip.

    `squeeze` keeps a log standard deviation between -20 and 2 in action units, because
    one step of a network may throw it anywhere. It is smooth, has slope 1 at
    `initial_log_std` and a positive slope everywhere, so a scale at the edge still
    learns to come back, which one clipped hard does not.

    Args:
        space: a `Box` of rank one.
        initial_log_std: log of the first standard deviation, in action units.
        state_dependent: whether the network adds to the log standard deviation.

    Returns:
        A head of D outputs, or of 2 D: first the means.

    Raises:
        ValueError: if the space is not a flat `Box`, or if `initial_log_std` leaves no
            room below or above itself.

    Reference: Andrychowicz et al. 2021, "What matters for on-policy deep actor-critic
        methods?" (a scale apart from the network, or out of it).

    >>> gaussian_head(Box(-1, 1, (3,)), state_dependent=True).num_outputs
    6
    """
    size = _flat_size(space)
    scale = _log_std_of(initial_log_std, state_dependent)

    def distribution(params: Params, outputs: Array) -> Distribution:
        return DiagonalGaussian(outputs[..., :size], scale(params, outputs))

    num_outputs = 2 * size if state_dependent else size
    return Head(num_outputs, _log_std(initial_log_std, size), distribution, space)


def tanh_gaussian_head(
    space: Box, initial_log_std: float = 0.0, state_dependent: bool = False
) -> Head:
    """A Gaussian squashed by tanh into the bounds of a `Box`.

    Batches keep the action before the tanh; `to_env` squashes. Means and standard
    deviations are those before the tanh too, in units of half the box's width.

    Args:
        space: a `Box` of rank one with finite bounds.
        initial_log_std: log of the first standard deviation before the tanh.
        state_dependent: whether the network adds to it, as in `gaussian_head`.

    Returns:
        A head of D outputs, or of 2 D: first the means.

    Raises:
        ValueError: if the space is not a flat `Box` with low < high, both finite, or if
            `initial_log_std` leaves no room below or above itself.

    Reference: Haarnoja et al. 2018, "Soft actor-critic", appendix C.

    >>> head = tanh_gaussian_head(Box(0, 4, (1,)))
    >>> middle = head.distribution(head.init(), jnp.zeros(1))
    >>> middle.to_env(middle.mode()).tolist()
    [2.0]
    """
    size = _flat_size(space)
    low, high = _finite_bounds(space)
    scale = _log_std_of(initial_log_std, state_dependent)

    def distribution(params: Params, outputs: Array) -> Distribution:
        mean = outputs[..., :size]
        bounds = (np.broadcast_to(bound, mean.shape) for bound in (low, high))
        return TanhGaussian(mean, scale(params, outputs), *bounds)

    num_outputs = 2 * size if state_dependent else size
    return Head(num_outputs, _log_std(initial_log_std, size), distribution, space)


def state_dependent_noise_head(
    space: Box, num_features: int, initial_log_std: float = 0.0
) -> Head:
    """A Gaussian whose noise is a random linear function of features of the state.

    outputs = [mean (D), features (F)],
    action = mean + direction @ (exp(log_std) * W),  direction = features / |features|

    Decisions drawn with one key (`Policy.noise_hold` above 1) share W: they explore
    smoothly, and two visits to one state get one action; each action's density is
    exact, but together they are no longer independent given their states.

    Features are cut to unit length, so that exp(initial_log_std) is the first standard
    deviation of every action whatever the scale of the network's last layer; where all
    are zero, they count alike. No gradient flows into them: the noise uses what the
    network sees, and the network does not bend what it sees to the noise.

    Args:
        space: a `Box` of rank one.
        num_features: F, at least 1; with one alone the scale is the same everywhere.
        initial_log_std: log of the first standard deviation, in action units.

    Returns:
        A head of D + F outputs with log_std [F, D] of its own.

    Raises:
        ValueError: if the space is not a flat `Box`, or `num_features` not positive.

    Reference: Rückstieß, Felder and Schmidhuber 2008, "State-dependent exploration for
        policy gradient methods"; Raffin, Kober and Stulp 2022, "Smooth exploration for
        robotic reinforcement learning".

    >>> state_dependent_noise_head(Box(-1, 1, (2,)), num_features=8).num_outputs
    10
    """
    size = _flat_size(space)
    check_positive("num_features", num_features)

    def distribution(params: Params, outputs: Array) -> Distribution:
        mean, features = outputs[..., :size], outputs[..., size:]
        log_std = params["log_std"].astype(outputs.dtype)
        log_std = jnp.broadcast_to(log_std, (*mean.shape[:-1], *log_std.shape))
        direction = _unit_length(jax.lax.stop_gradient(features))
        return StateDependentGaussian(mean, direction, log_std)

    init = _log_std(initial_log_std, num_features, size)
    return Head(size + num_features, init, distribution, space)


def _flat_size(space: Space) -> int:
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise ValueError(
            f"space is {space!r}, needs a Box with shape (D,); flatten the actions"
        )
    return space.shape[0]


def _finite_bounds(space: Box) -> tuple[np.ndarray, np.ndarray]:
    low, high = (np.asarray(bound, np.float64) for bound in (space.low, space.high))
    huge = np.finfo(np.float32).max / 4  # suites write "unbounded" as float32's largest
    if not np.all((low < high) & (np.abs(low) < huge) & (np.abs(high) < huge)):
        raise ValueError(
            f"space is {space!r}, needs finite bounds with low < high; without bounds "
            "use gaussian_head"
        )
    return low, high


def _log_std(initial_log_std: float, *shape: int) -> Callable[[], Params]:
    return lambda: {"log_std": jnp.full(shape, initial_log_std, dtype=float)}


def _log_std_of(
    initial_log_std: float, state_dependent: bool
) -> Callable[[Params, Array], Array]:
    """How log_std [..., D] comes from the head's parameters and the outputs."""

    def own(params: Params, outputs: Array) -> Array:
        log_std = params["log_std"].astype(outputs.dtype)
        return jnp.broadcast_to(log_std, (*outputs.shape[:-1], *log_std.shape))

    def offset(params: Params, outputs: Array) -> Array:
        log_std = own(params, outputs)
        size = log_std.shape[-1]
        return _squeeze(log_std + outputs[..., size:], initial_log_std)

    if not state_dependent:
        return own
    low, high = LOG_STD_RANGE
    # A tenth of room, for at the very edge the slope would have to jump to zero.
    check_range(
        "initial_log_std",
        initial_log_std,
        low + 0.1,
        high - 0.1,
        cure="for another scale rescale the actions, or leave out state_dependent",
    )
    return offset


def _squeeze(x: Float[Array, "*B"], centre: float) -> Float[Array, "*B"]:
    """Into LOG_STD_RANGE, and near `centre` like the identity: slope 1, curvature 0.

    centre + room * u / sqrt(1 + u²),  u = (x - centre) / room,  room on that side.
    Slope (1 + u²)^(-3/2): unlike that of tanh it does not round to zero.
    """
    low, high = LOG_STD_RANGE
    room = jnp.where(x > centre, high - centre, centre - low).astype(x.dtype)
    u = (x - centre) / room
    return centre + room * u / jnp.hypot(u, jnp.ones_like(u))


def _unit_length(features: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    largest = jnp.max(jnp.abs(features), axis=-1, keepdims=True)
    # Divided twice, because squares of small or large numbers leave float32's range.
    safe = jnp.where(largest > 0, features / jnp.where(largest > 0, largest, 1), 1)
    return safe / jnp.linalg.norm(safe, axis=-1, keepdims=True)
