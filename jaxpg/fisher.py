r"""The Fisher information of a policy: its product with a vector, and its inverse's.

    F = mean of grad log pi grad log pi^T = Hessian of the mean KL(pi || pi_params)

    F v                    without F: derivatives along v, and back
    F x = g                needs nothing but such products (`jaxpg.linear_systems`)
    returns = phi w + b    the same x by regression: the episodic natural actor-critic

The mean is over decisions for a trust region, whose KL is one per decision. Over
trajectories, of the sum over time, it goes with a gradient that is such a mean too:
then F^-1 g is the natural gradient. The two differ by the mean number of decisions.

All sums over rows are taken by a `SumOverRows`: in chunks that fit the cache, and on
many devices with one all-reduce for each product.

References: Kakade 2001, "A natural policy gradient"; Schraudolph 2002, "Fast curvature
matrix-vector products for second-order gradient descent"; Schulman et al. 2015, "Trust
region policy optimization", appendix C.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpg._batching import over_rows
from jaxpg._checks import check_choice, check_range, check_rank
from jaxpg.chunks import (
    ALL_AT_ONCE,
    Chunks,
    SumOverRows,
    map_over_chunks,
    sum_over_chunks,
)
from jaxpg.gradients import LogProbFn, score_gradient, score_gradients
from jaxpg.linear_systems import (
    ConjugateGradientResult,
    add_scaled,
    check_like,
    conjugate_gradient,
    inner_product,
)
from jaxpg.returns import episode_returns, step_discounts
from jaxpg.types import Params, Trajectory

__all__ = ["Unroll", "episodic_natural_gradient", "fisher_vector_product"]

Unroll = Callable[[Params, Trajectory], Any]
"""`policy.unroll`: the action distributions of one row, [T]."""

COUNTED: dict[str, Callable[[Trajectory], Bool[Array, "B T"]]] = {
    "decision": lambda rows: rows.mask,
    "trajectory": lambda rows: rows.starts,
}
"""What F is a mean over, and where it is counted."""


def fisher_vector_product(
    policy_unroll: Unroll,
    params: Params,
    rows: Trajectory,
    vector: Params,
    *,
    form: str = "gauss-newton",
    per: str = "decision",
    num: int | Array | None = None,
    damping: float | Array = 0.0,
    chunks: Chunks = ALL_AT_ONCE,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> Params:
    """F v + damping v, with F = 1/num sum_i sum_t E_pi[grad log pi grad log pi^T].

    The mean over actions is exact, the one over histories is that of the rows. Both
    forms are the same matrix. "gauss-newton" takes the derivative of the distribution's
    parameters along v, multiplies it by the KL's Hessian in those, and pulls it back;
    it never differentiates the network twice, and F stays positive after rounding.
    "kl-hessian" takes the derivative along v of the gradient of the KL.

    Args:
        policy_unroll: the action distributions of one row; they need floating-point
            parameters and `kl`.
        params: where F is taken.
        rows: a batch whose histories the policy meets; actions are not looked at.
        vector: v, a tree like `params`.
        form: "gauss-newton" or "kl-hessian".
        per: "decision" or "trajectory": what F is a mean over.
        num: how many of them there are; where it is not given, the real decisions or
            the episode starts in the rows are counted, along with the sum.
        damping: what is added to F's diagonal, at least 0.
        chunks: how many decisions are worked on together.
        sum_over_rows: how sums over rows are taken.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: if a name is unknown, `damping` is negative, rows are no batch, or
            `vector` is no tree like `params`.

    Bias: unbiased for rows of the policy's own and a `num` that does not depend on
        them; where lengths vary and decisions are counted, a ratio of means.

    Reference: Schraudolph 2002, section 3; Schulman et al. 2015, appendix C.1.

    >>> from jaxpg.distributions import DiagonalGaussian
    >>> def unroll(mean, row):
    ...     return DiagonalGaussian(mean * row.obs, jnp.zeros_like(row.obs))
    >>> slots = {name: jnp.zeros((1, 2)) for name in Trajectory._fields}
    >>> rows = Trajectory(**slots)._replace(mask=jnp.ones((1, 2), bool))
    >>> rows = rows._replace(obs=jnp.array([[[1.0], [3.0]]]))
    >>> one = jnp.array(1.0)
    >>> fisher_vector_product(unroll, one, rows, one).item()  # (1 + 9) / 2
    5.0
    """
    check_choice("form", form, FORMS)
    check_choice("per", per, COUNTED)
    check_range("damping", damping, 0.0)
    check_rank("rows.mask", rows.mask, 2, "(B, T); for one row use x[None]")
    check_like("vector", vector, params)

    def of_chunk(shared: tuple[Params, Params], rows: Trajectory) -> Any:
        product = FORMS[form](policy_unroll, *shared, rows)
        count = jnp.sum(COUNTED[per](rows)) if num is None else jnp.array(0)
        # Of the product's own type, so that devices add it in the same message.
        return product, count.astype(jax.tree.leaves(product)[0].dtype)

    total, count = sum_over_rows(of_chunk, (params, vector), rows, rows.mask, chunks)
    number = jnp.maximum(count, 1.0) if num is None else num

    def finish(x: Array, v: Array) -> Array:
        return x / jnp.asarray(number, x.dtype) + jnp.asarray(damping, v.dtype) * v

    return jax.tree.map(finish, total, vector)


def _gauss_newton(
    unroll: Unroll, params: Params, vector: Params, rows: Trajectory
) -> Params:
    """sum of J^T H J v: J of the distribution's parameters, H of the KL in those."""
    now = _unroll_all(unroll, params, rows)

    def outputs(params: Params) -> list[Array]:
        return _floating(_unroll_all(unroll, params, rows))

    def divergence(floating: list[Array]) -> Array:
        return jnp.sum(_kl(now, _with_floating(now, floating), rows.mask))

    found, push = jax.linearize(outputs, params)
    moved = push(vector)
    _, curved = jax.jvp(jax.grad(divergence), (found,), (moved,))
    # Here nothing is differentiated any more, so `where` hides even a NaN.
    curved = [_where_real(rows.mask, x) for x in curved]
    (product,) = jax.linear_transpose(push, params)(curved)
    return product


def _kl_hessian(
    unroll: Unroll, params: Params, vector: Params, rows: Trajectory
) -> Params:
    """The derivative along v of the gradient of sum KL(now || params)."""
    now = _unroll_all(unroll, params, rows)

    def divergence(params: Params) -> Array:
        return jnp.sum(_kl(now, _unroll_all(unroll, params, rows), rows.mask))

    return jax.jvp(jax.grad(divergence), (params,), (vector,))[1]


FORMS: dict[str, Callable[[Unroll, Params, Params, Trajectory], Params]] = {
    "gauss-newton": _gauss_newton,
    "kl-hessian": _kl_hessian,
}
"""Two ways to the same product, summed over a chunk's real decisions."""


def _unroll_all(unroll: Unroll, params: Params, rows: Trajectory) -> Any:
    return over_rows(unroll, params, rows)


def _kl(now: Any, then: Any, mask: Array) -> Array:
    """KL(now || then) of each decision, 0 in empty slots."""
    kl = jax.vmap(lambda p, q: p.kl(q))(now, then)
    if kl.shape != mask.shape:
        raise ValueError(
            f"policy_unroll gives distributions whose kl has shape {kl.shape[1:]}, "
            f"needs {mask.shape[1:]} = one per decision of the row"
        )
    return jnp.where(mask, kl, 0.0)


def _is_floating(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _floating(distribution: Any) -> list[Array]:
    """The leaves that can be differentiated."""
    return [x for x in jax.tree.leaves(distribution) if _is_floating(x)]


def _with_floating(distribution: Any, floating: list[Array]) -> Any:
    """The distribution, with these for its differentiable leaves."""
    given = iter(floating)
    return jax.tree.map(lambda x: next(given) if _is_floating(x) else x, distribution)


def _where_real(mask: Array, leaf: Array) -> Array:
    if leaf.shape[:2] != mask.shape:
        return leaf  # one for a whole row, such as a bound, of which no KL depends
    return jnp.where(mask.reshape(mask.shape + (1,) * (leaf.ndim - 2)), leaf, 0.0)


def episodic_natural_gradient(
    log_prob_fn: LogProbFn,
    params: Params,
    rows: Trajectory,
    returns: Float[Array, " B"] | Float[Array, "B T"],
    *,
    damping: float | Array = 0.0,
    num_iterations: int = 10,
    tolerance: float = 1e-10,
    decision_weights: Float[Array, "B T"] | None = None,
    chances: Float[Array, " B"] | Float[Array, "B T"] | None = None,
    chunks: Chunks = ALL_AT_ONCE,
    sum_over_rows: SumOverRows = sum_over_chunks,
) -> ConjugateGradientResult:
    """The slope w of the regression return[i] = phi[i] w + b: a natural gradient.

        phi[i] = sum_t decision_weight[i, t] grad log pi[i, t]
        (Cov(phi) + damping) w = Cov(phi, returns)

    Scores have mean zero and those of different decisions are not correlated, so with
    weights of 1 the covariances become F, a mean over trajectories, and grad J. The
    offset b is the baseline. phi is never stored.

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats.
        params: where the policy stands.
        rows: whole episodes of the policy's own, one per row or packed.
        returns: of each row's one episode, discounted already; for packed rows of the
            episode that each decision belongs to, [B, T].
        damping: what is added to the diagonal of Cov(phi), at least 0; above 0 unless
            there are many more episodes than parameters.
        num_iterations: the most steps of conjugate gradients.
        tolerance: as in `conjugate_gradient`.
        decision_weights: discount^t for Peters and Schaal's compatible features of a
            discounted problem; 1 unless given.
        chances: how much each episode counts, at least 0 and in any unit, where the
            returns stand; all the same unless given.
        chunks: how many decisions are worked on together.
        sum_over_rows: how sums over rows are taken.

    Returns:
        w, a tree like `params`, and how well the equation is solved.

    Raises:
        ValueError: if shapes do not fit, or a number is out of range.

    Bias: consistent for the natural gradient; biased O(1/B) in small batches, where
        noise stands in both covariances, and by `damping`.

    Reference: Peters and Schaal 2008, "Natural actor-critic", section 3.3 and table 2
        (episodic natural actor-critic with a constant baseline).

    >>> log_prob_fn = lambda mean, row: -0.5 * (row.obs - mean) ** 2
    >>> slots = {name: jnp.array([[-1.0], [1.0]]) for name in Trajectory._fields}
    >>> rows = Trajectory(**slots)._replace(mask=jnp.ones((2, 1), bool))
    >>> returns = jnp.array([4.0, 10.0])  # 7 + 3 phi
    >>> mean = jnp.array(0.0)
    >>> episodic_natural_gradient(log_prob_fn, mean, rows, returns).solution.item()
    3.0
    """
    check_range("damping", damping, 0.0)
    weights = _feature_weights(rows.mask, returns, decision_weights)
    packed = returns.ndim == 2
    shares = _shares(returns, chances, rows.starts)
    if not packed:
        returns, shares = returns[:, None], shares[:, None]
    counted = rows.starts if packed else jnp.ones_like(shares, bool)
    centred = returns - jnp.sum(shares * returns, where=counted)
    mean, target = _features_and_target(
        log_prob_fn, params, rows, weights, shares, centred, chunks, sum_over_rows
    )

    def product_of_rows(shared: tuple[Params, Params], table: Any) -> Params:
        total = _episode_totals if packed else _row_totals
        rows, weights, shares = table
        return _squared_features(
            log_prob_fn, total, *shared, rows, weights, shares, chunks
        )

    def covariance(vector: Params) -> Params:
        squares = sum_over_rows(
            product_of_rows,
            (params, vector),
            (rows, weights, shares),
            weights != 0.0,
            ALL_AT_ONCE,  # of each device: the product cuts them itself, twice
        )
        centred = add_scaled(squares, -inner_product(mean, vector), mean)
        return add_scaled(centred, jnp.asarray(damping, float), vector)

    return conjugate_gradient(
        covariance, target, num_iterations=num_iterations, tolerance=tolerance
    )


def _squared_features(
    log_prob_fn: LogProbFn,
    total: Callable[[Trajectory, Array], Array],
    params: Params,
    vector: Params,
    rows: Trajectory,
    weights: Array,
    shares: Array,
    chunks: Chunks,
) -> Params:
    """sum_i shares[i] phi[i] (phi[i] . vector), in two passes over the decisions.

    A feature needs its whole episode, and rows of whole episodes are mostly empty slots
    where lengths differ. Each pass may cut them: along the vector, then back with sums.
    """

    def along(shared: tuple[Params, Params], chunk: Any) -> Array:
        params, vector = shared
        chunk_rows, chunk_weights = chunk

        def log_probs(params: Params) -> Array:
            return over_rows(log_prob_fn, params, chunk_rows)

        moved = jax.jvp(log_probs, (params,), (vector,))[1]
        return jnp.where(chunk_weights != 0.0, chunk_weights * moved, 0.0)

    active = weights != 0.0
    table = (rows, weights)
    moved = map_over_chunks(along, (params, vector), table, active, chunks)
    back = weights * shares * total(rows, moved)
    return score_gradient(
        log_prob_fn, params, rows, back, num_trajectories=1, chunks=chunks
    )


def _row_totals(rows: Trajectory, values: Array) -> Array:
    del rows
    return jnp.sum(values, axis=1, keepdims=True)


def _episode_totals(rows: Trajectory, values: Array) -> Array:
    """The sum over each decision's whole episode, [B, T]."""
    continues = jax.vmap(step_discounts, (0, 0, None))(rows.ends, rows.mask, 1.0)
    return jax.vmap(episode_returns)(values, continues, rows.time)


def _features_and_target(
    log_prob_fn: LogProbFn,
    params: Params,
    rows: Trajectory,
    weights: Array,
    shares: Array,
    centred: Array,
    chunks: Chunks,
    sum_over_rows: SumOverRows,
) -> tuple[Params, Params]:
    """The mean of phi, and the covariance of phi with the returns, in one pass."""
    by_row = shares * weights
    both = score_gradients(
        log_prob_fn,
        params,
        rows,
        jnp.stack([by_row, centred * by_row]),
        num_trajectories=1,
        chunks=chunks,
        sum_over_rows=sum_over_rows,
    )
    return jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)


def _feature_weights(
    mask: Array, returns: Array, decision_weights: Array | None
) -> Array:
    """The weight of each decision in its episode's features; 0 in empty slots."""
    given = mask if decision_weights is None else decision_weights
    fits = returns.shape in (mask.shape, mask.shape[:1])
    if given.shape != mask.shape or not fits:
        raise ValueError(
            f"returns have shape {returns.shape} and decision_weights {given.shape}, "
            f"need (B,) or, packed, (B, T), and (B, T) with the rows' own {mask.shape}"
        )
    return jax.lax.stop_gradient(jnp.where(mask, given.astype(returns.dtype), 0.0))


def _shares(returns: Array, chances: Array | None, starts: Array) -> Array:
    """What each episode counts, where its return stands; they sum to one."""
    chances = jnp.ones_like(returns) if chances is None else chances
    if chances.shape != returns.shape:
        raise ValueError(
            f"chances have shape {chances.shape}, need {returns.shape} = one per return"
        )
    each = jnp.where(starts, chances, 0.0) if chances.ndim == 2 else chances
    return (chances / jnp.sum(each)).astype(returns.dtype)
