"""Natural and trust-region steps on the oracle, where gradient, F and KL are exact."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxpg import exact, trust_region
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import canonical_mdp, canonical_pomdp, random_mdp
from jaxpg.exact.dynamic import emission_matrix, log_probs_per_obs
from jaxpg.policies import tabular_policy
from jaxpg.trust_region import natural_gradient, normalize_by_kl, scale_by_kl

close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
search_region = trust_region.trust_region

WORLDS = {
    "mine": canonical_mdp,
    "mine in the dark": canonical_pomdp,
    "random": lambda: random_mdp(3, horizon=3),
}
worlds = pytest.mark.parametrize("make_mdp", WORLDS.values(), ids=WORLDS)
EXACTLY = {"num_iterations": 50, "damping": 0.0, "tolerance": 1e-26}


class Oracle:
    """A tabular policy, with all that its next step depends on."""

    def __init__(self, make_mdp=canonical_mdp, seed=1, params=None):
        self.mdp = make_mdp()
        seen = self.mdp.reward if self.mdp.emission is None else self.mdp.emission.T
        spaces = Discrete(len(seen)), Discrete(self.mdp.reward.shape[1])
        self.policy = tabular_policy(*spaces)
        drawn = self.policy.init(jax.random.key(seed), jnp.int32(0))
        self.params = drawn if params is None else params
        self.fisher = exact.fisher_matrix(self.mdp, self.policy, self.params)
        gradient = exact.policy_gradient(self.mdp, self.policy, self.params)
        self.descent = jax.tree.map(jnp.negative, gradient)
        # The oracle's F is a sum over decisions: so must the KL be.
        visits = exact.occupancies(self.mdp, self.policy, self.params)
        self.visits = visits.sum(0) @ emission_matrix(self.mdp)
        self.log_probs = log_probs_per_obs(self.mdp, self.policy, self.params)

    @property
    def ascent(self):
        return -flat(self.descent)

    def product(self, vector):
        values, unravel = ravel_pytree(vector)
        return unravel(self.fisher @ values)

    def kl(self, params):
        new = log_probs_per_obs(self.mdp, self.policy, params)
        gap = jnp.exp(self.log_probs) * (self.log_probs - new)
        return jnp.dot(self.visits, gap.sum(1))

    def objective(self, params):
        return exact.expected_return(self.mdp, self.policy, params)

    def extra(self, **changes):
        functions = {
            "fisher_vector_product": self.product,
            "kl": self.kl,
            "objective": self.objective,
        }
        return functions | changes

    def step(self, *parts, **changes):
        """The update and the last state of a chain, from the exact gradient."""
        chain = optax.chain(*parts)

        def update(descent, params):
            state = chain.init(params)
            return chain.update(descent, state, params, **self.extra(**changes))

        update, state = jax.jit(update)(self.descent, self.params)
        return update, state[-1]

    def natural(self):
        return np.linalg.pinv(np.asarray(self.fisher), hermitian=True) @ self.ascent


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# The natural gradient.


@worlds
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.thinned(2)
def test_natural_gradient_is_the_oracles(make_mdp, damping, float64):
    oracle = Oracle(make_mdp)
    update, state = oracle.step(natural_gradient(**EXACTLY | {"damping": damping}))
    expected = exact.natural_gradient(
        oracle.mdp, oracle.policy, oracle.params, damping=damping
    )
    assert np.linalg.norm(flat(expected)) > 0.1
    close(flat(update), -flat(expected), rtol=1e-8)
    assert state.residual < 1e-12 and state.num_iterations > 1
    assert state.direction == ()


def test_what_was_not_solved_is_told(float64):
    oracle = Oracle(lambda: random_mdp(3, num_states=5, horizon=3))
    update, state = oracle.step(natural_gradient(num_iterations=2, damping=0.5))
    damped = np.asarray(oracle.fisher) + 0.5 * np.eye(len(oracle.fisher))
    left = np.linalg.norm(oracle.ascent + damped @ flat(update))
    close(state.residual, left / np.linalg.norm(oracle.ascent))
    assert state.num_iterations == 2 and state.residual > 1e-4


def test_a_warm_start_begins_at_the_last_solution(float64):
    oracle = Oracle(lambda: random_mdp(3, num_states=5, horizon=3))

    def run(warm_start):
        method = natural_gradient(num_iterations=2, damping=0.1, warm_start=warm_start)
        state = method.init(oracle.params)
        residuals = []
        for _ in range(4):
            update, state = method.update(
                oracle.descent, state, fisher_vector_product=oracle.product
            )
            residuals.append(float(state.residual))
        return update, state, residuals

    update, state, warm = run(True)
    close(flat(update), flat(state.direction))
    _, _, cold = run(False)
    assert cold == [warm[0]] * 4
    assert warm[-1] < 0.05 * warm[0]


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.thinned(2)
def test_states_keep_their_types(warm_start):
    """So that they can be carried through `scan`."""
    oracle = Oracle()
    methods = [
        natural_gradient(warm_start=warm_start),
        normalize_by_kl(0.01),
        search_region(0.01),
    ]
    chain = optax.chain(*methods, scale_by_kl(0.01))
    before = chain.init(oracle.params)
    parts = [*before]
    for i, method in enumerate(methods):
        _, parts[i] = method.update(
            oracle.descent, before[i], oracle.params, **oracle.extra()
        )
    _, parts[-1] = scale_by_kl(0.01).update(oracle.descent, before[-1], kl=0.5)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert kinds(tuple(parts)) == kinds(before)
    assert jax.tree.structure(tuple(parts)) == jax.tree.structure(before)


# The length of the step.


@worlds
@pytest.mark.parametrize("max_kl", [1e-2, 1e-6])
def test_the_normalized_step_is_the_textbooks(make_mdp, max_kl, float64):
    oracle = Oracle(make_mdp)
    update, _ = oracle.step(natural_gradient(**EXACTLY), normalize_by_kl(max_kl))
    natural = oracle.natural()
    length = np.sqrt(2.0 * max_kl / (oracle.ascent @ natural))
    close(flat(update), length * natural, rtol=1e-8)
    # The KL is max_kl to second order: what is missing is of the third.
    there = optax.apply_updates(oracle.params, update)
    assert abs(oracle.kl(there) / max_kl - 1.0) < 5.0 * length


def test_any_direction_and_any_length_of_it(float64):
    oracle = Oracle()
    for size in (1e-9, 1.0, 1e9):
        update, _ = oracle.step(optax.scale(size), normalize_by_kl(0.02))
        step = flat(update)
        close(0.5 * step @ np.asarray(oracle.fisher) @ step, 0.02)
        close(
            step / np.linalg.norm(step), oracle.ascent / np.linalg.norm(oracle.ascent)
        )


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(size):
    method, x = normalize_by_kl(2.0), size * jnp.array([3.0, 4.0])
    step, _ = method.update(x, method.init(x), fisher_vector_product=lambda v: v)
    np.testing.assert_allclose(step, [-1.2, -1.6], rtol=1e-6)


@pytest.mark.parametrize(
    ("product", "x"),
    [
        (lambda v: 0.0 * v, [1.0, 2.0]),
        (lambda v: -v, [1.0, 2.0]),
        (lambda v: jnp.nan * v, [1.0, 2.0]),
        (lambda v: v, [0.0, 0.0]),
    ],
    ids=["flat", "negative", "nan", "no direction"],
)
def test_there_is_no_step_where_the_kl_says_nothing(product, x):
    method, x = normalize_by_kl(2.0), jnp.array(x)
    step, _ = method.update(x, method.init(x), fisher_vector_product=product)
    assert not step.any()


# The trust region.


@worlds
@pytest.mark.parametrize("max_kl", [1e-1, 1e-3, 1e-6])
@pytest.mark.thinned(4)
def test_the_step_is_within_the_region_and_climbs(make_mdp, max_kl, float64):
    oracle = Oracle(make_mdp)
    update, state = oracle.step(
        natural_gradient(**EXACTLY), search_region(max_kl, shrink=0.8)
    )
    natural = oracle.natural()
    full = np.sqrt(2.0 * max_kl / (oracle.ascent @ natural)) * natural
    close(flat(update), float(state.step_fraction) * full, rtol=1e-8)
    there = optax.apply_updates(oracle.params, update)
    rise = oracle.objective(there) - oracle.objective(oracle.params)
    assert state.found and oracle.kl(there) <= max_kl and rise > 0.0
    close(state.kl, oracle.kl(there))
    close(state.improvement, rise)
    close(state.step_fraction, 0.8 ** float(state.num_rejections))


@pytest.mark.parametrize(("seed", "some_are_too_long"), [(1, True), (2, False)])
def test_it_takes_the_longest_step_that_will_do(seed, some_are_too_long, float64):
    """One after the other from the full one down, by a plain loop."""
    oracle, max_kl = Oracle(seed=seed), 0.5
    direction = natural_gradient(**EXACTLY)
    _, state = oracle.step(direction, search_region(max_kl, shrink=0.98))
    full, _ = oracle.step(direction, normalize_by_kl(max_kl))

    @jax.jit
    def will_do(fraction):
        some = jax.tree.map(lambda x: fraction * x, full)
        there = optax.apply_updates(oracle.params, some)
        climbs = oracle.objective(there) > oracle.objective(oracle.params)
        return (oracle.kl(there) <= max_kl) & climbs

    rejections = next(k for k in range(11) if will_do(0.98**k))
    assert state.num_rejections == rejections
    assert (rejections > 1) == some_are_too_long


def test_a_step_may_be_too_long_or_not_good_enough():
    """With F = 1 and max_kl = 1/2 the full step is 1."""

    def run(kl, objective):
        method, old = search_region(0.5), jnp.array(0.0)
        step, state = method.update(
            jnp.array(-3.0),
            method.init(old),
            old,
            fisher_vector_product=lambda v: v,
            kl=kl,
            objective=objective,
        )
        return step.item(), state

    step, state = run(lambda x: 2.0 * x**2, lambda x: x)  # 2 x^2 <= 1/2 from 1/2 on
    assert (step, state.num_rejections, state.kl) == (0.5, 1, 0.5)
    step, state = run(lambda x: 0.0 * x, lambda x: x - 3.0 * x**2)  # up to x < 1/3
    assert (step, state.num_rejections, state.improvement) == (0.25, 2, 0.0625)
    step, state = run(lambda x: 0.0 * x, lambda x: jnp.where(x > 0.9, jnp.nan, x))
    assert (step, state.num_rejections) == (0.5, 1)
    step, state = run(lambda x: jnp.where(x > 0.9, jnp.nan, 0.0), lambda x: x)
    assert (step, state.num_rejections) == (0.5, 1)


NO_STEP = {
    "the KL is above": {"kl": lambda params: 1.0 + 0.0 * params["b"]},
    "the KL is NaN": {"kl": lambda params: jnp.nan * params["b"]},
    "nothing climbs": {"objective": lambda params: 5.0 + 0.0 * params["b"]},
    "it goes down": {"objective": lambda params: -params["a"].sum()},
    "the objective is NaN": {"objective": lambda params: jnp.nan * params["b"]},
    "no curvature": {
        "fisher_vector_product": lambda v: jax.tree.map(lambda x: 0 * x, v)
    },
    "F is NaN": {
        "fisher_vector_product": lambda v: jax.tree.map(lambda x: jnp.nan * x, v)
    },
}


@pytest.mark.parametrize("changes", NO_STEP.values(), ids=NO_STEP)
@pytest.mark.parametrize("gradient", [1.0, jnp.nan])
@pytest.mark.thinned(3)
def test_without_a_step_the_parameters_stay_to_the_bit(changes, gradient):
    params = {"a": jnp.array([0.1, -0.0, 0.0, -3e-38]), "b": jnp.array(1e30)}
    functions = {
        "fisher_vector_product": lambda v: v,
        "kl": lambda params: 0.0 * params["b"],
        "objective": lambda params: params["a"].sum(),
    }
    method = search_region(0.01, max_backtracks=4)
    descent = jax.tree.map(lambda x: jnp.full_like(x, -gradient), params)

    @functools.partial(jax.jit, static_argnums=0)
    def step(changed):
        extra = functions | (changes if changed else {})
        updates, state = method.update(descent, method.init(params), params, **extra)
        return optax.apply_updates(params, updates), state

    if gradient == 1.0:
        assert step(False)[1].found, "without the change a step is taken"
    after, state = step(True)
    assert bits(after) == bits(params)
    assert not state.found and state.num_rejections == 5
    assert (state.kl, state.step_fraction, state.improvement) == (0.0, 0.0, 0.0)


def test_no_backtracks_try_the_full_step_alone():
    oracle = Oracle()
    method = search_region(0.01, max_backtracks=0)
    _, state = oracle.step(method, kl=lambda params: jnp.array(1.0))
    assert not state.found and state.num_rejections == 1


def test_what_comes_before_only_turns_it(float64):
    oracle = Oracle()
    region = search_region(0.01)
    plain, _ = oracle.step(natural_gradient(**EXACTLY), region)
    clipped, state = oracle.step(
        optax.clip_by_global_norm(1e-3), natural_gradient(**EXACTLY), region
    )
    assert state.found
    close(flat(clipped), flat(plain), rtol=1e-8)
    with jax.numpy_dtype_promotion("standard"):  # for Optax's own part
        adam, state = oracle.step(optax.scale_by_adam(), region)
    assert state.found and not np.allclose(flat(adam), flat(plain), rtol=0.1)


def test_what_is_checked_is_what_is_taken():
    """The parameters that the functions saw are those that come out, to the bit."""
    oracle, seen = Oracle(), []

    def kl(params):
        jax.debug.callback(
            lambda table: seen.append(np.array(table)), params["network"]
        )
        return oracle.kl(params)

    update, state = oracle.step(
        natural_gradient(), search_region(0.5, shrink=0.7), kl=kl
    )
    jax.effects_barrier()
    after = jax.jit(optax.apply_updates)(oracle.params, update)
    assert state.found
    assert any((table == np.asarray(after["network"])).all() for table in seen)


def test_many_steps_reach_the_top(float64):
    """One plan for all times is worth at most 3 in the mine: see test_exact."""
    chain = optax.chain(natural_gradient(damping=1e-3), search_region(0.5, shrink=0.7))

    @jax.jit
    def climb(params):
        oracle, state = Oracle(params=params), chain.init(params)
        update, _ = chain.update(oracle.descent, state, params, **oracle.extra())
        params = optax.apply_updates(params, update)
        return params, oracle.objective(params)

    params, returns = Oracle().params, []
    for _ in range(12):
        params, reached = climb(params)
        returns.append(float(reached))
    assert (np.diff(returns) >= 0.0).all()
    assert 2.9 < returns[-1] <= 3.0


# The scale that follows the KL.


@pytest.mark.parametrize(
    ("kl", "scale"),
    [
        (0.021, 1 / 1.5),
        (0.02, 1.0),  # the bounds themselves leave it
        (0.005, 1.0),
        (0.0049, 1.5),
        (0.0, 1.0),  # nothing was measured yet
        (-0.001, 1.0),  # an estimate may be negative
        (np.nan, 1 / 1.5),
        (np.inf, 1 / 1.5),
    ],
)
def test_the_scale_follows_the_kl(kl, scale):
    method, update = scale_by_kl(0.01), {"a": jnp.array([3.0, -6.0])}
    scaled, state = method.update(update, method.init(update), kl=jnp.array(kl))
    np.testing.assert_allclose(state.scale, scale, rtol=1e-6)
    np.testing.assert_allclose(scaled["a"], scale * update["a"], rtol=1e-6)


def test_the_scale_stays_within_its_bounds():
    method, update = scale_by_kl(0.01, factor=2.0, low=0.3, high=5.0), jnp.array(1.0)

    def run(kl):
        state = method.init(update)
        scales = []
        for _ in range(4):
            scaled, state = method.update(update, state, kl=kl)
            scales.append(scaled.item())
        return scales

    np.testing.assert_allclose(run(1.0), [0.5, 0.3, 0.3, 0.3], rtol=1e-6)
    np.testing.assert_allclose(run(1e-4), [2.0, 4.0, 5.0, 5.0], rtol=1e-6)


def test_it_goes_with_adam_and_a_learning_rate():
    chain = optax.chain(
        optax.scale_by_adam(), scale_by_kl(0.01), optax.scale_by_learning_rate(0.1)
    )
    params = jnp.array([1.0, -1.0])
    with jax.numpy_dtype_promotion("standard"):  # for Optax's own part
        update, _ = chain.update(params, chain.init(params), params, kl=1.0)
    np.testing.assert_allclose(update, [-0.1 / 1.5, 0.1 / 1.5], rtol=1e-5)


# Refusals.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda f: f.trust_region(0.0),
            r"max_kl is 0\.0, needs a number in \(0, inf\]",
        ),
        (lambda f: f.trust_region(-0.1), r"max_kl is -0\.1, needs"),
        (lambda f: f.normalize_by_kl(0), r"max_kl is 0, needs .*; 0\.01 is usual"),
        (lambda f: f.trust_region(1.0, max_backtracks=-1), "max_backtracks is -1"),
        (lambda f: f.trust_region(1.0, shrink=1.0), r"shrink is 1\.0, needs"),
        (lambda f: f.trust_region(1.0, shrink=0.0), r"shrink is 0\.0, needs"),
        (lambda f: f.natural_gradient(damping=-1.0), r"damping is -1\.0, needs"),
        (lambda f: f.natural_gradient(num_iterations=0), "num_iterations is 0"),
        (lambda f: f.natural_gradient(tolerance=-1.0), r"tolerance is -1\.0"),
        (lambda f: f.scale_by_kl(0.0), r"target_kl is 0\.0, needs"),
        (lambda f: f.scale_by_kl(0.1, factor=1.0), r"factor is 1\.0, needs"),
        (lambda f: f.scale_by_kl(0.1, low=2.0), r"low is 2\.0, needs"),
        (lambda f: f.scale_by_kl(0.1, low=0.0), r"low is 0\.0, needs"),
        (lambda f: f.scale_by_kl(0.1, high=0.5), r"high is 0\.5, needs"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    class WithoutShapeChecker:
        def __getattr__(self, name):
            return inspect.unwrap(getattr(trust_region, name))

    with pytest.raises(ValueError, match=message):
        make(WithoutShapeChecker())


def test_what_is_missing_at_update_is_named():
    x = jnp.ones(2)
    functions = {
        "fisher_vector_product": lambda v: v,
        "objective": lambda params: params.sum(),
        "kl": lambda params: params.sum(),
    }
    for make in (natural_gradient, lambda: normalize_by_kl(1.0)):
        method = make()
        with pytest.raises(
            ValueError, match=r"fisher_vector_product is missing, needs"
        ):
            method.update(x, method.init(x), x)
    method = search_region(1.0)
    for name in functions:
        some = {key: value for key, value in functions.items() if key != name}
        with pytest.raises(
            ValueError, match=rf"{name} is missing.*params, {name}=\.\.\."
        ):
            method.update(x, method.init(x), x, **some)
    with pytest.raises(ValueError, match=r"params is missing.*state, params, \.\.\."):
        method.update(x, method.init(x), **functions)
    with pytest.raises(ValueError, match=r"kl has shape \(2,\), needs \(\) = one"):
        method.update(x, method.init(x), x, **functions | {"kl": lambda params: params})
    method = scale_by_kl(0.01)
    with pytest.raises(ValueError, match="kl is missing"):
        method.update(x, method.init(x), x)
    with pytest.raises(ValueError, match=r"kl is a function, needs a number"):
        update = inspect.unwrap(method.update)  # without the shape checker
        update(x, method.init(x), x, kl=lambda params: 0.1)
