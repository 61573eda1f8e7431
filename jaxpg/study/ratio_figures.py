"""Figures of the study of ratios: against the horizon, a panel for each KL."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpg.study.figures import Style, dress, logarithmic, panels, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bias_of_ratios_figure", "ess_figure", "variance_of_ratios_figure"]

Row = dict[str, Any]


def variance_of_ratios_figure(results: dict[str, Any]) -> "Figure":
    """N V / |G|^2 against the horizon, and E[W^2], which the whole product follows.

    Args:
        results: what `results.json` holds.
    """
    figure, axes = _by_kl(results, "noise_scale", interval=True)
    for axis, kl in zip(axes, _kls(results), strict=True):
        horizons, moments = _theory(results, kl, "weight_second_moment")
        if np.isfinite(moments).any():
            first = [
                r["noise_scale"]
                for r in results["rows"]
                if r["kl"] == kl and r["horizon"] == horizons[0]
                if r["estimator"].endswith("/whole")
            ]
            scale = max(first, default=1.0) / moments[0] / horizons[0]
            axis.plot(
                horizons,
                scale * horizons * moments,
                color="#555555",
                lw=6,
                alpha=0.25,
                zorder=1,
                label="T · E[W²], exact,\nfrom the first point on",
            )
        axis.set_yscale("log")
    axes[0].set_ylabel("N · variance / |∇J|²\n(trajectories)")
    return _closed(figure, axes, results)


def bias_of_ratios_figure(results: dict[str, Any]) -> "Figure":
    """Bias along the gradient against the horizon.

    Args:
        results: what `results.json` holds.
    """
    figure, axes = _by_kl(results, "bias_norm", interval=False)
    for axis, kl in zip(axes, _kls(results), strict=True):
        for style, mine in _lines(results, kl):
            exact = _column(mine, "exact_bias_norm")
            exact[exact == 0.0] = np.nan
            axis.plot(
                _column(mine, "horizon"),
                100 * exact,
                color=style["color"],
                lw=6,
                alpha=0.25,
                zorder=1,
            )
    axes[0].set_ylabel("|bias| / |∇J| (%)")
    return _closed(figure, axes, results)


def ess_figure(results: dict[str, Any]) -> "Figure":
    """The effective share of decisions against the horizon.

    Args:
        results: what `results.json` holds.
    """
    figure, axes = _by_kl(results, "ess", interval=False)
    for axis, kl in zip(axes, _kls(results), strict=True):
        horizons, moments = _theory(results, kl, "weight_second_moment")
        if np.isfinite(moments).any():
            axis.plot(
                horizons,
                100 / moments,
                color="#555555",
                lw=6,
                alpha=0.25,
                zorder=1,
                label="1 / E[W²], exact",
            )
        axis.set_yscale("log")
    axes[0].set_ylabel("effective sample size (% of decisions)")
    return _closed(figure, axes, results)


def _by_kl(results: dict[str, Any], name: str, *, interval: bool) -> Any:
    kls = _kls(results)
    figure, axes = panels(len(kls), width=3.1, sharey=True)
    scale = 1.0 if name == "noise_scale" else 100.0
    for axis, kl in zip(axes, kls, strict=True):
        for style, mine in _lines(results, kl):
            x = _column(mine, "horizon")
            y = scale * (_norms(mine) if name == "bias_norm" else _column(mine, name))
            axis.plot(x, y, lw=1.3, ms=4, **style)
            if interval:
                low, high = (_column(mine, f"{name}_{end}") for end in ("low", "high"))
                axis.fill_between(x, low, high, color=style["color"], alpha=0.09, lw=0)
        axis.set_title(f"KL {kl:g} nats a decision", fontsize=9)
        logarithmic(axis, _horizons(results), "horizon T (decisions)")
        dress(axis)
    return figure, axes


def _norms(rows: list[Row]) -> np.ndarray:
    """|bias| where it is seen: more than twice its standard error over 0."""
    square, error = (_column(rows, n) for n in ("bias_norm_sq", "bias_norm_sq_error"))
    seen = square > 2.0 * np.nan_to_num(error, nan=np.inf)
    return np.where(seen, np.sqrt(np.maximum(square, 0.0)), np.nan)


def _theory(
    results: dict[str, Any], kl: float, name: str
) -> tuple[np.ndarray, np.ndarray]:
    found = {
        r["horizon"]: r[name]
        for r in results["rows"]
        if r["kl"] == kl and r[name] is not None
    }
    horizons = np.array(sorted(found), float)
    return horizons, np.array([found[h] for h in sorted(found)], float)


def _lines(results: dict[str, Any], kl: float) -> list[tuple[Style, list[Row]]]:
    names = list(dict.fromkeys(row["estimator"] for row in results["rows"]))
    found = []
    for index, name in enumerate(names):
        mine = [r for r in results["rows"] if r["estimator"] == name and r["kl"] == kl]
        style = style_of(index) | {"label": name.replace("reward-to-go/none/", "")}
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
