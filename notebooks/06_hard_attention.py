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
# # 6. Can a window learn where to look?
#
# A digit stands somewhere on a canvas, among pieces of other digits. A small window may
# look a few times, and then a class must be named. Where it looks is a draw, and what it
# sees is no differentiable function of that: no gradient comes back through the window.
# The score function needs none.

# %%
import dataclasses
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxpg import stochastic
from jaxpg.distributions import DiagonalGaussian
from jaxpg.systems.attention_models import make_learner
from jaxpg.systems.attention_settings import HardAttentionSettings
from jaxpg.systems.canvases import fixed_canvases
from jaxpg.systems.digits import load_digits
from jaxpg.systems.gaze_pictures import paths_figure
from jaxpg.systems.glimpses import look
from jaxpg.systems.hard_attention import hard_attention

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 90})

quick = "JAXPG_QUICK" in os.environ
num_visits = 2 if quick else 8
visit = 5 if quick else 250
small = {"features": 16, "memory": 16, "batch_size": 16} if quick else {}
base = HardAttentionSettings(
    canvas=20,
    num_pieces=3,
    num_glimpses=3,
    glimpse=10,
    placements=1,
    decay_updates=num_visits * visit,
    spread_updates=num_visits * visit // 4,
    **small,
)

# %% [markdown]
# ## What the window sees
#
# A square of 10 pixels at full resolution, and one of 20 around it at half of it. From
# the middle, the second shows about where the digit is, and the first seldom what it is.

# %%
digits = load_digits()
canvases = fixed_canvases(
    digits.test,
    jnp.asarray(digits.train.images),
    1,
    seed=7,
    size=base.canvas,
    num_pieces=base.num_pieces,
    piece=base.piece,
)
figure, rows = plt.subplots(2, 3, figsize=(6, 4))
for row, canvas, label in zip(rows, canvases.images, canvases.labels, strict=False):
    near, wide = look(canvas, jnp.zeros(2), base.glimpse, base.scales)
    titles = (f"a canvas with a {label}", "near", "wide")
    for axis, image, title in zip(row, (canvas, near, wide), titles, strict=True):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
plt.show()


# %%
def ink(place):
    return jnp.sum(look(canvases.images[0], place, base.glimpse, base.scales) ** 2)


print("ink in the window, and its derivative by the window's place:")
for place in (jnp.zeros(2), jnp.array([0.4, -0.3])):
    print(f"  at {place}: {ink(place):.2f}, {jax.grad(ink)(place)}")

# %% [markdown]
# ## The score function needs no derivative
#
# Mark the place as drawn, and the expected ink becomes differentiable. Here the middle of
# a Gaussian over places climbs on it, for three canvases from the middle of each; 64
# draws a step, each judged by the mean of the others.


# %%
def program(middle, key, canvas):
    places = DiagonalGaussian(middle, jnp.full(2, jnp.log(0.3)))
    place = stochastic.sample(key, places, name="place")
    return -jnp.sum(look(canvas, place, base.glimpse, 1) ** 2)


loss = stochastic.score_function(program, num_samples=64, leave_one_out=True)


@jax.jit
def climb(canvas):
    def step(middle, key):
        gradient, _ = jax.grad(loss, has_aux=True)(middle, key, canvas)
        return jnp.clip(middle - 0.01 * gradient, -1.0, 1.0), middle

    keys = jax.random.split(jax.random.key(0), 60)
    return jax.lax.scan(step, jnp.zeros(2), keys)[1]


figure, axes = plt.subplots(1, 3, figsize=(7, 2.6), sharey=True)
for axis, canvas in zip(axes, canvases.images, strict=False):
    rows, columns = (np.asarray(climb(canvas)).T + 1.0) / 2.0 * (base.canvas - 1)
    axis.imshow(canvas, cmap="gray_r", vmin=0, vmax=1.6)
    axis.plot(columns, rows, color="C1")
    axis.plot(columns[-1], rows[-1], "o", color="C1")
    axis.set_xlabel("column")
axes[0].set_ylabel("row")
plt.show()

# %% [markdown]
# ## Looking in order to know
#
# The recurrent attention model does this for every canvas at once: a network remembers
# what it saw, proposes the next place, and names the class at the end. Places are credited
# with whether the answer is right, less what the network expected. Digits begin in the
# middle of their canvases and spread from there, so that there is something to see before
# there is somewhere to look. Beside it learns the same network with places drawn
# uniformly.

# %%
models = {
    model: dataclasses.replace(base, model=model)
    for model in ("attention", "random-glimpses")
}


def train(settings):
    """Held-out accuracy at each visit, and the parameters before and after."""
    system = hard_attention(settings)

    @jax.jit
    def advance(state, begin):
        def update(state, count):
            return system.update(jax.random.fold_in(jax.random.key(1), count), state)

        return jax.lax.scan(update, state, begin + jnp.arange(visit))[0]

    evaluate = jax.jit(system.evaluate)
    state = jax.jit(system.init)(jax.random.key(0))
    before, found = state["params"], []
    for number in range(num_visits):
        state = advance(state, number * visit)
        found.append(float(evaluate(jax.random.key(2), state)["accuracy"]))
    return found, before, state["params"]


results = {model: train(settings) for model, settings in models.items()}
visits = visit * np.arange(1, num_visits + 1)
plt.figure(figsize=(6, 3))
for model, (accuracy, _, _) in results.items():
    plt.plot(visits, 100 * np.array(accuracy), "o-", label=model)
    print(f"{model:>15}: {100 * accuracy[-1]:.1f}% of held-out canvases right")
plt.axhline(10, color="grey", ls=":", label="chance")
plt.xlabel("updates")
plt.ylabel("held-out accuracy (%)")
plt.legend()
plt.show()

# %% [markdown]
# ## Where it looks
#
# The distance from the window's middle to the digit's, by glimpse. The first is always at
# the middle of the canvas.

# %%
_, before, after = results["attention"]
learner = make_learner(models["attention"])
middles = canvases.corners + (digits.test.images.shape[-1] - 1) / 2


@jax.jit
def distances(params):
    def of_one(canvas, middle):
        gaze = learner.eye.gaze(params, jax.random.key(0), canvas, learner.choose)
        place = (gaze.places + 1.0) / 2.0 * (base.canvas - 1)
        return jnp.linalg.norm(place - middle, axis=-1)

    return jax.vmap(of_one)(canvases.images, middles)


plt.figure(figsize=(6, 3))
glimpses = np.arange(1, base.num_glimpses + 1)
for offset, params, name in ((-0.1, before, "before"), (0.1, after, "after")):
    low, median, high = np.percentile(distances(params), (10, 50, 90), axis=0)
    bars = (median - low, high - median)
    plt.errorbar(glimpses + offset, median, bars, fmt="o", capsize=3, label=name)
    print(
        f"{name}: median distance " + ", ".join(f"{x:.1f}" for x in median) + " pixels"
    )
plt.xticks(glimpses)
plt.xlabel("glimpse")
plt.ylabel("pixels to the digit's middle\n(median, 10% and 90%)")
plt.legend(title="training", loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
plt.show()

paths_figure(learner.eye, learner.choose, after, canvases, base.glimpse)

# %% [markdown]
# From the second look on the window stands where the digit is: one wide view is enough to
# know where to go, and nobody told it where that is. About two pixels are left of the
# distance: a window of 10 then still covers most of a digit of 8.
#
# The same with larger canvases, several seeds and a network that sees everything beside
# it: `jaxpg train hard-attention` and `benchmarks/hard_attention.py`.
