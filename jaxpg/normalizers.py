r"""Running statistics of observations, as part of a network's own params.

    x = clip((obs - mean) / sqrt(variance + 1e-8), -10, 10)        entry by entry

Whoever has the params has the statistics: the rollout, the gradient, an evaluation and
a checkpoint all see observations alike, and seeds that are vmapped keep theirs apart.
The network never moves them, for their gradient is exactly zero; `observe` does, once
per batch. Move them after the gradient is taken: between the rollout and the gradient
the log-probabilities would become those of another policy.

    params = {"network": the network's own, "observations": Statistics}

An optimiser must leave alone what has no gradient: weight decay does not.

Batches are joined as in `moments`, which never subtracts large sums and keeps what
rounding takes away; the count, a float here as all params are, is kept so as well.

References: Welford 1962; Chan, Golub and LeVeque 1979; Andrychowicz et al. 2021, "What
matters for on-policy deep actor-critic methods?" (observation normalisation).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpg._checks import check_rank
from jaxpg.envs.base import Box, Masked, MaskedObs, Space
from jaxpg.moments import Moments, merge, merge_over_axis, moments_of
from jaxpg.networks import Network
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = [
    "Statistics",
    "moments_in",
    "normalized",
    "observe",
    "observe_in",
    "observe_moments_in",
]

LARGEST = 10.0
"""Standard deviations beyond which a normalised observation is clipped."""

EPSILON = 1e-8
"""Added to the variance: an entry that never varied is only clipped."""


class Statistics(NamedTuple):
    """What is known of the observations so far; all of it floats, as params are.

    Attributes:
        num_samples: how many were observed.
        num_samples_rest: what rounding took from `num_samples`.
        mean: of each entry.
        mean_rest: what rounding took from `mean`.
        squares: sum of squared deviations from the mean, of each entry.
        squares_rest: what rounding took from `squares`.
    """

    num_samples: Float[Array, ""]
    num_samples_rest: Float[Array, ""]
    mean: Float[Array, "..."]
    mean_rest: Float[Array, "..."]
    squares: Float[Array, "..."]
    squares_rest: Float[Array, "..."]


def normalized(network: Network, observation_space: Space) -> Network:
    """A network that sees its observations by their running statistics.

    Before anything was observed it sees them as they are.

    Args:
        network: any network for the same space.
        observation_space: a `Box`, or a `Masked` one, whose features alone are mapped.

    Returns:
        A network whose params are `{"network": ..., "observations": Statistics}`.

    Raises:
        ValueError: if the space is not a `Box`.

    Reference: Andrychowicz et al. 2021, "What matters for on-policy deep actor-critic
        methods?"

    >>> from jaxpg.networks import feedforward
    >>> plain = feedforward(lambda key, obs: 1.0, lambda scale, obs: scale * obs)
    >>> network = normalized(plain, Box(-9, 9, (1,)))
    >>> params = network.init(jax.random.key(0), jnp.zeros(1))
    >>> params = observe(params, jnp.array([[[1.0], [3.0]]]), jnp.ones((1, 2), bool))
    >>> network.step(params, None, jnp.array([4.0]))[0].tolist()
    [2.0]
    """
    features = observation_space
    while isinstance(features, Masked):
        features = features.features
    if not isinstance(features, Box):
        raise ValueError(
            f"observation_space is {observation_space!r}, needs a Box; numbers and "
            "bits are coded from 0 to 1 already, use the network as it is"
        )
    shape = features.shape

    def init(key: PRNGKey, obs: PyTree) -> Params:
        statistics = _nothing(shape)
        inner = network.init(key, _seen(statistics, obs))
        return {"network": inner, "observations": statistics}

    def step(params: Params, carry: PyTree, obs: PyTree) -> tuple[Array, PyTree]:
        obs = _seen(params["observations"], obs)
        return network.step(params["network"], carry, obs)

    def unroll(
        params: Params, carry: PyTree, obs: PyTree, starts: Array
    ) -> tuple[Array, PyTree]:
        obs = jax.vmap(_seen, (None, 0))(params["observations"], obs)
        return network.unroll(params["network"], carry, obs, starts)

    return network._replace(init=init, step=step, unroll=unroll)


def observe(params: Params, obs: PyTree, mask: Bool[Array, "B T"]) -> Params:
    """Params of a normalised network that know one more batch.

    Args:
        params: of a network from `normalized`, or whatever holds them.
        obs: observations [B, T, ...], a `MaskedObs` of them, or a whole trajectory's
            `obs`.
        mask: which of them are real; what is not may be anything, NaN too.

    Returns:
        The same params with other statistics.

    Raises:
        ValueError: if there are no statistics in `params`, or `obs` has other shapes.

    >>> network = normalized(Network(lambda *_: (), tuple, None, None), Box(0, 1, ()))
    >>> params = network.init(jax.random.key(0), jnp.zeros(()))
    >>> mask = jnp.array([[True, True, False]])
    >>> observe(params, jnp.array([[1.0, 3.0, 9.0]]), mask)["observations"].mean.item()
    2.0
    """
    leaves = jax.tree.leaves(params, is_leaf=_is_statistics)
    if not any(_is_statistics(leaf) for leaf in leaves):
        raise ValueError(
            "params hold no statistics, need those of a network from `normalized`; "
            "observe_in leaves others as they are"
        )
    return observe_in(params, obs, mask)


def observe_in(params: Params, obs: PyTree, mask: Bool[Array, "B T"]) -> Params:
    """`observe` wherever statistics are: a policy's params, or several networks'.

    Args:
        params: any tree, such as `{"network": ..., "head": ...}`.
        obs: as in `observe`.
        mask: as in `observe`.

    Returns:
        The same tree with other statistics; itself where it holds none.

    Raises:
        ValueError: if `obs` has other shapes.
    """

    def at(leaf: PyTree) -> PyTree:
        return _joined(leaf, obs, mask) if _is_statistics(leaf) else leaf

    return jax.tree.map(at, params, is_leaf=_is_statistics)


def moments_in(params: Params, obs: PyTree, mask: Bool[Array, "B T"]) -> PyTree:
    """What a part of a batch says to each of the statistics in `params`.

    Args:
        params: as in `observe_in`.
        obs: as in `observe`, of some rows.
        mask: as in `observe`.

    Returns:
        Moments, one for each of the statistics; those of parts may be merged.

    Raises:
        ValueError: if `obs` has other shapes.
    """
    leaves = jax.tree.leaves(params, is_leaf=_is_statistics)
    return [_moments(leaf, obs, mask) for leaf in leaves if _is_statistics(leaf)]


def observe_moments_in(params: Params, moments: PyTree) -> Params:
    """`observe_in`, for whoever never holds all observations at once.

    Args:
        params: as in `observe_in`.
        moments: of the whole batch, from `moments_in`.

    Returns:
        The same tree with other statistics.

    >>> params, mask = {"observations": _nothing(())}, jnp.ones((1, 2), bool)
    >>> moments = moments_in(params, jnp.array([[1.0, 3.0]]), mask)
    >>> observe_moments_in(params, moments)["observations"].mean.item()
    2.0
    """
    of_each = iter(moments)

    def at(leaf: PyTree) -> PyTree:
        return _merged(leaf, next(of_each)) if _is_statistics(leaf) else leaf

    return jax.tree.map(at, params, is_leaf=_is_statistics)


def _is_statistics(x: PyTree) -> bool:
    return isinstance(x, Statistics)


def _nothing(shape: tuple[int, ...]) -> Statistics:
    zero, zeros = jnp.zeros((), float), jnp.zeros(shape, float)
    return Statistics(zero, zero, zeros, zeros, zeros, zeros)


def _seen(statistics: Statistics, obs: PyTree) -> PyTree:
    """One observation, normalised."""
    if isinstance(obs, MaskedObs):
        return obs._replace(features=_seen(statistics, obs.features))
    known: Statistics = jax.lax.stop_gradient(statistics)
    obs = jnp.asarray(obs).astype(known.mean.dtype)
    # In this order, for the rest is below the mean's last digit.
    deviation = (obs - known.mean) - known.mean_rest
    variance = (known.squares + known.squares_rest) / jnp.maximum(
        known.num_samples, 1.0
    )
    scaled = deviation / jnp.sqrt(jnp.maximum(variance, 0.0) + EPSILON)
    return jnp.where(known.num_samples > 0.0, jnp.clip(scaled, -LARGEST, LARGEST), obs)


def _joined(
    statistics: Statistics, obs: PyTree, mask: Bool[Array, "B T"]
) -> Statistics:
    return _merged(statistics, _moments(statistics, obs, mask))


def _moments(statistics: Statistics, obs: PyTree, mask: Bool[Array, "B T"]) -> Moments:
    if isinstance(obs, MaskedObs):
        return _moments(statistics, obs.features, mask)
    _check_shapes(statistics, obs, mask)
    samples = obs.astype(statistics.mean.dtype)
    return merge_over_axis(jax.vmap(moments_of)(samples, mask))


def _merged(statistics: Statistics, batch: Moments) -> Statistics:
    # Moments count in integers, which end at 2^32; their merge takes floats as well.
    number = batch.num_samples.astype(statistics.num_samples.dtype)
    known = Moments(statistics.num_samples, *statistics[2:])
    merged = merge(known, batch._replace(num_samples=number))
    count = _sum_and_rest(statistics.num_samples, statistics.num_samples_rest, number)
    return Statistics(*count, *merged[1:])


def _sum_and_rest(x: Array, rest: Array, more: Array) -> tuple[Array, Array]:
    """x + rest + more of counts, rounded, and exactly what rounding took (Dekker)."""
    more = more + rest
    total = x + more
    return total, jnp.minimum(x, more) - (total - jnp.maximum(x, more))


def _check_shapes(statistics: Statistics, obs: Array, mask: Array) -> None:
    check_rank("mask", mask, 2, "(B, T) = a batch of rows; for one row use mask[None]")
    needed = mask.shape + statistics.mean.shape
    if obs.shape != needed:
        raise ValueError(
            f"obs has shape {obs.shape}, needs {needed}: mask has shape {mask.shape} "
            f"and one observation {statistics.mean.shape}"
        )
