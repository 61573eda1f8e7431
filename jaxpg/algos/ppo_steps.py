"""PPO's steps: the gradient of a minibatch, and what it does to policy and critic.

A minibatch comes as rows that are stored, or as slots from which its rows are played
again (`jaxpg.algos.replay`); what is done with them is the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxpg._batching import anywhere, over_rows
from jaxpg._flat import as_vectors
from jaxpg._tracing import traced_once
from jaxpg.algos.base import Info, Task, ascend
from jaxpg.algos.measures import count_non_finite, global_norm
from jaxpg.algos.ppo_settings import PPOConfig
from jaxpg.algos.segments import needed_critic, rows_cut
from jaxpg.chunks import Chunks
from jaxpg.critics import CriticState, critic_rows, critic_terms, policy_rows
from jaxpg.distributions import entropy_of
from jaxpg.proximal import clipped_terms, kl_penalty_terms
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "Batch",
    "Optimizers",
    "PPOState",
    "Sum",
    "adapted_coefficient",
    "make_step",
    "sum_over_batch",
    "summary",
]

FURTHEST = 2.0**10
"""How many times the KL penalty's coefficient may be its first value, or a part."""


class PPOState(NamedTuple):
    """Everything that the next update needs.

    Attributes:
        params: the policy's parameters.
        opt_state: its optimiser's state.
        critic: parameters, optimiser and target statistics of the critic.
        kl_coefficient: the weight of the KL penalty.
    """

    params: Params
    opt_state: PyTree
    critic: CriticState
    kl_coefficient: Array


class Batch(NamedTuple):
    """What a gradient is taken of, with B in front.

    Attributes:
        rows: the decisions.
        advantages: held constant, [B, T].
        targets: what the critic should say, [B, T].
        values: what it said before the update, [B, T].
    """

    rows: Trajectory
    advantages: Array
    targets: Array
    values: Array


class Optimizers(NamedTuple):
    """Of the policy and of the critic."""

    policy: optax.GradientTransformationExtraArgs
    critic: optax.GradientTransformationExtraArgs


class Held(NamedTuple):
    """What the terms of a minibatch need beside what is learned."""

    targets: Any
    kl_coefficient: Array
    old: Params
    key: PRNGKey


Sum = Callable[[Any, PyTree], tuple[Params, Info]]
"""`sum(shared, minibatch)`: gradients and what to report, over all its decisions."""


def make_step(
    config: PPOConfig, optimizers: Optimizers, sum_over: Sum, old: Params
) -> Callable[[Any, PRNGKey, PyTree], tuple[Any, Info]]:
    """One step on a minibatch, or none once the KL has stopped the update.

    Args:
        config: settings.
        optimizers: of policy and critic.
        sum_over: how a minibatch is summed over.
        old: parameters of the policy that acted.

    Returns:
        `step((state, going), key, minibatch) -> ((state, going), info)`.
    """

    def step(
        carry: tuple[PPOState, Array], key: PRNGKey, minibatch: PyTree
    ) -> tuple[tuple[PPOState, Array], Info]:
        state, going = carry
        learned = {"policy": state.params, "critic": state.critic.params}
        held = Held(state.critic.targets, state.kl_coefficient, old, key)
        total, sums = sum_over((learned, held), minibatch)
        count = jnp.maximum(sums.pop("count"), 1.0)
        vectors, back = as_vectors(total)
        gradients = back([x / count.astype(x.dtype) for x in vectors])
        info = {name: x / count for name, x in sums.items()}
        stepped = _stepped(config, optimizers, state, gradients, old, info["kl"])
        info |= {
            "grad_norm": global_norm(gradients["policy"]),
            "non_finite_gradient": count_non_finite(gradients),
        }
        if config.stop_at_kl is None:
            return (stepped, going), info | {"skipped": ~going}
        # A member that has stopped comes here in the company of others: it sees 0.
        info = {name: jnp.where(going, x, 0) for name, x in info.items()}
        going = going & (info["kl"] <= config.stop_at_kl)
        state = jax.tree.map(lambda x, y: jnp.where(going, x, y), stepped, state)
        return (state, going), info | {"skipped": ~going}

    def unless_stopped(carry: Any, key: PRNGKey, minibatch: PyTree) -> Any:
        return _unless_stopped(
            traced_once(lambda carry: step(carry, key, minibatch)), carry
        )

    return step if config.stop_at_kl is None else unless_stopped


def sum_over_batch(config: PPOConfig, task: Task, shared: Any, batch: Batch) -> Any:
    """Gradients of policy and critic over stored rows, and what to report.

    Args:
        config: settings.
        task: gives the policy, the critic and how sums are taken.
        shared: what is learned, and what is held.
        batch: of rows.

    Returns:
        Sums over the batch's decisions.
    """
    chunks = Chunks(config.chunk_size, cut_rows=rows_cut(task))
    terms = _terms(config, task)
    return task.sum_over_rows(terms, shared, batch, None, chunks)


def _terms(config: PPOConfig, task: Task) -> Callable[[Any, Batch], Any]:
    critic = needed_critic(task)

    def objective(learned: Params, held: Held, chunk: Batch) -> tuple[Array, Info]:
        rows, mask = chunk.rows, chunk.rows.mask
        distribution = over_rows(
            task.policy.unroll, learned["policy"], policy_rows(critic, rows)
        )
        log_probs = distribution.log_prob(rows.action)
        gains = _gains(config, task, held, chunk, distribution, log_probs)
        entropy = jnp.sum(jnp.where(mask, entropy_of(distribution, held.key), 0.0))
        critic_loss = critic_terms(
            critic,
            learned["critic"],
            held.targets,
            critic_rows(critic, rows),
            chunk.targets,
            chunk.values,
            config.clip_values,
        )
        total = jnp.sum(gains) + config.entropy_coefficient * entropy - critic_loss
        sums = _drift(config, log_probs - rows.log_prob, mask)
        count = jnp.sum(mask).astype(float)
        told = {"entropy": entropy, "critic_loss": critic_loss, "count": count}
        return total, sums | told

    def of_chunk(shared: Any, chunk: Batch) -> tuple[Params, Info]:
        return jax.grad(objective, has_aux=True)(*shared, chunk)

    return of_chunk


def _gains(
    config: PPOConfig,
    task: Task,
    held: Held,
    chunk: Batch,
    distribution: Any,
    log_probs: Array,
) -> Array:
    """What is maximised, decision by decision."""
    rows = chunk.rows
    facts = (log_probs, rows.log_prob, chunk.advantages)
    if config.form == "clip":
        return clipped_terms(*facts, rows.mask, epsilon=config.clip_eps)
    theirs = over_rows(
        task.policy.unroll, held.old, policy_rows(needed_critic(task), rows)
    )
    return kl_penalty_terms(
        *facts, theirs.kl(distribution), rows.mask, coefficient=held.kl_coefficient
    )


def _drift(config: PPOConfig, log_rhos: Array, mask: Array) -> Info:
    """Sums that say how far the policy has gone from the one that acted."""
    log_rhos = jax.lax.stop_gradient(jnp.where(mask, log_rhos, 0.0))
    rhos_less_one = jnp.expm1(jnp.clip(log_rhos, -20.0, 20.0))
    clipped = mask & (jnp.abs(rhos_less_one) > config.clip_eps)
    return {
        "kl": jnp.sum(rhos_less_one - log_rhos),
        "clip_fraction": jnp.sum(clipped).astype(float),
    }


def _stepped(
    config: PPOConfig,
    optimizers: Optimizers,
    state: PPOState,
    gradients: Params,
    old: Params,
    kl: Array,
) -> PPOState:
    """Policy and critic after a step up their gradients."""
    params, opt_state = ascend(
        optimizers.policy,
        gradients["policy"],
        state.opt_state,
        state.params,
        kl=_adapted_to(config, state.params, old, kl),
    )
    theirs = state.critic
    critic_params, critic_opt_state = ascend(
        optimizers.critic, gradients["critic"], theirs.opt_state, theirs.params
    )
    return state._replace(
        params=params,
        opt_state=opt_state,
        critic=theirs._replace(params=critic_params, opt_state=critic_opt_state),
    )


def _adapted_to(config: PPOConfig, params: Params, old: Params, kl: Array) -> Array:
    """The KL, and exactly 0 before the first step, where all of it is rounding."""
    if config.adapt_to_kl is None:
        return kl
    moved = jax.tree.map(lambda x, y: jnp.any(x != y), params, old)
    return jnp.where(jnp.any(jnp.stack(jax.tree.leaves(moved))), kl, 0.0)


def _unless_stopped(step: Any, carry: tuple[PPOState, Array]) -> Any:
    """Make a step, or none at all once the KL has stopped the update."""

    def rest() -> Any:
        infos = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, carry)[1]
        )
        return carry, infos | {"skipped": jnp.ones((), bool)}

    return jax.lax.cond(anywhere(carry[1]), lambda: step(carry), rest)


def summary(infos: Info) -> Info:
    """Means over the steps that were made; the KL is the largest mean of an epoch.

    Args:
        infos: of all steps, [epochs, minibatches].

    Returns:
        One number each.
    """
    made = ~infos["skipped"]
    count = jnp.maximum(jnp.sum(made), 1).astype(float)
    means = {
        name: jnp.sum(jnp.where(made, infos[name], 0.0)) / count
        for name in ("entropy", "critic_loss", "clip_fraction", "grad_norm")
    }
    return means | {
        "kl": jnp.max(jnp.mean(infos["kl"], axis=1)),
        "skipped_steps": jnp.sum(~made),
        "non_finite_gradient": jnp.sum(infos["non_finite_gradient"]),
    }


def adapted_coefficient(config: PPOConfig, state: PPOState, kl: Array) -> Array:
    """The KL penalty's coefficient after an update: doubled, halved, or as it was.

    Args:
        config: settings.
        state: before the update's end.
        kl: that the update made, in nats.

    Returns:
        The next coefficient.
    """
    if config.form == "clip":
        return state.kl_coefficient
    above, below = kl > 1.5 * config.kl_target, kl < config.kl_target / 1.5
    factor = jnp.where(above, 2.0, jnp.where(below, 0.5, 1.0))
    # Held, for what has halved to 0 or doubled to infinity never comes back.
    first = jnp.asarray(config.kl_coefficient, float)
    return jnp.clip(state.kl_coefficient * factor, first / FURTHEST, first * FURTHEST)
