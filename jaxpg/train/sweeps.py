"""What a sweep found: a table of its combinations, and a picture.

Seeds are put together for each combination of values and never across them: one line of
the table, one place in the picture for each.
"""

import csv
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpg.train.axes import (
    GREY,
    LABELS,
    MOST_IN_LEGEND,
    band_of,
    colours_for,
    draw_groups,
    dress,
    in_words,
    label_x,
    legend_of_groups,
    save_figure,
    scale_to,
)
from jaxpg.train.provenance import write_json_atomically, write_text_atomically
from jaxpg.train.series import (
    Rows,
    Values,
    by_values,
    check_numbers,
    evaluated,
    last_returns,
    quartiles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "describe_sweep",
    "plot_sweep",
    "summarize_sweep",
    "sweep_figure",
    "write_sweep",
]


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
    for values, group in by_values(rows, names).items():
        line: dict[str, float | None] = dict(zip(names, values, strict=True))
        line["seeds"] = len({row.get("seed") for row in group})
        line |= quartiles("evaluation", evaluated(evaluation, names, values))
        line |= quartiles("return", last_returns(group))
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
        save_figure(figure, path)
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
    check_numbers(rows, "env_steps", "mean_return")
    varied = [n for n in names if len({row[n] for row in rows}) > 1] or [names[0]]
    if len(varied) > 2:
        return None
    groups = by_values(rows, varied)
    finals = {
        values: evaluated(evaluation, varied, values)
        if evaluation
        else last_returns(group)
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
    draw_groups(left, groups, "env_steps", "mean_return")
    seeds = max(len({row.get("seed") for row in group}) for group in groups.values())
    banded = seeds > 1 and len(groups) <= MOST_IN_LEGEND
    band = f", {band_of(seeds)[2]}" if banded else ""
    left.set_title(f"while learning: median{band} of seeds", fontsize=9)
    known = {v: np.median(each) for (v,), each in finals.items() if each}
    right.plot(list(known), list(known.values()), color=GREY, lw=1.0, zorder=1)
    for ((value,), each), colour in zip(
        finals.items(), colours_for(len(finals)), strict=True
    ):
        right.plot([value] * len(each), each, "o", color=colour, ms=4, alpha=0.5, mew=0)
        if each:
            right.plot(value, known[value], "_", color=colour, ms=18, mew=2.5)
    right.set_title(f"{what}: each seed, and the median", fontsize=9)
    for axis in (left, right):
        dress(axis, "mean_return")
    right.set_ylabel("")
    label_x(left, "env_steps")
    right.set_xlabel(in_words(name), fontsize=9)
    scale_to(right, [value for (value,) in groups])
    legend_of_groups(figure, left, [name], "outside lower center", MOST_IN_LEGEND)
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
    table = {values: quartiles("", each) for values, each in finals.items()}
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
    axis.set_xlabel(in_words(names[1]), fontsize=9)
    axis.set_ylabel(in_words(names[0]), fontsize=9)
    bar = figure.colorbar(image)
    bar.set_label(LABELS["mean_return"], fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _spoken(line: Mapping[str, float | None], name: str) -> str:
    middle, low, high = (line[f"{name}_{mark}"] for mark in ("median", "q25", "q75"))
    return "-" if middle is None else f"{middle:.2f} ({low:.2f} to {high:.2f})"
