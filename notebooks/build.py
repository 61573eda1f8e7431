"""Run the notebooks and store each one, figures included, beside its text.

    python notebooks/build.py            # all of them
    python notebooks/build.py 01 04      # some

`NN_name.py` is the source: percent cells, read and edited as plain Python. The paired
`NN_name.ipynb` is made from it here, in its full form, and never edited by hand. What
depends on the moment (run times of cells, random cell numbers) is left out, so that a
notebook that is built again differs only where its output does.
"""

import os
import pathlib
import sys
import time

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
SECONDS = 600
"""After so long a notebook is given up."""


def build(source):
    """Execute one notebook and write its pair."""
    notebook = jupytext.read(source)
    nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    _forget_the_moment(notebook)
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def _forget_the_moment(notebook):
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}


def main(wanted):
    """Build the notebooks whose names begin with one of the words; all without any."""
    os.environ.pop("JAXPG_QUICK", None)
    for source in SOURCES:
        if not wanted or source.name.startswith(tuple(wanted)):
            begin = time.perf_counter()
            build(source)
            size = source.with_suffix(".ipynb").stat().st_size / 1000
            seconds = time.perf_counter() - begin
            print(f"{source.stem}: {seconds:.0f} s, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
