"""Provenance: what bears on the bits is recorded, and nothing that names a person."""

import getpass
import json
import os
import pathlib
import socket
import sys

import jax
import pytest

from jaxpg.train import provenance
from jaxpg.train.provenance import (
    describe,
    differences,
    read_json,
    write_json_atomically,
)


def test_the_record_says_what_runs_here():
    record = describe()
    assert record["jax"] == jax.__version__
    assert record["python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert record["device_count"] == 8  # conftest's
    assert (record["backend"], record["x64"]) == ("cpu", False)
    assert record["matmul_precision"] == "highest"
    assert "--xla_force_host_platform_device_count=8" in record["XLA_FLAGS"]
    assert 1 <= record["cpu_threads"] <= os.cpu_count()
    for package in ("jaxpg", "jaxlib", "flax", "optax", "gymnax", "numpy"):
        assert record[package][0].isdigit()


def test_double_precision_is_recorded(float64):
    assert describe()["x64"] is True


def test_the_record_is_plain_json():
    record = describe()
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_record_names_nobody_and_no_place(monkeypatch):
    home = str(pathlib.Path.home())
    monkeypatch.setenv(
        "XLA_FLAGS", f"--a=1 --xla_dump_to={home}/dump --b=~x --c=C:\\me --d=2"
    )
    record = describe()
    assert record["XLA_FLAGS"] == "--a=1 --xla_dump_to --b --c --d=2"
    spoken = json.dumps(record)
    for private in (socket.gethostname(), home + "/", f"/{getpass.getuser()}"):
        assert private not in spoken


def test_a_package_that_is_missing_is_said_to_be_so(monkeypatch):
    monkeypatch.setattr(provenance, "_PACKAGES", ("jax", "no-such-package"))
    assert describe()["no-such-package"] is None


def test_a_record_does_not_differ_from_itself_later(tmp_path):
    write_json_atomically(tmp_path / "run.json", describe())
    assert differences(read_json(tmp_path / "run.json"), describe()) == []


@pytest.mark.parametrize("field", sorted(set(describe()) - {"python"}))
def test_every_field_but_python_makes_one_difference(field):
    record = describe()
    changed = record | {field: "another"}
    was = "not set" if record[field] in (None, "") else record[field]
    assert differences(record, changed) == [f"{field} was {was}, is another"]


def test_differences_speak_of_what_is_missing():
    old = {"jax": "0.9", "python": "3.11.1", "gone": 1, "unset": None}
    new = {"jax": "0.10", "python": "3.12.0", "fresh": True, "unset": ""}
    assert differences(old, new) == [
        "jax was 0.9, is 0.10",
        "gone was 1, is not recorded",
        "fresh was not recorded, is True",
    ]


def test_json_goes_round(tmp_path):
    path = tmp_path / "x.json"
    obj = {"ü": [1, 2.5, None, True], "nested": {"a": "b"}}
    write_json_atomically(path, {"old": 0})
    write_json_atomically(path, obj)
    assert read_json(path) == obj
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_refused_or_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomically(path, {"a": float("nan")})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json_atomically(path, {"a": 2})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"{'a': 1}"])
def test_damaged_json_is_told(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON .*needs a file"):
        read_json(path)


def test_a_missing_file_is_another_matter(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "x.json")
