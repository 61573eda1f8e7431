"""Discrete latent variables: what each estimator of the gradient is worth.

    python benchmarks/discrete_vae.py                 everything, about half an hour
    python benchmarks/discrete_vae.py --only bias     one part: learning, variance, bias
    python benchmarks/discrete_vae.py --only learning --models "8 bits"    others stay
    python benchmarks/discrete_vae.py --draw          pictures again, of what is stored

learning    every estimator trains every model, three seeds side by side
variance    gradients of every estimator at the same parameters, those of one run that
            leave-one-out trains; what an estimator learns it has learned there
bias        8 bits, few enough for the exact gradient: how far the mean of many
            estimates is from it

All estimators run the model about equally often for an image (`num_samples`, 6), and
are judged on images that training never sees. Variance and bias are those of the
inference network's gradient, for one batch of images that is always the same.
"""

import argparse
import dataclasses
import statistics
from functools import partial
from typing import Any

import discrete_vae_figures
import jax
import jax.numpy as jnp
import numpy as np
import timing

from jaxpg.systems.discrete_vae import discrete_vae
from jaxpg.systems.latent_data import binarise, load_binary_digits
from jaxpg.systems.latent_estimators import make_estimator
from jaxpg.systems.latent_model import exact_bound
from jaxpg.systems.latent_settings import ESTIMATORS, MAX_CODES, num_codes
from jaxpg.systems.latent_settings import DiscreteVAESettings as Settings

RESULT = "discrete-vae"
SEEDS = 3
UPDATES = 2000
VISIT = 500
CHECKPOINTS = (0, 100, 300, 1000, 2000)
WARM_UP = 300
GRADIENTS = 128
FEW_BITS = Settings(num_bits=8)
MODELS = {
    "32 bits": Settings(),
    "8 groups of 8": Settings(latent="categorical"),
    "2 layers of 32 bits": Settings(num_layers=2),
    "8 bits": FEW_BITS,
}
SOME = ("leave-one-out", "nvil", "disarm", "rebar")
"""The estimators that train the model of two layers."""

DIGITS = load_binary_digits()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parts = {"learning": learning, "variance": variance, "bias": bias}
    parser.add_argument("--only", choices=parts, help="one part")
    parser.add_argument("--draw", action="store_true", help="the pictures alone")
    options = parser.parse_args()
    if not options.draw:
        for name in [options.only] if options.only else parts:
            parts[name](options.models)
    discrete_vae_figures.draw(timing.load(RESULT), timing.RESULTS)


def store(part: str, found: dict[str, Any]) -> None:
    """Put what was found into a part, beside what is stored there already."""
    try:
        stored = timing.load(RESULT)
    except FileNotFoundError:
        stored = {}
    stamp = ("date", "provenance")  # of this time, not of the last
    stored = {name: x for name, x in stored.items() if name not in stamp}
    found = stored.get(part, {}) | found
    settings = {
        "seeds": SEEDS,
        "updates": UPDATES,
        "num_samples": Settings.num_samples,
        "batch_size": Settings.batch_size,
        "gradients": GRADIENTS,
    }
    timing.save(RESULT, stored | {"settings": settings, part: found})


def candidates(model: Settings) -> dict[str, Settings]:
    """The estimators that suit a model."""
    names = SOME if model.num_layers > 1 else ESTIMATORS
    found = {}
    for name in names:
        if name in ("arm", "disarm") and model.latent != "bernoulli":
            continue
        if name == "exact" and num_codes(model) > MAX_CODES:
            continue
        found[name] = dataclasses.replace(model, estimator=name)
    return found


def learning(models: list[str]) -> None:
    """Bounds along training."""
    for model in models:
        found: dict[str, Any] = {}
        for name, settings in candidates(MODELS[model]).items():
            found[name], state = train(settings)
            if name == "leave-one-out":
                found[name]["images"] = images_of(settings, state)
            last = statistics.mean(found[name]["test_bound"][-1])
            print(f"{model}, {name}: {last:.2f}", flush=True)
        store("learning", {model: found})


def train(settings: Settings) -> tuple[dict[str, Any], Any]:
    """Train all seeds side by side."""
    system = discrete_vae(settings, DIGITS)
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    update = jax.vmap(system.update)

    def advance(state: Any, begin: Any) -> Any:
        def one(state: Any, number: Any) -> Any:
            each = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            return update(each, state)[0], None

        return jax.lax.scan(one, state, begin + jnp.arange(VISIT))[0]

    state = jax.jit(jax.vmap(system.init))(keys)
    run = jax.jit(advance).lower(state, 0).compile()
    evaluate = jax.jit(jax.vmap(system.evaluate))
    rows = []
    for done in range(0, UPDATES, VISIT):
        state = run(state, jnp.int32(done))
        rows.append(jax.tree.map(lambda x: x.tolist(), evaluate(keys, state)))
    found = {name: [row[name] for row in rows] for name in rows[0]}
    found["updates"] = list(range(VISIT, UPDATES + 1, VISIT))
    return found, state


def images_of(settings: Settings, state: Any) -> dict[str, Any]:
    """Test images, their reconstructions and samples of the first seed's model."""
    params = jax.tree.map(lambda x: x[0], state.params)
    return discrete_vae_figures.images_of(settings, params, DIGITS.test)


def variance(models: list[str]) -> None:
    """Variance of every estimator at checkpoints of one run."""
    images = DIGITS.test[: Settings.batch_size]
    for model in (m for m in ("32 bits", "8 groups of 8") if m in models):
        checkpoints = reference(MODELS[model])
        found: dict[str, Any] = {"updates": list(CHECKPOINTS)}
        for name, settings in candidates(MODELS[model]).items():
            moments = along(settings, checkpoints, images, GRADIENTS)
            found[name] = [float(m["variance"]) for m in moments]
            text = ", ".join(f"{x:.3g}" for x in found[name])
            print(f"{model}, {name}: variance {text}", flush=True)
        store("variance", {model: found})


def bias(models: list[str]) -> None:
    """The mean of many estimates beside the exact gradient, halfway through a run."""
    if "8 bits" not in models:
        return
    images, at = DIGITS.test[:32], 300
    checkpoints = {at: reference(FEW_BITS)[at]}
    found: dict[str, Any] = {"at": at, "gradients": 2048, "images": len(images)}
    for name, settings in candidates(FEW_BITS).items():
        samples = 2 if name == "vimco" else settings.num_samples
        settings = dataclasses.replace(settings, num_samples=samples, batch_size=32)
        (moments,) = along(settings, checkpoints, images, found["gradients"])
        truth = exact_gradient(settings, checkpoints[at], images)
        found[name] = compare(moments, truth, found["gradients"])
        text = ", ".join(f"{key} {x:.3g}" for key, x in found[name].items())
        print(f"8 bits, {name}: {text}", flush=True)
    store("bias", found)


def reference(settings: Settings) -> dict[int, Any]:
    """Parameters of a run that leave-one-out trains, by update."""
    system = discrete_vae(dataclasses.replace(settings, estimator="leave-one-out"))
    key = jax.random.key(100)

    @jax.jit
    def advance(state: Any, begin: Any, end: Any) -> Any:
        def step(n, s):
            return system.update(jax.random.fold_in(key, n), s)[0]

        return jax.lax.fori_loop(begin, end, step, state)

    state, done, found = jax.jit(system.init)(key), 0, {}
    for at in CHECKPOINTS:
        state, done = advance(state, done, at), at
        found[at] = state.params
    return found


def along(
    settings: Settings, checkpoints: dict[int, Any], images: Any, number: int
) -> list[dict[str, Any]]:
    """Moments of an estimator's gradients at each checkpoint.

    The scale of NVIL is left out: it would change what is estimated.
    """
    estimator = make_estimator(dataclasses.replace(settings, scale=False))

    @jax.jit
    def measure(params: Any, state: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        def warm(state: Any, key: Any) -> Any:
            at, bits, draws = jax.random.split(key, 3)
            size = (settings.batch_size,)
            chosen = jax.random.randint(at, size, 0, len(DIGITS.intensities))
            batch = binarise(bits, DIGITS.intensities[chosen])
            return estimator.gradient(params, state, draws, batch)[2], None

        def one(key: Any) -> Any:
            gradient = estimator.gradient(params, state, key, images)[1]
            return flat(gradient["inference"])

        if jax.tree.leaves(state):
            state, _ = jax.lax.scan(warm, state, jax.random.split(key, WARM_UP))
        keys = jax.random.split(jax.random.fold_in(key, 1), number)
        each = jax.lax.map(one, keys, batch_size=16)
        mean = jnp.mean(each, axis=0)
        total = jnp.sum((each - mean) ** 2) / (number - 1)
        return state, {"mean": mean, "variance": total, "each": each}

    state = estimator.init(jax.random.key(7), images[0])
    found = []
    for at, params in checkpoints.items():
        state, moments = measure(params, state, jax.random.key(1000 + at))
        found.append(jax.tree.map(np.asarray, moments))
    return found


def exact_gradient(settings: Settings, params: Any, images: Any) -> np.ndarray:
    """Of minus the bound that the estimator is for."""
    samples = settings.num_samples if settings.estimator == "vimco" else 1
    bound = partial(exact_bound, settings, num_samples=samples)

    def cost(params: Any) -> Any:
        return -jnp.mean(jax.lax.map(lambda x: bound(params, x), images))

    return np.asarray(flat(jax.jit(jax.grad(cost))(params)["inference"]))


def compare(moments: dict[str, Any], truth: np.ndarray, number: int) -> dict[str, Any]:
    """Bias in units of the exact gradient's length, as measured and as noise makes it.

    `along` is the bias along the exact gradient; `distance` that in all directions,
    with the square that noise alone would make of it taken off.
    """
    length = float(np.linalg.norm(truth))
    shares = moments["each"].astype(np.float64) @ truth / length**2
    noise = float(moments["variance"]) / number
    square = float(np.sum((moments["mean"].astype(np.float64) - truth) ** 2))
    return {
        "along": float(shares.mean() - 1.0),
        "along_error": float(shares.std(ddof=1) / np.sqrt(number)),
        "distance": max(square - noise, 0.0) ** 0.5 / length,
        "noise": noise**0.5 / length,
        "variance": float(moments["variance"]) / length**2,
    }


def flat(tree: Any) -> Any:
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


if __name__ == "__main__":
    main()
