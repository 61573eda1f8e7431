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
# # 4. Why follow the natural gradient?
#
# The gradient is the steepest way up if distance is measured between *parameters*. But
# parameters are names: another choice of them makes another gradient out of the same
# world and the same policy. The natural gradient (Kakade 2001) measures distance
# between *policies*, by their KL, whose curvature is the Fisher matrix $F$:
#
# $$x = F^{-1}\nabla J, \qquad
#   F = \mathbb{E}\big[\nabla\log\pi_\theta\,\nabla\log\pi_\theta^\top\big],
#   \qquad \mathrm{KL}(\pi_\theta\Vert\pi_{\theta+d}) \approx \tfrac12 d^\top F d.$$
#
# First both are drawn, exactly; then one step of TRPO is taken apart; then CartPole.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxpg
from jaxpg import exact
from jaxpg.algos.measures import mean_kl, mean_surrogate
from jaxpg.envs.base import Discrete
from jaxpg.envs.tabular import TabularMDP
from jaxpg.fisher import fisher_vector_product
from jaxpg.heads import head_for
from jaxpg.train.config import ALGORITHMS, TrainConfig
from jaxpg.train.models import build_critic, build_policy
from jaxpg.train.program import build_program
from jaxpg.train.sharding import place
from jaxpg.trust_region import natural_gradient, normalize_by_kl, trust_region

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
num_episodes = 16 if quick else 64
num_steps = 1 if quick else 4
num_points = 5 if quick else 41
names = ("reinforce",) if quick else ("reinforce", "npg", "trpo")
num_seeds = 1 if quick else 5
num_updates = 2 if quick else 20
max_steps = 20 if quick else 200

# %% [markdown]
# ## One world, one policy, two sets of names
#
# A single decision among three actions of different rewards. A policy has two free
# parameters, and here they are given twice: as logits of the first two actions, or as
# two choices in a row, the first action or not, and if not, the second or not. Both
# reach every policy. How a step of the parameters moves the probabilities is
# $\dot p = \frac{\partial p}{\partial\theta}\,\dot\theta$.

# %%
ACTIONS = Discrete(3)
rewards = jnp.array([[1.0, 0.8, 0.0]])
world = TabularMDP(
    jnp.ones(1), jnp.ones((1, 3, 1)), rewards, jnp.zeros(1, bool), horizon=1
)


def logits_of_softmax(theta, obs):
    return jnp.append(theta, 0.0)


def logits_of_choices(theta, obs):
    yes, no = jax.nn.log_sigmoid(theta), jax.nn.log_sigmoid(-theta)
    return jnp.array([yes[0], no[0] + yes[1], no[0] + no[1]])


def names_of_softmax(p):
    return jnp.log(p[:2] / p[2])


def names_of_choices(p):
    return jnp.log(jnp.array([p[0] / (p[1] + p[2]), p[1] / p[2]]))


PARAMETRISATIONS = {
    "logits": (logits_of_softmax, names_of_softmax),
    "choices in a row": (logits_of_choices, names_of_choices),
}
GRADIENTS = {"plain": exact.policy_gradient, "natural": exact.natural_gradient}


def velocity_of(gradient, logits, theta_of):
    """Of the probabilities, where theta follows the gradient."""
    policy = jaxpg.from_apply(lambda key, obs: jnp.zeros(2), logits, head_for(ACTIONS))

    def velocity(p):
        theta = theta_of(p)
        direction = gradient(world, policy, {"network": theta, "head": ()})["network"]
        move = jax.jvp(lambda x: jax.nn.softmax(logits(x, 0)), (theta,), (direction,))
        return move[1]

    return velocity


def flow(velocity, p, num_steps=400, length=0.004):
    """Velocity at a point, and its line: steps of one length, whatever the speed."""

    def step(p, _):
        move = velocity(p)
        there = jnp.clip(p + length * move / jnp.linalg.norm(move), 1e-3)
        return there / there.sum(), (move, p)

    moves, path = jax.lax.scan(step, p, None, num_steps)[1]
    return moves[0], path


grid = np.linspace(0.06, 0.88, 8)
points = jnp.array([(x, y, 1 - x - y) for x in grid for y in grid if x + y < 0.96])
starts = jnp.array([[0.02, 0.02, 0.96], [0.02, 0.5, 0.48], [0.02, 0.96, 0.02]])

follow = jax.jit(jax.vmap(flow, (None, 0)), static_argnums=0)
figure, axes = plt.subplots(2, 2, sharex=True, sharey=True, figsize=(7.5, 7))
fields, speeds = {}, {}
for row, (kind, gradient) in zip(axes, GRADIENTS.items(), strict=True):
    for axis, (name, pair) in zip(row, PARAMETRISATIONS.items(), strict=True):
        velocity = velocity_of(gradient, *pair)
        moves, paths = follow(velocity, jnp.concatenate([starts, points]))
        speeds[kind, name] = jnp.linalg.norm(moves, axis=1)
        field = fields[kind, name] = np.asarray(moves[len(starts) :])
        axis.quiver(*points[:, :2].T, *field[:, :2].T, color="C0", angles="xy")
        for path in paths[: len(starts)]:
            axis.plot(path[:, 0], path[:, 1], color="C1", lw=2)
        axis.plot(starts[:, 0], starts[:, 1], "o", color="C1")
        axis.plot([0, 1, 0, 0], [0, 0, 1, 0], color="grey", lw=0.8)
        axis.set_title(f"{kind}, {name}", fontsize=10)
        axis.set_aspect("equal")
figure.supxlabel("probability of the best action", fontsize=10)
figure.supylabel("probability of the second-best action", fontsize=10)
for axis in axes.flat:
    axis.set(xlabel=" ", ylabel=" ")
plt.show()

for kind in GRADIENTS:
    one, other = (fields[kind, name] for name in PARAMETRISATIONS)
    gap = np.abs(one - other).max() / np.abs(one).max()
    print(f"{kind:>8}: fields differ by up to {gap:.1e} of their largest entry")
for (kind, name), speed in speeds.items():
    share = float(speed[0] / speed.max())
    print(f"{kind:>8}, {name}: speed at the lowest start {share:.4f} of the largest")

# %% [markdown]
# Above: the plain gradient moves one and the same policy elsewhere when its parameters
# are renamed. Below: the natural gradient does not, but for rounding. And near a corner
# plain arrows vanish sooner than natural ones: a policy that is nearly sure of a bad
# action is slow to leave it. (Lines show where the arrows lead, not how fast; an arrow's
# length can be compared within a panel only.)
#
# ## A step of TRPO
#
# A direction has no length. TRPO takes the one whose KL is `max_kl` if the KL were the
# parabola above, then shortens it until the *measured* KL is within the limit and the
# surrogate, the mean of $\frac{\pi_{\theta+d}}{\pi_\theta} A$, has risen. Here a
# policy for CartPole takes a few such steps with a wide limit, and the last one is
# looked at.

# %%
max_kl, shrink = 0.05, 0.7
env = jaxpg.envs.make("CartPole-v1")
policy = jaxpg.mlp_policy(env.observation_space, env.action_space, hidden=(16,))
task = jaxpg.make_task(env, policy)
config = jaxpg.EstimatorConfig(baseline="time-dependent")
estimator = jaxpg.make_estimator(config, policy, env.max_steps)
direction = natural_gradient(damping=1e-3)
full_step, searched_step = normalize_by_kl(max_kl), trust_region(max_kl, shrink=shrink)


@jax.jit
def sample(key, params):
    ids = jnp.arange(num_episodes)
    rows = jaxpg.rollout_episodes(env, policy, params, key, ids)
    return rows, jaxpg.estimate_weights(estimator, params, (), rows)


def measures_of(params, rows, advantages):
    """What a step is made of and judged by."""
    return dict(
        objective=lambda new: mean_surrogate(task, new, rows, advantages),
        kl=lambda new: mean_kl(task, params, new, rows),
        fisher_vector_product=lambda v: fisher_vector_product(
            policy.unroll, params, rows, v
        ),
    )


@jax.jit
def steps_of(params, *batch):
    """The gradient, the full step along it, the natural one, and TRPO's search."""
    measures = measures_of(params, *batch)
    gradient = jax.grad(measures["objective"])(params)

    def through(transformation, updates):
        state = transformation.init(params)
        return transformation.update(updates, state, params, **measures)

    down = jax.tree.map(jnp.negative, gradient)
    natural = through(direction, down)[0]
    full = {
        "natural": through(full_step, natural)[0],
        "plain": through(full_step, down)[0],
    }
    return gradient, full, through(searched_step, natural)


@jax.jit
def along(step, multiples, params, *batch):
    """KL and gain of the surrogate at multiples of a step."""
    measures = measures_of(params, *batch)

    def at(multiple):
        there = optax.apply_updates(params, jax.tree.map(lambda x: multiple * x, step))
        gain = measures["objective"](there) - measures["objective"](params)
        return jnp.stack([measures["kl"](there), gain])

    return jax.lax.map(at, multiples).T


params = policy.init(jax.random.key(0), env.reset(jax.random.key(1))[1])
for key in jax.random.split(jax.random.key(2), num_steps):
    before, batch = params, sample(key, params)
    gradient, full, (step, search) = steps_of(before, *batch)
    params = optax.apply_updates(before, step)
print(f"step {num_steps}: tries in vain {search.num_rejections}, taken")
print(f"{search.step_fraction:.2f} of the full step, with a KL of {search.kl:.3f}")

multiples = jnp.linspace(0.0, 1.5, num_points)
tries = shrink ** jnp.arange(int(search.num_rejections) + 1.0)
slope = optax.tree.vdot(gradient, full["natural"])
predictions = (max_kl * multiples**2, slope * multiples)
points = jnp.concatenate([tries, multiples])
lines = {name: along(step, points, before, *batch) for name, step in full.items()}

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
for axis, line, guess in zip(axes, lines["natural"], predictions, strict=False):
    mark, line = line[: len(tries)], line[len(tries) :]
    axis.plot(multiples, line, color="C0", label="measured")
    axis.plot(multiples, guess, "--", color="grey", label="as predicted at 0")
    axis.plot(tries[:-1], mark[:-1], "x", color="C1", ms=9, mew=2, label="refused")
    axis.plot(tries[-1:], mark[-1:], "o", color="C1", ms=9, label="taken")
    axis.set_xlabel("multiple of the full step")
axes[0].axhline(max_kl, ls=":", color="black")
axes[0].set_ylabel("KL per decision (nats)")
axes[1].set_ylabel("gain of the surrogate (reward)")
axes[1].legend(fontsize=8)
for (name, line), style in zip(lines.items(), ("-", "--"), strict=True):
    axes[2].plot(*line[:, len(tries) :], style, label=f"{name} direction")
    gain = np.interp(max_kl, *line[:, len(tries) :])
    print(f"gain of the surrogate at the limit, {name} direction: {gain:.2f}")
axes[2].axvline(max_kl, ls=":", color="black", label="limit")
axes[2].set_xlabel("KL per decision (nats)")
axes[2].set_ylabel("gain of the surrogate (reward)")
axes[2].legend(fontsize=8)
plt.show()

# %% [markdown]
# Left: the KL grows faster than its parabola, so the full step is refused and a shorter
# one is taken. Middle: far out the surrogate gains less than its slope promises, and
# the search would also refuse a step with which it falls. Right: for the same KL the
# natural direction gains more than the plain one.
#
# ## CartPole
#
# Three algorithms against the decisions that they take, several seeds each: lines are
# medians, bands go from the worst seed to the best. REINFORCE steps with Adam. Its rate
# and the KL of NPG are the ones that the grids of `benchmarks/sample_efficiency.py`
# chose, with longer episodes.

# %%
GOAL = 0.9
SETTINGS = {
    "reinforce": dict(
        learning_rate=0.01, baseline="time-dependent", episodes_per_env=1
    ),
    "npg": dict(max_kl=0.01, episodes_per_env=1),
    "trpo": dict(max_kl=0.01),
}


def learn(name):
    """Decisions taken so far, and mean returns, both [updates, seeds]."""
    algorithm = ALGORITHMS[name](**SETTINGS[name])
    config = TrainConfig(num_seeds=num_seeds, num_envs=16, algorithm=algorithm)
    networks = build_policy(config, env), build_critic(config, env)
    program = build_program(config, env, *networks, place(1))
    state = program.init(jnp.arange(num_seeds))
    _, metrics = program.advance(state, num_updates)
    taken, returns = (
        np.asarray(metrics[x][:num_updates]) for x in ("num_steps", "mean_return")
    )
    return np.cumsum(taken, axis=0), returns


env = jaxpg.envs.make("CartPole-v1", max_steps=max_steps)
figure, axis = plt.subplots(figsize=(6.5, 3.8))
styles = (("-", "C0"), ("--", "C1"), (":", "C3"))
for name, (style, color) in zip(names, styles, strict=False):
    taken, returns = learn(name)
    common = np.linspace(taken[0].max(), taken[-1].min(), 60)
    curves = [
        np.interp(common, *curve) for curve in zip(taken.T, returns.T, strict=True)
    ]
    low, middle, high = np.percentile(curves, (0, 50, 100), axis=0)
    axis.plot(common, middle, style, color=color, lw=2, label=name)
    axis.fill_between(common, low, high, color=color, alpha=0.15, lw=0)
    reached = common[middle >= GOAL * max_steps]
    when = f"after {reached[0]:.0f} decisions" if len(reached) else "not"
    print(f"{name:>10}: median return of {GOAL:.0%} of the longest {when}")
axis.set_xlabel("decisions taken")
axis.set_ylabel("mean return of an update")
axis.legend()
plt.show()

# %% [markdown]
# REINFORCE with Adam and a rate found by a grid keeps pace with NPG: here the natural
# direction itself buys no speed. What it buys is a step size with a meaning, so many
# nats a decision, that does not depend on the names of the parameters. TRPO comes later
# on this axis; one reason is that it takes the same number of decisions for each update,
# where the short episodes of a beginner let the other two update several times.
