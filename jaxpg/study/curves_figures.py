"""Figures of learning curves, and of time to a target against the batch size."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpg.study.figures import dress, logarithmic, logarithmic_y, panels, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["learning_figure", "race_figure", "seconds_figure"]

Results = dict[str, Any]


def learning_figure(results: Results) -> "Figure":
    """Return against episodes: equal samples.

    Args:
        results: what `results.json` holds.
    """
    return _curves(results, "episodes", "episodes")


def seconds_figure(results: Results) -> "Figure":
    """Return against seconds of one run: equal wall-clock.

    Args:
        results: what `results.json` holds.
    """
    return _curves(results, "seconds", "wall-clock of one run (s)")


def race_figure(results: Results) -> "Figure":
    """Updates, episodes and seconds to the target, and what the noise scale predicts.

    Args:
        results: what `results.json` holds.
    """
    figure, axes = panels(3, width=3.6)
    sizes = sorted({row["batch_size"] for row in results["rows"]})
    dense = np.geomspace(sizes[0], sizes[-1], 60)
    for index, found in enumerate(results["summary"]):
        mine = [r for r in results["rows"] if r["estimator"] == found["estimator"]]
        style = style_of(index + 1)
        x = np.array([row["batch_size"] for row in mine], float)
        for axis, name in zip(axes, ("updates", "episodes", "seconds"), strict=True):
            y, low, high = (
                np.array([np.nan if r[n] is None else r[n] for r in mine], float)
                for n in (name, f"{name}_low", f"{name}_high")
            )
            bars = np.nan_to_num([np.maximum(y - low, 0), np.maximum(high - y, 0)])
            axis.errorbar(
                x, y, bars, ms=4, lw=1.3, capsize=2, label=found["estimator"], **style
            )
        for kind, line, told in (
            ("", ":", "noise scale's prediction"),
            ("fitted_", "--", "best curve of that form"),
        ):
            scale, least = found[f"{kind}noise_scale"], found[f"{kind}least_updates"]
            if None in (scale, least):
                continue
            updates = least * (1 + scale / dense)
            label = f"{told}, B = {scale:.0f}"
            colour = style["color"]
            axes[0].plot(dense, updates, line, color=colour, label=label, lw=1.2)
            axes[1].plot(dense, updates * dense, line, color=colour, lw=1.2)
    for axis, label in zip(
        axes,
        ("updates to the target", "episodes to the target", "seconds to the target"),
        strict=True,
    ):
        logarithmic_y(axis)
        axis.set_ylabel(label)
        logarithmic(axis, sizes, "batch size N (episodes)")
    _close(figure, axes[0])
    facts = results["facts"]
    figure.suptitle(
        f"{facts['label']}, to a mean return of {facts['target_return']:g}: median and "
        f"quartiles of {facts['seeds']} seeds",
        fontsize=11,
    )
    return figure


def _curves(results: Results, x: str, label: str) -> "Figure":
    sizes = sorted({curve["batch_size"] for curve in results["curves"]})
    names = list(dict.fromkeys(curve["estimator"] for curve in results["curves"]))
    figure, axes = panels(len(sizes), width=3.4, sharey=True)
    for axis, size in zip(axes, sizes, strict=True):
        for curve in results["curves"]:
            if curve["batch_size"] != size:
                continue
            style = style_of(names.index(curve["estimator"]))
            colour = style["color"]
            axis.plot(
                curve[x], curve["iqm"], color=colour, lw=1.5, label=curve["estimator"]
            )
            axis.fill_between(
                curve[x], curve["low"], curve["high"], color=colour, alpha=0.13, lw=0
            )
        axis.set_title(f"N = {size} episodes an update", fontsize=9)
        axis.set_xlabel(label)
        dress(axis)
    axes[0].set_ylabel(
        "return of an update's episodes\n(interquartile mean over seeds)"
    )
    _close(figure, axes[0])
    facts = results["facts"]
    figure.suptitle(
        f"{facts['label']}, {facts['seeds']} seeds, bands: 95%", fontsize=11
    )
    return figure


def _close(figure: "Figure", axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
