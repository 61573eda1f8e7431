"""Rows of a log as numbers by seed and update, for pictures and tables.

Seeds are lined up by `update`; a value that is missing in one of them is NaN. Where
settings were swept, seeds are put together for each combination of values and never
across them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Rows",
    "Series",
    "Values",
    "by_values",
    "check_numbers",
    "evaluated",
    "last_returns",
    "numbers_in",
    "quartiles",
    "series_of",
]

Rows = Sequence[Mapping[str, Any]]
"""Lines of a log, by the names of its columns."""

Values = tuple[float, ...]
"""One combination of swept settings."""

_LAST_PART = 0.1  # of the updates, for the return at the end of training


class Series(NamedTuple):
    """One column by seed and update; NaN where it is missing."""

    x: np.ndarray
    y: np.ndarray


def check_numbers(rows: Rows, x: str, y: str) -> None:
    """Raise a ValueError where curves of y over x would show nothing."""
    if not numbers_in(rows, x, y).size:
        raise ValueError(
            f"rows have no number in column {y!r} over {x!r}, need at least one; the "
            f"columns are {sorted(rows[0]) if rows else 'none, for there are no rows'}"
        )


def numbers_in(rows: Rows, x: str, y: str) -> np.ndarray:
    """All that curves of y over x would show."""
    kept = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    values = np.array([row[y] for row in kept], float)
    return values[np.isfinite(values)]


def by_values(rows: Rows, names: Sequence[str]) -> dict[Values, Rows]:
    """Rows by combination of values, in the order of the values."""
    found: dict[Values, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return {values: found[values] for values in sorted(found)}


def evaluated(evaluation: Rows, names: Sequence[str], values: Values) -> list[float]:
    """Each seed's mean in the evaluation, of one combination."""
    return [r["mean"] for r in evaluation if tuple(r[n] for n in names) == values]


def last_returns(rows: Rows) -> list[float]:
    """Each seed's mean return over the last tenth of the updates, where it is known."""
    last = max(row["update"] for row in rows)
    first = last - max(1, round(_LAST_PART * last)) + 1
    late = [row for row in rows if row["update"] >= first]
    values = series_of(late, "update", "mean_return").y
    return [float(np.nanmean(seed)) for seed in values if np.isfinite(seed).any()]


def quartiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Median and quartiles as `NAME_median`, `NAME_q25`, `NAME_q75`; None of none."""
    marks = {"median": 50, "q25": 25, "q75": 75}
    return {
        f"{name}_{mark}": float(np.percentile(values, q)) if values else None
        for mark, q in marks.items()
    }


def series_of(rows: Rows, x: str, y: str) -> Series:
    """Line seeds up by update; without updates, by x itself."""
    by = "update" if all(row.get("update") is not None for row in rows) else x
    kept = [row for row in rows if row.get(x) is not None and row.get(by) is not None]
    seeds = list(dict.fromkeys(row.get("seed") for row in kept))
    moments = sorted({row[by] for row in kept})
    grid = np.full((2, len(seeds), len(moments)), np.nan)
    line = {seed: i for i, seed in enumerate(seeds)}
    place = {moment: i for i, moment in enumerate(moments)}
    for row in kept:
        cell = line[row.get("seed")], place[row[by]]
        value = row.get(y)
        grid[(0, *cell)] = row[x]
        grid[(1, *cell)] = np.nan if value is None else value
    grid[~np.isfinite(grid)] = np.nan
    return Series(*grid)
