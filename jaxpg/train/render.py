"""The learning curve of a run, over environment steps or updates.

Rows of the log in, one PNG out. Where settings were swept (their columns are named by
`by`), each combination of values has a curve.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxpg.train.axes import (
    ONE_EACH,
    draw_groups,
    draw_seeds,
    dress,
    label_x,
    legend_above,
    legend_of_groups,
    make_logarithmic,
    save_figure,
)
from jaxpg.train.series import Rows, by_values, check_numbers, numbers_in, series_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["learning_curve", "plot_learning_curve"]


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
    save_figure(learning_curve(rows, title, x=x, y=y, by=by), path)


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

    check_numbers(rows, x, y)
    below = [
        name for name in ("entropy", "grad_norm") if numbers_in(rows, x, name).size
    ]
    groups = by_values(rows, by)
    swept = len(groups) > 1
    size = (7.6 if swept else 6.4, 3.6 + 1.1 * len(below))
    figure = Figure(figsize=size, layout="constrained")
    heights = [3.0] + [1.0] * len(below)
    axes = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    figure.suptitle(title, fontsize=11)
    for axis, name, colour in zip(axes, [y, *below], ONE_EACH, strict=False):
        if swept:
            draw_groups(axis, groups, x, name)
        else:
            draw_seeds(axis, series_of(rows, x, name), name, colour)
        dress(axis, name)
        if name == "grad_norm" and numbers_in(rows, x, name).min() > 0:
            make_logarithmic(axis)
    label_x(axes[-1], x)
    figure.align_ylabels(axes)
    if swept:
        legend_of_groups(figure, axes[0], by, "outside right upper", ncols=1)
    else:
        legend_above(axes[0])
    return figure
