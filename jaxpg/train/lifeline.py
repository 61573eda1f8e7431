"""How the processes of one run meet, and how they hear of each other's end.

Each process holds one TCP connection to process 0. They meet before JAX starts, because
JAX aborts a process that cannot reach the others: here whatever does not fit is told
to all of them in a sentence. Then the connections stay open and silent. The kernel
closes those of a process that dies, whatever it was doing, so the others know at once
and need not wait for sums that never come.

Process 0 meets the others where JAX's coordinator listens afterwards, so that nothing
but that one port must be open between the hosts.

Each line sent is one JSON object: hello, an answer to it, and at the end one farewell.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Lifeline", "meet"]

SECONDS_BETWEEN_TRIES = 0.2
SECONDS_FOR_HELLO = 5.0
LONGEST_LINE = 65536

LEFT: dict[str, Any] = {"left": True}
WELCOME: dict[str, Any] = {"welcome": True}


class Connection(NamedTuple):
    """A socket, and its incoming lines."""

    socket: socket.socket
    reader: Any

    def send(self, message: dict[str, Any]) -> None:
        """Send one line; what cannot be sent has no one to hear it."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next line; None if there is none to come or it makes no sense."""
        try:
            message = json.loads(self.reader.readline(LONGEST_LINE))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """Hang up, also where a thread still listens."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.reader.close()
        self.socket.close()


class Lifeline:
    """The connections of one process: process 0's to all others, theirs to process 0.

    Args:
        connections: by the process at their other end.
    """

    def __init__(self, connections: dict[int, Connection]) -> None:
        self._connections = connections
        self._threads: list[threading.Thread] = []
        self._over = False

    def watch(self, on_end: Callable[[int, str | None], None]) -> None:
        """Call back once when another process fails or dies.

        Args:
            on_end: gets the process and why it failed, None if it died without a word;
                called in a thread of its own.
        """
        for peer, connection in self._connections.items():
            arguments = (peer, connection, on_end)
            thread = threading.Thread(target=self._listen, args=arguments, daemon=True)
            self._threads.append(thread)
            thread.start()

    def leave(self) -> None:
        """Tell the others that this process is done and may end."""
        self._over = True
        self._tell(LEFT)

    def fail(self, reason: str, patience: float = 0.0) -> None:
        """Tell the others that this process cannot go on.

        Args:
            reason: why.
            patience: how long to wait until they have ended, in seconds.
        """
        self._over = True
        self._tell({"failed": reason})
        deadline = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def close(self) -> None:
        """Hang up without a word."""
        self._over = True
        for connection in self._connections.values():
            connection.close()

    def _listen(
        self,
        peer: int,
        connection: Connection,
        on_end: Callable[[int, str | None], None],
    ) -> None:
        farewell = connection.receive()
        if farewell == LEFT or self._over:
            return
        self._over = True
        # Process 0 alone is connected to all, so it passes on what it hears.
        process, reason = peer, None
        if farewell is not None:
            process = farewell.get("process", peer)
            reason = farewell.get("failed")
        self._tell({"process": process, "failed": reason}, but=peer)
        on_end(process, reason)

    def _tell(self, message: dict[str, Any], but: int | None = None) -> None:
        for peer, connection in self._connections.items():
            if peer != but:
                connection.send(message)


def meet(
    host: str, port: int, num_processes: int, process_id: int, timeout: float
) -> Lifeline:
    """Wait until all processes of a run are there.

    Args:
        host: of process 0.
        port: where process 0 listens; free again for JAX when this returns.
        num_processes: how many there are.
        process_id: which one this is.
        timeout: how long to wait, in seconds.

    Returns:
        The open connections.

    Raises:
        ValueError: in every process that can be reached, if one does not come in time
            or they do not agree on how many they are.
    """
    deadline = time.monotonic() + timeout
    if process_id == 0:
        return Lifeline(_gather(host, port, num_processes, deadline, timeout))
    hello = {"process_id": process_id, "num_processes": num_processes}
    return Lifeline({0: _join(host, port, hello, deadline, timeout)})


def _gather(
    host: str, port: int, num_processes: int, deadline: float, timeout: float
) -> dict[int, Connection]:
    """Process 0's part: take in the others, or tell all why not."""
    come: dict[int, Connection] = {}
    last: Connection | None = None
    try:
        with _listener(host, port) as listener:
            while len(come) < num_processes - 1:
                last, hello = _next_hello(listener, deadline)
                if last is None:
                    raise ValueError(_missing(come, num_processes, timeout))
                _check_hello(hello, come, num_processes)
                come[hello["process_id"]] = last
    except ValueError as error:
        for connection in [*come.values(), *([last] if last else [])]:
            connection.send({"refused": str(error)})
            connection.close()
        raise
    for connection in come.values():
        connection.send(WELCOME)
    return come


def _listener(host: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"coordinator is {host}:{port}, but process 0 cannot listen there "
            f"({error.strerror}); choose another port, the same for all processes"
        ) from error


def _next_hello(
    listener: socket.socket, deadline: float
) -> tuple[Connection | None, dict[str, Any]]:
    """The next process that comes; None when the time is over."""
    while (seconds := deadline - time.monotonic()) > 0:
        listener.settimeout(seconds)
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            break
        accepted.settimeout(SECONDS_FOR_HELLO)
        connection = Connection(accepted, accepted.makefile("rb"))
        hello = connection.receive()
        if hello is not None and {"process_id", "num_processes"} <= set(hello):
            _keep_open(accepted)
            return connection, hello
        connection.close()  # a stranger
    return None, {}


def _check_hello(
    hello: dict[str, Any], come: dict[int, Connection], num_processes: int
) -> None:
    process_id, count = hello["process_id"], hello["num_processes"]
    if count != num_processes:
        raise ValueError(
            f"num_processes is {num_processes} in process 0, but {count} in process "
            f"{process_id}; needs the same number in every process"
        )
    if process_id == 0 or process_id in come:
        raise ValueError(
            f"process_id is {process_id} in two processes, needs another one in each, "
            f"from 0 to {num_processes - 1}"
        )


def _missing(come: dict[int, Connection], num_processes: int, timeout: float) -> str:
    missing = [i for i in range(1, num_processes) if i not in come]
    return (
        f"num_processes is {num_processes}, but process "
        f"{', '.join(map(str, missing))} did not come within {timeout:g} s; start as "
        "many as num_processes says, each with its own process_id, or wait for longer"
    )


def _join(
    host: str, port: int, hello: dict[str, Any], deadline: float, timeout: float
) -> Connection:
    """Every other process's part: come to process 0 and wait for its answer."""
    reached = _reach(host, port, deadline, timeout)
    # Process 0 decides when time is over; this is for one that does not answer.
    reached.settimeout(max(deadline - time.monotonic(), 0.0) + timeout)
    connection = Connection(reached, reached.makefile("rb"))
    connection.send(hello)
    answer = connection.receive()
    if answer == WELCOME:
        _keep_open(reached)
        return connection
    connection.close()
    if answer is not None and "refused" in answer:
        raise ValueError(answer["refused"])
    raise ValueError(
        f"coordinator is {host}:{port}, where something answers that is no process 0 "
        "waiting for others; needs one that is started at the same time, with the same "
        "num_processes"
    )


def _reach(host: str, port: int, deadline: float, timeout: float) -> socket.socket:
    while True:
        try:
            seconds = max(deadline - time.monotonic(), SECONDS_BETWEEN_TRIES)
            return socket.create_connection((host, port), seconds)
        except OSError as error:  # process 0 may start later
            if time.monotonic() + SECONDS_BETWEEN_TRIES > deadline:
                raise ValueError(
                    f"coordinator is {host}:{port}, which could not be reached within "
                    f"{timeout:g} s ({error.strerror or error}); needs the address of "
                    "process 0, which must run and let this host in"
                ) from error
        time.sleep(SECONDS_BETWEEN_TRIES)


def _keep_open(connection: socket.socket) -> None:
    """Wait for any time from now on, but notice a host that lost its power."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("IDLE", 10), ("INTVL", 5), ("CNT", 3)):
        option = getattr(socket, f"TCP_KEEP{name}", None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
