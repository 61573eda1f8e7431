"""Several processes, usually one on each host, as one run.

    from jaxpg.train import distributed
    distributed.connect("node1:1234", num_processes=2, process_id=0)   # 1 on the other
    jaxpg.train.loop.train(config)                                     # the same on all

Every process runs the same program on its share of the devices; `agreement` keeps them
on the same way.

When a process dies, the others end within seconds, with a sentence and exit code 1:
they cannot go on, as part of the training state is gone. One that hangs or is cut off
is given up by JAX's own heartbeat.
"""

import atexit
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import jax

from jaxpg._checks import check_positive, check_range
from jaxpg.train.agreement import wait_for_all
from jaxpg.train.lifeline import Lifeline, meet

__all__ = [
    "Group",
    "advise",
    "connect",
    "explain",
    "find_group",
    "give_up",
]

SECONDS_TO_MEET = 120.0
HEARTBEAT_SECONDS = 30
SHUTDOWN_SECONDS = 60
SECONDS_FOR_NEWS = 1.0
SECONDS_TO_FINISH = 3.0
"""What the main thread gets to finish a file, or to tell the error in its own words."""


class Group(NamedTuple):
    """The processes of a run, and which one this is.

    Attributes:
        coordinator: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: this one.
    """

    coordinator: str
    num_processes: int
    process_id: int


class _Session:
    """What this process knows of the others; there is one, as JAX knows one group."""

    lifeline: Lifeline | None = None
    num_processes = 1
    process_id = 0
    advice = ""
    trouble = threading.Event()
    sentence = ""
    reason: str | None = None
    told = False


_session = _Session()


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = SECONDS_TO_MEET,
) -> None:
    """Make this process one of several, before JAX computes anything.

    What is None is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, else from SLURM, Open MPI, Kubernetes or the TPU slice, as JAX finds
    them. In a group of one this does nothing.

    Args:
        coordinator: HOST:PORT of process 0, with a port that is free there.
        num_processes: how many processes there are.
        process_id: which one this is, counted from 0.
        timeout: how long to wait for the others, in seconds.

    Raises:
        ValueError: if there is no group to be found, if process 0 cannot be reached, if
            the processes do not agree on how many they are, if one does not come, or
            if they have different numbers of devices.
        RuntimeError: if JAX has computed something before.
    """
    group = find_group(coordinator, num_processes, process_id)
    if group.num_processes == 1:
        return
    if _session.lifeline is not None or jax.distributed.is_initialized():
        raise ValueError("this process is connected already, needs to be so once only")
    host, port = _address(group.coordinator)
    _session.lifeline = meet(host, port, *group[1:], timeout)
    _session.num_processes, _session.process_id = group[1:]
    _session.lifeline.watch(_on_end)
    # Behind JAX's own in time, and so before it in order: it would wait for the dead.
    atexit.register(_session.lifeline.leave)
    sys.excepthook = _give_up_after(sys.excepthook)
    _start(group, timeout)
    _check_devices()
    # Processes connect their devices at the first sum, and wait half a minute for it at
    # most: now they are together, and after compiling they may not be.
    wait_for_all("connected")


def find_group(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Group:
    """What is given, and for the rest what the environment says.

    Args:
        coordinator: as for `connect`.
        num_processes: as for `connect`.
        process_id: as for `connect`.

    Returns:
        The group.

    Raises:
        ValueError: if something is missing or cannot be.
    """
    found: list[Any] = [
        coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        _whole(num_processes, "JAX_NUM_PROCESSES"),
        _whole(process_id, "JAX_PROCESS_ID"),
    ]
    if None in found:
        found = _ask_the_cluster(found)
    for name, value in zip(Group._fields, found, strict=True):
        if value is None:
            raise ValueError(
                f"{name} is not given, and there is no SLURM, MPI, Kubernetes or TPU "
                "to take it from; needs --coordinator HOST:PORT --num-processes N "
                "--process-id I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID in the environment"
            )
    group = Group(*found)
    check_positive("num_processes", group.num_processes)
    check_range("process_id", group.process_id, 0, group.num_processes - 1)
    _address(group.coordinator)
    return group


def _ask_the_cluster(known: list[Any]) -> list[Any]:
    # JAX has no public name for what it finds. This one is older than JAX 0.8.
    from jax._src.clusters import ClusterEnv

    detect: Any = ClusterEnv.auto_detect_unset_distributed_params
    return list(detect(*known, None, None, round(SECONDS_TO_MEET))[:3])


def _whole(given: int | None, name: str) -> int | None:
    value = os.environ.get(name) if given is None else given
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}, needs a whole number") from None


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"coordinator is {coordinator!r}, needs HOST:PORT, such as node1:1234"
        )
    return host.strip("[]"), int(port)


def _start(group: Group, timeout: float) -> None:
    if jax.config.jax_cpu_collectives_implementation is None:  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if hasattr(jax.config, "jax_enable_preemption_service"):
        # It would swallow SIGTERM; the loop has its own way to stop all together.
        jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {
        "initialization_timeout": round(timeout),
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    jax.distributed.initialize(
        *group, **{name: value for name, value in options.items() if name in known}
    )


def _check_devices() -> None:
    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    if len(set(counts)) > 1:
        raise ValueError(
            f"the processes have {counts} devices, needs the same number in each; on "
            "CPU give --num-devices, on GPU choose with JAX_LOCAL_DEVICE_IDS"
        )


# --- the end


def advise(cure: str) -> None:
    """What to tell a person to do when another process dies."""
    _session.advice = cure


def explain(message: str) -> str:
    """What to tell a person of an error here, when it may be the echo of another's end.

    Args:
        message: of the error.

    Returns:
        The message itself, or that another process failed and why; empty where that
        was told already.
    """
    if _session.lifeline is None or not _session.trouble.wait(SECONDS_FOR_NEWS):
        return message
    _session.told = True
    if _session.reason is None:
        return ""
    return message if message == _session.reason else _session.sentence


def give_up(reason: str, code: int = 1) -> None:
    """End this process at once and tell the others; do nothing where there are none.

    JAX would wait for the others before it let this one go, and they for this one.

    Args:
        reason: what the others print.
        code: exit code of this process.
    """
    if _session.lifeline is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # When process 0 ends, JAX aborts the others: first they shall say why.
    waits = _session.process_id == 0 and not _session.trouble.is_set()
    _session.lifeline.fail(reason, 2 * SECONDS_TO_FINISH if waits else 0.0)
    os._exit(code)


def _on_end(process: int, reason: str | None) -> None:
    """Another process has failed or died."""
    who = f"process {process} of {_session.num_processes}"
    if reason is None:
        cure = _session.advice or "start all processes again"
        sentence = f"{who} has died, and the others cannot go on without it; {cure}"
        _cry(sentence)  # at once: JAX may abort this process any moment
    else:
        sentence = f"{who} has failed: {reason}"
    _session.sentence, _session.reason = sentence, reason
    _session.trouble.set()
    time.sleep(SECONDS_TO_FINISH)  # most likely the main thread ends meanwhile
    if reason is not None and not _session.told:
        _cry(sentence)
    os._exit(1)


def _cry(sentence: str) -> None:
    os.write(2, f"jaxpg: error: {sentence}\n".encode())


def _give_up_after(hook: Callable[..., Any]) -> Callable[..., Any]:
    def end(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        message = str(error) or kind.__name__
        hook(kind, error, trace)
        if (told := explain(message)) not in ("", message):
            _cry(told)
        give_up(message)

    return end
