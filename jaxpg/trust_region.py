r"""Steps whose length is measured in KL, as Optax transformations with extra arguments.

    natural_gradient    g -> x = (F + damping)^-1 g
    normalize_by_kl     x -> -sqrt(2 max_kl / x^T F x) x         KL is about x^T F x / 2
    trust_region        that step, shrunk until its true KL and its gain are right
    scale_by_kl         u -> scale u, with a scale that follows the measured KL

What comes in is what Optax minimises along, minus the gradient of J, as from
`jaxpg.algos.base.ascend`. The second and third set the length of the step, so they take
the place of `optax.scale_by_learning_rate` and, like it, turn the sign:

    optax.chain(natural_gradient(), trust_region(0.01))          TRPO
    optax.chain(natural_gradient(), normalize_by_kl(0.01))       without the search
    optax.chain(natural_gradient(), optax.scale_by_learning_rate(0.1))

They know neither policies nor batches: `update` is given functions of parameters that
say what F v, the KL and the objective are.

References: Schulman et al. 2015, "Trust region policy optimization"; Duan et al. 2016,
"Benchmarking deep reinforcement learning for continuous control"; Schulman et al. 2017,
"Proximal policy optimization algorithms".
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxpg._checks import check_positive, check_range
from jaxpg.linear_systems import (
    Product,
    add_scaled,
    conjugate_gradient,
    inner_product,
    largest_entry,
)
from jaxpg.types import Params, PyTree

__all__ = [
    "NaturalGradientState",
    "ScaleByKLState",
    "TrustRegionState",
    "natural_gradient",
    "normalize_by_kl",
    "scale_by_kl",
    "trust_region",
]

OfParams = Callable[[Params], Array]
"""One number that depends on the parameters."""


class NaturalGradientState(NamedTuple):
    """What the last solution was like.

    Attributes:
        direction: the solution, where the next one starts; () without warm starts.
        residual: |g - (F + damping) x| / |g|.
        num_iterations: steps of conjugate gradients.
    """

    direction: PyTree
    residual: Float[Array, ""]
    num_iterations: Int[Array, ""]


def natural_gradient(
    *,
    num_iterations: int = 10,
    damping: float = 1e-2,
    tolerance: float = 1e-10,
    warm_start: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Updates g become x = (F + damping)^-1 g, by conjugate gradients.

    `update` needs `fisher_vector_product(vector) -> F vector`, without damping, such as
    `jaxpg.fisher.fisher_vector_product` with everything else filled in.

    Args:
        num_iterations: the most steps; each costs one product.
        damping: what is added to F's diagonal, at least 0, in units of F.
        tolerance: as in `jaxpg.linear_systems.conjugate_gradient`.
        warm_start: whether the search starts from the last update's solution; a further
            product, and a tree like the parameters in the state.

    Returns:
        A transformation that keeps the sign, with a `NaturalGradientState`.

    Raises:
        ValueError: if a number is out of range or, at `update`, the product is missing.

    Bias: of the gradient's own; x is a product of two estimates, and damped.

    Reference: Kakade 2001; Schulman et al. 2015, appendix C.

    >>> method = natural_gradient(damping=0.0)
    >>> gradient = jnp.array([4.0, 8.0])
    >>> state = method.init(gradient)
    >>> def product(vector):
    ...     return 4.0 * vector
    >>> method.update(gradient, state, fisher_vector_product=product)[0].tolist()
    [1.0, 2.0]
    """
    check_positive("num_iterations", num_iterations)
    check_range("damping", damping, 0.0)
    check_range("tolerance", tolerance, 0.0)

    def init(params: Params) -> NaturalGradientState:
        direction = jax.tree.map(jnp.zeros_like, params) if warm_start else ()
        return NaturalGradientState(
            direction, jnp.zeros((), float), jnp.zeros((), jnp.int32)
        )

    def update(
        updates: Params,
        state: NaturalGradientState,
        params: Params | None = None,
        *,
        fisher_vector_product: Product | None = None,
        **extra: Any,
    ) -> tuple[Params, NaturalGradientState]:
        del params, extra
        product = _given("fisher_vector_product", fisher_vector_product)
        found = conjugate_gradient(
            lambda v: add_scaled(product(v), jnp.asarray(damping, float), v),
            updates,
            num_iterations=num_iterations,
            tolerance=tolerance,
            start=state.direction if warm_start else None,
        )
        kept = found.solution if warm_start else ()
        after = NaturalGradientState(kept, found.residual, found.num_iterations)
        return found.solution, after

    return optax.GradientTransformationExtraArgs(init, update)


def normalize_by_kl(max_kl: float) -> optax.GradientTransformationExtraArgs:
    """Updates x become the step -sqrt(2 max_kl / x^T F x) x, whatever their length.

    After `natural_gradient` this is the truncated natural policy gradient: TRPO without
    its line search. The KL is `max_kl` to second order; what it really is, nobody
    checks. Where x^T F x is not positive the step is zero.

    Args:
        max_kl: KL(old || new) of the step, in nats; above 0. If F is a mean over
            decisions, so is the KL.

    Returns:
        A transformation without state, that turns the sign; `update` needs
        `fisher_vector_product(vector) -> F vector`.

    Raises:
        ValueError: if `max_kl` is not above 0 or, at `update`, the product is missing.

    Reference: Duan et al. 2016, section 3 (truncated natural policy gradient); Peters
        and Schaal 2008, "Reinforcement learning of motor skills with policy gradients".

    >>> method = normalize_by_kl(2.0)
    >>> x = jnp.array([3.0, 4.0])
    >>> step, _ = method.update(x, method.init(x), fisher_vector_product=lambda v: v)
    >>> [round(entry, 4) for entry in step.tolist()]  # of length 2
    [-1.2, -1.6]
    """
    _check_max_kl("max_kl", max_kl)

    def update(
        updates: Params,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        fisher_vector_product: Product | None = None,
        **extra: Any,
    ) -> tuple[Params, optax.EmptyState]:
        del params, extra
        product = _given("fisher_vector_product", fisher_vector_product)
        return _full_step(product, updates, max_kl), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


class TrustRegionState(NamedTuple):
    """How the last search went.

    Attributes:
        kl: KL(old || new) of the step that was taken, in nats; 0 without one.
        step_fraction: which multiple of the full step it is; 0 without one.
        improvement: how much the objective rose; 0 without a step.
        num_rejections: steps that were tried in vain.
        found: whether a step was taken.
    """

    kl: Float[Array, ""]
    step_fraction: Float[Array, ""]
    improvement: Float[Array, ""]
    num_rejections: Int[Array, ""]
    found: Bool[Array, ""]


def trust_region(
    max_kl: float, *, max_backtracks: int = 10, shrink: float = 0.5
) -> optax.GradientTransformationExtraArgs:
    """TRPO's step: the longest of some whose KL is within bounds and that climbs.

        step[k] = -shrink^k sqrt(2 max_kl / x^T F x) x,    k = 0 .. max_backtracks

    The first one with kl(params + step) <= max_kl and objective(params + step) >
    objective(params) is taken. If there is none, or if all these are NaN, updates are
    zero and the parameters stay to the bit.

    It must stand LAST in a chain: what comes after it would change a step whose KL and
    gain were checked. The length of what comes before does not matter, only its
    direction.

    Args:
        max_kl: the largest KL(old || new), in nats; above 0.
        max_backtracks: how often a step may be shrunk; 0 tries the full one alone.
        shrink: factor from one step to the next, in (0, 1).

    Returns:
        A transformation with a `TrustRegionState`, that turns the sign. `update` needs
        the parameters, and of the whole batch `fisher_vector_product(vector)`,
        `kl(params)`, the mean KL of the old policy from that one, and
        `objective(params)`, what is to be climbed.

    Raises:
        ValueError: if a number is out of range or, at `update`, a function is missing
            or gives more than one number.

    Reference: Schulman et al. 2015, appendix C.

    >>> method = trust_region(0.5)
    >>> old = jnp.array(0.0)
    >>> def square(params):
    ...     return 0.5 * params**2
    >>> step, state = method.update(
    ...     jnp.array(-3.0), method.init(old), old, kl=square,
    ...     fisher_vector_product=lambda v: v, objective=lambda params: 3.0 * params
    ... )
    >>> step.item(), state.step_fraction.item()
    (1.0, 1.0)
    """
    _check_max_kl("max_kl", max_kl)
    check_range("max_backtracks", max_backtracks, 0)
    check_range("shrink", shrink, 0.0, math.nextafter(1.0, 0.0), open_low=True)

    def init(params: Params) -> TrustRegionState:
        del params
        return _nothing_tried()

    def update(
        updates: Params,
        state: TrustRegionState,
        params: Params | None = None,
        *,
        fisher_vector_product: Product | None = None,
        objective: OfParams | None = None,
        kl: OfParams | None = None,
        **extra: Any,
    ) -> tuple[Params, TrustRegionState]:
        del state, extra
        product = _given("fisher_vector_product", fisher_vector_product)
        trial = _Trial(
            _given("params", params),
            _full_step(product, updates, max_kl),
            _given("objective", objective),
            _given("kl", kl),
        )
        after = _search(trial, max_kl, max_backtracks, shrink)
        return _taken(trial.full_step, after), after

    return optax.GradientTransformationExtraArgs(init, update)


class _Trial(NamedTuple):
    """What a step is judged by."""

    params: Params
    full_step: Params
    objective: OfParams
    kl: OfParams


def _nothing_tried() -> TrustRegionState:
    zero = jnp.zeros((), float)
    return TrustRegionState(
        zero, zero, zero, jnp.zeros((), jnp.int32), jnp.array(False)
    )


def _search(
    trial: _Trial, max_kl: float, max_backtracks: int, shrink: float
) -> TrustRegionState:
    before = _number("objective", trial.objective(trial.params))

    def unfinished(state: TrustRegionState) -> Array:
        return ~state.found & (state.num_rejections <= max_backtracks)

    def try_one(state: TrustRegionState) -> TrustRegionState:
        fraction = jnp.asarray(shrink, float) ** state.num_rejections.astype(float)
        # What `apply_updates` will make of it: not a rounding apart.
        there = optax.apply_updates(trial.params, _scaled(fraction, trial.full_step))
        kl = _number("kl", trial.kl(there))
        improvement = _number("objective", trial.objective(there)) - before
        found = (kl <= max_kl) & (improvement > 0.0)  # false for NaN
        return TrustRegionState(
            kl=jnp.where(found, kl, 0.0),
            step_fraction=jnp.where(found, fraction, 0.0),
            improvement=jnp.where(found, improvement, 0.0),
            num_rejections=state.num_rejections + (~found).astype(jnp.int32),
            found=found,
        )

    return jax.lax.while_loop(unfinished, try_one, _nothing_tried())


def _taken(full_step: Params, state: TrustRegionState) -> Params:
    # Minus zero, for adding zero would turn the bits of a parameter that is minus zero.
    step = _scaled(state.step_fraction, full_step)
    return jax.tree.map(lambda x: jnp.where(state.found, x, -0.0), step)


class ScaleByKLState(NamedTuple):
    """The factor on the updates.

    Attributes:
        scale: 1 at first.
    """

    scale: Float[Array, ""]


def scale_by_kl(
    target_kl: float, *, factor: float = 1.5, low: float = 0.1, high: float = 10.0
) -> optax.GradientTransformationExtraArgs:
    """Updates times a scale that is adapted to the KL: an adaptive learning rate.

        scale / factor    where kl > 2 target_kl, or kl is NaN
        scale * factor    where 0 < kl < target_kl / 2
        scale             else, held in [low, high]

    `update` needs `kl`, a number: KL(old || new) in nats as last measured, or 0 where
    nothing was measured yet. A mean over noisy actions may be negative, and says no
    more than 0 does.

    Args:
        target_kl: the KL that a policy should move by, in nats; above 0.
        factor: what the scale is changed by at once, above 1.
        low: the least scale, in (0, 1].
        high: the largest scale, at least 1.

    Returns:
        A transformation with a `ScaleByKLState`, that keeps the sign; it stands where
        nothing after it undoes a factor, so not before `scale_by_adam`.

    Raises:
        ValueError: if a number is out of range or, at `update`, `kl` is missing or no
            number.

    Reference: Schulman et al. 2017, section 4, which adapts a penalty's coefficient in
        this manner, against 1.5 times and 1 / 1.5 of the target; here the step itself.

    >>> method = scale_by_kl(0.01)
    >>> state = method.init(jnp.array(0.0))
    >>> update, state = method.update(jnp.array(3.0), state, kl=jnp.array(0.05))
    >>> update.item(), round(state.scale.item(), 4)
    (2.0, 0.6667)
    """
    _check_max_kl("target_kl", target_kl)
    check_range("factor", factor, 1.0, open_low=True)
    check_range("low", low, 0.0, 1.0, open_low=True)
    check_range("high", high, 1.0)

    def init(params: Params) -> ScaleByKLState:
        del params
        return ScaleByKLState(jnp.ones((), float))

    def update(
        updates: Params,
        state: ScaleByKLState,
        params: Params | None = None,
        *,
        kl: ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[Params, ScaleByKLState]:
        del params, extra
        measured = _number("kl", _given("kl", kl))
        near = measured <= 2.0 * target_kl  # false for NaN
        timid = (measured > 0.0) & (measured < 0.5 * target_kl)
        change = jnp.where(near, jnp.where(timid, factor, 1.0), 1.0 / factor)
        scale = jnp.clip(state.scale * change, low, high)
        return _scaled(scale, updates), ScaleByKLState(scale)

    return optax.GradientTransformationExtraArgs(init, update)


def _full_step(product: Product, updates: Params, max_kl: float) -> Params:
    """-sqrt(2 max_kl / x^T F x) x; zero where that is no positive number."""
    # The largest entry becomes 1, so that no square overflows or vanishes.
    size = largest_entry(updates)
    unit = _scaled(1.0 / jnp.where(size > 0.0, size, 1.0), updates)
    curvature = inner_product(unit, product(unit))
    usable = curvature > 0.0
    length = jnp.sqrt(2.0 * max_kl / jnp.where(usable, curvature, 1.0))
    return _scaled(jnp.where(usable, -length, 0.0), unit)


def _scaled(factor: Array, tree: Params) -> Params:
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)


def _given(name: str, value: Any) -> Any:
    if value is None:
        call = "params, ..." if name == "params" else f"params, {name}=..."
        raise ValueError(
            f"{name} is missing, needs to be given at every update; "
            f"call update(updates, state, {call})"
        )
    return value


def _number(name: str, value: Any) -> Array:
    if callable(value):
        raise ValueError(f"{name} is a function, needs a number; call it first")
    number = jnp.asarray(value)
    if number.shape != ():
        raise ValueError(
            f"{name} has shape {number.shape}, needs () = one number for the batch; "
            "take its mean over the real decisions"
        )
    return number.astype(float)


def _check_max_kl(name: str, value: float) -> None:
    cure = "0.01 is usual"
    check_range(name, value, 0.0, open_low=True, cure=cure)
