"""A study on disk: finished cells are kept, so an interrupted one goes on.

    study.json        what was asked, the command, versions and devices
    cells/NAME.json   one finished piece of work each
    results.json      everything together, at the end
    results.csv       one line per estimator and batch size, or per curve
    report.html       the report, with its figures inside
    figures/          the figures as PNG and SVG

Every file is either its old or its new self, whenever the process is killed.
"""

import csv
import dataclasses
import io
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpg.train.config import PolicyConfig
from jaxpg.train.provenance import (
    describe,
    differences,
    read_header,
    read_json,
    write_json_atomically,
    write_text_atomically,
)

__all__ = ["Store", "default_folder", "open_store", "read_settings", "to_csv"]

SCHEMA = 1


class Store:
    """The folder of one study."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.header = header

    def get(self, name: str) -> Any | None:
        """A finished cell; None where it is yet to be made."""
        path = self._path(name)
        return read_json(path) if path.is_file() else None

    def put(self, name: str, cell: Any) -> Any:
        """Keep a finished cell."""
        write_json_atomically(self._path(name), cell)
        return cell

    def finish(self, results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Write everything together, as JSON and as CSV."""
        write_json_atomically(
            self.folder / "results.json", {**self.header, **results, "rows": list(rows)}
        )
        write_text_atomically(self.folder / "results.csv", to_csv(rows))

    def _path(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"


def open_store(
    folder: Path, kind: str, settings: Any, command: Sequence[str] | None = None
) -> tuple[Store, list[str]]:
    """Make a study's folder, or find what it holds already.

    Args:
        folder: new, or of a study with the same settings.
        kind: "variance", "off-policy", "learning" or "batch-size".
        settings: a frozen dataclass.
        command: the words that asked for it; None takes those of the process.

    Returns:
        The store, and what has changed since the study was begun, in sentences.

    Raises:
        ValueError: if the folder holds another study, or something else.
    """
    path = folder / "study.json"
    asked = _settings_to_json(settings)
    if path.is_file():
        header = _read_header(folder)
        if header["kind"] != kind or header["settings"] != asked:
            old = header["settings"] if header["kind"] == kind else {}
            changed = [
                f"{k} was {old[k]}, now {v}"
                for k, v in asked.items()
                if k in old and old[k] != v
            ]
            raise ValueError(
                f"{folder} holds a study of {header['kind']} with other settings "
                f"({', '.join(changed) or 'of another kind'}); give another --folder, "
                f"or continue it with --resume {folder}"
            )
        return Store(folder, header), differences(header["provenance"], describe())
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} exists and holds no study; give another --folder, or none"
        )
    (folder / "cells").mkdir(parents=True)
    header = {
        "schema": SCHEMA,
        "kind": kind,
        "date": time.strftime("%Y-%m-%d"),
        "command": _spoken(sys.argv if command is None else command),
        "settings": asked,
        "provenance": describe(),
    }
    write_json_atomically(path, header)
    return Store(folder, header), []


def read_settings(folder: Path, kind: str, settings: type) -> Any:
    """The settings that a study was begun with.

    Args:
        folder: of the study.
        kind: what it must be a study of.
        settings: the dataclass of its settings.

    Raises:
        ValueError: if the folder holds no such study.
    """
    header = _read_header(folder)
    if header["kind"] != kind:
        raise ValueError(
            f"{folder} holds a study of {header['kind']}, needs one of {kind}; "
            f"continue it with jaxpg study {header['kind']} --resume {folder}"
        )
    return _settings_from_json(settings, header["settings"])


def default_folder(kind: str, env: str) -> Path:
    """A new folder's name, from what is studied and the time.

    Args:
        kind: of study.
        env: name of the environment.
    """
    return Path("studies") / f"{kind}-{env}-{time.strftime('%Y%m%d-%H%M%S')}"


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of plain values as CSV; what is nested or missing is left empty.

    Args:
        rows: their columns are those of all of them, in order of appearance.

    >>> to_csv([{"a": 1}, {"a": 2, "b": None}])
    'a,b\\r\\n1,\\r\\n2,\\r\\n'
    """
    flat = [
        {k: v for k, v in row.items() if not isinstance(v, (dict, list))}
        for row in rows
    ]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _read_header(folder: Path) -> dict[str, Any]:
    return read_header(
        folder / "study.json",
        SCHEMA,
        f"{folder} holds no study (no study.json in it); give the folder that the "
        "study printed, such as studies/NAME",
    )


def _settings_to_json(settings: Any) -> dict[str, Any]:
    """But for where it lies, which does not change what it is."""
    tree = dataclasses.asdict(settings)
    return {k: _lists(v) for k, v in tree.items() if k != "folder"}


def _settings_from_json(kind: type, tree: dict[str, Any]) -> Any:
    values = {name: _tuples(value) for name, value in tree.items()}
    for field in dataclasses.fields(kind):
        value = values.get(field.name)
        if field.name == "policy" and isinstance(value, dict):
            values["policy"] = PolicyConfig(**value)
        if field.name == "checkpoint" and value is not None:
            values["checkpoint"] = Path(value)
    return kind(**values)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_lists(x) for x in value]
    return str(value) if isinstance(value, Path) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value


def _spoken(words: Sequence[str]) -> str:
    """The command as it can be given again, without this machine's paths to it."""
    return shlex.join([Path(words[0]).name, *words[1:]] if words else [])
