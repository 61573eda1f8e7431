"""Tables of a study in words: for a terminal, and for the report."""

import sys
from collections.abc import Sequence
from typing import Any

from jaxpg.study.statistics import LEAST

__all__ = [
    "best_bias",
    "bias_of",
    "bias_table",
    "brief",
    "comparison_size",
    "number",
    "percent",
    "show",
    "size_table",
    "variance_table",
    "with_interval",
]

Row = dict[str, Any]


def variance_table(rows: Sequence[Row], summary: Sequence[Row]) -> list[dict[str, str]]:
    """One line per estimator, at the largest batch size that most is known of.

    Args:
        rows: cells of a study of variance.
        summary: what was found of each estimator over all sizes.
    """
    base = _first_product(rows, summary)
    lines = []
    for found in summary:
        row = _of(rows, found["estimator"])
        if row is None:
            continue
        product = row["variance_times_seconds"]
        scale = None if None in (product, base) else product / base
        seconds = row["seconds"] / row["batch_size"]
        lines.append(
            {
                "estimator": found["estimator"],
                "N": str(row["batch_size"]),
                "variance": with_interval(row, "variance"),
                "relative": with_interval(row, "relative_variance"),
                "bias": bias_of(row),
                "SNR": number(row["snr"]),
                "cosine": number(row["cosine"]),
                "noise scale": with_interval(row, "noise_scale"),
                "critical N": number(found["critical_batch_size"]),
                "slope": _with_error(found["slope"], found["slope_error"]),
                "µs / trajectory": number(1e6 * seconds),
                "variance × s": "" if scale is None else f"{scale:.2f}",
            }
            | ({"ESS": percent(row["ess"])} if "ess" in row else {})
        )
    return _even(lines)


def bias_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Bias along the gradient, an estimator a line, a batch size a column."""
    sizes = sorted({row["batch_size"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["estimator"] for row in rows):
        mine = {r["batch_size"]: r for r in rows if r["estimator"] == name}
        cells = {f"N = {n}": bias_of(mine[n]) if n in mine else "" for n in sizes}
        lines.append({"estimator": name, **cells})
    return lines


def size_table(rows: Sequence[Row], quantity: str) -> list[dict[str, str]]:
    """Any quantity, an estimator a line, a batch size a column."""
    sizes = sorted({row["batch_size"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["estimator"] for row in rows):
        mine = {r["batch_size"]: r for r in rows if r["estimator"] == name}
        cells = {
            f"N = {n}": number(mine[n][quantity]) if n in mine else "" for n in sizes
        }
        lines.append({"estimator": name, **cells})
    return lines


def comparison_size(rows: Sequence[Row], name: str | None = None) -> int | None:
    """The largest batch size with batches enough for an interval.

    Args:
        rows: cells.
        name: of one estimator; None for any.
    """
    sizes = [
        row["batch_size"]
        for row in rows
        if row["batches"] >= LEAST and name in (None, row["estimator"])
    ]
    # Four times as many batches as an interval needs, if there is such a size.
    many = [
        row["batch_size"]
        for row in rows
        if row["batches"] >= 4 * LEAST and name in (None, row["estimator"])
    ]
    return max(many, default=max(sizes, default=None))


def number(x: float | None) -> str:
    """Three digits, or nothing.

    >>> number(0.012345), number(1234567.0), number(None)
    ('0.0123', '1.23e+06', '')
    """
    if x is None:
        return ""
    return f"{x:.0f}" if 100 <= abs(x) < 1e5 else f"{x:.3g}"


def percent(x: float | None) -> str:
    """In hundredths, to a tenth.

    >>> percent(-0.0312)
    '-3.1%'
    """
    return "" if x is None else f"{100 * x:.1f}%"


def with_interval(row: Row, name: str) -> str:
    """A quantity and the interval that holds it with 95%."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or high is None:
        return number(row[name])
    return f"{number(row[name])} ({number(low)} to {number(high)})"


def bias_of(row: Row) -> str:
    """Bias along the gradient with its standard error, from pairs where there are."""
    name = best_bias(row)
    return f"{percent(row[name])} ± {percent(row[f'{name}_error'])}"


def best_bias(row: Row) -> str:
    """The name of the bias that is known best: paired, or against the reference."""
    return "bias" if row.get("paired_bias") is None else "paired_bias"


def brief(lines: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """A table without intervals, narrow enough for a terminal."""
    left_out = ("cosine", "SNR")
    return [
        {
            k: v.split(" (")[0].replace(" ± ", "±")
            for k, v in line.items()
            if k not in left_out
        }
        for line in lines
    ]


def show(title: str, lines: Sequence[dict[str, str]]) -> None:
    """Print a table; in a log nothing in it is broken over lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not lines:
        return
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    is_wide = not sys.stdout.isatty()
    for index, name in enumerate(lines[0]):
        side: Any = "left" if index == 0 else "right"
        grid.add_column(name, justify=side, no_wrap=is_wide or index == 0)
    for line in lines:
        grid.add_row(*line.values())
    Console(width=180 if is_wide else None).print(grid)


def _of(rows: Sequence[Row], name: str) -> Row | None:
    mine = {r["batch_size"]: r for r in rows if r["estimator"] == name}
    if not mine:
        return None
    size = comparison_size(rows, name)
    return mine[max(mine) if size is None else size]


def _first_product(rows: Sequence[Row], summary: Sequence[Row]) -> float | None:
    """Variance times seconds of plain reward-to-go, or else of the first."""
    names = [found["estimator"] for found in summary]
    name = "reward-to-go/none" if "reward-to-go/none" in names else names[0]
    row = _of(rows, name)
    return None if row is None else row["variance_times_seconds"]


def _with_error(x: float | None, error: float | None) -> str:
    return "" if x is None or error is None else f"{x:.2f} ± {error:.2f}"


def _even(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """Lines with the same columns, empty ones where they had none."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    return [{name: line.get(name, "") for name in names} for line in lines]
