r"""All trajectories of a small world, and how probable each of them is.

    P(path) = P(world's part) * prod_t pi(a[t] | o[0], ..., o[t])

    world's part: initial[s[0]] emission[s[0], o[0]]
                  * prod_t transition[s[t], a[t], s[t+1]] emission[s[t+1], o[t+1]]

A path is what a rollout would record of an episode: `obs`, `action`, `reward`, the ends
and `next_obs`, whose last one is enumerated too. States that are not seen are summed
out. The enumeration runs on the host; what the policy adds to it is differentiable.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpg.envs.tabular import TabularMDP, check_mdp
from jaxpg.policies import Policy
from jaxpg.types import Params, Trajectory

__all__ = ["Paths", "enumerate_trajectories", "with_log_probs"]

MAX_PATHS = 10**6
"""Worlds with more trajectories are refused, before the memory is full of them."""

Step: TypeAlias = tuple[int, int, float, bool, int]
"""Observation, action, reward, whether the task ended, next observation."""

Record: TypeAlias = tuple[Step, ...]


class Paths(NamedTuple):
    """All trajectories that a world can produce.

    Attributes:
        trajectories: one per row, [P, T], masked after its end; `log_prob` is zero.
        world_probability: the world's own part of each one's probability, [P]; times
            the policy's part it sums to one.
    """

    trajectories: Trajectory
    world_probability: Float[Array, " P"]


def enumerate_trajectories(mdp: TabularMDP) -> Paths:
    """Every trajectory that the world can produce, whatever the policy.

    Args:
        mdp: a small world, not traced: up to S * O * (A * S * O)^horizon trajectories.

    Returns:
        One row for each trajectory as it is recorded: hidden histories that leave the
        same record are one row, with the sum of their probabilities.

    Raises:
        ValueError: if the world is none, is traced, or has over `MAX_PATHS` paths.
    """
    check_mdp(mdp)
    world = _on_the_host(mdp)
    _check_number_of_paths(world)
    records: dict[Record, float] = defaultdict(float)
    for state, obs, chance in _arrivals(world, world.initial):
        for probability, record in _extend(world, state, obs, chance, ()):
            records[record] += probability
    return Paths(
        _as_trajectories(world, list(records)), jnp.asarray(list(records.values()))
    )


def with_log_probs(
    trajectories: Trajectory, policy: Policy, params: Params
) -> Trajectory:
    """The same trajectories, as the policy with these parameters would record them.

    Args:
        trajectories: whole episodes, one per row.
        policy: any policy.
        params: its parameters.

    Returns:
        Rows with their `log_prob`, and with the policy's first memory as `carry`.
    """
    count = trajectories.mask.shape[0]
    carry = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), policy.initial_carry()
    )
    rows = trajectories._replace(carry=carry)

    def of_row(row: Trajectory) -> Array:
        return policy.unroll(params, row).log_prob(row.action)

    return rows._replace(log_prob=jax.vmap(of_row)(rows))


def with_chances(
    paths: Paths, policy: Policy, params: Params
) -> tuple[Trajectory, Float[Array, " P"]]:
    """The rows as this policy records them, and the probability of each, [P]."""
    rows = with_log_probs(paths.trajectories, policy, params)
    own = jnp.sum(jnp.where(rows.mask, rows.log_prob, 0.0), axis=1)
    return rows, paths.world_probability * jnp.exp(own)


def _on_the_host(mdp: TabularMDP) -> Any:
    """NumPy arrays, for loops in Python; `Any`, because they are no JAX arrays."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mdp)):
        raise ValueError(
            "mdp is traced, needs known numbers to enumerate; leave it out of the "
            "arguments of jit, grad and vmap, and close over it"
        )
    # In NumPy, as under `jit` even a new JAX array is traced.
    looks = np.eye(mdp.reward.shape[0]) if mdp.emission is None else mdp.emission
    names = ("initial", "transition", "reward", "terminal")
    arrays = {name: np.asarray(getattr(mdp, name)) for name in names}
    return cast(Any, mdp)._replace(**arrays, emission=np.asarray(looks))


def _arrivals(world: Any, chances: Any) -> Iterator[tuple[int, int, float]]:
    """Every state that can be entered, every look of it, and their probability."""
    for state in np.flatnonzero(chances > 0.0):
        for obs in np.flatnonzero(world.emission[state] > 0.0):
            chance = float(chances[state]) * float(world.emission[state, obs])
            yield int(state), int(obs), chance


def _extend(
    world: Any, state: int, obs: int, probability: float, record: Record
) -> Iterator[tuple[float, Record]]:
    if (record and record[-1][3]) or len(record) == world.horizon:
        yield probability, record
        return
    for action, chances in enumerate(world.transition[state]):
        reward = float(world.reward[state, action])
        for arrived, seen, chance in _arrivals(world, chances):
            step = (obs, action, reward, bool(world.terminal[arrived]), seen)
            yield from _extend(
                world, arrived, seen, probability * chance, (*record, step)
            )


def _check_number_of_paths(world: Any) -> None:
    looks = (world.emission > 0.0).sum(1).astype(float)
    possible = (world.transition > 0.0).sum(1).astype(float)  # ways from s to x
    ahead = np.ones_like(looks)
    for _ in range(world.horizon):
        further = possible @ (looks * np.where(world.terminal, 1.0, ahead))
        ahead = np.minimum(further, 1e18)  # no overflow on long horizons
    number = (world.initial > 0.0).astype(float) @ (looks * ahead)
    if number > MAX_PATHS:
        raise ValueError(
            f"mdp has about {number:.0e} trajectories or more, needs at most "
            f"{MAX_PATHS:.0e} to enumerate; shorten the horizon, or use the dynamic "
            "programming of exact.dynamic"
        )


def _as_trajectories(world: Any, records: list[Record]) -> Trajectory:
    shape = (len(records), world.horizon)
    table = np.zeros((*shape, 5))
    mask = np.zeros(shape, bool)
    for row, record in enumerate(records):
        table[row, : len(record)] = record
        mask[row, : len(record)] = True
    obs, action, next_obs = (
        jnp.asarray(table[..., i].astype(np.int32)) for i in (0, 1, 4)
    )
    time = jnp.broadcast_to(jnp.arange(world.horizon, dtype=jnp.int32), shape)
    reward = jnp.asarray(table[..., 2].astype(world.reward.dtype))
    ids = jnp.arange(len(records), dtype=jnp.int32)[:, None]
    return Trajectory(
        obs=obs,
        action=action,
        log_prob=jnp.zeros(shape, reward.dtype),
        reward=reward,
        terminated=jnp.asarray(table[..., 3].astype(bool)),
        truncated=(time == world.horizon - 1) & jnp.asarray(mask),
        mask=jnp.asarray(mask),
        time=time,
        episode_id=jnp.broadcast_to(ids, shape),
        next_obs=next_obs,
    )
