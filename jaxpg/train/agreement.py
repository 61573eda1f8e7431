"""How several processes stay of one mind.

What concerns files, names, clocks and signals is decided by process 0 and told to the
others, because two processes that go different ways wait for each other forever. All
must call each of these in the same order. With one process, they cost nothing.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["agree", "check_same", "decide", "is_first", "wait_for_all"]

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def decide(choose: Callable[[], T]) -> T:
    """Let process 0 choose for all.

    Args:
        choose: called in process 0 alone; what it returns must be plain JSON.

    Returns:
        What it returned, in every process.

    Raises:
        ValueError: in every process, if it raised one.
    """
    if jax.process_count() == 1:
        return choose()
    verdict: dict[str, Any] = {}
    if is_first():
        try:
            verdict = {"value": choose()}
        except ValueError as error:
            verdict = {"refused": str(error)}
    verdict = _from_first(verdict)
    if "refused" in verdict:
        raise ValueError(verdict["refused"])
    return verdict["value"]


def check_same(name: str, mine: dict[str, Any]) -> None:
    """Refuse settings that differ from those of process 0.

    Args:
        name: what they are settings of.
        mine: this process's, as plain JSON.

    Raises:
        ValueError: in the processes whose settings differ.
    """
    theirs = decide(lambda: mine)
    for field in mine if json.dumps(theirs) != json.dumps(mine) else ():
        if json.dumps(theirs.get(field)) != json.dumps(mine[field]):
            raise ValueError(
                f"{field} of {name} is {mine[field]!r} in process "
                f"{jax.process_index()}, but {theirs.get(field)!r} in process 0; "
                "start all processes with the same settings"
            )


def agree(number: int, pace: int) -> tuple[int, int]:
    """The largest `number` of all processes, and process 0's `pace`."""
    if jax.process_count() == 1:
        return number, pace
    mine = np.array([number, pace], np.int32)
    table = np.asarray(multihost_utils.process_allgather(mine))
    return int(table[:, 0].max()), int(table[0, 1])


def wait_for_all(reached: str) -> None:
    """Wait until every process has come to the same place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(reached)


def _from_first(message: Any) -> Any:
    """Process 0's message, as a text of a length that few programs are compiled for."""
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    length = multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32))
    padded = np.zeros(1 << max(int(length) - 1, 1023).bit_length(), np.uint8)
    if is_first():
        padded[: len(text)] = text
    padded = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return json.loads(padded[: int(length)].tobytes())
