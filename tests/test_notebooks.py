"""The notebooks run, show legible figures, and are what is stored beside them."""

import ast
import contextlib
import importlib
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
EACH = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)

MACHINE_PATH = re.compile(r"(?<![\w.])(/(home|root|tmp|work|Users|opt|usr)/|[A-Z]:\\)")
MAX_BYTES = 400_000
MINUTES = 4
"""Twice what the full form of a notebook may take: other tests run beside it."""


def cells_of(text):
    """Cells of a percent script, without its header, as (kind, source)."""
    _, _, body = text.partition("\n# %%")
    cells = []
    for part in ("# %%" + body).split("\n# %%"):
        head, _, source = part.removeprefix("# %%").partition("\n")
        source = source.strip("\n")
        if "[markdown]" in head:
            lines = source.splitlines()
            source = "\n".join(
                line.removeprefix("#").removeprefix(" ") for line in lines
            )
            cells.append(("markdown", source))
        else:
            cells.append(("code", source))
    return cells


def stored(source):
    return json.loads(source.with_suffix(".ipynb").read_text())


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def unlabelled(figure):
    """Visible axes of a figure with data and without a name on x or y."""
    return [
        axis
        for axis in figure.axes
        if axis.axison
        and axis.has_data()
        and not (_is_named(axis, "x") and _is_named(axis, "y"))
    ]


def _is_named(axis, which):
    """A label of its own, its row's or column's, or that of a colour bar."""
    siblings = getattr(axis, f"get_shared_{which}_axes")().get_siblings(axis)
    is_bar = hasattr(axis, "_colorbar")
    return is_bar or any(getattr(x, f"get_{which}label")() for x in siblings)


@contextlib.contextmanager
def as_a_user_has_it():
    """JAX's own promotion, and what a notebook sets up taken down behind it."""
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        matplotlib.rc_context(),
    ):
        try:
            yield
        finally:
            plt.close("all")
            jax.clear_caches()


@EACH
def test_what_it_takes_from_the_library_exists(source):
    """For every day, when most are not run: a renamed function is noticed."""
    tree = ast.parse(source.read_text())
    rooms = {"jaxpg": importlib.import_module("jaxpg")}
    taken = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxpg"):
            room = importlib.import_module(node.module)
            for name in node.names:
                found = getattr(room, name.name, None) or importlib.import_module(
                    f"{node.module}.{name.name}"
                )
                rooms[name.asname or name.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if isinstance(rooms.get(node.value.id), types.ModuleType):
                assert hasattr(rooms[node.value.id], node.attr), ast.unparse(node)
                taken += 1
    assert len(rooms) > 1 or taken


@EACH
@pytest.mark.thinned(9)
def test_the_quick_form_runs_and_shows_labelled_figures(source, monkeypatch):
    shown = []

    def show():
        shown.extend(plt.figure(number) for number in plt.get_fignums())
        assert [x for figure in shown for x in unlabelled(figure)] == []
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    monkeypatch.setenv("JAXPG_QUICK", "1")
    with as_a_user_has_it():
        runpy.run_path(str(source), run_name="__main__")
    assert shown


@pytest.mark.slow
@pytest.mark.exhaustive
@EACH
def test_the_full_form_runs(source):
    inherited = {"JAXPG_QUICK", "XLA_FLAGS"}
    environ = {k: v for k, v in os.environ.items() if k not in inherited}
    subprocess.run(
        [sys.executable, "-W", "error", source],
        env={**environ, "PYTHONPATH": str(FOLDER.parent), "MPLBACKEND": "agg"},
        check=True,
        timeout=60 * MINUTES,
    )


@EACH
def test_what_is_stored_is_the_source(source):
    cells = [
        (cell["cell_type"], "".join(cell["source"])) for cell in stored(source)["cells"]
    ]
    assert cells == cells_of(source.read_text()), "run notebooks/build.py"


@EACH
def test_what_is_stored_ran_to_its_end_in_one_go(source):
    code = [cell for cell in stored(source)["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1))


@EACH
def test_what_is_stored_shows_figures_and_no_trouble(source):
    kinds = [output["output_type"] for output in outputs(stored(source))]
    assert "error" not in kinds
    assert [x for x in outputs(stored(source)) if x.get("name") == "stderr"] == []
    assert any("image/png" in x.get("data", {}) for x in outputs(stored(source)))


@EACH
def test_what_is_stored_is_small_and_names_no_machine(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < MAX_BYTES
    words = [
        {k: v for k, v in x.get("data", {}).items() if k != "image/png"} or x
        for x in outputs(stored(source))
        if "image/png" not in x.get("data", {})
    ]
    assert MACHINE_PATH.search(json.dumps(words)) is None


@EACH
def test_the_folder_s_page_names_every_notebook(source):
    assert source.name in (FOLDER / "README.md").read_text()


def test_every_stored_notebook_has_a_source():
    assert {x.stem for x in FOLDER.glob("*.ipynb")} == {x.stem for x in SOURCES}
    assert SOURCES


def test_cells_are_read_as_jupytext_writes_them():
    text = "# ---\n# head\n# ---\n\n# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1\n"
    assert cells_of(text) == [("markdown", "# A\n\nb"), ("code", "x = 1")]


def test_an_axis_without_a_name_would_be_found():
    figure, (one, other) = plt.subplots(1, 2)
    one.plot([0, 1])
    other.plot([0, 1])
    one.set_xlabel("x")
    one.set_ylabel("y")
    assert unlabelled(figure) == [other]
    plt.close(figure)


@pytest.mark.parametrize(
    ("text", "found"),
    [("/tmp/x", True), ("C:\\x", True), ("runs/tmp/x", False), ("1/usr", False)],
)
def test_paths_of_a_machine_would_be_found(text, found):
    assert bool(MACHINE_PATH.search(text)) is found
