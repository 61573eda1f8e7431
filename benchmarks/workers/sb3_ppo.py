"""Stable-Baselines3's PPO and A2C on Gymnasium's environments, from its package."""

import time
from typing import Any

import protocol


def build(work: protocol.Work) -> protocol.Job:
    """Its vectorised environments in one process, torch on CPU; nothing compiles."""
    import stable_baselines3 as sb3
    from stable_baselines3.common.env_util import make_vec_env

    total = work.num_updates * work.steps_per_update

    def make(seed: int) -> Any:
        env = make_vec_env(work.env, n_envs=work.num_envs)
        shared = {
            "n_steps": work.num_steps,
            "learning_rate": lambda left: left * work.learning_rate,
            "ent_coef": 0.01,
            "gae_lambda": 0.95,
            "device": "cpu",
            "seed": seed,
        }
        if work.method == "one-step":
            return sb3.A2C("MlpPolicy", env, use_rms_prop=False, **shared)
        size = work.steps_per_update // work.num_minibatches
        epochs = {"n_epochs": work.num_epochs, "batch_size": size}
        return sb3.PPO("MlpPolicy", env, **epochs, **shared)

    began = time.perf_counter()
    model = make(0)
    seconds = time.perf_counter() - began

    def learn(seed: int) -> list[float | None]:
        return _learn(make(seed), total)

    return protocol.Job(
        seconds,
        lambda: model.learn(total),
        learn,
        ("stable-baselines3", "torch", "gymnasium"),
    )


def _learn(model: Any, total: int) -> list[float | None]:
    from stable_baselines3.common.callbacks import BaseCallback

    class Returns(BaseCallback):
        """Mean return of the episodes that ended in each rollout."""

        def __init__(self) -> None:
            super().__init__()
            self.ended: list[float] = []
            self.means: list[float | None] = []

        def _on_step(self) -> bool:
            infos = self.locals["infos"]
            self.ended += [x["episode"]["r"] for x in infos if "episode" in x]
            return True

        def _on_rollout_end(self) -> None:
            mean = sum(self.ended) / len(self.ended) if self.ended else None
            self.means.append(mean)
            self.ended = []

    returns = Returns()
    model.learn(total, callback=returns)
    return returns.means


if __name__ == "__main__":
    protocol.serve(build)
