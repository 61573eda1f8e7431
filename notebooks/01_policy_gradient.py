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
# # 1. What is a policy gradient?
#
# A policy $\pi_\theta(a|s)$ acts in a world that nobody can differentiate. How do
# rewards become a gradient of the expected return $J(\theta)$ all the same? By the
# score-function identity:
#
# $$\nabla J = \mathbb{E}\Big[\sum_t \nabla\log\pi_\theta(a_t|s_t)\, G_t\Big],
# \qquad G_t = \sum_{u\ge t} r_u .$$
#
# We compute it four times: by hand, with `jax.grad`, with jaxpg, and exactly. Then we
# train CartPole.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxpg
from jaxpg.envs.tabular import canonical_mdp, tabular_environment

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
num_by_hand = 300
num_batches = 16 if quick else 128
num_updates = 3 if quick else 30

# %% [markdown]
# ## The world: a mine
#
# Three states, two actions, at most three decisions. At the surface, taking pays a
# little; digging pays nothing, but may lead to the seam, where taking pays a lot and
# ends the day. The policy is a table of logits, one for each state and action.

# %%
mdp = canonical_mdp()
env = tabular_environment(mdp)
policy = jaxpg.tabular_policy(env.observation_space, env.action_space)
params = policy.init(jax.random.key(3), jnp.array(0))

for state, name in enumerate(("surface", "seam")):
    pays = dict(zip(("take", "dig"), mdp.reward[state].tolist(), strict=True))
    print(
        f"{name}: rewards {pays}, logits {params['network'][state].round(2).tolist()}"
    )

# %% [markdown]
# ## By hand
#
# A softmax's score is known: raising the logit of the chosen action raises its
# log-probability by $1-\pi(a|s)$, raising any other's, $b$, lowers it by $\pi(b|s)$. So
# play episodes, and add up score times reward-to-go.

# %%
table = np.asarray(params["network"], np.float64)
chances = np.exp(table) / np.exp(table).sum(1, keepdims=True)
world = [np.asarray(x, np.float64) for x in (mdp.transition, mdp.reward)]


def play(rng):
    """One episode, as a list of (state, action, reward)."""
    transition, reward = world
    state, steps = 0, []
    while len(steps) < mdp.horizon and not mdp.terminal[state]:
        action = rng.choice(2, p=chances[state])
        steps.append((state, action, reward[state, action]))
        state = rng.choice(3, p=transition[state, action])
    return steps


def gradient_of(steps):
    """sum_t score[t] * (rewards from t on), of one episode."""
    gradient = np.zeros((3, 2))
    for t, (state, action, _) in enumerate(steps):
        score = np.eye(2)[action] - chances[state]
        gradient[state] += score * sum(r for _, _, r in steps[t:])
    return gradient


rng = np.random.default_rng(0)
episodes = [play(rng) for _ in range(num_by_hand)]
by_hand = np.mean([gradient_of(steps) for steps in episodes], axis=0)
print(by_hand.round(3))

# %% [markdown]
# ## `jax.grad` of a surrogate
#
# Nobody wants to derive scores for a network. Hold the $G_t$ constant, and the same
# estimate is the derivative of weighted log-likelihood:
#
# $$L(\theta) = \frac1N\sum_i\sum_t G_{i,t}\,\log\pi_\theta(a_{i,t}|s_{i,t}),
# \qquad \nabla L = \text{the estimate}.$$
#
# Its *value* means nothing; only its derivative does. We write the same episodes as
# arrays with one row each, and weigh the empty slots of short ones with 0.

# %%
shape = (num_by_hand, mdp.horizon)
states, actions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
weights = np.zeros(shape, np.float32)
for i, steps in enumerate(episodes):
    for t, (state, action, _) in enumerate(steps):
        states[i, t], actions[i, t] = state, action
        weights[i, t] = sum(r for _, _, r in steps[t:])


def surrogate(table):
    log_probs = jax.nn.log_softmax(table)[states, actions]
    return jnp.sum(weights * log_probs) / num_by_hand


by_grad = jax.grad(surrogate)(params["network"])
print(np.abs(by_grad - by_hand).max(), "is the largest difference from by hand")

# %% [markdown]
# ## `score_gradient`
#
# jaxpg's engine takes three things: a function that gives the log-probability of each
# decision of one row, the rows, and one weight per decision. Where the weights come
# from is none of its business, and that is why every estimator in the library is a way
# to make weights.


# %%
def log_prob_fn(table, row):
    state, action = row
    return jax.nn.log_softmax(table)[state, action]


rows = (jnp.asarray(states), jnp.asarray(actions))
by_jaxpg = jaxpg.score_gradient(
    log_prob_fn, params["network"], rows, jnp.asarray(weights)
)
print(np.abs(by_jaxpg - by_hand).max(), "is the largest difference from by hand")

# %% [markdown]
# ## The exact gradient
#
# The mine is so small that `jaxpg.exact` can follow every state's probability, and
# differentiate $J$ itself. No sampling is left.

# %%
exact = jaxpg.exact.policy_gradient(mdp, policy, params)
exact_table = np.asarray(exact["network"])

names = ("surface:\ntake", "surface:\ndig", "seam:\ntake", "seam:\ndig")
ways = {
    "by hand": by_hand,
    "jax.grad": by_grad,
    "score_gradient": by_jaxpg,
    "exact": exact_table,
}
figure, axis = plt.subplots(figsize=(7, 3))
for k, (label, gradient) in enumerate(ways.items()):
    places = np.arange(4) + 0.2 * (k - 1.5)
    colour = "black" if label == "exact" else None
    axis.bar(places, np.asarray(gradient)[:2].ravel(), 0.18, label=label, color=colour)
axis.axhline(0.0, color="black", lw=0.8)
axis.set_xticks(np.arange(4), names)
axis.set_xlabel("logit")
axis.set_ylabel("derivative of $J$ (reward)")
axis.legend()
plt.show()

# %% [markdown]
# Three of the four bars of a group are the same number, computed in three ways from the
# same episodes. The black one is the truth that they estimate; the gap is luck.
#
# ## How much luck?
#
# One trajectory's gradient has a variance, and the mean of $N$ independent ones has
# $1/N$ of it. The oracle knows the variance of one trajectory exactly, by visiting all
# trajectories that the mine can produce. So the root-mean-square error of a batch is
# known before anything is sampled:
#
# $$\sqrt{\mathbb{E}\,\lVert g_N-\nabla J\rVert^2} = \sqrt{\operatorname{tr}\Sigma/N}.$$
#
# From here on jaxpg plays the episodes too: `rollout_episodes` samples them,
# `credit_of` turns rewards into weights, `trajectory_gradients` gives each
# trajectory's own term.

# %%
score = jaxpg.log_prob_fn(policy)


def terms_of(rows):
    weights = jaxpg.credit_of(rows).value
    return jaxpg.trajectory_gradients(score, params, rows, weights)["network"]


def one_gradient(batch):
    return jnp.mean(terms_of(batch), axis=0)


of_one = jaxpg.exact.estimate_moments(one_gradient, mdp, policy, params, batch_size=1)

sizes = 4 ** np.arange(1, 5 if quick else 7)
ids = jnp.arange(num_batches * sizes[-1])
sample = jaxpg.rollout_episodes(env, policy, params, jax.random.key(1), ids)
terms = np.asarray(jax.jit(terms_of)(sample))


def rms_error(size):
    means = terms[: num_batches * size].reshape(num_batches, size, 3, 2).mean(1)
    return np.sqrt(((means - exact_table) ** 2).sum((1, 2)).mean())


figure, axis = plt.subplots(figsize=(6, 3.2))
axis.loglog(
    sizes,
    np.sqrt(of_one.total_variance / sizes),
    color="black",
    label="oracle: $\\sqrt{\\mathrm{tr}\\,\\Sigma / N}$",
)
axis.loglog(sizes, [rms_error(n) for n in sizes], "o", ms=8, label="measured")
axis.axhline(np.linalg.norm(exact_table), ls=":", color="grey", label="$|\\nabla J|$")
axis.set_xlabel("trajectories in a batch, $N$")
axis.set_ylabel("RMS error of the gradient")
axis.legend()
plt.show()

# %% [markdown]
# The measured errors lie on the oracle's line. Where the line is above the dotted one,
# a batch's gradient is more noise than signal. Notebook 2 is about pushing the line
# down.
#
# ## CartPole in a dozen lines
#
# Nothing changes for a real task but the parts: a world, a network, and an algorithm,
# which is an estimator with an optimiser. A batch of whole episodes goes in, a better
# policy comes out.

# %%
env = jaxpg.envs.make("CartPole-v1")
policy = jaxpg.mlp_policy(env.observation_space, env.action_space)
algorithm = jaxpg.reinforce(jaxpg.ReinforceConfig(), jaxpg.make_task(env, policy))
ids = jnp.arange(32 if quick else 256)


@jax.jit
def update(key, state):
    key_rollout, key_update = jax.random.split(key)
    rows = jaxpg.rollout_episodes(
        env, policy, state.params, key_rollout, ids, num_slots=len(ids) // 4
    )
    returns = jnp.sum(rows.reward, where=rows.mask) / len(ids)
    return algorithm.update(key_update, state, rows)[0], returns


state = algorithm.init(jax.random.key(0), env.reset(jax.random.key(1))[1])
curve = []
for key in jax.random.split(jax.random.key(2), num_updates):
    state, mean_return = update(key, state)
    curve.append(float(mean_return))
print(f"mean return of the first batch {curve[0]:.0f}, of the last {curve[-1]:.0f}")

# %%
figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(np.arange(1, num_updates + 1), curve, "o-")
axis.axhline(500, ls=":", color="grey", label="the most there is")
axis.set_xlabel("update")
axis.set_ylabel("mean return of the batch (decisions)")
axis.set_ylim(0, 520)
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# Each point is the mean return of the episodes that the next step is made from. The
# pole stays up longer and longer, and no derivative of its physics was ever taken.
