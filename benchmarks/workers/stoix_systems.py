"""Stoix's Anakin ff_ppo and ff_reinforce, from the checkout that STOIX names."""

import importlib
import os
import time
from typing import Any

import protocol

SYSTEMS = {
    "ppo": ("ppo.anakin", "ff_ppo"),
    "one-step": ("vpg", "ff_reinforce"),
    "reinforce": ("vpg", "ff_reinforce"),
    "reinforce-trained": ("vpg", "ff_reinforce"),
}


def build(work: protocol.Work) -> protocol.Job:
    """Its own settings, environment stack and learner, without logger and evaluator."""
    root = protocol.checkout("STOIX")
    os.chdir(root)
    protocol.stand_in("stoix.utils.logger", LogEvent=None, StoixLogger=None)
    import jax

    package, system = SYSTEMS[work.method]
    module = importlib.import_module(f"stoix.systems.{package}.{system}")
    settings = _settings(root, system, work)

    def start(seed: int) -> tuple[Any, Any]:
        from stoix.utils import make_env

        env, _ = make_env.make(config=settings)
        keys = tuple(jax.random.split(jax.random.PRNGKey(seed), 3))
        learn, _, state = module.learner_setup(env, keys, settings)
        return learn, state

    learn, state = start(0)
    began = time.perf_counter()
    compiled = learn.lower(state).compile()
    seconds = time.perf_counter() - began

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state)).learner_state

    def returns(seed: int) -> list[float | None]:
        return _returns(compiled(start(seed)[1]), work.num_updates)

    packages = ("jax", "flax", "gymnax", "stoa-env")
    return protocol.Job(seconds, run, returns, packages)


def _settings(root: str, system: str, work: protocol.Work) -> Any:
    import jax
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from stoix.utils.total_timestep_checker import check_total_timesteps

    changes = [
        f"arch.total_num_envs={work.num_envs}",
        "arch.total_timesteps=null",
        f"arch.num_updates={work.num_updates}",
        "arch.num_evaluation=1",
        f"system.rollout_length={work.num_steps}",
        f"system.actor_lr={work.learning_rate}",
        f"system.critic_lr={work.learning_rate}",
        "system.ent_coef=0.01",
        "system.decay_learning_rates=True",
    ]
    for network in ("actor_network", "critic_network"):
        changes.append(f"network.{network}.pre_torso.layer_sizes=[64,64]")
        changes.append(f"network.{network}.pre_torso.activation=tanh")
    if work.method == "ppo":
        changes.append(f"system.epochs={work.num_epochs}")
        changes.append(f"system.num_minibatches={work.num_minibatches}")
    folder = os.path.join(root, "stoix/configs/default/anakin")
    with initialize_config_dir(folder, version_base="1.2"):
        settings = compose(f"default_{system}.yaml", overrides=changes)
    OmegaConf.set_struct(settings, False)
    settings.num_devices = len(jax.devices())
    return check_total_timesteps(settings)


def _returns(output: Any, num_updates: int) -> list[float | None]:
    import numpy as np

    metrics = output.episode_metrics
    ended = np.asarray(metrics["is_terminal_step"])
    values = np.asarray(metrics["episode_return"])
    # The axis of updates is the one of that length; all others are averaged over.
    axis = list(ended.shape).index(num_updates)
    ended, values = (np.moveaxis(x, axis, 0) for x in (ended, values))
    pairs = zip(values, ended, strict=True)
    return [protocol.mean_or_none(x, where) for x, where in pairs]


if __name__ == "__main__":
    protocol.serve(build)
