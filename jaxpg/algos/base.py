"""An algorithm as a record of pure functions, in the manner of an Optax optimiser.

    init(key, obs) -> state
    update(key, state, trajectories) -> (state, info)

What the next update needs is state; what a person wants to see is info; they never
mix. A state is a NamedTuple with a field `params`, the policy's parameters. What the
world and the run are like comes in a `Task`, the settings in a frozen dataclass.

Estimators give ascent directions of J; the one minus sign of the library stands here,
where Optax, which descends, takes them over.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array

from jaxpg._checks import check_positive, check_range
from jaxpg._flat import as_vectors, on_vectors
from jaxpg.chunks import MapRows, SumOverRows, map_plainly, sum_over_chunks
from jaxpg.envs.base import Environment, Space
from jaxpg.episodes import EndedEpisodes, split_episodes
from jaxpg.networks import Network
from jaxpg.policies import Policy
from jaxpg.rollout import RolloutState
from jaxpg.trust_region import scale_by_kl
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "Algorithm",
    "AlgorithmState",
    "Episodes",
    "Info",
    "Replay",
    "Replayed",
    "Segments",
    "Task",
    "ascend",
    "check_anneal",
    "check_steps",
    "make_optimizer",
    "make_task",
    "needed_max_steps",
    "single_episodes",
]

Info = dict[str, Array]
"""Scalars for people, by name."""


class AlgorithmState(NamedTuple):
    """Everything that the next update of an algorithm without a critic needs.

    Attributes:
        params: the policy's parameters.
        opt_state: the Optax optimiser's state.
        baseline_state: what the baseline has learned; () where it learns nothing.
        kl: KL that the last update made, in nats, where the rate adapts to it; 0 before
            the first one, () where nothing adapts.
    """

    params: Params
    opt_state: PyTree
    baseline_state: PyTree
    kl: Array | tuple[()] = ()


class Episodes(NamedTuple):
    """An algorithm that wants whole episodes, from `rollout_episodes`.

    Attributes:
        per_env: episodes for each environment and update.
    """

    per_env: int


class Segments(NamedTuple):
    """An algorithm that wants continuing segments, from `rollout_segments`.

    Attributes:
        num_steps: decisions of each environment for an update.
    """

    num_steps: int


class Task(NamedTuple):
    """What an algorithm must know of the policy, the world and the run.

    Attributes:
        policy: the policy that is trained.
        observation_space: what it sees.
        max_steps: the most decisions that an episode can take; None without a bound.
        critic: the network of a value function; None for algorithms without one.
        num_updates: length of the run, where a learning rate is to be annealed.
        tells_truncation: whether the world tells time limits from true ends.
        sum_over_rows: how sums over rows are taken; `jaxpg.train.sharding` has one for
            several devices.
        map_rows: how work on each row for itself is done; likewise.
        env_name: how errors call the world.
        num_rows: rows of a batch of segments, where they are known beforehand: settings
            that do not fit them are then refused before anything runs.
        num_devices: how many devices share them.
    """

    policy: Policy
    observation_space: Space
    max_steps: int | None
    critic: Network | None = None
    num_updates: int | None = None
    tells_truncation: bool = True
    sum_over_rows: SumOverRows = sum_over_chunks
    map_rows: MapRows = map_plainly
    env_name: str = "the environment"
    num_rows: int | None = None
    num_devices: int = 1


class Replay(NamedTuple):
    """Segments that are played again wherever they are looked at, and never stored.

    Attributes:
        params: of the actor that plays.
        key: the key that all episodes derive from.
        slots: what the segments continue, [B].
        play: `play(params, key, slots) -> (rows, slots after them)`, of any of the
            slots.
    """

    params: Params
    key: PRNGKey
    slots: RolloutState
    play: Callable[[Params, PRNGKey, RolloutState], tuple[Trajectory, RolloutState]]


class Replayed(NamedTuple):
    """What must be kept of segments that were not stored.

    Attributes:
        after: the slots after the segments.
        episodes: sums over the episodes that ended in them.
    """

    after: RolloutState
    episodes: EndedEpisodes


class Algorithm(NamedTuple):
    """A learning algorithm as a record of pure functions.

    Attributes:
        init: the first state, from one observation.
        update: one update from one batch of trajectories.
        collects: whether it wants whole episodes or segments, and how many.
        actor: the policy that must collect them: the one that learns, that one with a
            critic's memory beside its own, or another's.
        actor_params: `actor_params(state)`: the parameters to collect with.
        min_trajectories: the fewest trajectories that an update makes sense for.
        update_replayed: `update_replayed(key, state, replay) -> (state, info, kept)`,
            which takes the place of `update` where it is given: it plays segments
            again in place of storing them, and takes in what was observed by itself.
    """

    init: Callable[[PRNGKey, PyTree], Any]
    update: Callable[[PRNGKey, Any, Trajectory], tuple[Any, Info]]
    collects: Episodes | Segments
    actor: Policy
    actor_params: Callable[[Any], Params]
    min_trajectories: int = 1
    update_replayed: (
        Callable[[PRNGKey, Any, Replay], tuple[Any, Info, Replayed]] | None
    ) = None


def make_task(env: Environment, policy: Policy, **changes: Any) -> Task:
    """The task of training `policy` in `env`.

    Args:
        env: gives the spaces and the bounds.
        policy: the policy that is trained.
        **changes: other fields of `Task`, such as `critic` or `num_updates`.

    Returns:
        The task, on one device unless `changes` say otherwise.

    >>> from jaxpg.envs.probes import constant_reward
    >>> from jaxpg.policies import mlp_policy
    >>> env = constant_reward()
    >>> policy = mlp_policy(env.observation_space, env.action_space, hidden=(4,))
    >>> make_task(env, policy, num_updates=10).max_steps
    1
    """
    task = Task(
        policy,
        env.observation_space,
        env.max_steps,
        tells_truncation=env.tells_truncation,
        env_name=env.name,
    )
    return task._replace(**changes)


def single_episodes(task: Task, trajectories: Trajectory, max_steps: int) -> Trajectory:
    """One episode per row, each device splitting its own rows.

    Args:
        task: gives how rows are spread.
        trajectories: rows of whole episodes, packed or not.
        max_steps: the most decisions that an episode can take.

    Returns:
        Rows of at most `max_steps` slots; those of one episode stay as they are.
    """
    if trajectories.mask.shape[1] <= max_steps:
        return trajectories

    def split(_: Any, rows: Trajectory) -> Trajectory:
        num_rows, length = rows.mask.shape
        return split_episodes(rows, num_rows * (length // max_steps), max_steps)

    return task.map_rows(split, (), trajectories)


def ascend(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    opt_state: PyTree,
    params: Params,
    **extra: Any,
) -> tuple[Params, PyTree]:
    """One Optax step UP the gradient of J.

    Args:
        optimizer: any Optax transformation; it sees minus the gradient.
        gradient: an ascent direction, a tree like `params`.
        opt_state: the optimiser's state.
        params: where the gradient was taken.
        **extra: what transformations with extra arguments need.

    Returns:
        The next parameters and the next optimiser state.

    >>> import jax.numpy as jnp
    >>> sgd, params = optax.sgd(0.5), jnp.array(1.0)
    >>> ascend(sgd, jnp.array(2.0), sgd.init(params), params)[0].item()
    2.0
    """
    vectors, back = as_vectors(gradient)
    descent = back([-x for x in vectors])
    optimizer = optax.with_extra_args_support(optimizer)
    # Optax mixes types: strict promotion, where a caller has set it, is not for it.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(descent, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state


def needed_max_steps(task: Task) -> int:
    """The bound of the task's episodes.

    Raises:
        ValueError: if there is none.
    """
    if task.max_steps is None:
        raise ValueError(
            f"{task.env_name} has no time limit, so whole episodes may never end; give "
            "--max-steps, or wrap it in with_time_limit"
        )
    return task.max_steps


def check_anneal(config: Any, task: Task) -> None:
    """Refuse to anneal over a run of unknown length.

    Raises:
        ValueError: if `config.anneal` is set and the task has no number of updates.
    """
    if config.anneal and task.num_updates is None:
        raise ValueError(
            "anneal is set, but num_updates is None; needs the length of the run"
        )


def check_steps(config: Any) -> None:
    """Check the settings that every algorithm has under the same name, where it has.

    Raises:
        ValueError: naming the setting that is out of its range.
    """
    for name in (
        "learning_rate",
        "critic_learning_rate",
        "max_grad_norm",
        "adapt_to_kl",
    ):
        if getattr(config, name, None) is not None:
            check_range(name, getattr(config, name), 0.0, open_low=True)
    for name in ("num_steps", "episodes_per_env", "num_epochs", "chunk_size"):
        if getattr(config, name, None) not in (None, "auto"):
            check_positive(name, getattr(config, name))
    for name in ("discount", "lambda_"):
        if getattr(config, name, None) is not None:
            check_range(name, getattr(config, name), 0.0, 1.0)


def make_optimizer(
    learning_rate: float | Array,
    *,
    max_grad_norm: float | None = None,
    anneal_over: int | None = None,
    adapt_to_kl: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam after clipping of the global norm.

    Args:
        learning_rate: step size.
        max_grad_norm: the gradient is scaled down to this global norm; None leaves it.
        anneal_over: steps over which the rate falls linearly to zero; None keeps it.
        adapt_to_kl: let the rate follow the KL of updates, to stay at this, in nats;
            `update` then needs `kl`.

    Returns:
        An Optax transformation with extra arguments.
    """
    parts: list[Any] = []
    if max_grad_norm is not None:
        parts.append(optax.clip_by_global_norm(max_grad_norm))
    parts.append(optax.scale_by_adam())
    if adapt_to_kl is not None:
        parts.append(scale_by_kl(adapt_to_kl))
    if anneal_over is None:
        parts.append(optax.scale_by_learning_rate(learning_rate))
    else:
        schedule = optax.linear_schedule(1.0, 0.0, anneal_over)
        parts += [
            optax.scale_by_schedule(schedule),
            optax.scale_by_learning_rate(learning_rate),
        ]
    return on_vectors(optax.chain(*parts))
