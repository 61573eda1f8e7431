"""Gumbel-softmax and straight-through: biased, and often good enough.

    value = softmax((log p + gumbel) / temperature)        (sigmoid for bits)

A relaxed draw is no draw of the program any more, but of a smooth one beside it, and
gradients pass through it. Straight-through runs the program on the hard draw and
differentiates as if it were the soft one. They are here to be compared with.
"""

from collections.abc import Collection
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxpg._checks import check_range
from jaxpg.distributions import Bernoulli, OneHotCategorical
from jaxpg.stochastic.execution import Program
from jaxpg.stochastic.nodes import Draw, DrawRule
from jaxpg.stochastic.noise import from_noise, hard, relaxed, uniform_noise
from jaxpg.stochastic.reruns import takes
from jaxpg.stochastic.score import Loss, score_function
from jaxpg.types import PRNGKey

__all__ = ["gumbel_softmax"]


def gumbel_softmax(
    program: Program,
    *,
    temperature: float | Float[Array, ""],
    straight_through: bool = False,
    nodes: Collection[str] | None = None,
    **settings: Any,
) -> Loss:
    """Differentiate through relaxed draws.

        z = relax((log p + gumbel(u)) / temperature),     dC/dtheta = dC/dz dz/dtheta

    Args:
        program: as for `score_function`; what follows a relaxed node must take numbers
            between 0 and 1 (`OneHotCategorical`, not `Categorical`).
        temperature: above 0; towards 0 the bias vanishes and the variance explodes.
        straight_through: the program sees the hard draw, the gradient the soft one.
        nodes: which to relax; None for all over `Bernoulli` or `OneHotCategorical`.
            The others keep their scores.
        **settings: of `score_function`.

    Returns:
        A loss as `score_function` returns.

    Raises:
        ValueError: if the temperature is not positive, or a node that is named cannot
            be relaxed.

    Bias: biased for the program's expected cost. Unbiased for the relaxed program's own
        where `straight_through` is False.

    Reference: Jang et al. 2017; Maddison et al. 2017; Bengio, Leonard and Courville
        2013, "Estimating or propagating gradients through stochastic neurons".

    >>> import jax.numpy as jnp
    >>> from jaxpg.distributions import Bernoulli
    >>> from jaxpg.stochastic import sample
    >>> def program(logit, key):
    ...     return 2.0 * sample(key, Bernoulli(logit[None]))[0].astype(logit.dtype)
    >>> loss = gumbel_softmax(program, temperature=0.5, num_samples=1000)
    >>> slope, _ = jax.grad(loss, has_aux=True)(jnp.array(0.0), jax.random.key(0))
    >>> abs(slope.item() - 0.5) < 0.1  # a linear cost: little bias
    True
    """
    check_range("temperature", temperature, 0.0, open_low=True)
    rule = _relaxing(temperature, straight_through, nodes)
    return score_function(program, rule=rule, **settings)


def _relaxing(
    temperature: Any, straight_through: bool, nodes: Collection[str] | None
) -> DrawRule:
    def rule(name: str, key: PRNGKey, distribution: Any) -> Draw | None:
        if not takes(name, distribution, (Bernoulli, OneHotCategorical), nodes):
            return None
        u = uniform_noise(key, distribution)
        z = from_noise(distribution, u)
        soft = relaxed(distribution, z, temperature)
        if straight_through:
            value = hard(distribution, z).astype(soft.dtype)
            soft = value + (soft - jax.lax.stop_gradient(soft))
        return Draw(soft, u, differentiable=True)

    return rule
