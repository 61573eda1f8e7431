"""A program run again with something else in the place of a draw.

All runs take the same key. So draws before the node are the same ones, and draws after
it are made anew from their own keys, given what now stands there. What an estimator
makes of the runs is a gradient in the node's logits l:

    (l - |l|) * gradient,   |x| held constant: no value, but the gradient's slope
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg._checks import nearest
from jaxpg.distributions import Categorical
from jaxpg.stochastic.execution import Program, Record, execute, trace
from jaxpg.stochastic.influence import Graph
from jaxpg.stochastic.nodes import Draw, DrawRule
from jaxpg.stochastic.noise import from_noise, hard, uniform_noise
from jaxpg.stochastic.surrogates import Signals, first_order, signals_of
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["Run", "begin", "by_noise", "carried", "with_scores"]


class Run(NamedTuple):
    """One run of a program.

    Attributes:
        graph: of the program, as it was traced for this run.
        record: what happened.
        signals: credits and levels of the scored nodes.
    """

    graph: Graph
    record: Record
    signals: Signals


@runtime_checkable
class Again(Protocol):
    """Run the program once more, with other draws in the place of some."""

    def __call__(
        self, draws: Mapping[str, Draw], params: Params | None = None
    ) -> Run: ...


def begin(
    program: Program,
    params: Params,
    key: PRNGKey,
    inputs: tuple[PyTree, ...],
    *,
    rule: DrawRule,
    nodes: Collection[str] | None,
    has_aux: bool,
) -> tuple[Run, list[str], Again]:
    """Run a program, and say how to run it again.

    Args:
        program: as for `score_function`.
        params: of it.
        key: for all runs.
        inputs: what else it takes.
        rule: how nodes draw that are treated; it keeps their noise.
        nodes: the names asked for; None for all that the rule takes.
        has_aux: whether the program returns `(cost, output)`.

    Returns:
        The run, the names of the nodes that the rule took, and `again(draws, params)`,
        which runs the program with other draws in the place of some.

    Raises:
        ValueError: if a name is unknown, the rule took no node, or one in a loop.
    """

    def run(rule: DrawRule, params: Params = params) -> Run:
        traced = trace(program, params, key, inputs, rule=rule, has_aux=has_aux)
        record = execute(traced, params, key, inputs)
        return Run(traced.graph, record, signals_of(traced.graph, record))

    own = params

    def again(draws: Mapping[str, Draw], params: Params | None = None) -> Run:
        def put(name: str, key: PRNGKey, distribution: Any) -> Draw | None:
            return draws[name] if name in draws else rule(name, key, distribution)

        return run(put, own if params is None else params)

    first = run(rule)
    _check_nodes(first.graph, nodes)
    taken = [name for name, node in first.record.nodes.items() if _has_noise(node)]
    _check_taken(first.graph, taken)
    return first, taken, again


def by_noise(kinds: tuple[Any, ...], nodes: Collection[str] | None) -> DrawRule:
    """Draw some nodes from noise that is kept on record.

    Args:
        kinds: the distributions that can be drawn so.
        nodes: which nodes; None for all of these kinds.

    Returns:
        A rule, which raises `ValueError` at a node that is named and of another kind.
    """

    def rule(name: str, key: PRNGKey, distribution: Any) -> Draw | None:
        if not takes(name, distribution, kinds, nodes):
            return None
        u = uniform_noise(key, distribution)
        return Draw(hard(distribution, from_noise(distribution, u)), u)

    return rule


def takes(
    name: str, distribution: Any, kinds: tuple[Any, ...], nodes: Collection[str] | None
) -> bool:
    """Whether a node is one of those that are treated.

    Raises:
        ValueError: if it is named and of another kind.
    """
    able = isinstance(distribution, kinds)
    if nodes is not None and name in nodes and not able:
        names = " or ".join(kind.__name__ for kind in kinds)
        is_integer = isinstance(distribution, Categorical)
        cure = "OneHotCategorical for it, or " if is_integer and len(kinds) > 1 else ""
        raise ValueError(
            f"node {name!r} draws from {type(distribution).__name__}, needs {names}; "
            f"use {cure}score_function"
        )
    return able and (nodes is None or name in nodes)


def _check_nodes(graph: Graph, nodes: Collection[str] | None) -> None:
    for name in nodes or ():
        if name not in graph.nodes:
            raise ValueError(
                f"nodes name {name!r}, unknown; {nearest(name, list(graph.nodes))}"
            )


def with_scores(run: Run, but: Collection[str]) -> Float[Array, ""]:
    """The run's total cost, with the scores of all nodes but some in its derivative."""
    weights = run.signals.excess
    left = {name: weight for name, weight in weights.items() if name not in but}
    return first_order(run.graph, run.record, left)


def carried(logits: Array, gradient: Array) -> Float[Array, ""]:
    """Zero, whose derivative by the parameters is gradient * dlogits/dparams."""
    return jnp.sum((logits - jax.lax.stop_gradient(logits)) * gradient)


def _has_noise(node: Any) -> bool:
    return bool(jax.tree.leaves(node.noise))


def _check_taken(graph: Graph, taken: list[str]) -> None:
    if not taken:
        raise ValueError(
            "program has no node that this estimator treats, needs one over Bernoulli "
            "or, for REBAR and relaxations, OneHotCategorical; use score_function"
        )
    for name in taken:
        if graph.nodes[name].loops:
            raise ValueError(
                f"node {name!r} stands in a scan, needs a place outside of loops, "
                "because each of its rounds would need runs of its own; use "
                "score_function, or write the loop out"
            )
