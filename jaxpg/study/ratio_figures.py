"""Figures of the study of ratios: against the horizon, a panel for each KL."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpg.study.figures import (
    Style,
    dress,
    logarithmic,
    logarithmic_y,
    panels,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bias_of_ratios_figure", "ess_figure", "variance_of_ratios_figure"]

Row = dict[str, Any]
ENDS = ("low", "high")


def variance_of_ratios_figure(results: dict[str, Any]) -> "Figure":
    """Variance over that of the same estimator on policy, and E[W^2] beside it.

    Args:
        results: what `results.json` holds.
    """
    figure, axes = _by_kl(results, "variance", over="on_policy_variance")
    for axis, kl in zip(axes, _kls(results), strict=True):
        horizons, moments = _theory(results, kl)
        _pale(axis, horizons, moments, "#555555", "E[W²], exact")
        logarithmic_y(axis)
    axes[0].set_ylabel("variance over that of the\nsame estimator on policy")
    return _closed(figure, axes, results)


def bias_of_ratios_figure(results: dict[str, Any]) -> "Figure":
    """Bias along the gradient against the horizon, and the exact one.

    Args:
        results: what `results.json` holds.
    """
    figure, axes = _by_kl(results, "bias", scale=100.0, error="bias_error")
    for axis, kl in zip(axes, _kls(results), strict=True):
        for style, mine in _lines(results, kl):
            exact = 100 * _column(mine, "exact_bias")
            if np.any(exact != 0.0):
                _pale(axis, _column(mine, "horizon"), exact, style["color"])
        axis.set_ylim(-160, 60)
    axes[0].set_ylabel("bias along the gradient\n(% of |∇J|, bars: 95%)")
    return _closed(figure, axes, results)


def ess_figure(results: dict[str, Any]) -> "Figure":
    """The effective share of decisions against the horizon.

    Args:
        results: what `results.json` holds.
    """
    figure, axes = _by_kl(results, "ess", scale=100.0)
    for axis, kl in zip(axes, _kls(results), strict=True):
        horizons, moments = _theory(results, kl)
        _pale(axis, horizons, 100 / moments, "#555555", "1 / E[W²], exact")
        logarithmic_y(axis)
    axes[0].set_ylabel("effective sample size (% of decisions)")
    return _closed(figure, axes, results)


def _by_kl(
    results: dict[str, Any],
    name: str,
    *,
    scale: float = 1.0,
    over: str | None = None,
    error: str | None = None,
) -> Any:
    kls = _kls(results)
    figure, axes = panels(len(kls), width=3.1, sharey=True)
    for axis, kl in zip(axes, kls, strict=True):
        for style, mine in _lines(results, kl):
            shift = style.pop("shift") if error else style.pop("shift") ** 0
            x = _column(mine, "horizon") * shift
            unit = scale / (_column(mine, over) if over else 1.0)
            if error:
                bars = 1.96 * scale * _column(mine, error)
                axis.errorbar(x, unit * _column(mine, name), bars, ms=4, lw=1, **style)
                continue
            axis.plot(x, unit * _column(mine, name), lw=1.3, ms=4, **style)
            low, high = (unit * _column(mine, f"{name}_{end}") for end in ENDS)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.09, lw=0)
        axis.set_title(f"KL {kl:g} nats a decision", fontsize=9)
        logarithmic(axis, _horizons(results), "horizon T (decisions)")
        dress(axis)
    return figure, axes


def _pale(
    axis: "Axes", x: np.ndarray, y: np.ndarray, colour: str, label: str | None = None
) -> None:
    """A wide pale line for what is known exactly."""
    if np.isfinite(y).any():
        axis.plot(x, y, color=colour, lw=6, alpha=0.25, zorder=1, label=label)


def _theory(results: dict[str, Any], kl: float) -> tuple[np.ndarray, np.ndarray]:
    """The exact second moment of the trajectory's weight at each horizon."""
    found = {
        r["horizon"]: r["weight_second_moment"]
        for r in results["rows"]
        if r["kl"] == kl and r["weight_second_moment"] is not None
    }
    horizons = np.array(sorted(found), float)
    return horizons, np.array([found[h] for h in sorted(found)], float)


def _lines(results: dict[str, Any], kl: float) -> list[tuple[Style, list[Row]]]:
    names = list(dict.fromkeys(row["estimator"] for row in results["rows"]))
    found = []
    for index, name in enumerate(names):
        mine = [r for r in results["rows"] if r["estimator"] == name and r["kl"] == kl]
        style = style_of(index) | {
            "label": name.replace("reward-to-go/none/", ""),
            "shift": 2.0 ** (0.35 * ((index + 0.5) / len(names) - 0.5)),
        }
        found.append((style, sorted(mine, key=lambda r: r["horizon"])))
    return found


def _closed(figure: "Figure", axes: Any, results: dict[str, Any]) -> "Figure":
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    title = f"{results['facts']['label']}, N = {results['facts']['batch_size']}"
    figure.suptitle(title, fontsize=11)
    return figure


def _kls(results: dict[str, Any]) -> list[float]:
    return sorted({row["kl"] for row in results["rows"]})


def _horizons(results: dict[str, Any]) -> list[int]:
    return sorted({row["horizon"] for row in results["rows"]})


def _column(rows: list[Row], name: str) -> np.ndarray:
    return np.array([np.nan if r.get(name) is None else r[name] for r in rows], float)
