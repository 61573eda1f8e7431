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
# # 9. What does it take to use many devices?
#
# Trajectories are independent, so a batch is spread over devices by its rows and every
# device keeps a copy of the parameters. A gradient is a sum over rows: each device sums
# its own, and one exchange adds the sums,
#
# $$g = \frac1N \sum_{\text{devices}}\ \sum_{\text{own rows}} \sum_t w\,\nabla\log\pi .$$
#
# No accelerator is needed to see it: JAX can pretend that a CPU is several devices, if
# it is told before it starts.

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
num_seeds = 2 if quick else 8
batch_sizes = (256, 1024) if quick else (256, 1024, 4096, 16384, 65536)
print("at least four devices:", jax.device_count() >= 4)

# %% [markdown]
# ## The same run on one device and on several
#
# `place` spreads rows, `build_program` compiles a whole training run for it. An
# episode's random numbers belong to the episode and not to a device, so the *sample* is
# the same to the bit; only the order in which a sum is rounded differs.

# %%
env = jaxpg.envs.make("CartPole-v1", max_steps=200)
policy = jaxpg.mlp_policy(env.observation_space, env.action_space, hidden=(32,))
config = TrainConfig(num_envs=16, num_updates=num_updates)


def program_on(num_devices, config=config):
    placement = place(num_devices, num_envs=config.num_envs)
    return build_program(config, env, policy, None, placement)


def run(program, seeds):
    """Parameters after each update, flat, and the returns on the way."""
    state, params, returns = program.init(jnp.asarray(seeds, jnp.int32)), [], []
    for _ in range(num_updates):
        state, metrics = program.advance(state, 1)
        flat = jax.flatten_util.ravel_pytree(jax.device_get(state.algorithm.params))[0]
        params.append(np.asarray(flat))
        returns.append(np.asarray(metrics["mean_return"][0]))
    return np.array(params), np.array(returns)


runs = {n: run(program_on(n), [0]) for n in device_counts}
first = {n: params[0] for n, (params, _) in runs.items()}

figure, axis = plt.subplots(figsize=(6, 3.2))
updates = np.arange(1, num_updates + 1)
for n, style in zip(device_counts[::-1], ("-", "--", "o"), strict=False):
    axis.plot(updates, runs[n][1], style, lw=2 + n, ms=4, label=f"devices: {n}")
axis.set_xlabel("update")
axis.set_ylabel("mean return (decisions)")
axis.legend()
plt.show()
for n in device_counts[1:]:
    gap = np.abs(first[n] - first[1]).max()
    print(f"{n} devices, after one update: parameters differ by at most {gap:.0e}")

# %% [markdown]
# The curves lie on each other. After one update the parameters differ by no more than
# rounding; over many updates such differences may grow, for one action that falls
# differently changes an episode.
#
# ## What is communicated
#
# The compiled program is there to be read. Every exchange between devices is an
# `all-reduce` in it.

# %%
several = device_counts[-1]
program = program_on(several)
state = program.init(jnp.zeros(1, jnp.int32))
text = program.advance.lower(state, 1).compile().as_text()
exchanges = [
    sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)
    for line in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    if (shapes := re.findall(r"\w\d+\[([\d,]*)\]", line))
]
num_params = sum(x.size for x in jax.tree.leaves(state.algorithm.params))
print(f"numbers in each exchange: {sorted(exchanges)}; the policy has {num_params}")

ids = jnp.arange(4 * config.num_envs)
rows = jax.eval_shape(
    lambda params, key: jaxpg.rollout_episodes(env, policy, params, key, ids),
    policy.init(jax.random.key(0), jnp.zeros(4)),
    jax.random.key(1),
)
in_batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows))

figure, axis = plt.subplots(figsize=(6, 2))
heights = (in_batch, 4 * sum(exchanges))
axis.barh(("the batch, which stays", "what is exchanged"), heights, height=0.6)
axis.set_xscale("log")
axis.set_xlabel("bytes in an update")
axis.set_ylabel(f"{several} devices")
plt.show()

# %% [markdown]
# The exchange with the policy's size (and a few numbers more) is the gradient. The
# largest one is the baseline's: what it must know of the whole batch, sums for every
# time step. The smallest are counts for the log. No size in the list depends on the
# number of episodes, so twice the episodes on twice the devices exchange as much as
# before; the batch itself never moves.
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


def megabytes(gradient, number):
    ids = jax.ShapeDtypeStruct((number,), jnp.int32)
    compiled = jax.jit(gradient).lower(params, jax.random.key(0), ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


ways = {
    "batch at once": (stored(None), "o-"),
    "batch, gradient in chunks": (stored(2048), "s--"),
    "streamed": (streamed, "^:"),
}
figure, axis = plt.subplots(figsize=(6, 3.4))
for name, (gradient, style) in ways.items():
    needed = [megabytes(gradient, n) for n in batch_sizes]
    axis.loglog(batch_sizes, needed, style, label=name)
axis.set_xlabel("trajectories in a batch")
axis.set_ylabel("working memory (MB)")
axis.legend()
plt.show()

key, ids = jax.random.key(1), jnp.arange(256)
whole, parts = (
    jax.jit(stored(None))(params, key, ids),
    jax.jit(streamed)(params, key, ids),
)
gaps = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), whole, parts)
sizes = jax.tree.map(lambda x: float(jnp.max(jnp.abs(x))), whole)
print(f"largest difference {max(jax.tree.leaves(gaps)):.0e}", end=" ")
print(f"in a gradient of up to {max(jax.tree.leaves(sizes)):.0e}")

# %% [markdown]
# What a stored batch needs grows with it; the streamed gradient's line is flat, and the
# answer is the same but for rounding.
#
# ## Seeds are one more axis
#
# A training run is a pure function of its seed, so several runs are one `vmap`: one
# program, compiled once.

# %%
together = TrainConfig(num_envs=16, num_updates=num_updates, num_seeds=num_seeds)
_, returns = run(program_on(1, together), np.arange(num_seeds))

figure, axis = plt.subplots(figsize=(6, 3.2))
axis.plot(updates, returns, color="grey", alpha=0.6, lw=1)
axis.plot(updates, np.median(returns, axis=1), lw=3, label="median over seeds")
axis.set_xlabel("update")
axis.set_ylabel("mean return (decisions)")
axis.legend()
plt.show()
alone = runs[1][1][:, 0]
print(
    "first seed: largest difference from its run alone",
    np.abs(returns[:, 0] - alone).max(),
)

# %% [markdown]
# Grey are single seeds. A curve of one seed says little about an algorithm; here more of
# them cost no more lines of code, only more work for the devices.
