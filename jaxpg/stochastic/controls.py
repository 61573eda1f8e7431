"""REBAR and RELAX: a relaxed run as control variate of the score.

    g = (f(b) - c(z')) dlog p(b)/dl + dc(z)/dl - dc(z')/dl

z is the noisy logit whose sign or largest entry is the draw b, z' another one drawn
given b, l the node's logits. E[c(z)] = E[c(z')] makes the terms with c vanish in the
mean, whatever c is; what it shares with f it takes out of the variance.

    REBAR  c(z) = scale * f(relax(z / temperature))
    RELAX  c(z) = the same + critic(z), any function with parameters of its own

Scale, temperature and critic are the `control`: a tree of numbers that the loss takes,
and in which `squared_gradient` is differentiable. Its mean is the variance plus what
control does not change, so to descend it is to lower the variance.

References: Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein 2017, "REBAR"; Grathwohl,
Choi, Wu, Roeder and Duvenaud 2018, "Backpropagation through the void" (RELAX).
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import check_range
from jaxpg.distributions import Bernoulli, OneHotCategorical
from jaxpg.stochastic.credits import credit_of
from jaxpg.stochastic.execution import Program
from jaxpg.stochastic.nodes import Draw
from jaxpg.stochastic.noise import conditional, from_noise, relaxed, uniform_noise
from jaxpg.stochastic.reruns import Again, Run, begin, by_noise, carried, with_scores
from jaxpg.stochastic.score import Loss, Report, averaged, report_of
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["DEFAULT_CONTROL", "rebar", "relax", "squared_gradient"]

Critic: TypeAlias = Callable[..., Array]
Variate: TypeAlias = Callable[[Array], Array]

DEFAULT_CONTROL = {"scale": 1.0, "temperature": 0.5}
"""How much of the relaxed run is subtracted, and how smooth it is."""


def rebar(program: Program, **settings: Any) -> Loss:
    """The score less a relaxed run of the program itself.

    Args:
        program: as for `score_function`; what follows a treated node must take numbers
            between 0 and 1.
        **settings: `nodes`, which to treat, None for all over `Bernoulli` or
            `OneHotCategorical`; `num_samples` and `has_aux` as for `score_function`.

    Returns:
        `loss(params, key, *inputs, control=DEFAULT_CONTROL) -> (cost, report)`. Three
        runs for each node that is treated; the others keep their scores.

    Raises:
        ValueError: if no node can be treated, one that is named cannot, or one stands
            in a loop.

    Bias: unbiased, for any control.

    Reference: Tucker et al. 2017, equation 7.

    >>> from jaxpg.stochastic import sample
    >>> def program(logit, key):
    ...     bit = sample(key, Bernoulli(logit[None]))[0]
    ...     return (bit.astype(logit.dtype) - 0.45) ** 2
    >>> loss = rebar(program, num_samples=1000)
    >>> slope, _ = jax.grad(loss, has_aux=True)(jnp.array(0.0), jax.random.key(0))
    >>> abs(slope.item() - 0.025) < 0.02
    True
    """
    return _controlled(program, None, **settings)


def relax(program: Program, critic: Critic, **settings: Any) -> Loss:
    """The score less a relaxed run and a critic of its noisy logits.

    Args:
        program: as for `rebar`.
        critic: `critic(control["critic"], name, z, *inputs) -> scalar`.
        **settings: as for `rebar`.

    Returns:
        `loss(params, key, *inputs, control) -> (cost, report)`, where control is
        `DEFAULT_CONTROL | {"critic": parameters}`; a scale of 0 leaves the critic
        alone.

    Raises:
        ValueError: as `rebar`.

    Bias: unbiased, for any control.

    Reference: Grathwohl et al. 2018, equation 8.
    """
    return _controlled(program, critic, **settings)


def squared_gradient(loss: Loss) -> Callable[..., Float[Array, ""]]:
    """The squared length of a sampled gradient, to be lowered in the control.

        d/dcontrol Var[g] = d/dcontrol E[|g|²],   because E[g] does not depend on it

    Args:
        loss: of `rebar` or `relax`.

    Returns:
        `square(control, params, key, *inputs)`, differentiable in the control.

    Bias: its derivative is unbiased for the total variance's.

    Reference: Grathwohl et al. 2018, section 3.1.
    """

    def square(
        control: PyTree, params: Params, key: PRNGKey, *inputs: PyTree
    ) -> Float[Array, ""]:
        gradient, _ = jax.grad(loss, has_aux=True)(
            params, key, *inputs, control=control
        )
        return sum(
            (jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)), jnp.zeros(())
        )

    return square


def _controlled(
    program: Program,
    critic: Critic | None,
    *,
    nodes: Collection[str] | None = None,
    num_samples: int | None = None,
    has_aux: bool = False,
) -> Loss:
    rule = by_noise((Bernoulli, OneHotCategorical), nodes)

    def loss(
        params: Params, key: PRNGKey, *inputs: PyTree, control: PyTree = DEFAULT_CONTROL
    ) -> tuple[Float[Array, ""], Report]:
        control = _checked(control, critic)
        # Not folded into the program's own key: split(key)[i] is fold_in(key, i).
        key, key_control = jax.random.split(key)
        run, taken, again = begin(
            program, params, key, inputs, rule=rule, nodes=nodes, has_aux=has_aux
        )
        # In the relaxed runs only logits and control are differentiated.
        again = partial(again, params=jax.lax.stop_gradient(params))
        total = with_scores(run, but=taken)
        for number, name in enumerate(taken):
            variate = _variate(name, run, again, critic, control, inputs)
            fresh = jax.random.fold_in(key_control, number)
            total = total + _carried(name, run, variate, fresh)
        return total, report_of(run.record, run.signals)

    return averaged(loss, num_samples)


def _carried(name: str, run: Run, variate: Variate, key: PRNGKey) -> Array:
    node = run.record.nodes[name]
    held = jax.lax.stop_gradient(node.distribution)
    v = uniform_noise(key, held)
    cost = jax.lax.stop_gradient(credit_of(run.graph, run.record, name))
    signal = cost - variate(conditional(held, node.value, v))

    def estimate(logits: Array) -> Array:
        distribution = held._replace(logits=logits)
        score = jnp.sum(distribution.log_prob(node.value))
        z = from_noise(distribution, node.noise)
        given = conditional(distribution, node.value, v)
        return signal * score + variate(z) - variate(given)

    return carried(node.distribution.logits, jax.grad(estimate)(held.logits))


def _variate(
    name: str,
    run: Run,
    again: Again,
    critic: Critic | None,
    control: PyTree,
    inputs: tuple[PyTree, ...],
) -> Variate:
    distribution = run.record.nodes[name].distribution

    def variate(z: Array) -> Array:
        value = relaxed(distribution, z, control["temperature"])
        cost = control["scale"] * _cost_of(again, name, value)
        if critic is None:
            return cost
        return cost + critic(control["critic"], name, z, *inputs)

    return variate


def _cost_of(again: Again, name: str, value: Array) -> Array:
    """What a relaxed value costs; later draws have their scores in its derivative."""
    run = again({name: Draw(value, differentiable=True)})
    scores = with_scores(run, but=[name]) - run.record.total
    return credit_of(run.graph, run.record, name) + scores


def _checked(control: PyTree, critic: Critic | None) -> PyTree:
    needed = {*DEFAULT_CONTROL, *(() if critic is None else ("critic",))}
    if not isinstance(control, dict) or set(control) != needed:
        came = sorted(control) if isinstance(control, dict) else type(control).__name__
        raise ValueError(
            f"control is {came}, needs the entries {', '.join(sorted(needed))}; use "
            'DEFAULT_CONTROL, and | {"critic": params} for relax'
        )
    check_range("control['temperature']", control["temperature"], 0.0, open_low=True)
    return control
