"""When the host looks in on the devices, and how it hears that it is to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["MAX_UPDATES_PER_CALL", "next_pace", "received_signals"]

MAX_UPDATES_PER_CALL = 64
"""The most updates between two visits; metrics have room for no more."""

SECONDS_BETWEEN_VISITS = 1.0


def next_pace(count: int, seconds: float) -> int:
    """Updates until the next visit, a second or so away.

    Args:
        count: updates since the last visit.
        seconds: that they took.

    Returns:
        At most twice as many, so that one quick visit does not make the next one long.

    >>> next_pace(4, 8.0), next_pace(4, 0.1)
    (1, 8)
    """
    wanted = round(count * SECONDS_BETWEEN_VISITS / max(seconds, 1e-6))
    return max(1, min(wanted, 2 * count, MAX_UPDATES_PER_CALL))


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, to end between visits; a second one ends at once.

    Yields:
        A list that grows: 0, which is no signal, and the numbers of those that came.
    """
    received = [0]

    def remember(number: int, frame: Any) -> None:
        if any(received):
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {n: signal.signal(n, remember) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be caught
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
