"""The exact expectation of a program whose draws are few: the oracle of this room.

    E[C] = sum over all outcomes z of exp(sum_n log p(z_n | z_<n)) * C(z)

A differentiable function like any other, right at every order. It evaluates the program
once for each outcome, so it is for small spaces and for tests of whatever samples.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpg._checks import check_positive
from jaxpg.distributions import (
    Bernoulli,
    Categorical,
    MultiCategorical,
    OneHotCategorical,
)
from jaxpg.stochastic.execution import Program, Record, Traced, execute, trace
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["Outcomes", "exact_expectation", "outcomes_of"]


class Outcomes(NamedTuple):
    """All that can happen in a program.

    Attributes:
        probs: of each outcome [N]; they add up to 1.
        records: the evaluations, N in front.
    """

    probs: Float[Array, " N"]
    records: Record


def exact_expectation(
    program: Program, *, max_outcomes: int = 2**16, has_aux: bool = False
) -> Any:
    """The expected cost of a program, by evaluating every outcome.

        E[C] = sum_z p(z) C(z)

    Args:
        program: as for `score_function`; all of its nodes over finitely many values
            (`Categorical`, `OneHotCategorical`, `MultiCategorical`, `Bernoulli`).
        max_outcomes: more are refused, because memory and time grow with their number.
        has_aux: whether the program returns `(cost, output)`; the output is dropped.

    Returns:
        `expectation(params, key, *inputs) -> E[C]`, differentiable any number of times.
        The key draws nothing.

    Raises:
        ValueError: if a node's values cannot be counted, or are too many.

    Bias: none, at any order.

    >>> from jaxpg.stochastic import sample
    >>> def program(logit, key):
    ...     bit = sample(key, Bernoulli(logit[None]))[0]
    ...     return (bit.astype(logit.dtype) - 0.45) ** 2
    >>> expectation = exact_expectation(program)
    >>> round(float(jax.grad(expectation)(jnp.array(0.0), jax.random.key(0))), 4)
    0.025
    """
    check_positive("max_outcomes", max_outcomes)

    def expectation(params: Params, key: PRNGKey, *inputs: PyTree) -> Array:
        traced = trace(program, params, key, inputs, has_aux=has_aux)
        outcomes = outcomes_of(traced, params, key, inputs, max_outcomes=max_outcomes)
        costs = jax.vmap(lambda record: record.total)(outcomes.records)
        return jnp.sum(outcomes.probs * costs)

    return expectation


def outcomes_of(
    traced: Traced,
    params: Params,
    key: PRNGKey,
    inputs: tuple[PyTree, ...] = (),
    *,
    max_outcomes: int = 2**16,
) -> Outcomes:
    """Evaluate a traced program at every outcome.

    Args:
        traced: by `trace`.
        params: of the program.
        key: draws nothing.
        inputs: what else it takes.
        max_outcomes: more are refused.

    Returns:
        Probabilities and records.

    Raises:
        ValueError: if a node's values cannot be counted, or are too many.
    """
    shapes = jax.eval_shape(lambda: execute(traced, params, key, inputs)).nodes
    radices = {name: _radices(name, node) for name, node in shapes.items()}
    number = math.prod(int(n) for each in radices.values() for n in each.flat)
    if number > max_outcomes:
        sizes = ", ".join(f"{n}: {math.prod(r.flat)}" for n, r in radices.items())
        raise ValueError(
            f"the program has {number} outcomes ({sizes}), needs at most max_outcomes "
            f"= {max_outcomes}; make its nodes smaller, or sample with score_function"
        )

    def at(index: Array) -> Record:
        given, place = {}, 1
        for name, node in shapes.items():
            digits, place = _digits(index, radices[name], place)
            given[name] = _value(node.distribution, digits, node.value)
        return execute(traced, params, key, inputs, given=given)

    records = jax.vmap(at)(jnp.arange(number))
    log_probs = sum(
        jnp.sum(node.log_prob, axis=tuple(range(1, node.log_prob.ndim)))
        for node in records.nodes.values()
    )
    return Outcomes(jnp.exp(log_probs), records)


def _radices(name: str, node: Any) -> np.ndarray:
    """How many values each independent part of a draw can take."""
    distribution, value = node.distribution, node.value
    match distribution:
        case Bernoulli():
            return np.full(value.shape, 2)
        case Categorical():
            return np.full(value.shape, distribution.logits.shape[-1])
        case OneHotCategorical():
            return np.full(value.shape[:-1], distribution.logits.shape[-1])
        case MultiCategorical():
            numbers = [logits.shape[-1] for logits in distribution.logits]
            return np.broadcast_to(np.array(numbers), value.shape)
    kind = "one of its own class" if distribution is None else type(distribution)
    raise ValueError(
        f"node {name!r} draws from {getattr(kind, '__name__', kind)}, needs Bernoulli, "
        "Categorical, OneHotCategorical or MultiCategorical for its values to be "
        "counted; sample with score_function"
    )


def _digits(
    index: Array, radices: np.ndarray, place: int
) -> tuple[Int[Array, "..."], int]:
    """The digits of an outcome's number that belong to one node."""
    ends = place * np.cumprod(radices.ravel(), dtype=int)
    places = np.concatenate([[place], ends[:-1]]) if radices.size else ends
    digits = (index // places) % radices.ravel()
    return digits.reshape(radices.shape), int(ends[-1]) if radices.size else place


def _value(distribution: Any, digits: Int[Array, "..."], like: Any) -> Array:
    if isinstance(distribution, OneHotCategorical):
        number = distribution.logits.shape[-1]
        return jax.nn.one_hot(digits, number, dtype=like.dtype)
    return digits.astype(like.dtype)
