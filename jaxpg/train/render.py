"""Pictures of a run: the learning curve over environment steps, and what a sweep found.

Rows of the log in, one PNG out. Several seeds are drawn as thin lines under their
median and a band: the quartiles from four seeds on, the extremes below (quartiles of
three runs say nothing). Seeds are lined up by `update`; a value that is missing in one
of them is left out of that update's median.

Where settings were swept (their columns are named by `by` or `names`), seeds are put
together for each combination of values and never across them: one curve, one line of
the table, one place in the picture for each.

Only `matplotlib.figure.Figure` is used: no pyplot, no global state, no display.
Colours: Okabe and Ito (2008), "Color Universal Design", told apart by all readers.
"""

import csv
import io
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxpg.train.provenance import write_json_atomically, write_text_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "describe_sweep",
    "learning_curve",
    "plot_learning_curve",
    "plot_sweep",
    "summarize_sweep",
    "sweep_figure",
    "write_sweep",
]

Rows = Sequence[Mapping[str, Any]]
Values = tuple[float, ...]

_LABELS = {
    "env_steps": "environment steps",
    "update": "updates",
    "mean_return": "mean return per episode\n(environment's reward units)",
    "entropy": "policy entropy\n(nats)",
    "grad_norm": "gradient norm",
}
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
_ONE_EACH = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_ENOUGH_FOR_QUARTILES = 4
_MOST_IN_LEGEND = 10
_LAST_PART = 0.1  # of the updates, for the return at the end of training
_WIDE = 20.0  # values further apart than this factor go on a logarithmic scale


class _Series(NamedTuple):
    """One column by seed and update; NaN where it is missing."""

    x: np.ndarray
    y: np.ndarray


def plot_learning_curve(
    rows: Rows,
    path: str | os.PathLike[str],
    title: str,
    *,
    x: str = "env_steps",
    y: str = "mean_return",
    by: Sequence[str] = (),
) -> None:
    """Draw the learning curve of a run into a PNG.

    Args:
        rows: rows of the log; `seed` and `update` are used where they are.
        path: the PNG; its folder must exist.
        title: one line above the picture.
        x: the column along the horizontal axis.
        y: the column that is learned.
        by: columns of swept settings.

    Raises:
        ValueError: if there are no rows, or no row has both columns.

    >>> import tempfile
    >>> rows = [{"update": i, "env_steps": 8 * i, "mean_return": i} for i in range(9)]
    >>> plot_learning_curve(rows, tempfile.mkdtemp() + "/curve.png", "CartPole-v1")
    """
    _save(learning_curve(rows, title, x=x, y=y, by=by), path)


def learning_curve(
    rows: Rows,
    title: str,
    *,
    x: str = "env_steps",
    y: str = "mean_return",
    by: Sequence[str] = (),
) -> "Figure":
    """Draw the learning curve of a run as a figure, to be saved in any format.

    Args:
        rows: rows of the log; `seed` and `update` are used where they are.
        title: one line above the picture.
        x: the column along the horizontal axis.
        y: the column that is learned. `entropy` and `grad_norm` get small panels
            below it where the rows have them.
        by: columns of swept settings; each combination of values has a curve.

    Returns:
        A figure without a canvas of its own.

    Raises:
        ValueError: if there are no rows, or no row has both columns.
    """
    from matplotlib.figure import Figure

    _check_numbers(rows, x, y)
    below = [name for name in ("entropy", "grad_norm") if _numbers(rows, x, name).size]
    groups = _by_values(rows, by)
    swept = len(groups) > 1
    size = (7.6 if swept else 6.4, 3.6 + 1.1 * len(below))
    figure = Figure(figsize=size, layout="constrained")
    heights = [3.0] + [1.0] * len(below)
    axes = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    figure.suptitle(title, fontsize=11)
    for axis, name, colour in zip(axes, [y, *below], _ONE_EACH, strict=False):
        if swept:
            _draw_groups(axis, groups, x, name)
        else:
            _draw(axis, _series(rows, x, name), name, colour)
        _dress(axis, name)
        if name == "grad_norm" and _numbers(rows, x, name).min() > 0:
            _make_logarithmic(axis)
    _label_x(axes[-1], x)
    figure.align_ylabels(axes)
    if swept:
        _legend_of_groups(figure, axes[0], by, "outside right upper", ncols=1)
    else:
        _legend_above(axes[0])
    return figure


def summarize_sweep(
    rows: Rows, evaluation: Rows, names: Sequence[str]
) -> list[dict[str, float | None]]:
    """What each combination of swept values came to, over its seeds.

    Args:
        rows: rows of the log.
        evaluation: one summary per seed and combination; empty if there was none.
        names: columns of the swept settings.

    Returns:
        One line per combination, in order: its values, the number of seeds, and the
        median and the quartiles over seeds of the evaluation's mean (`evaluation_*`)
        and of the mean return over the last tenth of the updates (`return_*`). None
        where no number is known.

    >>> rows = [{"update": 1, "seed": s, "lr": 0.1, "mean_return": s} for s in (1, 3)]
    >>> summarize_sweep(rows, [], ["lr"])[0]["return_median"]
    2.0
    """
    table = []
    for values, group in _by_values(rows, names).items():
        line: dict[str, float | None] = dict(zip(names, values, strict=True))
        line["seeds"] = len({row.get("seed") for row in group})
        line |= _quartiles("evaluation", _evaluated(evaluation, names, values))
        line |= _quartiles("return", _last_returns(group))
        table.append(line)
    return table


def describe_sweep(
    table: Sequence[Mapping[str, float | None]],
) -> list[dict[str, str]]:
    """A sweep's table in words: "median (lower quartile to upper quartile)".

    Args:
        table: from `summarize_sweep`.

    Returns:
        The same lines with fewer columns, for a terminal.

    >>> rows = [{"update": 1, "seed": s, "lr": 1e-4, "mean_return": s} for s in (1, 3)]
    >>> describe_sweep(summarize_sweep(rows, [], ["lr"]))[0]["last updates"]
    '2.00 (1.50 to 2.50)'
    """
    told = [list(line)[: list(line).index("seeds") + 1] for line in table]
    return [
        {name: f"{line[name]:g}" for name in names}
        | {
            "evaluation": _spoken(line, "evaluation"),
            "last updates": _spoken(line, "return"),
        }
        for line, names in zip(table, told, strict=True)
    ]


def write_sweep(
    table: Sequence[Mapping[str, float | None]], folder: str | os.PathLike[str]
) -> None:
    """Keep a sweep's table as `sweep.json` and `sweep.csv`.

    Args:
        table: from `summarize_sweep`, of one line or more.
        folder: where to; it must exist.
    """
    folder = pathlib.Path(folder)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_json_atomically(folder / "sweep.json", list(table))
    write_text_atomically(folder / "sweep.csv", text.getvalue())


def plot_sweep(
    rows: Rows,
    evaluation: Rows,
    names: Sequence[str],
    path: str | os.PathLike[str],
    title: str,
) -> bool:
    """Draw what a sweep found into a PNG, where a picture can show it.

    Args:
        rows: as for `sweep_figure`.
        evaluation: as for `sweep_figure`.
        names: as for `sweep_figure`.
        path: the PNG; its folder must exist.
        title: one line above the picture.

    Returns:
        Whether there is a picture: where more than two settings vary there is none.

    Raises:
        ValueError: if nothing is swept, or no row has a return.
    """
    figure = sweep_figure(rows, evaluation, names, title)
    if figure is not None:
        _save(figure, path)
    return figure is not None


def sweep_figure(
    rows: Rows, evaluation: Rows, names: Sequence[str], title: str
) -> "Figure | None":
    """Draw what a sweep found as a figure.

    One setting: learning curves on the left, and on the right what each value came to,
    seed by seed and in the median. Two settings: a map of the medians. A setting with
    one value alone counts only where no other varies.

    Args:
        rows: rows of the log.
        evaluation: one summary per seed and combination. Where there is none, the mean
            return over the last tenth of the updates takes its place.
        names: columns of the swept settings.
        title: one line above the picture.

    Returns:
        A figure, or None where more than two settings vary.

    Raises:
        ValueError: if nothing is swept, or no row has a return.
    """
    if not names:
        raise ValueError("names is empty, needs the swept settings, at least one")
    _check_numbers(rows, "env_steps", "mean_return")
    varied = [n for n in names if len({row[n] for row in rows}) > 1] or [names[0]]
    if len(varied) > 2:
        return None
    groups = _by_values(rows, varied)
    finals = {
        values: _evaluated(evaluation, varied, values)
        if evaluation
        else _last_returns(group)
        for values, group in groups.items()
    }
    what = "final evaluation" if evaluation else "last updates"
    if len(varied) == 2:
        return _draw_map(finals, varied, title, what)
    return _draw_curves_and_finals(groups, finals, varied[0], title, what)


def _draw_curves_and_finals(
    groups: Mapping[Values, Rows],
    finals: Mapping[Values, Sequence[float]],
    name: str,
    title: str,
    what: str,
) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.5, 1.0])
    _draw_groups(left, groups, "env_steps", "mean_return")
    seeds = max(len({row.get("seed") for row in group}) for group in groups.values())
    banded = seeds > 1 and len(groups) <= _MOST_IN_LEGEND
    band = f", {_band(seeds)[2]}" if banded else ""
    left.set_title(f"while learning: median{band} of seeds", fontsize=9)
    known = {v: np.median(each) for (v,), each in finals.items() if each}
    right.plot(list(known), list(known.values()), color=_GREY, lw=1.0, zorder=1)
    for ((value,), each), colour in zip(
        finals.items(), _colours(len(finals)), strict=True
    ):
        right.plot([value] * len(each), each, "o", color=colour, ms=4, alpha=0.5, mew=0)
        if each:
            right.plot(value, known[value], "_", color=colour, ms=18, mew=2.5)
    right.set_title(f"{what}: each seed, and the median", fontsize=9)
    for axis in (left, right):
        _dress(axis, "mean_return")
    right.set_ylabel("")
    _label_x(left, "env_steps")
    right.set_xlabel(_in_words(name), fontsize=9)
    _scale(right, [value for (value,) in groups])
    _legend_of_groups(figure, left, [name], "outside lower center", _MOST_IN_LEGEND)
    return figure


def _draw_map(
    finals: Mapping[Values, Sequence[float]],
    names: Sequence[str],
    title: str,
    what: str,
) -> "Figure":
    """Medians by two settings, with the quartiles written under each."""
    from matplotlib.figure import Figure

    down, along = (sorted({values[i] for values in finals}) for i in (0, 1))
    size = max(2.4 + 1.1 * len(along), 4.8), max(1.8 + 0.6 * len(down), 3.0)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axis = figure.subplots()
    table = {values: _quartiles("", each) for values, each in finals.items()}
    grid = np.array(
        [[table.get((a, b), {}).get("_median") for b in along] for a in down], float
    )
    image = axis.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
    for i, j in np.argwhere(np.isfinite(grid)):
        line = table[down[i], along[j]]
        bright = grid[i, j] - np.nanmin(grid) > 0.55 * np.ptp(grid[np.isfinite(grid)])
        shade = "black" if bright else "white"
        text = f"{grid[i, j]:.4g}\n({line['_q25']:.4g} to {line['_q75']:.4g})"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=shade)
    axis.set_title(f"{what}: median (quartiles) over seeds", fontsize=9)
    axis.set_xticks(range(len(along)), [f"{value:g}" for value in along], fontsize=8)
    axis.set_yticks(range(len(down)), [f"{value:g}" for value in down], fontsize=8)
    axis.set_xlabel(_in_words(names[1]), fontsize=9)
    axis.set_ylabel(_in_words(names[0]), fontsize=9)
    bar = figure.colorbar(image)
    bar.set_label(_LABELS["mean_return"], fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, dpi=200, format="png")
    os.replace(beside, path)  # a viewer never meets half a picture


def _check_numbers(rows: Rows, x: str, y: str) -> None:
    if not _numbers(rows, x, y).size:
        raise ValueError(
            f"rows have no number in column {y!r} over {x!r}, need at least one; the "
            f"columns are {sorted(rows[0]) if rows else 'none, for there are no rows'}"
        )


def _numbers(rows: Rows, x: str, y: str) -> np.ndarray:
    """All that curves of y over x would show."""
    kept = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    values = np.array([row[y] for row in kept], float)
    return values[np.isfinite(values)]


def _by_values(rows: Rows, names: Sequence[str]) -> dict[Values, Rows]:
    """Rows by combination of values, in the order of the values."""
    found: dict[Values, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return {values: found[values] for values in sorted(found)}


def _evaluated(evaluation: Rows, names: Sequence[str], values: Values) -> list[float]:
    """Each seed's mean in the evaluation, of one combination."""
    return [r["mean"] for r in evaluation if tuple(r[n] for n in names) == values]


def _last_returns(rows: Rows) -> list[float]:
    """Each seed's mean return over the last tenth of the updates, where it is known."""
    last = max(row["update"] for row in rows)
    first = last - max(1, round(_LAST_PART * last)) + 1
    late = [row for row in rows if row["update"] >= first]
    values = _series(late, "update", "mean_return").y
    return [float(np.nanmean(seed)) for seed in values if np.isfinite(seed).any()]


def _quartiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    marks = {"median": 50, "q25": 25, "q75": 75}
    return {
        f"{name}_{mark}": float(np.percentile(values, q)) if values else None
        for mark, q in marks.items()
    }


def _spoken(line: Mapping[str, float | None], name: str) -> str:
    middle, low, high = (line[f"{name}_{mark}"] for mark in ("median", "q25", "q75"))
    return "-" if middle is None else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _in_words(name: str) -> str:
    return name.strip("_").replace("_", " ")


def _series(rows: Rows, x: str, y: str) -> _Series:
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
    return _Series(*grid)


def _draw(axis: "Axes", series: _Series, name: str, colour: str) -> None:
    """Thin lines for the seeds, a band and a thick line for what they share."""
    count = len(series.y)
    if count > 1:
        _draw_band(axis, series, colour, alpha=0.22, label=_band(count)[2])
        for i, (xs, ys) in enumerate(zip(series.x, series.y, strict=True)):
            label = f"{count} seeds" if i == 0 else None
            axis.plot(xs, ys, color=colour, lw=0.6, alpha=0.45, label=label)
    label = "median" if count > 1 else _LABELS.get(name, name).partition("\n")[0]
    _draw_median(axis, series, colour, label)


def _draw_groups(
    axis: "Axes", groups: Mapping[Values, Rows], x: str, name: str
) -> None:
    """One median per combination, with a band while bands can be told apart."""
    colours = _colours(len(groups))
    for (values, rows), colour in zip(groups.items(), colours, strict=True):
        series = _series(rows, x, name)
        if len(series.y) > 1 and len(groups) <= _MOST_IN_LEGEND:
            _draw_band(axis, series, colour, alpha=0.15)
        _draw_median(axis, series, colour, ", ".join(f"{v:g}" for v in values))


def _band(count: int) -> tuple[float, float, str]:
    """The percentiles that a band of so many seeds lies between, and its name."""
    if count >= _ENOUGH_FOR_QUARTILES:
        return 25, 75, "middle half"
    return 0, 100, "lowest to highest"


def _draw_band(axis: "Axes", series: _Series, colour: Any, **style: Any) -> None:
    low, high, _ = _band(len(series.y))
    edges = _over_seeds(series.y, low), _over_seeds(series.y, high)
    axis.fill_between(_over_seeds(series.x, 50), *edges, color=colour, lw=0, **style)


def _draw_median(axis: "Axes", series: _Series, colour: Any, label: str) -> None:
    # A lone point would be an invisible line.
    marker = "o" if np.isfinite(series.y).any(axis=0).sum() == 1 else None
    middle, median = (_over_seeds(values, 50) for values in series)
    axis.plot(middle, median, color=colour, lw=2.0, label=label, marker=marker)


def _over_seeds(values: np.ndarray, percentile: float) -> np.ndarray:
    with warnings.catch_warnings():
        # An update that no seed has a number for is a gap in the line, not a fault.
        warnings.filterwarnings("ignore", "All-NaN slice encountered")
        return np.nanpercentile(values, percentile, axis=0)


def _colours(count: int) -> list[Any]:
    """Colours of their own while there are some, then shades from dark to light."""
    if count <= len(_ONE_EACH):
        return list(_ONE_EACH[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * i / (count - 1)) for i in range(count)]


def _dress(axis: "Axes", name: str) -> None:
    axis.set_ylabel(_LABELS.get(name, name), fontsize=9)
    axis.grid(color=_GREY, alpha=0.2, lw=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _label_x(axis: "Axes", x: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(_LABELS.get(x, x), fontsize=9)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _make_logarithmic(axis: "Axes") -> None:
    """A log scale whose few labels stay apart in a small panel."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _scale(axis: "Axes", values: Sequence[float]) -> None:
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


def _legend_above(axis: "Axes") -> None:
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


def _legend_of_groups(
    figure: "Figure", axis: "Axes", names: Sequence[str], where: str, ncols: int
) -> None:
    """Beside the axes; of many shades only the first and the last are named."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > _MOST_IN_LEGEND:
        handles, labels = [handles[0], handles[-1]], [labels[0], f"to {labels[-1]}"]
    place: dict[str, Any] = {"loc": where, "ncols": ncols}
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "title_fontsize": 8}
    title = ",\n".join(_in_words(name) for name in names)
    figure.legend(handles, labels, title=title, **place, **style)
