"""The log of a run: one row per update and seed, as JSON lines and as CSV.

`metrics.jsonl` is the record; `metrics.csv` is the same rows for spreadsheets, and is
rebuilt from the former by `rewind`. The column `update` counts the updates done so far;
a column `seed` keeps runs apart that were trained side by side.

Order of events that loses no line and repeats none, wherever the process is killed:
`append` the rows of a chunk, then save its checkpoint; on resuming from a checkpoint
made after `n` updates, `rewind(n)`, then go on. On several hosts one process logs.
"""

import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from jaxpg.train.provenance import write_text_atomically

__all__ = ["Row", "RunLog", "read_metrics", "read_rows"]

Row: TypeAlias = dict[str, float | int | str | bool | None]
"""One line of the log: a value for each column, None where there is none."""


class RunLog:
    """Appends rows to `metrics.jsonl` and `metrics.csv` of one folder.

    The columns are those of the first row ever written to the folder, in its order.

    Args:
        folder: where the two files live; made if it is missing.
        columns: the columns, in order; None takes them from the first row.

    Raises:
        ValueError: if `columns` disagree with the folder's rows, or lack `update`.

    >>> import tempfile
    >>> log = RunLog(tempfile.mkdtemp())
    >>> log.append([{"update": 1, "return": 9.5}, {"update": 2, "return": 11.0}])
    >>> log.rewind(1)
    >>> read_rows(log.folder)
    [{'update': 1, 'return': 9.5}]
    """

    def __init__(
        self, folder: str | os.PathLike[str], columns: Sequence[str] | None = None
    ) -> None:
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = read_rows(self.folder)
        self._columns = tuple(rows[0]) if rows else tuple(columns or ()) or None
        if columns is not None:
            self._check(tuple(columns))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of one chunk and force them to disk.

        Args:
            rows: values by column. NumPy and JAX scalars count as numbers; NaN and
                infinities are written as null, and as an empty field in the CSV.

        Raises:
            ValueError: if a row has other columns than the first one, lacks `update`,
                or holds something that is no number, string, boolean or None; also if
                the last line on disk is torn. Then nothing is written.
        """
        plain = [{name: _plain(name, row[name]) for name in row} for row in rows]
        if not plain:
            return
        columns = self._columns or tuple(plain[0])
        for row in plain:
            self._check(tuple(row), columns)
            _check_update(row["update"])
        plain = [{name: row[name] for name in columns} for row in plain]
        for path in (self._jsonl, self._csv):
            _check_whole(path)
        fresh = not self._csv.exists() or self._csv.stat().st_size == 0
        _append(self._jsonl, _as_jsonl(plain))
        _append(self._csv, _as_csv(plain, columns if fresh else None))
        self._columns = columns

    def rewind(self, update: int) -> None:
        """Drop every row later than `update`, and a torn last line, atomically.

        Args:
            update: the updates done at the checkpoint from which the run goes on.

        Raises:
            ValueError: if a line before the last is damaged.
        """
        rows = [r for r in read_rows(self.folder) if cast(int, r["update"]) <= update]
        columns = self._columns if rows else None
        write_text_atomically(self._jsonl, _as_jsonl(rows))
        write_text_atomically(self._csv, _as_csv(rows, columns))

    @property
    def _jsonl(self) -> pathlib.Path:
        return self.folder / "metrics.jsonl"

    @property
    def _csv(self) -> pathlib.Path:
        return self.folder / "metrics.csv"

    def _check(
        self, columns: tuple[str, ...], expected: tuple[str, ...] | None = None
    ) -> None:
        expected = expected or self._columns or columns
        if set(columns) != set(expected):
            raise ValueError(
                f"a row of the log has the columns {sorted(columns)}, but the first "
                f"in {self.folder} has {sorted(expected)}: every row needs the same; "
                "use None for a value that a row lacks, or log to another folder"
            )
        if "update" not in columns:
            raise ValueError(
                f"a row of the log has the columns {sorted(columns)}, needs 'update', "
                "the number of updates done so far, without which nothing can resume"
            )


def read_rows(folder: str | os.PathLike[str]) -> list[Row]:
    """Read the rows of a run, without a torn last line.

    Args:
        folder: where `metrics.jsonl` lies; rows are empty if there is none.

    Returns:
        The rows in the order in which they were written.

    Raises:
        ValueError: if a line before the last is damaged.
    """
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    # Bytes, because a torn last line may end within a character.
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path} is damaged in line {number} ({error}), needs one JSON "
                    "object in each line; mend or delete that line by hand"
                ) from None
    return rows


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the columns of a run.

    Args:
        folder: where `metrics.jsonl` lies.

    Returns:
        An array [rows] for each column: whole numbers as int64, others as float64 with
        NaN for what was not finite or not there, booleans as bool, all else as objects.

    Raises:
        ValueError: if a line before the last is damaged.
    """
    rows = read_rows(folder)
    return {name: _column([row[name] for row in rows]) for name in (rows or [{}])[0]}


def _column(values: list[Any]) -> np.ndarray:
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return np.array(values, bool)
    if kinds == {int}:
        return np.array(values, np.int64)
    if kinds <= {int, float, type(None)}:
        return np.array([math.nan if v is None else v for v in values], np.float64)
    return np.array(values, object)


def _plain(name: str, value: Any) -> Any:
    """A value that JSON can say; NaN and infinities become None."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"column {name!r} of the log is {value!r}, needs one number, string, boolean "
        "or None; reduce an array to a number first, for example by its mean"
    )


def _check_update(update: Any) -> None:
    if isinstance(update, bool) or not isinstance(update, int):
        raise ValueError(
            f"update is {update!r} in a row of the log, needs a whole number: how many "
            "updates were done so far"
        )


def _as_jsonl(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _as_csv(rows: Sequence[Row], header: Sequence[str] | None) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(header)
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def _append(path: pathlib.Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _check_whole(path: pathlib.Path) -> None:
    """Refuse to write behind a torn line: two lines would be lost instead of one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
    raise ValueError(
        f"{path} ends in a torn line, needs a line feed at its end: a process was "
        "killed while it wrote; call rewind(update) with the checkpoint's update first"
    )
