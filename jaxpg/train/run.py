"""A run on disk: one folder with everything that a later process needs.

    config.json            settings, versions and devices
    metrics.jsonl, .csv    one row per update and seed
    checkpoints/           the last few states and the best one
    learning_curve.png     return against environment steps
    evaluation.json        the evaluation at the end

Opening a run reads arrays and JSON and executes nothing from it. An environment or a
policy of your own is not stored; pass it again. Of several processes the first one
writes; the others need the folder only to resume, and then must see it too.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg import envs
from jaxpg.envs.base import Environment, with_time_limit
from jaxpg.networks import Network
from jaxpg.policies import Policy
from jaxpg.train.agreement import check_same, decide, wait_for_all
from jaxpg.train.checkpoint import CheckpointStore
from jaxpg.train.config import TrainConfig, config_from_json, config_to_json
from jaxpg.train.models import build_critic, build_policy
from jaxpg.train.program import (
    Program,
    TrainState,
    build_program,
    state_shardings,
)
from jaxpg.train.provenance import describe, read_header, write_json_atomically
from jaxpg.train.sharding import Placement, place, spread_out, usual_device_count
from jaxpg.types import Params

__all__ = [
    "SCHEMA",
    "Run",
    "create_run",
    "initial_seeds",
    "load_params",
    "open_run",
    "read_config",
    "read_stored",
    "restore_state",
    "store_config",
]

SCHEMA = 1


class Run(NamedTuple):
    """A run that can go on, be evaluated or be looked at.

    Attributes:
        folder: where it lives.
        config: its settings.
        env: its environment.
        policy: its policy.
        placement: how its rows are spread over devices.
        program: its compiled functions.
        checkpoints: its states.
        provenance: versions and devices that it was begun with.
    """

    folder: Path
    config: TrainConfig
    env: Environment
    policy: Policy
    placement: Placement
    program: Program
    checkpoints: CheckpointStore
    provenance: dict[str, Any]


def create_run(
    config: TrainConfig,
    env: Environment | None = None,
    policy: Policy | None = None,
    critic: Network | None = None,
) -> Run:
    """Make the folder of a new run.

    Args:
        config: its settings.
        env: overrides `config.env`.
        policy: overrides the default policy.
        critic: overrides the default critic.

    Returns:
        The run, before its first update.

    Raises:
        ValueError: if the settings do not fit together, or the folder exists already.
    """
    check_same("this run", config_to_json(config))
    config = dataclasses.replace(config, num_devices=_num_devices(config))
    if env is not None:
        config = dataclasses.replace(config, env=env.name)
    folder = config.runs_dir / decide(lambda: _new_name(config))
    provenance = describe()
    own = {"env": env, "policy": policy, "critic": critic}
    run = _assemble(folder, config, env, policy, critic, provenance)
    stored = {
        "schema": SCHEMA,
        "config": config_to_json(config),
        "provenance": provenance,
        "own": [name for name, x in own.items() if x is not None],
    }
    decide(lambda: _make_folder(folder, stored))
    return run


def _make_folder(folder: Path, stored: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    write_json_atomically(folder / "config.json", stored)


def open_run(
    folder: Path | str,
    env: Environment | None = None,
    policy: Policy | None = None,
    critic: Network | None = None,
    *,
    num_updates: int | None = None,
    num_devices: int | None = None,
) -> Run:
    """Open the folder of a run.

    Args:
        folder: as printed by training.
        env: the environment, where the run was made with one of your own.
        policy: the policy, where the run was made with one of your own.
        critic: the critic, where the run was made with one of your own.
        num_updates: a new length for the run; None keeps it.
        num_devices: devices to use now, over all processes; None for as many as
            before.

    Returns:
        The run as it was left.

    Raises:
        ValueError: if the folder holds no run, or one of another schema or version, or
            an environment, a policy or a critic of your own is missing.
    """
    folder = Path(folder)
    config, provenance = read_config(folder)
    _check_own(folder, {"env": env, "policy": policy, "critic": critic})
    if num_updates is not None:
        config = _lengthen(config, num_updates)
    if num_devices is not None:
        config = dataclasses.replace(config, num_devices=num_devices)
    return _assemble(folder, config, env, policy, critic, provenance)


def read_config(folder: Path | str) -> tuple[TrainConfig, dict[str, Any]]:
    """A run's settings, and the versions and devices that it was begun with.

    Raises:
        ValueError: if the folder holds no run, or one of another schema or version.
    """
    stored = _read(folder)
    return config_from_json(stored["config"]), stored["provenance"]


def store_config(run: Run) -> None:
    """Put a run's present settings in place of those that its folder holds."""
    stored = _read(run.folder) | {"config": config_to_json(run.config)}
    write_json_atomically(run.folder / "config.json", stored)


def _read(folder: Path | str) -> dict[str, Any]:
    stored = read_stored(folder)
    if "system" in stored:
        raise ValueError(
            f"{folder} holds a run of the system {stored['system']!r}, which has no "
            "environment and no policy; open it with jaxpg.systems.runs.open_run"
        )
    return stored


def read_stored(folder: Path | str) -> dict[str, Any]:
    """What the folder of any run says of itself, as plain JSON.

    Raises:
        ValueError: if the folder holds no run, or one of another schema.
    """
    return read_header(
        Path(folder) / "config.json",
        SCHEMA,
        f"{folder} holds no run (no config.json in it); give the folder that training "
        "printed, such as runs/NAME",
    )


def _check_own(folder: Path, given: dict[str, Any]) -> None:
    """Refuse to put defaults in the place of objects that no file can hold."""
    for name in _read(folder).get("own", ()):
        if given[name] is None:
            raise ValueError(
                f"{folder} was trained with {name} = an object of your own, which is "
                f"not stored; open it from Python and pass {name} again"
            )


def load_params(run: Run, which: str = "latest") -> tuple[int, list[Params]]:
    """The policy's parameters from a checkpoint, for each member.

    Args:
        run: an opened run.
        which: "latest", "best" or an update's number.

    Returns:
        The update that the checkpoint was made after, and one tree for each member.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    step = _find_step(run, which)
    params = _read_state(run, step).algorithm.params
    members = range(run.config.num_members)
    return step, [jax.tree.map(lambda x, m=m: x[m], params) for m in members]


def initial_seeds(config: TrainConfig) -> np.ndarray:
    """Every member's seed, [S]."""
    return np.array([member["seed"] for member in config.members()], np.int32)


def initial_state(run: Run) -> TrainState:
    """The state before the first update, placed on the run's devices."""
    init: Any = run.program.init
    seeds = initial_seeds(run.config)
    compiled = init.lower(seeds).compile()
    wait_for_all("the initial state is compiled")
    return compiled(seeds)


def restore_state(run: Run, step: int) -> TrainState:
    """The state after `step` updates, placed on the run's devices."""
    state = _read_state(run, step)
    return spread_out(state, state_shardings(state, run.placement))


def _read_state(run: Run, step: int) -> TrainState:
    """The state after `step` updates, whole and on no device in particular."""
    shapes = jax.eval_shape(run.program.init, initial_seeds(run.config))
    homeless = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    return run.checkpoints.restore(homeless, step)


def _assemble(
    folder: Path,
    config: TrainConfig,
    env: Environment | None,
    policy: Policy | None,
    critic: Network | None,
    provenance: dict[str, Any],
) -> Run:
    env = envs.make(config.env) if env is None else env
    if config.max_steps is not None:
        env = with_time_limit(env, config.max_steps)
    policy = build_policy(config, env) if policy is None else policy
    critic = build_critic(config, env) if critic is None else critic
    placement = place(config.num_devices or 1, num_envs=config.num_envs)
    return Run(
        folder,
        config,
        env,
        policy,
        placement,
        build_program(config, env, policy, critic, placement),
        CheckpointStore(folder / "checkpoints", config.keep_checkpoints),
        provenance,
    )


def _num_devices(config: TrainConfig) -> int:
    if config.num_devices is not None:
        return config.num_devices
    return usual_device_count(num_envs=config.num_envs)


def _new_name(config: TrainConfig) -> str:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    usual = f"{config.env}-{config.algorithm_name}-seed{config.seed}-{stamp}"
    name = config.name or usual
    folder = config.runs_dir / name
    if folder.exists():
        raise ValueError(
            f"run folder {folder} exists already; choose another --name, or continue "
            f"it with --resume {folder}"
        )
    return name


def _lengthen(config: TrainConfig, num_updates: int) -> TrainConfig:
    if getattr(config.algorithm, "anneal", False) and num_updates != config.num_updates:
        raise ValueError(
            f"num_updates is {num_updates}, but the run anneals its learning rate over "
            f"{config.num_updates} updates; needs the same number, or a new run"
        )
    return dataclasses.replace(config, num_updates=num_updates)


def _find_step(run: Run, which: str) -> int:
    steps = run.checkpoints.steps()
    if not steps:
        raise ValueError(
            f"run {run.folder} holds no checkpoint yet; train it for longer, or "
            f"continue it with --resume {run.folder}"
        )
    if which == "latest":
        return steps[-1]
    if which == "best":
        best = run.checkpoints.best_step()
        return steps[-1] if best is None else best
    if not which.isdigit() or int(which) not in steps:
        raise ValueError(
            f"checkpoint is {which!r}, needs latest, best or one of {steps}"
        )
    return int(which)
