r"""Value functions as baselines: a network that is fitted to the credit.

    V = argmin  sum_{i,t} reach[i, t] * (value[i, t] / reach[i, t] - V(o[i, t]))^2

Off policy this is importance-weighted least squares, on policy an ordinary one. What is
computed is reach * V^2 / 2 - value * V, which has the same minimiser, for the square's
third term does not contain V: nothing is divided by a small reach.

Returns may be in the hundreds. The network sees them standardised by running statistics
that are part of the state, so one learning rate suits all units of reward:

    V(o) = mean + std * network(o)

It is fitted after the weighing and so serves later batches alone.

References: Sutton et al. 2000, "Policy gradient methods for reinforcement learning with
function approximation"; van Hasselt et al. 2016, "Learning values across many orders of
magnitude" (statistics of targets; here V is not kept as it is when they move, for the
fit that follows at once makes up for it).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxpg._checks import check_positive, check_range, check_rank
from jaxpg.baselines import Baseline
from jaxpg.chunks import Chunks, SumOverRows, sum_over_chunks
from jaxpg.credit import Credit, mean_credit
from jaxpg.envs.base import Space
from jaxpg.layers import split_module
from jaxpg.linear_baselines import as_floats, explained_with_offset, squared_errors
from jaxpg.networks import flat_features, mlp
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "TargetStatistics",
    "ValueState",
    "from_value_function",
    "no_statistics",
    "take_in",
    "update_statistics",
    "value_network_baseline",
]

Apply = Callable[[Params, PyTree], Array]
"""`apply(params, obs) -> []`: a network's answer to one observation."""

DECAY = 0.9
"""How much of the targets' statistics a fit keeps: about ten fits are remembered."""


class TargetStatistics(NamedTuple):
    """Running statistics of value / reach, weighted by reach.

    Attributes:
        weight: 0 before the first fit; approaches 1 over the fits.
        mean: in units of the return; 0 before the first fit.
        variance: in their square; 0 before the first fit.
    """

    weight: Float[Array, ""]
    mean: Float[Array, ""]
    variance: Float[Array, ""]


class ValueState(NamedTuple):
    """What a value function has learned.

    Attributes:
        params: the network's parameters.
        opt_state: the Optax optimiser's state.
        targets: statistics of what it was fitted to; before the first fit they are 0,
            and so is V.
    """

    params: Params
    opt_state: PyTree
    targets: TargetStatistics


def value_network_baseline(
    observation_space: Space,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    learning_rate: float = 3e-3,
    num_steps: int = 20,
    chunk_size: int | None = None,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Baseline:
    """V(o) by a multilayer perceptron, fitted with Adam on earlier batches.

    Args:
        observation_space: observations are flattened, numbers one-hot coded.
        hidden: width of each hidden layer.
        activation: a name of `networks.ACTIVATIONS`.
        learning_rate: step size of Adam, for targets of variance 1.
        num_steps: Adam steps per fit, each on the whole batch.
        chunk_size: decisions that a step works on together; sets memory, not the
            result. None takes all at once.
        sum_over_rows: how sums over rows are taken; `jaxpg.train.sharding` has one for
            several devices.

    Returns:
        A baseline whose state is a `ValueState`, as `from_value_function`.

    Raises:
        ValueError: if a number is out of its range, or at `init` for an unknown
            activation.

    Bias: unbiased, for it is fitted on earlier batches. (V is not the baseline of least
        variance, and under partial observability can be worse than none.)

    Reference: Sutton et al. 2000; Greensmith, Bartlett and Baxter 2004.
    """
    check_range("learning_rate", learning_rate, 0.0, open_low=True)
    encode, num_features = flat_features(observation_space)

    init, bind = split_module(
        lambda rngs: mlp(num_features, hidden, 1, rngs=rngs, activation=activation)
    )

    def apply(params: Params, obs: PyTree) -> Array:
        return bind(params)(encode(obs))[0]

    return from_value_function(
        init,
        apply,
        optax.adam(learning_rate),
        num_steps=num_steps,
        chunk_size=chunk_size,
        sum_over_rows=sum_over_rows,
    )


def from_value_function(
    init: Callable[[PRNGKey, PyTree], Params],
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int = 20,
    chunk_size: int | None = None,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Baseline:
    """A fitted baseline from two plain functions of one observation.

    Args:
        init: `init(key, obs) -> params` of the network.
        apply: `apply(params, obs) -> []`, one number for a standardised target.
        optimizer: any Optax transformation.
        num_steps: its steps per fit, each on the whole batch.
        chunk_size: decisions that a step works on together; None takes all at once.
        sum_over_rows: how sums over rows are taken.

    Returns:
        A baseline whose state is a `ValueState`. The info of a fit is the loss at its
        last step (about 0 for the mean alone and -1/2 for no error at all; beyond that
        where the targets stray from their running statistics), and how much of the
        batch's variance V explained before the fit.

    Raises:
        ValueError: if a count is not positive; at `init`, if the network does not give
            one number.

    Bias: unbiased, for it is fitted on earlier batches.

    >>> def init(key, obs): return jnp.zeros(obs.shape)
    >>> baseline = from_value_function(init, jnp.dot, optax.sgd(0.1))
    >>> baseline.init(jax.random.key(0), jnp.ones(2)).params.tolist()
    [0.0, 0.0]
    """
    check_positive("num_steps", num_steps)
    if chunk_size is not None:
        check_positive("chunk_size", chunk_size)
    chunks = Chunks(chunk_size, cut_rows=True)

    def first_state(key: PRNGKey, obs: PyTree) -> ValueState:
        params = init(key, obs)
        output = jax.eval_shape(apply, params, obs)
        check_rank("apply(params, obs)", output, 0, "() = one number; take output[0]")
        return ValueState(params, optimizer.init(params), no_statistics())

    def summarize(params: Params, trajectories: Trajectory, credit: Credit) -> tuple:
        del params, trajectories, credit
        return ()

    def predict(
        params: Params,
        state: ValueState,
        summary: Any,
        rows: Trajectory,
        credit: Credit,
    ) -> Array:
        del params, summary
        level = _values(apply, (state.params, state.targets), rows.obs)
        return level.astype(credit.value.dtype)

    def fit(
        state: ValueState, trajectories: Trajectory, credit: Credit
    ) -> tuple[ValueState, dict[str, Array]]:
        credit = as_floats(credit)

        def total(fn: Callable, shared: PyTree) -> Any:
            rows = trajectories.obs, credit
            fn = functools.partial(fn, apply)
            return sum_over_rows(fn, shared, rows, trajectories.mask, chunks)

        errors = total(_squared_errors_of_rows, (state.params, state.targets))
        targets = update_statistics(state.targets, credit)
        reach = jnp.sum(credit.reach)
        reach = jnp.where(reach > 0.0, reach, 1.0)

        def step(carry: PyTree, _: None) -> tuple[PyTree, Array]:
            params, opt_state = carry
            loss, slope = total(_loss_of_rows, (params, targets, reach))
            return _descend(optimizer, slope, opt_state, params), loss

        carry = state.params, state.opt_state
        carry, losses = jax.lax.scan(step, carry, None, num_steps)
        return ValueState(*carry, targets), {
            "baseline_loss": losses[-1],
            "baseline_explained_variance": explained_with_offset(errors, credit),
        }

    return Baseline(first_state, summarize, predict, fit)


def _outputs(apply: Apply, params: Params, obs: PyTree) -> Array:
    of_row = jax.vmap(apply, (None, 0))
    return jax.vmap(of_row, (None, 0))(params, obs).astype(float)


def _values(apply: Apply, shared: tuple, obs: PyTree) -> Array:
    params, targets = shared
    return targets.mean + jnp.sqrt(targets.variance) * _outputs(apply, params, obs)


def _squared_errors_of_rows(apply: Apply, shared: tuple, rows: tuple) -> Array:
    obs, credit = rows
    return squared_errors(_values(apply, shared, obs), credit)


def _loss_of_rows(apply: Apply, shared: tuple, rows: tuple) -> tuple[Array, Params]:
    """sum(reach * x^2 / 2 - standardised value * x) / reach of the batch; its slope."""
    params, targets, batch_reach = shared
    obs, credit = rows
    varies = targets.variance > 0.0
    std = jnp.sqrt(jnp.where(varies, targets.variance, 1.0))
    value = (credit.value - credit.reach * targets.mean) / std
    value = jnp.where(varies, value, 0.0)

    def loss(params: Params) -> Array:
        x = _outputs(apply, params, obs)
        return jnp.sum(credit.reach * x**2 / 2.0 - value * x) / batch_reach

    return jax.value_and_grad(loss)(params)


def _descend(
    optimizer: optax.GradientTransformation,
    slope: Params,
    opt_state: PyTree,
    params: Params,
) -> tuple[Params, PyTree]:
    # Optax mixes types: strict promotion, where a caller has set it, is not for it.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(slope, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def no_statistics() -> TargetStatistics:
    """Those before the first fit: all 0, and so is V."""
    zero = jnp.zeros((), float)
    return TargetStatistics(zero, zero, zero)


def update_statistics(
    old: TargetStatistics, credit: Credit, kept: float = DECAY
) -> TargetStatistics:
    """An exponential mean over fits: of one batch alone they would shake V.

    The variance is pooled about the means; E[x^2] - E[x]^2 would lose its digits.

    Args:
        old: before the batch.
        credit: of the batch; targets are value / reach, weighed by reach.
        kept: how much of the old ones stays, in [0, 1).

    Returns:
        The statistics with the batch taken in.
    """
    reach = jnp.sum(credit.reach)
    mean = mean_credit(jnp.sum(credit.value), reach)
    variance = mean_credit(squared_errors(mean, credit), reach)
    return take_in(old, mean, variance, kept)


def take_in(
    old: TargetStatistics,
    mean: Float[Array, ""],
    variance: Float[Array, ""],
    kept: float = DECAY,
) -> TargetStatistics:
    """`update_statistics`, for whoever knows a batch by its mean and variance alone.

    Args:
        old: before the batch.
        mean: of the batch's targets.
        variance: about that mean.
        kept: how much of the old ones stays, in [0, 1).

    Returns:
        The statistics with the batch taken in.
    """
    weight = kept * old.weight + (1.0 - kept)
    rate = (1.0 - kept) / weight
    step = mean - old.mean
    moved = old.variance + rate * step**2
    return TargetStatistics(
        weight, old.mean + rate * step, (1.0 - rate) * moved + rate * variance
    )
