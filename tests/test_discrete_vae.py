"""Discrete latents: identities by enumeration, estimators against them, the command."""

import dataclasses
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import stochastic
from jaxpg.cli import main
from jaxpg.systems import discrete_vae as system_file
from jaxpg.systems.discrete_vae import discrete_vae
from jaxpg.systems.latent_data import BinaryDigits, binarise
from jaxpg.systems.latent_estimators import make_estimator
from jaxpg.systems.latent_model import (
    exact_bound,
    exact_log_likelihood,
    importance_weighted_bound,
    init_model,
    make_program,
)
from jaxpg.systems.latent_settings import DiscreteVAESettings as Settings

BITS = Settings(num_bits=2, hidden=0, num_layers=2)
GROUPS = Settings(latent="categorical", num_groups=2, num_values=3, hidden=2)
IMAGE = np.array([1.0, 0.0, 1.0])


def random_params(settings, dtype=np.float64):
    """Far from uniform, so that terms left out or counted twice are seen."""
    params = init_model(settings, jax.random.key(0), len(IMAGE))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), params)


# --- the same model in NumPy, written out


def network(layers, inputs):
    x = 2.0 * inputs - 1.0
    for layer in layers[:-1]:
        x = np.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def bits_mass(logits, code):
    p = 1.0 / (1.0 + np.exp(-logits))
    return np.prod(np.where(code > 0, p, 1.0 - p))


def groups_mass(logits, code):
    p = np.exp(logits.reshape(GROUPS.num_groups, -1))
    return np.prod((p / p.sum(1, keepdims=True))[code.reshape(p.shape) > 0])


def layer_codes(settings):
    if settings.latent == "bernoulli":
        return [np.array(c, float) for c in itertools.product((0, 1), repeat=2)]
    eye = np.eye(settings.num_values)
    return [
        np.concatenate([eye[i] for i in chosen])
        for chosen in itertools.product(range(3), repeat=settings.num_groups)
    ]


def joint_and_posterior(settings, params):
    """p(x, z) and q(z | x) of every code."""
    params = jax.tree.map(np.asarray, params)
    mass = bits_mass if settings.latent == "bernoulli" else groups_mass
    joint, inferred = [], []
    for codes in itertools.product(layer_codes(settings), repeat=settings.num_layers):
        below, p, q = IMAGE, mass(params["prior"], codes[-1]), 1.0
        for number, code in enumerate(codes):
            q *= mass(network(params["inference"][number], below), code)
            seen = network(params["generation"][number], code)
            p *= (bits_mass if number == 0 else mass)(seen, below)
            below = code
        joint.append(p)
        inferred.append(q)
    return np.array(joint), np.array(inferred)


@pytest.mark.parametrize("settings", [BITS, GROUPS], ids=["bits", "groups"])
@pytest.mark.thinned(2)
def test_the_bound_is_the_log_likelihood_less_the_divergence(settings):
    with jax.enable_x64(True):
        params = random_params(settings)
        image = jnp.asarray(IMAGE)
        joint, inferred = joint_and_posterior(settings, params)
        assert abs(inferred.sum() - 1.0) < 1e-12
        truth = np.log(joint.sum())
        posterior = joint / joint.sum()
        divergence = np.sum(inferred * np.log(inferred / posterior))

        def all_three(params):
            two = exact_bound(settings, params, image, num_samples=2)
            one = exact_bound(settings, params, image)
            return one, two, exact_log_likelihood(settings, params, image)

        one, two, likelihood = jax.jit(all_three)(params)
        both = np.log((joint / inferred)[:, None] / 2 + (joint / inferred)[None] / 2)
        assert abs(likelihood - truth) < 1e-10
        assert abs(one - (truth - divergence)) < 1e-10
        assert abs(two - inferred @ both @ inferred) < 1e-10
        assert one < two < likelihood

        # The operator's oracle, and calculus on log p(x) - KL, agree on the gradient.
        exact = stochastic.exact_expectation(make_program(settings))
        slope = jax.grad(exact)(params, jax.random.key(0), image)
        direction = jax.tree.map(jnp.cos, params)

        def bound_at(step):
            moved = jax.tree.map(lambda x, d: x + step * d, params, direction)
            joint, inferred = joint_and_posterior(settings, moved)
            return np.sum(inferred * np.log(joint / inferred))

        difference = (bound_at(1e-5) - bound_at(-1e-5)) / 2e-5
        pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True)
        assert abs(difference + sum(jnp.vdot(g, d) for g, d in pairs)) < 1e-8


ONE_LAYER = Settings(num_bits=2, hidden=0, num_samples=6)
UNBIASED = {
    "score": ONE_LAYER,
    "leave-one-out": BITS,
    "moving-average": ONE_LAYER,
    "nvil": dataclasses.replace(BITS, scale=False),
    "vimco": ONE_LAYER,
    "arm": ONE_LAYER,
    "disarm": BITS,
    "rebar": dataclasses.replace(GROUPS, hidden=0, num_samples=3),
    "relax": ONE_LAYER,
}
BIASED = {
    "gumbel-softmax": dataclasses.replace(ONE_LAYER, temperature=1.0),
    "straight-through": dataclasses.replace(ONE_LAYER, temperature=1.0),
}


def furthest(settings, name, number=4000):
    """The largest z-score of an estimator's mean against the exact gradient."""
    settings = dataclasses.replace(settings, estimator=name)
    settings = dataclasses.replace(
        settings, num_samples=2 if name == "vimco" else settings.num_samples
    )
    params = random_params(settings, np.float32)
    images = jnp.asarray([IMAGE, 1.0 - IMAGE], np.float32)
    estimator = make_estimator(settings)

    @jax.jit
    def gradients(key):
        state = estimator.init(key, images[0])

        # What it learns first, it uses in what is tested.
        def step(_, s):
            return estimator.gradient(params, s, key, images)[2]

        state = jax.lax.fori_loop(0, 20, step, state)
        keys = jax.random.split(jax.random.key(5), number)
        return jax.vmap(lambda k: estimator.gradient(params, state, k, images)[1])(keys)

    samples = 2 if name == "vimco" else 1
    bound = partial(exact_bound, settings, num_samples=samples)
    truth = jax.jit(
        jax.grad(lambda p: -jnp.mean(jax.vmap(bound, (None, 0))(p, images)))
    )(params)

    def score(each, truth):
        each = np.asarray(each, np.float64)
        error = each.std(0, ddof=1) / np.sqrt(number)
        return np.max(np.abs(each.mean(0) - truth) / (error + 1e-6))

    # Optax's own arithmetic mixes types.
    with jax.numpy_dtype_promotion("standard"):
        each = gradients(jax.random.key(3))
    return max(jax.tree.leaves(jax.tree.map(score, each, truth)))


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.thinned(8)
def test_the_mean_of_an_unbiased_estimator_is_the_exact_gradient(name):
    # At most 32 entries: the largest of as many normal ones is above 4.5 in one of 4600
    # runs, and the keys are fixed.
    assert furthest(UNBIASED[name], name) < 4.5


@pytest.mark.parametrize("name", BIASED)
def test_the_mean_of_a_biased_estimator_is_not(name):
    assert furthest(BIASED[name], name) > 10.0


def test_the_exact_estimator_draws_nothing():
    settings = dataclasses.replace(ONE_LAYER, estimator="exact")
    params = random_params(settings, np.float32)
    images = jnp.asarray([IMAGE], np.float32)
    bound, slope, _ = make_estimator(settings).gradient(
        params, (), jax.random.key(0), images
    )
    exact = jax.grad(lambda p: -exact_bound(settings, p, images[0]))(params)
    np.testing.assert_allclose(bound, exact_bound(settings, params, images[0]), 1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), slope, exact)


def test_bounds_grow_with_samples_and_stay_under_the_log_likelihood():
    params = random_params(ONE_LAYER, np.float32)
    image = jnp.asarray(IMAGE, np.float32)
    keys = jax.random.split(jax.random.key(2), 20000)

    @partial(jax.jit, static_argnums=0)
    def bounds(num_samples):
        each = jax.vmap(
            lambda key: importance_weighted_bound(
                ONE_LAYER, params, key, image, num_samples
            )
        )(keys)
        return jnp.mean(each[0]), jnp.mean(each[1]), jnp.std(each[1])

    ladder = [bounds(k) for k in (1, 2, 8)]
    tight = [float(mean) for _, mean, _ in ladder]
    errors = [3.5 * float(std) / np.sqrt(len(keys)) for _, _, std in ladder]
    truth = [
        float(exact_bound(ONE_LAYER, params, image, num_samples=k)) for k in (1, 2)
    ]
    assert abs(tight[0] - truth[0]) < errors[0] and tight[0] == ladder[0][0]
    assert abs(tight[1] - truth[1]) < errors[1]
    assert abs(ladder[2][0] - truth[0]) < errors[0]
    likelihood = float(exact_log_likelihood(ONE_LAYER, params, image))
    assert tight[0] < tight[1] < tight[2] < likelihood


# --- training, and the command line


def tiny_digits():
    """Two kinds of images, one noisy pixel each."""
    kinds = np.array([[1, 1, 1, 0, 0, 0, 0, 0.5] * 8, [0, 0, 0, 1, 1, 1, 0.5, 0] * 8])
    intensities = jnp.asarray(np.repeat(kinds, 10, 0), np.float32)
    bits = binarise(jax.random.key(0), intensities)
    return BinaryDigits(intensities, bits, jnp.concatenate([bits, bits]))


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.setattr(system_file, "load_binary_digits", tiny_digits)


def test_the_command_trains_evaluates_and_draws(digits, tmp_path, capsys):
    words = ["train", "discrete-vae", "--num-updates", "100", "--evaluate-every", "50"]
    words += ["--estimator", "exact", "--num-bits", "2", "--hidden", "0"]
    words += ["--learning-rate", "0.05", "--batch-size", "4", "--name", "a"]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*words, "--runs-dir", str(tmp_path)]) == 0, capsys.readouterr().err
    folder = tmp_path / "a"
    (last,) = json.loads((folder / "evaluation.json").read_text())
    assert last["test_bound"] <= last["test_tight_bound"] + 0.05
    assert last["test_tight_bound"] < last["test_log_likelihood"] + 0.05
    # Two kinds of images and eight noisy pixels: log 2 + 8 log 2 is the least there is.
    assert -14.0 < last["test_log_likelihood"] < -5.0
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"estimator": "exact", "num_bits": 13}, "2\\^13 codes, needs at most 4096"),
        ({"estimator": "vimco", "num_samples": 1}, "num_samples is 1.*at least 2"),
        ({"estimator": "disarm", "latent": "categorical"}, "needs latent='bernoulli'"),
        ({"num_values": 1}, "num_values is 1, needs at least 2"),
        ({"hidden": -1}, "hidden is -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(map(str, x.values())),
)
def test_settings_that_do_not_fit_together(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**changes)


def test_what_is_too_large_to_enumerate_is_said():
    settings = Settings(num_bits=13, hidden=0)
    params = init_model(settings, jax.random.key(0), 3)
    with pytest.raises(ValueError, match="8192 outcomes"):
        exact_log_likelihood(settings, params, jnp.zeros(3))


def test_a_resumed_state_has_the_types_of_the_first_one(digits):
    """A state whose types drift is compiled again, and cannot be carried by a loop."""
    for name in ("relax", "nvil"):
        settings = Settings(num_bits=2, hidden=0, batch_size=2, estimator=name)
        system = discrete_vae(settings)
        first = jax.eval_shape(system.init, jax.random.key(0))
        with jax.numpy_dtype_promotion("standard"):
            second, _ = jax.eval_shape(system.update, jax.random.key(0), first)
        kinds = [
            [(x.dtype, x.weak_type) for x in jax.tree.leaves(s)]
            for s in (first, second)
        ]
        assert kinds[0] == kinds[1]
