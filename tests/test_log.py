"""The log: valid files, and a resumed run that neither loses nor repeats a line."""

import csv
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.train.log import RunLog, read_metrics, read_rows


def chunk(*updates, seeds=(0, 1)):
    return [
        {"update": u, "seed": s, "mean_return": u + s / 10}
        for u in updates
        for s in seeds
    ]


def read_csv(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_files_say(folder, rows):
    """Both files hold exactly these rows."""
    assert read_rows(folder) == rows
    assert (folder / "metrics.jsonl").read_bytes()[-1:] in (b"\n", b"")
    as_text = [{name: str(value) for name, value in row.items()} for row in rows]
    assert read_csv(folder) == as_text


def test_rows_are_on_disk_in_both_files_after_each_chunk(tmp_path):
    log = RunLog(tmp_path / "made" / "here")
    log.append(chunk(1, 2))
    assert_files_say(log.folder, chunk(1, 2))
    log.append([])
    log.append(chunk(3))
    assert_files_say(log.folder, chunk(1, 2, 3))
    RunLog(log.folder).append(chunk(4))  # another process goes on
    assert_files_say(log.folder, chunk(1, 2, 3, 4))


def test_every_kind_of_value_survives(tmp_path):
    log = RunLog(tmp_path)
    row = {
        "update": 1,
        "third": 1 / 3,
        "tiny": np.float32(1e-45),
        "jax": jnp.float32(2.5),
        "big": np.int64(2**60),
        "flag": np.bool_(True),
        "name": 'a,"b"\nü',
        "none": None,
    }
    log.append([row])
    expected = {
        "update": 1,
        "third": 1 / 3,
        "tiny": 2.0**-149,
        "jax": 2.5,
        "big": 2**60,
        "flag": True,
        "name": 'a,"b"\nü',
        "none": None,
    }
    (found,) = read_rows(tmp_path)
    assert found == expected
    assert [type(v) for v in found.values()] == [type(v) for v in expected.values()]
    (line,) = read_csv(tmp_path)
    assert (float(line["third"]), line["name"], line["none"]) == (
        1 / 3,
        row["name"],
        "",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_numbers_that_are_none_become_null_and_empty(tmp_path, value):
    log = RunLog(tmp_path)
    log.append([{"update": 1, "loss": value}, {"update": 2, "loss": 0.5}])
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"update": 1, "loss": null}\n{"update": 2, "loss": 0.5}\n'
    )
    assert (tmp_path / "metrics.csv").read_text() == "update,loss\n1,\n2,0.5\n"
    loss = read_metrics(tmp_path)["loss"]
    np.testing.assert_array_equal(loss, [math.nan, 0.5])


def test_columns_are_read_in_their_own_types(tmp_path):
    RunLog(tmp_path).append(
        [
            {"update": 1, "x": 1, "flag": True, "env": "a"},
            {"update": 2, "x": None, "flag": False, "env": "b"},
        ]
    )
    columns = read_metrics(tmp_path)
    kinds = {name: column.dtype for name, column in columns.items()}
    assert kinds == {"update": np.int64, "x": np.float64, "flag": bool, "env": object}
    np.testing.assert_array_equal(columns["x"], [1.0, math.nan])
    assert read_metrics(tmp_path / "none") == {}


def test_the_order_of_keys_does_not_matter(tmp_path):
    log = RunLog(tmp_path, columns=["seed", "update"])
    log.append([{"update": 1, "seed": 2}, {"seed": 3, "update": 1}])
    log.append([{"update": 4, "seed": 5}])
    assert (tmp_path / "metrics.csv").read_text() == "seed,update\n2,1\n3,1\n5,4\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"update": 2}, r"columns \['update'\].*first .*\['mean_return'"),
        (chunk(2)[0] | {"extra": 1}, "'extra'.*every row needs the same"),
        (chunk(2)[0] | {"update": None}, "update is None"),
        (chunk(2)[0] | {"update": 2.0}, "update is 2.0"),
        (chunk(2)[0] | {"update": True}, "update is True"),
        (
            chunk(2)[0] | {"mean_return": np.zeros(2)},
            "column 'mean_return'.*one number",
        ),
    ],
)
def test_bad_rows_are_refused_and_leave_no_trace(tmp_path, row, message):
    for log in (RunLog(tmp_path), RunLog(tmp_path)):
        if not read_rows(tmp_path):
            log.append(chunk(1))
        with pytest.raises(ValueError, match=message):
            log.append([chunk(2)[0], row])
        assert_files_say(tmp_path, chunk(1))


def test_bad_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs 'update'"):
        RunLog(tmp_path, columns=["seed"])
    with pytest.raises(ValueError, match="needs 'update'"):
        RunLog(tmp_path).append([{"seed": 1}])
    RunLog(tmp_path).append(chunk(1))
    with pytest.raises(ValueError, match="every row needs the same"):
        RunLog(tmp_path, columns=["update", "other"])


@pytest.mark.parametrize("update", range(5))
def test_rewinding_drops_exactly_what_is_later(tmp_path, update):
    log = RunLog(tmp_path)
    log.append(chunk(1, 2))
    log.append(chunk(3, 4))
    log.rewind(update)
    assert_files_say(tmp_path, chunk(*range(1, update + 1)))
    log.append(chunk(9))  # the header is written again where it went
    assert_files_say(tmp_path, chunk(*range(1, update + 1), 9))


def test_a_kill_at_any_byte_loses_and_repeats_nothing(tmp_path):
    """Cut the write of update 3 at each byte of either file, then resume from 2."""
    log = RunLog(tmp_path)
    log.append(chunk(1, 2))
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    log.append(chunk(3))
    after = {p: p.read_bytes() for p in tmp_path.iterdir()}
    jsonl, table = tmp_path / "metrics.jsonl", tmp_path / "metrics.csv"
    # The order of the writes: the JSON lines first, then the table.
    cuts = [
        (i, len(before[table])) for i in range(len(before[jsonl]), len(after[jsonl]))
    ]
    cuts += [
        (len(after[jsonl]), i) for i in range(len(before[table]), len(after[table]))
    ]
    for cut_jsonl, cut_table in cuts:
        jsonl.write_bytes(after[jsonl][:cut_jsonl])
        table.write_bytes(after[table][:cut_table])
        resumed = RunLog(tmp_path)
        resumed.rewind(2)
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
        resumed.append(chunk(3))
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == after


def test_a_torn_line_is_skipped_by_readers_and_refused_by_writers(tmp_path):
    log = RunLog(tmp_path)
    log.append(chunk(1))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"update": 2, "s\xc3')
    assert read_rows(tmp_path) == chunk(1)
    with pytest.raises(ValueError, match=r"torn line.*rewind"):
        log.append(chunk(2))


def test_damage_in_the_middle_is_told(tmp_path):
    log = RunLog(tmp_path)
    log.append(chunk(1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"update": 1, "seed": 1', "{", 1))
    for read in (read_rows, read_metrics, lambda folder: log.rewind(1), RunLog):
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 2"):
            read(tmp_path)


def test_a_rewind_that_is_killed_leaves_the_old_files(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    log.append(chunk(1, 2))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.rewind(1)
    assert_files_say(tmp_path, chunk(1, 2))


def test_every_line_is_strict_json(tmp_path):
    RunLog(tmp_path).append([{"update": 1, "a": math.nan, "b": math.inf}])

    def refuse(constant):
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
