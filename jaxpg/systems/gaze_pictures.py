"""Pictures of where a model looks: paths of glimpses over canvases."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpg.systems.canvases import Canvases
from jaxpg.train.axes import save_figure
from jaxpg.types import Params

__all__ = ["draw_paths", "paths_figure"]

_PATH, _WINDOW, _RIGHT, _WRONG = "#D55E00", "#0072B2", "#009E73", "#D55E00"


def draw_paths(
    eye: Any, choose: Any, params: Params, canvases: Canvases, settings: Any, path: Path
) -> None:
    """Draw the paths over the first held-out canvases into a PNG.

    Args:
        eye: the model that looks.
        choose: how places come about.
        params: of one seed.
        canvases: held out.
        settings: of the system: the window.
        path: the PNG.
    """
    figure = paths_figure(eye, choose, params, canvases, settings.glimpse)
    save_figure(figure, path)


def paths_figure(
    eye: Any,
    choose: Any,
    params: Params,
    canvases: Canvases,
    window: int,
    *,
    rows: int = 2,
    columns: int = 5,
) -> Any:
    """Paths of glimpses over canvases, and what was answered.

    Args:
        eye: the model that looks.
        choose: how places come about.
        params: of one seed.
        canvases: to look at; the first ones are shown.
        window: pixels of the finest square's side.
        rows: of pictures.
        columns: of pictures.

    Returns:
        A figure without a canvas of its own.
    """
    from matplotlib.figure import Figure

    number = rows * columns
    keys = jax.random.split(jax.random.key(0), number)
    gaze = jax.jit(jax.vmap(lambda key, canvas: eye.gaze(params, key, canvas, choose)))
    logits, places = gaze(keys, canvases.images[:number])
    answers = np.argmax(logits, axis=-1)
    figure = Figure(figsize=(1.9 * columns, 2.15 * rows), layout="constrained")
    for i, axis in enumerate(figure.subplots(rows, columns).flat):
        image = np.asarray(canvases.images[i])
        _draw_path(axis, image, np.asarray(places[i]), window)
        label, answer = int(canvases.labels[i]), int(answers[i])
        colour = _RIGHT if label == answer else _WRONG
        axis.set_title(f"{label}, taken for {answer}", fontsize=9, color=colour)
    return figure


def _draw_path(axis: Any, image: np.ndarray, places: np.ndarray, window: int) -> None:
    from matplotlib.patches import Rectangle

    axis.imshow(image, cmap="gray_r", vmin=0.0, vmax=1.6)
    rows, columns = (places.T + 1.0) / 2.0 * (np.array(image.shape)[:, None] - 1)
    axis.plot(columns, rows, "-", color=_PATH, lw=1.2, alpha=0.9)
    axis.plot(columns[:1], rows[:1], "o", mfc="white", mec=_PATH, ms=5)
    axis.plot(columns[1:-1], rows[1:-1], "o", color=_PATH, ms=3)
    axis.plot(columns[-1:], rows[-1:], "o", color=_PATH, ms=6)
    corner = columns[-1] - window / 2, rows[-1] - window / 2
    axis.add_patch(Rectangle(corner, window, window, fill=False, ec=_WINDOW, lw=1.4))
    axis.set_xlim(-0.5, image.shape[1] - 0.5)
    axis.set_ylim(image.shape[0] - 0.5, -0.5)
    axis.set_xticks([])
    axis.set_yticks([])
