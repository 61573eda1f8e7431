r"""Critics: the value functions that actor-critics bootstrap from.

    V(o) = mean + std * network(o),    loss = 1/2 (network(o) - (target - mean) / std)^2

with mean and standard deviation those of the targets so far: the network sees targets
of variance 1 whatever the rewards' scale. The statistics move slowly, by a hundredth
of each batch's.

Values are wanted twice: V(obs[t]), and V'[t] of what followed decision t, before any
reset. Where the next slot goes on with the same episode, its value is V'[t] already;
only decisions that were cut off (a truncation, or the end of the row) need their own
`next_obs`. There are few of those in a row, so they are visited one by one.

References: Sutton and Barto 2018, chapter 9; van Hasselt et al. 2016, "Learning values
across many orders of magnitude".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxpg._batching import over_rows
from jaxpg.chunks import MapRows, map_plainly
from jaxpg.credit import Credit
from jaxpg.networks import Network
from jaxpg.policies import Policy
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory
from jaxpg.value_functions import (
    TargetStatistics,
    no_statistics,
    take_in,
    update_statistics,
)

__all__ = [
    "CriticState",
    "Values",
    "actor_with_critic",
    "critic_rows",
    "critic_terms",
    "follow_moments",
    "follow_targets",
    "init_critic",
    "policy_rows",
    "values_of",
]

KEPT = 0.99
"""How much of the targets' statistics a batch leaves."""


class CriticState(NamedTuple):
    """What a critic has learned.

    Attributes:
        params: the network's parameters.
        opt_state: the Optax optimiser's state.
        targets: statistics of its targets so far.
    """

    params: Params
    opt_state: PyTree
    targets: TargetStatistics


class Values(NamedTuple):
    """What a critic says about rows.

    Attributes:
        values: V(obs[t]), in units of the return; 0 in empty slots, [B, T].
        next_values: V of what followed decision t, before any reset; 0 where nothing
            does, [B, T].
    """

    values: Float[Array, "*B T"]
    next_values: Float[Array, "*B T"]


def init_critic(
    network: Network,
    optimizer: optax.GradientTransformation,
    key: PRNGKey,
    obs: PyTree,
) -> CriticState:
    """The critic before its first update: V = 0 everywhere.

    Args:
        network: of one output.
        optimizer: any Optax transformation.
        key: consumed.
        obs: one observation.

    Returns:
        Its first state.

    Raises:
        ValueError: if the network has another number of outputs.
    """
    params = network.init(key, obs)
    shape = jax.eval_shape(network.step, params, network.initial_carry(), obs)[0].shape
    if shape != (1,):
        raise ValueError(
            f"critic gives outputs of shape {shape}, needs (1,) = one value"
        )
    return CriticState(params, optimizer.init(params), no_statistics())


def values_of(
    network: Network,
    state: CriticState,
    rows: Trajectory,
    *,
    rows_at_once: int | None = None,
    map_rows: MapRows = map_plainly,
) -> Values:
    """V(obs[t]) and V' of what followed each decision, [B, T].

    Args:
        network: the critic's.
        state: what it has learned.
        rows: segments or episodes with `next_obs`; `carry` is the critic's own memory
            before each row, from `critic_rows`.
        rows_at_once: rows that are worked on together; None for all.
        map_rows: how rows are spread over devices.

    Returns:
        Values, without derivative.

    Raises:
        ValueError: if the rows did not keep `next_obs`.
    """
    if rows.next_obs is None:
        raise ValueError(
            "rows have no next_obs, which values at truncations need; roll out with "
            "keep_next_obs=True"
        )

    def of_rows(shared: Any, rows: Trajectory) -> Values:
        params, targets = shared

        def of_row(row: Trajectory) -> tuple[Array, PyTree]:
            carry = network.initial_carry() if row.carry is None else row.carry
            outputs, carries = network.unroll(params, carry, row.obs, row.starts)
            return outputs[:, 0], carries

        outputs, carries = _in_parts(of_row, rows, rows_at_once)
        values = jnp.where(rows.mask, _in_units(targets, outputs), 0.0)
        own = jax.vmap(
            lambda carry, obs: network.step(params, carry, obs)[0][0], (0, 0)
        )
        return Values(
            values,
            _next_values(
                values,
                carries if network.is_recurrent else None,
                rows,
                lambda carry, obs: _in_units(targets, own(carry, obs)),
            ),
        )

    shared = (state.params, state.targets)
    return jax.lax.stop_gradient(map_rows(of_rows, shared, rows))


def critic_terms(
    network: Network,
    params: Params,
    targets_so_far: TargetStatistics,
    rows: Trajectory,
    targets: Float[Array, "B T"],
    old_values: Float[Array, "B T"] | None = None,
    clip: float | Array | None = None,
) -> Float[Array, ""]:
    """sum over decisions of (network(o) - standardised target)^2 / 2.

    Args:
        network: the critic's.
        params: where to take the derivative.
        targets_so_far: statistics that targets are standardised with.
        rows: whose observations are valued; `carry` is the critic's own memory.
        targets: in units of the return, held constant.
        old_values: of the same rows before the update, where values are clipped.
        clip: how far a standardised value may go from the old one before it earns
            nothing more; None does not clip.

    Returns:
        The sum over real decisions, to descend.

    Reference: Schulman et al. 2017; the clipped form is that of its published code.
    """

    def of_row(params: Params, row: Trajectory) -> Array:
        carry = network.initial_carry() if row.carry is None else row.carry
        return network.unroll(params, carry, row.obs, row.starts)[0][:, 0]

    outputs = over_rows(of_row, params, rows)
    wanted = _standardised(targets_so_far, targets)
    errors = (outputs - wanted) ** 2
    if clip is not None and old_values is not None:
        old = _standardised(targets_so_far, old_values)
        near = old + jnp.clip(outputs - old, -clip, clip)
        errors = jnp.maximum(errors, (near - wanted) ** 2)
    return 0.5 * jnp.sum(jnp.where(rows.mask, errors, 0.0))


def follow_targets(
    state: CriticState, targets: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> CriticState:
    """Let the statistics take in a batch of targets.

    Args:
        state: the critic.
        targets: in units of the return.
        mask: whether slot t holds a decision.

    Returns:
        The critic with new statistics; its values move with them, slowly.
    """
    credit = Credit(jnp.where(mask, targets, 0.0), mask.astype(targets.dtype))
    return state._replace(targets=update_statistics(state.targets, credit, KEPT))


def follow_moments(
    state: CriticState, mean: Float[Array, ""], variance: Float[Array, ""]
) -> CriticState:
    """`follow_targets`, for whoever never holds all targets at once.

    Args:
        state: the critic.
        mean: of the batch's targets, in units of the return.
        variance: about that mean.

    Returns:
        The critic with new statistics.
    """
    return state._replace(targets=take_in(state.targets, mean, variance, KEPT))


def actor_with_critic(policy: Policy, critic: Network) -> Policy:
    """Who acts while a critic with memory looks on: the policy, with both memories.

    A critic's memory at a row's start belongs to the row's facts, like the policy's.
    So the actor carries both; without memory in the critic it is the policy itself.

    Args:
        policy: chooses the actions.
        critic: goes along.

    Returns:
        A policy whose params and carry are {"policy": ..., "critic": ...}.
    """
    if not critic.is_recurrent:
        return policy

    def init(key: PRNGKey, obs: PyTree) -> Params:
        key_policy, key_critic = jax.random.split(key)
        return {
            "policy": policy.init(key_policy, obs),
            "critic": critic.init(key_critic, obs),
        }

    def initial_carry() -> PyTree:
        return {"policy": policy.initial_carry(), "critic": critic.initial_carry()}

    def step(params: Params, carry: PyTree, obs: PyTree) -> tuple[Any, PyTree]:
        distribution, ours = policy.step(params["policy"], carry["policy"], obs)
        _, theirs = critic.step(params["critic"], carry["critic"], obs)
        return distribution, {"policy": ours, "critic": theirs}

    def unroll(params: Params, trajectory: Trajectory) -> Any:
        return policy.unroll(params["policy"], policy_rows(critic, trajectory))

    return policy._replace(
        init=init,
        initial_carry=initial_carry,
        step=step,
        unroll=unroll,
        is_recurrent=True,
    )


def policy_rows(critic: Network, rows: Trajectory) -> Trajectory:
    """Rows of `actor_with_critic` as the policy wants them: with its own memory."""
    if not critic.is_recurrent or rows.carry is None:
        return rows
    return rows._replace(carry=rows.carry["policy"])


def critic_rows(critic: Network, rows: Trajectory) -> Trajectory:
    """Rows of `actor_with_critic` as the critic wants them: with its own memory."""
    if not critic.is_recurrent or rows.carry is None:
        return rows._replace(carry=None)
    return rows._replace(carry=rows.carry["critic"])


def _in_parts(fn: Any, rows: Trajectory, rows_at_once: int | None) -> Any:
    """`fn` of every row, a few at a time, so that activations stay in the cache."""
    rows = rows._replace(next_obs=None)
    num_rows = rows.mask.shape[0]
    if rows_at_once is None or rows_at_once >= num_rows:
        return jax.vmap(fn)(rows)
    return jax.lax.map(fn, rows, batch_size=rows_at_once)


def _next_values(values: Array, carries: PyTree, rows: Trajectory, own: Any) -> Array:
    """The next slot's value where it goes on, else that of the decision's `next_obs`.

    Cut decisions are visited in order, the k-th of every row together: as many turns
    as the row with most of them has.
    """
    ends = rows.terminated | rows.truncated
    later_mask = jnp.pad(rows.mask[:, 1:], ((0, 0), (0, 1)))
    later_start = jnp.pad(rows.time[:, 1:] == 0, ((0, 0), (0, 1)))
    continues = rows.mask & ~ends & later_mask & ~later_start
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    cut = rows.mask & ~continues & ~rows.terminated
    rank = jnp.cumsum(cut, axis=1, dtype=jnp.int32)
    row = jnp.arange(values.shape[0])

    def visit(turn: tuple[Array, Array]) -> tuple[Array, Array]:
        number, found = turn
        here = cut & (rank == number)
        slot = jnp.argmax(here, axis=1)
        carry, obs = jax.tree.map(lambda x: x[row, slot], (carries, rows.next_obs))
        value = own(carry, obs)
        value = jnp.where(jnp.any(here, axis=1), value, found[row, slot])
        return number + 1, found.at[row, slot].set(value)

    first = jnp.ones((), jnp.int32), jnp.where(continues, following, 0.0)
    most = jnp.max(rank, initial=0)
    return jax.lax.while_loop(lambda turn: turn[0] <= most, visit, first)[1]


def _in_units(targets: TargetStatistics, outputs: Array) -> Array:
    return targets.mean + jnp.sqrt(targets.variance) * outputs.astype(float)


def _standardised(targets_so_far: TargetStatistics, values: Array) -> Array:
    varies = targets_so_far.variance > 0.0
    std = jnp.sqrt(jnp.where(varies, targets_so_far.variance, 1.0))
    return jax.lax.stop_gradient(
        jnp.where(varies, (values - targets_so_far.mean) / std, 0.0)
    )
