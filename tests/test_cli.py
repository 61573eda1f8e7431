"""The command line: what it prints, its exit codes, and no traceback."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jaxtyping
import pytest

from jaxpg import envs
from jaxpg._version import __version__
from jaxpg.cli import main
from jaxpg.train.config import ALGORITHMS, PolicyConfig, TrainConfig
from jaxpg.train.run import read_config

ROOT = pathlib.Path(__file__).parent.parent
TINY = (
    *("--hidden", "4", "--num-envs", "4", "--num-updates", "3", "--num-devices", "1"),
    *("--checkpoint-every", "2", "--eval-episodes", "3", "--no-compilation-cache"),
)
LAST_LINE = re.compile(r"mean -?\d+\.\d\d")


@pytest.fixture(autouse=True)
def unchanged_jax():
    """No command that is run in this process may change JAX for later tests."""
    before = dict(jax.config.values)
    yield
    assert dict(jax.config.values) == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on CartPole, for reading only."""
    folder = tmp_path_factory.mktemp("runs")
    words = ("--runs-dir", str(folder), "--name", "run", "--max-steps", "60")
    assert main(["train", "reinforce", "--seed", "4", *words, *TINY]) == 0
    return folder / "run"


@pytest.fixture
def call(capsys):
    """Run one command here; returns exit code, standard output and error."""

    def run(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_one_line(err, *parts):
    assert err.startswith("jaxpg: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


# --- without a run


def test_version(call):
    assert call("--version") == (0, f"jaxpg {__version__}\n", "")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help(call, word):
    code, out, _ = call(word)
    assert code == 0
    for part in ("usage: jaxpg", "train --resume RUN", "eval RUN", "list", "--debug"):
        assert part in out


def test_no_command(call):
    code, out, _ = call()
    assert code == 2 and out.startswith("usage: jaxpg")


def test_unknown_command(call):
    code, out, err = call("trian")
    assert code == 2 and out == ""
    assert_one_line(err, "'trian'", "did you mean 'train'?")


def test_list_envs(call):
    code, out, _ = call("list", "envs")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == envs.names()
    assert "CartPole-v1" in lines and "Probe-ConstantReward-v0" in lines
    (mnist,) = [line for line in lines if line.startswith("MNISTBandit")]
    assert re.fullmatch(r"MNISTBandit\S*  \(cannot load: needs the MNIST.*\)", mnist)


def test_list_algorithms(call):
    code, out, _ = call("list", "algorithms")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == [
        *("reinforce", "a2c", "vtrace", "off-policy", "npg", "enac", "trpo", "ppo")
    ]
    assert all(len(line.split()) > 2 for line in lines)  # and says what each is


def test_list_what(call):
    for words in (("list",), ("list", "env"), ("list", "envs", "algorithms")):
        code, _, err = call(*words)
        assert code == 2
        assert_one_line(err, "jaxpg list envs", "jaxpg list algorithms")
    assert call("list", "--help")[0] == 0


@pytest.mark.parametrize("name", [None, *ALGORITHMS])
def test_train_help_names_every_option(call, name):
    code, out, _ = call("train", *([] if name is None else [name]), "--help")
    name = name or "reinforce"
    assert code == 0 and out.startswith(f"usage: jaxpg train {name}")
    flags = set(re.findall(r"--[a-z_-]+", out))
    for kind in (TrainConfig, PolicyConfig, ALGORITHMS[name]):
        for field in dataclasses.fields(kind):
            if field.name not in ("algorithm", "policy"):
                assert "--" + re.sub(r"_(?!$)", "-", field.name) in flags
    assert {"--resume", "--compilation-cache"} <= flags


def test_eval_help_names_every_option(call):
    code, out, _ = call("eval", "--help")
    flags = set(re.findall(r"--[a-z-]+", out))
    assert code == 0
    assert {"--episodes", "--greedy", "--gymnasium", "--checkpoint", "--seed"} <= flags


# --- wrong words


def test_unknown_environment(call, tmp_path):
    code, _, err = call("train", "--env", "CartPol-v1", "--runs-dir", tmp_path, *TINY)
    assert code == 1
    assert_one_line(err, "'CartPol-v1'", "did you mean 'CartPole-v1'")
    assert not any(tmp_path.iterdir())


def test_unknown_algorithm(call):
    code, _, err = call("train", "reinforc")
    assert code == 2
    assert_one_line(err, "'reinforc'", "did you mean 'reinforce' or 'enac'?")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--num-envs", "0"), "num_envs is 0"),
        (("--num-updates", "-3"), "num_updates is -3"),
        (("--hidden", "8", "0"), "hidden is 0"),
        (("--episodes-per-env", "0"), "episodes_per_env is 0"),
        (("--discount", "1.5"), "discount is 1.5"),
        (("--activation", "tahn"), "did you mean 'tanh'"),
        (("--seed", "many"), "many"),
        (("--baseline", "mean"), "mean"),
        (("--no-such-option", "1"), "--no-such-option"),
    ],
)
def test_wrong_values_are_wrong_usage(call, tmp_path, words, part):
    code, out, err = call(
        "train", "--runs-dir", tmp_path, "--no-compilation-cache", *words
    )
    assert code == 2 and out == ""
    assert part in " ".join(err.replace("│", " ").split())  # out of its frame
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("--sweep needs the name of a setting and numbers, for example",)),
        (("learning_rate", "much"), ("--sweep learning_rate much needs",)),
        (("0.1", "0.2"), ("'0.1', unknown",)),
        (("learning-rate",), ("learning_rate has the values ()", "at least one")),
        (("learning_rat", "0.1"), ("'learning_rat'", "did you mean 'learning_rate'?")),
        (("learning_rate", "0.1", "-1"), ("learning_rate is -1.0, needs",)),
        (("discount", "0.5", "0.5"), ("discount", "needs different ones")),
        (("chunk_size", "8", "16"), ("'chunk_size'",)),
    ],
)
def test_wrong_sweeps_are_wrong_usage(call, tmp_path, words, parts):
    before = ("--runs-dir", tmp_path, "--no-compilation-cache")
    code, out, err = call("train", *before, "--sweep", *words, "--seed", "1")
    assert code == 2 and out == ""
    assert_one_line(err, *parts)
    assert not any(tmp_path.iterdir())


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys):
    words = ["eval", "/no/such/run", "--debug", "--no-compilation-cache"]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "holds no run" in err


# --- runs


def test_train_then_eval(call, tmp_path):
    words = ("--env", "Probe-ConstantReward-v0", "--runs-dir", tmp_path, "--name", "r")
    code, out, err = call("train", *words, *TINY)
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert lines[0] == f"run folder: {tmp_path / 'r'}"
    assert lines[-2:] == [f"run folder: {tmp_path / 'r'}", "mean 1.00"]
    assert any(line.startswith("update 3/3  return 1.00") for line in lines)
    code, out, err = call(
        "eval", tmp_path / "r", "--episodes", "5", "--no-compilation-cache"
    )
    assert code == 0 and err == "" and out.splitlines()[-1] == "mean 1.00"
    assert "jaxpg's Probe-ConstantReward-v0, update 3, actions drawn" in out


def evaluate(call, trained, *words):
    code, out, err = call(
        "eval", trained, "--episodes", "8", "--no-compilation-cache", *words
    )
    assert code == 0 and err == "", err
    assert LAST_LINE.fullmatch(out.splitlines()[-1])
    return out


def test_eval_checkpoints(call, trained):
    assert "update 3, actions drawn" in evaluate(call, trained)
    assert "update 2, actions drawn" in evaluate(call, trained, "--checkpoint", "2")
    assert re.search("update [23],", evaluate(call, trained, "--checkpoint", "best"))
    for which in ("1", "newest", "-2"):
        code, _, err = call(
            "eval", trained, f"--checkpoint={which}", "--no-compilation-cache"
        )
        assert code == 1
        assert_one_line(err, repr(which), "latest, best or one of [2, 3]")


def test_eval_greedy(call, trained):
    greedy = evaluate(call, trained, "--greedy")
    assert "actions greedy" in greedy
    drawn = evaluate(call, trained)
    assert greedy.splitlines()[-1] != drawn.splitlines()[-1]
    assert drawn == evaluate(call, trained)  # the same seed
    assert drawn != evaluate(call, trained, "--seed", "1")


def test_eval_in_gymnasium(call, trained):
    pytest.importorskip("gymnasium")
    out = evaluate(call, trained, "--gymnasium", "--episodes", "3")
    assert "Gymnasium's CartPole-v1, update 3" in out


def test_eval_unknown_to_gymnasium(call, tmp_path):
    pytest.importorskip("gymnasium")
    words = ("--env", "Probe-ConstantReward-v0", "--runs-dir", tmp_path, "--name", "r")
    assert call("train", *words, *TINY)[0] == 0
    code, _, err = call("eval", tmp_path / "r", "--gymnasium", "--no-compilation-cache")
    assert code == 1
    assert_one_line(err, "Gymnasium cannot start 'Probe-ConstantReward-v0'")


def test_eval_needs_episodes(call, trained):
    code, _, err = call("eval", trained, "--episodes", "0", "--no-compilation-cache")
    assert code == 2 and "episodes is 0" in err


@pytest.mark.parametrize("command", [("eval",), ("train", "--resume")])
def test_no_run_there(call, tmp_path, command):
    for folder in (tmp_path, tmp_path / "missing"):
        code, _, err = call(*command, folder, "--no-compilation-cache")
        assert code == 1
        assert_one_line(err, f"{folder} holds no run")
    assert not any(tmp_path.iterdir())


def test_existing_run_is_not_overwritten(call, trained):
    before = contents(trained)
    words = ("--runs-dir", trained.parent, "--name", trained.name)
    code, _, err = call("train", *words, *TINY)
    assert code == 1
    assert_one_line(err, "exists already", f"--resume {trained}")
    assert contents(trained) == before


def test_resume_refuses_other_settings(call, trained):
    before = contents(trained)
    words = ("--learning-rate", "0.5", "--seed", "4", "--num-envs", "8")
    code, _, err = call("train", "--resume", trained, *words)
    assert code == 2
    changes = "(num_envs was 4, now 8, learning_rate was 0.01, now 0.5)"
    assert_one_line(err, "other settings", changes)
    assert contents(trained) == before


def test_a_sweep(call, tmp_path, monkeypatch):
    """Several settings, each in words of its own, and none of them lost by a resume."""
    # Settings are annotated as the numbers that they are without a sweep.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    words = ("--env", "Probe-ConstantReward-v0", "--runs-dir", tmp_path, "--name", "r")
    sweeps = ("--sweep", "learning-rate", "0.5", "0.25", "--sweep", "discount", "1")
    code, _, err = call("train", "reinforce", *words, *sweeps, *TINY)
    assert code == 0 and err == ""
    members = read_config(tmp_path / "r")[0].members()
    assert members == [
        {"seed": 0, "learning_rate": 0.5, "discount": 1.0},
        {"seed": 0, "learning_rate": 0.25, "discount": 1.0},
    ]
    before = contents(tmp_path)
    again = ("train", "--resume", tmp_path / "r", "--no-compilation-cache")
    code, _, err = call(*again, "--sweep", "discount", "0.5")
    assert code == 2
    assert_one_line(err, "other settings (sweep was (('learning_rate', (0.5, 0.25)")
    assert contents(tmp_path) == before
    code, out, err = call(*again, *sweeps, "--num-updates", "4")
    assert code == 0 and err == "" and "(continued from update 3)" in out
    assert read_config(tmp_path / "r")[0].members() == members
    code, out, _ = call("eval", tmp_path / "r", "--episodes", "5", *again[-1:])
    assert code == 0 and "learning" in out and "0.50" in out and "0.25" in out


def test_resume_for_longer(call, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    words = ("--num-updates", "4", "--no-compilation-cache")
    code, out, err = call("train", "--resume", folder, *words)
    assert code == 0 and err == ""
    assert f"run folder: {folder} (continued from update 3)" in out
    assert "update 4/4" in out and LAST_LINE.fullmatch(out.splitlines()[-1])


@pytest.mark.parametrize("command", [("eval",), ("train", "--resume")])
def test_damaged_checkpoint(call, trained, tmp_path, command):
    folder = shutil.copytree(trained, tmp_path / "copy")
    files = (folder / "checkpoints" / "step_0000000003").rglob("*")
    biggest = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(biggest, biggest.stat().st_size // 2)
    before = contents(folder)
    code, _, err = call(*command, folder, "--no-compilation-cache")
    assert code == 1
    assert_one_line(err, "is damaged", "step 2 is intact")
    assert contents(folder) == before


# --- a process of its own


def process(*words, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_default_start_fills_the_compilation_cache(tmp_path):
    """As a user types it: all devices, the cache on, no flags for JAX; twice."""
    words = [*TINY[:6], "--runs-dir", str(tmp_path), "--env", "Probe-ConstantReward-v0"]
    code = (
        "import sys; from jaxpg.cli import main\n"
        f"first = main(['train', '--name', 'a', *{words!r}])\n"
        f"second = main(['train', '--name', 'b', *{words!r}])\n"
        "sys.exit(first or second)"
    )
    cache = tmp_path / "cache"
    done = process(
        "-W", "error", "-c", code, XDG_CACHE_HOME=str(cache), HOME=str(cache)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean 1.00") == 2
    assert any(path.is_file() for path in cache.rglob("*"))


def test_module_starts_and_hides_tracebacks(tmp_path):
    done = process("-m", "jaxpg", "eval", tmp_path, "--no-compilation-cache")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert_one_line(done.stderr, "holds no run")
    done = process("-m", "jaxpg", "eval", tmp_path, "--debug", "--no-compilation-cache")
    assert done.returncode == 1 and "Traceback" in done.stderr
