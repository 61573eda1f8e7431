"""Distributions: against numpyro, by enumeration, by quadrature; drawn last of all."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import transforms

from jaxpg import distributions
from jaxpg.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    TanhGaussian,
)

LOW, HIGH = -0.5, 2.0
MASKS = [-np.inf, -1e4, float(np.finfo(np.float32).min)]
KINDS = ["categorical", "multi", "bernoulli", "gaussian", "tanh"]


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make(kind, seed, batch=(), size=3, dtype=jnp.float32):
    """One distribution of each kind with random parameters."""
    first = normal(seed, *batch, size, dtype=dtype)
    second = 0.5 * normal(seed + 1, *batch, size, dtype=dtype)
    if kind == "categorical":
        return Categorical(2 * first)
    if kind == "multi":
        return MultiCategorical((first, normal(seed + 2, *batch, 2, dtype=dtype)))
    if kind == "bernoulli":
        return Bernoulli(2 * first)
    if kind == "gaussian":
        return DiagonalGaussian(first, second)
    return TanhGaussian(first, second, LOW, HIGH)


def every_action(policy):
    """All actions of an unbatched discrete distribution, [N, ...] int32."""
    if isinstance(policy, Categorical):
        return jnp.arange(policy.logits.shape[-1])
    if isinstance(policy, Bernoulli):
        choices = [2] * policy.logits.shape[-1]
    else:
        choices = [logits.shape[-1] for logits in policy.logits]
    return jnp.asarray(list(itertools.product(*map(range, choices))), jnp.int32)


@jax.jit
def scores_of(policy, actions):
    """The gradients of log_prob in the parameters, one for each action."""
    return jax.vmap(jax.grad(lambda d, a: d.log_prob(a)), (None, 0))(policy, actions)


def numpyro_twin(policy):
    if isinstance(policy, Categorical):
        return dist.CategoricalLogits(policy.logits)
    if isinstance(policy, Bernoulli):
        return dist.BernoulliLogits(policy.logits).to_event(1)
    base = dist.Normal(policy.mean, jnp.exp(policy.log_std)).to_event(1)
    if isinstance(policy, DiagonalGaussian):
        return base
    squash = [  # tanh(x) = 2 sigmoid(2x) - 1
        transforms.AffineTransform(0.0, 2.0),
        transforms.SigmoidTransform(),
        transforms.AffineTransform(LOW, HIGH - LOW),
    ]
    return dist.TransformedDistribution(base, squash)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian", "tanh"])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("float64", 1e-9)])
def test_agrees_with_numpyro(kind, size, batch, dtype, rtol, float64):
    p, q = (make(kind, seed, batch, size, dtype) for seed in (0, 10))
    action = p.sample(jax.random.key(0))

    def ours():
        numbers = [p.log_prob(action)]
        numbers += [p.entropy()] if kind != "tanh" else []
        return numbers + ([p.kl(q)] if kind == "gaussian" else [])

    def theirs():
        twin = numpyro_twin(p)
        numbers = [twin.log_prob(p.to_env(action))]
        numbers += [twin.entropy()] if kind != "tanh" else []
        kl = [dist.kl_divergence(twin, numpyro_twin(q))] if kind == "gaussian" else []
        return numbers + kl

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = jax.jit(theirs)()
    # Numpyro inverts the squashing, which costs digits.
    tol = rtol * (1e3 if kind == "tanh" else 1)
    for number, other in zip(jax.jit(ours)(), expected, strict=True):
        assert number.shape == batch
        # atol, because a log-probability near 0 is a difference of larger numbers.
        np.testing.assert_allclose(number, other, rtol=tol, atol=tol)


DISCRETE = {
    "categorical-1": lambda seed: make("categorical", seed, (), 1, jnp.float64),
    "categorical-2": lambda seed: make("categorical", seed, (), 2, jnp.float64),
    "categorical-9": lambda seed: make("categorical", seed, (), 9, jnp.float64),
    "multi": lambda seed: make("multi", seed, dtype=jnp.float64),
    "bernoulli": lambda seed: make("bernoulli", seed, dtype=jnp.float64),
}


@pytest.mark.parametrize("build", DISCRETE.values(), ids=DISCRETE)
def test_discrete_by_enumeration(build, float64):
    p, q = build(0), build(10)
    actions = every_action(p)
    log_p, log_q = (jax.vmap(d.log_prob)(actions) for d in (p, q))
    probs = np.exp(log_p)
    np.testing.assert_allclose(probs.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(p.entropy(), -(probs * log_p).sum(), atol=1e-12)
    np.testing.assert_allclose(p.kl(q), (probs * (log_p - log_q)).sum(), atol=1e-12)
    assert p.kl(p) == 0
    np.testing.assert_array_equal(p.mode(), actions[np.argmax(probs)])

    scores = scores_of(p, actions)
    for score in jax.tree.leaves(scores):
        np.testing.assert_allclose(np.tensordot(probs, score, 1), 0, atol=1e-12)
    if len(actions) > 1:
        assert max(np.abs(score).max() for score in jax.tree.leaves(scores)) > 0.1


def test_gaussian_by_quadrature(float64):
    p, q = (make("gaussian", seed, (), 2, jnp.float64) for seed in (0, 10))
    # Gauss-Hermite integrates exactly what is a polynomial under the normal: all here.
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    noise = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    weights = np.outer(weights, weights).ravel() / (2 * np.pi)
    actions = jnp.asarray(np.asarray(p.mean) + np.exp(p.log_std) * noise)
    log_p, log_q = (jax.vmap(d.log_prob)(actions) for d in (p, q))
    np.testing.assert_allclose(p.entropy(), -weights @ log_p, rtol=1e-12)
    np.testing.assert_allclose(p.kl(q), weights @ (log_p - log_q), rtol=1e-12)
    assert p.kl(p) == 0
    scores = scores_of(p, actions)
    for score in scores:
        np.testing.assert_allclose(weights @ score, 0, atol=1e-12)
        assert np.abs(score).max() > 0.1


def test_gaussian_kl_keeps_its_digits_near_equality():
    p, q = (DiagonalGaussian(jnp.zeros(1), jnp.full(1, s)) for s in (0.0, 1e-3))
    # KL of two widths with d = log p's over q's: (exp(2d) - 1 - 2d) / 2 = d² + 2d³/3.
    np.testing.assert_allclose(p.kl(q), 1e-6 - 2e-9 / 3, rtol=1e-3, atol=0)


def squashed_grid(policy):
    """Gauss-Legendre over the box: pre-tanh actions [N, 1] and weights [N]."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    return jnp.asarray(np.arctanh(nodes))[:, None], weights * (HIGH - LOW) / 2


def test_tanh_gaussian_density_integrates_to_one(float64):
    p, q = (
        TanhGaussian(jnp.array([m]), jnp.array([s]), LOW, HIGH)
        for m, s in [(0.3, -0.7), (-0.2, -0.5)]
    )
    pre, weights = squashed_grid(p)
    log_p, log_q = (jax.vmap(d.log_prob)(pre) for d in (p, q))
    probs = weights * np.exp(log_p)
    np.testing.assert_allclose(probs.sum(), 1, rtol=1e-9)
    np.testing.assert_allclose(p.kl(q), probs @ (log_p - log_q), rtol=1e-9)
    assert p.kl(p) == 0


def test_tanh_gaussian_is_right_where_tanh_saturates():
    pre = np.linspace(-20, 20, 81)
    mean, log_std = 0.3, 1.2
    x = pre.astype(np.longdouble)
    z = (x - mean) / np.exp(np.longdouble(log_std))
    base = -(z**2) / 2 - log_std - np.log(2 * np.pi) / 2
    # 1 - tanh² = sech² = 4 exp(-2|x|) / (1 + exp(-2|x|))²
    log_sech2 = np.log(4.0) - 2 * abs(x) - 2 * np.log1p(np.exp(-2 * abs(x)))
    expected = base - log_sech2 - np.log((HIGH - LOW) / 2)
    policy = TanhGaussian(jnp.full(1, mean), jnp.full(1, log_std), LOW, HIGH)
    found = jax.vmap(policy.log_prob)(jnp.asarray(pre, jnp.float32)[:, None])
    np.testing.assert_allclose(found, expected.astype(float), rtol=1e-5, atol=1e-5)
    score = jax.vmap(jax.grad(policy.log_prob))(jnp.asarray(pre, jnp.float32)[:, None])
    slope = -z / np.exp(log_std) + 2 * np.tanh(x)
    np.testing.assert_allclose(score[:, 0], slope.astype(float), rtol=1e-5, atol=1e-5)


def test_tanh_gaussian_sampled_entropy_is_unbiased(float64):
    policy = TanhGaussian(jnp.array([0.3]), jnp.array([-0.7]), LOW, HIGH)
    pre, weights = squashed_grid(policy)
    log_p = jax.vmap(policy.log_prob)(pre)
    probs = weights * np.exp(log_p)
    keys = jax.random.split(jax.random.key(0), 20_000)
    estimate = jax.vmap(
        jax.value_and_grad(lambda d, k: d.sampled_entropy(k)), (None, 0)
    )
    entropies, slopes = estimate(policy, keys)
    # d entropy / d mean = E[d log(1 - tanh²) / d pre] = -2 E[tanh(pre)]
    assert_mean(entropies, -probs @ log_p)
    assert_mean(slopes.mean[:, 0], -2 * probs @ np.tanh(pre[:, 0]))
    with pytest.raises(ValueError, match=r"sampled_entropy\(key\)"):
        policy.entropy()


def assert_mean(draws, expected):
    """The mean of the draws lies within four standard errors of `expected`."""
    draws = np.asarray(draws, np.float64)
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(len(draws))


def test_tanh_gaussian_reaches_its_box_and_never_leaves_it():
    rng = np.random.default_rng(0)
    # Bounds of unlike sizes, for which low + (high - low) rounds to above high.
    low, high = jnp.asarray(rng.normal(size=(2, 1000, 3)) ** 3, jnp.float32)
    low, high = jnp.minimum(low, high), jnp.maximum(low, high)
    assert np.any(low + (high - low) > high)
    policy = TanhGaussian(jnp.zeros((1000, 3)), jnp.zeros((1000, 3)), low, high)
    extremes = jnp.broadcast_to(jnp.array([[-50.0, 0.0, 50.0]]), (1000, 3))
    env_action = policy.to_env(extremes)
    assert np.all((env_action >= low) & (env_action <= high))
    np.testing.assert_array_equal(env_action[:, 0], low[:, 0])
    width = high - low
    assert np.all((high - env_action)[:, 2] <= 1e-6 * width[:, 2])
    middle = 0.5 * (low + high)
    assert np.all(abs(env_action - middle)[:, 1] <= 1e-6 * width[:, 1])
    np.testing.assert_array_equal(policy.mode(), policy.mean)


@pytest.mark.parametrize("width", [2, 3])  # 3 leading, and as many coordinates or fewer
def test_tanh_gaussian_takes_bounds_stacked_by_vmap(width):
    low, mean = jnp.array([-1.0, -2.0, 0.0]), normal(0, 3, width)
    build = jax.vmap(lambda m, lo: TanhGaussian(m, jnp.zeros_like(m), lo, 3.0))
    policy = build(mean, low)
    assert policy.low.shape == policy.high.shape == (3,)
    pre = normal(1, 3, width)
    for i in range(3):
        alone = TanhGaussian(mean[i], jnp.zeros(width), float(low[i]), 3.0)
        expected = alone.log_prob(pre[i])
        np.testing.assert_allclose(policy.log_prob(pre)[i], expected, rtol=1e-5)
        np.testing.assert_allclose(policy.to_env(pre)[i], alone.to_env(pre[i]), 1e-5)


U = np.append(np.linspace(0, 1, 4096, endpoint=False), [2.0**-24, 1 - 2.0**-24])
U = jnp.asarray(U, jnp.float32)


def invert(logits, u):
    """Actions of one row of logits for every u."""
    rows = jnp.broadcast_to(logits, (len(u), len(logits)))
    return np.asarray(jax.jit(distributions._invert_cdf)(rows, u))


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("num_actions", [1, 2, 4, 32, 33, 1000])
def test_masked_actions_are_never_drawn(num_actions, masked):
    assert float(U[-1]) == np.nextafter(np.float32(1), np.float32(0))
    rng = np.random.default_rng(num_actions)
    if num_actions <= 4:  # every mask
        keeps = np.array(list(itertools.product([False, True], repeat=num_actions)))[1:]
    else:
        keeps = rng.random((40, num_actions)) < rng.random((40, 1))
        keeps[:, rng.integers(num_actions)] = True
        keeps[:8, :3], keeps[4:12, -3:] = False, False  # leading and trailing
        keeps[:, num_actions // 2] = True
    for keep in keeps:
        logits = jnp.asarray(np.where(keep, rng.normal(size=num_actions), masked))
        actions = invert(logits.astype(jnp.float32), U)
        assert set(actions) <= set(np.flatnonzero(keep))
        assert actions[0] == np.flatnonzero(keep)[0]
        assert np.all(np.diff(actions[:-2]) >= 0)


@pytest.mark.parametrize("num_actions", [2, 5, 40])
def test_each_action_gets_its_share_of_the_unit_interval(num_actions):
    logits = normal(1, num_actions)
    u = (jnp.arange(2.0**14) + 0.5) / 2**14
    shares = np.bincount(invert(logits, u), minlength=num_actions) / 2**14
    # An interval's two ends fall between grid points: off by one point at most.
    np.testing.assert_allclose(shares, jax.nn.softmax(logits), rtol=0, atol=1.1 / 2**14)


def test_largest_uniform_stays_below_every_total():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(20_000, 6)), jnp.float32)
    logits = jnp.concatenate([logits, jnp.full((20_000, 2), -jnp.inf)], axis=-1)
    actions = distributions._invert_cdf(logits, jnp.full(20_000, U[-1]))
    assert np.asarray(actions).max() == 5


def test_two_actions_cost_one_comparison():
    def draw(logits, u):
        return distributions._invert_cdf(logits, u)

    lowered = jax.jit(draw).lower(jnp.zeros((5, 2)), jnp.zeros(5)).as_text()
    assert lowered.count("stablehlo.compare") == 1


@pytest.mark.parametrize("dtype, bits", [("float32", 24), ("bfloat16", 24)])
def test_uniforms_lie_in_the_middle_of_their_cells(dtype, bits):
    u = distributions._uniform(jax.random.key(0), (100_000,), jnp.dtype(dtype))
    cells = np.asarray(u, np.float64) * 2**bits
    assert np.all(cells % 2 == 1)
    assert 0 < np.asarray(u).min() and np.asarray(u).max() < 1


@pytest.mark.parametrize("size", [2, 5, 40])
@pytest.mark.parametrize("kind", ["categorical", "multi", "bernoulli"])
def test_draws_have_their_frequencies(kind, size):
    policy = make(kind, 3, (), min(size, 5) if kind == "bernoulli" else size)
    actions = every_action(policy)
    probs = np.exp(np.asarray(jax.vmap(policy.log_prob)(actions), np.float64))
    num = 100_000
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape)), policy)
    draws = np.asarray(batch.sample(jax.random.key(4))).reshape(num, -1)
    rows = np.asarray(actions).reshape(len(actions), -1)
    counts = np.array([(draws == row).all(axis=-1).sum() for row in rows])
    assert counts.sum() == num
    z = (counts - num * probs) / np.sqrt(num * probs * (1 - probs) + 1e-9)
    assert np.abs(z).max() < 4


@pytest.mark.parametrize("kind", ["gaussian", "tanh"])
def test_gaussian_draws_have_their_moments(kind):
    policy, num = make(kind, 3), 100_000
    draw = jax.vmap(policy.sample)(jax.random.split(jax.random.key(5), num))
    z = np.asarray((draw - policy.mean[None]) / jnp.exp(policy.log_std)[None])
    assert np.abs(z.mean(axis=0)).max() < 4 / math.sqrt(num)
    assert np.abs((z**2).mean(axis=0) - 1).max() < 4 * math.sqrt(2 / num)
    off_diagonal = (z.T @ z / num)[np.triu_indices(3, 1)]
    assert np.abs(off_diagonal).max() < 4 / math.sqrt(num)


def test_gaussian_draws_carry_gradients():
    policy, key = make("gaussian", 3), jax.random.key(6)
    slopes = jax.grad(lambda d: d.sample(key).sum())(policy)
    np.testing.assert_array_equal(slopes.mean, np.ones(3))
    deviation = policy.sample(key) - policy.mean
    np.testing.assert_allclose(slopes.log_std, deviation, rtol=1e-5)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("num_kept", [3, 7])  # with 2 masked: both ways of log_prob
def test_masked_actions_leave_everything_else_alone(num_kept, masked):
    kept = normal(0, num_kept), normal(1, num_kept)
    where = np.arange(1, num_kept + 1)  # the first and the last action are masked
    full = [jnp.full(num_kept + 2, masked).at[where].set(logits) for logits in kept]

    def numbers(p, q, action):
        p, q = Categorical(p), Categorical(q)
        return jnp.stack([p.log_prob(action), p.entropy(), p.kl(q)])

    slopes_of = jax.jit(jax.jacobian(numbers, (0, 1)))
    expected = jax.jit(numbers)(*kept, jnp.array(1))
    expected_slopes = slopes_of(*kept, jnp.array(1))
    with jax.debug_nans(True):  # eager, so that no NaN hides behind a `where`
        found = numbers(*full, jnp.array(2))
    slopes = slopes_of(*full, jnp.array(2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for slope, expected_slope in zip(slopes, expected_slopes, strict=True):
        close = dict(rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope[:, where], expected_slope, **close)
        np.testing.assert_array_equal(slope[:, [0, -1]], 0)


@pytest.mark.parametrize("size", [3, 9])
def test_impossible_actions_have_probability_zero(size):
    policy = Categorical(normal(0, size))
    for action in (-1, size, size + 300):
        assert policy.log_prob(jnp.array(action)) == -jnp.inf
    forbidding = Categorical(policy.logits.at[0].set(-jnp.inf))
    assert policy.kl(forbidding) == jnp.inf


def test_fixed_bits_have_finite_slopes():
    p, q = Bernoulli(jnp.array([jnp.inf, -jnp.inf, 0.5])), Bernoulli(jnp.zeros(3))
    action = jnp.array([1, 0, 1])
    assert p.log_prob(action) == Bernoulli(p.logits[2:]).log_prob(action[2:])
    np.testing.assert_array_equal(p.sample(jax.random.key(0))[:2], action[:2])
    for number in (lambda d: d.log_prob(action), lambda d: d.entropy(), p.kl, q.kl):
        assert np.all(np.isfinite(jax.grad(lambda d, f=number: f(d))(p).logits[2]))
    for number in (lambda d: d.log_prob(action), lambda d: d.entropy()):
        np.testing.assert_array_equal(jax.grad(number)(p).logits[:2], 0)


@pytest.mark.parametrize("kind", ["categorical", "multi", "bernoulli"])
@pytest.mark.parametrize("size", [3, 9])
def test_extreme_logits_stay_finite(kind, size):
    p = jax.tree.map(lambda x: 1e4 * jnp.sign(x), make(kind, 0, (), size))
    q = jax.tree.map(jnp.negative, p)
    actions = every_action(p)

    @jax.jit
    def everything(policy):
        entropy = jax.value_and_grad(lambda d: d.entropy())(policy)
        kl = jax.value_and_grad(lambda d: d.kl(p))(policy)
        return entropy, kl, jax.vmap(policy.log_prob)(actions)

    for policy in (p, q):
        found = everything(policy), scores_of(policy, actions)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    if kind == "bernoulli":  # every bit is fixed, and fixed to the other value
        np.testing.assert_allclose(p.kl(q), 1e4 * size, rtol=1e-6)


def test_half_precision_draws_use_full_precision_uniforms():
    logits = jnp.log(jnp.array([0.001, 0.999])).astype(jnp.bfloat16)
    prob = float(jax.nn.softmax(logits.astype(jnp.float32))[0])
    rows = jnp.broadcast_to(logits, (100_000, 2))
    drawn = np.asarray(Categorical(rows).sample(jax.random.key(0)) == 0).mean()
    assert abs(drawn - prob) < 4 * math.sqrt(prob / 100_000)


def numbers(policy, key):
    """Everything a distribution says, as one tree."""
    action = policy.sample(key)
    entropy = policy.sampled_entropy if isinstance(policy, TanhGaussian) else None
    return {
        "action": action,
        "mode": policy.mode(),
        "env_action": policy.to_env(action),
        "log_prob": policy.log_prob(action),
        "entropy": entropy(key) if entropy else policy.entropy(),
        "kl": policy.kl(jax.tree.map(lambda x: 0.9 * x, policy)),
    }


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_are_kept(kind, dtype, float64):
    found = jax.eval_shape(numbers, make(kind, 0, (4,), 3, dtype), jax.random.key(0))
    discrete = kind in ("categorical", "multi", "bernoulli")
    for name, number in found.items():
        is_action = name in ("action", "mode", "env_action")
        assert number.dtype == ("int32" if is_action and discrete else dtype), name


@pytest.mark.parametrize("kind", KINDS)
def test_passes_through_jit_vmap_and_scan(kind):
    policy, keys = make(kind, 0, (4,)), jax.random.split(jax.random.key(0), 4)
    if kind == "tanh":
        policy = policy._replace(low=jnp.full(4, LOW), high=jnp.full(4, HIGH))
    rows = [jax.tree.map(lambda x, i=i: x[i], policy) for i in range(4)]
    each = [numbers(row, key) for row, key in zip(rows, keys, strict=True)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    vmapped = jax.jit(jax.vmap(numbers))(policy, keys)

    def body(carry, x):
        row, key = x
        return row, (carry, numbers(row, key))

    last, (carried, scanned) = jax.lax.scan(body, rows[0], (policy, keys))
    close = dict(rtol=1e-5, atol=1e-6)
    for found in (vmapped, scanned):
        for name, number in found.items():
            np.testing.assert_allclose(number, expected[name], **close, err_msg=name)
    assert type(last) is type(carried) is type(policy)
    # What scan has stacked works as a batch.
    log_prob = carried.log_prob(jnp.roll(scanned["action"], 1, axis=0))
    np.testing.assert_allclose(log_prob[1:], expected["log_prob"][:-1], **close)
    assert log_prob.shape == (4,)


def test_bernoulli_takes_integers_and_booleans_alike():
    policy = make("bernoulli", 0)
    bits = jnp.array([1, 0, 1])
    assert policy.log_prob(bits) == policy.log_prob(bits.astype(bool))
    assert policy.log_prob(bits) == policy.log_prob(bits.astype(jnp.uint8))


def test_every_class_has_the_methods_of_the_protocol():
    methods = {name for name in vars(Distribution) if not name.startswith("_")}
    assert methods == {"sample", "log_prob", "entropy", "kl", "mode", "to_env"}
    for kind in KINDS:
        assert all(callable(getattr(make(kind, 0), name)) for name in methods)


def wide(*shape):
    return jnp.zeros(shape)


REFUSED = {
    "mean and log_std": (
        lambda: DiagonalGaussian(wide(4, 2), wide(2)).log_prob(wide(4, 2)),
        r"log_std has shape \(2,\), but mean has shape \(4, 2\)",
    ),
    "mean and log_std, entropy": (
        lambda: DiagonalGaussian(wide(4, 2), wide(4, 1)).entropy(),
        r"log_std has shape \(4, 1\)",
    ),
    "mean and log_std, sample": (
        lambda: TanhGaussian(wide(2), wide(1)).sample(jax.random.key(0)),
        r"log_std has shape \(1,\)",
    ),
    "gaussian action": (
        lambda: DiagonalGaussian(wide(4, 2), wide(4, 2)).log_prob(wide(2)),
        r"action has shape \(2,\)",
    ),
    "gaussian kl": (
        lambda: DiagonalGaussian(wide(2), wide(2)).kl(make("gaussian", 0)),
        r"other.mean has shape \(3,\)",
    ),
    "categorical action": (
        lambda: Categorical(wide(4, 2)).log_prob(jnp.zeros((4, 1), jnp.int32)),
        r"action has shape \(4, 1\), needs \(4,\) = one integer per row",
    ),
    "categorical kl": (
        lambda: Categorical(wide(2)).kl(Categorical(wide(3))),
        r"other.logits has shape \(3,\)",
    ),
    "multi-categorical action": (
        lambda: make("multi", 0, (4,)).log_prob(jnp.zeros((4, 3), jnp.int32)),
        r"action has shape \(4, 3\), needs \(4, 2\) = one integer per component",
    ),
    "multi-categorical batches": (
        lambda: MultiCategorical((wide(4, 2), wide(3, 2))).mode(),
        r"leading shapes \[\(4,\), \(3,\)\]",
    ),
    "multi-categorical empty": (
        lambda: MultiCategorical(()).entropy(),
        "at least one component",
    ),
    "multi-categorical kl": (
        lambda: make("multi", 0).kl(MultiCategorical((wide(3),))),
        "other has 1 components, needs 2",
    ),
    "bernoulli action": (
        lambda: Bernoulli(wide(3)).log_prob(jnp.zeros(2, bool)),
        r"action has shape \(2,\), needs \(3,\) = one bit per logit",
    ),
    "tanh bound shape": (
        lambda: TanhGaussian(wide(4, 2), wide(4, 2), wide(2)).to_env(wide(4, 2)),
        r"low has shape \(2,\), needs \(\), \(4,\) or \(4, 2\)",
    ),
    "tanh without bounds": (
        lambda: TanhGaussian(wide(2), wide(2), -np.inf).log_prob(wide(2)),
        "low is -inf and high is 1.0, need finite",
    ),
    "tanh bounds swapped": (
        lambda: TanhGaussian(wide(2), wide(2), 1.0, np.array([2.0, 0])).to_env(wide(2)),
        "need finite bounds with low < high",
    ),
}


@pytest.mark.parametrize("call, sentence", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
