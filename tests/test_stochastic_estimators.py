"""ARM, DisARM, REBAR, RELAX, VIMCO, relaxations and learned levels, held to the oracle.

The noise of these estimators is continuous, so it is integrated: Gauss-Legendre on each
piece where the draw does not change, which is exact to 1e-9 for what they make of it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpg import stochastic
from jaxpg.distributions import Bernoulli, Categorical, OneHotCategorical
from jaxpg.stochastic import controls, reruns
from jaxpg.stochastic.enumeration import outcomes_of
from jaxpg.stochastic.execution import trace
from jaxpg.stochastic.multi_sample import bound_with_scores, multi_sample_bound
from jaxpg.stochastic.noise import conditional, from_noise, hard, relaxed

KEY = jax.random.key(0)
LOGIT = 0.4


def bit_cost(logit, key):
    """One bit; the cost is no linear function of it, and depends on the parameter."""
    z = stochastic.sample(key, Bernoulli(logit[None]), name="z")[0].astype(logit.dtype)
    return 2.0 * (z - 0.3) ** 3 + jnp.exp(z * logit - 1.0)


def two_layers(params, key):
    """Bits that move bits; what is paid for the first ones alone comes in between."""
    one, two = jax.random.split(key)
    a = stochastic.sample(one, Bernoulli(params["a"]), name="a").astype(float)
    stochastic.cost(jnp.sum(a) ** 2, name="first")
    b = stochastic.sample(two, Bernoulli(params["b"] * (a - 0.3)), name="b")
    b = b.astype(float)
    return jnp.prod(b - 0.6) * 8.0 + params["a"][0] * jnp.sum(b * a)


def one_hot(params, key):
    z = stochastic.sample(key, OneHotCategorical(params["l"]), name="z")
    return jnp.sum(z * params["price"]) ** 2


LAYERS = {"a": jnp.array([0.3, -0.7]), "b": jnp.array([0.8, 1.1])}
VECTOR = {"l": jnp.array([0.3, -0.2, 0.6]), "price": jnp.array([1.0, -2.0, 0.5])}


def quadrature(logit, number=48):
    """Points and weights on (0, 1), cut where a bit or its opposite turns."""
    p = float(jax.nn.sigmoid(jnp.float64(logit)))
    cuts = sorted({0.0, p, 1.0 - p, 1.0})
    x, w = np.polynomial.legendre.leggauss(number)
    pieces = [
        ((high - low) / 2 * x + (high + low) / 2, w * (high - low) / 2)
        for low, high in itertools.pairwise(cuts)
    ]
    return tuple(
        jnp.asarray(np.concatenate(parts)) for parts in zip(*pieces, strict=True)
    )


def on_noise(monkeypatch, loss, **settings):
    """The loss's slope as a function of its noise: u of the draw, v of the control."""

    def slope(u, v):
        monkeypatch.setattr(reruns, "uniform_noise", lambda key, d: u[None])
        monkeypatch.setattr(controls, "uniform_noise", lambda key, d: v[None])
        of_logit = lambda logit: loss(logit, KEY, **settings)[0]  # noqa: E731
        return jax.grad(of_logit)(jnp.array(LOGIT, float))

    return slope


def integrated(monkeypatch, loss, **settings):
    """Mean and variance of the slope over all noise."""
    u, w = quadrature(LOGIT)
    slope = on_noise(monkeypatch, loss, **settings)
    over_both = jax.jit(jax.vmap(jax.vmap(slope, (None, 0)), (0, None)))
    slopes = over_both(u, u)
    weights = w[:, None] * w[None]
    mean = jnp.sum(weights * slopes)
    return float(mean), float(jnp.sum(weights * (slopes - mean) ** 2))


def exact_slope():
    expectation = stochastic.exact_expectation(bit_cost)
    return float(jax.grad(expectation)(jnp.array(LOGIT, float), KEY))


CRITIC = {"a": jnp.array(0.7), "b": jnp.array(-0.4)}


def critic(params, name, z):
    return jnp.sum(params["a"] * jnp.tanh(z) + params["b"] * jax.nn.sigmoid(2 * z))


UNBIASED = {
    "arm": (stochastic.arm(bit_cost), {}),
    "disarm": (stochastic.disarm(bit_cost), {}),
    "rebar": (stochastic.rebar(bit_cost), {}),
    "rebar, other control": (
        stochastic.rebar(bit_cost),
        {"control": {"scale": 0.3, "temperature": 1.0}},
    ),
    "relax": (
        stochastic.relax(bit_cost, critic),
        {"control": stochastic.DEFAULT_CONTROL | {"critic": CRITIC}},
    ),
}


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.thinned(2)
def test_integrated_over_all_noise_it_is_the_exact_gradient(name, monkeypatch, float64):
    loss, settings = UNBIASED[name]
    mean, _ = integrated(monkeypatch, loss, **settings)
    assert mean == pytest.approx(exact_slope(), abs=1e-9)


def test_disarm_varies_less_than_arm_and_rebar_less_than_the_score(
    monkeypatch, float64
):
    _, of_arm = integrated(monkeypatch, stochastic.arm(bit_cost))
    _, of_disarm = integrated(monkeypatch, stochastic.disarm(bit_cost))
    nothing = {"scale": 0.0, "temperature": 0.5}
    _, of_score = integrated(monkeypatch, stochastic.rebar(bit_cost), control=nothing)
    _, of_rebar = integrated(monkeypatch, stochastic.rebar(bit_cost))
    assert of_disarm < of_arm
    assert of_rebar < of_score


def test_the_slope_of_the_squared_gradient_is_the_variance_s(monkeypatch, float64):
    loss = stochastic.rebar(bit_cost)

    def variance(scale):
        control = {"scale": scale, "temperature": jnp.array(0.5)}
        return integrated(monkeypatch, loss, control=control)[1]

    def slope(u, v):
        monkeypatch.setattr(reruns, "uniform_noise", lambda key, d: u[None])
        monkeypatch.setattr(controls, "uniform_noise", lambda key, d: v[None])
        control = {"scale": jnp.array(0.8), "temperature": jnp.array(0.5)}
        square = stochastic.squared_gradient(loss)
        return jax.grad(square)(control, jnp.array(LOGIT, float), KEY)["scale"]

    u, w = quadrature(LOGIT, 24)
    slopes = jax.jit(jax.vmap(jax.vmap(slope, (None, 0)), (0, None)))(u, u)
    mean = float(jnp.sum(w[:, None] * w[None] * slopes))
    numeric = (variance(jnp.array(0.81)) - variance(jnp.array(0.79))) / 0.02
    assert mean == pytest.approx(numeric, rel=1e-5)


SAMPLED = {
    "disarm, two layers": (stochastic.disarm(two_layers), two_layers, LAYERS),
    "arm, two layers": (stochastic.arm(two_layers), two_layers, LAYERS),
    "rebar, two layers": (stochastic.rebar(two_layers), two_layers, LAYERS),
    "disarm, first layer": (
        stochastic.disarm(two_layers, nodes=["a"]),
        two_layers,
        LAYERS,
    ),
    "rebar, one-hot": (stochastic.rebar(one_hot), one_hot, VECTOR),
}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_means_agree_with_the_exact_gradient(name):
    loss, program, params = SAMPLED[name]
    exact = jax.grad(stochastic.exact_expectation(program))(params, KEY)
    gradient = jax.vmap(jax.grad(loss, has_aux=True), (None, 0))
    samples, _ = jax.jit(gradient)(params, jax.random.split(KEY, 40_000))
    pairs = zip(jax.tree.leaves(samples), jax.tree.leaves(exact), strict=True)
    for sampled, truth in pairs:
        sampled = np.asarray(sampled, np.float64)
        error = np.std(sampled, axis=0) / np.sqrt(len(sampled)) + 1e-9
        z = (np.mean(sampled, axis=0) - truth) / error
        assert np.max(np.abs(z)) < 4.5


def test_relaxations_are_biased_and_less_so_when_cold(float64):
    exact = exact_slope()

    def bias(**settings):
        loss = stochastic.gumbel_softmax(bit_cost, num_samples=20_000, **settings)
        slope, _ = jax.jit(jax.grad(loss, has_aux=True))(jnp.array(LOGIT, float), KEY)
        return abs(float(slope) - exact)

    warm, cold = bias(temperature=1.0), bias(temperature=0.2)
    assert warm > 0.02
    assert cold < 0.5 * warm
    assert bias(temperature=1.0, straight_through=True) > 0.02


def test_straight_through_runs_on_the_hard_draw():
    loss = stochastic.gumbel_softmax(one_hot, temperature=0.7, straight_through=True)
    _, report = loss(VECTOR, KEY)
    assert sorted(report.values["z"].tolist()) == [0.0, 0.0, 1.0]
    assert report.credits == {}


def test_nodes_that_are_not_relaxed_keep_their_scores():
    loss = stochastic.gumbel_softmax(two_layers, temperature=0.5, nodes=["b"])
    _, report = loss(LAYERS, KEY)
    assert set(report.credits) == {"a"}


@pytest.mark.parametrize("distribution", [Bernoulli, OneHotCategorical])
def test_conditional_noise_leads_to_its_draw_and_has_the_right_law(distribution):
    """z' given b must look like z: compared in mean and square, draw by draw."""
    d = distribution(jnp.array([0.8, -0.5, 0.1]))
    u, v = jax.random.uniform(KEY, (2, 100_000, 3), minval=1e-6, maxval=1 - 1e-6)
    z = jax.vmap(lambda u: from_noise(d, u))(u)
    draw = hard(d, z)
    again = jax.vmap(lambda b, v: conditional(d, b, v))(draw, v)
    np.testing.assert_array_equal(hard(d, again), draw)
    for power in (1, 2):
        gap = jnp.mean(z**power - again**power, axis=0)
        error = jnp.std(z**power - again**power, axis=0) / np.sqrt(len(z))
        assert float(jnp.max(jnp.abs(gap / error))) < 4.5
    probs = jnp.mean(draw.astype(float), axis=0)
    logits = d.logits
    exact = (
        jax.nn.sigmoid(logits) if distribution is Bernoulli else jax.nn.softmax(logits)
    )
    np.testing.assert_allclose(probs, exact, atol=0.01)


def test_relaxed_draws_near_zero_temperature_are_hard():
    d = Bernoulli(jnp.array([0.8, -0.5]))
    z = from_noise(d, jnp.array([0.9, 0.1]))
    np.testing.assert_allclose(relaxed(d, z, 1e-3), hard(d, z), atol=1e-6)


def elbo(params, key):
    """log q - log p of two bits: a bound's cost, in which params stand twice."""
    q = Bernoulli(params["q"])
    z = stochastic.sample(key, q, name="z")
    bits = z.astype(float)
    return q.log_prob(z) - jnp.sum(params["p"] * bits) - bits[0] * bits[1]


def test_vimco_is_unbiased_over_all_triples_of_outcomes(float64):
    params = {"q": jnp.array([0.3, -0.8]), "p": jnp.array([0.5, 1.5])}
    traced = trace(elbo, params, KEY)

    def outcomes(params):
        probs, records = outcomes_of(traced, params, KEY)
        return probs, jax.vmap(lambda record: record.total)(records)

    index = jnp.stack([x.ravel() for x in jnp.indices((4, 4, 4))], axis=1)

    def exact(params):
        probs, costs = outcomes(params)
        each = jax.vmap(lambda i: jnp.prod(probs[i]) * -multi_sample_bound(costs[i]))
        return jnp.sum(each(index))

    def estimate(params):
        probs, costs = outcomes(params)
        held = jax.lax.stop_gradient(probs)

        def of_triple(i):
            return jnp.prod(held[i]) * bound_with_scores(costs[i], jnp.log(probs)[i])

        return jnp.sum(jax.vmap(of_triple)(index))

    ours, truth = jax.grad(estimate)(params), jax.grad(exact)(params)
    np.testing.assert_allclose(estimate(params), exact(params), atol=1e-12)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), ours, truth)


def test_vimco_draws_what_its_surrogate_is_proved_on():
    params = {"q": jnp.array([0.3, -0.8]), "p": jnp.array([0.5, 1.5])}
    loss = stochastic.vimco(elbo, num_samples=3)
    value, report = loss(params, KEY)
    assert report.costs["returned"].shape == (3,)
    bound = multi_sample_bound(report.costs["returned"])
    assert float(value) == pytest.approx(-float(bound), rel=1e-6)


def test_moving_average_and_scale_by_hand():
    baseline = stochastic.moving_average(0.5, normalise=True)
    state = baseline.init(KEY, {"z": jnp.array(0.0)})
    levels, scales = baseline.predict(state)
    assert (levels["z"], scales["z"]) == (0.0, 1.0)
    for credits in ([0.0, 4.0], [6.0, 10.0]):
        state = baseline.fit(state, {"z": jnp.array(credits)})
    levels, scales = baseline.predict(state)
    mean = (0.25 * 2.0 + 0.5 * 8.0) / 0.75
    square = (0.25 * 8.0 + 0.5 * 68.0) / 0.75
    assert float(levels["z"]) == pytest.approx(mean)
    assert float(scales["z"]) == pytest.approx(np.sqrt(square - mean**2), rel=1e-5)


def test_scales_divide_scores_and_leave_costs_alone():
    loss = stochastic.score_function(bit_cost)
    slope = jax.grad(lambda logit, **k: loss(logit, KEY, **k)[0])
    logit, held = jnp.array(LOGIT), {"baselines": {"z": 100.0}}
    direct = slope(logit, scales={"z": 1e9}, **held)
    whole, half = slope(logit, **held), slope(logit, scales={"z": 2.0}, **held)
    np.testing.assert_allclose(half - direct, (whole - direct) / 2, rtol=1e-5)


def test_nvil_learns_what_a_datum_costs_and_lowers_the_variance():
    def program(logit, key, x):
        z = stochastic.sample(key, Bernoulli(logit[None]), name="z")[0].astype(float)
        return 5.0 * x + z

    baseline = stochastic.nvil(
        lambda key, x: {"slope": jnp.zeros(())},
        lambda params, x: {"z": params["slope"] * x},
        optax.sgd(0.1),
        decay=0.9,
    )
    loss = stochastic.score_function(program)

    def slope(key, x, state):
        levels, scales = baseline.predict(state, x)
        of_logit = functools.partial(loss, baselines=levels, scales=scales)
        return jax.grad(of_logit, has_aux=True)(jnp.zeros(()), key, x)

    @jax.jit
    def round_(state, key):
        x = jax.random.normal(key, (64,))
        keys = jax.random.split(key, 64)
        gradients, report = jax.vmap(slope, (0, 0, None))(keys, x, state)
        return baseline.fit(state, report.credits, x), jnp.var(gradients)

    state = baseline.init(KEY, {"z": jnp.zeros(())}, jnp.zeros(()))
    state, variances = jax.lax.scan(round_, state, jax.random.split(KEY, 60))
    assert float(state.params["slope"]) == pytest.approx(5.0, abs=0.3)
    assert float(jnp.mean(variances[-10:])) < 0.1 * float(variances[0])


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_samples is 1, needs at least 2"):
        stochastic.vimco(elbo, num_samples=1)
    with pytest.raises(ValueError, match="temperature is 0"):
        stochastic.gumbel_softmax(bit_cost, temperature=0.0)
    with pytest.raises(ValueError, match="decay is 2"):
        stochastic.moving_average(2.0)
    with pytest.raises(ValueError, match="nodes name 'y', unknown"):
        stochastic.disarm(bit_cost, nodes=["y", "z"])(jnp.zeros(()), KEY)
    with pytest.raises(ValueError, match="control is"):
        stochastic.rebar(bit_cost)(jnp.zeros(()), KEY, control={"scale": 1.0})


def categorical(logits, key):
    return stochastic.sample(key, Categorical(logits), name="z").astype(float)


def in_a_loop(logits, key):
    def round_(carry, key):
        return carry, stochastic.sample(key, Bernoulli(logits), name="z")

    _, z = jax.lax.scan(round_, 0, jax.random.split(key, 2))
    return jnp.sum(z.astype(float))


@pytest.mark.parametrize(
    "loss, sentence",
    [
        (stochastic.disarm(categorical), "no node that this estimator treats"),
        (stochastic.disarm(categorical, nodes=["z"]), "Categorical, needs Bernoulli;"),
        (stochastic.rebar(categorical, nodes=["z"]), "use OneHotCategorical"),
        (stochastic.rebar(in_a_loop), "node 'z' stands in a scan"),
    ],
)
def test_nodes_that_cannot_be_treated_are_refused(loss, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(jnp.zeros(3), KEY)
