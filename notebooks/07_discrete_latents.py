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
# # 7. Which estimator should train discrete latents?
#
# A variational autoencoder describes an image $x$ by a code $z$ of bits. It is trained
# to raise the evidence bound
#
# $$\mathbb{E}_{q(z|x)}\big[\log p(x, z) - \log q(z|x)\big] \le \log p(x),$$
#
# and no gradient passes through a bit. With 6 bits there are 64 codes, few enough to
# know the exact gradient; so we can see what each estimator makes of it.

# %%
import dataclasses
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxpg.systems.discrete_vae import discrete_vae, show_images
from jaxpg.systems.latent_data import load_binary_digits
from jaxpg.systems.latent_estimators import make_estimator
from jaxpg.systems.latent_model import draw_image
from jaxpg.systems.latent_settings import DiscreteVAESettings

plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
num_updates = 100 if quick else 1000
num_gradients = 64 if quick else 1024
names = ["score", "leave-one-out", "gumbel-softmax"]
if not quick:
    names += ["disarm", "rebar", "straight-through"]
digits = load_binary_digits()
settings = DiscreteVAESettings(num_bits=6, estimator="exact")

# %% [markdown]
# ## A model to measure at
#
# We train it with the exact gradient, and keep the parameters.

# %%
system = discrete_vae(settings, digits)


@jax.jit
def train(state):
    keys = jax.random.split(jax.random.key(1), num_updates)
    return jax.lax.scan(lambda s, key: system.update(key, s), state, keys)


state, info = train(system.init(jax.random.key(0)))
plt.figure(figsize=(6, 2.6))
plt.plot(info["bound"])
plt.xlabel("update")
plt.ylabel("bound of the batch (nats)")
plt.show()

# %% [markdown]
# ## Many estimates of one gradient
#
# Each estimator runs the model about six times for an image. Its bias is how far the
# mean of many estimates is from the exact gradient, its variance how far each one
# strays. We look along the exact gradient and at the total.

# %%
images = digits.test[:32]


def gradients(name):
    each = make_estimator(dataclasses.replace(settings, estimator=name))
    memory = each.init(jax.random.key(2), images[0])

    @jax.jit
    def all_of_them(keys):
        def one(key):
            return each.gradient(state.params, memory, key, images)[1]

        return jax.lax.map(one, keys, batch_size=16)

    number = 1 if name == "exact" else num_gradients
    found = all_of_them(jax.random.split(jax.random.key(3), number))["inference"]
    leaves = [np.asarray(x).reshape(number, -1) for x in jax.tree.leaves(found)]
    return np.concatenate(leaves, axis=1)


(exact,) = gradients("exact")
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
for place, name in enumerate(names):
    found = gradients(name)
    along = found @ exact / (exact @ exact) - 1.0
    error = 1.96 * along.std() / np.sqrt(len(along))
    left.errorbar(100 * along.mean(), place, xerr=100 * error, fmt="o", capsize=3)
    right.plot(found.var(0).sum() / (exact @ exact), place, "o")
left.axvline(0.0, color="grey", lw=0.8)
left.set_yticks(range(len(names)), names)
left.set_xlabel("bias along the exact gradient\n(%, bars: 95%)")
right.set_xscale("log")
right.set_xlabel("total variance, over the squared\nlength of the exact gradient")
plt.show()

# %% [markdown]
# ## What the model has learned
#
# A code drawn from the prior, decoded: grey is a pixel's probability of ink.

# %%
keys = jax.random.split(jax.random.key(4), (3, 12))
drawn = jax.vmap(jax.vmap(lambda key: draw_image(settings, state.params, key)))(keys)
figure, axis = plt.subplots(figsize=(6, 1.7))
show_images(axis, drawn, f"samples after {num_updates} updates")
plt.show()

# %% [markdown]
# The score alone is unbiased, but its variance is many times that of the others. What
# takes it away costs little: the mean of the other samples, or antithetic draws, which
# are the usual choice for bits. Relaxed draws have little variance and a bias that no
# number of samples removes.
