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
num_seeds = 1 if quick else 2
names = ["leave-one-out", "gumbel-softmax"]
if not quick:
    names += ["score", "disarm"]
colours = {name: f"C{i}" for i, name in enumerate(names)}
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
    def all_of_them(params, keys):
        def one(key):
            return each.gradient(params, memory, key, images)[1]["inference"]

        return jax.lax.map(jax.vmap(one), keys)

    number = 1 if name == "exact" else num_gradients
    keys = jax.random.split(jax.random.key(3), number).reshape(-1, min(number, 16))
    found = jax.tree.leaves(all_of_them(state.params, keys))
    return np.concatenate([np.asarray(x).reshape(number, -1) for x in found], axis=1)


(exact,) = gradients("exact")
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
for place, (name, colour) in enumerate(colours.items()):
    found = gradients(name)
    along = found @ exact / (exact @ exact) - 1.0
    error = 1.96 * along.std() / np.sqrt(len(along))
    variance = found.var(0).sum() / (exact @ exact)
    style = {"fmt": "o", "capsize": 3, "color": colour}
    left.errorbar(100 * along.mean(), place, xerr=100 * error, **style)
    right.plot(variance, place, "o", color=colour)
    print(
        f"{name:>16}: bias {100 * along.mean():+6.1f} (+-{100 * error:.1f}) %,"
        f" variance {variance:.3g}"
    )
left.axvline(0.0, color="grey", lw=0.8)
left.set_yticks(range(len(names)), names)
left.set_ylabel("estimator")
left.set_xlabel("bias along the exact gradient\n(%, bars: 95%)")
right.set_xscale("log")
right.set_xlabel("total variance, over the squared\nlength of the exact gradient")
plt.show()

# %% [markdown]
# The score alone is unbiased, and useless: its variance is hundreds of times that of
# leave-one-out, which takes the mean of the other samples off and costs nothing more.
# DisARM, made for bits, is as good. That relaxed draws are biased can hardly be seen of
# so small a model as it is now; `benchmarks/discrete_vae.py` shows it for all estimators.
#
# ## What it is worth in training
#
# The same model with 32 bits, far too many codes to visit, trained by each estimator
# from the same first parameters. The bound is that of images which training never sees.

# %%
model = DiscreteVAESettings(evaluation_samples=20)
keys = jax.vmap(jax.random.key)(np.arange(num_seeds))
visits = np.arange(num_updates // 10, num_updates + 1, num_updates // 10)


def test_bounds(name):
    """Test bounds at each visit, a row for each seed, and the parameters at the end."""
    system = discrete_vae(dataclasses.replace(model, estimator=name), digits)

    def of_one_seed(key):
        def update(state, count):
            return system.update(jax.random.fold_in(key, count), state)[0], None

        def visit(state, begin):
            state, _ = jax.lax.scan(update, state, begin + np.arange(visits[0]))
            return state, system.evaluate(key, state)["test_bound"]

        return jax.lax.scan(visit, system.init(key), visits - visits[0])

    state, bounds = jax.jit(jax.vmap(of_one_seed))(keys)
    return np.asarray(bounds), state.params


plt.figure(figsize=(6, 3.4))
for name, colour in colours.items():
    bounds, params = test_bounds(name)
    if name == "leave-one-out":
        learned = jax.tree.map(lambda x: x[0], params)
    plt.plot(visits, bounds.T, color=colour, lw=1.2)
    plt.plot([], [], color=colour, label=name)
    print(f"{name:>16}: " + ", ".join(f"{x:.2f}" for x in bounds[:, -1]) + " nats")
plt.xlabel("updates")
plt.ylabel("bound of test images (nats)")
plt.legend()
plt.show()

# %% [markdown]
# Leave-one-out and DisARM lead, relaxed draws follow, and the score alone stays behind. A
# little bias harms less than much variance, and neither is needed.
#
# ## What the model has learned
#
# A code drawn from the prior of the model that leave-one-out trained, decoded: grey is a
# pixel's probability of ink.

# %%
keys = jax.random.split(jax.random.key(4), (3, 12))
drawn = jax.vmap(jax.vmap(lambda key: draw_image(model, learned, key)))(keys)
figure, axis = plt.subplots(figsize=(6, 1.7))
show_images(axis, drawn, f"samples after {num_updates} updates")
axis.set_axis_off()
plt.show()
