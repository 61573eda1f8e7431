"""Where a run's numbers come from: versions, devices and settings, as plain JSON.

Equal inputs give equal bits only under equal software, hardware and numeric settings.
`describe` records those, `differences` says in sentences what changed since a run was
started. Nothing here names a person, a host or a path, so a record can be published.

The atomic write lives here too: every small file of a run is either its old or its new
self, whenever the process is killed (write beside it, fsync, rename over it).
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
from typing import Any

import jax

from jaxpg._version import __version__

__all__ = [
    "describe",
    "differences",
    "read_header",
    "read_json",
    "write_json_atomically",
    "write_text_atomically",
]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy")

# Python itself computes none of the numbers; all else that `describe` knows may.
_HARMLESS = ("python",)


def describe() -> dict[str, Any]:
    """Describe the software, the devices and the settings that numbers depend on.

    Initialises JAX's backend, for the devices; imports no other package.

    Returns:
        A flat dictionary of strings, numbers, booleans and None, ready for JSON. Flags
        in `XLA_FLAGS` that hold a path keep their name alone.

    >>> describe()["x64"]
    False
    """
    device = jax.devices()[0]
    return {
        "jaxpg": __version__,
        **{package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_threads": _cpu_threads(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "XLA_FLAGS": _without_paths(os.environ.get("XLA_FLAGS", "")),
        "x64": _setting("enable_x64"),
        "matmul_precision": _setting("default_matmul_precision"),
        "prng_impl": _setting("default_prng_impl"),
        "threefry_partitionable": _setting("threefry_partitionable"),
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say what changed between two records that may change the bits of a resumed run.

    Args:
        old: what `describe` said when the run was started.
        new: what it says now.

    Returns:
        One sentence for each difference; empty where a bit-exact resume can be
        expected. The version of Python is left out: it computes no number.

    >>> differences({"jaxlib": "0.10.1"}, {"jaxlib": "0.10.2"})
    ['jaxlib was 0.10.1, is 0.10.2']
    """
    fields = [*old, *(field for field in new if field not in old)]
    return [
        f"{field} was {_spoken(old, field)}, is {_spoken(new, field)}"
        for field in fields
        if field not in _HARMLESS and _spoken(old, field) != _spoken(new, field)
    ]


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by `text`; killed at any moment, it is wholly old or wholly new.

    Args:
        path: the file; its folder must exist. One process at a time may write it.
        text: the whole new content.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_header(path: pathlib.Path, schema: int, missing: str) -> dict[str, Any]:
    """The JSON object that a run or a study keeps of itself.

    Args:
        path: its file.
        schema: the version of the format that is understood.
        missing: what to say where there is no such file.

    Returns:
        The object.

    Raises:
        ValueError: if it is not there, is damaged, or has another schema.
    """
    if not path.is_file():
        raise ValueError(missing)
    header = read_json(path)
    if not isinstance(header, dict) or header.get("schema") != schema:
        raise ValueError(
            f"{path} is not of schema {schema}; open it with the version that made it"
        )
    return header


def write_json_atomically(path: str | os.PathLike[str], obj: Any) -> None:
    """Replace a file by `obj` as JSON; killed at any moment, it is old or new.

    Args:
        path: the file; its folder must exist.
        obj: dictionaries, lists, strings, finite numbers, booleans and None.

    Raises:
        ValueError: if `obj` holds NaN or an infinity, which JSON cannot say.
    """
    # Serialised before the file is touched: a refused object leaves no trace.
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Args:
        path: the file.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not valid JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(
            f"{os.fspath(path)} is not valid JSON ({error}), needs a file as jaxpg "
            "wrote it; take it from a copy of the run, or start the run afresh"
        ) from None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _setting(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")


def _cpu_threads() -> int:
    """How many threads this process may use, which is not how many the machine has."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str | None:
    """The processor's trade name: its vector units decide the order of sums."""
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or None
    named = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return named.group(1) if named else platform.processor() or None


def _without_paths(flags: str) -> str:
    """`XLA_FLAGS` in which a value that looks like a path is left out."""
    return " ".join(
        flag.partition("=")[0] if re.search(r"[/\\~]", flag) else flag
        for flag in flags.split()
    )


def _spoken(record: dict[str, Any], field: str) -> str:
    if field not in record:
        return "not recorded"
    value = record[field]
    return "not set" if value is None or value == "" else str(value)
