"""Pictures of a run: the learning curve over environment steps.

Rows of the log in, one PNG out. Several seeds are drawn as thin lines under their
median and a band: the quartiles from four seeds on, the extremes below (quartiles of
three runs say nothing). Seeds are lined up by `update`; a value that is missing in one
of them is left out of that update's median.

Only `matplotlib.figure.Figure` is used: no pyplot, no global state, no display.
Colours: Okabe and Ito (2008), "Color Universal Design", told apart by all readers.
"""

import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["learning_curve", "plot_learning_curve"]

_LABELS = {
    "env_steps": "environment steps",
    "update": "updates",
    "mean_return": "mean return per episode\n(environment's reward units)",
    "entropy": "policy entropy\n(nats)",
    "grad_norm": "gradient norm",
}
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
_ENOUGH_FOR_QUARTILES = 4


class _Series(NamedTuple):
    """One column by seed and update; NaN where it is missing."""

    x: np.ndarray
    y: np.ndarray


def plot_learning_curve(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    title: str,
    *,
    x: str = "env_steps",
    y: str = "mean_return",
) -> None:
    """Draw the learning curve of a run into a PNG.

    Args:
        rows: rows of the log; `seed` and `update` are used where they are.
        path: the PNG; its folder must exist.
        title: one line above the picture.
        x: the column along the horizontal axis.
        y: the column that is learned.

    Raises:
        ValueError: if there are no rows, or no row has both columns.

    >>> import io, tempfile
    >>> rows = [{"update": i, "env_steps": 8 * i, "mean_return": i} for i in range(9)]
    >>> plot_learning_curve(rows, tempfile.mkdtemp() + "/curve.png", "CartPole-v1")
    """
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    figure = learning_curve(rows, title, x=x, y=y)
    figure.savefig(beside, dpi=200, format="png")
    os.replace(beside, path)  # a viewer never meets half a picture


def learning_curve(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    *,
    x: str = "env_steps",
    y: str = "mean_return",
) -> "Figure":
    """Draw the learning curve of a run as a figure, to be saved in any format.

    Args:
        rows: rows of the log; `seed` and `update` are used where they are.
        title: one line above the picture.
        x: the column along the horizontal axis.
        y: the column that is learned. `entropy` and `grad_norm` get small panels
            below it where the rows have them.

    Returns:
        A figure without a canvas of its own.

    Raises:
        ValueError: if there are no rows, or no row has both columns.
    """
    from matplotlib.figure import Figure

    learned = _series(rows, x, y)
    if not np.isfinite(learned.y).any():
        raise ValueError(
            f"rows have no number in column {y!r} over {x!r}, need at least one; the "
            f"columns are {sorted(rows[0]) if rows else 'none, for there are no rows'}"
        )
    below = [(name, _series(rows, x, name)) for name in ("entropy", "grad_norm")]
    below = [(name, series) for name, series in below if np.isfinite(series.y).any()]
    figure = Figure(figsize=(6.4, 3.6 + 1.1 * len(below)), layout="constrained")
    heights = [3.0] + [1.0] * len(below)
    axes = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    figure.suptitle(title, fontsize=11)
    _draw(axes[0], learned, y, _BLUE)
    for axis, (name, series), colour in zip(
        axes[1:], below, (_ORANGE, _GREEN), strict=False
    ):
        _draw(axis, series, name, colour)
        if name == "grad_norm" and np.nanmin(series.y) > 0:
            _make_logarithmic(axis)
    _finish(figure, list(axes), x)
    return figure


def _series(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> _Series:
    """Line seeds up by update; without updates, by x itself."""
    by = "update" if all(row.get("update") is not None for row in rows) else x
    kept = [row for row in rows if row.get(x) is not None and row.get(by) is not None]
    seeds = list(dict.fromkeys(row.get("seed") for row in kept))
    moments = sorted({row[by] for row in kept})
    grid = np.full((2, len(seeds), len(moments)), np.nan)
    place = {moment: i for i, moment in enumerate(moments)}
    for row in kept:
        cell = seeds.index(row.get("seed")), place[row[by]]
        value = row.get(y)
        grid[(0, *cell)] = row[x]
        grid[(1, *cell)] = np.nan if value is None else value
    grid[~np.isfinite(grid)] = np.nan
    return _Series(*grid)


def _draw(axis: "Axes", series: _Series, name: str, colour: str) -> None:
    """Thin lines for the seeds, a band and a thick line for what they share."""
    count = len(series.y)
    middle = _over_seeds(series.x, 50)
    if count > 1:
        low, high = (25, 75) if count >= _ENOUGH_FOR_QUARTILES else (0, 100)
        band = "middle half" if low else "lowest to highest"
        bottom, top = _over_seeds(series.y, low), _over_seeds(series.y, high)
        axis.fill_between(
            middle, bottom, top, color=colour, alpha=0.22, lw=0, label=band
        )
        for i, (xs, ys) in enumerate(zip(series.x, series.y, strict=True)):
            label = f"{count} seeds" if i == 0 else None
            axis.plot(xs, ys, color=colour, lw=0.6, alpha=0.45, label=label)
    label = "median" if count > 1 else _LABELS.get(name, name).partition("\n")[0]
    # A lone point would be an invisible line.
    marker = "o" if np.isfinite(series.y).any(axis=0).sum() == 1 else None
    axis.plot(
        middle,
        _over_seeds(series.y, 50),
        color=colour,
        lw=2.0,
        label=label,
        marker=marker,
    )
    axis.set_ylabel(_LABELS.get(name, name), fontsize=9)
    axis.grid(color=_GREY, alpha=0.2, lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _over_seeds(values: np.ndarray, percentile: float) -> np.ndarray:
    with warnings.catch_warnings():
        # An update that no seed has a number for is a gap in the line, not a fault.
        warnings.filterwarnings("ignore", "All-NaN slice encountered")
        return np.nanpercentile(values, percentile, axis=0)


def _make_logarithmic(axis: "Axes") -> None:
    """A log scale whose few labels stay apart in a small panel."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _finish(figure: "Figure", axes: Sequence["Axes"], x: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes[-1].set_xlabel(_LABELS.get(x, x), fontsize=9)
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.align_ylabels(axes)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        # Outside the axes, where it can cover no data.
        axes[0].legend(
            handles[::-1],
            labels[::-1],
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(labels),
            frameon=False,
            fontsize=8,
            borderaxespad=0.2,
        )
