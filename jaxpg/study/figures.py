"""Figures of the study of variance, fit to be printed.

Colours are Okabe and Ito's, told apart by all readers; line styles and markers tell
lines apart without any colour. Legends stand outside the axes. Only
`matplotlib.figure.Figure` is used: no pyplot, no global state, no display.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpg.study.laws import Law
from jaxpg.study.tables import best_bias, comparison_size
from jaxpg.train.provenance import write_text_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Style",
    "block_figure",
    "bias_figure",
    "cost_figure",
    "dress",
    "logarithmic",
    "logarithmic_y",
    "panels",
    "save",
    "signal_figure",
    "style_of",
    "variance_figure",
]

Row = dict[str, Any]
Style = dict[str, Any]

COLOURS = (
    "#000000",
    "#D55E00",
    "#56B4E9",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#7A5195",
)
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^v<>Pp"


def variance_figure(results: dict[str, Any]) -> "Figure":
    """Variance against batch size, and the noise scale that it makes.

    Args:
        results: what `results.json` holds.
    """
    figure, (left, right) = panels(2)
    for style, rows, found in _by_estimator(results):
        sizes = _column(rows, "batch_size")
        _line(left, sizes, rows, "variance", style)
        _line(right, sizes, rows, "relative_variance", style)
        if found["exact_law"] is not None:
            law = Law(**found["exact_law"])
            for axis, scale in ((left, 1.0), (right, _over_base(results, sizes))):
                axis.plot(
                    sizes, law.variance(sizes) * scale, color=style["color"], lw=5,
                    alpha=0.25, solid_capstyle="butt", zorder=1,
                )  # fmt: skip
    left.set_ylabel("total variance of the gradient\n(units of return²)")
    right.set_ylabel(f"variance relative to\n{results['rows'][0]['base']}")
    logarithmic_y(left)
    logarithmic_y(right)
    for axis in (left, right):
        _against_batch_size(axis, results)
    _legend(figure, left, _wide_lines(results))
    figure.suptitle(_title(results), fontsize=11)
    return figure


def bias_figure(results: dict[str, Any]) -> "Figure":
    """Bias along the gradient, with twice its standard error."""
    figure, (axis,) = panels(1)
    for style, rows, _ in _by_estimator(results):
        sizes = _column(rows, "batch_size")
        name = best_bias(rows[0])
        bias, error = (100 * _column(rows, n) for n in (name, f"{name}_error"))
        axis.errorbar(
            sizes * style["shift"], bias, 1.96 * error, **_plain(style), capsize=2
        )
    axis.axhline(0.0, color="#555555", lw=0.8)
    axis.set_ylabel("bias along the gradient\n(% of |∇J|, bars: 95%)")
    _against_batch_size(axis, results)
    _legend(figure, axis)
    figure.suptitle(_title(results), fontsize=11)
    return figure


def signal_figure(results: dict[str, Any]) -> "Figure":
    """Signal-to-noise ratio and cosine to the reference."""
    figure, (left, right, last) = panels(3)
    for style, rows, _ in _by_estimator(results):
        sizes = _column(rows, "batch_size")
        _line(left, sizes, rows, "snr", style)
        _line(right, sizes, rows, "cosine", style)
        _line(last, sizes, rows, "noise_scale", style)
    logarithmic_y(left)
    left.axhline(1.0, color="#555555", lw=0.8)
    left.set_ylabel("signal-to-noise ratio, |∇J|² / variance")
    right.set_ylabel("cosine to the reference gradient")
    last.set_ylabel("N · variance / |∇J|²\n(noise scale, trajectories)")
    last.set_ylim(bottom=0.0)
    for axis in (left, right, last):
        _against_batch_size(axis, results)
    _legend(figure, left)
    figure.suptitle(_title(results), fontsize=11)
    return figure


def cost_figure(results: dict[str, Any]) -> "Figure":
    """What a unit of accuracy costs: variance times seconds, and what it is made of."""
    rows = [
        row
        for _, mine, found in _by_estimator(results)
        for row in mine
        if row["batch_size"] == comparison_size(mine)
        if row["variance_times_seconds"] is not None
    ]
    figure, axes = panels(3, height=0.42 * len(rows) + 1.4, sharey=True)
    names = [row["estimator"] for row in rows]
    places = np.arange(len(rows))[::-1]
    per = 1e6 / np.array([row["batch_size"] for row in rows])
    seconds = _column(rows, "seconds")
    for axis, name, scale, label in zip(
        axes,
        ("noise_scale", "seconds", "variance_times_seconds"),
        (np.ones(len(rows)), per, np.ones(len(rows))),
        (
            "N · variance / |∇J|²\n(trajectories)",
            "time of a trajectory\n(µs, sampling included)",
            "variance × seconds\n(units of return² · s)",
        ),
        strict=True,
    ):
        values = _column(rows, name) * scale
        low, high = _bounds(
            rows, "noise_scale" if name == "noise_scale" else "variance"
        )
        if name == "variance_times_seconds":
            low, high = low * seconds, high * seconds
        bars = [values - low, high - values] if name != "seconds" else None
        colours = [_colour(results, n) for n in names]
        axis.barh(places, values, color=colours, height=0.7, alpha=0.6)
        if bars is not None:
            axis.errorbar(
                values, places, xerr=np.maximum(np.nan_to_num(bars), 0.0), fmt="none",
                ecolor="#333333", elinewidth=1, capsize=2,
            )  # fmt: skip
        axis.set_xlabel(label)
        axis.set_yticks(places, names)
        dress(axis)
    figure.suptitle(f"{_title(results)}; bars: 95%", fontsize=11)
    return figure


def block_figure(results: dict[str, Any]) -> "Figure":
    """Where the variance sits: each array's share, beside its share of parameters."""
    rows = [
        row
        for _, mine, _ in _by_estimator(results)
        for row in mine
        if row["batch_size"] == comparison_size(mine)
        if row["variance"]
    ]
    blocks = list(rows[0]["variance_by_block"])
    figure, (axis,) = panels(1, height=0.36 * len(rows) + 1.6)
    left = np.zeros(len(rows))
    places = np.arange(len(rows))[::-1]
    for k, block in enumerate(blocks):
        share = np.array(
            [100 * (r["variance_by_block"][block] or 0.0) / r["variance"] for r in rows]
        )
        axis.barh(
            places, share, left=left, height=0.75, label=block,
            color=COLOURS[1:][k % 7], edgecolor="white", hatch=("", "///")[k // 7 % 2],
        )  # fmt: skip
        left = left + share
    axis.set_yticks(places, [row["estimator"] for row in rows])
    axis.set_xlabel("share of the total variance (%)")
    axis.set_xlim(0, 100)
    dress(axis)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="block")
    figure.suptitle(_title(results), fontsize=11)
    return figure


def panels(
    number: int, *, width: float = 4.4, height: float = 4.2, **options: Any
) -> tuple[Any, Any]:
    """A figure with panels in a row, and room for a legend beside them.

    Args:
        number: of panels.
        width: of one, in inches.
        height: of all, in inches.
        **options: of matplotlib's `subplots`.

    Returns:
        The figure and its axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * number + 2.4, height), layout="constrained")
    return figure, figure.subplots(1, number, squeeze=False, **options)[0]


def save(figure: "Figure", folder: Path, name: str) -> bytes:
    """Write a figure as PNG and SVG.

    Args:
        figure: any.
        folder: must exist.
        name: of both files, without an ending.

    Returns:
        The PNG.
    """
    picture, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(picture, format="png", dpi=160)
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    (folder / f"{name}.png").write_bytes(picture.getvalue())
    write_text_atomically(folder / f"{name}.svg", drawing.getvalue())
    return picture.getvalue()


def style_of(index: int) -> Style:
    """A colour, a line style and a marker that no other of some dozens has.

    Args:
        index: of the line.
    """
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "ls": LINES[turn % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def dress(axis: "Axes") -> None:
    """A faint grid, and no box."""
    axis.grid(color="#555555", alpha=0.2, lw=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)


def logarithmic_y(axis: "Axes") -> None:
    """A vertical logarithmic axis, with plain numbers where it spans little.

    Args:
        axis: of the figure; what it shows is drawn already.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if low > 0.0 and high / low < 1e3:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def logarithmic(axis: "Axes", sizes: Sequence[int], label: str) -> None:
    """A horizontal axis of powers of two.

    Args:
        axis: of the figure.
        sizes: those that are shown.
        label: what they are, with their unit.
    """
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    shown = sorted(set(int(n) for n in sizes))
    step = -(-len(shown) // 8)
    axis.set_xticks(shown[::step], [f"{n:,}".replace(",", " ") for n in shown[::step]])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(label)
    dress(axis)


def _by_estimator(results: dict[str, Any]) -> list[tuple[Style, list[Row], Row]]:
    """Each estimator's style, its cells in order of size, and what was found of it."""
    summary, found = results["summary"], []
    for index, line in enumerate(summary):
        mine = [r for r in results["rows"] if r["estimator"] == line["estimator"]]
        style = style_of(index) | {
            "label": line["estimator"],
            "shift": 2.0 ** (0.3 * ((index + 0.5) / len(summary) - 0.5)),
        }
        if mine:
            found.append((style, sorted(mine, key=lambda r: r["batch_size"]), line))
    return found


def _colour(results: dict[str, Any], name: str) -> str:
    names = [line["estimator"] for line in results["summary"]]
    return COLOURS[names.index(name) % len(COLOURS)]


def _line(
    axis: "Axes", x: np.ndarray, rows: list[Row], name: str, style: Style
) -> None:
    """A quantity with its interval; hollow where too few batches give one."""
    y = _column(rows, name)
    low, high = _bounds(rows, name)
    known = np.isfinite(low)
    axis.plot(x, y, lw=1.3, **_plain(style), markevery=list(np.flatnonzero(known)))
    axis.plot(
        x[~known], y[~known], ls="none", marker=style["marker"], ms=4,
        mec=style["color"], mfc="none",
    )  # fmt: skip
    axis.fill_between(x, low, high, color=style["color"], alpha=0.09, lw=0)


def _plain(style: Style) -> Style:
    return {k: v for k, v in style.items() if k != "shift"} | {"ms": 4}


def _bounds(rows: list[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    return _column(rows, f"{name}_low"), _column(rows, f"{name}_high")


def _column(rows: list[Row], name: str) -> np.ndarray:
    """Numbers of a column, NaN where there is none."""
    return np.array(
        [np.nan if row.get(name) is None else row[name] for row in rows], float
    )


def _against_batch_size(axis: "Axes", results: dict[str, Any]) -> None:
    sizes = [row["batch_size"] for row in results["rows"]]
    logarithmic(axis, sizes, "batch size N (trajectories)")


def _legend(figure: "Figure", axis: "Axes", more: Sequence[Any] = ()) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        [*handles, *more],
        [*labels, *(m.get_label() for m in more)],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )


def _wide_lines(results: dict[str, Any]) -> list[Any]:
    """What pale wide lines and hollow markers stand for, where there are some."""
    from matplotlib.lines import Line2D

    found: list[Any] = []
    if any(line["exact_law"] is not None for line in results["summary"]):
        found.append(Line2D([], [], color="#555555", lw=5, alpha=0.25, label="exact"))
    if any(row["variance_low"] is None for row in results["rows"]):
        found.append(
            Line2D(
                [],
                [],
                ls="none",
                marker="o",
                ms=4,
                mec="#555555",
                mfc="none",
                label="too few batches\nfor an interval",
            )
        )
    return found


def _over_base(results: dict[str, Any], sizes: np.ndarray) -> np.ndarray:
    """1 over the exact variance of what others are relative to; NaN if unknown."""
    base = results["rows"][0]["base"]
    for line in results["summary"]:
        if line["estimator"] == base and line["exact_law"] is not None:
            return 1.0 / np.asarray(Law(**line["exact_law"]).variance(sizes))
    return np.full(sizes.shape, np.nan)


def _title(results: dict[str, Any]) -> str:
    return str(results["facts"]["label"])
