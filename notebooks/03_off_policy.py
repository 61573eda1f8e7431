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
# # 3. How far can another policy's data be trusted?
#
# A behaviour policy $\mu$ collected the episodes; we want the gradient of another, $\pi$.
# Each decision has a ratio $\rho_t = \pi(a_t|s_t)/\mu(a_t|s_t)$, and weighing with
# products of ratios makes the expectation right. The product over a whole episode is
# exact but wild; leave ratios out, and it becomes tame but biased.
#
# | form | weight of $\nabla\log\pi(a_t \mid s_t)$ | in the limit |
# |---|---|---|
# | whole | $\prod_{\text{all } u}\rho_u\; G_t$ | exact |
# | causal | $\sum_{u\ge t} r_u \prod_{v\le u}\rho_v$ | exact |
# | future dropped | $\prod_{u\le t}\rho_u\; G_t$ | states of $\pi$, values of $\mu$ |
# | past dropped | $\sum_{u\ge t} r_u \prod_{t\le v\le u}\rho_v$ | states of $\mu$, values of $\pi$ |
# | first order | $\rho_t\; G_t$ | states and values of $\mu$ |
# | none | $G_t$ | not a gradient of $\pi$ |
#
# Bias and variance of all of them are exact numbers here: the oracle visits every
# trajectory of the mine (notebook 1).

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxpg
from jaxpg import exact, importance
from jaxpg.credit import CreditConfig
from jaxpg.envs.tabular import canonical_mdp, random_mdp, tabular_environment

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
distances = np.linspace(0.0, 4.0, 3 if quick else 17)
horizons = (1, 3) if quick else (1, 2, 3, 4, 5, 6)
long_horizon = 8 if quick else 60
num_episodes = 256 if quick else 4096
sizes = (1, 2) if quick else (1, 2, 3, 4, 5)

# %% [markdown]
# ## A policy that walks away
#
# $\mu$ is a table of logits. $\pi$ starts as $\mu$ and walks along the gradient of $J$,
# as a policy does that takes many steps on one batch. How far it has come is the mean KL
# per decision, $\mathrm{KL}(\mu\Vert\pi)$, over the states that $\mu$ visits.

# %%
mdp = canonical_mdp()
env = tabular_environment(mdp)
policy = jaxpg.tabular_policy(env.observation_space, env.action_space)
behaviour = policy.init(jax.random.key(0), jnp.array(0))

uphill = exact.policy_gradient(mdp, policy, behaviour)["network"]
uphill = uphill / jnp.linalg.norm(uphill)


def walked(distance):
    return {**behaviour, "network": behaviour["network"] + distance * uphill}


def mean_kl(params):
    """Of one decision, in nats."""
    visits = jnp.sum(exact.occupancies(mdp, policy, behaviour), axis=0)
    mu = jax.nn.log_softmax(behaviour["network"])
    pi = jax.nn.log_softmax(params["network"])
    return visits @ jnp.sum(jnp.exp(mu) * (mu - pi), axis=1) / jnp.sum(visits)


targets = jax.vmap(walked)(distances)
kls = jax.vmap(mean_kl)(targets)
print("mean KL of the farthest policy:", round(float(kls[-1]), 2), "nats")

# %%
FORMS = {
    "whole": "whole",
    "causal": "causal",
    "future dropped": "future-dropped",
    "past dropped": "past-dropped",
    "first order": "first-order",
    "none": "none",
}
STYLES = dict(zip(FORMS, ("o-", "s-", "^--", "v--", "D:", "x:"), strict=True))


def estimator_with(ratio, **settings):
    credit = CreditConfig(ratio=ratio, **settings)
    config = jaxpg.EstimatorConfig(credit=credit, baseline="none")
    return jaxpg.make_estimator(config, policy, max_steps=long_horizon)


estimators = {name: estimator_with(ratio) for name, ratio in FORMS.items()}


def moments_at(mdp, targets):
    """Exact mean and variance of one trajectory's estimate, for each form and target."""

    def estimates(batch):
        def of_target(params):
            return {
                name: jaxpg.estimate_gradient(estimator, params, (), batch)["network"]
                for name, estimator in estimators.items()
            }

        return jax.vmap(of_target)(targets)

    return exact.estimate_moments(estimates, mdp, policy, behaviour, batch_size=1)


def truths(mdp, targets):
    gradient = jax.vmap(lambda p: exact.policy_gradient(mdp, policy, p))
    return np.asarray(gradient(targets)["network"])


def norm(x):
    return np.linalg.norm(np.asarray(x), axis=(-2, -1))


def deviation(moments, name):
    return np.sqrt(np.sum(np.asarray(moments.variance[name]), axis=(-2, -1)))


moments, truth = moments_at(mdp, targets), truths(mdp, targets)
biases = {name: norm(moments.mean[name] - truth) for name in FORMS}
deviations = {name: deviation(moments, name) for name in FORMS}

figure, axes = plt.subplots(1, 3, figsize=(10, 4))
for name, style in STYLES.items():
    error = np.sqrt(biases[name] ** 2 + deviations[name] ** 2 / 100)
    for axis, y in zip(axes, (biases[name], deviations[name], error), strict=True):
        axis.plot(kls, y, style, ms=4, label=name)
titles = ("bias", "deviation of one trajectory", "RMS error, 100 trajectories")
for axis, title in zip(axes, titles, strict=True):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("KL per decision (nats)")
    axis.set_ylabel("length of a gradient")
axes[0].plot(kls, norm(truth), color="black", lw=1, label="$|\\nabla J|$ itself")
figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside lower center")
plt.show()

# %% [markdown]
# Left: the whole and the causal form have no bias at any distance; each of the others
# starts without one and gains it as the policies part. Middle: what was dropped is paid
# back in variance; the causal form is never wilder than the whole one. Right: on a batch
# both count. With no ratios at all the error is soon mostly bias, which no further
# trajectory takes away.
#
# That the dropped forms end where the table says can be checked too: `mixed_gradient`
# takes states and values of any two policies.

# %%
far = walked(float(distances[-1]))
PI, MU = far, behaviour
for name, states_of, values_of in (
    ("future dropped", PI, MU),
    ("past dropped", MU, PI),
    ("first order", MU, MU),
):
    limit = exact.mixed_gradient(mdp, policy, far, states_of, values_of)["network"]
    gap = float(jnp.max(jnp.abs(moments.mean[name][-1] - limit)))
    print(f"{name:>14}: largest deviation from its limit {gap:.0e}")

# %% [markdown]
# ## Against the horizon
#
# Now $\pi$ stays at one distance, and days in the mine grow longer.

# %%
near = jax.tree.map(lambda x: x[None], walked(2.0))
results = {}
for horizon in horizons:
    world = mdp._replace(horizon=horizon)
    found, gradient = moments_at(world, near), truths(world, near)
    for name in FORMS:
        gap = norm(found.mean[name] - gradient)[0]
        results[name, horizon] = gap, deviation(found, name)[0]

figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
for name, style in STYLES.items():
    for k, axis in enumerate(axes):
        ys = [results[name, horizon][k] for horizon in horizons]
        axis.plot(horizons, ys, style, ms=5, label=name)
for axis, title in zip(axes, titles, strict=False):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("horizon (decisions)")
    axis.set_ylabel("length of a gradient")
figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
plt.show()

# %% [markdown]
# A single decision has no past and no future, so at horizon 1 all forms with ratios
# agree. Every further decision adds a ratio to the products, and a place where what was
# dropped would have counted: the exact forms stay on the zero line.
#
# ## The effective sample size
#
# In a world whose episodes never end early, horizons can be long. Weights $W_t =
# \prod_{u\le t}\rho_u$ have mean 1 but a second moment that grows exponentially, and
# `weight_second_moments` follows it by dynamic programming. $N$ weighted episodes are
# worth about $N/\mathbb{E}[W_t^2]$ plain ones; `effective_sample_size` is what a sample
# says of it.

# %%
world = random_mdp(0, num_states=4, num_terminal=0, horizon=long_horizon)
long_env = tabular_environment(world)
table = jaxpg.tabular_policy(long_env.observation_space, long_env.action_space)
mu = table.init(jax.random.key(0), jnp.array(0))
nudge = jax.random.normal(jax.random.key(1), mu["network"].shape)
pi = {**mu, "network": mu["network"] + nudge}

rows = jaxpg.rollout_episodes(
    long_env, table, mu, jax.random.key(2), jnp.arange(num_episodes)
)
log_probs = jax.vmap(jaxpg.log_prob_fn(table), (None, 0))(pi, rows)
log_rhos = jax.vmap(importance.log_ratios)(log_probs, rows.log_prob, rows.mask)
products = jax.vmap(importance.cumulative_log_rhos)(log_rhos, rows.time)
worth = jax.vmap(importance.effective_sample_size, in_axes=1)

second = exact.weight_second_moments(world, table, pi, mu)
rate = float(exact.weight_growth_rate(world, table, pi, mu))
print(f"E[W^2] grows by {100 * (np.exp(rate) - 1):.0f}% with every decision")

figure, axis = plt.subplots(figsize=(6, 3.4))
t = np.arange(1, long_horizon + 1)
axis.semilogy(t, 1.0 / second, color="black", label="$1/\\mathbb{E}[W_t^2]$, exact")
axis.semilogy(t, worth(products) / num_episodes, "o", ms=4, label="product, sampled")
axis.semilogy(t, worth(log_rhos) / num_episodes, "x", ms=4, label="one ratio, sampled")
axis.axhline(1.0 / num_episodes, ls=":", color="grey", label="a single episode")
axis.set_xlabel("decision $t$")
axis.set_ylabel("effective part of the sample")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# On a logarithmic axis exponential decay is a line. The sampled products follow the
# exact one until only few episodes carry all the weight; then the sample no longer knows
# how bad it is. A single ratio, as in the first-order form, stays worth the same at
# every time, and that is why most of practice uses it.
#
# ## Truncated and self-normalised weights
#
# Two cures keep the form and change the weights. *Truncated* ratios, $\min(c,\rho)$, are
# biased for good. *Self-normalised* weights are divided by their mean over the batch:
# biased too, but less and less as batches grow. Days of two decisions are enough to
# enumerate whole batches.

# %%
short = mdp._replace(horizon=2)
cures = {
    "plain": estimator_with("whole"),
    "truncated at 1.5": estimator_with("whole", max_rho=1.5),
    "self-normalised": estimator_with("whole", self_normalize=True),
}
far = walked(1.0)
goal = exact.policy_gradient(short, policy, far)["network"]


def cured(batch):
    return {
        name: jaxpg.estimate_gradient(estimator, far, (), batch)["network"]
        for name, estimator in cures.items()
    }


by_size = [exact.estimate_moments(cured, short, policy, behaviour, n) for n in sizes]

figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
for name, style in zip(cures, ("o-", "s--", "^:"), strict=True):
    gaps = np.array([norm(found.mean[name] - goal) for found in by_size])
    spreads = np.array([deviation(found, name) for found in by_size])
    axes[0].plot(sizes, gaps / norm(goal), style, label=name)
    axes[1].plot(sizes, np.hypot(gaps, spreads) / norm(goal), style, label=name)
for axis, title in zip(axes, ("bias", "RMS error"), strict=True):
    axis.set_title(title, fontsize=10)
    axis.set_xticks(sizes)
    axis.set_xlabel("trajectories in a batch, $N$")
    axis.set_ylabel("in units of $|\\nabla J|$")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# Truncation has the same bias at every $N$. Self-normalised weights are all 1 in a
# batch of one, and begin with the bias of using no ratios; it shrinks as the batch's mean
# weight becomes the true one. Both give less error than plain weights on batches as
# small as these.
