"""PureJaxRL's PPO, from the checkout that PUREJAXRL names."""

import time

import protocol


def build(work: protocol.Work) -> protocol.Job:
    """Its `make_train` for discrete actions, one epoch and minibatch for one step."""
    import jax
    import numpy as np

    # Its wrappers import these two, which gymnax environments do not need.
    protocol.stand_in("brax", envs=None)
    protocol.stand_in("brax.envs")
    protocol.stand_in("brax.envs.wrappers")
    unused = {"EpisodeWrapper": None, "AutoResetWrapper": None}
    protocol.stand_in("brax.envs.wrappers.training", **unused)
    protocol.stand_in("navix")
    protocol.make_old_gymnax()
    protocol.checkout("PUREJAXRL", "purejaxrl")
    import ppo

    once = work.method == "one-step"
    settings = {
        "LR": work.learning_rate,
        "NUM_ENVS": work.num_envs,
        "NUM_STEPS": work.num_steps,
        "TOTAL_TIMESTEPS": work.num_updates * work.steps_per_update,
        "UPDATE_EPOCHS": 1 if once else work.num_epochs,
        "NUM_MINIBATCHES": 1 if once else work.num_minibatches,
        "GAMMA": 0.99,
        "GAE_LAMBDA": 0.95,
        "CLIP_EPS": 0.2,
        "ENT_COEF": 0.01,
        "VF_COEF": 0.5,
        "MAX_GRAD_NORM": 0.5,
        "ACTIVATION": "tanh",
        "ENV_NAME": work.env,
        "ANNEAL_LR": True,
        "DEBUG": False,
    }
    train = ppo.make_train(settings)

    def returns(key: jax.Array) -> dict[str, jax.Array]:
        info = train(key)["metrics"]
        names = ("returned_episode_returns", "returned_episode")
        return {name: info[name] for name in names}

    began = time.perf_counter()
    compiled = jax.jit(train).lower(jax.random.PRNGKey(0)).compile()
    seconds = time.perf_counter() - began

    def learn(seed: int) -> list[float | None]:
        info = jax.jit(returns)(jax.random.PRNGKey(seed))
        values = np.asarray(info["returned_episode_returns"])
        ended = np.asarray(info["returned_episode"])
        pairs = zip(values, ended, strict=True)
        return [protocol.mean_or_none(x, where) for x, where in pairs]

    return protocol.Job(
        seconds,
        lambda: jax.block_until_ready(compiled(jax.random.PRNGKey(1))),
        learn,
        ("jax", "flax", "gymnax"),
    )


if __name__ == "__main__":
    protocol.serve(build)
