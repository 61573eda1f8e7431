"""Argument checks and their error sentences.

Every check answers four questions: which argument, what came, what is needed, and
how to mend it. They run on static facts (shapes, Python numbers) and on arrays that are
known, so under `jit` they cost nothing: they happen while tracing, and values that are
traced then pass unseen. What is wrong with those is counted in an update's info.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "check_choice",
    "check_divides",
    "check_no_nan",
    "check_not_empty",
    "check_positive",
    "check_range",
    "check_rank",
    "check_same_shape",
    "is_concrete",
    "nearest",
]


def check_positive(name: str, value: int, cure: str = "") -> None:
    """Refuse counts that are not whole numbers of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            _sentence(f"{name} is {value!r}", "a whole number of at least 1", cure)
        )


def check_range(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    cure: str = "",
) -> None:
    """Refuse Python numbers outside [low, high], or (low, high] with `open_low`."""
    if not isinstance(value, (int, float)):
        return  # a traced value: nothing static is known
    above = value > low if open_low else value >= low
    if not (above and value <= high):
        bracket = "(" if open_low else "["
        need = f"a number in {bracket}{low:g}, {high:g}]"
        raise ValueError(_sentence(f"{name} is {value!r}", need, cure))


def check_rank(name: str, array: Any, rank: int, meaning: str) -> None:
    """Refuse arrays of another rank, for example a batch where one path is meant."""
    if array.ndim != rank:
        raise ValueError(f"{name} has shape {array.shape}, needs {meaning}")


def check_same_shape(**arrays: Any) -> None:
    """Refuse arrays whose shapes differ from the first one's."""
    (first, reference), *others = arrays.items()
    for name, array in others:
        if array.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {array.shape}, but {first} has shape "
                f"{reference.shape}: they must agree element by element"
            )


def check_not_empty(name: str, array: Any, cure: str = "") -> None:
    """Refuse arrays without an entry."""
    if 0 in array.shape:
        came = f"{name} has shape {array.shape}, which is empty"
        raise ValueError(_sentence(came, "at least one entry", cure))


def check_no_nan(name: str, array: Any, mask: Any = True) -> None:
    """Refuse NaN where `mask` is set, in arrays that are known."""
    if not is_concrete(array, mask):
        return
    with jax.ensure_compile_time_eval():  # a constant inside `jit` is known as well
        count = int(jnp.sum(jnp.isnan(array) & mask))
    if count:
        raise ValueError(
            f"{name} has {count} entries that are NaN, needs numbers; "
            "where there is no decision use jnp.where(mask, x, 0.0)"
        )


def is_concrete(*arrays: Any) -> bool:
    """Whether the values of all arrays are known, not traced."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_divides(
    part_name: str, part: int, whole_name: str, whole: int, cure: str = ""
) -> None:
    """Refuse a part that does not divide the whole, and name parts that do."""
    if whole % part == 0:
        return
    below = max(n for n in range(1, part) if whole % n == 0)
    need = f"a divisor of {whole_name} = {whole}"
    raise ValueError(
        _sentence(f"{part_name} is {part}", need, cure or f"the nearest is {below}")
    )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse names that are not in `choices`, and suggest the nearest."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, unknown; {nearest(value, choices)}")


def nearest(value: str, choices: Sequence[str]) -> str:
    """A phrase that offers the closest of `choices`.

    >>> nearest("CartPole", ["CartPole-v1", "Pendulum-v1"])
    "did you mean 'CartPole-v1'?"
    """
    lowered = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value.lower(), lowered, n=3, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(repr(lowered[c]) for c in close)}?"
    return f"choose one of {', '.join(choices)}"


def _sentence(came: str, need: str, cure: str) -> str:
    return f"{came}, needs {need}" + (f"; {cure}" if cure else "")
