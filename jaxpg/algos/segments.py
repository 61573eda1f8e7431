r"""What algorithms on segments share: values, advantages, and the critic's own steps.

Segments begin and end inside episodes, so they are no trajectories: their gradient is
the mean over decisions. What follows a segment, or was cut off by a time limit, is
worth what the critic says of the true last observation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxpg._batching import over_rows
from jaxpg._flat import as_vectors
from jaxpg.advantages import ValuedRow, generalized_advantages, with_values
from jaxpg.algos.base import Task, ascend, check_anneal
from jaxpg.algos.measures import chunks_for
from jaxpg.algos.minibatches import over_minibatches, plan_minibatches
from jaxpg.chunks import Chunks, ChunkSize
from jaxpg.critics import (
    CriticState,
    Values,
    critic_rows,
    critic_terms,
    policy_rows,
    values_of,
)
from jaxpg.distributions import entropy_of
from jaxpg.gradients import weigh
from jaxpg.networks import Network
from jaxpg.types import Params, PRNGKey, Trajectory

__all__ = [
    "Advantages",
    "acting_params",
    "advantages_of",
    "check_segments",
    "fit_critic",
    "needed_critic",
    "policy_gradient",
    "rows_cut",
    "valued",
]


class Advantages(NamedTuple):
    """What a critic makes of segments, held constant.

    Attributes:
        advantages: by GAE, [B, T].
        targets: advantages + values: what the critic should have said, [B, T].
        values: what it said, [B, T].
    """

    advantages: Float[Array, "B T"]
    targets: Float[Array, "B T"]
    values: Float[Array, "B T"]


def needed_critic(task: Task) -> Network:
    """The task's critic.

    Raises:
        ValueError: if it has none.
    """
    if task.critic is None:
        raise ValueError(
            "task.critic is None, but this algorithm bootstraps from values; give a "
            "network of one output, for example "
            "mlp_network(env.observation_space, 1, output_scale=1.0)"
        )
    return task.critic


def check_segments(config: Any, task: Task) -> None:
    """Refuse to bootstrap where a time limit cannot be told, and to anneal blindly.

    Args:
        config: settings with `bootstrap_truncated` and `anneal`.
        task: the world and the run.

    Raises:
        ValueError: naming the setting that does not go with the task.
    """
    needed_critic(task)
    if config.bootstrap_truncated and not task.tells_truncation:
        raise ValueError(
            "bootstrap_truncated is set, but the environment cannot tell time limits "
            "from true ends; unset it, so that both count as true ends"
        )
    check_anneal(config, task)


def rows_cut(task: Task) -> bool:
    """Whether rows may be cut in time: nothing in the task has a memory."""
    return not (task.policy.is_recurrent or needed_critic(task).is_recurrent)


def acting_params(task: Task, params: Params, critic_params: Params) -> Params:
    """Parameters of `actor_with_critic`."""
    if not needed_critic(task).is_recurrent:
        return params
    return {"policy": params, "critic": critic_params}


def valued(
    config: Any, task: Task, critic: CriticState, rows: Trajectory
) -> tuple[ValuedRow, Values]:
    """Rewards and values of segments, [B, T], as `jaxpg.advantages` wants them.

    Args:
        config: settings with `bootstrap_truncated` and `chunk_size`.
        task: gives the critic's network.
        critic: what it has learned.
        rows: segments with `next_obs`.

    Returns:
        The batch valued; a truncated decision counts as terminated where its value is
        not to be bootstrapped.
    """
    network = needed_critic(task)
    length = rows.mask.shape[1]
    size = Chunks(config.chunk_size).number
    at_once = None if size is None else max(1, size // length)
    values = values_of(
        network,
        critic,
        critic_rows(network, rows),
        rows_at_once=at_once,
        map_rows=task.map_rows,
    )
    row = with_values(rows, *values)
    if not config.bootstrap_truncated:
        row = row._replace(terminated=row.terminated | row.truncated)
    return row, values


def advantages_of(
    config: Any, task: Task, critic: CriticState, rows: Trajectory
) -> Advantages:
    """GAE of segments and what the critic should have said.

    Args:
        config: settings with `discount`, `lambda_`, `bootstrap_truncated` and
            `chunk_size`.
        task: gives the critic's network.
        critic: what it has learned.
        rows: segments with `next_obs`.

    Returns:
        Advantages, targets and values.

    Bias: as `generalized_advantages`.
    """
    row, values = valued(config, task, critic, rows)
    advantages = jax.vmap(generalized_advantages, (0, None, None))(
        row, config.discount, config.lambda_
    )
    return Advantages(advantages, advantages + values.values, values.values)


def policy_gradient(
    config: Any,
    task: Task,
    params: Params,
    rows: Trajectory,
    weights: Float[Array, "B T"],
    key: PRNGKey,
) -> tuple[Params, Array]:
    """Mean over decisions of weights * grad log pi + entropy_coefficient * grad H.

    Args:
        config: settings with `entropy_coefficient` and `chunk_size`.
        task: gives the policy and how sums are taken.
        params: where the gradient is taken.
        rows: segments.
        weights: one per decision, held constant.
        key: for distributions whose entropy is sampled.

    Returns:
        An ascent direction, and the mean entropy in nats.

    Bias: that of the weights; the entropy's derivative misses how the policy moves the
        observations that are visited.
    """
    rows = policy_rows(needed_critic(task), rows)._replace(next_obs=None)

    def objective(params: Params, key: PRNGKey, chunk: Any) -> tuple[Array, Array]:
        rows, weights = chunk
        distribution: Any = over_rows(task.policy.unroll, params, rows)
        entropy = entropy_of(distribution, key)
        entropy = jnp.sum(jnp.where(rows.mask, entropy, 0.0))
        gains = jnp.sum(weigh(weights, distribution.log_prob(rows.action)))
        return gains + config.entropy_coefficient * entropy, entropy

    def of_chunk(shared: Any, chunk: Any) -> tuple[Params, Array]:
        return jax.grad(objective, has_aux=True)(*shared, chunk)

    weights = jnp.where(rows.mask, jax.lax.stop_gradient(weights), 0.0)
    total, entropy = task.sum_over_rows(
        of_chunk,
        (params, key),
        (rows, weights),
        None,
        chunks_for(task.policy, config.chunk_size),
    )
    count = jnp.maximum(rows.num_decisions, 1)
    vectors, back = as_vectors(total)
    mean = back([x / count.astype(x.dtype) for x in vectors])
    return mean, entropy / count.astype(entropy.dtype)


def fit_critic(
    task: Task,
    optimizer: optax.GradientTransformation,
    critic: CriticState,
    key: PRNGKey,
    rows: Trajectory,
    targets: Float[Array, "B T"],
    *,
    num_epochs: int,
    num_minibatches: int = 1,
    chunk_size: ChunkSize = None,
) -> tuple[CriticState, Array]:
    """Descend the critic's squared error, minibatch by minibatch.

    Args:
        task: gives the network and how sums are taken.
        optimizer: of the critic.
        critic: where to begin; its statistics are left as they are.
        key: consumed.
        rows: segments.
        targets: what it should say, in units of the return.
        num_epochs: passes over the rows.
        num_minibatches: steps in each pass.
        chunk_size: decisions that a gradient works on together.

    Returns:
        The critic after it, and its mean loss per decision over the steps.

    Raises:
        ValueError: if minibatches do not divide the batch.
    """
    network = needed_critic(task)
    num_rows, num_steps = rows.mask.shape
    cut = plan_minibatches(
        num_rows, num_steps, num_minibatches, cut_rows=rows_cut(task)
    )
    chunks = Chunks(chunk_size, cut_rows=rows_cut(task))
    rows = critic_rows(network, rows)._replace(next_obs=None)

    def of_chunk(shared: Any, chunk: Any) -> tuple[Array, Params]:
        params, targets_so_far = shared
        return jax.value_and_grad(critic_terms, argnums=1)(
            network, params, targets_so_far, *chunk
        )

    def step(
        carry: tuple[Params, Any], key: PRNGKey, minibatch: Any
    ) -> tuple[tuple[Params, Any], Array]:
        del key
        params, opt_state = carry
        mask = minibatch[0].mask
        loss, slope = task.sum_over_rows(
            of_chunk, (params, critic.targets), minibatch, None, chunks
        )
        count = jnp.maximum(jnp.sum(mask), 1)
        vectors, back = as_vectors(slope)
        uphill = back([-x / count.astype(x.dtype) for x in vectors])
        carry = ascend(optimizer, uphill, opt_state, params)
        return carry, loss / count.astype(loss.dtype)

    (params, opt_state), losses = over_minibatches(
        step,
        (critic.params, critic.opt_state),
        key,
        cut,
        (rows, targets),
        num_epochs,
        task.map_rows,
    )
    fitted = critic._replace(params=params, opt_state=opt_state)
    return fitted, jnp.mean(losses)
