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
# # 5. When does a policy need memory?
#
# When what it sees now does not tell all that matters, and what it saw before tells
# more. The policy gradient does not mind: with a memory $m_t$ of what was observed,
#
# $$\nabla J = \mathbb{E}\Big[\sum_t \nabla\log\pi_\theta(a_t \mid m_t)\,
#   (G_t - b_t)\Big]$$
#
# is as true as before, and a policy without memory is one whose $m_t$ is $o_t$. First
# what memory is worth, exactly; then what a hidden state does to a baseline; then
# CartPole with its velocities hidden.

# %%
import dataclasses
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxpg
from jaxpg import exact
from jaxpg.envs.tabular import (
    canonical_mdp,
    canonical_pomdp,
    random_mdp,
    tabular_environment,
)
from jaxpg.heads import head_for
from jaxpg.networks import Network
from jaxpg.policies import from_network, recurrent_policy
from jaxpg.train.models import build_critic, build_policy
from jaxpg.train.program import build_program
from jaxpg.train.sharding import place
from jaxpg.train.tuned import tuned

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
num_starts = 2 if quick else 8
num_ascents = 5 if quick else 300
num_worlds = 3 if quick else 200
num_seeds = 1 if quick else 3
num_updates = 1 if quick else 60

# %% [markdown]
# ## What memory is worth
#
# The mine of notebook 1, in the dark: its two places are mistaken for each other now
# and then, and a day has few decisions. A table of logits is the most general policy
# that there is over whatever it is indexed by: the observation, the number of decisions
# so far, or all observations so far. A small GRU has to find out what to keep.
#
# Nothing is sampled: `enumerated_return` is $J$, of policies with memory too, and its
# gradient is followed from several random starts.

# %%
dark, lit = canonical_pomdp(), canonical_mdp()
spaces = tabular_environment(dark)
SEEN, ACTIONS = spaces.observation_space, spaces.action_space
NUM_OBS, HORIZON = SEEN.n, dark.horizon


def table_over(index, remember, size):
    """A table of logits; its memory is one whole number, 0 at an episode's start."""

    def step(table, memory, obs):
        return table[index(memory, obs)], remember(memory, obs)

    def unroll(table, memory, obs, starts):
        def one(memory, at):
            obs, start = at
            logits, memory = step(table, jnp.where(start, 0, memory), obs)
            return memory, (logits, memory)

        return jax.lax.scan(one, memory, (obs, starts))[1]

    network = Network(
        init=lambda key, obs: jax.random.normal(key, (size, ACTIONS.n)),
        initial_carry=lambda: jnp.array(0),
        step=step,
        unroll=unroll,
        is_recurrent=True,
    )
    return from_network(network, head_for(ACTIONS))


def tick(time, obs):
    return time + 1


def clock_and_obs(time, obs):
    return NUM_OBS * time + obs


def history(code, obs):
    """A number for every sequence of observations."""
    return NUM_OBS * code + obs + 1


by_clock = table_over(clock_and_obs, tick, NUM_OBS * HORIZON)
policies = {
    "table: what it sees": (dark, jaxpg.tabular_policy(SEEN, ACTIONS)),
    "table: the clock alone": (dark, table_over(lambda time, obs: time, tick, HORIZON)),
    "table: all it has seen": (dark, table_over(history, history, NUM_OBS**4)),
    "GRU": (dark, recurrent_policy(SEEN, ACTIONS, hidden=(8,), memory=8)),
    "table: the place and the clock": (lit, by_clock),
}
if quick:
    policies = {name: policies[name] for name in list(policies)[2:3]}


def ascend(mdp, policy):
    """J after each exact step, [starts, steps]."""
    optimizer = optax.adam(0.1)
    value_and_grad = jax.value_and_grad(
        lambda params: exact.enumerated_return(mdp, policy, params)
    )

    def from_start(key):
        def step(carry, _):
            params, state = carry
            value, gradient = value_and_grad(params)
            return jaxpg.ascend(optimizer, gradient, state, params), value

        params = policy.init(key, jnp.array(0))
        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, None, num_ascents)[1]

    return jax.jit(jax.vmap(from_start))(
        jax.random.split(jax.random.key(0), num_starts)
    )


figure, axis = plt.subplots(figsize=(7, 4))
styles = ("-", "--", "-", ":", "-.")
for (name, (mdp, policy)), style in zip(policies.items(), styles, strict=False):
    returns = np.asarray(ascend(mdp, policy))
    best = returns[returns[:, -1].argmax()]
    axis.plot(best, style, lw=2, label=name)
    print(f"{name:>30}: J = {best[-1]:.3f}, worst start {returns[:, -1].min():.3f}")
axis.set_xlabel("steps along the exact gradient")
axis.set_ylabel("$J$ of the best start (reward)")
axis.legend(fontsize=8, loc="lower right")
plt.show()

# %% [markdown]
# The clock alone is worth more here than the eyes: dig once, take from then on. Having
# seen everything (which includes the clock, by the number of things seen) adds nothing
# to it, since eyes this weak never tell enough to change that plan. The GRU, which is
# given no clock, makes itself one. What remains up to the topmost line is what is lost
# to the dark, and no memory brings it back. Some starts end below the best one: the
# exact gradient has its local optima and plateaus too.
#
# ## What a hidden state does to a baseline
#
# A critic that sees what the policy sees learns $V(o) = \mathbb{E}[G_t \mid o_t, t]$, a
# mean over all states that look alike. As a baseline it is unbiased: no action
# influenced it. Whether it helps is another matter. Here are random worlds with two
# states that look the same, and the exact variance of one trajectory's gradient with
# this value, with the value of the whole past, and without a baseline.


# %%
def hidden_world(seed):
    """Two states that look the same, and a third, in which an episode ends."""
    alike = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    return random_mdp(seed)._replace(emission=alike)


env = tabular_environment(hidden_world(0))
policy = jaxpg.tabular_policy(env.observation_space, env.action_space)
params = policy.init(jax.random.key(1), jnp.array(0))


def situations(rows):
    """What a baseline may go by before each decision, as numbers, [P, T]."""

    def of_row(obs, action):
        def step(code, at):
            seen = 2 * code + at[0]
            return 2 * seen + at[1] + 1, seen

        return jax.lax.scan(step, jnp.array(1), (obs, action))[1]

    return {
        "what is seen": rows.time * 2 + rows.obs,
        "all that was seen and done": jax.vmap(of_row)(rows.obs, rows.action),
    }


def mean_to_go(rows, chances, codes):
    """E[G | code], at every decision: the best that a critic can learn of it."""
    weights = chances[:, None] * rows.mask
    sums, visits = (
        jnp.zeros(1000).at[codes].add(x)
        for x in (weights * jaxpg.credit_of(rows).value, weights)
    )
    return (sums / jnp.where(visits > 0.0, visits, 1.0))[codes]


@jax.jit
def variances(rows, world_probability):
    """Of one trajectory's gradient, with each baseline."""
    rows = exact.with_log_probs(rows, policy, params)
    own = jnp.sum(rows.log_prob, axis=1, where=rows.mask)
    chances = world_probability * jnp.exp(own)

    def with_levels(levels):
        weights = jnp.where(rows.mask, jaxpg.credit_of(rows).value - levels, 0.0)
        terms = jaxpg.trajectory_gradients(score, params, rows, weights)["network"]
        mean = jnp.tensordot(chances, terms, 1)
        return jnp.tensordot(chances, (terms - mean) ** 2, 1).sum()

    levels = {
        name: mean_to_go(rows, chances, codes)
        for name, codes in situations(rows).items()
    }
    none = jnp.zeros(rows.mask.shape)
    return with_levels(none), {name: with_levels(levels[name]) for name in levels}


score = jaxpg.log_prob_fn(policy)
found = [
    variances(*exact.enumerate_trajectories(hidden_world(seed)))
    for seed in range(num_worlds)
]
shares = {
    name: np.array([values[name] / none for none, values in found])
    for name in ("what is seen", "all that was seen and done")
}

figure, axis = plt.subplots(figsize=(5, 4.4))
axis.plot(*shares.values(), ".", alpha=0.6)
axis.axvline(1.0, color="grey", lw=0.8)
axis.axhline(1.0, color="grey", lw=0.8)
axis.plot([0, 1.2], [0, 1.2], ":", color="black", label="no difference")
for setter, name in zip((axis.set_xlabel, axis.set_ylabel), shares, strict=True):
    setter(f"variance with the value of\n{name}, over none's")
axis.legend()
plt.show()
for name, share in shares.items():
    print(
        f"value of {name}: worse than none in {sum(share > 1)} of {num_worlds} worlds"
    )
    print(
        f"    worst {share.max():.2f}, median {np.median(share):.2f} of none's variance"
    )

# %% [markdown]
# In most worlds either value helps, and often much. In some it does harm (right of the
# grey line, above the other): the value is a good guess of what is to come, but not the
# number of least variance (notebook 2). A critic with memory helps more in the
# median world, and is no guarantee either.
#
# ## CartPole without its velocities
#
# `CartPoleNoVelocity-v1` shows where the cart and the pole are, but not how fast they
# move. Two glances in a row would tell, so a policy that remembers can know all. PPO,
# with a GRU in policy and critic and without; and without one where velocities are
# seen.


# %%
def learn(env_name, memory):
    """Decisions taken [updates], and returns of episodes that ended [updates, seeds]."""
    config = tuned("CartPoleNoVelocity-v1", "ppo")
    networks = dataclasses.replace(config.policy, hidden=(32,), memory=memory)
    config = dataclasses.replace(
        config, num_seeds=num_seeds, num_updates=num_updates, policy=networks
    )
    env = jaxpg.envs.make(env_name)
    program = build_program(
        config, env, build_policy(config, env), build_critic(config, env), place(1)
    )
    state = program.init(jnp.arange(num_seeds))
    _, metrics = program.advance(state, num_updates)
    taken = np.cumsum(metrics["num_steps"][:num_updates, 0])
    return taken, np.asarray(metrics["mean_return"][:num_updates])


runs = {
    "velocities hidden, GRU": ("CartPoleNoVelocity-v1", 32),
    "velocities hidden, no memory": ("CartPoleNoVelocity-v1", 0),
    "velocities seen, no memory": ("CartPole-v1", 0),
}
runs = dict(list(runs.items())[:1]) if quick else runs

figure, axis = plt.subplots(figsize=(6.5, 3.8))
styles = (("-", "C0"), ("--", "C1"), (":", "C3"))
for (name, run), (style, color) in zip(runs.items(), styles, strict=False):
    taken, returns = learn(*run)
    axis.plot(taken, np.median(returns, axis=1), style, color=color, lw=2, label=name)
    edges = returns.min(axis=1), returns.max(axis=1)
    axis.fill_between(taken, *edges, color=color, alpha=0.15, lw=0)
    print(f"{name}: return of each seed at the end {np.round(returns[-1])}")
axis.set_xlabel("decisions taken")
axis.set_ylabel("mean return of episodes that ended")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# Without memory the policy learns to fall a little later, and stays there. It is not
# the network's size that it lacks: the same layers learn far more where velocities are
# seen. With a GRU hidden velocities are no obstacle. That it even ends above the dotted
# line is no merit of memory: the settings are those that were tuned for the GRU.
