r"""Exact answers by enumeration: small worlds, any policy, any estimator.

    J(theta)       = sum over paths of P(path) * sum_t discount^t r[t]
    E[estimate]    = sum over N-tuples of paths of probability * estimate
    Var[estimate]  = sum over N-tuples of probability * (estimate - E[estimate])^2

Paths and their probabilities are those of `exact.paths`. No Markov property is used, so
memory and partial observability are welcome. With P paths a batch of N trajectories can
be any of P^N tuples, and each of them is visited.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxpg._checks import check_positive
from jaxpg.envs.tabular import TabularMDP
from jaxpg.exact.paths import Paths, enumerate_trajectories, with_chances
from jaxpg.policies import Policy
from jaxpg.returns import leading_discounts
from jaxpg.types import Params, PyTree, Trajectory

__all__ = [
    "EstimateMoments",
    "enumerated_return",
    "estimate_moments",
    "expected_estimate",
]

MAX_BATCHES = 2**30
"""More batches are refused: at a million a second they would take half an hour."""

CHUNK = 4096
"""Batches that are estimated together."""


class EstimateMoments(NamedTuple):
    """What an estimator is on average, and how far it strays.

    Attributes:
        mean: the estimator's expectation, a tree like its estimate.
        variance: the variance of each entry, likewise.
    """

    mean: PyTree
    variance: PyTree

    @property
    def total_variance(self) -> Float[Array, ""]:
        """E[||estimate - mean||^2], the sum of all entries' variances."""
        return jnp.sum(ravel_pytree(self.variance)[0])


def enumerated_return(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Float[Array, ""]:
    """J(theta) = sum over paths of P(path) * sum_t discount^t r[t]: with memory too.

    Args:
        mdp: a small world, not traced.
        policy: any policy; it acts through `policy.unroll`.
        params: its parameters; differentiate with respect to them.
        discount: the factor per decision, in [0, 1].

    Returns:
        The exact objective.

    Raises:
        ValueError: if `enumerate_trajectories` refuses, or the discount is out of
            range.
    """
    factors = leading_discounts(jnp.arange(mdp.horizon, dtype=jnp.int32), discount)
    rows, chances = with_chances(enumerate_trajectories(mdp), policy, params)
    returns = rows.reward @ factors.astype(rows.reward.dtype)
    return jnp.dot(chances, returns)


def estimate_moments(
    estimate: Callable[[Trajectory], PyTree],
    mdp: TabularMDP,
    policy: Policy,
    params: Params,
    batch_size: int,
) -> EstimateMoments:
    """The exact mean and variance of any estimator, over all batches of trajectories.

    Args:
        estimate: maps a batch of `batch_size` independent rows to a tree of numbers.
        mdp: a small world, not traced.
        policy: the policy that acts, with or without memory.
        params: its parameters.
        batch_size: N; the work is P^N for P trajectories.

    Returns:
        Mean and variance of every entry; impossible batches do not count.

    Raises:
        ValueError: if `batch_size` is not a positive whole number, if there are over
            `MAX_BATCHES` batches, or if `enumerate_trajectories` refuses the world.
    """
    check_positive("batch_size", batch_size)
    paths = enumerate_trajectories(mdp)
    count = paths.world_probability.shape[0]
    _check_number_of_batches(count, batch_size)
    number = -(-(count**batch_size) // CHUNK)
    size = -(-(count**batch_size) // number)

    @jax.jit
    def moments(paths: Paths, params: Params) -> _Pool:
        rows, chances = with_chances(paths, policy, params)

        def of_chunk(index: Array) -> _Pool:
            digits = jnp.unravel_index(index, (count,) * batch_size)
            members = jnp.stack(digits, axis=1)
            chance = jnp.prod(chances[members], axis=1)
            chance = jnp.where(index < count**batch_size, chance, 0.0)
            estimates = jax.vmap(lambda some: estimate(_batch(rows, some)))(members)
            return _pool(chance, estimates)

        def visit(pool: _Pool, start: Array) -> tuple[_Pool, None]:
            return _merge(pool, of_chunk(start + steps)), None

        steps = jnp.arange(size, dtype=jnp.int32)
        starts = size * jnp.arange(number, dtype=jnp.int32)
        shapes = jax.eval_shape(of_chunk, steps)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(visit, empty, starts)[0]

    pool = moments(paths, params)
    # The weight is 1 but for rounding: were it not, the mean must show it.
    return EstimateMoments(
        jax.tree.map(lambda x: pool.weight * x, pool.mean), pool.spread
    )


def expected_estimate(
    estimate: Callable[[Trajectory], PyTree],
    mdp: TabularMDP,
    policy: Policy,
    params: Params,
    batch_size: int,
) -> PyTree:
    """The mean of `estimate_moments`: what the estimator estimates.

    Args:
        estimate: maps a batch of `batch_size` independent rows to a tree of numbers.
        mdp: a small world, not traced.
        policy: the policy that acts, with or without memory.
        params: its parameters.
        batch_size: N; the work is P^N for P trajectories.

    Returns:
        sum over batches of probability * estimate(batch).

    Raises:
        ValueError: if `estimate_moments` refuses.
    """
    return estimate_moments(estimate, mdp, policy, params, batch_size).mean


def _batch(rows: Trajectory, members: Array) -> Trajectory:
    """Some of the rows, even one of them twice: each is an episode of its own."""
    batch = jax.tree.map(lambda x: x[members], rows)
    own_ids = jnp.arange(members.shape[0], dtype=jnp.int32)[:, None]
    return batch._replace(episode_id=jnp.broadcast_to(own_ids, batch.mask.shape))


# Means and variances of weighted chunks, pooled without cancellation (Chan, Golub and
# LeVeque 1983): a variance about the wrong mean would lose its digits.


class _Pool(NamedTuple):
    """Total weight, weighted mean, and weighted sum of squares about that mean."""

    weight: Array
    mean: PyTree
    spread: PyTree


def _pool(chance: Array, estimates: PyTree) -> _Pool:
    weight = jnp.sum(chance)
    safe = jnp.where(weight > 0.0, weight, 1.0)

    def total(x: Array) -> Array:
        weights = jnp.reshape(chance, (-1,) + (1,) * (x.ndim - 1))
        # A batch that cannot be may have an estimate that is no number.
        return jnp.sum(jnp.where(weights > 0.0, weights * x, 0.0), axis=0)

    values = jax.tree.map(lambda x: x.astype(chance.dtype), estimates)
    mean = jax.tree.map(lambda x: total(x) / safe, values)
    spread = jax.tree.map(lambda x, m: total((x - m[None]) ** 2), values, mean)
    return _Pool(weight, mean, spread)


def _merge(one: _Pool, other: _Pool) -> _Pool:
    weight = one.weight + other.weight
    share = other.weight / jnp.where(weight > 0.0, weight, 1.0)
    step = jax.tree.map(jnp.subtract, other.mean, one.mean)
    mean = jax.tree.map(lambda m, d: m + share * d, one.mean, step)
    spread = jax.tree.map(
        lambda a, b, d: a + b + one.weight * share * d**2,
        one.spread,
        other.spread,
        step,
    )
    return _Pool(weight, mean, spread)


def _check_number_of_batches(count: int, batch_size: int) -> None:
    if count**batch_size > MAX_BATCHES:
        raise ValueError(
            f"batch_size is {batch_size}: of {count} trajectories there are "
            f"{float(count) ** batch_size:.2g} batches, needs at most "
            f"{MAX_BATCHES:.2g}; take fewer, or a smaller world"
        )
