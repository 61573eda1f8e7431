"""The pictures of a run: what is drawn is what was logged, and no seeds are mixed."""

import json
import struct
import sys
import zlib

import numpy as np
import pytest

from jaxpg.train.render import learning_curve, plot_learning_curve
from jaxpg.train.sweeps import (
    describe_sweep,
    plot_sweep,
    summarize_sweep,
    sweep_figure,
    write_sweep,
)


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


# Sweeps.


def make_sweep(returns, name="learning_rate"):
    """From {value: returns[seed][update - 1]} rows, and an evaluation of twice that."""
    rows, evaluation = [], []
    for value, lines_of_value in returns.items():
        values = dict(zip(name.split(","), np.atleast_1d(value).tolist(), strict=True))
        rows += [row | values for row in make_rows(lines_of_value)]
        evaluation += [
            {"seed": s, **values, "mean": 2.0 * line[-1]}
            for s, line in enumerate(lines_of_value)
            if line[-1] is not None
        ]
    return rows, evaluation


TWO_RATES = {
    0.1: [[1.0, 9.0], [2.0, 4.0], [6.0, 5.0]],
    0.01: [[0.0, 0.0], [1.0, 1.0], [2.0, 20.0]],
}


def curves(axis):
    """Each named curve's y."""
    return {ln.get_label(): list(ln.get_ydata()) for ln in axis.lines}


def test_a_sweep_has_one_curve_per_value_and_mixes_none():
    rows, _ = make_sweep(TWO_RATES)
    figure = learning_curve(rows, "title", by=["learning_rate"])
    (axis,) = figure.axes
    assert curves(axis) == {"0.01": [1, 1], "0.1": [2, 5]}
    # Without `by` the seeds of both values would be one seed: what must not happen.
    edges = [c.get_paths()[0].vertices[:, 1] for c in axis.collections]
    assert [(e.min(), e.max()) for e in edges] == [(0, 20), (1, 9)]
    assert len({ln.get_color() for ln in axis.lines}) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0.01", "0.1"]
    assert legend.get_title().get_text() == "learning rate"


def test_panels_of_a_sweep_have_a_curve_per_value_too():
    rows, _ = make_sweep(TWO_RATES)
    rows = [row | {"grad_norm": row["learning_rate"]} for row in rows]
    figure = learning_curve(rows, "title", by=["learning_rate"])
    assert curves(figure.axes[1]) == {"0.01": [0.01, 0.01], "0.1": [0.1, 0.1]}
    assert figure.axes[1].get_yscale() == "log"


def test_a_value_without_any_number_hides_no_other():
    returns = TWO_RATES | {1.0: [[None, None]] * 3}
    rows, _ = make_sweep(returns)
    (axis,) = learning_curve(rows, "title", by=["learning_rate"]).axes
    assert curves(axis)["0.1"] == [2, 5]
    assert np.isnan(curves(axis)["1"]).all()


def test_the_table_of_a_sweep():
    rows, evaluation = make_sweep(TWO_RATES)
    low, high = summarize_sweep(rows, evaluation, ["learning_rate"])
    # Last update (a tenth of two is one): 0, 1, 20 and 9, 4, 5; evaluated twice that.
    assert low == {
        "learning_rate": 0.01,
        "seeds": 3,
        "evaluation_median": 2.0,
        "evaluation_q25": 1.0,
        "evaluation_q75": 21.0,
        "return_median": 1.0,
        "return_q25": 0.5,
        "return_q75": 10.5,
    }
    assert (high["learning_rate"], high["return_median"]) == (0.1, 5.0)
    assert (high["return_q25"], high["return_q75"]) == (4.5, 7.0)


def test_the_last_tenth_is_averaged_where_it_is_known():
    # Twenty updates, so the last two count; of seed 1 one is missing, of seed 2 both.
    returns = [
        [100.0] * 18 + [2.0, 4.0],
        [100.0] * 18 + [None, 7.0],
        [100.0] * 18 + [float("nan"), None],
    ]
    rows, _ = make_sweep({0.1: returns})
    (line,) = summarize_sweep(rows, [], ["learning_rate"])
    assert (line["seeds"], line["return_median"]) == (3, 5.0)  # of 3 and 7
    assert line["evaluation_median"] is None
    (words,) = describe_sweep([line])
    assert words == {
        "learning_rate": "0.1",
        "seeds": "3",
        "evaluation": "-",
        "last updates": "5.00 (4.00 to 6.00)",
    }


def test_small_values_keep_their_digits_in_words():
    rows, evaluation = make_sweep({3e-4: [[1.0]]})
    (words,) = describe_sweep(summarize_sweep(rows, evaluation, ["learning_rate"]))
    assert words["learning_rate"] == "0.0003"


def test_the_table_is_kept_as_json_and_csv(tmp_path):
    rows, evaluation = make_sweep({0.1: [[1.0], [3.0]], 0.2: [[None], [None]]})
    table = summarize_sweep(rows, evaluation, ["learning_rate"])
    write_sweep(table, tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text()) == table
    head, one, two = (tmp_path / "sweep.csv").read_text().splitlines()
    assert head.startswith("learning_rate,seeds,evaluation_median,")
    assert one == "0.1,2,4.0,3.0,5.0,2.0,1.5,2.5"
    assert two == "0.2,2,,,,,,"


def test_the_picture_of_one_setting():
    returns = TWO_RATES | {1.0: [[None, None], [3.0, None], [None, None]]}
    rows, evaluation = make_sweep(returns)
    left, right = sweep_figure(rows, evaluation, ["learning_rate"], "title").axes
    assert curves(left)["0.1"] == [2, 5]
    np.testing.assert_array_equal(curves(left)["1"], [3, np.nan])
    line, *marks = right.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.01, 0.1], [2, 10])
    seeds = {ln.get_xdata()[0]: list(ln.get_ydata()) for ln in marks[::2][:2]}
    assert seeds == {0.01: [0, 2, 40], 0.1: [18, 8, 10]}
    assert right.get_xscale() == "log"  # 1 is more than 20 times 0.01
    assert list(right.get_xticks()) == [0.01, 0.1, 1.0]
    assert right.get_xlabel() == "learning rate"
    assert right.get_title().startswith("final evaluation")


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ((0.1, 2.0), "linear"),  # no more than 20 times
        ((0.1, 2.1), "log"),
        ((0.0, 0.1, 10.0), "symlog"),  # zero has no logarithm
        ((0.0, 0.1), "linear"),
        ((-1.0, 0.01, 1.0), "linear"),
        ((0.01,), "linear"),
    ],
)
def test_the_scale_of_the_swept_values(values, scale):
    rows, evaluation = make_sweep({value: [[1.0]] for value in values})
    _, right = sweep_figure(rows, evaluation, ["learning_rate"], "title").axes
    assert right.get_xscale() == scale
    assert set(right.get_xticks()) <= set(values)


def test_a_sweep_of_one_value_is_one_curve_and_one_place():
    rows, evaluation = make_sweep({0.1: [[1.0, 2.0], [3.0, 4.0]]})
    left, right = sweep_figure(rows, evaluation, ["learning_rate"], "title").axes
    assert curves(left) == {"0.1": [2, 3]}
    assert list(right.lines[-1].get_ydata()) == [6]
    (axis,) = learning_curve(rows, "title", by=["learning_rate"]).axes
    assert labels(axis) == {"median", "2 seeds", "lowest to highest"}  # as if not swept


def test_without_an_evaluation_the_last_updates_are_drawn():
    rows, _ = make_sweep(TWO_RATES)
    _, right = sweep_figure(rows, [], ["learning_rate"], "title").axes
    assert list(right.lines[0].get_ydata()) == [1, 5]
    assert right.get_title().startswith("last updates")


def test_the_picture_of_two_settings_is_a_map_of_medians(tmp_path):
    names = ["learning_rate", "damping"]
    returns = {
        (a, b): [[10.0 * a + b], [10.0 * a + b + 2.0]]
        for a in (1.0, 2.0)
        for b in (0.0, 3.0, 5.0)
    }
    returns[2.0, 5.0] = [[None], [None]]
    rows, evaluation = make_sweep(returns, "learning_rate,damping")
    axis, _ = sweep_figure(rows, evaluation, names, "title").axes
    shown = axis.images[0].get_array()
    # The evaluation is twice the return, and the median that of seeds 2 apart.
    assert shown.tolist() == [[22, 28, 32], [42, 48, None]]
    assert axis.texts[0].get_text() == "22\n(21 to 23)"
    assert len(axis.texts) == 5
    assert axis.get_xlabel() == "damping" and axis.get_ylabel() == "learning rate"
    assert plot_sweep(rows, evaluation, names, tmp_path / "sweep.png", "title")
    # A second setting with one value alone is none.
    kept = [row for row in rows if row["damping"] == 3.0]
    left, _ = sweep_figure(kept, evaluation[2:4], names, "title").axes
    assert curves(left) == {"1": [14], "2": [24]}


@pytest.mark.parametrize("name", ["learning_rate", "learning_rate,damping"])
def test_returns_that_are_known_early_alone_are_drawn(tmp_path, name):
    pairs = [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0)]
    values = pairs if "," in name else [1.0, 2.0]
    rows, _ = make_sweep({v: [[1.0, None], [2.0, None]] for v in values}, name)
    assert plot_sweep(rows, [], name.split(","), tmp_path / "sweep.png", "title")
    table = summarize_sweep(rows, [], name.split(","))
    assert {line["return_median"] for line in table} == {None}


def test_three_settings_have_a_table_and_no_picture(tmp_path):
    names = ["learning_rate", "damping", "discount"]
    returns = {
        (a, b, c): [[a + b + c]]
        for a in (1.0, 2.0)
        for b in (0.0, 3.0)
        for c in (0.5, 1.0)
    }
    rows, evaluation = make_sweep(returns, ",".join(names))
    assert not plot_sweep(rows, evaluation, names, tmp_path / "sweep.png", "title")
    assert list(tmp_path.iterdir()) == []
    table = summarize_sweep(rows, evaluation, names)
    # In the order of the values, the last setting fastest.
    medians = [line["return_median"] for line in table]
    assert medians == [1.5, 2.0, 4.5, 5.0, 2.5, 3.0, 5.5, 6.0]


def test_many_values_are_shades_of_which_the_ends_are_named():
    rows, _ = make_sweep({float(v): [[1.0], [2.0]] for v in range(1, 13)})
    figure = learning_curve(rows, "title", by=["learning_rate"])
    (axis,) = figure.axes
    assert len({ln.get_color() for ln in axis.lines}) == 12
    assert len(axis.collections) == 0  # twelve bands would hide one another
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1", "to 12"]


def test_legends_of_sweeps_cover_no_data():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows, evaluation = make_sweep(TWO_RATES)
    for figure in (
        learning_curve(rows, "title", by=["learning_rate"]),
        sweep_figure(rows, evaluation, ["learning_rate"], "title"),
    ):
        FigureCanvasAgg(figure).draw()
        box = figure.legends[0].get_window_extent()
        assert not any(box.overlaps(a.get_window_extent()) for a in figure.axes)


def test_a_sweep_of_nothing_is_refused():
    rows, evaluation = make_sweep(TWO_RATES)
    with pytest.raises(ValueError, match="names is empty"):
        sweep_figure(rows, evaluation, [], "title")
    nothing, _ = make_sweep({0.1: [[None]]})
    with pytest.raises(ValueError, match="no number"):
        sweep_figure(nothing, [], ["learning_rate"], "title")


def tiny_sweep(folder, **changes):
    from jaxpg.algos.reinforce import ReinforceConfig
    from jaxpg.train.config import PolicyConfig, TrainConfig

    settings = {
        "num_seeds": 2,
        "num_envs": 2,
        "num_updates": 3,
        "num_devices": 1,
        "eval_episodes": 4,
        "runs_dir": folder,
        "name": "r",
        "policy": PolicyConfig(hidden=(2,)),
        "algorithm": ReinforceConfig(chunk_size=None),
    }
    return TrainConfig(**settings | changes)


def test_a_run_with_a_sweep_ends_with_table_and_pictures(tmp_path, capsys):
    from jaxpg.cli.train import _report
    from jaxpg.envs.probes import constant_reward
    from jaxpg.train.loop import train

    rates = (0.001, 0.0001)
    config = tiny_sweep(tmp_path, sweep=(("learning_rate", rates),))
    result = train(config, env=constant_reward(), show=False)
    files = {path.name for path in result.folder.iterdir()}
    assert {"sweep.png", "sweep.json", "sweep.csv", "learning_curve.png"} <= files
    assert json.loads((result.folder / "sweep.json").read_text()) == result.sweep
    for line, rate in zip(result.sweep, sorted(rates), strict=True):
        assert (line["learning_rate"], line["seeds"]) == (rate, 2)
        assert line["evaluation_median"] == line["return_median"] == 1.0
    assert _report(result) == 0
    told = capsys.readouterr().out
    assert "0.0001" in told and "1.00 (1.00 to 1.00)" in told
    assert f"run folder: {result.folder}" in told.splitlines()
    assert not told.splitlines()[-1].startswith("mean")  # no mean over settings


def test_a_run_in_which_no_episode_ends_is_evaluated_all_the_same(tmp_path):
    from jaxpg.algos.a2c import A2CConfig
    from jaxpg.train.loop import train

    algorithm = A2CConfig(num_steps=2, chunk_size=None)
    sweep = (("learning_rate", (0.001, 0.01)),)
    config = tiny_sweep(
        tmp_path,
        env="Pendulum-v1",
        max_steps=9,
        num_updates=2,
        algorithm=algorithm,
        sweep=sweep,
    )
    result = train(config, show=False)
    assert np.isnan(result.metrics["mean_return"]).all()
    files = {path.name for path in result.folder.iterdir()}
    assert "evaluation.json" in files
    assert not {"learning_curve.png", "sweep.png"} & files
    assert [line["return_median"] for line in result.sweep] == [None, None]
    assert all(line["evaluation_median"] < 0 for line in result.sweep)
