"""A program evaluated with every draw, log-probability and cost on record.

    record = execute(trace(program, params, key, inputs), ...)

The traced program is walked operation by operation, in JAX's own arithmetic, so all of
it differentiates, batches and compiles as the program itself would. Where a mark stands
its value goes on record; the rounds of a `scan` are stacked in front, outermost loop
first. A draw may be replaced by a given value: its log-probability is then that of the
value given, and all that follows it is evaluated anew.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array

from jaxpg.stochastic.influence import Graph, Site, body_of, graph_of, names_inside
from jaxpg.stochastic.nodes import DrawRule, cost_p, drawing_by, node_p
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["RETURNED", "NodeRecord", "Program", "Record", "Traced", "execute", "trace"]

Program: TypeAlias = Callable[..., Any]
"""`program(params, key, *inputs) -> cost`, or `(cost, output)` with `has_aux`."""

RETURNED = "returned"
"""The name of the cost that a program returns."""


class NodeRecord(NamedTuple):
    """What happened at a node; the rounds of its loops are in front.

    Attributes:
        value: the draw.
        log_prob: of the draw, in nats; 0 where gradients pass through it.
        baseline: that the program gave it, one for each independent draw.
        distribution: it came from; None if that is no tree of arrays.
        noise: what the draw was made of, if its rule kept it.
    """

    value: PyTree
    log_prob: Array
    baseline: Array
    distribution: Any
    noise: PyTree


class Record(NamedTuple):
    """One evaluation of a program.

    Attributes:
        nodes: by name.
        costs: by name, the returned one as "returned".
        output: what the program returned beside its cost.
    """

    nodes: dict[str, NodeRecord]
    costs: dict[str, Array]
    output: PyTree

    @property
    def total(self) -> Array:
        """The sum of all costs."""
        return sum((jnp.sum(cost) for cost in self.costs.values()), jnp.zeros(()))


class Traced(NamedTuple):
    """A traced program, its graph, and how to read its results."""

    program: ClosedJaxpr
    graph: Graph
    output_tree: Any


def trace(
    program: Program,
    params: Params,
    key: PRNGKey,
    inputs: tuple[PyTree, ...] = (),
    *,
    rule: DrawRule | None = None,
    has_aux: bool = False,
) -> Traced:
    """Trace a program once, and read its graph.

    Args:
        program: `program(params, key, *inputs)`; it returns its last cost, a scalar.
        params: of the program.
        key: for its draws.
        inputs: what else it takes.
        rule: how nodes draw; None for each distribution's own way.
        has_aux: whether it returns `(cost, output)`.

    Returns:
        The traced program.

    Raises:
        ValueError: if the cost is no floating scalar, no node is marked, two marks
            share a name, or one stands where it cannot be followed.
    """

    def with_output(params: Params, key: PRNGKey, inputs: tuple[PyTree, ...]) -> Any:
        result = program(params, key, *inputs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(
                f"program returns {type(result).__name__}, needs (cost, output), as "
                "has_aux=True says"
            )
        cost, output = result if has_aux else (result, ())
        return _scalar(cost, has_aux), output

    with drawing_by(rule):
        closed, shapes = jax.make_jaxpr(with_output, return_shape=True)(
            params, key, inputs
        )
    graph = graph_of(closed)
    if not graph.nodes:
        raise ValueError(
            "program marks no node, needs at least one; draw with "
            "jaxpg.stochastic.sample(key, distribution)"
        )
    graph.costs[RETURNED] = Site((), graph.results[0])
    return Traced(closed, graph, jax.tree.structure(shapes))


def execute(
    traced: Traced,
    params: Params,
    key: PRNGKey,
    inputs: tuple[PyTree, ...] = (),
    *,
    given: Mapping[str, PyTree] | None = None,
) -> Record:
    """Evaluate a traced program.

    Args:
        traced: by `trace`, for arguments of these shapes.
        params: of the program.
        key: for its draws.
        inputs: what else it takes.
        given: values in the place of draws, by node, of the draws' own shapes and types
            with the rounds of their loops in front.

    Returns:
        The record.

    Raises:
        ValueError: if a node that is given is unknown, or its distribution cannot be
            asked again because it is no tree of arrays.
    """
    given = dict(given or {})
    unknown = sorted(set(given) - set(traced.graph.nodes))
    if unknown:
        raise ValueError(
            f"given names {unknown[0]!r}, needs one of {', '.join(traced.graph.nodes)}"
        )
    arguments = jax.tree.leaves((params, key, inputs))
    outs, marks = _evaluate(traced.program, arguments, given)
    cost, output = jax.tree.unflatten(traced.output_tree, outs)
    nodes = {name: mark for name, mark in marks.items() if isinstance(mark, NodeRecord)}
    costs = {name: marks[name] for name in traced.graph.costs if name in marks}
    return Record(nodes, costs | {RETURNED: cost}, output)


Marks: TypeAlias = dict[str, Any]


def _evaluate(
    closed: ClosedJaxpr, arguments: list[Any], given: Marks
) -> tuple[list[Any], Marks]:
    jaxpr = closed.jaxpr
    marks: Marks = {}
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        outs, found = _evaluate_eqn(eqn, ins, given)
        marks |= found
        values |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars], marks


def _evaluate_eqn(eqn: Any, ins: list[Any], given: Marks) -> tuple[list[Any], Marks]:
    if eqn.primitive is node_p:
        return _evaluate_node(eqn.params, ins, given)
    if eqn.primitive is cost_p:
        return ins, {eqn.params["name"]: ins[0]}
    if eqn.primitive.name == "scan" and _holds_marks(eqn.params["jaxpr"]):
        return _evaluate_scan(eqn.params, ins, given)
    body = body_of(eqn)
    if body is not None and _holds_marks(body):
        run = lambda ins: _evaluate(body, ins, given)  # noqa: E731
        if "prevent_cse" in eqn.params:
            settings = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
            run = jax.checkpoint(run, **settings)
        return run(ins)
    settings = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*ins, **settings)
    return (list(out) if eqn.primitive.multiple_results else [out]), {}


def _evaluate_node(
    settings: dict[str, Any], ins: list[Any], given: Marks
) -> tuple[list[Any], Marks]:
    name, num_values = settings["name"], settings["num_values"]
    value_tree, other_tree = settings["trees"]
    values = ins[:num_values]
    others = jax.tree.unflatten(other_tree, ins[num_values:])
    log_prob, baseline, distribution, noise = others
    if name in given:
        values = jax.tree.leaves(given[name])
        log_prob = _log_prob_again(
            name, distribution, jax.tree.unflatten(value_tree, values), settings
        )
    value = jax.tree.unflatten(value_tree, values)
    record = NodeRecord(value, log_prob, baseline, distribution, noise)
    return values, {name: record}


def _log_prob_again(
    name: str, distribution: Any, value: PyTree, settings: dict[str, Any]
) -> Array:
    if distribution is None:
        raise ValueError(
            f"the distribution of node {name!r} is no tree of arrays, needs to be one "
            "for a value to be put in its draw's place; make it a NamedTuple of arrays"
        )
    log_prob = type(distribution).log_prob
    for _ in range(settings["num_vmaps"]):
        log_prob = jax.vmap(log_prob)
    return log_prob(distribution, jax.lax.stop_gradient(value))


def _evaluate_scan(
    settings: dict[str, Any], ins: list[Any], given: Marks
) -> tuple[list[Any], Marks]:
    body = settings["jaxpr"]
    num_consts = settings["num_consts"]
    first_x = num_consts + settings["num_carry"]
    consts, carry, xs = ins[:num_consts], ins[num_consts:first_x], ins[first_x:]
    inside = set(names_inside(body))
    given = {name: value for name, value in given.items() if name in inside}

    def round_(carry: list[Any], x: tuple[list[Any], Marks]) -> Any:
        outs, marks = _evaluate(body, [*consts, *carry, *x[0]], x[1])
        return outs[: len(carry)], (outs[len(carry) :], marks)

    carry, (ys, marks) = jax.lax.scan(
        round_,
        carry,
        (xs, given),
        length=settings["length"],
        reverse=settings["reverse"],
        unroll=settings["unroll"],
    )
    return [*carry, *ys], marks


def _holds_marks(jaxpr: Any) -> bool:
    return next(names_inside(jaxpr), None) is not None


def _scalar(cost: Any, has_aux: bool) -> Array:
    if isinstance(cost, tuple):
        cure = "use has_aux=True for (cost, output)"
    else:
        cure = "sum it, or jax.vmap the operator over the data"
    cost = jnp.asarray(cost) if isinstance(cost, float) else cost
    if not (isinstance(cost, jax.Array) and cost.shape == () and _is_real(cost)):
        came = getattr(cost, "aval", None) or type(cost).__name__
        raise ValueError(
            f"program returns the cost {came}, needs one floating number per sample; "
            f"{cure}"
        )
    return cost


def _is_real(x: Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))
