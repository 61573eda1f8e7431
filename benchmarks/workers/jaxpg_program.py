"""jaxpg itself: the program that `jaxpg train` runs, with the peers' settings."""

import tempfile
import time
from pathlib import Path
from typing import Any

import protocol

HELD = 1e-12
"""A learning rate at which a policy stays as it is."""


def build(work: protocol.Work) -> protocol.Job:
    """PPO, A2C ("one-step") or REINFORCE without a critic ("reinforce...")."""
    import jax

    jax.config.update("jax_num_cpu_devices", work.num_devices)
    import numpy as np

    from jaxpg.algos.reinforce import ReinforceConfig
    from jaxpg.train.config import TrainConfig
    from jaxpg.train.run import create_run, initial_state

    def make(seed: int, settings: Any = None) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                env=work.env,
                seed=seed,
                num_envs=work.num_envs,
                num_updates=work.num_updates,
                num_devices=work.num_devices,
                algorithm=settings or algorithm(work),
                runs_dir=Path(folder),
                name="run",
            )
            return create_run(config)

    run = make(0)
    state = initial_state(run)
    began = time.perf_counter()
    advance = run.program.advance.lower(state, np.int32(1)).compile()
    seconds = time.perf_counter() - began

    def learn(seed: int) -> list[float | None]:
        return _learn(advance, initial_state(make(seed)), work.num_updates)

    if work.method == "reinforce-trained":
        other = make(0, ReinforceConfig())
        params = _trained(other.program.advance, initial_state(other))
        state = state._replace(algorithm=state.algorithm._replace(params=params))
    num_steps = 0

    def again() -> None:
        nonlocal state, num_steps
        state, metrics = advance(state, np.int32(work.num_updates))
        num_steps = int(metrics["num_steps"][: work.num_updates].sum())

    packages = ("jax", "flax", "gymnax")
    return protocol.Job(seconds, again, learn, packages, lambda: num_steps)


def algorithm(work: protocol.Work) -> Any:
    """Settings that do the peers' work."""
    from jaxpg.algos.a2c import A2CConfig
    from jaxpg.algos.ppo import PPOConfig
    from jaxpg.algos.reinforce import ReinforceConfig

    if work.method == "reinforce":
        return ReinforceConfig(learning_rate=work.learning_rate, anneal=True)
    if work.method == "reinforce-trained":
        return ReinforceConfig(learning_rate=HELD)
    shared: dict[str, Any] = {
        "num_steps": work.num_steps,
        "learning_rate": work.learning_rate,
        "critic_learning_rate": work.learning_rate,
        "entropy_coefficient": 0.01,
        "anneal": True,
    }
    if work.method == "one-step":
        return A2CConfig(critic_epochs=1, **shared)
    epochs = {"num_epochs": work.num_epochs, "num_minibatches": work.num_minibatches}
    return PPOConfig(**epochs, **shared)


def _trained(advance: Any, state: Any) -> Any:
    """Parameters on the way up: where all episodes take 500 steps no weight is left."""
    import numpy as np

    for _ in range(500):
        state, metrics = advance(state, np.int32(1))
        if metrics["mean_length"][0, 0] > 250:
            return state.algorithm.params
    raise RuntimeError("the policy has not learned to make long episodes")


def _learn(advance: Any, state: Any, num_updates: int) -> list[float | None]:
    import numpy as np

    found: list[float | None] = []
    while len(found) < num_updates:
        count = min(64, num_updates - len(found))
        state, metrics = advance(state, np.int32(count))
        means = np.asarray(metrics["mean_return"])[:count, 0]
        found += [float(x) if np.isfinite(x) else None for x in means]
    return found


if __name__ == "__main__":
    protocol.serve(build)
