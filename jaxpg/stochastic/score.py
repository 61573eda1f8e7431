"""The score-function gradient of any stochastic program.

    d/dtheta E[C] = E[ dC/dtheta + sum_z dlog p(z)/dtheta (Q[z] - b[z]) ]

Q[z] is the sum of the costs that z's draw reaches, b[z] a baseline that knows nothing
of the draw, and dC/dtheta the way from the parameters to the costs that needs no draw.
`score_function` turns a program into a function whose value is the sampled cost and
whose derivative is that estimate: it composes with `jax.grad`, `vmap`, `jit` and any
other loss. It never knows where a baseline came from; `control` makes some.

References: Williams 1992; Schulman et al. 2015, "Gradient estimation using stochastic
computation graphs"; Foerster et al. 2018, "DiCE"; Mao et al. 2019, "A baseline for any
order gradient estimation in stochastic computation graphs"; Kool et al. 2019, "Buy 4
REINFORCE samples, get a baseline for free!" (leave-one-out).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import check_choice, check_no_nan, check_positive, nearest
from jaxpg.stochastic.execution import (
    Program,
    Record,
    Traced,
    execute,
    trace,
)
from jaxpg.stochastic.nodes import DrawRule
from jaxpg.stochastic.surrogates import (
    Levels,
    Signals,
    any_order,
    first_order,
    mean_of_others,
    per_draw,
    signals_of,
)
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["Loss", "Report", "averaged", "report_of", "score_function"]


class Report(NamedTuple):
    """What was seen on the way; with several samples, theirs are in front.

    Attributes:
        costs: by mark, the program's returned one as "returned"; differentiable.
        credits: by node, the costs that its draws reach, for each independent draw;
            held constant.
        baselines: by node, those that the program itself gave; differentiable.
        log_probs: by node, in nats.
        values: by node, the draws.
        output: what the program returned beside its cost; differentiable, so a loss on
            it that no draw shall be blamed for can be added to the estimate.
    """

    costs: dict[str, Array]
    credits: dict[str, Array]
    baselines: dict[str, Array]
    log_probs: dict[str, Array]
    values: dict[str, PyTree]
    output: PyTree


Loss: TypeAlias = Callable[..., tuple[Float[Array, ""], Report]]
"""`loss(params, key, *inputs, ...) -> (cost, report)`: a sampled cost whose derivative
is the estimate, for `jax.value_and_grad(loss, has_aux=True)`."""


def score_function(
    program: Program,
    *,
    num_samples: int | None = None,
    leave_one_out: bool = False,
    order: str = "first",
    has_aux: bool = False,
    rule: DrawRule | None = None,
) -> Loss:
    """Make a program's expected cost differentiable through its draws.

        loss = C + sum_z (log p(z) - |log p(z)|) * (Q[z] - b[z]) / scale[z]

    where |x| is held constant, so the value is the sampled cost C. With order "any" it
    is the magic box that makes every derivative right:

        loss = sum_c c * box(S[c]) + sum_z b[z] (1 - box(log p(z))) box(S[z])

    Args:
        program: `program(params, key, *inputs)`, with at least one `sample`; it returns
            its last cost, a scalar to be lowered. One datum: `jax.vmap` over data.
        num_samples: how many independent runs to average, K; None for one, reported
            without an axis in front.
        leave_one_out: subtract from each run's credit the mean of the other runs'.
        order: "first" for first derivatives; "any" for all of them.
        has_aux: whether the program returns `(cost, output)`.
        rule: how nodes draw, for operators built on this one.

    Returns:
        `loss(params, key, *inputs, baselines=None, scales=None) -> (cost, report)`. The
        key is consumed. Baselines and scales are by node, held constant; each may know
        anything but what the node's draw reaches.

    Raises:
        ValueError: if leave-one-out has fewer than two samples, scales are given with
            order "any", a baseline names no node or fits none of its rounds, or the
            program is not one (see `execution.trace`).

    Bias: unbiased for the derivative of the expected cost (order "any": for every
        derivative), with any such baselines. With scales unbiased up to them: each
        node's term is divided by its own.

    Reference: Schulman et al. 2015, theorem 1 and corollary 1; Foerster et al. 2018.

    >>> from jaxpg.distributions import Bernoulli
    >>> from jaxpg.stochastic import sample
    >>> def program(logit, key):
    ...     bit = sample(key, Bernoulli(logit[None]))[0]
    ...     return (bit.astype(logit.dtype) - 0.45) ** 2
    >>> loss = score_function(program, num_samples=1000, leave_one_out=True)
    >>> slope, report = jax.grad(loss, has_aux=True)(jnp.array(0.0), jax.random.key(0))
    >>> abs(slope.item() - 0.1 * 0.25) < 0.005  # (0.55² - 0.45²) p (1 - p)
    True
    """
    check_choice("order", order, ("first", "any"))
    if num_samples is not None:
        check_positive("num_samples", num_samples)
    if leave_one_out and (num_samples or 1) < 2:
        raise ValueError(
            f"num_samples is {num_samples} and leave_one_out is True, needs at least 2 "
            "samples to leave one out; use num_samples=2 or more, or a baseline"
        )

    def loss(
        params: Params,
        key: PRNGKey,
        *inputs: PyTree,
        baselines: Levels | None = None,
        scales: Levels | None = None,
    ) -> tuple[Float[Array, ""], Report]:
        if scales and order == "any":
            raise ValueError(
                "scales are given with order 'any', needs order='first': a scaled term "
                "has no higher derivatives; leave scales out"
            )
        traced = trace(program, params, key, inputs, rule=rule, has_aux=has_aux)
        graph = traced.graph
        baselines, scales = dict(baselines or {}), dict(scales or {})
        _check_levels(traced, baselines=baselines, scales=scales)

        over_runs = jax.vmap if num_samples else lambda run: run
        keys = jax.random.split(key, num_samples) if num_samples else key

        def run(key: PRNGKey) -> tuple[Record, Signals]:
            record = execute(traced, params, key, inputs)
            return record, signals_of(graph, record, baselines)

        record, signals = over_runs(run)(keys)
        if leave_one_out:
            signals = _leave_one_out(signals)

        def total(record: Record, signals: Signals) -> Array:
            if order == "any":
                return any_order(graph, record, signals.levels)
            return first_order(graph, record, _weights(signals, scales))

        totals = over_runs(total)(record, signals)
        return jnp.mean(totals), report_of(record, signals)

    return loss


def _weights(signals: Signals, scales: Levels) -> dict[str, Array]:
    return {
        name: excess / per_draw(scales.get(name, 1.0), excess)
        for name, excess in signals.excess.items()
    }


def _leave_one_out(signals: Signals) -> Signals:
    """The others' mean of what a baseline leaves, over the first axis."""
    levels = {
        name: signals.levels[name] + mean_of_others(excess)
        for name, excess in signals.excess.items()
    }
    return signals._replace(levels=levels)


def averaged(loss: Loss, num_samples: int | None) -> Loss:
    """The mean of independent runs of a loss, their reports stacked; None for one."""
    if num_samples is None:
        return loss
    check_positive("num_samples", num_samples)

    def mean_loss(
        params: Params, key: PRNGKey, *inputs: PyTree, **settings: Any
    ) -> tuple[Float[Array, ""], Report]:
        def run(key: PRNGKey) -> tuple[Array, Report]:
            return loss(params, key, *inputs, **settings)

        costs, reports = jax.vmap(run)(jax.random.split(key, num_samples))
        return jnp.mean(costs), reports

    return mean_loss


def report_of(record: Record, signals: Signals) -> Report:
    """What a person wants to see of a run."""
    return Report(
        record.costs,
        signals.credits,
        {name: node.baseline for name, node in record.nodes.items()},
        {name: node.log_prob for name, node in record.nodes.items()},
        {name: node.value for name, node in record.nodes.items()},
        record.output,
    )


def _check_levels(traced: Traced, **levels: Levels) -> None:
    nodes = traced.graph.nodes
    scored = [name for name, site in nodes.items() if site.scored]
    for kind, by_node in levels.items():
        for name, level in by_node.items():
            if name not in scored:
                raise ValueError(
                    f"{kind} name the node {name!r}, unknown; {nearest(name, scored)}"
                )
            check_no_nan(f"{kind}[{name!r}]", jnp.asarray(level))
            rounds = tuple(loop.length for loop in nodes[name].loops)
            if jnp.shape(level) not in ((), rounds):
                raise ValueError(
                    f"{kind}[{name!r}] has shape {jnp.shape(level)}, needs () or "
                    f"{rounds} = one number for each round of the node's loops; give "
                    "sample(baseline=...) one for each independent draw"
                )
