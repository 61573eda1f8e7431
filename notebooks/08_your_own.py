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
# # 8. How do I train on my own world with my own network?
#
# An `Environment` is a record of two pure functions and two spaces; a `Policy` comes
# from two more, or from a Flax module. Nothing is inherited and nothing is registered.
#
# The world here: a puck slides on a table with a hole in its middle, and must get to a
# goal on the right within a time limit.

# %%
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen

import jaxpg
from jaxpg.envs.base import Box, Discrete, Environment, with_time_limit

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
num_seeds = 1 if quick else 4
num_updates = 3 if quick else 150
num_episodes = 16 if quick else 128

# %% [markdown]
# ## The world
#
# `step` never resets, and says `terminated` only where the task is over: in the hole or
# at the goal. A time limit is no end of the task, for the puck could go on; it is
# `truncated`, and `with_time_limit` adds it.

# %%
GOAL, HOLE = jnp.array([0.7, 0.0]), jnp.zeros(2)
GOAL_RADIUS, HOLE_RADIUS = 0.2, 0.3
THRUSTS = 0.01 * jnp.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])


class Puck(NamedTuple):
    position: jax.Array
    velocity: jax.Array


def observe(puck):
    return jnp.concatenate([puck.position, 10 * puck.velocity])


def reset(key):
    """At rest, somewhere around the hole but not on the goal's side of it."""
    key_angle, key_radius = jax.random.split(key)
    angle = jax.random.uniform(key_angle, (), minval=0.25, maxval=1.75) * jnp.pi
    radius = jax.random.uniform(key_radius, (), minval=0.5, maxval=0.9)
    position = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    puck = Puck(position, jnp.zeros(2))
    return puck, observe(puck)


def step(key, puck, action):
    del key  # this world has no luck of its own
    velocity = 0.9 * puck.velocity + THRUSTS[action]
    position = jnp.clip(puck.position + velocity, -1.0, 1.0)
    puck = Puck(position, position - puck.position)
    at_goal = jnp.linalg.norm(position - GOAL) < GOAL_RADIUS
    in_hole = jnp.linalg.norm(position - HOLE) < HOLE_RADIUS
    output = jaxpg.StepOutput(
        obs=observe(puck),
        reward=1.0 * at_goal - 1.0 * in_hole - 0.01,
        terminated=at_goal | in_hole,
        truncated=jnp.zeros((), bool),
    )
    return puck, output


table = Environment("Table", reset, step, Box(-1.0, 1.0, (4,)), Discrete(5))
env = with_time_limit(table, 60)

# %% [markdown]
# ## Does it keep the contract?
#
# The same key gives the same answer, observations are of their space, the clock
# truncates and the hole terminates, and the functions can be mapped over copies.


# %%
def same(one, other):
    equal = jax.tree.map(lambda x, y: bool(jnp.all(x == y)), one, other)
    return all(jax.tree.leaves(equal))


def play(state, action):
    """One action again and again until the episode ends."""
    for count in range(1, env.max_steps + 1):
        state, output = jitted_step(key, state, action)
        if output.terminated | output.truncated:
            return count, output


key, jitted_step = jax.random.key(0), jax.jit(env.step)
state, obs = env.reset(key)
again = same(env.reset(key), (state, obs))
stepped = same(jitted_step(key, state, 1), jitted_step(key, state, 1))
print(f"functions of their arguments alone: reset {again}, step {stepped}")
print(f"observations are of their space: {env.observation_space.contains(obs)}")

left_of_the_hole = state._replace(inner=Puck(jnp.array([-0.7, 0.0]), jnp.zeros(2)))
for what, start, action in (
    ("doing nothing", state, 0),
    ("into the hole", left_of_the_hole, 1),
):
    count, (_, _, terminated, truncated) = play(start, action)
    print(f"{what}: {count} decisions, truncated {truncated}, terminated {terminated}")

states, many = jax.vmap(env.reset)(jax.random.split(key, 1000))
actions = jax.random.randint(key, (1000,), 0, 5)
_, output = jax.vmap(env.step, (None, 0, 0))(key, states, actions)
print("a thousand copies at once:", output.obs.shape, output.reward.shape)

# %% [markdown]
# ## The network, twice
#
# A head says how many outputs it needs and makes a distribution of them; the network
# before it is ours. Once it is two plain functions, once a Linen module. With the same
# weights in both, the policies must agree. (`from_nnx` takes an NNX module likewise.)

# %%
head = jaxpg.heads.categorical_head(env.action_space)
WIDTH = 32


def init(key, obs):
    keys = jax.random.split(key)
    draw = jax.nn.initializers.lecun_normal()
    return {
        "hidden": (draw(keys[0], (obs.size, WIDTH)), jnp.zeros(WIDTH)),
        "out": (draw(keys[1], (WIDTH, head.num_outputs)), jnp.zeros(head.num_outputs)),
    }


def apply(params, obs):
    weight, bias = params["hidden"]
    hidden = jnp.tanh(obs @ weight + bias)
    weight, bias = params["out"]
    return hidden @ weight + bias


class Layers(linen.Module):
    @linen.compact
    def __call__(self, obs):
        hidden = jnp.tanh(linen.Dense(WIDTH, name="hidden")(obs))
        return linen.Dense(head.num_outputs, name="out")(hidden)


policies = {
    "plain functions": jaxpg.from_apply(init, apply, head),
    "Flax Linen": jaxpg.from_linen(Layers(), head),
}

plain, flax = policies.values()
params = plain.init(key, obs)
layers = {n: dict(kernel=w, bias=b) for n, (w, b) in params["network"].items()}
copied = {**params, "network": {"params": layers}}
logits = [
    policy.step(weights, None, obs)[0].logits
    for policy, weights in ((plain, params), (flax, copied))
]
print(f"largest difference of logits: {jnp.max(jnp.abs(logits[0] - logits[1])):.0e}")

# %% [markdown]
# ## Training
#
# From here on nothing knows whose world and whose network it is. REINFORCE takes whole
# episodes. `jaxpg.ppo` and the other algorithms with a critic would use the difference
# made above: they add the value of what follows a truncation, and of nothing that
# follows a true end.


# %%
def train(policy, key):
    """Trained parameters, and of every update the mean return and shares of ends."""
    algorithm = jaxpg.reinforce(
        jaxpg.ReinforceConfig(learning_rate=0.01), jaxpg.make_task(env, policy)
    )

    def update(state, key):
        key_rollout, key_update = jax.random.split(key)
        rows = jaxpg.rollout_episodes(
            env, policy, state.params, key_rollout, jnp.arange(num_episodes)
        )
        returns = jnp.sum(rows.reward, axis=1, where=rows.mask)
        won = rows.terminated & rows.mask & (rows.reward > 0)
        lost = rows.terminated & rows.mask & (rows.reward < 0)
        shares = jnp.stack([jnp.mean(jnp.any(x, axis=1)) for x in (won, lost)])
        state, _ = algorithm.update(key_update, state, rows)
        return state, (jnp.mean(returns), shares)

    key_init, key_updates = jax.random.split(key)
    state = algorithm.init(key_init, obs)
    keys = jax.random.split(key_updates, num_updates)
    state, curves = jax.lax.scan(update, state, keys)
    return state.params, curves


seeds = jax.random.split(jax.random.key(1), num_seeds)
results = {
    name: jax.jit(jax.vmap(lambda key, policy=policy: train(policy, key)))(seeds)
    for name, policy in policies.items()
}

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for (name, (_, (returns, _))), color in zip(results.items(), ("C0", "C1"), strict=True):
    for k in range(num_seeds):
        label = name if k == 0 else None
        left.plot(returns[k], color=color, lw=1.2, alpha=0.8, label=label)
left.set_xlabel("update")
left.set_ylabel("mean return")
left.legend()
won, lost = np.asarray(results["plain functions"][1][1]).mean(axis=0).T
for share, name, style in (
    (won, "goal (terminated)", "-"),
    (lost, "hole (terminated)", "--"),
    (1 - won - lost, "time limit (truncated)", ":"),
):
    right.plot(share, style, lw=2, label=name)
right.set_xlabel("update")
right.set_ylabel("share of episodes, plain functions")
right.legend()
plt.show()
for name, (_, (returns, shares)) in results.items():
    last = ", ".join(f"{x:.2f}" for x in returns[:, -1])
    reached = 100 * shares[:, -1, 0].mean()
    print(f"{name:>15}: last mean returns {last}; goal reached in {reached:.0f}%")

# %% [markdown]
# Each line is a seed. Both networks learn alike: they differ only in their first
# weights, which are drawn from the same law. Right: at first the clock stops most
# episodes. To stay out of the hole is learned before the way to the goal, and lets
# still more of them last until the limit.
#
# ## What was learned
#
# Ways of pucks before training and after it (the first seed, plain functions), each
# until its episode ends.

# %%
first_seed = jax.tree.map(lambda x: x[0], results["plain functions"][0])


@jax.jit
def play_many(params):
    return jaxpg.rollout_episodes(
        env, plain, params, jax.random.key(2), jnp.arange(24), keep_next_obs=True
    )


figure, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 4))
for axis, weights, title in zip(
    axes, (params, first_seed), ("before", "after"), strict=True
):
    rows = play_many(weights)
    axis.add_patch(plt.Circle(HOLE, HOLE_RADIUS, color="black", label="hole"))
    axis.add_patch(plt.Circle(GOAL, GOAL_RADIUS, color="C2", alpha=0.5, label="goal"))
    for way, mask in zip(rows.next_obs[..., :2], rows.mask, strict=True):
        axis.plot(*way[mask].T, color="C0", lw=1)
    axis.plot(*rows.obs[:, 0, :2].T, ".", color="C1", label="start")
    axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", title=f"{title} training")
    axis.set_xlabel("position, x")
axes[0].set_ylabel("position, y")
axes[0].legend(loc="lower right")
plt.show()

# %% [markdown]
# The pucks go round the hole to the goal. They all take the same side of it, even those
# that start on the other: a gradient improves the way that is already tried, and does
# not look for the shortest.
