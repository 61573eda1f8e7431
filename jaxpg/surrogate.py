r"""Surrogates: scalars that are written to be differentiated, not to be read.

    L(theta)    = 1/N  sum_i sum_t  weights[i, t] * log pi(action[i, t] | history[i, t])
    dice(theta) = 1/N  sum_i sum_t  discount^t * reward[i, t] * box(S[i, t])
    box(x)      = exp(x - stop_gradient(x)),     S[t] = sum_{u <= t} log pi[u]

L is weighted maximum likelihood: cross entropy for categorical actions, squared error
for Gaussian ones of fixed scale, behaviour cloning where every weight is 1. Its FIRST
derivative is the policy gradient and no other is right, because its weights forget that
they depend on theta. The magic box keeps what they forget: box(x) is 1 in value, but
its derivative is box(x) * grad x, so that each order of differentiation brings the
scores that belong to it. `dice_objective` is right at every order.

All of them are means over trajectories of sums over time, and all are to be ascended;
`cross_entropy` and `squared_error` are losses of one decision, to be descended.

References: Williams 1992; Schulman et al. 2015, "Gradient estimation using stochastic
computation graphs"; Foerster et al. 2018, "DiCE: the infinitely differentiable Monte
Carlo estimator"; Mao et al. 2019, "A baseline for any order gradient estimation in
stochastic computation graphs".
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxpg._checks import (
    check_choice,
    check_no_nan,
    check_positive,
    check_range,
    check_rank,
    check_same_shape,
)
from jaxpg.gradients import LogProbFn, check_rows, weigh
from jaxpg.returns import leading_discounts, suffix_recurrence
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "Unrolls",
    "behaviour_cloning",
    "cross_entropy",
    "dice_objective",
    "entropy_bonus",
    "entropy_rewards",
    "magic_box",
    "squared_error",
    "surrogate",
]

A_BATCH = "(B, T) = rows of decisions; give one row a B of 1 with x[None]"


@runtime_checkable
class Unrolls(Protocol):
    """What `entropy_bonus` needs of a policy; `policies.Policy` has it."""

    @property
    def unroll(self) -> Callable[[Params, Trajectory], Any]:
        """`unroll(params, row) -> Distribution [T]`."""


def surrogate(
    log_prob_fn: LogProbFn,
    params: Params,
    rows: PyTree,
    weights: Float[Array, "B T"],
    *,
    num_trajectories: int | Array | None = None,
) -> Float[Array, ""]:
    """Weighted log-likelihood: L = 1/N sum_i sum_t weights[i, t] * log pi[i, t].

    Its derivative is `gradients.score_gradient`, which also works in chunks; this is
    for whoever adds terms to a loss. Its value means nothing, and neither does its
    second derivative: that is what `dice_objective` is for.

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats.
        params: what to differentiate.
        rows: what `log_prob_fn` reads, with B in front of every leaf.
        weights: one number per decision, held constant; 0 where there is none, which
            hides even an infinite log-probability.
        num_trajectories: N; the number of rows unless rows pack several episodes.

    Returns:
        A scalar to ascend.

    Raises:
        ValueError: if weights are not [B, T] with the rows' own B, or hold NaN (outside
            `jit`; inside, NaN shows in the result), or if N is not positive.

    Bias: first derivative exactly that of the weights; higher ones biased.

    Reference: Williams 1992; Schulman et al. 2015, corollary 1.

    >>> log_prob_fn = lambda mean, x: -0.5 * (x - mean) ** 2
    >>> x, weights = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 10.0]])
    >>> jax.grad(surrogate, 1)(log_prob_fn, jnp.array(0.0), x, weights).item()
    21.0
    """
    check_rows(rows, weights)
    check_no_nan("weights", weights)
    log_probs = jax.vmap(log_prob_fn, (None, 0))(params, rows)
    total = jnp.sum(weigh(jax.lax.stop_gradient(weights), log_probs))
    return _per_trajectory(total, weights.shape[0], num_trajectories)


def cross_entropy(
    logits: Float[Array, "*B A"], actions: Integer[Array, "*B"]
) -> Float[Array, "*B"]:
    """Minus the log-likelihood of categorical actions: log sum_i exp(l[i]) - l[a].

    The sum of weights times this is minus N times the surrogate.

    Args:
        logits: unnormalised log-probabilities; -inf masks an action.
        actions: the actions that were taken.

    Returns:
        A loss for each decision, in nats; inf for an action that is masked or not one
        of 0 .. A - 1.

    Raises:
        ValueError: if there is not one action per row of logits.

    Bias: none: it is `-Categorical(logits).log_prob(actions)`.

    >>> cross_entropy(jnp.zeros(4), jnp.array(1)) == jnp.log(4.0)
    Array(True, dtype=bool)
    """
    if actions.shape != logits.shape[:-1]:
        raise ValueError(
            f"actions have shape {actions.shape}, need {logits.shape[:-1]} = one "
            f"integer per row of logits {logits.shape}; for one-hot use argmax(-1)"
        )
    num_actions = logits.shape[-1]
    known = (actions >= 0) & (actions < num_actions)
    index = jnp.clip(actions, 0, num_actions - 1)[..., None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    return jnp.where(known, jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.inf)


def squared_error(
    means: Float[Array, "*B D"],
    actions: Float[Array, "*B D"],
    scale: float | Float[Array, "..."] = 1.0,
) -> Float[Array, "*B"]:
    """Minus a Gaussian log-likelihood, up to a constant: sum_d ((a - mean)/scale)²/2.

    The constant, sum_d log(scale) + log(2π)/2, depends on no parameter only while the
    scale is fixed, so the scale is held constant here. A LEARNED scale needs the full
    likelihood: `-DiagonalGaussian(mean, log_std).log_prob(action)`.

    Args:
        means: of the actions.
        actions: the actions that were taken, as they were drawn.
        scale: standard deviation, above 0: one number, [D], or one per entry.

    Returns:
        A loss for each decision, in nats.

    Raises:
        ValueError: if shapes differ or the scale is not positive.

    Bias: none at a fixed scale.

    >>> squared_error(jnp.zeros(2), jnp.array([2.0, 4.0]), 2.0).item()
    2.5
    """
    check_same_shape(means=means, actions=actions)
    check_range("scale", scale, 0.0, open_low=True)
    scale = jax.lax.stop_gradient(jnp.asarray(scale, means.dtype))
    if scale.shape not in ((), means.shape[-1:], means.shape):
        raise ValueError(
            f"scale has shape {scale.shape}, needs (), {means.shape[-1:]} or "
            f"{means.shape}; use jnp.broadcast_to(scale, means.shape)"
        )
    z = (actions - means) / jnp.broadcast_to(scale, means.shape)
    return 0.5 * jnp.sum(z**2, axis=-1)


def behaviour_cloning(
    log_prob_fn: LogProbFn,
    params: Params,
    rows: PyTree,
    mask: Bool[Array, "B T"],
    *,
    per: Literal["trajectory", "decision"] = "trajectory",
    num_trajectories: int | Array | None = None,
) -> Float[Array, ""]:
    """Maximum likelihood: the surrogate with weight 1 on every real decision.

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats.
        params: what to differentiate.
        rows: a demonstrator's decisions, with B in front of every leaf.
        mask: whether slot t holds a decision.
        per: "trajectory" for the mean over trajectories of the sum over time;
            "decision" for the mean over decisions, the usual loss of supervised
            learning: the same maximum, other step sizes, comparable across lengths.
        num_trajectories: N; the number of rows unless rows pack several episodes.

    Returns:
        A mean log-likelihood in nats, to ascend.

    Raises:
        ValueError: if the mask is not [B, T] of booleans with the rows' own B, or if
            `num_trajectories` is given for a mean over decisions.

    Bias: per trajectory, unbiased for the expected log-likelihood of a trajectory, with
        all its derivatives; per decision a ratio of means, biased O(1/N) where lengths
        are random.

    Reference: Pomerleau 1991, "Efficient training of artificial neural networks for
        autonomous navigation".

    >>> log_prob_fn = lambda p, heads: jnp.where(heads, jnp.log(p), jnp.log(1 - p))
    >>> heads, mask = jnp.array([[True, True, False]]), jnp.ones((1, 3), bool)
    >>> slope = jax.grad(behaviour_cloning, 1)
    >>> abs(slope(log_prob_fn, jnp.array(2 / 3), heads, mask).item()) < 1e-5
    True
    """
    check_choice("per", per, ("trajectory", "decision"))
    if mask.dtype != bool:
        raise ValueError(f"mask is {mask.dtype}, needs booleans; use mask.astype(bool)")
    check_rank("mask", mask, 2, A_BATCH)
    if per == "decision":
        if num_trajectories is not None:
            raise ValueError(
                f"num_trajectories is {num_trajectories} and per is 'decision', needs "
                "one of them; leave num_trajectories out, or take per='trajectory'"
            )
        num_trajectories = jnp.maximum(jnp.sum(mask), 1)
    weights = jnp.where(mask, 1.0, 0.0)
    return surrogate(
        log_prob_fn, params, rows, weights, num_trajectories=num_trajectories
    )


def entropy_bonus(
    policy: Unrolls,
    params: Params,
    rows: Trajectory,
    *,
    key: PRNGKey | None = None,
    num_trajectories: int | Array | None = None,
) -> Float[Array, ""]:
    """Entropy at the visited observations: 1/N sum_i sum_t H(pi(. | o[i, t])).

    Args:
        policy: whose distributions' own entropy is taken.
        params: what to differentiate.
        rows: a batch of decisions; their observations are held constant.
        key: for distributions without a closed entropy (`TanhGaussian`), which is then
            sampled; leave it out for all others.
        num_trajectories: N; the number of rows unless rows pack several episodes.

    Returns:
        A scalar in nats, to ascend after multiplying it by a temperature.

    Raises:
        ValueError: if the rows are no batch, if a key is missing, or if one is given
            that nothing would consume.

    Bias: value unbiased; derivative biased for that of E[sum_t H]: it misses how theta
        moves the observations that are visited. It raises the entropy HERE; the
        objective "return plus entropy" has its exact gradient in `entropy_rewards`.

    Reference: Williams and Peng 1991, "Function optimization using connectionist
        reinforcement learning algorithms"; Mnih et al. 2016 for this form.
    """
    check_rank("rows.mask", rows.mask, 2, A_BATCH)

    def of_row(row: Trajectory, key: PRNGKey | None) -> Array:
        entropy = _entropy(policy.unroll(params, row), key)
        return jnp.sum(jnp.where(row.mask, entropy, 0.0))

    num_rows = rows.mask.shape[0]
    keys = None if key is None else jax.random.split(key, num_rows)
    total = jnp.sum(jax.vmap(of_row)(rows, keys))
    return _per_trajectory(total, num_rows, num_trajectories)


def entropy_rewards(
    log_probs: Float[Array, "*B"],
    mask: Bool[Array, "*B"],
    temperature: float | Float[Array, ""],
) -> Float[Array, "*B"]:
    """What to add to the rewards: -temperature * log pi(a[t] | h[t]), held constant.

    Its mean given the history is temperature * H(pi(. | h[t])), so that the score
    gradient of the sum, by reward-to-go, is the gradient of E[sum r + temperature * H],
    the way from theta over the visited observations included. What is lost by holding
    it constant, -temperature * E[grad log pi], is zero.

    Args:
        log_probs: of the actions under the policy that drew them and that is
            differentiated (`rows.log_prob` on-policy), in nats.
        mask: whether a slot holds a decision.
        temperature: reward per nat, at least 0.

    Returns:
        Rewards, 0 in empty slots.

    Raises:
        ValueError: if shapes differ or the temperature is negative.

    Bias: unbiased on-policy, in the first derivative. Higher ones need rewards
        whose log-probabilities are differentiated too.

    Reference: Ziebart 2010, "Modeling purposeful adaptive behavior with the principle
        of maximum causal entropy"; Schulman et al. 2017, "Equivalence between policy
        gradients and soft Q-learning".

    >>> log_probs, mask = jnp.array([-3.0, -1.0]), jnp.array([True, False])
    >>> entropy_rewards(log_probs, mask, 0.5).tolist()
    [1.5, 0.0]
    """
    check_same_shape(log_probs=log_probs, mask=mask)
    check_range("temperature", temperature, 0.0)
    return jax.lax.stop_gradient(jnp.where(mask, -temperature * log_probs, 0.0))


def magic_box(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """exp(x - stop_gradient(x)): 1 in value, box(x) * grad x in derivative.

    Args:
        x: finite log-probabilities, or sums of them, in nats.

    Returns:
        Ones, which differentiate as the likelihood ratio p_theta / p_now does.

    Bias: none; E[box(log p(y)) f(y)] has all derivatives of E[f(y)].

    Reference: Foerster et al. 2018, section 4.

    >>> third = jax.grad(jax.grad(jax.grad(lambda x: magic_box(2.0 * x))))
    >>> magic_box(jnp.array(5.0)).item(), third(5.0).item()
    (1.0, 8.0)
    """
    return jnp.exp(x - jax.lax.stop_gradient(x))


def dice_objective(
    log_prob_fn: LogProbFn,
    params: Params,
    rows: Trajectory,
    *,
    discount: float | Float[Array, ""] = 1.0,
    baseline: Float[Array, "B T"] | None = None,
    baseline_order: Literal["any", "first"] = "any",
    num_trajectories: int | Array | None = None,
) -> Float[Array, ""]:
    """The mean return, differentiable any number of times.

    1/N sum_i sum_t discount^t (r[t] box(S[t]) + b[t] (1 - box(log pi[t])) box(S[t-1]))

    Several episodes may share a row: S begins anew at each start. The value is the mean
    return, baseline or not. The first derivative is the score gradient of
    discount^t * (reward-to-go - b[t]); the second estimates the Hessian.

    Args:
        log_prob_fn: log-probability of each decision of one row, [T], in nats.
        params: what to differentiate; those that acted (on-policy).
        rows: a batch of whole episodes. Rewards that depend on `params` are
            differentiated as well.
        discount: the factor per decision, in [0, 1]; its leading factor is kept.
        baseline: b[t], a guess of the discounted reward-to-go from t on, held constant;
            it may know the history up to the observation at t, no later one.
        baseline_order: "any" (Mao et al.) lowers the variance at every order; "first"
            (Foerster et al., equation 10) leaves box(S[t-1]) out, which is the same at
            the first order and lets earlier decisions' noise stay in higher ones.
        num_trajectories: N; the number of rows unless rows pack several episodes.

    Returns:
        A scalar to ascend.

    Raises:
        ValueError: if shapes do not match, a setting is out of range, or a baseline or
            a real reward is NaN (outside `jit`; inside, NaN shows in the result).

    Bias: unbiased at every order for the discounted return, with either baseline
        order. A row that begins amid an episode has lost earlier decisions' scores:
        biased from the second order on.

    Reference: Foerster et al. 2018, equations 8 and 10; Mao et al. 2019.

    >>> mask, time = jnp.ones((1, 2), bool), jnp.array([[0, 1]])
    >>> x, reward = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])
    >>> rows = Trajectory(x, x, x, reward, ~mask, ~mask, mask, time, time)
    >>> dice = lambda p: dice_objective(lambda p, row: p * row.action, p, rows)
    >>> dice(0.0).item(), jax.grad(dice)(0.0).item()  # 3 * 1 + 4 * (1 + 2)
    (7.0, 15.0)
    """
    check_rank("rows.reward", rows.reward, 2, A_BATCH)
    check_choice("baseline_order", baseline_order, ("any", "first"))
    baseline = jnp.zeros_like(rows.reward) if baseline is None else baseline
    check_same_shape(
        **{"rows.reward": rows.reward, "rows.mask": rows.mask, "baseline": baseline}
    )
    check_no_nan("baseline", baseline, rows.mask)
    check_no_nan("rows.reward", rows.reward, rows.mask)

    def of_row(row: Trajectory, baseline: Array) -> Array:
        log_probs = log_prob_fn(params, row)
        check_same_shape(**{"rows.reward": row.reward, "log_prob_fn gives": log_probs})
        # Masked before they meet: 0 * NaN would be NaN in the derivative.
        log_probs = jnp.where(row.mask, log_probs, 0.0)
        factors = leading_discounts(row.time, discount)
        reward, baseline, factors = (
            jnp.where(row.mask, x, 0.0) for x in (row.reward, baseline, factors)
        )
        so_far = _sums_so_far(log_probs, row.starts)
        control = 1.0 - magic_box(log_probs)
        if baseline_order == "any":
            control = control * magic_box(so_far - log_probs)
        return jnp.sum(factors * (reward * magic_box(so_far) + baseline * control))

    total = jnp.sum(jax.vmap(of_row)(rows, jax.lax.stop_gradient(baseline)))
    return _per_trajectory(total, rows.reward.shape[0], num_trajectories)


def _sums_so_far(
    x: Float[Array, " T"], starts: Bool[Array, " T"]
) -> Float[Array, " T"]:
    """sum_{u <= t} x[u] within each episode."""
    continues = (~starts).astype(x.dtype)
    return suffix_recurrence(x[::-1], continues[::-1])[::-1]


def _entropy(distribution: Any, key: PRNGKey | None) -> Array:
    sampled = getattr(distribution, "sampled_entropy", None)
    name = type(distribution).__name__
    if sampled is None and key is not None:
        raise ValueError(
            f"key is given, but {name} has a closed entropy, needs none; leave it out"
        )
    if sampled is not None and key is None:
        raise ValueError(
            f"key is None, but {name} has no closed entropy, needs one to sample it; "
            "pass key=jax.random.key(...), or use entropy_rewards"
        )
    return cast(Array, distribution.entropy() if sampled is None else sampled(key))


def _per_trajectory(
    total: Array, num_rows: int, num_trajectories: int | Array | None
) -> Array:
    count = num_rows if num_trajectories is None else num_trajectories
    if isinstance(count, int):
        check_positive("num_trajectories", count)
    return total / jnp.asarray(count, total.dtype)
