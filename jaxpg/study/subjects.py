r"""What is studied: a policy in an environment, and who acts in its place.

    tabular worlds    mine, dark-mine, random-SEED, chain-HORIZON: exact gradient
    all others        whatever `jaxpg list envs` shows: a very large reference batch

A behaviour policy mu is the target pi with all parameters moved along one random
direction, as far as a KL(mu || pi) per decision asks for.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxpg import envs
from jaxpg._checks import check_positive, check_range, nearest
from jaxpg.envs.base import Environment, with_time_limit
from jaxpg.envs.tabular import (
    TabularMDP,
    canonical_mdp,
    canonical_pomdp,
    random_mdp,
    tabular_environment,
)
from jaxpg.policies import Policy, tabular_policy
from jaxpg.rollout import rollout_episodes
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.models import build_policy
from jaxpg.train.run import load_params, open_run
from jaxpg.train.tuned import tuned, tuned_pairs
from jaxpg.types import Params, PRNGKey, Trajectory

__all__ = [
    "TABULAR",
    "Subject",
    "drifted",
    "from_checkpoint",
    "fresh_subject",
    "mean_kl_of",
    "tabular_subject",
    "tabular_world",
    "usual_policy",
]

TABULAR = ("mine", "dark-mine", "random-SEED", "chain-HORIZON")
"""Worlds with an exact gradient, by name."""

KL_EPISODES = 64
BISECTIONS = 40


class Subject(NamedTuple):
    """A policy in an environment.

    Attributes:
        env: the world; it bounds its episodes.
        policy: the policy.
        params: of pi, whose gradient is asked about.
        behaviour: of mu, which acts for estimators with ratios; None where none does.
        mdp: the world's tables, where it has any.
        label: one line for titles.
    """

    env: Environment
    policy: Policy
    params: Params
    behaviour: Params | None
    mdp: TabularMDP | None
    label: str

    @property
    def max_steps(self) -> int:
        """The most decisions of an episode."""
        assert self.env.max_steps is not None
        return self.env.max_steps

    @property
    def num_parameters(self) -> int:
        """How many entries a gradient has."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    def blocks(self) -> dict[str, slice]:
        """Where each array of the parameters lies in a flat gradient, by its path."""
        found, start = {}, 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            name = "/".join(re.sub(r"[\[\]'.]", "", str(part)) for part in path)
            found[name or "parameters"] = slice(start, start + leaf.size)
            start += leaf.size
        return found


def tabular_world(name: str) -> TabularMDP | None:
    """The tables of a world of that name; None where it names no tabular world.

    Args:
        name: one of `TABULAR`, with a number in the place of the word in capitals.

    >>> tabular_world("mine").horizon, tabular_world("CartPole-v1")
    (3, None)
    """
    if name in ("mine", "dark-mine"):
        return canonical_mdp() if name == "mine" else canonical_pomdp()
    if match := re.fullmatch(r"random-(\d+)", name):
        return random_mdp(int(match[1]))
    if match := re.fullmatch(r"chain-(\d+)", name):
        horizon = int(match[1])
        check_positive("horizon of the chain", horizon)
        return random_mdp(1, horizon=horizon, num_terminal=0)
    return None


def fresh_subject(
    env: str,
    *,
    seed: int = 0,
    policy: PolicyConfig | None = None,
    max_steps: int | None = None,
) -> Subject:
    """A policy before any training.

    Args:
        env: name of a tabular world or an environment.
        seed: of the policy's parameters.
        policy: settings of its networks; None takes the usual ones.
        max_steps: truncate episodes after this many decisions.

    Raises:
        ValueError: if the name is unknown, or nothing bounds the episodes.
    """
    mdp = tabular_world(env)
    if mdp is not None:
        mdp = mdp if max_steps is None else mdp._replace(horizon=max_steps)
        return tabular_subject(mdp, seed=seed, label=env)
    known = [*TABULAR, *envs.names()]
    if env not in known:
        raise ValueError(f"env is {env!r}, unknown; {nearest(env, known)}")
    world = envs.make(env)
    world = world if max_steps is None else with_time_limit(world, max_steps)
    _check_bounded(world)
    settings = usual_policy(env) if policy is None else policy
    made = build_policy(TrainConfig(env=env, policy=settings), world)
    key_obs, key_params = jax.random.split(jax.random.key(seed))
    params = made.init(key_params, world.reset(key_obs)[1])
    return Subject(world, made, params, None, None, f"{env}, untrained policy")


def tabular_subject(mdp: TabularMDP, *, seed: int = 1, label: str = "") -> Subject:
    """A table of normal logits in a tabular world.

    Args:
        mdp: the world.
        seed: of the table.
        label: one line for titles.
    """
    env = tabular_environment(mdp)
    policy = tabular_policy(env.observation_space, env.action_space)  # type: ignore[arg-type]
    params = policy.init(jax.random.key(seed), jnp.zeros((), jnp.int32))
    return Subject(env, policy, params, None, mdp, label or "tabular world")


def from_checkpoint(
    run: Path, *, update: str = "latest", member: int = 0, max_steps: int | None = None
) -> Subject:
    """The policy of a run at any stage of its training that was kept.

    Args:
        run: the run's folder.
        update: "latest", "best" or an update's number.
        member: which of its seeds or swept settings.
        max_steps: truncate episodes after this many decisions.

    Raises:
        ValueError: if there is no such run, checkpoint or member.
    """
    opened = open_run(run, num_devices=1)
    step, trees = load_params(opened, update)
    check_range("member", member, 0, len(trees) - 1, cure="the run has no others")
    world = opened.env
    world = world if max_steps is None else with_time_limit(world, max_steps)
    _check_bounded(world)
    label = f"{world.name}, after {step} updates of {opened.config.algorithm_name}"
    params = jax.device_put(trees[member], jax.devices()[0])
    return Subject(world, opened.policy, params, None, None, label)


def usual_policy(env: str) -> PolicyConfig:
    """The networks that the library's own settings have for an environment.

    Args:
        env: its name.
    """
    if (env, "ppo") in tuned_pairs():
        return tuned(env, "ppo").policy
    return PolicyConfig(network="cnn" if "MinAtar" in env else "mlp")


def drifted(subject: Subject, kl: float, key: PRNGKey) -> Subject:
    """The same subject with a behaviour policy at a KL(mu || pi) per decision.

    Args:
        subject: its behaviour is replaced.
        kl: in nats, the mean over the states that pi meets; above 0.
        key: of the direction, and of the episodes that the KL is a mean over.

    Raises:
        ValueError: if the KL is not positive, or out of reach along the direction.
    """
    check_range("kl", kl, 0.0, open_low=True)
    key_direction, key_rows = jax.random.split(key)
    flat, unravel = ravel_pytree(subject.params)
    direction = jax.random.normal(key_direction, flat.shape, flat.dtype)
    direction = direction / jnp.linalg.norm(direction)
    kl_of = mean_kl_of(subject, key_rows)

    @jax.jit
    def kl_at(distance: Array) -> Array:
        return kl_of(unravel(flat + distance * direction))

    distance = _bisect(lambda x: float(kl_at(jnp.asarray(x, flat.dtype))), kl)
    behaviour = unravel(flat + jnp.asarray(distance, flat.dtype) * direction)
    return subject._replace(behaviour=behaviour)


def mean_kl_of(subject: Subject, key: PRNGKey) -> Callable[[Params], Array]:
    """`of(mu) -> KL(mu || pi)`, mean over decisions on the states that pi meets.

    Args:
        subject: gives pi.
        key: of the episodes.
    """
    ids = jnp.arange(KL_EPISODES, dtype=jnp.int32)
    rows = jax.jit(
        lambda params: rollout_episodes(subject.env, subject.policy, params, key, ids)
    )(subject.params)

    def of(behaviour: Params) -> Array:
        def of_row(row: Trajectory) -> Array:
            ours = subject.policy.unroll(behaviour, row)
            return ours.kl(subject.policy.unroll(subject.params, row))

        kls = jax.vmap(of_row)(rows)
        count = jnp.sum(rows.mask).astype(kls.dtype)
        return jnp.sum(jnp.where(rows.mask, kls, 0.0)) / count

    return of


def _bisect(kl_at: Callable[[float], float], kl: float) -> float:
    low, high = 0.0, 1e-3
    while kl_at(high) < kl:
        low, high = high, 2.0 * high
        if high > 1e6:
            raise ValueError(
                f"kl is {kl}, but no policy along the drawn direction is that far; "
                "ask for less, or give another seed"
            )
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kl_at(middle) < kl else (low, middle)
    return float(np.sqrt(max(low, 1e-300) * high)) if low > 0 else high


def _check_bounded(env: Environment) -> None:
    if env.max_steps is None:
        raise ValueError(
            f"environment {env.name} has no max_steps, so whole episodes may never "
            "end; give --max-steps"
        )
