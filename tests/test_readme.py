"""The README keeps its word: its program runs, its numbers are the stored ones."""

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import jax
import pytest

import jaxpg
from jaxpg.credit import CREDITS, RATIOS
from jaxpg.estimators import BASELINES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_its_program_runs_and_learns(capsys):
    program, _ = code_blocks("python")
    assert len(ast.parse(program).body) <= 12
    exec(compile(program, "README.md", "exec"), {})
    printed = re.fullmatch(r"mean episode length (\d+)\n", capsys.readouterr().out)
    assert printed is not None
    assert int(printed[1]) > 200, "a random policy falls after about 22 decisions"


def test_its_program_beyond_control_runs():
    _, program = code_blocks("python")
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    gradient, report = names["gradient"], names["report"]
    assert all(bool(jax.numpy.any(x != 0.0)) for x in jax.tree.leaves(gradient))
    assert report.credits["bits"].shape == (8,)


def test_its_two_commands_are_one_line_each():
    commands = [block.strip() for block in code_blocks("")[:2]]
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)
    assert commands[0].endswith("jaxpg train")
    assert commands[1].endswith("-m pytest")
    assert all("\n" not in command for command in commands)


def test_its_numbers_are_the_stored_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("readme", "timing"):
        sys.modules.pop(name, None)
    readme = importlib.import_module("readme")
    pages = [page.read_text() for page in readme.PAGES]
    for name in readme.BLOCKS:
        assert any(f"<!-- begin: {name} -->" in page for page in pages)
    for page in pages:
        assert readme.fill(page) == page, "run: python benchmarks/readme.py"


def test_its_files_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path


@pytest.mark.parametrize("name", [*CREDITS, *BASELINES, *RATIOS])
def test_every_estimator_is_in_the_oracle_table(name):
    stored = json.loads((ROOT / "benchmarks/results/oracle-table.json").read_text())
    parts = [(row["credit"], row["baseline"], row["ratio"]) for row in stored["rows"]]
    assert any(name in part for part in parts)


def test_public_names_are_few_and_exist():
    rooms = [name for name in jaxpg.__all__ if inspect.ismodule(getattr(jaxpg, name))]
    assert len(jaxpg.__all__) - len(rooms) <= 55
    for name in jaxpg.__all__:
        assert getattr(jaxpg, name) is not None
