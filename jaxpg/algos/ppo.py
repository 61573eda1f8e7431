r"""PPO: epochs of minibatch steps on one batch of segments, held near who acted.

    clip:        maximise mean min(rho A, clip(rho, 1 - eps, 1 + eps) A) + c H
    kl-penalty:  maximise mean rho A - beta KL(old || new) + c H

rho = pi / pi_old of the decision alone, A by GAE, H the policy's entropy; means are
over the decisions of a minibatch. The critic descends its own loss beside. beta follows
the KL that an update makes: doubled above 1.5 times its target, halved below 1 / 1.5.

Reference: Schulman, Wolski, Dhariwal, Radford and Klimov 2017, "Proximal policy
optimization algorithms"; Andrychowicz et al. 2021 for the defaults.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxpg._batching import anywhere, over_rows
from jaxpg._checks import check_choice, check_positive, check_range
from jaxpg.advantages import standardize
from jaxpg.algos.base import (
    Algorithm,
    Info,
    Segments,
    Task,
    ascend,
    check_steps,
    make_optimizer,
)
from jaxpg.algos.measures import (
    count_non_finite,
    count_non_finite_decisions,
    explained_variance,
)
from jaxpg.algos.minibatches import (
    check_minibatches,
    over_minibatches,
    plan_minibatches,
)
from jaxpg.algos.segments import (
    Advantages,
    acting_params,
    advantages_of,
    check_segments,
    needed_critic,
    rows_cut,
)
from jaxpg.critics import (
    CriticState,
    actor_with_critic,
    critic_rows,
    critic_terms,
    follow_targets,
    init_critic,
    policy_rows,
)
from jaxpg.distributions import entropy_of
from jaxpg.gradients import Chunks, ChunkSize
from jaxpg.proximal import clipped_terms, kl_penalty_terms
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = ["PPOConfig", "PPOState", "ppo"]

FURTHEST = 2.0**10
"""How many times the KL penalty's coefficient may be its first value, or a part."""

Form = Literal["clip", "kl-penalty"]
Standardize = Literal["minibatch", "batch", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Settings of PPO."""

    num_steps: int = 128
    """Decisions of each environment for an update."""
    num_epochs: int = 4
    """Passes over the batch."""
    num_minibatches: int = 4
    """Steps in each pass."""
    discount: float = 0.99
    """Weight of the next reward relative to this one, in [0, 1]."""
    lambda_: float = 0.95
    """How far GAE trusts rewards over values, in [0, 1]."""
    form: Form = "clip"
    """What holds the policy near the one that acted: clipped ratios or a KL penalty."""
    clip_eps: float = 0.2
    """How far a ratio may go from 1 before it earns nothing more."""
    kl_coefficient: float = 1.0
    """First weight of the KL penalty; it adapts."""
    kl_target: float = 0.01
    """KL that an update should make, in nats, where a penalty adapts."""
    clip_values: float | None = None
    """How far a value may go from the old one, in standard deviations of the targets;
    unset does not clip."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy, in units of the (standardised) advantages per nat."""
    standardize: Standardize = "minibatch"
    """Over what advantages are brought to mean 0 and deviation 1: biased, popular."""
    learning_rate: float = 1e-3
    """Step size of Adam for the policy."""
    critic_learning_rate: float = 1e-3
    """Step size of Adam for the critic."""
    anneal: bool = False
    """Let both rates fall linearly to zero over the run."""
    max_grad_norm: float | None = 0.5
    """Scale either gradient down to this global norm where it is longer."""
    stop_at_kl: float | None = None
    """Skip the rest of an update once a minibatch shows more KL than this, in nats."""
    adapt_to_kl: float | None = None
    """Let the policy's rate follow the KL of its minibatches, to stay near this."""
    bootstrap_truncated: bool = True
    """Value what a time limit cut off. Without it time limits count as true ends."""
    chunk_size: ChunkSize = "auto"
    """Decisions that a gradient works on together; sets memory and speed, not the
    result. "auto" suits the device, none takes all at once."""

    def __post_init__(self) -> None:
        check_steps(self)
        check_positive("num_minibatches", self.num_minibatches)
        check_choice("form", self.form, get_args(Form))
        check_choice("standardize", self.standardize, get_args(Standardize))
        check_range("clip_eps", self.clip_eps, 0.0, 1.0, open_low=True)
        check_range("kl_coefficient", self.kl_coefficient, 0.0)
        check_range("entropy_coefficient", self.entropy_coefficient, 0.0)
        for name in ("kl_target", "clip_values", "stop_at_kl", "adapt_to_kl"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0.0, open_low=True)


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
    """What minibatches are cut from, with B in front.

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


def ppo(config: PPOConfig, task: Task) -> Algorithm:
    """PPO as a record of pure functions.

    Args:
        config: its settings.
        task: the policy, the world, and a critic.

    Returns:
        An algorithm whose `update` takes segments with `next_obs`.

    Raises:
        ValueError: if there is no critic, if the learning rate is to be annealed over a
            run of unknown length, if the world cannot tell time limits from true ends
            and bootstrapping is asked for, or if minibatches do not divide the batch
            (in the first update, where the task does not say how many rows it has).
    """
    check_segments(config, task)
    critic = needed_critic(task)
    check_minibatches(
        task, config.num_steps, config.num_minibatches, cut_rows=rows_cut(task)
    )
    optimizer, critic_optimizer = _optimizers(config, task)

    def init(key: PRNGKey, obs: PyTree) -> PPOState:
        key_policy, key_critic = jax.random.split(key)
        params = task.policy.init(key_policy, obs)
        return PPOState(
            params,
            optimizer.init(params),
            init_critic(critic, critic_optimizer, key_critic, obs),
            jnp.asarray(config.kl_coefficient, float),
        )

    def step(
        carry: tuple[PPOState, Array], key: PRNGKey, batch: Batch, old: Params
    ) -> tuple[tuple[PPOState, Array], Info]:
        state, going = carry
        total, sums = _gradients(config, task, state, batch, old, key)
        count = jnp.maximum(sums.pop("count"), 1.0)
        gradients = jax.tree.map(lambda x: x / count.astype(x.dtype), total)
        info = {name: x / count for name, x in sums.items()}
        params, opt_state = ascend(
            optimizer,
            gradients["policy"],
            state.opt_state,
            state.params,
            kl=_adapted_to(config, state.params, old, info["kl"]),
        )
        theirs = state.critic
        critic_params, critic_opt_state = ascend(
            critic_optimizer, gradients["critic"], theirs.opt_state, theirs.params
        )
        stepped = state._replace(
            params=params,
            opt_state=opt_state,
            critic=theirs._replace(params=critic_params, opt_state=critic_opt_state),
        )
        info |= {
            "grad_norm": optax.tree.norm(gradients["policy"]),
            "non_finite_gradient": count_non_finite(gradients),
        }
        # A member that has stopped comes here in the company of others: it sees 0.
        info = {name: jnp.where(going, x, 0) for name, x in info.items()}
        if config.stop_at_kl is not None:
            going = going & (info["kl"] <= config.stop_at_kl)
        state = jax.tree.map(lambda x, y: jnp.where(going, x, y), stepped, state)
        return (state, going), info | {"skipped": ~going}

    def update(
        key: PRNGKey, state: PPOState, trajectories: Trajectory
    ) -> tuple[PPOState, Info]:
        estimate = advantages_of(config, task, state.critic, trajectories)
        state = state._replace(
            critic=follow_targets(state.critic, estimate.targets, trajectories.mask)
        )
        batch = _batch(config, trajectories, estimate)
        num_rows, num_steps = trajectories.mask.shape
        cut = plan_minibatches(
            num_rows,
            num_steps,
            config.num_minibatches,
            cut_rows=rows_cut(task),
        )
        old = state.params

        def one_step(carry: Any, key: PRNGKey, minibatch: Batch) -> Any:
            return _unless_stopped(
                lambda carry: step(carry, key, minibatch, old), carry
            )

        (state, _), infos = over_minibatches(
            one_step,
            (state, jnp.ones((), bool)),
            key,
            cut,
            batch,
            config.num_epochs,
            task.map_rows,
            prepare=lambda minibatches: _standardized(config, minibatches),
        )
        info = _summary(infos)
        state = state._replace(kl_coefficient=_adapted(config, state, info["kl"]))
        return state, info | {
            "explained_variance": explained_variance(
                estimate.targets, estimate.values, trajectories.mask
            ),
            "kl_coefficient": state.kl_coefficient,
            "non_finite_batch": count_non_finite_decisions(
                trajectories, estimate.advantages
            ),
            "non_finite_params": count_non_finite((state.params, state.critic.params)),
        }

    return Algorithm(
        init,
        update,
        Segments(config.num_steps),
        actor_with_critic(task.policy, critic),
        lambda state: acting_params(task, state.params, state.critic.params),
    )


def _optimizers(config: PPOConfig, task: Task) -> tuple[Any, Any]:
    steps = None
    if config.anneal and task.num_updates is not None:
        steps = task.num_updates * config.num_epochs * config.num_minibatches
    norm = config.max_grad_norm
    return (
        make_optimizer(
            config.learning_rate,
            max_grad_norm=norm,
            anneal_over=steps,
            adapt_to_kl=config.adapt_to_kl,
        ),
        make_optimizer(
            config.critic_learning_rate, max_grad_norm=norm, anneal_over=steps
        ),
    )


def _batch(config: PPOConfig, rows: Trajectory, estimate: Advantages) -> Batch:
    advantages = estimate.advantages
    if config.standardize == "batch":
        advantages = standardize(advantages, rows.mask)
    return Batch(
        rows._replace(next_obs=None), advantages, estimate.targets, estimate.values
    )


def _standardized(config: PPOConfig, minibatches: Batch) -> Batch:
    """All minibatches of an epoch, [groups, M, ...], each by itself."""
    if config.standardize != "minibatch":
        return minibatches
    each = jax.vmap(standardize, in_axes=1, out_axes=1)
    advantages = each(minibatches.advantages, minibatches.rows.mask)
    return minibatches._replace(advantages=advantages)


def _gradients(
    config: PPOConfig,
    task: Task,
    state: PPOState,
    batch: Batch,
    old: Params,
    key: PRNGKey,
) -> tuple[Params, Info]:
    """Sums over a minibatch: gradients of policy and critic, and what to report."""
    critic = needed_critic(task)

    def objective(learned: Params, shared: Any, chunk: Batch) -> tuple[Array, Info]:
        targets, coefficient, old, key = shared
        rows, mask = chunk.rows, chunk.rows.mask
        ours = policy_rows(critic, rows)
        distribution = over_rows(task.policy.unroll, learned["policy"], ours)
        log_probs = distribution.log_prob(rows.action)
        if config.form == "clip":
            gains = clipped_terms(
                log_probs,
                rows.log_prob,
                chunk.advantages,
                mask,
                epsilon=config.clip_eps,
            )
        else:
            kls = over_rows(task.policy.unroll, old, ours).kl(distribution)
            gains = kl_penalty_terms(
                log_probs,
                rows.log_prob,
                chunk.advantages,
                kls,
                mask,
                coefficient=coefficient,
            )
        entropy = jnp.sum(jnp.where(mask, entropy_of(distribution, key), 0.0))
        critic_loss = critic_terms(
            critic,
            learned["critic"],
            targets,
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
        learned, *rest = shared
        return jax.grad(objective, has_aux=True)(learned, rest, chunk)

    learned = {"policy": state.params, "critic": state.critic.params}
    chunks = Chunks(config.chunk_size, cut_rows=rows_cut(task))
    shared = (learned, state.critic.targets, state.kl_coefficient, old, key)
    return task.sum_over_rows(of_chunk, shared, batch, batch.rows.mask, chunks)


def _drift(config: PPOConfig, log_rhos: Array, mask: Array) -> Info:
    """Sums that say how far the policy has gone from the one that acted."""
    log_rhos = jax.lax.stop_gradient(jnp.where(mask, log_rhos, 0.0))
    rhos_less_one = jnp.expm1(jnp.clip(log_rhos, -20.0, 20.0))
    clipped = mask & (jnp.abs(rhos_less_one) > config.clip_eps)
    return {
        "kl": jnp.sum(rhos_less_one - log_rhos),
        "clip_fraction": jnp.sum(clipped).astype(float),
    }


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


def _summary(infos: Info) -> Info:
    """Means over the steps that were made; the KL is the largest mean of an epoch."""
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


def _adapted(config: PPOConfig, state: PPOState, kl: Array) -> Array:
    if config.form == "clip":
        return state.kl_coefficient
    above, below = kl > 1.5 * config.kl_target, kl < config.kl_target / 1.5
    factor = jnp.where(above, 2.0, jnp.where(below, 0.5, 1.0))
    # Held, for what has halved to 0 or doubled to infinity never comes back.
    first = jnp.asarray(config.kl_coefficient, float)
    return jnp.clip(state.kl_coefficient * factor, first / FURTHEST, first * FURTHEST)
