"""The learning curve: what is drawn is what was logged."""

import struct
import sys
import zlib

import numpy as np
import pytest

from jaxpg.train.render import learning_curve, plot_learning_curve


def make_rows(returns, **columns):
    """One row for each seed and update, from returns[seed][update - 1]."""
    return [
        {"update": u, "seed": s, "env_steps": 100 * u, "mean_return": value}
        | {name: column[u - 1] for name, column in columns.items()}
        for s, line in enumerate(returns)
        for u, value in enumerate(line, start=1)
    ]


def lines(axis):
    """The drawn lines as (width, x, y)."""
    return [(ln.get_linewidth(), ln.get_xdata(), ln.get_ydata()) for ln in axis.lines]


def labels(axis):
    return {text.get_text() for text in axis.get_legend().get_texts()}


def band(axis):
    """The lower and the upper edge of the band at each x."""
    corners = axis.collections[0].get_paths()[0].vertices
    return {
        x: (corners[corners[:, 0] == x, 1].min(), corners[corners[:, 0] == x, 1].max())
        for x in np.unique(corners[:, 0])
    }


def test_the_picture_is_a_whole_png_of_sensible_size(tmp_path):
    path = tmp_path / "curve.png"
    columns = {"entropy": [0.7, 0.5], "grad_norm": [3.0, 1.0]}
    plot_learning_curve(make_rows([[1.0, 2.0], [3.0, 5.0]], **columns), path, "title")
    content = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 <= width <= 2000 and 800 <= height <= 2000
    kinds, pixels, place = [], b"", 8
    while place < len(content):  # every chunk's checksum, and all the pixels
        (length,) = struct.unpack_from(">I", content, place)
        body = content[place + 4 : place + 8 + length]
        kinds.append(body[:4])
        pixels += body[4:] if body[:4] == b"IDAT" else b""
        (checksum,) = struct.unpack_from(">I", content, place + 8 + length)
        assert checksum == zlib.crc32(body)
        place += 12 + length
    assert kinds[-1] == b"IEND"
    assert len(set(zlib.decompress(pixels))) > 10  # not one colour


def test_one_seed_is_one_line_without_a_legend():
    figure = learning_curve(make_rows([[1.0, 4.0, 2.0]]), "title")
    (axis,) = figure.axes
    ((_, x, y),) = lines(axis)
    np.testing.assert_array_equal(x, [100, 200, 300])
    np.testing.assert_array_equal(y, [1, 4, 2])
    assert axis.get_legend() is None
    assert axis.get_xlabel() == "environment steps"
    assert "reward units" in axis.get_ylabel()
    assert figure.get_suptitle() == "title"


def test_three_seeds_show_median_and_extremes():
    figure = learning_curve(make_rows([[1.0, 9.0], [2.0, 4.0], [6.0, 5.0]]), "title")
    (axis,) = figure.axes
    *thin, (thick, _, median) = lines(axis)
    np.testing.assert_array_equal(median, [2, 5])
    assert [list(y) for _, _, y in thin] == [[1, 9], [2, 4], [6, 5]]
    assert all(width < thick for width, _, _ in thin)
    assert band(axis) == {100: (1, 6), 200: (4, 9)}
    assert labels(axis) == {"median", "3 seeds", "lowest to highest"}


def test_five_seeds_show_the_middle_half():
    figure = learning_curve(make_rows([[float(s), 2.0 * s] for s in range(5)]), "title")
    (axis,) = figure.axes
    assert band(axis) == {100: (1, 3), 200: (2, 6)}
    assert labels(axis) == {"median", "5 seeds", "middle half"}


def test_missing_values_leave_the_others_in_place():
    nan = float("nan")
    rows = make_rows([[1.0, nan, nan, 8.0], [3.0, 5.0, None, float("inf")]])
    rows = [row for row in rows if (row["seed"], row["update"]) != (0, 1)]
    (axis,) = learning_curve(rows, "title").axes
    np.testing.assert_array_equal(axis.lines[-1].get_ydata(), [3, 5, nan, 8])
    np.testing.assert_array_equal(axis.lines[-1].get_xdata(), [100, 200, 300, 400])


def test_seeds_are_lined_up_by_update_whatever_their_steps():
    rows = make_rows([[1.0, 2.0], [3.0, 4.0]])
    for row in rows:
        row["env_steps"] += 10 * row["seed"]  # episodes of other lengths
    (axis,) = learning_curve(rows, "title").axes
    np.testing.assert_array_equal(axis.lines[-1].get_xdata(), [105, 205])
    np.testing.assert_array_equal(axis.lines[-1].get_ydata(), [2, 3])


def test_panels_appear_for_the_columns_that_hold_numbers():
    returns = [[1.0, 2.0]]
    both = {"entropy": [0.7, 0.5], "grad_norm": [3.0, 0.1]}
    figure = learning_curve(make_rows(returns, **both), "title")
    assert [axis.get_ylabel().split("\n")[0] for axis in figure.axes[1:]] == [
        "policy entropy",
        "gradient norm",
    ]
    assert figure.axes[2].get_yscale() == "log"
    np.testing.assert_array_equal(figure.axes[2].lines[0].get_ydata(), [3.0, 0.1])
    # A gradient of zero has no logarithm, and an empty column has no panel.
    odd = {"entropy": [None, None], "grad_norm": [3.0, 0.0]}
    figure = learning_curve(make_rows(returns, **odd), "title")
    assert len(figure.axes) == 2
    assert figure.axes[1].get_yscale() == "linear"


def test_the_legend_covers_no_data():
    figure = learning_curve(make_rows([[5.0, 5.0], [9.0, 9.0]]), "title")
    (axis,) = figure.axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1


def test_other_columns_and_a_lone_point(tmp_path):
    rows = [{"seconds": 3.0, "loss": 0.5}]
    (axis,) = learning_curve(rows, "title", x="seconds", y="loss").axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("seconds", "loss")
    assert axis.lines[0].get_marker() == "o"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        ([{"update": 1, "env_steps": 5, "score": 1.0}], r"'mean_return' .*'score'"),
        ([{"update": 1, "env_steps": 5, "mean_return": None}], "no number"),
    ],
)
def test_rows_without_numbers_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        plot_learning_curve(rows, tmp_path / "curve.png", "title")
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_never_imported(tmp_path):
    import subprocess

    code = (
        "import sys; from jaxpg.train.render import plot_learning_curve\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules)\n"
        "rows = [{'update': 1, 'env_steps': 5, 'mean_return': 1.0}]\n"
        "plot_learning_curve(rows, sys.argv[1], 'title')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.png")], check=True)
