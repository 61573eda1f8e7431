"""The score-function operator against enumerated expectations, gradients and Hessians.

Every program below is enumerated in float64. What claims to be unbiased is averaged
over all outcomes, not sampled, and must equal the derivative of the exact expectation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import stochastic
from jaxpg.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    OneHotCategorical,
)
from jaxpg.stochastic.enumeration import outcomes_of
from jaxpg.stochastic.execution import execute, trace
from jaxpg.stochastic.surrogates import (
    any_order,
    first_order,
    mean_of_others,
    signals_of,
)

KEY = jax.random.key(0)


def params():
    return {
        "table": jnp.array([[0.1, 0.2, -0.3], [0.5, -0.2, 0.1], [0.0, 0.3, 0.2]]),
        "bits": jnp.array([0.3, -0.4]),
        "price": jnp.array([1.0, -2.0, 4.0]),
    }


def number(x):
    return x.astype(float)


def chain(params, key):
    """Each draw moves the next; a cost in the middle, one that depends on params."""
    one, two, three = jax.random.split(key, 3)
    a = stochastic.sample(one, Categorical(params["table"][0]), name="a")
    stochastic.cost(params["price"][a] ** 2, name="early")
    b = stochastic.sample(two, Categorical(params["table"][a]), name="b", baseline=0.7)
    stochastic.cost(number(a * b), name="middle")
    c = stochastic.sample(three, Bernoulli(params["bits"] * number(b)), name="c")
    return jnp.sum(number(c)) * params["price"][b]


def tree(params, key):
    """Two branches of one root, each with a cost of its own."""
    root, left, right = jax.random.split(key, 3)
    r = stochastic.sample(root, Categorical(params["table"][0]), name="root")
    a = stochastic.sample(left, Categorical(params["table"][r]), name="left")
    b = stochastic.sample(right, OneHotCategorical(params["table"][1]), name="right")
    stochastic.cost(params["price"][a], name="left cost")
    stochastic.cost(jnp.sum(b * params["price"]) ** 2, name="right cost")
    return number(r)


def markov(params, key):
    """A chain in a scan; a second node of each round that nobody remembers."""

    def round_(state, key):
        one, two = jax.random.split(key)
        state = stochastic.sample(one, Categorical(params["table"][state]), name="s")
        tip = stochastic.sample(two, Bernoulli(params["bits"][:1]), name="tip")
        stochastic.cost(params["price"][state], name="step")
        stochastic.cost(number(tip[0]) * 3.0, name="tips")
        return state, None

    last, _ = jax.lax.scan(round_, 0, jax.random.split(key, 3))
    return params["price"][last] * 2.0


def backwards(params, key):
    """The same, run from the last round to the first, jitted and checkpointed."""

    @jax.jit
    def round_(state, key):
        state = stochastic.sample(key, Categorical(params["table"][state]), name="s")
        stochastic.cost(params["price"][state], name="step")
        return state, state

    body = jax.checkpoint(round_)
    keys = jax.random.split(key, 3)
    last, states = jax.lax.scan(body, 0, keys, reverse=True)
    return params["price"][last] * number(states[0])


def nested(params, key):
    """A loop in a loop: both carries remember."""

    def inner(state, key):
        state = stochastic.sample(key, Categorical(params["table"][state]), name="s")
        stochastic.cost(params["price"][state], name="inner")
        return state, None

    def outer(state, keys):
        state, _ = jax.lax.scan(inner, state, keys)
        bit = stochastic.sample(keys[0], Bernoulli(params["bits"][:1]), name="bit")
        stochastic.cost(number(state * bit[0]), name="outer")
        return state, None

    keys = jax.random.split(key, (2, 2))
    last, _ = jax.lax.scan(outer, 0, keys)
    return number(last)


def batched(params, key):
    """A vmap inside of the program."""

    def one(key, row):
        z = stochastic.sample(key, Categorical(row), name="z", baseline=row[0])
        stochastic.cost(params["price"][z], name="each")
        return z

    z = jax.vmap(one)(jax.random.split(key, 3), params["table"])
    return number(jnp.max(z))


def several(params, key):
    """A draw of several numbers, one of independent rows, and one unused."""
    one, two, three = jax.random.split(key, 3)
    logits = (params["bits"], params["table"][0])
    m = stochastic.sample(one, MultiCategorical(logits), name="m")
    rows = stochastic.sample(two, Categorical(params["table"]), name="rows")
    stochastic.sample(three, Bernoulli(params["bits"]), name="unused")
    return number(m[0] + m[1]) * params["price"][rows[0]] + number(rows[1] * rows[2])


PROGRAMS = [chain, tree, markov, backwards, nested, batched, several]


def traced_mean(program, estimate):
    """The estimate's mean over all outcomes, as a function to be differentiated."""

    def mean(params):
        traced = trace(program, params, KEY)
        probs, _ = outcomes_of(traced, jax.lax.stop_gradient(params), KEY)
        _, records = outcomes_of(traced, params, KEY)
        each = jax.vmap(lambda record: estimate(traced.graph, record))(records)
        return jnp.sum(probs * each)

    return mean


def first(graph, record):
    weights = {n: x - 3.0 for n, x in signals_of(graph, record).excess.items()}
    return first_order(graph, record, weights)


def boxed(graph, record):
    levels = {n: x + 3.0 for n, x in signals_of(graph, record).levels.items()}
    return any_order(graph, record, levels)


def assert_equal(tree, other, tolerance=1e-10):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance),
        tree,
        other,
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.thinned(3)
def test_first_order_equals_the_enumerated_gradient(program, float64):
    exact = jax.value_and_grad(stochastic.exact_expectation(program))
    value, gradient = jax.jit(exact)(params(), KEY)
    estimate = jax.jit(jax.value_and_grad(traced_mean(program, first)))
    assert_equal(estimate(params()), (value, gradient))
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient)) > 0.1


@pytest.mark.parametrize(
    "program", [chain, markov, backwards, batched], ids=lambda p: p.__name__
)
@pytest.mark.thinned(2)
def test_the_magic_box_has_the_enumerated_gradient_and_hessian(program, float64):
    direction = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params()
    )

    def both(objective):
        def along(p):
            return jax.jvp(jax.grad(objective), (p,), (direction,))

        return jax.jit(along)(params())

    exact = stochastic.exact_expectation(program)
    assert_equal(both(traced_mean(program, boxed)), both(lambda p: exact(p, KEY)))


def test_second_derivatives_of_the_first_order_form_are_wrong(float64):
    """What the magic box is for: the plain surrogate's Hessian misses terms."""
    exact = jax.jit(jax.hessian(lambda p: stochastic.exact_expectation(tree)(p, KEY)))
    plain = jax.jit(jax.hessian(traced_mean(tree, first)))
    difference = exact(params())["table"]["table"] - plain(params())["table"]["table"]
    assert float(jnp.max(jnp.abs(difference))) > 0.1


def test_draws_are_credited_with_costs_they_reach(float64):
    traced = trace(tree, params(), KEY)
    record = execute(traced, params(), KEY)
    credits = signals_of(traced.graph, record).credits
    costs = record.costs
    assert credits["left"] == costs["left cost"]
    assert credits["right"] == costs["right cost"]
    assert credits["root"] == costs["left cost"] + costs["returned"]


def test_draws_in_a_loop_are_credited_with_what_comes_later(float64):
    traced = trace(markov, params(), KEY)
    record = execute(traced, params(), KEY)
    credits = signals_of(traced.graph, record).credits
    step = np.asarray(record.costs["step"])
    to_go = np.cumsum(step[::-1])[::-1] + float(record.costs["returned"])
    np.testing.assert_allclose(credits["s"], to_go, atol=1e-12)
    np.testing.assert_array_equal(credits["tip"], record.costs["tips"])


def test_draws_in_nested_loops_are_credited_with_what_comes_later(float64):
    traced = trace(nested, params(), KEY)
    record = execute(traced, params(), KEY)
    credits = signals_of(traced.graph, record).credits
    inner, outer = (np.asarray(record.costs[name]) for name in ("inner", "outer"))
    flat = inner.ravel()
    to_go = (np.cumsum(flat[::-1])[::-1]).reshape(2, 2)
    to_go = to_go + np.cumsum(outer[::-1])[::-1][:, None]
    np.testing.assert_allclose(
        credits["s"], to_go + float(record.costs["returned"]), atol=1e-12
    )
    np.testing.assert_array_equal(credits["bit"], outer)


def test_draws_in_a_reversed_loop_are_credited_with_earlier_rounds(float64):
    traced = trace(backwards, params(), KEY)
    record = execute(traced, params(), KEY)
    to_go = np.cumsum(np.asarray(record.costs["step"])) + record.costs["returned"]
    credits = signals_of(traced.graph, record).credits
    np.testing.assert_allclose(credits["s"], to_go, atol=1e-12)


def test_leave_one_out_is_unbiased_over_all_pairs_of_outcomes(float64):
    traced = trace(tree, params(), KEY)

    def mean(p):
        probs, _ = outcomes_of(traced, jax.lax.stop_gradient(p), KEY)
        _, records = outcomes_of(traced, p, KEY)

        def of_pair(i, j):
            pair = jax.tree.map(lambda x: jnp.stack([x[i], x[j]]), records)
            excess = jax.vmap(lambda r: signals_of(traced.graph, r).excess)(pair)
            weights = {n: x - mean_of_others(x) for n, x in excess.items()}
            each = jax.vmap(lambda r, w: first_order(traced.graph, r, w))(pair, weights)
            return probs[i] * probs[j] * jnp.mean(each)

        i, j = (x.ravel() for x in jnp.indices((len(probs), len(probs))))
        return jnp.sum(jax.vmap(of_pair)(i, j))

    exact = jax.grad(lambda p: stochastic.exact_expectation(tree)(p, KEY))
    assert_equal(jax.jit(jax.grad(mean))(params()), jax.jit(exact)(params()))


def test_leave_one_out_lowers_the_variance():
    def program(logits, key):
        z = stochastic.sample(key, Categorical(logits), name="z")
        return jnp.array([10.0, 11.0, 12.0])[z]

    def variance(**settings):
        loss = stochastic.score_function(program, num_samples=4, **settings)
        gradients, _ = jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(
            jnp.zeros(3), jax.random.split(KEY, 400)
        )
        return float(jnp.sum(jnp.var(gradients, axis=0)))

    assert variance(leave_one_out=True) < 0.1 * variance()


def test_mean_of_others_leaves_oneself_out():
    x = jnp.array([[1.0, 10.0], [2.0, 1e30], [6.0, 30.0]])
    others = mean_of_others(x)
    np.testing.assert_allclose(others[:, 0], [4.0, 3.5, 1.5])
    assert float(others[1, 1]) == 20.0  # a huge own value leaves no rounding behind


class Exponential(NamedTuple):
    """A user's own distribution, a tree of arrays."""

    rate: jax.Array

    def sample(self, key):
        return jax.random.exponential(key) / self.rate

    def log_prob(self, value):
        return jnp.log(self.rate) - self.rate * value


class Opaque:
    """A user's own distribution, which JAX cannot look into."""

    def __init__(self, rate):
        self.rate = rate

    def sample(self, key):
        return Exponential(self.rate).sample(key)

    def log_prob(self, value):
        return Exponential(self.rate).log_prob(value)


@pytest.mark.parametrize("kind", [Exponential, Opaque])
def test_any_object_with_sample_and_log_prob_serves(kind):
    """E[z²] = 2 / rate², whose slope at rate 2 is -1/2."""

    def program(rate, key):
        return stochastic.sample(key, kind(rate), name="z") ** 2

    loss = stochastic.score_function(program, num_samples=20000, leave_one_out=False)
    keys = jax.random.split(KEY, 20)
    slopes, _ = jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(jnp.array(2.0), keys)
    error = float(jnp.std(slopes)) / np.sqrt(len(keys))
    assert abs(float(jnp.mean(slopes)) + 0.5) < 4 * error < 0.05


def test_continuous_draws_with_costs_that_depend_on_parameters():
    """E[p (z - p)²], z ~ N(m, s): slopes by hand, in m, log s and p."""

    def program(p, key):
        mean, log_std, price = p
        normal = DiagonalGaussian(mean[None], log_std[None])
        z = stochastic.sample(key, normal, name="z")[0]
        return price * (z - price) ** 2

    loss = stochastic.score_function(program, num_samples=20000, leave_one_out=False)
    p = (jnp.array(0.3), jnp.array(-0.5), jnp.array(1.2))
    keys = jax.random.split(KEY, 20)
    slopes, _ = jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(p, keys)
    m, s2, c = 0.3, np.exp(-1.0), 1.2
    exact = (2 * c * (m - c), 2 * c * s2, (m - c) ** 2 + s2 - 2 * c * (m - c))
    for slope, truth in zip(slopes, exact, strict=True):
        error = float(jnp.std(slope)) / np.sqrt(len(keys))
        assert abs(float(jnp.mean(slope)) - truth) < 4.5 * error


def test_outside_an_operator_marks_are_identities():
    traced = trace(markov, params(), KEY)
    record = execute(traced, params(), KEY)
    assert markov(params(), KEY) == record.costs["returned"]
    assert jax.jit(markov)(params(), KEY) == record.costs["returned"]


def test_loss_is_the_same_under_jit_and_vmap():
    loss = stochastic.score_function(markov, num_samples=2, leave_one_out=True)
    gradient = jax.grad(loss, has_aux=True)
    keys = jax.random.split(KEY, 3)
    one = [gradient(params(), key)[0] for key in keys]
    with jax.checking_leaks():
        many = jax.jit(jax.vmap(gradient, (None, 0)))(params(), keys)[0]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one)
    assert_equal(many, stacked, 1e-4)


def test_the_value_is_the_sampled_cost_and_the_report_says_of_what():
    loss = stochastic.score_function(chain)
    value, report = loss(params(), KEY)
    assert float(value) == pytest.approx(float(sum(report.costs.values())), rel=1e-6)
    assert set(report.costs) == {"early", "middle", "returned"}
    assert report.baselines["b"] == pytest.approx(0.7)
    assert report.values["a"].shape == ()


def test_baselines_in_the_program_are_reported_differentiable():
    def program(p, key):
        z = stochastic.sample(key, Bernoulli(p["l"]), name="z", baseline=p["b"])
        return number(z[0])

    loss = stochastic.score_function(program)

    def critic_loss(p):
        _, report = loss(p, KEY)
        return (report.baselines["z"] - report.credits["z"]) ** 2

    p = {"l": jnp.zeros(1), "b": jnp.array(3.0)}
    slope = jax.grad(critic_loss)(p)
    assert slope["b"] == 2.0 * (3.0 - loss(p, KEY)[1].credits["z"])
    assert jax.grad(lambda p: loss(p, KEY)[0])(p)["b"] == 0.0


def test_output_beside_the_cost_carries_no_score():
    def program(logits, key):
        z = stochastic.sample(key, Bernoulli(logits), name="z")
        return number(z[0]), {"extra": 5.0 * logits[0] + number(z[0])}

    loss = stochastic.score_function(program, has_aux=True)
    slope = jax.grad(lambda x: loss(x, KEY)[1].output["extra"])(jnp.zeros(1))
    assert slope.tolist() == [5.0]


def test_exact_expectation_by_hand(float64):
    def program(logit, key):
        a, b = stochastic.sample(key, Bernoulli(jnp.stack([logit, 2 * logit])))
        return number(a * 2 + b)

    p, q = 1 / (1 + np.exp(-0.3)), 1 / (1 + np.exp(-0.6))
    value = stochastic.exact_expectation(program)(jnp.array(0.3), KEY)
    assert float(value) == pytest.approx(2 * p + q, abs=1e-12)


def no_scalar(p, key):
    stochastic.cost(stochastic.sample(key, DiagonalGaussian(p, p)), name="wide")
    return 0.0


def in_a_cond(p, key):
    def draw():
        return stochastic.sample(key, Bernoulli(p), name="z")[0]

    return number(jax.lax.cond(p[0] > 0, draw, lambda: 0))


def twice(p, key):
    a = stochastic.sample(key, Bernoulli(p))
    return number(stochastic.sample(key, Bernoulli(p))[0] * a[0])


def vector(p, key):
    return number(stochastic.sample(key, Bernoulli(p)))


def one_bit(p, key):
    return number(stochastic.sample(key, Bernoulli(p), name="z")[0])


def normal(p, key):
    return stochastic.sample(key, DiagonalGaussian(p, p), name="z")[0]


REFUSED = {
    "no log_prob": (lambda p, key: stochastic.sample(key, p), {}, "without 'sample'"),
    "a cost that is no scalar": (no_scalar, {}, r"cost 'wide' has shape \(2,\)"),
    "a returned vector": (vector, {}, "needs one floating number per sample"),
    "a tuple without has_aux": (lambda p, k: (one_bit(p, k), 1), {}, "has_aux=True"),
    "has_aux without a tuple": (one_bit, {"has_aux": True}, r"needs \(cost, output\)"),
    "a mark in a cond": (in_a_cond, {}, "stands inside 'cond'"),
    "one name twice": (twice, {}, "'bernoulli' for 2 marks"),
    "no node": (lambda p, key: jnp.sum(p), {}, "marks no node"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_programs_that_cannot_be_followed_are_refused(case):
    program, settings, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        stochastic.score_function(program, **settings)(jnp.zeros(2), KEY)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_samples is 1 and leave_one_out"):
        stochastic.score_function(one_bit, num_samples=1, leave_one_out=True)
    with pytest.raises(ValueError, match="order is 'second', unknown"):
        stochastic.score_function(one_bit, order="second")
    loss = stochastic.score_function(one_bit)
    with pytest.raises(ValueError, match="baselines name the node 'y', unknown"):
        loss(jnp.zeros(2), KEY, baselines={"y": 0.0})
    with pytest.raises(ValueError, match=r"baselines\['z'\] has shape \(3,\)"):
        loss(jnp.zeros(2), KEY, baselines={"z": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"baselines\['z'\] has 1 entries"):
        loss(jnp.zeros(2), KEY, baselines={"z": jnp.nan})
    with pytest.raises(ValueError, match="scales are given with order 'any'"):
        boxed = stochastic.score_function(one_bit, order="any")
        boxed(jnp.zeros(2), KEY, scales={"z": 2.0})
    with pytest.raises(ValueError, match=r"baseline of node 'z' has shape \(2,\)"):
        stochastic.sample(KEY, Bernoulli(jnp.zeros(2)), name="z", baseline=jnp.zeros(2))


def test_differentiating_past_the_operator_is_refused():
    with pytest.raises(ValueError, match="jax differentiates through the mark 'z'"):
        jax.grad(normal)(jnp.ones(2), KEY)


def test_spaces_that_cannot_be_enumerated_are_refused():
    with pytest.raises(ValueError, match="node 'z' draws from DiagonalGaussian"):
        stochastic.exact_expectation(normal)(jnp.ones(2), KEY)
    with pytest.raises(ValueError, match=r"1048576 outcomes \(z: 1048576\)"):
        stochastic.exact_expectation(one_bit)(jnp.zeros(20), KEY)
    traced = trace(lambda p, k: stochastic.sample(k, Opaque(p)) * p, jnp.ones(()), KEY)
    with pytest.raises(ValueError, match="is no tree of arrays"):
        execute(traced, jnp.ones(()), KEY, given={"opaque": jnp.ones(())})
    with pytest.raises(ValueError, match="given names 'y'"):
        execute(traced, jnp.ones(()), KEY, given={"y": jnp.ones(())})
