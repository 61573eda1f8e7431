"""What weighs the scores of a run, and the surrogates that carry them.

    first order   C + sum_z weight[z] (log p(z) - |log p(z)|),    |x| held constant
    any order     sum_c c box(S[c]) + sum_z b[z] (1 - box(log p(z))) box(S[z])

S is the sum of log-probabilities of all draws that reach a mark, box the magic box.

References: Schulman et al. 2015, corollary 1; Foerster et al. 2018, "DiCE"; Mao et al.
2019, "A baseline for any order gradient estimation in stochastic computation graphs".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg.stochastic.credits import credit_of, history_of
from jaxpg.stochastic.execution import Record
from jaxpg.stochastic.influence import Graph
from jaxpg.surrogate import magic_box

__all__ = [
    "Levels",
    "Signals",
    "any_order",
    "first_order",
    "mean_of_others",
    "per_draw",
    "signals_of",
]

Levels = Mapping[str, Any]
"""One number for each node, or one for each round of its loops; by node."""


class Signals(NamedTuple):
    """What weighs the scores, by node: one for each independent draw, held constant.

    Attributes:
        credits: the costs that a draw reaches.
        levels: what is subtracted from them.
    """

    credits: dict[str, Array]
    levels: dict[str, Array]

    @property
    def excess(self) -> dict[str, Array]:
        """Credit less level."""
        return {name: x - self.levels[name] for name, x in self.credits.items()}


def signals_of(
    graph: Graph, record: Record, baselines: Levels | None = None
) -> Signals:
    """Credits and levels of one run.

    Args:
        graph: of the program.
        record: one evaluation of it.
        baselines: by node, in addition to those that the program gave.

    Returns:
        The signals of all scored nodes.

    Bias: none, as long as no baseline knows its own draw.
    """
    credits, levels = {}, {}
    for name, site in graph.nodes.items():
        if site.scored:
            node = record.nodes[name]
            given = per_draw((baselines or {}).get(name, 0.0), node.log_prob)
            credits[name] = per_draw(credit_of(graph, record, name), node.log_prob)
            levels[name] = node.baseline + given
    return jax.lax.stop_gradient(Signals(credits, levels))


def first_order(graph: Graph, record: Record, weights: Levels) -> Float[Array, ""]:
    """The costs, with sum_z weights[z] * grad log p(z) added to their derivative.

    Args:
        graph: of the program.
        record: one evaluation of it.
        weights: by node, one for each independent draw; nodes left out have none.

    Returns:
        The total cost.

    Bias: first derivative that of the weights; higher ones biased.
    """
    total = record.total
    for name, weight in weights.items():
        log_prob = record.nodes[name].log_prob
        score = log_prob - jax.lax.stop_gradient(log_prob)
        total = total + jnp.sum(jax.lax.stop_gradient(weight) * score)
    return total


def any_order(graph: Graph, record: Record, levels: Levels) -> Float[Array, ""]:
    """The costs in magic boxes, less controls that are zero at every order.

    Args:
        graph: of the program.
        record: one evaluation of it.
        levels: by node, baselines for each independent draw, held constant.

    Returns:
        The total cost, differentiable any number of times.

    Bias: none, at any order.

    Reference: Foerster et al. 2018, equation 8; Mao et al. 2019.
    """
    total = jnp.zeros(())
    for name, site in graph.costs.items():
        box = magic_box(history_of(graph, record, site))
        total = total + jnp.sum(record.costs[name] * per_draw(box, record.costs[name]))
    for name, level in levels.items():
        node = record.nodes[name]
        box = magic_box(history_of(graph, record, graph.nodes[name]))
        control = (1.0 - magic_box(node.log_prob)) * per_draw(box, node.log_prob)
        total = total + jnp.sum(jax.lax.stop_gradient(level) * control)
    return total


def mean_of_others(x: Float[Array, "K ..."]) -> Float[Array, "K ..."]:
    """Added up anew for each: taking oneself off the total leaves one's rounding."""
    number = x.shape[0]
    own = jnp.eye(number, dtype=bool).reshape(number, number, *(1,) * (x.ndim - 1))
    return jnp.sum(jnp.where(own, 0.0, x[None]), axis=1) / (number - 1)


def per_draw(x: Any, like: Array) -> Array:
    """Broadcast from the front: what holds for a round holds for all of its draws."""
    x = jnp.asarray(x, like.dtype)
    return jnp.broadcast_to(
        x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim)), like.shape
    )
