"""Several processes as one run: how they meet, what they compute, how they end."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxpg.cli import main
from jaxpg.train import distributed, lifeline, sharding
from jaxpg.train.agreement import agree, decide
from jaxpg.train.lifeline import Lifeline, meet
from jaxpg.train.log import read_rows
from jaxpg.train.loop import resume, train
from jaxpg.train.run import open_run, read_config, restore_state
from jaxpg.train.sharding import first_devices, usual_device_count

ROOT = pathlib.Path(__file__).parent.parent
TIMING = {"seconds", "steps_per_second"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def port():
    return free_port()


@pytest.fixture(autouse=True)
def hang_up_afterwards(monkeypatch):
    made = []
    monkeypatch.setattr(
        lifeline, "Lifeline", lambda x: made.append(Lifeline(x)) or made[-1]
    )
    yield
    for each in made:
        each.close()


# --- how they meet


def meet_all(port, *members, timeout=10.0):
    """What `meet` brings for each (num_processes, process_id), side by side."""
    results = [None] * len(members)

    def one(index, num_processes, process_id):
        try:
            results[index] = meet("127.0.0.1", port, num_processes, process_id, timeout)
        except ValueError as error:
            results[index] = str(error)

    threads = [
        threading.Thread(target=one, args=(i, *member))
        for i, member in enumerate(members)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)  # process 0 hears them in this order
    for thread in threads:
        thread.join()
    return results


def ends_heard_by(lifelines):
    """Watch them all; returns each one's list of what it heard."""
    heard = [[] for _ in lifelines]
    for each, ends in zip(lifelines, heard, strict=True):
        each.watch(lambda process, why, ends=ends: ends.append((process, why)))
    return heard


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def hang_up(lifeline):
    """What the kernel does for a process that dies."""
    for connection in lifeline._connections.values():
        connection.socket.shutdown(socket.SHUT_RDWR)


def test_all_hear_of_a_death(port):
    lifelines = meet_all(port, (3, 1), (3, 0), (3, 2))
    heard = ends_heard_by(lifelines)
    hang_up(lifelines[2])
    wait_for(lambda: heard[0] and heard[1])
    assert heard[:2] == [[(2, None)], [(2, None)]]


def test_all_hear_of_the_death_of_process_0(port):
    lifelines = meet_all(port, (3, 0), (3, 1), (3, 2))
    heard = ends_heard_by(lifelines[1:])
    hang_up(lifelines[0])
    wait_for(lambda: all(heard))
    assert heard == [[(0, None)], [(0, None)]]


def test_all_hear_why_one_failed(port):
    lifelines = meet_all(port, (3, 0), (3, 1), (3, 2))
    heard = ends_heard_by(lifelines)
    lifelines[1].fail("no space left")
    wait_for(lambda: heard[0] and heard[2])
    assert heard == [[(1, "no space left")], [], [(1, "no space left")]]


def test_one_that_is_done_may_leave(port):
    lifelines = meet_all(port, (3, 0), (3, 1), (3, 2))
    heard = ends_heard_by(lifelines)
    lifelines[1].leave()
    hang_up(lifelines[1])
    lifelines[2].fail("afterwards")  # so that there is something to wait for
    wait_for(lambda: heard[0])
    assert heard == [[(2, "afterwards")], [], []]


def test_the_port_is_free_again_when_they_have_met(port):
    lifelines = meet_all(port, (2, 0), (2, 1))
    with socket.create_server(("127.0.0.1", port)):
        heard = ends_heard_by(lifelines)
        lifelines[1].fail("still connected")
        wait_for(lambda: heard[0])


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (
            [(2, 0), (3, 1)],
            "num_processes is 2 in process 0, but 3 in process 1; needs the same",
        ),
        (
            [(3, 0), (3, 1), (3, 1)],
            "process_id is 1 in two processes, needs another one in each, from 0 to 2",
        ),
        (
            [(4, 0), (4, 2)],
            "num_processes is 4, but process 1, 3 did not come within 0.5 s; start",
        ),
    ],
    ids=["counts differ", "two of one number", "one is missing"],
)
def test_who_does_not_fit_is_told_to_all(port, members, sentence):
    results = meet_all(port, *members, timeout=0.5)
    assert all(sentence in str(result) for result in results), results


def test_an_unreachable_coordinator(port):
    began = time.monotonic()
    sentence = f"^coordinator is 127.0.0.1:{port}, which could not be reached within 0"
    with pytest.raises(ValueError, match=sentence):
        meet("127.0.0.1", port, 2, 1, 0.5)
    assert time.monotonic() - began < 5


def test_a_port_that_is_taken(port):
    with socket.create_server(("", port)):
        with pytest.raises(ValueError, match=r"cannot listen there .*another port"):
            meet("127.0.0.1", port, 2, 0, 0.5)


def test_strangers_are_not_let_in(port):
    def knock():
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n")
            stranger.recv(1)

    first = threading.Timer(0.2, knock)
    first.start()
    later = threading.Timer(0.4, lambda: results.extend(meet_all(port, (2, 1))))
    results = []
    later.start()
    results.extend(meet_all(port, (2, 0)))
    later.join()
    assert not any(isinstance(result, str) for result in results), results


def test_a_coordinator_that_is_something_else(port):
    def answer():
        connection, _ = server.accept()
        connection.sendall(b"220 at your service\r\n")
        connection.close()

    with socket.create_server(("127.0.0.1", port)) as server:
        threading.Thread(target=answer).start()
        with pytest.raises(ValueError, match="something answers that is no process 0"):
            meet("127.0.0.1", port, 2, 1, 0.5)


# --- which group


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables where nothing else tells of a cluster."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_")):
            monkeypatch.delenv(name)
    return lambda **variables: [
        monkeypatch.setenv(name, value) for name, value in variables.items()
    ]


SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NTASKS": "12",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "3",
}


def test_slurm_says_all(environment):
    environment(**SLURM)
    group = distributed.find_group()
    assert group[1:] == (12, 5)
    assert re.fullmatch(r"node07:\d+", group.coordinator)


def test_words_win_over_variables_and_these_over_slurm(environment):
    environment(**SLURM, JAX_COORDINATOR_ADDRESS="far:9", JAX_NUM_PROCESSES="3")
    assert distributed.find_group(process_id=2) == ("far:9", 3, 2)
    assert distributed.find_group("near:8", 2, 0) == ("near:8", 2, 0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((None, 2, 0), "^coordinator is not given, and there is no SLURM.*HOST:PORT"),
        (("a:1", None, 0), "^num_processes is not given, and there is no SLURM"),
        (("a:1", 2, None), "^process_id is not given, and there is no SLURM"),
        (("node1", 2, 0), "^coordinator is 'node1', needs HOST:PORT, such as"),
        (("node1:x", 2, 0), "^coordinator is 'node1:x', needs HOST:PORT"),
        (("a:1", 0, 0), "^num_processes is 0, needs a whole number of at least 1"),
        (("a:1", 2, 2), r"^process_id is 2, needs a number in \[0, 1\]"),
    ],
)
def test_what_cannot_be_a_group(environment, given, sentence):
    environment()
    with pytest.raises(ValueError, match=sentence):
        distributed.find_group(*given)


def test_variables_that_are_no_numbers(environment):
    environment(JAX_PROCESS_ID="two")
    with pytest.raises(ValueError, match=r"^JAX_PROCESS_ID is 'two', needs a whole"):
        distributed.find_group("a:1", 2)


def test_alone_there_is_nothing_to_connect(environment):
    environment()
    distributed.connect("a:1", 1, 0)
    assert not jax.distributed.is_initialized()
    assert decide(lambda: "mine") == "mine"
    assert agree(15, 3) == (15, 3)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--process-id", "1"), 2, "--process-id is for --distributed"),
        (("--distributed",), 1, "coordinator is not given"),
        (
            (*("--distributed", "--coordinator", "127.0.0.1:{port}"),),
            1,
            "num_processes is not given",
        ),
        (
            (
                *("--distributed", "--coordinator", "127.0.0.1:{port}"),
                *("--num-processes", "2", "--process-id", "1"),
                *("--connect-timeout", "0.3"),
            ),
            1,
            "could not be reached within 0.3 s",
        ),
    ],
)
def test_the_command_line_refuses(environment, port, capsys, words, code, sentence):
    environment()
    words = [word.format(port=port) for word in words]
    assert main(["train", "--no-compilation-cache", *words]) == code
    err = capsys.readouterr().err
    assert sentence in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


# --- which devices


class Device(NamedTuple):
    process_index: int
    id: int


def test_each_process_gives_its_first_devices():
    devices = [Device(process, i) for i in range(3) for process in (1, 0)]
    chosen = first_devices(devices, 4, 2)
    assert chosen == [Device(0, 0), Device(0, 1), Device(1, 0), Device(1, 1)]
    with pytest.raises(
        ValueError,
        match=r"^num_devices is 3, needs a multiple of the 2 processes.* next is 4",
    ):
        first_devices(devices, 3, 2)


def test_usually_as_many_devices_as_divide(monkeypatch):
    monkeypatch.setattr(sharding.jax, "process_count", lambda: 3)
    assert usual_device_count(num_envs=180) == 18  # 6 of 8 in each
    assert usual_device_count(num_envs=36) == 3  # 12 rows are work for one device
    with pytest.raises(
        ValueError,
        match=r"^the number of processes is 3, needs a .* num_envs = 64; take .* 66",
    ):
        usual_device_count(num_envs=64)


# --- real processes


EVERY = 10
FLAGS = " ".join(  # quick to compile, as everywhere in the tests
    flag
    for flag in os.environ.get("XLA_FLAGS", "").split()
    if "device_count" not in flag
)


class Pair(NamedTuple):
    """Two processes of one run."""

    processes: list[subprocess.Popen]

    def end(self, number, victim):
        """Send one of them a signal; returns (code, out, err) of each, and seconds."""
        began = time.monotonic()
        self.processes[victim].send_signal(number)
        return self.outcomes(), time.monotonic() - began

    def outcomes(self):
        """Wait for their end; (code, out, err) of each."""
        try:
            outputs = [process.communicate(timeout=100) for process in self.processes]
        finally:
            for process in self.processes:  # none may outlive a test that fails
                process.kill()
        codes = [process.returncode for process in self.processes]
        return [(c, *o) for c, o in zip(codes, outputs, strict=True)]


def start_pair(*words, **changes):
    address = ("--distributed", "--coordinator", f"127.0.0.1:{free_port()}")
    return Pair(
        [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "jaxpg", "train", *words, *address),
                    *("--num-processes", "2", "--process-id", str(index)),
                ],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": FLAGS, "JAX_ENABLE_X64": "1"} | changes,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for index in (0, 1)
        ]
    )


def last_saved(folder):
    steps = (folder / "checkpoints").glob("step_*")
    return max((int(path.name[5:]) for path in steps), default=0)


def wait_until_saved(pair, folder, update):
    deadline = time.monotonic() + 150
    while last_saved(folder) < update:
        codes = [process.poll() for process in pair.processes]
        if codes != [None, None] or time.monotonic() > deadline:
            for process in pair.processes:
                process.kill()
            pytest.fail(f"{codes}, {[p.communicate() for p in pair.processes]}")
        time.sleep(0.005)


class Story(NamedTuple):
    """What became of a run that lost a process, was told to stop, and then ended."""

    folder: pathlib.Path
    after_death: list
    seconds: float
    kept: list
    saved: int
    after_signal: list
    stopped: int
    at_the_end: list


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Two processes of one device each, twice; in the end two of two devices."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    cache = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    pair = start_pair(
        *("a2c", "--env", "Probe-RememberFirst-v0", "--hidden", "4"),
        *("--num-envs", "16", "--num-steps", "3", "--normalize-observations"),
        *("--num-seeds", "2", "--num-updates", "100000", "--num-devices", "2"),
        *("--checkpoint-every", str(EVERY), "--eval-episodes", "4"),
        *("--runs-dir", str(folder.parent), "--name", folder.name),
        **cache,
    )
    wait_until_saved(pair, folder, EVERY)
    after_death, seconds = pair.end(signal.SIGKILL, victim=1)
    kept, saved = read_rows(folder), last_saved(folder)
    again = ("--resume", str(folder))
    pair = start_pair(*again, **cache)
    wait_until_saved(pair, folder, saved + EVERY)
    after_signal, _ = pair.end(signal.SIGTERM, victim=1)
    stopped = last_saved(folder)
    more = ("--num-devices", "4", "--num-updates", str(stopped + 3))
    at_the_end = start_pair(*again, *more, **cache).outcomes()
    return Story(
        *(folder, after_death, seconds, kept, saved, after_signal, stopped, at_the_end)
    )


@pytest.mark.slow
def test_the_others_end_when_one_dies_and_nothing_is_lost(story):
    (code, _, err), (killed, *_) = story.after_death
    assert killed == -signal.SIGKILL and code == 1
    assert story.seconds < 60
    assert err.splitlines()[0] == (
        "jaxpg: error: process 1 of 2 has died, and the others cannot go on without "
        f"it; continue the run with: jaxpg train --resume {story.folder}"
    )
    assert "Traceback" not in err and "Warning" not in err
    assert story.saved >= EVERY
    updates = [row["update"] for row in story.kept]
    assert updates == sorted(updates) and len(updates) >= 2 * story.saved


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_update(story):
    (code, out, err), (other, _, its_err) = story.after_signal
    assert (code, other) == (143, 143), (err, its_err)
    assert out.splitlines()[-1] == (
        f"interrupted after update {story.stopped}; continue with: "
        f"jaxpg train --resume {story.folder}"
    )
    assert story.stopped >= story.saved + EVERY


@pytest.mark.slow
def test_only_the_first_process_writes_and_prints(story):
    for ends, what in (
        (story.after_death, "run folder: "),
        (story.after_signal, f"(continued from update {story.saved})"),
        (story.at_the_end, f"(continued from update {story.stopped})"),
    ):
        assert what in ends[0][1]
        # Gloo itself prints in both, whence no stricter check.
        assert not re.search("update|folder|mean", ends[1][1])
    rows = read_rows(story.folder)
    numbers = [(row["update"], row["seed"]) for row in rows]
    last = rows[-1]["update"]
    assert numbers == [(u, s) for u in range(1, last + 1) for s in (0, 1)]


@pytest.mark.slow
def test_at_the_end_it_is_evaluated(story):
    assert [code for code, *_ in story.at_the_end] == [0, 0], story.at_the_end
    assert re.fullmatch(r"mean -?\d\.\d\d", story.at_the_end[0][1].splitlines()[-1])
    assert len(json.loads((story.folder / "evaluation.json").read_text())) == 2
    assert (story.folder / "learning_curve.png").exists()


@pytest.mark.slow
def test_resumed_on_other_devices_it_equals_one_process(story, float64):
    """From 2 processes with 2 and then 4 devices to one with 8; against one device."""
    total = story.stopped + 5
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        resume(story.folder, num_updates=total, num_devices=8, show=False)
    told = [str(warning.message) for warning in warned]
    assert any("process_count was 2, is 1" in sentence for sentence in told)
    config, _ = read_config(story.folder)
    assert (config.num_updates, config.num_devices) == (total, 8)
    whole = train(
        dataclasses.replace(config, name="whole", num_devices=1), show=False
    ).folder
    states = [restore_state(open_run(f), total) for f in (story.folder, whole)]
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-9)
    tables = [
        [[v for k, v in row.items() if k not in TIMING] for row in read_rows(f)]
        for f in (story.folder, whole)
    ]
    assert len(tables[1]) == 2 * total
    for row, expected in zip(*tables, strict=True):
        row, expected = (np.array(r, float) for r in (row, expected))
        np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-8)
