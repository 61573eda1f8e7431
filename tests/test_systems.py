"""Systems: runs of what has no environment, and the data that they read."""

import dataclasses
import gzip
import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.cli import main
from jaxpg.systems import Recipe, RunSettings, System, digits, runs, training
from jaxpg.systems.registry import SYSTEMS
from jaxpg.train.log import read_rows
from jaxpg.train.loop import NonFiniteError

TINY = RunSettings(
    num_updates=8, num_seeds=2, evaluate_every=4, checkpoint_every=3, keep_checkpoints=9
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """Settings of a number that is drawn to a target."""

    rate: float = 0.5
    """How far each time."""
    breaks_at: int = 10**6
    """Update from which on there are no numbers."""
    widths: tuple[int, ...] = (3, 4)
    """A tuple."""


def make_drift(settings):
    def init(key):
        return {"x": jax.random.normal(key), "updates": jnp.zeros((), jnp.int32)}

    def update(key, state):
        x = state["x"] * (1.0 - settings.rate) + 0.1 * jax.random.normal(key)
        x = jnp.where(state["updates"] + 1 >= settings.breaks_at, jnp.nan, x)
        return {"x": x, "updates": state["updates"] + 1}, {"distance": jnp.abs(x)}

    def evaluate(key, state):
        noise = jax.random.normal(key)
        return {"distance": jnp.abs(state["x"]), "noise": noise}

    def picture(state, path):
        assert state["x"].shape == ()
        path.write_bytes(b"a picture")

    return System(init, update, evaluate, picture, "distance")


@pytest.fixture(scope="module", autouse=True)
def drift():
    SYSTEMS["drift"] = Recipe("drawn to 0", DriftSettings, make_drift, TINY)
    with pytest.MonkeyPatch.context() as patch:
        # What the command line sets: a run is resumed under the flags it began with.
        flags = os.environ.get("XLA_FLAGS", "")
        patch.setenv("XLA_FLAGS", f"{flags} --xla_gpu_deterministic_ops=true")
        yield
    del SYSTEMS["drift"]


@pytest.fixture(scope="module")
def trained(drift, tmp_path_factory):
    """A run, for reading only."""
    folder = tmp_path_factory.mktemp("runs")
    return training.train("drift", config=config(folder, name="a"), show=False)


def config(folder, **changes):
    return dataclasses.replace(TINY, runs_dir=folder, **changes)


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_leaves_everything_in_its_folder(trained):
    result = trained
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {
        *("config.json", "metrics.jsonl", "metrics.csv", "evaluation.json"),
        *("learning_curve.png", "picture.png", "checkpoints"),
    }
    rows = read_rows(result.folder)
    assert [(row["update"], row["seed"]) for row in rows] == [
        (update, seed) for update in range(1, 9) for seed in (0, 1)
    ]
    rated = {row["update"] for row in rows if row["eval_distance"] is not None}
    assert rated == {4, 8}
    assert all(
        row["eval_distance"] == row["distance"]
        for row in rows
        if row["update"] in rated
    )
    assert runs.open_run(result.folder).checkpoints.steps() == [3, 6, 8]
    last = json.loads((result.folder / "evaluation.json").read_text())
    assert last == result.evaluation and [line["seed"] for line in last] == [0, 1]
    assert last[1]["noise"] == rows[-1]["eval_noise"]


def test_seeds_side_by_side_are_the_seeds_alone(trained, tmp_path):
    second = config(tmp_path, name="second", seed=1, num_seeds=1)
    alone = training.train("drift", config=second, show=False)
    mine = trained.metrics["distance"][trained.metrics["seed"] == 1]
    np.testing.assert_array_equal(mine, alone.metrics["distance"])


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(trained, tmp_path, step):
    folder = shutil.copytree(trained.folder, tmp_path / "b")
    again = training.resume(folder, from_update=step, show=False)
    assert without_times(read_rows(folder)) == without_times(read_rows(trained.folder))
    assert again.evaluation == trained.evaluation and again.update == 8


def test_a_run_can_be_lengthened(trained, tmp_path):
    short = config(tmp_path, name="short", num_updates=4)
    folder = training.train("drift", config=short, show=False).folder
    longer = training.resume(folder, num_updates=8, show=False)
    new, old = longer.metrics["distance"], trained.metrics["distance"]
    np.testing.assert_array_equal(new, old)
    assert runs.read_settings(folder)[1].num_updates == 8


def test_it_stops_at_nan_and_names_the_last_good_checkpoint(tmp_path):
    settings = DriftSettings(breaks_at=5)
    with pytest.raises(
        NonFiniteError, match=r"update 5, seed 0: 1 entries of the state"
    ):
        training.train("drift", settings, config(tmp_path, name="a"), show=False)
    run = runs.open_run(tmp_path / "a")
    assert run.settings == settings and run.checkpoints.steps() == [3]
    assert read_rows(tmp_path / "a")[-1]["update"] == 5


# --- the command line


@pytest.fixture
def call(capsys):
    def run(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def test_train_resume_and_eval_by_words(call, tmp_path):
    words = ("--runs-dir", tmp_path, "--name", "a", "--no-compilation-cache")
    code, out, err = call("train", "drift", "--rate", "0.25", "--seed", "3", *words)
    assert (code, err) == (0, "") and "update 8/8" in out and "updates/s" in out
    assert runs.read_settings(tmp_path / "a")[2].rate == 0.25
    code, out, _ = call(
        "train", "--resume", tmp_path / "a", "--num-updates", "10", words[-1]
    )
    assert code == 0 and "continued from update 8" in out and "update 10/10" in out
    code, out, _ = call("eval", tmp_path / "a", words[-1])
    assert code == 0 and "drift, update 10" in out


def test_help_and_list_know_every_system(call):
    code, out, _ = call("train", "drift", "--help")
    assert code == 0 and "drawn to 0" in out
    for flag in ("--rate", "--breaks-at", "--num-seeds", "--evaluate-every"):
        assert flag in out
    code, out, _ = call("list", "systems")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [*SYSTEMS]


def test_wrong_words_are_told_in_a_line(call, trained, tmp_path):
    folder = trained.folder
    for words, told in [
        (("train", "drif"), "did you mean 'drift'"),
        (("train", "--resume", folder, "--rate", "0.1"), "rate was 0.5, now 0.1"),
        (("train", "--resume", folder, "--num-updates", "2"), "needs at least 8"),
        (("train", "--resume", tmp_path), "holds no run"),
        (("train", "ppo", "--resume", folder), "a run of the system 'drift'"),
        (("eval", folder, "--checkpoint", "best"), "keeps no best one"),
        (
            ("train", "drift", "--runs-dir", folder.parent, "--name", "a"),
            "exists already",
        ),
        (("train", "drift", "--num-seeds", "0"), "num_seeds is 0"),
    ]:
        code, _, err = call(*words)
        assert code in (1, 2) and told in err, (words, err)


# --- digits


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def mnist(tmp_path):
    """A folder as MNIST's, with 30 and 10 images of 4 x 5."""
    for part, number in (("train", 30), ("t10k", 10)):
        images = np.arange(number * 20).reshape(number, 4, 5) % 256
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(number) % 10)
    return tmp_path


def test_the_digits_of_scikit_learn_are_split_by_class():
    data = digits.load_digits()
    assert data.train.images.shape == (1438, 8, 8) and len(data.test.labels) == 359
    for part in data:
        assert part.images.min() == 0.0 and part.images.max() == 1.0
        shares = np.bincount(part.labels, minlength=10) / len(part.labels)
        np.testing.assert_allclose(shares, 0.1, atol=0.004)
    seen = {image.tobytes() for image in data.train.images}
    assert not any(image.tobytes() in seen for image in data.test.images)
    again = digits.load_digits()
    np.testing.assert_array_equal(again.test.images, data.test.images)


def test_mnist_is_read_from_its_files(mnist):
    data = digits.load_digits(mnist)
    assert data.train.images.shape == (30, 4, 5) and data.test.images.shape[0] == 10
    assert data.train.images[1, 0, 2] == np.float32(22 / 255)
    assert data.test.labels.tolist() == list(range(10))


def test_what_is_wrong_with_a_folder_is_told(mnist):
    name = mnist / "t10k-labels-idx1-ubyte.gz"
    with pytest.raises(ValueError, match="is no folder; needs one with MNIST's files"):
        digits.load_digits(mnist / "nowhere")
    write_idx(name, np.arange(9))
    with pytest.raises(ValueError, match="10 images but 9 labels in its part 't10k'"):
        digits.load_digits(mnist)
    name.write_bytes(gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 9)) + b"short"))
    with pytest.raises(ValueError, match="5 entries, but its header says 9"):
        digits.load_digits(mnist)
    name.write_bytes(gzip.compress(b"no digits at all"))
    with pytest.raises(ValueError, match="no IDX file of unsigned bytes in 1 dim"):
        digits.load_digits(mnist)
    name.write_bytes(b"not gzipped")
    with pytest.raises(ValueError, match="cannot be read"):
        digits.load_digits(mnist)
    name.unlink()
    with pytest.raises(ValueError, match="holds no t10k-labels-idx1-ubyte"):
        digits.load_digits(mnist)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxpg\[digits\]'"):
        digits.load_digits()
