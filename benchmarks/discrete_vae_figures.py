"""Pictures of `discrete_vae.py`: variance, bounds, bias, images.

Colours are Okabe and Ito's; markers tell lines apart without them.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jaxpg.systems.discrete_vae import show_images
from jaxpg.systems.latent_model import draw_image, reconstruct

STYLES = {
    "score": ("#000000", "o"),
    "moving-average": ("#777777", "s"),
    "leave-one-out": ("#0072B2", "D"),
    "nvil": ("#56B4E9", "^"),
    "vimco": ("#7A5195", "v"),
    "arm": ("#E69F00", "<"),
    "disarm": ("#D55E00", ">"),
    "rebar": ("#009E73", "P"),
    "relax": ("#004D40", "X"),
    "gumbel-softmax": ("#CC79A7", "*"),
    "straight-through": ("#882255", "p"),
    "exact": ("#000000", "_"),
}
COLUMNS, ROWS = 10, 3


def draw(stored: dict[str, Any], folder: Path) -> None:
    """Every picture that the stored results are enough for."""
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    parts = {"variance": variance, "learning": bounds, "bias": bias}
    for part, make in parts.items():
        if part in stored:
            name = "bounds" if part == "learning" else part
            make(stored).savefig(folder / f"discrete-vae-{name}.png", dpi=150)
    if "learning" in stored:
        images(stored).savefig(folder / "discrete-vae-images.png", dpi=150)


def variance(stored: dict[str, Any]) -> Figure:
    """Variance against updates, a line for each estimator."""
    found = stored["variance"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True)
    for axis, (model, lines) in zip(axes, found.items(), strict=True):
        # The first checkpoint is before the first update: it has its place on the left.
        places = [max(at, 40) for at in lines["updates"]]
        for name in (n for n in STYLES if n in lines and n != "exact"):
            colour, marker = STYLES[name]
            biased = name in ("gumbel-softmax", "straight-through")
            axis.plot(
                places, lines[name], color=colour, marker=marker, ms=6, label=name,
                ls="--" if biased else ":" if name == "vimco" else "-",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.minorticks_off()
        axis.set_xticks(places, [str(at) for at in lines["updates"]])
        axis.set_xlabel("updates of the reference run")
        axis.set_title(model)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("total variance of the inference\nnetwork's gradient (nats²)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def bounds(stored: dict[str, Any]) -> Figure:
    """Test bounds at the end of training, a row for each estimator."""
    found = stored["learning"]
    lines = -(-len(found) // 2)
    figure = Figure(figsize=(10, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, 2, squeeze=False).ravel()
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    for axis, (model, rows) in zip(axes, found.items(), strict=False):
        names = [name for name in STYLES if name in rows][::-1]
        for place, name in enumerate(names):
            row, (colour, marker) = rows[name], STYLES[name]
            marker = "D" if name == "exact" else marker
            plain = {"color": colour, "marker": marker, "ls": "", "ms": 6}
            _seeds(axis, row["test_bound"][-1], place, plain)
            _seeds(axis, row["test_tight_bound"][-1], place, plain | {"mfc": "white"})
            if "test_log_likelihood" in row:
                ends = row["test_log_likelihood"][-1]
                _seeds(axis, ends, place, {"color": colour, "marker": "|", "ls": "",
                                           "ms": 12})  # fmt: skip
        axis.set_yticks(range(len(names)), names)
        axis.set_title(model)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3, axis="x")
    for axis in axes[-2:]:
        axis.set_xlabel("nats per test image; more is better")
    seeds = stored["settings"]["seeds"]
    is_counted = any(
        "test_log_likelihood" in x for m in found.values() for x in m.values()
    )
    figure.suptitle(
        f"{seeds} seeds each. Filled: evidence bound. Open: importance-weighted bound "
        "of 100 samples." + " Bar: exact log-likelihood." * is_counted,
        fontsize=10,
    )
    return figure


def _seeds(axis: Any, values: list[float], place: int, style: dict[str, Any]) -> None:
    axis.plot(values, np.full(len(values), place), alpha=0.8, **style)


def bias(stored: dict[str, Any]) -> Figure:
    """Bias against the exact gradient, and variance, of 8 bits."""
    found = stored["bias"]
    names = [name for name in STYLES if name in found][::-1]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, name in enumerate(names):
        row, (colour, marker) = found[name], STYLES[name]
        marker = "D" if name == "exact" else marker
        left.errorbar(
            100 * row["along"], place, xerr=196 * row["along_error"], color=colour,
            marker=marker, capsize=3,
        )  # fmt: skip
        if name != "exact":
            right.plot(row["variance"], place, color=colour, marker=marker)
    left.axvline(0.0, color="#555555", lw=0.8)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("bias along the exact gradient\n(% of its length; bars: 95%)")
    right.set_xscale("log")
    right.set_xlabel("total variance over the squared\nlength of the exact gradient")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def images(stored: dict[str, Any]) -> Figure:
    """Reconstructions and samples of every model that leave-one-out trained."""
    found = stored["learning"]
    figure = Figure(figsize=(9, 2.1 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), (model, row) in zip(rows, found.items(), strict=True):
        shown = {
            name: np.array(x, np.float32) / 100
            for name, x in row["leave-one-out"]["images"].items()
        }
        both = np.stack([shown["seen"], shown["reconstructed"]], 1)
        both = both.reshape(2 * ROWS, COLUMNS, -1)[:4]
        show_images(left, both, f"{model}: images over reconstructions")
        show_images(right, shown["sampled"], f"{model}: samples")
        for axis in (left, right):
            axis.set_axis_off()
    return figure


def images_of(settings: Any, params: Any, test: Any) -> dict[str, Any]:
    """Test images, reconstructions and samples, in hundredths."""
    keys = jax.random.split(jax.random.key(0), (ROWS + 4, COLUMNS))
    seen = test[: ROWS * COLUMNS].reshape(ROWS, COLUMNS, -1)
    again = jax.vmap(jax.vmap(partial(reconstruct, settings, params)))
    made = jax.vmap(jax.vmap(partial(draw_image, settings, params)))
    found = {
        "seen": seen,
        "reconstructed": again(keys[:ROWS], seen),
        "sampled": made(keys[ROWS:]),
    }
    hundredths = {k: np.rint(100 * np.asarray(x)) for k, x in found.items()}
    return {name: x.astype(int).tolist() for name, x in hundredths.items()}
