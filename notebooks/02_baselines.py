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
# # 2. Which part of a gradient's noise can be taken away?
#
# Every estimator here has the same mean, $\nabla J$. They differ in variance, and the
# variance is what samples are spent on: half of it is worth twice the batch. Two ideas
# lower it for nothing:
#
# * **Causality**: a decision cannot change what was paid before it, so weigh it by the
#   reward-to-go $G_t$ and not by the total return $R$.
# * **Baselines**: subtract something that the action did not influence,
#
# $$\nabla J = \mathbb{E}\Big[\sum_t \nabla\log\pi_\theta(a_t|s_t)\,(G_t - b_t)\Big].$$
#
# First exactly, on a world whose every trajectory can be visited; then measured on
# CartPole.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxpg
from jaxpg.credit import CreditConfig
from jaxpg.envs.tabular import canonical_mdp, tabular_environment

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
exact_sizes = (2,) if quick else (2, 3)
batch_sizes = (4, 8) if quick else (8, 32, 128)
num_batches = 4 if quick else 32
num_updates = 2 if quick else 8

# %% [markdown]
# ## What one number can do
#
# Let $b$ be a constant. The oracle gives the variance of one trajectory's gradient for
# any $b$; it is a parabola. Its lowest point is where
#
# $$b^* = \frac{\mathbb{E}[\langle A, B\rangle]}{\mathbb{E}\lVert B\rVert^2},$$
#
# $A$ being a trajectory's gradient without baseline and $B$ the sum of its scores
# (Greensmith, Bartlett and Baxter 2004). The mean return $J$ is the usual guess.

# %%
mdp = canonical_mdp()
env = tabular_environment(mdp)
policy = jaxpg.tabular_policy(env.observation_space, env.action_space)
params = policy.init(jax.random.key(0), jnp.array(0))
score = jaxpg.log_prob_fn(policy)
truth = jaxpg.exact.policy_gradient(mdp, policy, params)
mean_return = jaxpg.exact.expected_return(mdp, policy, params)

TOTAL, TO_GO = CreditConfig(credit="total-return"), CreditConfig()
levels = jnp.linspace(-1.0, 3.0, 41)


def with_constants(credit):
    """One gradient for each constant; the oracle gives moments of them all at once."""

    def estimate(batch):
        value = jaxpg.credit_of(batch, credit).value

        def at(level):
            weights = jnp.where(batch.mask, value - level, 0.0)
            return jaxpg.score_gradient(score, params, batch, weights)["network"]

        return jax.vmap(at)(levels)

    return estimate


def total_variance(moments):
    return np.asarray(jnp.sum(moments.variance, axis=(1, 2)))


parabolas = {
    name: jaxpg.exact.estimate_moments(with_constants(credit), mdp, policy, params, 1)
    for name, credit in (("total return", TOTAL), ("reward-to-go", TO_GO))
}
stray = max(
    float(jnp.max(jnp.abs(moments.mean - truth["network"])))
    for moments in parabolas.values()
)
print(f"largest deviation of any mean from the exact gradient: {stray:.1e}")

figure, axis = plt.subplots(figsize=(6, 3.4))
for (name, moments), style in zip(parabolas.items(), ("--", "-"), strict=True):
    variance = total_variance(moments)
    (line,) = axis.plot(levels, variance, style, lw=2, label=name)
    best = variance.argmin()
    axis.plot(levels[best], variance[best], "o", ms=8, color=line.get_color())
axis.axvline(mean_return, ls=":", color="black", label="mean return $J$")
axis.axvline(0.0, color="grey", lw=0.8)
axis.set_xlabel("constant baseline $b$ (reward)")
axis.set_ylabel("variance of one gradient")
axis.set_ylim(0)
axis.legend()
plt.show()

# %% [markdown]
# The mean is the exact gradient wherever on the curves one stands: a constant moves
# nothing but the variance. Causality lowers the whole curve; the points are the best
# constants, and the mean return is near, but not the best.
#
# ## Baselines that must be estimated
#
# Nobody gives us $b^*$ or $J$; they come from the batch. A batch mean contains a
# trajectory's own return and so depends on its actions: that biases the gradient. Leave
# the own return out and the bias is gone. The oracle now visits all *batches* of $N$
# trajectories, and both bias and variance below are exact. A state's true value $V(s_t)$
# needs no estimate here, for the world is known.

# %%
values = jaxpg.exact.state_values(mdp, policy, params)


def predict_value(params, summary, rows, credit):
    return values[rows.time, rows.obs]


choices = {
    "total return": dict(credit=TOTAL, baseline="none"),
    "reward-to-go": dict(baseline="none"),
    "mean of the batch": dict(baseline="batch-mean"),
    "mean of the others": dict(baseline="leave-one-out"),
    "mean of the others at t": dict(baseline="time-dependent"),
    "optimal number": dict(baseline="optimal"),
    "optimal number at t": dict(baseline="optimal-time"),
    "optimal, per parameter": dict(baseline="per-parameter"),
    "true value V(s)": None,
}
if quick:
    kept = ("total return", "reward-to-go", "mean of the batch", "true value V(s)")
    choices = {name: choices[name] for name in kept}


def make(settings):
    if settings is None:
        known = jaxpg.baselines.stateless(predict_value)
        config = jaxpg.EstimatorConfig()
        return jaxpg.make_estimator(config, policy, mdp.horizon, baseline=known)
    config = jaxpg.EstimatorConfig(**settings)
    return jaxpg.make_estimator(config, policy, mdp.horizon)


estimators = {name: make(settings) for name, settings in choices.items()}


def all_estimates(batch):
    return {
        name: jaxpg.estimate_gradient(estimator, params, (), batch)["network"]
        for name, estimator in estimators.items()
    }


found = {
    size: jaxpg.exact.estimate_moments(all_estimates, mdp, policy, params, size)
    for size in exact_sizes
}


def spread(size, name):
    return float(size * jnp.sum(found[size].variance[name]))


def bias(size, name):
    gap = found[size].mean[name] - truth["network"]
    return float(100 * jnp.linalg.norm(gap) / jnp.linalg.norm(truth["network"]))


figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(8, 4))
places = np.arange(len(choices))[::-1]
for k, size in enumerate(exact_sizes):
    where = places + 0.2 - 0.4 * k
    left.barh(
        where, [spread(size, name) for name in choices], 0.36, label=f"N = {size}"
    )
    right.barh(where, [bias(size, name) for name in choices], 0.36)
left.set_yticks(places, choices)
left.set_ylabel("weight of a decision")
left.set_xlabel("N × variance of the batch's gradient")
right.set_xlabel("bias, % of $|\\nabla J|$")
left.legend()
plt.show()
for size in exact_sizes:
    percent = bias(size, "mean of the batch")
    print(f"bias with the mean of a batch of {size}: {percent:.1f}%")

# %% [markdown]
# Left: without a baseline $N$ times the variance is the same for every $N$. A baseline
# that is estimated from few others adds its own error, and the gap between its two bars
# is that error; the more numbers it estimates, the more it needs. Right: only the mean
# of the whole batch is biased, and by exactly $1/N$ of the gradient.
#
# The zero-variance dream is not to be had: even with the true $V(s)$ the world's own
# luck stays in $G_t$.
#
# ## CartPole, measured
#
# Here nothing can be enumerated, so we measure: many independent batches of each size,
# and the variance *between* their gradients. (The variance within one batch, divided by
# $N$, would miss what the baseline's own error adds.) The policy is somewhat trained,
# so that episodes differ in length. The value network is fitted on earlier batches.

# %%
env = jaxpg.envs.make("CartPole-v1", max_steps=100)
policy = jaxpg.mlp_policy(env.observation_space, env.action_space, hidden=(16,))
task = jaxpg.make_task(env, policy)
algorithm = jaxpg.reinforce(jaxpg.ReinforceConfig(learning_rate=0.02), task)


@jax.jit
def sample(key, params, ids):
    return jaxpg.rollout_episodes(env, policy, params, key, ids)


@jax.jit
def update(key, state):
    rows = sample(key, state.params, jnp.arange(64))
    return algorithm.update(key, state, rows)[0]


state = algorithm.init(jax.random.key(0), env.reset(jax.random.key(1))[1])
for key in jax.random.split(jax.random.key(2), num_updates):
    state = update(key, state)
trained = state.params

ids = jnp.arange(num_batches * batch_sizes[-1])
rows = sample(jax.random.key(4), trained, ids)
returns = jnp.sum(rows.reward, axis=1, where=rows.mask)
print(f"mean return {returns.mean():.0f}, deviation {returns.std():.0f}")

# %%
names = ("none", "leave-one-out", "time-dependent", "optimal-time", "value-network")
names = names[::4] if quick else names
first_obs = jax.tree.map(lambda x: x[0, 0], rows.obs)
earlier = sample(jax.random.key(5), trained, jnp.arange(8 if quick else 128))
credit = jaxpg.credit_of(earlier)


def gradients(name, size):
    """Gradients of independent batches, flat, [num_batches, P]."""
    estimator = jaxpg.make_estimator(
        jaxpg.EstimatorConfig(baseline=name),
        policy,
        env.max_steps,
        observation_space=env.observation_space,
    )
    fitted = estimator.baseline.init(jax.random.key(6), first_obs)
    fit = jax.jit(lambda state: estimator.baseline.fit(state, earlier, credit)[0])
    for _ in range(2 if quick else 10):
        fitted = fit(fitted)

    def of_batch(batch):
        gradient = jaxpg.estimate_gradient(
            estimator, trained, fitted, batch, num_trajectories=size
        )
        return jax.flatten_util.ravel_pytree(gradient)[0]

    count = num_batches * size
    batches = jax.tree.map(
        lambda x: x[:count].reshape(num_batches, size, *x.shape[1:]), rows
    )
    return jax.jit(lambda batches: jax.lax.map(of_batch, batches))(batches)


def variance_between(name, size):
    return float(jnp.sum(jnp.var(gradients(name, size), axis=0, ddof=1)))


measured = {name: [variance_between(name, n) for n in batch_sizes] for name in names}

figure, axis = plt.subplots(figsize=(6.5, 3.8))
for name, marker in zip(names, "osv^D", strict=False):
    axis.loglog(batch_sizes, measured[name], marker=marker, label=name)
first = measured["none"][0] * batch_sizes[0]
axis.loglog(
    batch_sizes, first / np.asarray(batch_sizes), ":", color="black", label="~ 1/N"
)
axis.set_xticks(batch_sizes, batch_sizes)
axis.set_xlabel("trajectories in a batch, $N$")
axis.set_ylabel("variance of the batch's gradient")
axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()
for name in names:
    share = measured[name][-1] / measured["none"][-1]
    print(f"{name:>15}: {share:.2f} of the variance without one, N = {batch_sizes[-1]}")

# %% [markdown]
# The dotted line is what $1/N$ does to the variance without baseline. A mean over time
# and a value network lie under it at every $N$: a pole that still stands late in an
# episode has less left to gain, and both know that. One number for all times does not,
# and here it is worse than none, for it takes far too much off late decisions. The number per decision that would be optimal if it were known lies highest of
# all in small batches: it is a ratio of noisy sums for every $t$, and its own error
# falls faster than $1/N$.
