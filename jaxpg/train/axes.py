"""How a run's pictures are drawn: lines of seeds, their band, scales and legends.

Several seeds are thin lines under their median and a band: the quartiles from four
seeds on, the extremes below (quartiles of three runs say nothing).

Only `matplotlib.figure.Figure` is used: no pyplot, no global state, no display.
Colours: Okabe and Ito (2008), "Color Universal Design", told apart by all readers.
"""

import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpg.train.series import Rows, Series, Values, series_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GREY",
    "LABELS",
    "MOST_IN_LEGEND",
    "ONE_EACH",
    "band_of",
    "colours_for",
    "draw_groups",
    "draw_seeds",
    "dress",
    "in_words",
    "label_x",
    "legend_above",
    "legend_of_groups",
    "make_logarithmic",
    "save_figure",
    "scale_to",
]

LABELS = {
    "env_steps": "environment steps",
    "update": "updates",
    "mean_return": "mean return per episode\n(environment's reward units)",
    "entropy": "policy entropy\n(nats)",
    "grad_norm": "gradient norm",
}
"""What columns are called on an axis."""

GREY = "#555555"
ONE_EACH = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
)
"""Colours that are told apart."""

MOST_IN_LEGEND = 10
"""Groups that a legend names and that have bands; of more, the first and the last."""

_ENOUGH_FOR_QUARTILES = 4
_WIDE = 20.0  # values further apart than this factor go on a logarithmic scale


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a PNG at once, so that a viewer never meets half a picture."""
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, dpi=200, format="png")
    os.replace(beside, path)


def draw_seeds(axis: "Axes", series: Series, name: str, colour: str) -> None:
    """Thin lines for the seeds, a band and a thick line for what they share."""
    count = len(series.y)
    if count > 1:
        _draw_band(axis, series, colour, alpha=0.22, label=band_of(count)[2])
        for i, (xs, ys) in enumerate(zip(series.x, series.y, strict=True)):
            label = f"{count} seeds" if i == 0 else None
            axis.plot(xs, ys, color=colour, lw=0.6, alpha=0.45, label=label)
    label = "median" if count > 1 else LABELS.get(name, name).partition("\n")[0]
    _draw_median(axis, series, colour, label)


def draw_groups(axis: "Axes", groups: Mapping[Values, Rows], x: str, name: str) -> None:
    """One median per combination, with a band while bands can be told apart."""
    colours = colours_for(len(groups))
    for (values, rows), colour in zip(groups.items(), colours, strict=True):
        series = series_of(rows, x, name)
        if len(series.y) > 1 and len(groups) <= MOST_IN_LEGEND:
            _draw_band(axis, series, colour, alpha=0.15)
        _draw_median(axis, series, colour, ", ".join(f"{v:g}" for v in values))


def band_of(count: int) -> tuple[float, float, str]:
    """The percentiles that a band of so many seeds lies between, and its name."""
    if count >= _ENOUGH_FOR_QUARTILES:
        return 25, 75, "middle half"
    return 0, 100, "lowest to highest"


def _draw_band(axis: "Axes", series: Series, colour: Any, **style: Any) -> None:
    low, high, _ = band_of(len(series.y))
    edges = _over_seeds(series.y, low), _over_seeds(series.y, high)
    axis.fill_between(_over_seeds(series.x, 50), *edges, color=colour, lw=0, **style)


def _draw_median(axis: "Axes", series: Series, colour: Any, label: str) -> None:
    # A lone point would be an invisible line.
    marker = "o" if np.isfinite(series.y).any(axis=0).sum() == 1 else None
    middle, median = (_over_seeds(values, 50) for values in series)
    axis.plot(middle, median, color=colour, lw=2.0, label=label, marker=marker)


def _over_seeds(values: np.ndarray, percentile: float) -> np.ndarray:
    with warnings.catch_warnings():
        # An update that no seed has a number for is a gap in the line, not a fault.
        warnings.filterwarnings("ignore", "All-NaN slice encountered")
        return np.nanpercentile(values, percentile, axis=0)


def colours_for(count: int) -> list[Any]:
    """Colours of their own while there are some, then shades from dark to light."""
    if count <= len(ONE_EACH):
        return list(ONE_EACH[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * i / (count - 1)) for i in range(count)]


def dress(axis: "Axes", name: str) -> None:
    """Name the vertical axis and give it a light grid."""
    axis.set_ylabel(LABELS.get(name, name), fontsize=9)
    axis.grid(color=GREY, alpha=0.2, lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def label_x(axis: "Axes", x: str) -> None:
    """Name the horizontal axis; large numbers get a k or an M."""
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(LABELS.get(x, x), fontsize=9)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def make_logarithmic(axis: "Axes") -> None:
    """A log scale whose few labels stay apart in a small panel."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def scale_to(axis: "Axes", values: Sequence[float]) -> None:
    """A scale on which the values stand apart, labelled where there is room."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    positive = [value for value in values if value > 0]
    if positive and min(values) >= 0 and max(positive) > _WIDE * min(positive):
        if len(positive) == len(values):
            axis.set_xscale("log")
        else:
            axis.set_xscale("symlog", linthresh=min(positive))
    places = axis.xaxis.get_transform().transform(np.array(values, float))
    apart, shown = 0.17 * (places[-1] - places[0]), [0]
    for i, place in enumerate(places):
        if place - places[shown[-1]] > apart:
            shown.append(i)
    axis.xaxis.set_major_locator(FixedLocator([values[i] for i in shown]))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.1)


def legend_above(axis: "Axes") -> None:
    """Outside the axes, where it can cover no data."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1:
        axis.legend(
            handles[::-1],
            labels[::-1],
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(labels),
            frameon=False,
            fontsize=8,
            borderaxespad=0.2,
        )


def legend_of_groups(
    figure: "Figure", axis: "Axes", names: Sequence[str], where: str, ncols: int
) -> None:
    """Beside the axes; of many shades only the first and the last are named."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > MOST_IN_LEGEND:
        handles, labels = [handles[0], handles[-1]], [labels[0], f"to {labels[-1]}"]
    place: dict[str, Any] = {"loc": where, "ncols": ncols}
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "title_fontsize": 8}
    title = ",\n".join(in_words(name) for name in names)
    figure.legend(handles, labels, title=title, **place, **style)


def in_words(name: str) -> str:
    """A column as it is written on an axis."""
    return name.strip("_").replace("_", " ")
