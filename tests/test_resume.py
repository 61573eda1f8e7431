"""Real processes, killed in mid-training: what is resumed ends at the same bits."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxpg.train.log import read_rows
from jaxpg.train.run import open_run, restore_state

ROOT = pathlib.Path(__file__).parent.parent
NUM_UPDATES = 1000
EVERY = 100
TIMING = {"seconds", "steps_per_second"}
ALGORITHMS = {
    "reinforce": (),
    # Segments that go on over updates, two memories, statistics of observations.
    "a2c": ("--memory", "8", "--normalize-observations", "--num-steps", "4"),
    "ppo": (
        *("--memory", "8", "--normalize-observations", "--num-steps", "4"),
        *("--num-epochs", "2", "--num-minibatches", "2"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def users_cache(tmp_path_factory):
    """Where runs keep compiled programs, as users' do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def start(*words, **changes):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | changes
    return subprocess.Popen(
        [sys.executable, "-m", "jaxpg", "train", *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def new_run(folder, algorithm, num_devices, *words):
    return start(
        *(algorithm, *ALGORITHMS[algorithm], *words),
        *("--runs-dir", str(folder.parent), "--name", folder.name),
        *("--env", "Probe-RememberFirst-v0", "--hidden", "8", "--num-envs", "16"),
        *("--num-updates", str(NUM_UPDATES), "--checkpoint-every", str(EVERY)),
        *("--num-devices", str(num_devices), "--eval-episodes", "0"),
        *("--num-seeds", "2"),
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (out, err)
    assert "Traceback" not in err and "Warning" not in err
    return out, err


def last_logged(folder):
    """The last whole row's update, read as a stranger would."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["update"] if lines else 0


def last_saved(folder):
    steps = (folder / "checkpoints").glob("step_*")
    return max((int(path.name[5:]) for path in steps), default=0)


def wait_until_beyond_a_checkpoint(process, folder, update):
    """Return once rows are on disk that no checkpoint has seen."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        saved = last_saved(folder)
        if saved >= update and last_logged(folder) > saved:
            return
        time.sleep(0.002)
    pytest.fail(f"never got there: {process.poll()}, {process.communicate()}")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a run that nobody interrupted.

    Those that compile fast are compiled by themselves, not read from the cache.
    """

    @functools.cache
    def run(algorithm, num_devices):
        folder = tmp_path_factory.mktemp("whole") / "run"
        alone = () if algorithm == "ppo" else ("--no-compilation-cache",)
        finish(new_run(folder, algorithm, num_devices, *alone))
        return folder

    return run


def assert_same_run(folder, expected):
    states = [restore_state(open_run(f), NUM_UPDATES) for f in (folder, expected)]
    leaves = [jax.tree.leaves(state) for state in states]
    assert len(leaves[0]) > 10
    for x, y in zip(*leaves, strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.array_equal(x, y)
    tables = [
        [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(f)]
        for f in (folder, expected)
    ]
    order = [(u, s) for u in range(1, NUM_UPDATES + 1) for s in (0, 1)]
    assert [(row["update"], row["seed"]) for row in tables[1]] == order
    assert tables[0] == tables[1]
    csv = (folder / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in csv[1:]] == [str(u) for u, _ in order]


def end(process, folder, number):
    """Send a signal, and hold the process to what it must say; returns what it said."""
    process.send_signal(number)
    if number == signal.SIGKILL:
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
        return out
    out, _ = finish(process, 128 + number)
    stopped = last_saved(folder)
    assert stopped == last_logged(folder)
    assert out.splitlines()[-1] == (
        f"interrupted after update {stopped}; continue with: "
        f"jaxpg train --resume {folder}"
    )
    assert (folder / "learning_curve.png").exists()
    return out


# Every day the run that has most to remember and compiles fastest. The others differ in
# what they compute, not in what is saved.
KILLED, SIGNALLED = (signal.SIGKILL,), (signal.SIGINT, signal.SIGTERM)
ENDS = [
    (("a2c", 2), KILLED),
    *(
        pytest.param(kind, ends, marks=pytest.mark.exhaustive)
        for kind, ends in {
            ("a2c", 1): SIGNALLED,
            ("ppo", 2): KILLED,
            ("reinforce", 1): KILLED,
            ("reinforce", 2): KILLED,
        }.items()
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ends"), ENDS)
def test_ended_and_resumed_equals_uninterrupted(tmp_path, whole_run, kind, ends):
    folder = tmp_path / "run"
    process, saved, continued = new_run(folder, *kind), EVERY, ""
    for number in ends:
        wait_until_beyond_a_checkpoint(process, folder, saved + EVERY)
        out = end(process, folder, number)
        assert continued in out or number == signal.SIGKILL
        assert saved + EVERY <= last_saved(folder) < NUM_UPDATES
        saved = last_saved(folder)
        continued = f"continued from update {saved})"
        process = start("--resume", str(folder))
    out, _ = finish(process)
    assert continued in out
    assert_same_run(folder, whole_run(*kind))
