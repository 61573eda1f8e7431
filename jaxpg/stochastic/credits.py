"""Sums along the graph: the costs after a draw, and the scores before a cost.

    credit[z]  = sum of the costs that z's draw reaches        (reward-to-go)
    history[c] = sum of log-probabilities of the draws that reach c

Both read the same labels, in opposite directions. In a loop a draw is credited with
costs of its own round where they meet in it, and of later rounds where the loop's carry
takes it there.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jaxpg.stochastic.execution import Record
from jaxpg.stochastic.influence import Graph, Label, Site

__all__ = ["credit_of", "history_of"]


def credit_of(graph: Graph, record: Record, name: str) -> Array:
    """The sum of all costs that a node's draws reach, for each round of its loops.

    Args:
        graph: of the program.
        record: one evaluation of it.
        name: of the node.

    Returns:
        One number for each round of the node's loops, in the costs' units.

    Bias: none: a score times costs that its draw cannot reach has mean zero.

    Reference: Schulman et al. 2015, theorem 1.
    """
    node = graph.nodes[name]
    credit = jnp.zeros(_rounds(node), record.costs["returned"].dtype)
    for cost_name, site in graph.costs.items():
        for label in sorted(site.ancestors):
            if label[0] == name:
                later = _along(record.costs[cost_name], label, site, ahead=True)
                credit = credit + _spread(later, node)
    return credit


def history_of(graph: Graph, record: Record, site: Site) -> Array:
    """The sum of log-probabilities of all draws that reach a mark, round by round.

    Args:
        graph: of the program.
        record: one evaluation of it.
        site: of a cost or a node; a node's own draw is not in its history.

    Returns:
        One number for each round of the mark's loops, in nats.
    """
    history = jnp.zeros(_rounds(site))
    for label in sorted(site.ancestors):
        node = graph.nodes[label[0]]
        earlier = _along(record.nodes[label[0]].log_prob, label, node, ahead=False)
        history = history + _spread(earlier, site)
    return history


def _along(x: Array, label: Label, site: Site, *, ahead: bool) -> Array:
    """Add up what the label relates: over rounds it does not name, and past ones."""
    _, past = label
    depth = len(past)
    x = jnp.sum(x, axis=tuple(range(depth, x.ndim)))
    if not (past and past[-1]):
        return x
    axis = depth - 1
    # `reverse` runs a loop from its last round to its first.
    from_the_end = ahead != site.loops[axis].reverse
    flipped = jnp.flip(x, axis) if from_the_end else x
    before = jnp.cumsum(flipped, axis) - flipped
    return jnp.flip(before, axis) if from_the_end else before


def _spread(x: Array, site: Site) -> Array:
    rounds = _rounds(site)
    missing = (1,) * (len(rounds) - x.ndim)
    return jnp.broadcast_to(x.reshape(*x.shape, *missing), rounds)


def _rounds(site: Site) -> tuple[int, ...]:
    return tuple(loop.length for loop in site.loops)
