"""Marks inside an ordinary JAX function: what is drawn, and what is paid on the way.

    def program(params, key):
        z = sample(key, Bernoulli(params["logits"]), name="z")
        cost(price(z), name="price")
        return error(params, z)

Outside the operators of this room both marks are identities: the program runs as it
stands, under `jit`, `vmap` and `scan`. Inside, an operator reads from the traced
program which draw can move which cost (`influence`), and evaluates it with every draw,
log-probability and cost on record (`execution`).

Reference: Schulman, Heess, Weber and Abbeel 2015, "Gradient estimation using stochastic
computation graphs".
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxpg.types import PRNGKey, PyTree

__all__ = ["Draw", "DrawRule", "cost", "cost_p", "drawing_by", "node_p", "sample"]


class Draw(NamedTuple):
    """What a rule draws in a node's place.

    Attributes:
        value: what the program goes on with.
        noise: what it was made of, kept on record for estimators that reuse it.
        differentiable: whether gradients may pass through the value. Then the node is
            no stochastic one any more, and has no score.
    """

    value: PyTree
    noise: PyTree = ()
    differentiable: bool = False


DrawRule = Callable[[str, PRNGKey, Any], Draw | None]
"""`rule(name, key, distribution)`; None leaves a node to its own distribution."""

# A part of JAX's cache keys, so that a jitted piece of a program that was traced under
# one rule is traced anew under another.
_RULE = jax.make_user_context(None)


@contextlib.contextmanager
def drawing_by(rule: DrawRule | None) -> Iterator[None]:
    """Draw by `rule` whatever is sampled while a program is traced.

    Args:
        rule: how; None for every distribution's own way.
    """
    with _RULE(rule):
        yield


def sample(
    key: PRNGKey,
    distribution: Any,
    *,
    name: str | None = None,
    baseline: Array | float = 0.0,
) -> PyTree:
    """Draw from a distribution, and mark the draw as a stochastic node.

        z ~ p(. | what came before),  with its score on record

    Args:
        key: consumed.
        distribution: of `jaxpg.distributions`, or any object with `sample(key)` and
            `log_prob(value)` in nats. Leading axes are independent draws.
        name: by which baselines and reports call the node, unique in a program; the
            distribution's class in small letters if left out. A node in a loop has one
            name for all its rounds.
        baseline: what the program expects to pay from here on, one number or one for
            each independent draw; held constant where it weighs the score, and
            reported as it is, so that it can be fitted to the credits. Computed before
            the draw, it cannot know it, so it is always a valid one.

    Returns:
        The draw. No gradient passes through it: that is what its score is for.

    Raises:
        ValueError: if the distribution lacks `sample` or `log_prob`.

    Bias: none; a draw.

    >>> from jaxpg.distributions import Categorical
    >>> int(sample(jax.random.key(0), Categorical(jnp.array([-jnp.inf, 0.0]))))
    1
    """
    for method in ("sample", "log_prob"):
        if not callable(getattr(distribution, method, None)):
            raise ValueError(
                f"distribution is a {type(distribution).__name__} without {method!r}, "
                "needs sample(key) and log_prob(value); wrap it in a NamedTuple that "
                "has both, or use one of jaxpg.distributions"
            )
    name = type(distribution).__name__.lower() if name is None else name
    rule = _RULE.value
    draw = None if rule is None else rule(name, key, distribution)
    draw = Draw(distribution.sample(key)) if draw is None else draw
    return _mark(name, distribution, draw, baseline)


def cost(value: Array, *, name: str = "cost") -> Array:
    """Mark a scalar that is paid here: draws that come later are not blamed for it.

    Args:
        value: one number; under the program's own `scan` one for each round.
        name: by which reports call it, unique in a program.

    Returns:
        The value, for whoever wants it; that it counts needs no use of it.

    Raises:
        ValueError: if it is not a scalar.

    Bias: none.

    >>> float(cost(jnp.array(2.0)))
    2.0
    """
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"cost {name!r} has shape {value.shape} and type {value.dtype}, needs one "
            "floating number per sample; sum it, or jax.vmap the operator over the data"
        )
    return cost_p.bind(value, name=name)


def _mark(name: str, distribution: Any, draw: Draw, baseline: Any) -> PyTree:
    value = draw.value
    if draw.differentiable:
        log_prob = jnp.zeros(())
    else:
        value = jax.lax.stop_gradient(value)
        log_prob = distribution.log_prob(value)
    baseline = jnp.asarray(baseline, log_prob.dtype)
    if baseline.shape not in ((), log_prob.shape):
        raise ValueError(
            f"baseline of node {name!r} has shape {baseline.shape}, needs () or "
            f"{log_prob.shape} = one number for each independent draw"
        )
    baseline = jnp.broadcast_to(baseline, log_prob.shape)
    if not _is_tree_of_arrays(distribution):
        distribution = None
    values, value_tree = jax.tree.flatten(value)
    others, other_tree = jax.tree.flatten(
        (log_prob, baseline, distribution, draw.noise)
    )
    outs = node_p.bind(
        *map(jnp.asarray, values),
        *map(jnp.asarray, others),
        name=name,
        num_values=len(values),
        trees=(value_tree, other_tree),
        scored=not draw.differentiable,
        num_vmaps=0,
    )
    return jax.tree.unflatten(value_tree, outs)


def _is_tree_of_arrays(distribution: Any) -> bool:
    leaves = jax.tree.leaves(distribution)
    return all(isinstance(leaf, (jax.Array, np.ndarray, float, int)) for leaf in leaves)


node_p = Primitive("stochastic_node")
node_p.multiple_results = True
cost_p = Primitive("cost")


def _node_values(*operands: Any, num_values: int, **_: Any) -> list[Any]:
    return list(operands[:num_values])


def _batch_node(
    operands: Any, axes: Any, *, num_vmaps: int, num_values: int, **settings: Any
) -> tuple[list[Array], list[int]]:
    size = next(
        x.shape[axis]
        for x, axis in zip(operands, axes, strict=True)
        if axis is not None
    )
    operands = [
        batching.bdim_at_front(x, axis, size)
        for x, axis in zip(operands, axes, strict=True)
    ]
    settings |= {"num_vmaps": num_vmaps + 1, "num_values": num_values}
    return node_p.bind(*operands, **settings), [0] * num_values


def _batch_cost(operands: Any, axes: Any, *, name: str) -> tuple[Array, int]:
    (value,), (axis,) = operands, axes
    return cost_p.bind(jnp.moveaxis(value, axis, 0), name=name), 0


def _no_derivative(*_: Any, name: str, **__: Any) -> Any:
    raise ValueError(
        f"jax differentiates through the mark {name!r}, which would leave its score "
        "out; needs an operator around the program: jax.grad(score_function(program))"
    )


node_p.def_impl(_node_values)
node_p.def_abstract_eval(_node_values)
mlir.register_lowering(node_p, mlir.lower_fun(_node_values, multiple_results=True))
batching.primitive_batchers[node_p] = _batch_node
ad.primitive_jvps[node_p] = _no_derivative

cost_p.def_impl(lambda value, name: value)
cost_p.def_abstract_eval(lambda value, name: value)
mlir.register_lowering(
    cost_p, mlir.lower_fun(lambda value, name: value, multiple_results=False)
)
batching.primitive_batchers[cost_p] = _batch_cost
ad.primitive_jvps[cost_p] = _no_derivative
