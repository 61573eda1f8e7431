"""Rollouts: exactly the episodes that were asked for, however they are packed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg import exact, pages, rollout
from jaxpg.distributions import Categorical, TanhGaussian
from jaxpg.envs import Box, Discrete, Environment
from jaxpg.envs.probes import delayed_reward, endless_reward
from jaxpg.envs.tabular import random_mdp, tabular_environment
from jaxpg.heads import Head, categorical_head
from jaxpg.policies import Policy, from_apply, log_prob_fn, mlp_policy
from jaxpg.rollout import rollout_episodes, rollout_segments, start_segments
from jaxpg.slots import FEW, restart_ended
from jaxpg.train.sharding import place
from jaxpg.types import StepOutput, Trajectory

MAX_STEPS = 4
KEY = jax.random.key(5)


def quick(function):
    """`jit` for programs that run once: compiling them costs more than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def random_lengths():
    """Each episode draws its length, 1 .. MAX_STEPS, at reset; odd ones truncate.

    Every fact depends on all that it should: obs = (length, time, what the last action
    and a draw of the step made), and the reward is drawn anew at each step.
    """

    def reset(key):
        length = jax.random.randint(key, (), 1, MAX_STEPS + 1).astype(float)
        obs = jnp.stack([length, 0.0, 1.0])
        return obs, obs

    def step(key, state, action):
        key_noise, key_reward = jax.random.split(key)
        length, time, past = state
        past = 0.5 * past + action.astype(float) + jax.random.uniform(key_noise)
        after = jnp.stack([length, time + 1.0, past])
        over, odd = after[1] >= length, length % 2 == 1
        reward = jax.random.normal(key_reward)
        return after, StepOutput(after, reward, over & ~odd, over & odd)

    box = Box(0.0, np.inf, (3,))
    return Environment("Lengths", reset, step, box, Discrete(3), MAX_STEPS)


ENV = random_lengths()
POLICY = mlp_policy(ENV.observation_space, ENV.action_space, hidden=(4,))
PARAMS = jax.tree.map(
    lambda x: x + jax.random.normal(KEY, x.shape),
    quick(POLICY.init)(KEY, jnp.zeros(3)),
)


@functools.cache
def sampler(num_slots, keep_next_obs):
    return quick(
        lambda params, key, ids: rollout_episodes(
            ENV,
            POLICY,
            params,
            key,
            ids,
            num_slots=num_slots,
            keep_next_obs=keep_next_obs,
        )
    )


def sample(ids, num_slots=None, key=KEY, keep_next_obs=True):
    ids = jnp.asarray(ids, jnp.int32)
    return sampler(num_slots, keep_next_obs)(PARAMS, key, ids)


def decisions(trajectories):
    """All real decisions, sorted by episode and time, as NumPy arrays."""
    mask = np.asarray(trajectories.mask)
    order = np.lexsort((trajectories.time[mask], trajectories.episode_id[mask]))
    return jax.tree.map(lambda x: np.asarray(x)[mask][order], trajectories)


def assert_same_decisions(x, y):
    """To the bit, save log-probabilities: a matrix product's bits depend on its rows'
    number."""
    x, y = decisions(x), decisions(y)
    for name, a, b in zip(Trajectory._fields, x, y, strict=True):
        if name == "log_prob":
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        else:
            jax.tree.map(np.testing.assert_array_equal, a, b)


def check_whole_episodes(trajectories, ids):
    """Each id once, from time 0 to its end, nothing masked in between."""
    each = decisions(trajectories)
    ends = each.terminated | each.truncated
    np.testing.assert_array_equal(np.sort(each.episode_id[each.time == 0]), sorted(ids))
    np.testing.assert_array_equal(np.sort(each.episode_id[ends]), sorted(ids))
    follows = each.episode_id[1:] == each.episode_id[:-1]
    np.testing.assert_array_equal(follows, ~ends[:-1])
    np.testing.assert_array_equal(
        each.time[1:], np.where(follows, each.time[:-1] + 1, 0)
    )
    for row in jax.tree.leaves(trajectories.mask):
        assert not np.any(np.diff(row.astype(int)) == 1), "a gap inside a row"
    rows = np.asarray(trajectories.episode_id), np.asarray(trajectories.mask)
    for episode in ids:
        assert np.any((rows[0] == episode) & rows[1], axis=1).sum() == 1, "two rows"


# Episodes: packing.

N = 9


@pytest.fixture(scope="module")
def one_per_row():
    return sample(range(N))


def test_one_per_row(one_per_row):
    assert one_per_row.mask.shape == (N, MAX_STEPS)
    check_whole_episodes(one_per_row, range(N))
    np.testing.assert_array_equal(one_per_row.episode_id[:, 0], np.arange(N))
    np.testing.assert_array_equal(
        np.sum(one_per_row.mask, axis=1), one_per_row.obs[:, 0, 0], "length as drawn"
    )
    assert len(np.unique(np.sum(one_per_row.mask, axis=1))) == MAX_STEPS


@pytest.mark.parametrize("num_slots", range(1, N + 1))
@pytest.mark.thinned(4)
def test_any_number_of_slots_samples_the_same_episodes(one_per_row, num_slots):
    packed = sample(range(N), num_slots)
    assert packed.mask.shape == (num_slots, -(-N // num_slots) * MAX_STEPS)
    check_whole_episodes(packed, range(N))
    assert_same_decisions(packed, one_per_row)


@pytest.fixture
def early_moves(monkeypatch):
    """Half of the slots are few, and two turns a page, as if episodes were long."""
    monkeypatch.setattr(rollout, "few_of", lambda num_slots: num_slots // 2)
    monkeypatch.setattr(rollout, "WORTH_MOVING", 2)
    monkeypatch.setattr(pages, "PAGE", 2)


@pytest.mark.parametrize("num_slots", [2, 5, N])
@pytest.mark.thinned(3)
def test_the_last_few_are_moved_and_nothing_is_lost(
    one_per_row, early_moves, num_slots
):
    ids = jnp.arange(N, dtype=jnp.int32)

    def play(key):
        return rollout_episodes(
            ENV, POLICY, PARAMS, key, ids, num_slots=num_slots, keep_next_obs=True
        )

    moved = quick(play)(KEY)
    assert moved.mask.shape == (num_slots, -(-N // num_slots) * MAX_STEPS)
    check_whole_episodes(moved, range(N))
    assert_same_decisions(moved, one_per_row)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(moved))
    members = quick(jax.vmap(play))(jnp.stack([KEY, jax.random.key(9)]))
    assert_same_decisions(jax.tree.map(lambda x: x[0], members), one_per_row)
    check_whole_episodes(jax.tree.map(lambda x: x[1], members), range(N))


def test_the_last_few_decide_alone(early_moves):
    """Where episodes are long, most turns are of few slots: counted as they happen."""
    seen = []
    step = POLICY.step

    def counted(params, carry, obs):
        jax.debug.callback(lambda _: seen.append(1), obs[0])
        return step(params, carry, obs)

    ids = jnp.arange(N, dtype=jnp.int32)
    policy = POLICY._replace(step=counted)
    batch = rollout_episodes(ENV, policy, PARAMS, KEY, ids)
    jax.effects_barrier()
    lengths = np.sum(np.asarray(batch.mask), axis=1)
    running = [np.sum(lengths > turn) for turn in range(MAX_STEPS)]
    assert min(running) <= N // 2 < max(running)
    expected = [N if n > N // 2 else N // 2 for n in running]
    assert len(seen) == sum(expected)


def test_the_last_few_are_moved_in_double_precision_too(early_moves, float64):
    ids = jnp.arange(N, dtype=jnp.int32)
    params = TABLE.init(KEY, jnp.array(0))
    batch = rollout_episodes(TABULAR, TABLE, params, KEY, ids)
    check_whole_episodes(batch, range(N))


def test_a_buffer_is_turned_page_by_page_as_far_as_it_was_played(one_per_row):
    """400 episodes of four slots: a long buffer, more than half of it empty."""
    ids = jnp.arange(400, dtype=jnp.int32)
    packed = sample(ids, 4)
    assert packed.mask.shape[1] > 2 * pages.PAGE
    assert packed.mask[:, -pages.PAGE :].sum() == 0
    check_whole_episodes(packed, range(400))
    assert_same_decisions(packed, sample(ids))


def test_episodes_depend_on_their_id_alone(one_per_row):
    ids = [7, 2, 5]
    some = sample(ids, 2)
    check_whole_episodes(some, ids)
    chosen = np.isin(one_per_row.episode_id, ids)
    expected = one_per_row._replace(mask=one_per_row.mask & chosen)
    assert_same_decisions(some, expected)


def test_another_key_gives_other_episodes(one_per_row):
    other = sample(range(N), key=jax.random.key(6))
    assert not np.array_equal(other.reward, one_per_row.reward)


def test_no_two_decisions_share_their_randomness(one_per_row):
    each = decisions(one_per_row)
    assert len(np.unique(each.reward)) == len(each.reward)
    noise = each.next_obs[:, 2] - 0.5 * each.obs[:, 2] - each.action
    assert len(np.unique(np.round(noise, 5))) == len(noise)
    assert noise.min() >= -1e-6 and noise.max() <= 1.0


def test_facts_are_aligned_in_time(one_per_row):
    each = decisions(one_per_row)
    np.testing.assert_array_equal(each.obs[:, 1], each.time)
    np.testing.assert_array_equal(each.next_obs[:, 1], each.time + 1)
    over = each.next_obs[:, 1] == each.obs[:, 0]
    np.testing.assert_array_equal(each.terminated, over & (each.obs[:, 0] % 2 == 0))
    np.testing.assert_array_equal(each.truncated, over & (each.obs[:, 0] % 2 == 1))


@pytest.mark.parametrize("num_slots", [4, N])
def test_empty_slots_hold_ordinary_states(num_slots):
    """A slot without a next episode plays its last one, or the end of it, again."""
    packed = sample(range(N), num_slots)
    assert not packed.mask.all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(packed))
    length, time, _ = np.moveaxis(np.asarray(packed.obs), -1, 0)
    assert np.all((time < length) | (length == 0)) and packed.time.max() < MAX_STEPS


def test_log_prob_is_the_policys_own():
    packed = sample(range(N), 2, keep_next_obs=False)
    own = quick(jax.vmap(log_prob_fn(POLICY), (None, 0)))(PARAMS, packed)
    mask = np.asarray(packed.mask)
    np.testing.assert_allclose(packed.log_prob[mask], own[mask], rtol=1e-4, atol=1e-5)
    assert packed.next_obs is None and packed.carry is None


# Episodes: capacity and the early exit.


def schedule(lengths, num_slots):
    """List scheduling: the next episode goes to the slot that is free first."""
    free = np.zeros(num_slots, int)
    for length in lengths:
        free[np.argmin(free)] += length
    return free


def test_capacity_bounds_list_scheduling():
    """ceil(N / M) * L, over random lengths and the orders that are worst for it."""
    rng = np.random.default_rng(0)
    tight = 0
    for _ in range(3000):
        longest, num_slots = rng.integers(1, 8), rng.integers(1, 9)
        num_episodes = rng.integers(num_slots, 5 * num_slots + 1)
        lengths = rng.choice([1, longest], num_episodes, p=(p := rng.random(), 1 - p))
        if rng.random() < 0.5:
            lengths = rng.integers(1, longest + 1, num_episodes)
        bound = -(-num_episodes // num_slots) * longest
        for order in (lengths, np.sort(lengths), np.sort(lengths)[::-1]):
            makespan = schedule(order, num_slots).max()
            assert makespan <= bound
            tight += makespan == bound
    assert tight > 100, "a smaller capacity would be too small"


@pytest.mark.parametrize("order", ["short first", "long first", "all longest"])
@pytest.mark.parametrize("num_slots", [3, 4])
def test_rollout_is_list_scheduling_and_stops_at_its_end(order, num_slots):
    """The queue's order is ours to choose, so it is chosen to be bad."""
    pool = sample(range(60))
    lengths = np.sum(pool.mask, axis=1)
    ids = np.argsort(lengths, kind="stable")
    ids = {
        "short first": ids[::6],
        "long first": ids[::-6],
        "all longest": ids[lengths[ids] == MAX_STEPS][:10],
    }[order]
    packed = sample(ids, num_slots)
    check_whole_episodes(packed, ids)
    busy = np.sort(np.sum(packed.mask, axis=1))
    np.testing.assert_array_equal(busy, np.sort(schedule(lengths[ids], num_slots)))
    makespan = busy.max()
    capacity = packed.mask.shape[1]
    assert makespan <= capacity
    if order == "all longest":
        assert makespan == capacity
    else:
        assert makespan < capacity, "the early exit must be there to be seen"
    # Observations carry the length, which is never 0: a zero was never written.
    written = np.asarray(packed.obs[:, :, 0]) > 0
    expected = np.broadcast_to(np.arange(capacity) < makespan, written.shape)
    np.testing.assert_array_equal(written, expected)


def test_over_seeds_by_vmap_it_equals_separate_calls():
    keys = jax.random.split(jax.random.key(1), 3)
    ids = jnp.arange(7, dtype=jnp.int32)
    scales = jnp.array([0.5, 1.0, 2.0])

    def of_seed(key, scale):
        params = jax.tree.map(lambda x: x * scale, PARAMS)
        return rollout_episodes(ENV, POLICY, params, key, ids, num_slots=3)

    together = quick(jax.vmap(of_seed))(keys, scales)
    for i in range(3):
        seed = jax.tree.map(lambda x, i=i: x[i], together)
        check_whole_episodes(seed, range(7))
        assert_same_decisions(seed, quick(of_seed)(keys[i], scales[i]))


def test_over_seeds_the_loop_copies_nothing():
    """One select per leaf of the slots and none of the buffer: `anywhere` at work."""
    ids = jnp.arange(6, dtype=jnp.int32)

    def of_seed(key):
        return rollout_episodes(ENV, POLICY, PARAMS, key, ids, num_slots=2).mask

    text = jax.jit(jax.vmap(of_seed)).lower(jax.random.split(KEY, 3)).as_text()
    capacity = 3 * MAX_STEPS
    selects = [line for line in text.splitlines() if "stablehlo.select " in line]
    assert "stablehlo.case" in text
    assert not [line for line in selects if f"{capacity}x" in line]


@pytest.mark.parametrize("slots_per_device", [1, 2, 3])
def test_on_eight_devices_it_samples_the_same_episodes(slots_per_device):
    placement = place(8, num_episodes=24)

    def of_part(params, ids):
        return rollout_episodes(
            ENV, POLICY, params, KEY, ids, num_slots=slots_per_device
        )

    ids = jnp.arange(24, dtype=jnp.int32)
    spread = quick(lambda params: placement.map_rows(of_part, params, ids))(PARAMS)
    assert len(spread.obs.sharding.device_set) == 8
    assert spread.mask.shape[0] == 8 * slots_per_device
    check_whole_episodes(spread, range(24))
    assert_same_decisions(spread, sample(range(24), 5, keep_next_obs=False))


# Episodes: their law.


def tabular_policy(mdp):
    num_states, num_actions = mdp.reward.shape
    table = np.random.default_rng(1).normal(size=(num_states, num_actions))
    head = categorical_head(Discrete(num_actions))
    init = lambda key, obs: jnp.asarray(table, float)  # noqa: E731
    return from_apply(init, lambda table, state: table[state], head)


MDP = random_mdp(seed=2, num_states=3, num_actions=2, horizon=3)
TABULAR, TABLE = tabular_environment(MDP), tabular_policy(MDP)


def paths(trajectories):
    """Whole episodes as tuples (state, action, next state), counted."""
    each = decisions(trajectories)
    counts = {}
    starts = np.flatnonzero(each.time == 0)
    facts = np.stack([each.obs, each.action, each.next_obs], axis=1)
    ends = each.terminated | each.truncated
    for first, after in zip(starts, [*starts[1:], len(facts)], strict=True):
        if ends[after - 1]:
            path = tuple(facts[first:after].ravel().tolist())
            counts[path] = counts.get(path, 0) + 1
    return counts


def exact_law(params):
    """The probability of every path."""
    every = exact.enumerate_trajectories(MDP)
    rows = exact.with_log_probs(every.trajectories, TABLE, params)
    own = np.sum(np.where(rows.mask, rows.log_prob, 0.0), axis=1)
    probability = np.asarray(every.world_probability) * np.exp(own)
    facts = np.stack([rows.obs, rows.action, rows.next_obs], axis=2)
    return {
        tuple(facts[i][np.asarray(rows.mask[i])].ravel().tolist()): probability[i]
        for i in range(len(probability))
    }


def chi_square(counts, law):
    """The statistic and its critical value, for a false alarm in 10^4 (z = 3.72).

    Paths that are expected fewer than 5 times share one cell. The critical value is
    Wilson and Hilferty's: k (1 - 2 / 9k + z sqrt(2 / 9k))^3 for k degrees of freedom.
    """
    assert set(counts) <= set(law), "a path that cannot happen"
    total = sum(counts.values())
    expected = np.array([total * p for p in law.values()])
    seen = np.array([counts.get(path, 0) for path in law])
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(seen[~rare], seen[rare].sum())
    k = len(seen) - 1
    critical = k * (1 - 2 / (9 * k) + 3.72 * np.sqrt(2 / (9 * k))) ** 3
    return np.sum((seen - expected) ** 2 / expected), critical


NUM_SAMPLES = 20_000


def test_packed_episodes_follow_the_exact_law():
    params = TABLE.init(KEY, jnp.array(0))
    law = exact_law(params)
    np.testing.assert_allclose(sum(law.values()), 1.0, rtol=1e-5)
    packed = jax.jit(
        lambda key, ids: rollout_episodes(
            TABULAR, TABLE, params, key, ids, num_slots=50, keep_next_obs=True
        )
    )(jax.random.key(0), jnp.arange(NUM_SAMPLES, dtype=jnp.int32))
    counts = paths(packed)
    assert sum(counts.values()) == NUM_SAMPLES
    statistic, critical = chi_square(counts, law)
    assert statistic < critical


def test_episodes_that_end_within_a_window_of_steps_do_not():
    """The naive way, and the proof that the test above can fail."""
    params = TABLE.init(KEY, jnp.array(0))
    key = jax.random.key(0)

    @jax.jit
    def window(key):
        state = start_segments(TABULAR, TABLE, key, NUM_SAMPLES // 2)
        return rollout_segments(TABULAR, TABLE, params, key, state, 8)[0]

    counts = paths(window(key))
    assert sum(counts.values()) > NUM_SAMPLES / 2
    statistic, critical = chi_square(counts, exact_law(params))
    assert statistic > 2 * critical
    length = lambda law: sum(len(path) / 3 * n for path, n in law.items())  # noqa: E731
    mean = length(counts) / sum(counts.values())
    assert mean < length(exact_law(params)) - 0.05, "short ones are kept, long ones cut"


# Segments.

SLOTS, STEPS = 5, 12


def segment(state, num_steps, env=ENV, policy=POLICY, params=PARAMS, **settings):
    return quick(
        lambda params, state: rollout_segments(
            env, policy, params, KEY, state, num_steps, **settings
        )
    )(params, state)


@pytest.fixture(scope="module")
def start():
    return start_segments(ENV, POLICY, KEY, SLOTS)


@pytest.fixture(scope="module")
def long_one(start):
    return segment(start, STEPS)


def test_segments_hold_nothing_but_decisions(long_one):
    trajectory, _ = long_one
    assert trajectory.mask.shape == (SLOTS, STEPS) and trajectory.mask.all()


def test_two_segments_equal_one_of_twice_the_length(start, long_one):
    first, middle = segment(start, STEPS // 2)
    second, last = segment(middle, STEPS // 2)
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), first, second)
    whole, state = long_one
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    leaves = map(jax.tree.leaves, (last, state))
    for x, y in zip(*leaves, strict=True):
        assert jnp.all(x == y)


def test_segments_run_the_episodes_that_whole_rollouts_sample(long_one):
    """Slot m plays episodes m, m + M, ...: their facts are those of their ids."""
    trajectory, _ = long_one
    np.testing.assert_array_equal(
        trajectory.episode_id % SLOTS,
        np.broadcast_to(np.arange(SLOTS)[:, None], (SLOTS, STEPS)),
    )
    ids = np.unique(trajectory.episode_id)
    whole = decisions(sample(ids))
    each = decisions(trajectory)
    seen = set(zip(each.episode_id.tolist(), each.time.tolist(), strict=True))
    pairs = zip(whole.episode_id.tolist(), whole.time.tolist(), strict=True)
    chosen = np.array([pair in seen for pair in pairs])
    assert chosen.sum() == SLOTS * STEPS
    for name in ("obs", "action", "reward", "terminated", "truncated", "next_obs"):
        np.testing.assert_array_equal(getattr(each, name), getattr(whole, name)[chosen])


def test_time_and_id_move_on_at_ends_and_only_there(long_one):
    trajectory, _ = long_one
    ends = np.asarray(trajectory.ends)[:, :-1]
    time, ids = np.asarray(trajectory.time), np.asarray(trajectory.episode_id)
    assert ends.any(axis=1).all()
    np.testing.assert_array_equal(time[:, 1:], np.where(ends, 0, time[:, :-1] + 1))
    np.testing.assert_array_equal(np.diff(ids, axis=1), np.where(ends, SLOTS, 0))


def test_next_obs_is_the_true_one_and_obs_is_after_the_reset(long_one):
    trajectory, _ = long_one
    next_obs, obs = np.asarray(trajectory.next_obs), np.asarray(trajectory.obs)
    np.testing.assert_array_equal(next_obs[..., 1], np.asarray(trajectory.time) + 1)
    ends = np.asarray(trajectory.ends)[:, :-1]
    np.testing.assert_array_equal(next_obs[:, :-1][~ends], obs[:, 1:][~ends])
    np.testing.assert_array_equal(next_obs[:, :-1][ends][:, 0], obs[:, :-1][ends][:, 0])
    np.testing.assert_array_equal(obs[:, 1:][ends][:, 1:], [[0.0, 1.0]] * ends.sum())


def test_episode_return_is_what_the_running_episode_earned(long_one):
    trajectory, state = long_one
    for row in range(SLOTS):
        since = np.flatnonzero(trajectory.ends[row])[-1] + 1
        expected = np.sum(trajectory.reward[row, since:])
        np.testing.assert_allclose(state.episode_return[row], expected, atol=1e-5)
        assert state.slots.time[row] == STEPS - since


def test_next_obs_can_be_left_out(start):
    assert segment(start, 2, keep_next_obs=False)[0].next_obs is None


def test_an_endless_world_is_truncated_and_never_terminated():
    env = endless_reward(max_steps=3)
    policy = mlp_policy(env.observation_space, env.action_space, hidden=())
    params = quick(policy.init)(KEY, jnp.zeros(1))
    state = start_segments(env, policy, KEY, 2)
    trajectory, state = segment(state, 7, env, policy, params)
    assert not trajectory.terminated.any()
    np.testing.assert_array_equal(trajectory.truncated, [[0, 0, 1, 0, 0, 1, 0]] * 2)
    np.testing.assert_array_equal(trajectory.time, [[0, 1, 2, 0, 1, 2, 0]] * 2)
    np.testing.assert_array_equal(state.episode_return, [1.0, 1.0])


# Memory, and actions that the environment sees differently.


def counting_policy():
    """Remembers how often it acted, and plays that number modulo 2 for certain."""

    def step(params, carry, obs):
        logits = jnp.where(jnp.arange(2) == carry % 2, 0.0, -jnp.inf)
        return Categorical(logits), carry + 1

    return Policy(
        lambda key, obs: {},
        lambda: jnp.zeros((), jnp.int32),
        step,
        lambda params, trajectory: None,
        is_recurrent=True,
    )


def test_memory_begins_anew_with_each_episode():
    env, policy = endless_reward(max_steps=3), counting_policy()
    state = start_segments(env, policy, KEY, 2)
    first, state = segment(state, 4, env, policy, {})
    second, _ = segment(state, 4, env, policy, {})
    np.testing.assert_array_equal(first.action, [[0, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(second.action, [[1, 0, 0, 1]] * 2)
    np.testing.assert_array_equal(first.carry, [0, 0])
    np.testing.assert_array_equal(second.carry, [1, 1])
    whole = quick(
        lambda: rollout_episodes(
            env, policy, {}, KEY, jnp.arange(5, dtype=jnp.int32), num_slots=2
        )
    )()
    each = decisions(whole._replace(carry=None))
    np.testing.assert_array_equal(each.action, each.time % 2)


def test_the_batch_keeps_the_action_that_was_drawn_and_the_world_gets_its_own():
    def reset(key):
        return (), jnp.zeros((1,))

    def step(key, state, action):
        end = jnp.ones((), bool)
        return state, StepOutput(action, action[0], end, ~end)

    box = Box(-2.0, 2.0, (1,))
    env = Environment("Echo", reset, step, box, box, 1)
    head = Head(
        1,
        dict,
        lambda _, mean: TanhGaussian(mean, jnp.zeros_like(mean), -2.0, 2.0),
        box,
    )
    policy = from_apply(lambda key, obs: {}, lambda params, obs: obs, head)
    params = policy.init(KEY, jnp.zeros(1))
    episodes = rollout_episodes(
        env, policy, params, KEY, jnp.arange(6), keep_next_obs=True
    )
    squashed = 2 * np.tanh(episodes.action)
    np.testing.assert_allclose(episodes.next_obs, squashed, rtol=1e-5)
    np.testing.assert_allclose(episodes.reward, squashed[..., 0], rtol=1e-5)
    assert np.abs(episodes.action).max() > 1


# What is refused.


def attempt(env=ENV, num_slots=None, num_episodes=3):
    ids = jnp.arange(num_episodes, dtype=jnp.int32)
    return rollout_episodes(env, POLICY, PARAMS, KEY, ids, num_slots=num_slots)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: attempt(ENV._replace(max_steps=None)),
            "^environment Lengths has no max_steps.*with_time_limit or roll out seg",
        ),
        (lambda: attempt(num_slots=4), "^num_slots is 4, needs at most 3, the number"),
        (lambda: attempt(num_slots=0), "^num_slots is 0, needs a whole number"),
        (lambda: attempt(num_episodes=0), "^number of episode_ids is 0, needs"),
        (
            lambda: start_segments(ENV, POLICY, KEY, 0),
            "^num_slots is 0, needs a whole number",
        ),
        (
            lambda: segment(start_segments(ENV, POLICY, KEY, 1), 0),
            "^num_steps is 0, needs a whole number",
        ),
    ],
)
def test_what_cannot_work_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("num_slots", [4, 2 * FEW])
@pytest.mark.thinned(2)
def test_slots_apart_play_what_they_play_together(num_slots):
    """As on several devices: no episode is played twice, whoever holds its slot."""
    together, _ = segment(start_segments(ENV, POLICY, KEY, num_slots), 12)
    ids = jnp.arange(num_slots, dtype=jnp.int32).reshape(2, -1)
    parts = [
        segment(start_segments(ENV, POLICY, KEY, num_slots, some), 12)[0]
        for some in ids
    ]
    for whole, *apart in zip(*map(jax.tree.leaves, (together, *parts)), strict=True):
        np.testing.assert_allclose(whole, np.concatenate(apart), rtol=1e-5, atol=1e-6)
    assert together.episode_id.max() >= num_slots, "a second episode must have begun"


def keyed(ids):
    return {"key": jax.vmap(jax.random.key)(ids), "x": jnp.stack([ids, -ids], axis=1)}


@pytest.mark.parametrize("ended", [(), (3,), (0, 5, 31), range(4), range(5), range(35)])
@pytest.mark.parametrize("num_slots", [32, 35])
def test_what_has_ended_is_restarted_and_nothing_else(ended, num_slots):
    """32 // FEW = 4 at a time, as often as it takes."""
    slots = keyed(jnp.arange(num_slots))
    ends = jnp.array([slot in ended for slot in range(num_slots)])
    after = quick(lambda *x: restart_ended(keyed, *x))(
        jnp.arange(100, 100 + num_slots), ends, slots
    )
    ids = [100 + i if i in ended else i for i in range(num_slots)]
    np.testing.assert_array_equal(after["x"][:, 0], ids)
    np.testing.assert_array_equal(
        jax.random.key_data(after["key"]),
        jax.random.key_data(keyed(jnp.array(ids))["key"]),
    )


def test_few_are_reset_alone_and_over_members_by_one_decision():
    def of(ends):
        return restart_ended(lambda ids: jnp.sin(ids), jnp.arange(32.0), ends, ids)

    ids = jnp.arange(32.0)
    ends = ids[None] < jnp.array([[2.0], [3.0]])
    both = jax.vmap(of)(ends)
    np.testing.assert_array_equal(both, jnp.where(ends, jnp.sin(ids)[None], ids[None]))
    text = jax.jit(jax.vmap(of)).lower(ends).as_text()
    assert text.count("stablehlo.case") == 1, "the decision is a real branch"
    assert text.count("stablehlo.while") == 1
    (sine,) = [line for line in text.splitlines() if "stablehlo.sine" in line]
    assert "tensor<2x4xf32>" in sine, "a few at a time"


def test_rewards_arrive_at_the_decision_that_earned_them():
    env = delayed_reward()
    policy = mlp_policy(env.observation_space, env.action_space, hidden=())
    params = quick(policy.init)(KEY, jnp.zeros(1))
    episodes = quick(
        lambda: rollout_episodes(env, policy, params, KEY, jnp.arange(3), num_slots=2)
    )()
    np.testing.assert_array_equal(episodes.reward[0], [0, 1, 0, 1])
    np.testing.assert_array_equal(episodes.terminated[0], [0, 1, 0, 1])
    np.testing.assert_array_equal(episodes.mask, [[1, 1, 1, 1], [1, 1, 0, 0]])


# Groups.


def grouped(group_size, num_slots=None):
    ids = jnp.arange(N, dtype=jnp.int32)
    return quick(
        lambda params: rollout_episodes(
            ENV,
            POLICY,
            params,
            KEY,
            ids,
            num_slots=num_slots,
            group_size=group_size,
            keep_next_obs=True,
        )
    )(PARAMS)


def test_a_groups_episodes_begin_alike_and_go_on_by_themselves(one_per_row):
    in_threes = grouped(3)
    starts = np.asarray(in_threes.obs[:, 0]).reshape(3, 3, -1)
    np.testing.assert_array_equal(starts, starts[:, :1] + np.zeros((1, 3, 1)))
    alone = np.asarray(one_per_row.obs[:, 0])
    np.testing.assert_array_equal(starts[:, 0], alone[::3])
    assert len(np.unique(alone[::3, 0])) > 1 and not np.array_equal(alone[1], alone[0])
    each = decisions(in_threes)
    assert len(np.unique(each.reward)) == len(each.reward)


def test_of_a_group_the_first_episode_is_the_one_without_groups(one_per_row):
    first = np.asarray(one_per_row.episode_id) % 3 == 0
    some, same = (
        x._replace(mask=x.mask & first) for x in (grouped(3, None), one_per_row)
    )
    assert_same_decisions(some, same)


def test_groups_are_the_same_in_any_number_of_slots():
    assert_same_decisions(grouped(3, 2), grouped(3))


def test_without_groups_each_episode_draws_its_own_reset(one_per_row):
    jax.tree.map(np.testing.assert_array_equal, grouped(1), one_per_row)
    for i in range(N):
        key_reset = jax.random.split(jax.random.fold_in(KEY, i))[1]
        np.testing.assert_array_equal(one_per_row.obs[i, 0], ENV.reset(key_reset)[1])


def test_a_group_needs_a_size():
    with pytest.raises(ValueError, match=r"^group_size is 0, needs a whole"):
        grouped(0)
