"""Which draw can move which cost, read off the traced program.

A label `(node, past)` on a value says that the node's draw reached it. `past` holds one
flag for each loop that both are in, outermost first: False for a draw of the same round
of that loop, True for one of earlier rounds (of any, in the loops further in, which the
label then no longer tells apart):

    (z, ())             z stands in no loop with the value: all its draws reach it
    (z, (False,))       the draw of the same round
    (z, (True,))        the draws of earlier rounds
    (z, (False, True))  same round of the outer loop, earlier rounds of the inner one

Labels flow through operations as sets; a loop is walked until its carry brings no new
ones. Pieces that are jitted are looked into, all other nested functions without marks
(`cond`, `while`, custom derivatives) are taken as one operation: what goes in reaches
all that comes out. Marks inside those are refused.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend.core import ClosedJaxpr, Literal

from jaxpg.stochastic.nodes import cost_p, node_p

__all__ = ["Graph", "Label", "Loop", "Site", "body_of", "graph_of", "names_inside"]

Label: TypeAlias = tuple[str, tuple[bool, ...]]
Labels: TypeAlias = frozenset[Label]

_NOTHING: Labels = frozenset()


class Loop(NamedTuple):
    """One `scan` of the program.

    Attributes:
        number: tells loops apart.
        length: its rounds.
        reverse: whether they run from the last to the first.
    """

    number: int
    length: int
    reverse: bool


class Site(NamedTuple):
    """A mark of the program.

    Attributes:
        loops: it stands in, outermost first.
        ancestors: the draws that reach it.
        scored: whether it is a node whose draws have a score.
    """

    loops: tuple[Loop, ...]
    ancestors: Labels
    scored: bool = False


class Graph(NamedTuple):
    """The marks by name, in the order of the program, and what reaches its results."""

    nodes: dict[str, Site]
    costs: dict[str, Site]
    results: list[Labels]


def graph_of(program: ClosedJaxpr) -> Graph:
    """Read nodes, costs and their ancestors off a traced program.

    Args:
        program: as `jax.make_jaxpr` returns it.

    Returns:
        The graph.

    Raises:
        ValueError: if two marks have one name, or one stands in a `cond` or a `while`.
    """
    _check_names(list(names_inside(program)))
    graph, numbers = Graph({}, {}, []), itertools.count()
    inputs = [_NOTHING] * len(program.jaxpr.invars)
    results = _walk(program, inputs, (), graph, numbers)
    return graph._replace(results=results)


def names_inside(jaxpr: Any) -> Iterator[str]:
    """The names of all marks, in the order of the program."""
    for eqn in _open(jaxpr).eqns:
        if eqn.primitive in (node_p, cost_p):
            yield eqn.params["name"]
        for inner in _nested(eqn):
            yield from names_inside(inner)


def body_of(eqn: Any) -> ClosedJaxpr | None:
    """What an operation runs once, as it is: `jit`, `checkpoint`; None for others."""
    if eqn.primitive.name not in _WRAPPERS:
        return None
    (body,) = _nested(eqn)
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


_WRAPPERS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")


def _walk(
    jaxpr: ClosedJaxpr,
    inputs: Sequence[Labels],
    loops: tuple[Loop, ...],
    graph: Graph,
    numbers: Iterator[int],
) -> list[Labels]:
    """Carry labels through a function; the marks met on the way go into the graph."""
    known = dict(zip(jaxpr.jaxpr.invars, inputs, strict=True))

    def labels(atom: Any) -> Labels:
        return _NOTHING if isinstance(atom, Literal) else known.get(atom, _NOTHING)

    for eqn in jaxpr.jaxpr.eqns:
        ins = [labels(atom) for atom in eqn.invars]
        if eqn.primitive is node_p:
            outs = [_walk_node(eqn, ins, loops, graph)] * len(eqn.outvars)
        elif eqn.primitive.name == "scan":
            outs = _walk_scan(eqn, ins, loops, graph, numbers)
        elif (body := body_of(eqn)) is not None:
            outs = _walk(body, ins, loops, graph, numbers)
        else:
            _refuse_marks(eqn)
            outs = [frozenset().union(*ins)] * len(eqn.outvars)
        if eqn.primitive is cost_p:
            graph.costs[eqn.params["name"]] = Site(loops, outs[0])
        known |= dict(zip(eqn.outvars, outs, strict=True))
    return [labels(atom) for atom in jaxpr.jaxpr.outvars]


def _walk_node(
    eqn: Any, ins: list[Labels], loops: tuple[Loop, ...], graph: Graph
) -> Labels:
    ancestors: Labels = frozenset().union(*ins)
    name, scored = eqn.params["name"], eqn.params["scored"]
    graph.nodes[name] = Site(loops, ancestors, scored)
    return ancestors | {(name, (False,) * len(loops))}


def _walk_scan(
    eqn: Any,
    ins: list[Labels],
    loops: tuple[Loop, ...],
    graph: Graph,
    numbers: Iterator[int],
) -> list[Labels]:
    loop = Loop(next(numbers), eqn.params["length"], eqn.params["reverse"])
    num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, xs = _split(ins, num_consts, num_carry)
    depth = len(loops)
    while True:
        inputs = [*consts, *carry, *xs]
        outs = _walk(eqn.params["jaxpr"], inputs, (*loops, loop), graph, numbers)
        grown = [
            old | {_aged(label, depth) for label in new}
            for old, new in zip(carry, outs, strict=False)
        ]
        if grown == carry:
            break
        carry = grown
    return [frozenset((name, past[:depth]) for name, past in out) for out in outs]


def _aged(label: Label, depth: int) -> Label:
    """What a draw of this round is called in the next."""
    name, past = label
    return (name, (*past[:depth], True)) if len(past) > depth else label


def _split(items: list[Any], *sizes: int) -> list[list[Any]]:
    ends = [0, *itertools.accumulate(sizes), len(items)]
    return [items[low:high] for low, high in itertools.pairwise(ends)]


def _nested(eqn: Any) -> list[Any]:
    """The functions among an operation's settings."""
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return [leaf for leaf in leaves if _is_jaxpr(leaf)]


def _is_jaxpr(x: Any) -> bool:
    return (hasattr(x, "eqns") and hasattr(x, "outvars")) or isinstance(x, ClosedJaxpr)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _refuse_marks(eqn: Any) -> None:
    names = [name for inner in _nested(eqn) for name in names_inside(inner)]
    if names:
        raise ValueError(
            f"the mark {names[0]!r} stands inside {eqn.primitive.name!r}, needs a "
            "place in the program itself, in a jit or in a scan; draw before a cond "
            "and choose afterwards with jnp.where, and make a while a scan over a "
            "fixed number of rounds"
        )


def _check_names(names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"name is {twice[0]!r} for {names.count(twice[0])} marks of the program, "
            "needs one of its own for each; pass name= to sample and cost (a scan is "
            "one mark for all its rounds)"
        )
