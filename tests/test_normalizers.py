"""Running statistics of observations, against NumPy in double precision."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.envs import Box, Discrete, Masked, MaskedObs, MultiBinary
from jaxpg.heads import categorical_head
from jaxpg.moments import Moments
from jaxpg.networks import cnn_network, feedforward, gru_network, mlp_network
from jaxpg.normalizers import Statistics, _merged, normalized, observe, observe_in
from jaxpg.policies import from_network

SPACE = Box(-np.inf, np.inf, (2,))
ALL = jnp.ones((4, 5), bool)


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def echo(space=SPACE):
    """What a network would see of an observation."""
    plain = feedforward(lambda key, obs: {"scale": jnp.ones(())}, lambda _, obs: obs)
    return normalized(plain, space)


def fresh(network=None, obs=None):
    network = echo() if network is None else network
    return network.init(jax.random.key(0), jnp.zeros(2) if obs is None else obs)


def draw(key, shape=(4, 5, 2), mean=3.0, std=2.0):
    return mean + std * jax.random.normal(jax.random.key(key), shape)


def level_and_variance(params):
    known = params["observations"]
    number = known.num_samples.astype(float)
    return known.mean, (known.squares + known.squares_rest) / number


def test_before_anything_was_observed_nothing_is_changed():
    network, far = echo(), jnp.array([-1e6, 0.25])
    np.testing.assert_array_equal(network.step(fresh(), None, far)[0], far)


def test_observations_are_seen_by_mean_and_deviation():
    obs = draw(0)
    params = quick(observe)(fresh(), obs, ALL)
    flat = np.asarray(obs, np.float64).reshape(-1, 2)
    given = jnp.array([1.0, 4.0])
    expected = (np.asarray(given) - flat.mean(0)) / flat.std(0)
    got, _ = echo().step(params, None, given)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_is_far_away_is_clipped():
    params = observe(fresh(), draw(0), ALL)
    got, _ = echo().step(params, None, jnp.array([1e5, -1e5]))
    np.testing.assert_array_equal(got, [10.0, -10.0])


def test_an_entry_that_never_varied_is_seen_as_zero():
    obs = draw(0).at[..., 1].set(0.1)
    params = fresh()
    for _ in range(3):
        params = quick(observe)(params, obs, ALL)
    got, _ = echo().step(params, None, jnp.array([3.0, 0.1]))
    assert got[1] == 0.0 and np.isfinite(got).all()


def test_batches_one_after_another_are_one_large_batch():
    obs, mask = (
        draw(1, (6, 70, 2)),
        jax.random.bernoulli(jax.random.key(2), 0.7, (6, 70)),
    )
    one = quick(observe)(fresh(), obs, mask)
    parts = fresh()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts = quick(observe)(parts, obs[rows], mask[rows])
    real = np.asarray(obs, np.float64)[np.asarray(mask)]
    for params in (one, parts):
        assert params["observations"].num_samples == int(mask.sum())
        mean, variance = level_and_variance(params)
        np.testing.assert_allclose(mean, real.mean(0), rtol=1e-6)
        np.testing.assert_allclose(variance, real.var(0), rtol=1e-5)


def test_what_is_masked_may_be_anything():
    obs, mask = draw(0), ALL.at[1, 2].set(False).at[3].set(False)
    spoilt = jnp.where(mask[..., None], obs, jnp.nan)
    one, other = (observe(fresh(), x, mask) for x in (obs, spoilt))
    chex.assert_trees_all_equal(one, other)
    assert one["observations"].num_samples == 14


def test_an_empty_batch_changes_nothing():
    params = observe(fresh(), draw(0), ALL)
    for before in (fresh(), params):
        after = quick(observe)(before, draw(1), ~ALL)
        chex.assert_trees_all_close(before, after, rtol=1e-7)


def test_one_observation_is_no_division_by_zero():
    params = observe(fresh(), jnp.full((1, 1, 2), 5.0), jnp.ones((1, 1), bool))
    got, _ = echo().step(params, None, jnp.array([5.0, 6.0]))
    np.testing.assert_array_equal(got, [0.0, 10.0])


def test_a_small_deviation_around_a_large_mean_survives():
    params = fresh()
    rows = [draw(i, (64, 100, 2), mean=1e4, std=1.0) for i in range(3)]
    for obs in rows:
        params = quick(observe)(params, obs, jnp.ones((64, 100), bool))
    real = np.concatenate(rows).astype(np.float64).reshape(-1, 2)
    mean, variance = level_and_variance(params)
    np.testing.assert_allclose(mean, real.mean(0), rtol=1e-7)
    np.testing.assert_allclose(np.sqrt(variance), real.std(0), rtol=1e-3)
    assert np.abs(np.sqrt(variance) - 1.0).max() < 0.02


def batches_told(size, num_batches, start):
    """Statistics in float32 and by NumPy, after batches of `size` that drift.

    A batch is told by its moments, for ten thousand million draws would take minutes.
    """
    time = np.arange(num_batches) / num_batches
    means = (2.0 + np.sin(7 * time) + 3 * time).astype(np.float32)
    variances = (1.0 + time).astype(np.float32)
    n0, mean0, variance0 = start
    zero = jnp.zeros(())
    first = Statistics(
        *(jnp.float32(x) for x in (n0, 0.0, mean0, 0.0, n0 * variance0, 0.0))
    )

    def tell(known, batch):
        mean, variance = batch
        told = Moments(jnp.uint32(size), mean, zero, size * variance, zero)
        return _merged(known, told), None

    known, _ = jax.jit(lambda *x: jax.lax.scan(tell, *x))(first, (means, variances))
    counts = np.append(np.full(num_batches, float(size)), float(np.float32(n0)))
    means = np.append(means.astype(np.float64), mean0)
    mean = np.average(means, weights=counts)
    inside = np.append(variances.astype(np.float64), variance0)
    variance = np.average(inside + (means - mean) ** 2, weights=counts)
    return known, (counts.sum(), mean, variance)


@pytest.mark.parametrize(
    ("size", "num_batches", "start"),
    [
        (2**20, 10_000, (0.0, 0.0, 0.0)),
        (300, 50_000, (1e10, -500.0, 1.0)),  # 1e10 + 300 is 1e10 in float32
    ],
)
def test_ten_thousand_million_are_not_too_many(size, num_batches, start):
    known, (number, mean, variance) = batches_told(size, num_batches, start)
    known = jax.tree.map(lambda x: np.float64(x), known)
    assert number > 1e10
    np.testing.assert_allclose(known.num_samples + known.num_samples_rest, number)
    np.testing.assert_allclose(known.mean + known.mean_rest, mean, rtol=1e-6)
    spread = (known.squares + known.squares_rest) / known.num_samples
    np.testing.assert_allclose(spread, variance, rtol=1e-4)


def test_devices_do_not_change_the_answer():
    obs, mask = (
        draw(3, (16, 9, 2)),
        jax.random.bernoulli(jax.random.key(4), 0.6, (16, 9)),
    )
    mesh = jax.make_mesh(
        (8,),
        ("batch",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices(),
    )
    spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    params = fresh()
    one = jax.jit(observe)(params, obs, mask)
    many = jax.jit(observe)(params, *jax.device_put((obs, mask), spread))
    chex.assert_trees_all_close(one, many, rtol=1e-5, atol=1e-5)


# Statistics are params.


NETWORKS = {
    "mlp": (mlp_network(SPACE, 3, hidden=(4,)), SPACE),
    "gru": (gru_network(SPACE, 3, hidden=(), memory=4), SPACE),
    "cnn": (
        cnn_network(Box(0, 255, (3, 3, 1), jnp.uint8), 3, hidden=()),
        Box(0, 255, (3, 3, 1), jnp.uint8),
    ),
    "masked": (mlp_network(Masked(SPACE, 3), 3, hidden=(4,)), Masked(SPACE, 3)),
}


@pytest.fixture(params=NETWORKS, scope="module")
def case(request):
    """A policy on a normalised network, its params and a batch of observations."""
    network, space = NETWORKS[request.param]
    policy = from_network(normalized(network, space), categorical_head(Discrete(3)))
    features = space.features if isinstance(space, Masked) else space
    obs = (3.0 * draw(5, (2, 4, *features.shape))).astype(features.dtype)
    if isinstance(space, Masked):
        obs = MaskedObs(obs, jnp.ones((2, 4, 3), bool).at[:, 0, 1].set(False))
    first = jax.tree.map(lambda x: x[0, 0], obs)
    params = quick(policy.init)(jax.random.key(0), first)
    return normalized(network, space), policy, params, obs


def test_observing_reaches_the_params_of_policies(case):
    _, _, params, obs = case
    mask = jnp.ones((2, 4), bool).at[1, 3].set(False)
    after = quick(observe_in)(params, obs, mask)
    alone = observe(params["network"], obs, mask)
    chex.assert_trees_all_close(after["network"], alone, rtol=1e-5, atol=1e-3)
    assert after["network"]["observations"].num_samples == 7
    chex.assert_trees_all_equal(
        after["network"]["network"], params["network"]["network"]
    )
    chex.assert_trees_all_equal(after["head"], params["head"])


def test_statistics_are_floats_and_have_exactly_no_gradient(case):
    network, _, params, obs = case
    params = observe(params["network"], obs, jnp.ones((2, 4), bool))
    row = jax.tree.map(lambda x: x[0], obs)

    def total(params):
        starts = jnp.arange(4) == 2
        outputs, _ = network.unroll(params, network.initial_carry(), row, starts)
        return jnp.sum(outputs**2)

    gradient = quick(jax.grad(total))(params)
    for leaf in gradient["observations"]:
        np.testing.assert_array_equal(leaf, 0.0)
    moved = [np.abs(x).max() > 0 for x in jax.tree.leaves(gradient["network"])]
    assert any(moved)


def test_step_and_unroll_agree_across_episodes(case):
    network, _, params, obs = case
    params = observe(params["network"], obs, jnp.ones((2, 4), bool))
    params["network"] = jax.tree.map(lambda x: x + 0.3, params["network"])
    row = jax.tree.map(lambda x: x[0], obs)
    starts = jnp.array([False, False, True, False])
    carry = jax.tree.map(lambda x: x + 0.5, network.initial_carry())
    outputs, _ = quick(network.unroll)(params, carry, row, starts)
    for t in range(4):
        carry = network.initial_carry() if starts[t] else carry
        here = jax.tree.map(lambda x, t=t: x[t], row)
        output, carry = network.step(params, carry, here)
        np.testing.assert_allclose(outputs[t], output, rtol=1e-5, atol=1e-6)


def test_masks_pass_unchanged_and_features_are_normalised():
    def look(_, obs):
        return jnp.append(obs.features, obs.action_mask.astype(float))

    plain = feedforward(lambda key, obs: (), look)
    network = normalized(plain, Masked(SPACE, 3))
    allowed = jnp.zeros((1, 2, 3), bool).at[..., 2].set(True)
    obs = MaskedObs(jnp.array([[[1.0, 0.0], [3.0, 4.0]]]), allowed)
    one = jax.tree.map(lambda x: x[0, 1], obs)
    params = observe(fresh(network, one), obs, jnp.ones((1, 2), bool))
    seen, _ = network.step(params, None, one)
    np.testing.assert_allclose(seen, [1.0, 1.0, 0.0, 0.0, 1.0], rtol=1e-6)


def test_params_without_statistics_are_left_as_they_are():
    params = {"network": [jnp.ones(2)], "head": {}}
    chex.assert_trees_all_equal(observe_in(params, draw(0), ALL), params)


def test_seeds_keep_their_own_statistics():
    obs = jnp.stack([draw(0), draw(1, mean=-7.0)])
    both = jax.vmap(lambda x: observe(fresh(), x, ALL))(obs)
    for i in range(2):
        alone = observe(fresh(), obs[i], ALL)
        one = jax.tree.map(lambda x, i=i: x[i], both)
        chex.assert_trees_all_close(one, alone, rtol=1e-5, atol=1e-5)


def test_double_precision_reaches_the_statistics(float64):
    params = observe(fresh(), draw(0).astype(jnp.float32), ALL)
    assert {x.dtype for x in params["observations"]} == {jnp.dtype("float64")}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: echo(Discrete(3)), "^observation_space is Discrete.*needs a Box"),
        (lambda: echo(MultiBinary(3)), "needs a Box; numbers and bits are coded"),
        (lambda: echo(Masked(Discrete(3), 2)), "Masked.*needs a Box"),
        (lambda: observe({"network": ()}, draw(0), ALL), "params hold no statistics"),
        (
            lambda: observe(fresh(), draw(0, (4, 5, 3)), ALL),
            r"obs has shape \(4, 5, 3\), needs \(4, 5, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
