r"""PPO: epochs of minibatch steps on one batch of segments, held near who acted.

    clip:        maximise mean min(rho A, clip(rho, 1 - eps, 1 + eps) A) + c H
    kl-penalty:  maximise mean rho A - beta KL(old || new) + c H

rho = pi / pi_old of the decision alone, A by GAE, H the policy's entropy; means are
over the decisions of a minibatch. The critic descends its own loss beside. beta follows
the KL that an update makes: doubled above 1.5 times its target, halved below 1 / 1.5.

The batch is stored, or, with `replay_envs`, played again wherever it is looked at.

Reference: Schulman, Wolski, Dhariwal, Radford and Klimov 2017, "Proximal policy
optimization algorithms"; Andrychowicz et al. 2021 for the defaults.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg.advantages import standardize
from jaxpg.algos.base import (
    Algorithm,
    Info,
    Replay,
    Replayed,
    Segments,
    Task,
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
from jaxpg.algos.ppo_settings import PPOConfig
from jaxpg.algos.ppo_steps import (
    Batch,
    Optimizers,
    PPOState,
    Sum,
    adapted_coefficient,
    make_step,
    sum_over_batch,
    summary,
)
from jaxpg.algos.replay import (
    Survey,
    alone,
    standardized_by,
    sum_over_replay,
    survey,
)
from jaxpg.algos.segments import (
    acting_params,
    advantages_of,
    check_segments,
    needed_critic,
    rows_cut,
)
from jaxpg.critics import (
    CriticState,
    actor_with_critic,
    follow_moments,
    follow_targets,
    init_critic,
)
from jaxpg.moments import variance
from jaxpg.normalizers import observe_moments_in
from jaxpg.types import PRNGKey, PyTree, Trajectory

__all__ = ["PPOConfig", "PPOState", "ppo"]


def ppo(config: PPOConfig, task: Task) -> Algorithm:
    """PPO as a record of pure functions.

    Args:
        config: its settings.
        task: the policy, the world, and a critic.

    Returns:
        An algorithm whose `update` takes segments with `next_obs`; with `replay_envs`
        one with `update_replayed`, which takes a `Replay`.

    Raises:
        ValueError: if there is no critic, if the learning rate is to be annealed over a
            run of unknown length, if the world cannot tell time limits from true ends
            and bootstrapping is asked for, or if minibatches do not divide the batch
            (in the first update, where the task does not say how many rows it has).
    """
    check_segments(config, task)
    critic = needed_critic(task)
    cut_rows = rows_cut(task) and config.replay_envs is None
    check_minibatches(task, config.num_steps, config.num_minibatches, cut_rows=cut_rows)
    optimizers = _optimizers(config, task)

    def init(key: PRNGKey, obs: PyTree) -> PPOState:
        key_policy, key_critic = jax.random.split(key)
        params = task.policy.init(key_policy, obs)
        return PPOState(
            params,
            optimizers.policy.init(params),
            init_critic(critic, optimizers.critic, key_critic, obs),
            jnp.asarray(config.kl_coefficient, float),
        )

    def epochs(
        key: PRNGKey,
        state: PPOState,
        batch: PyTree,
        sum_over: Sum,
        prepare: Callable[[PyTree], PyTree],
    ) -> tuple[PPOState, Info]:
        num_rows = jax.tree.leaves(batch)[0].shape[0]
        (state, _), infos = over_minibatches(
            make_step(config, optimizers, sum_over, state.params),
            (state, jnp.ones((), bool)),
            key,
            plan_minibatches(
                num_rows, config.num_steps, config.num_minibatches, cut_rows=cut_rows
            ),
            batch,
            config.num_epochs,
            task.map_rows,
            prepare,
        )
        info = summary(infos)
        coefficient = adapted_coefficient(config, state, info["kl"])
        info["kl_coefficient"] = coefficient
        learned = (state.params, state.critic.params)
        info["non_finite_params"] = count_non_finite(learned)
        return state._replace(kl_coefficient=coefficient), info

    def update(
        key: PRNGKey, state: PPOState, trajectories: Trajectory
    ) -> tuple[PPOState, Info]:
        estimate = advantages_of(config, task, state.critic, trajectories)
        mask = trajectories.mask
        state = state._replace(
            critic=follow_targets(state.critic, estimate.targets, mask)
        )
        batch = Batch(trajectories._replace(next_obs=None), *estimate)
        if config.standardize == "batch":
            batch = batch._replace(advantages=standardize(batch.advantages, mask))
        state, info = epochs(
            key,
            state,
            batch,
            lambda shared, minibatch: sum_over_batch(config, task, shared, minibatch),
            lambda minibatches: _standardized(config, minibatches),
        )
        return state, info | {
            "explained_variance": explained_variance(
                estimate.targets, estimate.values, mask
            ),
            "non_finite_batch": count_non_finite_decisions(
                trajectories, estimate.advantages
            ),
        }

    def update_replayed(
        key: PRNGKey, state: PPOState, replay: Replay
    ) -> tuple[PPOState, Info, Replayed]:
        asked, seen_by = state.critic, (state.params, state.critic.params)
        at_once = _rows_at_once(config, task, replay)
        kept, found = survey(config, task, asked, replay, seen_by, rows_at_once=at_once)
        state = state._replace(critic=_followed(state.critic, found))
        state, info = epochs(
            key,
            state,
            replay.slots,
            _sum_over_slots(config, task, asked, replay, found),
            lambda minibatches: minibatches,
        )
        learned = (state.params, state.critic.params)
        params, critic_params = observe_moments_in(learned, found.observations)
        state = state._replace(
            params=params, critic=state.critic._replace(params=critic_params)
        )
        told = {
            "explained_variance": _explained(found),
            "non_finite_batch": found.num_non_finite,
        }
        return state, info | told, kept

    return Algorithm(
        init,
        update,
        Segments(config.num_steps),
        actor_with_critic(task.policy, critic),
        lambda state: acting_params(task, state.params, state.critic.params),
        update_replayed=None if config.replay_envs is None else update_replayed,
    )


def _optimizers(config: PPOConfig, task: Task) -> Optimizers:
    steps = None
    if config.anneal and task.num_updates is not None:
        steps = task.num_updates * config.num_epochs * config.num_minibatches
    norm = config.max_grad_norm
    return Optimizers(
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


def _standardized(config: PPOConfig, minibatches: Batch) -> Batch:
    """All minibatches of an epoch, [groups, M, ...], each by itself."""
    if config.standardize != "minibatch":
        return minibatches
    each = jax.vmap(standardize, in_axes=1, out_axes=1)
    advantages = each(minibatches.advantages, minibatches.rows.mask)
    return minibatches._replace(advantages=advantages)


def _rows_at_once(config: PPOConfig, task: Task, replay: Replay) -> int:
    """As many as are asked for, and no more than a device has of a minibatch."""
    share = replay.slots.stride.shape[0] // (task.num_devices * config.num_minibatches)
    return max(1, min(config.replay_envs or 1, share))


def _sum_over_slots(
    config: PPOConfig, task: Task, critic: CriticState, replay: Replay, found: Survey
) -> Sum:
    """How a minibatch of slots is summed over, by playing their rows again."""
    here, at_once = alone(task), _rows_at_once(config, task, replay)

    def of_rows(shared: Any, rows: Trajectory) -> Any:
        critic, found, shared = shared
        estimate = advantages_of(config, here, critic, rows)
        batch = Batch(rows._replace(next_obs=None), *estimate)
        if config.standardize == "batch":
            advantages = standardized_by(found, batch.advantages)
            batch = batch._replace(advantages=advantages)
        return sum_over_batch(config, here, shared, batch)

    def sum_over(shared: Any, slots: Any) -> Any:
        return sum_over_replay(
            task,
            of_rows,
            (critic, found, shared),
            replay._replace(slots=slots),
            rows_at_once=at_once,
        )

    return sum_over


def _followed(critic: CriticState, found: Survey) -> CriticState:
    targets = found.targets
    mean = targets.mean + targets.mean_rest
    return follow_moments(critic, mean, variance(targets, ddof=0))


def _explained(found: Survey) -> Array:
    """`explained_variance`, of a survey."""
    varying, left = (variance(x, ddof=0) for x in (found.targets, found.errors))
    some = varying > 0.0
    return jnp.where(some, 1.0 - left / jnp.where(some, varying, 1.0), 0.0)
