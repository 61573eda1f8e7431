"""rejax's PPO, from its package; it has no algorithm of one step on a batch."""

import time
from typing import Any

import protocol

EVALUATIONS = 30


def build(work: protocol.Work) -> protocol.Job:
    """Its own `train`; evaluation is left out of what is timed."""
    import jax

    protocol.make_old_gymnax()
    import rejax

    total = work.num_updates * work.steps_per_update
    algo = rejax.get_algo("ppo").create(
        env=work.env,
        agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
        num_envs=work.num_envs,
        num_steps=work.num_steps,
        num_epochs=work.num_epochs,
        num_minibatches=work.num_minibatches,
        learning_rate=work.learning_rate,
        max_grad_norm=0.5,
        ent_coef=0.01,
        total_timesteps=total,
        eval_freq=total,
        gamma=0.99,
        skip_initial_evaluation=True,
    )
    timed = algo.replace(eval_callback=lambda *arguments: ())
    began = time.perf_counter()
    train = jax.jit(timed.train).lower(jax.random.PRNGKey(0)).compile()
    seconds = time.perf_counter() - began

    def learn(seed: int) -> list[float | None]:
        return _learn(algo, work, seed)

    return protocol.Job(
        seconds,
        lambda: jax.block_until_ready(train(jax.random.PRNGKey(1))),
        learn,
        ("rejax", "jax", "flax", "gymnax"),
    )


def _learn(algo: Any, work: protocol.Work, seed: int) -> list[float | None]:
    """Its evaluation's mean returns, the last one known at each update."""
    import jax
    import numpy as np

    every = max(1, work.num_updates // EVALUATIONS)
    evaluated = algo.replace(eval_freq=every * work.steps_per_update)
    _, (_, returns) = jax.jit(evaluated.train)(jax.random.PRNGKey(seed))
    means = np.asarray(returns).mean(axis=1)
    padded: list[float | None] = [None] * (every - 1)
    for mean in means:
        padded += [float(mean)] * every
    return padded[: work.num_updates]


if __name__ == "__main__":
    protocol.serve(build)
