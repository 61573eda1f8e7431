# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 9. What do more devices change?
#
# Trajectories are independent, so a batch is spread over devices by its rows and every
# device keeps a copy of the parameters. A gradient is a sum over rows: each device sums
# its own, and one exchange adds the sums,
#
# $$g = \frac1N \sum_{\text{devices}}\ \sum_{\text{own rows}} \sum_t w\,\nabla\log\pi .$$
#
# No accelerator is needed to see it: JAX can pretend that a CPU is several devices, if
# it is told before it starts. (On such devices it shows what changes and what does not,
# but no speed: they share the same cores.)

# %%
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxpg
from jaxpg import streams
from jaxpg.train.config import TrainConfig
from jaxpg.train.program import build_program
from jaxpg.train.sharding import place

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
device_counts = (1, 4) if quick else (1, 2, 4)
num_updates = 2 if quick else 15
batch_sizes = (128, 256) if quick else (256, 4096, 65536)
ways = ("batch at once", "streamed")
ways = ways if quick else (*ways, "batch, gradient in chunks")
print("at least four devices:", jax.device_count() >= 4)

# %% [markdown]
# ## The result does not change
#
# `place` spreads rows, `build_program` compiles a whole training run for it. An
# episode's random numbers belong to the episode and not to a device, so all devices
# together play the same episodes as one does; only the order in which a sum is rounded
# differs.

# %%
env = jaxpg.envs.make("CartPole-v1", max_steps=200)
policy = jaxpg.mlp_policy(env.observation_space, env.action_space, hidden=(32,))
config = TrainConfig(num_envs=16, num_updates=num_updates)


def compile_for(num_devices, config=config):
    """The state before a run, and one update as a compiled program."""
    placement = place(num_devices, num_envs=config.num_envs)
    program = build_program(config, env, policy, None, placement)
    state = program.init(jnp.zeros(1, jnp.int32))
    return state, program.advance.lower(state, 1).compile()


def run(state, update):
    """Parameters after the first update, flat, and the returns on the way."""
    returns = []
    for _ in range(num_updates):
        # One update after another: host devices share a few threads, and two programs
        # that wait for each other's exchanges could wait for ever.
        state, metrics = jax.block_until_ready(update(state, 1))
        returns.append(float(metrics["mean_return"][0, 0]))
        if len(returns) == 1:
            params = jax.device_get(state.algorithm.params)
    return jax.flatten_util.ravel_pytree(params)[0], returns


compiled = {n: compile_for(n) for n in device_counts}
several = device_counts[-1]
num_params = sum(x.size for x in jax.tree.leaves(compiled[1][0].algorithm.params))
runs = {n: run(*compiled[n]) for n in device_counts}

figure, axis = plt.subplots(figsize=(6, 3.2))
updates = np.arange(1, num_updates + 1)
for n, style in zip(device_counts[::-1], ("-", "--", "o"), strict=False):
    axis.plot(updates, runs[n][1], style, lw=2 + n, ms=4, label=f"devices: {n}")
axis.set_xlabel("update")
axis.set_ylabel("mean return (decisions)")
axis.legend()
plt.show()
for n in device_counts[1:]:
    gap = jnp.abs(runs[n][0] - runs[1][0]).max()
    print(f"{n} devices, after one update: parameters differ by at most {gap:.0e}")

# %% [markdown]
# The curves lie on each other. After one update the parameters differ by no more than
# rounding; over many updates such differences may grow, for one action that falls
# differently changes an episode.
#
# ## What must be exchanged
#
# The compiled program is there to be read. Every exchange between devices is an
# `all-reduce` in it.


# %%
def exchanges(text):
    """How many numbers each all-reduce of a compiled program adds up."""
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = [re.findall(r"\w\d+\[([\d,]*)\]", outputs) for outputs in found]
    return sorted(
        sum(int(np.prod([int(n) for n in x.split(",") if n])) for x in outputs)
        for outputs in shapes
    )


texts = {config.num_envs: compiled[several][1].as_text()}
if not quick:
    larger = TrainConfig(num_envs=64, num_updates=num_updates)
    texts[larger.num_envs] = compile_for(several, larger)[1].as_text()
for num_envs, text in texts.items():
    others = re.findall(r" (?:all-gather|all-to-all|collective-permute)\b.*\(", text)
    sizes = f"numbers in each all-reduce {exchanges(text)}"
    print(f"{num_envs} environments: {sizes}, other exchanges {len(others)}")
print(f"numbers in the policy: {num_params}")

num_episodes = config.num_envs * config.algorithm.episodes_per_env
rows = jax.eval_shape(
    lambda params, key: jaxpg.rollout_episodes(
        env, policy, params, key, jnp.arange(num_episodes), num_slots=config.num_envs
    ),
    policy.init(jax.random.key(0), jnp.zeros(4)),
    jax.random.key(1),
)
in_batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows))

figure, axis = plt.subplots(figsize=(6, 2))
heights = (in_batch / 1000, 4 * sum(exchanges(texts[config.num_envs])) / 1000)
axis.barh(("the batch, which stays", "what is exchanged"), heights, height=0.6)
axis.set_xlabel("kB in an update")
axis.set_ylabel(f"{several} devices")
plt.show()

# %% [markdown]
# The all-reduce with the policy's size (and a few numbers more) is the gradient. The
# largest one is the baseline's: what it must know of the whole batch, sums for every
# time step. The smallest are counts for the log. No size in the list depends on the
# number of environments or episodes, and the batch itself never moves: every device
# keeps the rows that it played.
#
# ## Memory that does not grow
#
# On one device, too, a sum over rows can be taken in parts. `Chunks` bounds what a
# gradient holds beside its batch, and `stream_gradient` does without the batch: it plays
# some episodes, adds their gradient, and forgets them. The compiler tells how much room
# each program needs, before anything runs.

# %%
estimator = jaxpg.make_estimator(
    jaxpg.EstimatorConfig(baseline="none"), policy, env.max_steps
)
params = policy.init(jax.random.key(0), jnp.zeros(4))
source = streams.episode_source(env, policy)


def stored(size):
    def gradient(params, key, ids):
        rows = source(params, key, ids)
        return jaxpg.estimate_gradient(
            estimator, params, (), rows, chunks=jaxpg.Chunks(size)
        )

    return gradient


def streamed(params, key, ids):
    return streams.stream_gradient(
        estimator, source, params, (), key, ids, chunk_size=128
    ).gradient


def megabytes(program):
    return program.memory_analysis().temp_size_in_bytes / 1e6


makers = {
    "batch at once": (stored(None), "o-"),
    "streamed": (streamed, "^:"),
    "batch, gradient in chunks": (stored(2048), "s--"),
}
key = jax.random.key(1)
programs = {
    (way, number): jax.jit(makers[way][0])
    .lower(params, key, jax.ShapeDtypeStruct((number,), jnp.int32))
    .compile()
    for way in ways
    for number in batch_sizes
}

figure, axis = plt.subplots(figsize=(6, 3.4))
for way in ways:
    needed = [megabytes(programs[way, number]) for number in batch_sizes]
    axis.loglog(batch_sizes, needed, makers[way][1], label=way)
axis.set_xlabel("trajectories in a batch")
axis.set_ylabel("working memory (MB)")
axis.legend()
plt.show()

ids = jnp.arange(batch_sizes[0], dtype=jnp.int32)
whole, parts = (programs[way, ids.size](params, key, ids) for way in ways[:2])
gaps = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), whole, parts)
sizes = jax.tree.map(lambda x: float(jnp.max(jnp.abs(x))), whole)
gap, size = max(jax.tree.leaves(gaps)), max(jax.tree.leaves(sizes))
print(f"largest difference {gap:.0e} in a gradient of up to {size:.0e}")

# %% [markdown]
# What a stored batch needs grows with it; the streamed gradient's line is flat, and the
# answer is the same but for rounding.
