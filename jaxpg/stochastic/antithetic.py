"""ARM and DisARM: two runs on opposite noise take each other's level away.

    b = 1[u < p],   b' = 1[1 - u < p],   p = sigmoid(logits)

    ARM     g = (f(b') - f(b)) (u - 1/2)
    DisARM  g = 1/2 (f(b) - f(b')) (-1)^b' 1[b != b'] sigmoid(|logits|)

DisARM is ARM with u integrated out given both draws, so its variance is never larger.
f is the cost that the node's draw reaches, with all later draws made anew from the same
keys; nodes that are not over bits keep their scores.

References: Yin and Zhou 2019, "ARM: augment-REINFORCE-merge gradient for stochastic
binary networks"; Dong, Mnih and Tucker 2020, "DisARM: an antithetic gradient estimator
for binary latent variables".
"""

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg.distributions import Bernoulli
from jaxpg.stochastic.execution import Program
from jaxpg.stochastic.nodes import Draw
from jaxpg.stochastic.reruns import Run, begin, by_noise, carried, with_scores
from jaxpg.stochastic.score import Loss, Report, averaged, report_of
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["arm", "disarm"]

InLogits: TypeAlias = Callable[[Array, Any, Array, Array], Array]


def arm(program: Program, **settings: Any) -> Loss:
    """Augment, reinforce, merge: g = (f(b') - f(b)) (u - 1/2), in the logits.

    Args:
        program: as for `score_function`, with a node over `Bernoulli` outside of loops.
        **settings: as for `disarm`.

    Returns:
        A loss as `disarm` returns.

    Raises:
        ValueError: as `disarm`.

    Bias: unbiased.

    Reference: Yin and Zhou 2019, theorem 1.
    """
    return _on_opposite_noise(program, _arm, **settings)


def disarm(program: Program, **settings: Any) -> Loss:
    """Antithetic draws: g = 1/2 (f(b) - f(b')) (-1)^b' 1[b != b'] sigmoid(|logits|).

    Args:
        program: as for `score_function`, with a node over `Bernoulli` outside of loops.
        **settings: `nodes`, which to treat, None for all over `Bernoulli`;
            `num_samples` pairs to average, None for one without an axis in front;
            `has_aux`, whether the program returns `(cost, output)`.

    Returns:
        `loss(params, key, *inputs) -> (cost, report)`: cost and its own derivative are
        means over the runs, one more than there are nodes to treat; the report is the
        first one's. All other nodes keep their scores.

    Raises:
        ValueError: if no node is over `Bernoulli`, one that is named is not, or one
            stands in a loop.

    Bias: unbiased.

    Reference: Dong et al. 2020, equation 9; Yin, Ho, Yan, Qian and Zhou 2020.

    >>> from jaxpg.stochastic import sample
    >>> def program(logit, key):
    ...     bit = sample(key, Bernoulli(logit[None]))[0]
    ...     return (bit.astype(logit.dtype) - 0.45) ** 2
    >>> slope, _ = jax.grad(disarm(program), has_aux=True)(
    ...     jnp.array(0.0), jax.random.key(0)
    ... )
    >>> round(slope.item(), 6)  # one bit at even odds: exact whatever is drawn
    0.025
    """
    return _on_opposite_noise(program, _disarm, **settings)


def _on_opposite_noise(
    program: Program,
    in_logits: InLogits,
    *,
    nodes: Collection[str] | None = None,
    num_samples: int | None = None,
    has_aux: bool = False,
) -> Loss:
    rule = by_noise((Bernoulli,), nodes)

    def loss(
        params: Params, key: PRNGKey, *inputs: PyTree
    ) -> tuple[Float[Array, ""], Report]:
        run, taken, again = begin(
            program, params, key, inputs, rule=rule, nodes=nodes, has_aux=has_aux
        )
        opposites = {name: again({name: _opposite(run, name)}) for name in taken}
        runs = [run, *opposites.values()]
        costs = [with_scores(each, but=taken) for each in runs]
        total = jnp.mean(jnp.stack(costs))
        for name, opposite in opposites.items():
            total = total + _carried(in_logits, name, run, opposite)
        return total, report_of(run.record, run.signals)

    return averaged(loss, num_samples)


def _opposite(run: Run, name: str) -> Draw:
    node = run.record.nodes[name]
    u = 1.0 - node.noise
    bits = u < jax.nn.sigmoid(node.distribution.logits)
    return Draw(bits.astype(node.value.dtype), u)


def _carried(in_logits: InLogits, name: str, run: Run, opposite: Run) -> Array:
    node, other = run.record.nodes[name], opposite.record.nodes[name]
    more = run.signals.credits[name] - opposite.signals.credits[name]
    logits = node.distribution.logits
    held = jax.lax.stop_gradient(logits)
    gradient = in_logits(more[..., None], node, other.value, held)
    return carried(logits, jax.lax.stop_gradient(gradient))


def _arm(more: Array, node: Any, other: Array, logits: Array) -> Array:
    return -more * (node.noise - 0.5)


def _disarm(more: Array, node: Any, other: Array, logits: Array) -> Array:
    differ = (node.value != other).astype(logits.dtype)
    sign = jnp.where(other > 0, -1.0, 1.0)
    return 0.5 * more * sign * differ * jax.nn.sigmoid(jnp.abs(logits))
