"""Properties of weights and gradients that hold for any batch whatever.

Batches of rows are drawn by hypothesis: packed or not, with empty rows, single
decisions and extreme ratios. One padded shape and one program serve all examples.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxpg.baselines import apply_baseline
from jaxpg.credit import RATIOS, CreditConfig, credit_of
from jaxpg.envs import Discrete, make
from jaxpg.estimators import make_baseline
from jaxpg.gradients import score_gradient, trajectory_gradients
from jaxpg.policies import log_prob_fn, mlp_policy, tabular_policy
from jaxpg.rollout import rollout_episodes
from jaxpg.types import Trajectory

B, T = 4, 6
EXAMPLES = settings(max_examples=50, deadline=None)

NORMALIZED = [ratio for ratio in RATIOS if ratio not in ("none", "past-dropped")]
CREDITS = [
    *({"ratio": ratio} for ratio in RATIOS),
    *({"ratio": ratio, "self_normalize": True} for ratio in NORMALIZED),
    {"ratio": "causal", "max_rho": 2.0, "keep_leading_discount": True},
    {"credit": "total-return"},
    {"credit": "total-return", "ratio": "whole"},
    {"credit": "total-return", "ratio": "whole", "self_normalize": True},
]
MEANS = [
    "none",
    "leave-one-out",
    "time-dependent",
    "batch-mean",
    "time-dependent-plain",
]
EVERY = list(itertools.product(map(str, CREDITS), MEANS))


@functools.cache
def program():
    """Weights of every credit under every mean baseline, [C, M, B, T], in one jit."""
    policy = tabular_policy(Discrete(2), Discrete(2))
    baselines = [make_baseline(name, policy, T) for name in MEANS]

    def every(rows, log_rhos):
        weights = []
        for setting in CREDITS:
            config = CreditConfig(discount=0.9, **setting)
            credit = credit_of(rows, config, log_rhos)
            for baseline in baselines:
                weights += [apply_baseline(baseline, None, (), rows, credit)]
        return jnp.stack(weights)

    return jax.jit(every, compiler_options={"xla_backend_optimization_level": 0})


def weights_of(batch):
    """[len(EVERY), B, T] as numpy's, from rows of (rewards, log-ratios) of episodes."""
    return np.asarray(program()(*padded(batch)))


def padded(batch):
    """Rows of episodes as B rows of T slots, with garbage where there is nothing."""
    reward, log_rhos = np.full((2, B, T), 1e30, np.float32)
    time = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    mask, ends, ids = np.zeros((3, B, T), np.int32)
    for i, row in enumerate(batch):
        first = 0
        for number, episode in enumerate(row):
            here = slice(first, first + len(episode))
            reward[i, here], log_rhos[i, here] = zip(*episode, strict=True)
            time[i, here], mask[i, here] = np.arange(len(episode)), 1
            ids[i, here] = 100 * i + number
            first += len(episode)
            ends[i, first - 1] = 1
    mask, ends, no = mask.astype(bool), ends.astype(bool), np.zeros((B, T), bool)
    zeros = np.zeros((B, T), np.float32)
    ends = ends | ~mask  # empty slots say so too, and must not be believed
    rows = Trajectory(zeros, zeros, zeros, reward, ends, no, mask, time, ids)
    return jax.tree.map(jnp.asarray, (rows, log_rhos))


def fits(row):
    return sum(map(len, row)) <= T


def rows_of(rewards, log_rhos, longest=T, max_rows=B):
    """Batches: up to B rows of episodes of 1 .. T decisions, some rows empty."""
    episode = st.lists(st.tuples(rewards, log_rhos), min_size=1, max_size=longest)
    row = st.lists(episode, max_size=3).filter(fits)
    return st.lists(row, min_size=1, max_size=max_rows)


# No product of ratios below e^-3: leaving out all but a small part cancels digits.
mild_rewards = st.integers(-8, 8).map(lambda n: n / 4)
mild_log_rhos = st.integers(-4, 4).map(lambda n: n / 8)
MILD = rows_of(mild_rewards, mild_log_rhos)
EXTREME = rows_of(
    st.sampled_from([-1e3, 0.0, 0.25, 1e3]),
    st.sampled_from(
        [-np.inf, -1e4, -87.0, -50.0, -1.0, 0.0, 1.0, 50.0, 87.0, 1e4, np.inf]
    ),
)


def first(batch):
    """Whether there is an episode in the first row."""
    return batch[0]


def close(one, other, weights):
    """Equal but for the rounding of sums of credit, whose size is that of `weights`."""
    of_credit = np.abs(weights[:: len(MEANS)]).max(axis=(1, 2), keepdims=True)
    bound = 1e-4 * np.repeat(of_credit, len(MEANS), axis=0) + 1e-7
    worst = (np.abs(one - other) - bound).max(axis=(1, 2))
    assert (worst <= 0.0).all(), EVERY[worst.argmax()]


@example([[[(-1000.0, -87.0), (-1000.0, 87.0)]]])  # a tiny reach under a huge value
@given(EXTREME)
@EXAMPLES
def test_weights_are_finite_and_zero_in_empty_slots(batch):
    mask = np.asarray(padded(batch)[0].mask)
    for name, weights in zip(EVERY, weights_of(batch), strict=True):
        assert np.isfinite(weights).all(), name
        assert (weights[~mask] == 0.0).all(), name


@given(MILD, st.permutations(range(B)))
@EXAMPLES
def test_a_permutation_of_rows_permutes_the_weights(batch, order):
    batch = batch + [[]] * (B - len(batch))
    weights = weights_of(batch)
    shuffled = weights_of([batch[i] for i in order])
    close(shuffled, weights[:, list(order)], weights)


@given(rows_of(mild_rewards, mild_log_rhos, longest=3, max_rows=1).filter(first))
@EXAMPLES
def test_episodes_joined_in_one_row_are_the_same_apart(batch):
    (row,) = batch
    joined, apart = weights_of([row]), weights_of([[episode] for episode in row])
    together = np.concatenate(
        [apart[:, i, : len(episode)] for i, episode in enumerate(row)], axis=1
    )
    given_joined = joined[:, 0, : together.shape[1]]
    close(given_joined[:, None], together[:, None], apart)


@given(MILD, st.sampled_from([-3.0, 0.1, 7.0, 1e4]))
@EXAMPLES
def test_weights_grow_with_the_rewards(batch, factor):
    scaled = [
        [[(factor * reward, x) for reward, x in episode] for episode in row]
        for row in batch
    ]
    weights = factor * weights_of(batch)
    close(weights_of(scaled), weights, weights)


@given(MILD, st.integers(-4, 4))
@EXAMPLES
def test_a_common_factor_is_no_factor_once_self_normalised(batch, shift):
    moved = [
        [[(r, x + shift * (t == 0)) for t, (r, x) in enumerate(e)] for e in row]
        for row in batch
    ]
    normalised = ["self_normalize" in name for name, _ in EVERY]
    before, after = weights_of(batch), weights_of(moved)
    close(after[normalised], before[normalised], before[normalised])


# Gradients of a real network, in 32 bits against 64.

NUMBER = 64


@functools.cache
def cartpole():
    """64 whole trajectories of a 4 -> 64 -> 64 -> 2 network, recorded in float32."""
    env = make("CartPole-v1", max_steps=100)
    policy = mlp_policy(env.observation_space, env.action_space, hidden=(64, 64))

    def roll(key):
        params = policy.init(key, jnp.zeros(4))
        # The default last layer is nearly zero, which would hide errors in the others.
        params = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(key, x.shape), params
        )
        ids = jnp.arange(NUMBER, dtype=jnp.int32)
        rows = rollout_episodes(env, policy, params, key, ids)
        weights = credit_of(rows, CreditConfig(discount=0.99)).value
        # As if a baseline had been subtracted: of both signs, so that sums cancel.
        return params, rows, jnp.where(rows.mask, weights - 10.0, 0.0)

    return policy, jax.jit(roll)(jax.random.key(0))


def layers_of(params):
    """Kernels and biases of the dense layers, first to last."""
    leaves = jax.tree_util.tree_leaves_with_path(params["network"])
    kernels = [x for path, x in leaves if "kernel" in str(path[-1])]
    biases = [x for path, x in leaves if "bias" in str(path[-1])]
    return list(zip(kernels, biases, strict=True))


def without_signs(params, row):
    """The same network with nothing that can cancel: |W|, |b|, |x| and no tanh.

    Its derivative in a parameter is the sum of the absolute values of all products that
    the real derivative sums up, for tanh' <= 1, |tanh z| <= |z| and |onehot - pi| <= 1.
    """
    x = jnp.abs(row.obs)
    for kernel, bias in layers_of(params):
        x = x @ jnp.abs(kernel) + jnp.abs(bias)[None]
    return jnp.sum(x, axis=1)


@functools.cache
def gradients():
    """Per trajectory and as a whole: in float32, in float64, and what they add up."""
    policy, (params, rows, weights) = cartpole()
    fn = log_prob_fn(policy)

    def both(params, rows, weights):
        return (
            trajectory_gradients(fn, params, rows, weights),
            score_gradient(fn, params, rows, weights),
        )

    single = jax.jit(both)(params, rows, weights)
    with jax.enable_x64(True):
        doubles = jax.tree.map(
            lambda x: x.astype(float) if x.dtype == jnp.float32 else x,
            (params, rows, weights),
        )
        double = jax.jit(both)(*doubles)
        params, rows, weights = doubles
        accumulated = jax.jit(
            lambda p, r, w: jax.tree.map(
                jnp.abs, trajectory_gradients(without_signs, p, r, w)
            )
        )(params, rows, jnp.abs(weights))
    return single, double, accumulated


def flat(tree, number=NUMBER):
    leaves = [np.asarray(x).reshape(number, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1)


UNITS = 4.0
"""Units of rounding that an entry may be off, of all that it adds up in absolute value.

A sum of n terms is off by at most n units, by about sqrt(n) of them where they round at
random, and far less where sums are taken in blocks; the longest here runs over 64
neurons and 100 decisions.
"""


def test_every_entry_of_every_trajectorys_gradient_is_right_in_float32():
    (each, _), (reference, _), accumulated = gradients()
    each, reference, accumulated = map(flat, (each, reference, accumulated))
    assert each.dtype == np.float32 and reference.dtype == np.float64
    bound = UNITS * np.finfo(np.float32).eps * accumulated
    assert (np.abs(each - reference) <= bound).all()
    # The bound says something: it is far below the gradients themselves.
    sizes = np.linalg.norm(reference, axis=1)
    assert (np.linalg.norm(bound, axis=1) < 1e-3 * sizes).all()
    assert np.abs(reference).min(axis=0).max() > 0.0


def test_the_mean_over_trajectories_is_one_backward_pass():
    (each, whole), (reference, double), accumulated = gradients()
    each, reference, accumulated = map(flat, (each, reference, accumulated))
    whole, double = (flat(tree, 1)[0] for tree in (whole, double))
    size = accumulated.mean(axis=0)
    assert (
        np.abs(reference.mean(axis=0) - double) <= UNITS * np.finfo(float).eps * size
    ).all()
    bound = UNITS * np.finfo(np.float32).eps * size
    assert (np.abs(each.mean(axis=0, dtype=np.float64) - whole) <= bound).all()
    assert (np.abs(whole - double) <= bound).all()
    assert np.linalg.norm(double) > 1.0
