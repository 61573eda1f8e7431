"""Distributions: against numpyro, by enumeration, by quadrature; drawn last of all."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.distributions import transforms

from jaxpg.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    StateDependentGaussian,
    TanhGaussian,
    discrete,
    entropy_of,
)

LOW, HIGH = -0.5, 2.0
MASKS = [-np.inf, -1e4, float(np.finfo(np.float32).min)]
HAVE_KL = ("gaussian", "noise")  # in numpyro
KINDS = ["categorical", "multi", "bernoulli", "gaussian", "tanh", "noise"]


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
    if kind == "noise":
        features = normal(seed + 2, *batch, 2, dtype=dtype)
        log_std = 0.5 * normal(seed + 3, *batch, 2, size, dtype=dtype)
        return StateDependentGaussian(first, features, log_std)
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


def std_of(policy):
    """The standard deviation of a normal policy, written without our code."""
    if not isinstance(policy, StateDependentGaussian):
        return np.exp(policy.log_std)
    features, log_std = np.asarray(policy.features), np.asarray(policy.log_std)
    variance = np.einsum("...f,...fd->...d", features**2, np.exp(2 * log_std))
    return np.sqrt(variance + 1e-6).astype(features.dtype)


def numpyro_twin(policy):
    if isinstance(policy, Categorical):
        return dist.CategoricalLogits(policy.logits)
    if isinstance(policy, Bernoulli):
        return dist.BernoulliLogits(policy.logits).to_event(1)
    base = dist.Normal(policy.mean, std_of(policy)).to_event(1)
    if not isinstance(policy, TanhGaussian):
        return base
    squash = [  # tanh(x) = 2 sigmoid(2x) - 1
        transforms.AffineTransform(0.0, 2.0),
        transforms.SigmoidTransform(),
        transforms.AffineTransform(LOW, HIGH - LOW),
    ]
    return dist.TransformedDistribution(base, squash)


@pytest.mark.thinned(21)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize(
    "kind", ["categorical", "bernoulli", "gaussian", "tanh", "noise"]
)
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("float64", 1e-9)])
def test_agrees_with_numpyro(kind, size, batch, dtype, rtol, float64):
    p, q = (make(kind, seed, batch, size, dtype) for seed in (0, 10))
    action = p.sample(jax.random.key(0))

    def ours():
        numbers = [p.log_prob(action)]
        numbers += [p.entropy()] if kind != "tanh" else []
        return numbers + ([p.kl(q)] if kind in HAVE_KL else [])

    def theirs():
        twin = numpyro_twin(p)
        numbers = [twin.log_prob(p.to_env(action))]
        numbers += [twin.entropy()] if kind != "tanh" else []
        has_kl = kind in HAVE_KL
        return numbers + ([dist.kl_divergence(twin, numpyro_twin(q))] if has_kl else [])

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
@pytest.mark.thinned(2)
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


def hermite(policy):
    """Gauss-Hermite under a normal policy: actions [N, D] and their weights [N].

    Exact for what is a polynomial in the action, as all of these numbers are.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    noise = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    weights = np.outer(weights, weights).ravel() / (2 * np.pi)
    return jnp.asarray(np.asarray(policy.mean) + std_of(policy) * noise), weights


@pytest.mark.parametrize("kind", ["gaussian", "noise"])
def test_gaussian_by_quadrature(kind, float64):
    p, q = (make(kind, seed, (), 2, jnp.float64) for seed in (0, 10))
    actions, weights = hermite(p)
    log_p, log_q = (jax.vmap(d.log_prob)(actions) for d in (p, q))
    np.testing.assert_allclose(p.entropy(), -weights @ log_p, rtol=1e-12)
    np.testing.assert_allclose(p.kl(q), weights @ (log_p - log_q), rtol=1e-12)
    assert p.kl(p) == 0
    scores = scores_of(p, actions)
    for score in scores:
        np.testing.assert_allclose(np.tensordot(weights, score, 1), 0, atol=1e-12)
        assert np.abs(score).max() > 0.1


def parameters(policy):
    """The parameters as one vector, and the way back; bounds are not parameters."""
    if not isinstance(policy, TanhGaussian):
        return ravel_pytree(policy)
    flat, build = ravel_pytree(policy[:2])
    return flat, lambda x: TanhGaussian(*build(x), *policy[2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thinned(4)
def test_kl_curves_like_the_fisher_information(kind, float64):
    p = make(kind, 0, (), 2, jnp.float64)
    if kind in ("gaussian", "tanh", "noise"):
        actions, weights = hermite(p)
    else:
        actions = every_action(p)
        weights = np.exp(jax.vmap(p.log_prob)(actions))
    flat, build = parameters(p)
    score = jax.vmap(jax.grad(lambda x, a: build(x).log_prob(a)), (None, 0))
    scores = np.asarray(jax.jit(score)(flat, actions))
    fisher = np.einsum("n,ni,nj->ij", weights, scores, scores)
    assert np.linalg.matrix_rank(fisher) >= 1 and np.abs(fisher).max() > 0.1
    for kl in (lambda x: p.kl(build(x)), lambda x: build(x).kl(p)):
        np.testing.assert_allclose(jax.grad(kl)(flat), 0, atol=1e-12)
        np.testing.assert_allclose(jax.jit(jax.hessian(kl))(flat), fisher, atol=1e-12)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("source", ["logits", "where"])
@pytest.mark.parametrize("num_actions", [5, 11])  # both ways of log_prob
@pytest.mark.thinned(5)
def test_second_derivatives_pass_masked_actions_by(num_actions, source, masked):
    """What TRPO's Fisher-vector product does, against diag(p) - p pᵀ of the rest."""
    kept = np.arange(num_actions) % 4 != 0
    raw, vector = normal(0, num_actions), normal(1, num_actions)
    mask = lambda x: Categorical(jnp.where(kept, x, masked))  # noqa: E731
    build, at = (mask, raw) if source == "where" else (Categorical, mask(raw).logits)
    p = build(at)
    probs = np.where(kept, np.exp(np.asarray(raw, np.float64)), 0.0)
    probs /= probs.sum()
    fisher = np.diag(probs) - np.outer(probs, probs)

    def both(kl):
        return jax.jit(lambda x: jax.jvp(jax.grad(kl), (x,), (vector,)))(at)

    # A second component, for a mask in one must leave the other alone.
    beside = (normal(2, 3),)
    pair = MultiCategorical((p.logits, *beside))
    for kl in (
        lambda x: p.kl(build(x)),
        lambda x: build(x).kl(p),
        lambda x: pair.kl(MultiCategorical((build(x).logits, *beside))),
    ):
        slope, curved = both(kl)
        np.testing.assert_allclose(slope, 0, atol=1e-6)
        np.testing.assert_allclose(curved, fisher @ vector, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(curved)[~kept], 0)
    # Away from equality: d KL(p || q) / d logits of q = q - p.
    slope, _ = both(lambda x: p.kl(build(0.5 * x)))
    other = np.where(kept, np.exp(0.5 * np.asarray(raw, np.float64)), 0.0)
    expected = 0.5 * (other / other.sum() - probs)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)
    entropy = both(lambda x: build(x).entropy())
    assert all(np.all(np.isfinite(number)) for number in entropy)
    log_prob = both(lambda x: build(x).log_prob(jnp.array(1)))
    np.testing.assert_allclose(log_prob[1], -fisher @ vector, rtol=1e-5, atol=1e-6)


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
    slopes = scores_of(policy, jnp.asarray(pre, jnp.float32)[:, None])
    expected_slopes = (z / np.exp(log_std), z**2 - 1)
    for found, expected in zip(slopes[:2], expected_slopes, strict=True):
        close = dict(rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[:, 0], expected.astype(float), **close)
    # Squashed far out, a mean still has slopes: of the entropy, and of the action.
    for far in (-20.0, 20.0):
        there = policy._replace(mean=jnp.full(1, far))
        key = jax.random.key(0)
        entropy = jax.grad(lambda d: d.sampled_entropy(key))(there)  # noqa: B023
        np.testing.assert_allclose(entropy.mean, -2 * np.sign(far), rtol=1e-5)
        assert all(np.all(np.isfinite(leaf)) for leaf in entropy)
        action = jax.grad(lambda d: d.to_env(d.sample(key)).sum())(there)  # noqa: B023
        assert all(np.all(np.isfinite(leaf)) for leaf in action)


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
    # Millions of entries: here running takes longer than compiling.
    fast = {"xla_backend_optimization_level": 3}
    return np.asarray(jax.jit(discrete._invert_cdf, compiler_options=fast)(rows, u))


@pytest.mark.thinned(5)
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
    actions = discrete._invert_cdf(logits, jnp.full(20_000, U[-1]))
    assert np.asarray(actions).max() == 5


def test_two_actions_cost_one_comparison():
    def draw(logits, u):
        return discrete._invert_cdf(logits, u)

    lowered = jax.jit(draw).lower(jnp.zeros((5, 2)), jnp.zeros(5)).as_text()
    assert lowered.count("stablehlo.compare") == 1


@pytest.mark.parametrize("dtype, bits", [("float32", 24), ("bfloat16", 24)])
def test_uniforms_lie_in_the_middle_of_their_cells(dtype, bits):
    u = discrete._uniform(jax.random.key(0), (100_000,), jnp.dtype(dtype))
    cells = np.asarray(u, np.float64) * 2**bits
    assert np.all(cells % 2 == 1)
    assert 0 < np.asarray(u).min() and np.asarray(u).max() < 1


@pytest.mark.parametrize("size", [2, 5, 40])
@pytest.mark.parametrize("kind", ["categorical", "multi", "bernoulli"])
@pytest.mark.thinned(2)
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


@pytest.mark.parametrize("kind", ["gaussian", "tanh", "noise", "noise-floor"])
def test_gaussian_draws_have_their_moments(kind):
    policy, num = make(kind.removesuffix("-floor"), 3), 100_000
    if kind == "noise-floor":  # what is left where all features vanish
        policy = policy._replace(features=jnp.zeros(2), mean=jnp.zeros(3))
        np.testing.assert_allclose(std_of(policy), 1e-3, rtol=1e-6)
    draw = jax.vmap(policy.sample)(jax.random.split(jax.random.key(5), num))
    z = np.asarray(draw - policy.mean[None]) / std_of(policy)
    assert np.abs(z.mean(axis=0)).max() < 4 / math.sqrt(num)
    assert np.abs((z**2).mean(axis=0) - 1).max() < 4 * math.sqrt(2 / num)
    off_diagonal = (z.T @ z / num)[np.triu_indices(3, 1)]
    assert np.abs(off_diagonal).max() < 4 / math.sqrt(num)


def test_one_key_holds_the_noise_of_every_state():
    """For one key, noise is an affine function of the features, the same for all."""
    policy, key = make("noise", 3), jax.random.key(6)

    def noise(features, mean=policy.mean):
        there = policy._replace(features=jnp.asarray(features), mean=mean)
        return np.asarray(there.sample(key) - mean)

    rest = noise([0.0, 0.0])
    first, second = noise([1.0, 0.0]) - rest, noise([0.0, 1.0]) - rest
    mixed = noise([2.0, -3.0], mean=7 + policy.mean) - rest
    np.testing.assert_allclose(mixed, 2 * first - 3 * second, rtol=1e-4, atol=1e-5)
    assert np.abs(first).min() > 0.01 and np.abs(second).min() > 0.01
    assert np.all(policy.sample(jax.random.key(7)) != policy.sample(key))


def test_rows_of_a_batch_have_noise_of_their_own():
    policy = make("noise", 3)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (50_000, 2, *x.shape)), policy)
    z = np.asarray(rows.sample(jax.random.key(8)) - rows.mean) / std_of(policy)
    between = (z[:, 0] * z[:, 1]).mean(axis=0)
    assert np.abs(between).max() < 4 / math.sqrt(50_000)


def test_gaussian_draws_carry_gradients():
    policy, key = make("gaussian", 3), jax.random.key(6)
    slopes = jax.grad(lambda d: d.sample(key).sum())(policy)
    np.testing.assert_array_equal(slopes.mean, np.ones(3))
    deviation = policy.sample(key) - policy.mean
    np.testing.assert_allclose(slopes.log_std, deviation, rtol=1e-5)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("num_kept", [3, 7])  # with 2 masked: both ways of log_prob
@pytest.mark.thinned(4)
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
@pytest.mark.thinned(2)
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
    return {
        "action": action,
        "mode": policy.mode(),
        "env_action": policy.to_env(action),
        "log_prob": policy.log_prob(action),
        "entropy": entropy_of(policy, key),
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
@pytest.mark.thinned(4)
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


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_drawn_only_where_it_must_be(kind):
    policy = make(kind, 0, (4,))
    first, second = (entropy_of(policy, jax.random.key(seed)) for seed in (0, 1))
    assert first.shape == (4,)
    if kind == "tanh":
        assert np.all(first != second)
        expected = policy.sampled_entropy(jax.random.key(0))
    else:
        np.testing.assert_array_equal(first, second)
        expected = policy.entropy()
    np.testing.assert_array_equal(first, expected)


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
    "noise features": (
        lambda: StateDependentGaussian(wide(4, 3), wide(5), wide(4, 5, 3)).entropy(),
        r"features have shape \(5,\)",
    ),
    "noise scale": (
        lambda: StateDependentGaussian(wide(3), wide(5), wide(3)).sample(
            jax.random.key(0)
        ),
        r"log_std has \(3,\), need \(\*B, F\) and \(\*B, F, D\) beside a mean",
    ),
    "noise action": (
        lambda: make("noise", 0, (4,)).log_prob(wide(3)),
        r"action has shape \(3,\)",
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
