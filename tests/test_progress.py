"""What a person sees: plain lines in a pipe, a live bar in a terminal."""

import io
import sys

import pytest

from jaxpg.train.progress import (
    Glance,
    NoProgress,
    PlainProgress,
    RichProgress,
    cell,
    clock,
    describe_glance,
    make_progress,
    short,
    table,
)

EARLY = Glance(2, 60, 1_500, 750.0, -3.5, None)
LATE = Glance(45, 60, 2_250_000, 1.25e6, 480.125, 3725.0)


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Call it to make standard output a terminal of 100 columns.

    Within the test: pytest exchanges `sys.stdout` between set-up and call.
    """
    for name in ("NO_COLOR", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")

    def install():
        fake = FakeTerminal()
        monkeypatch.setattr(sys, "stdout", fake)
        return fake

    return install


def test_plain_lines_where_there_is_no_terminal(capsys):
    progress = make_progress(True, 0, 60)
    assert isinstance(progress, PlainProgress)
    progress.show(EARLY)
    progress.show(LATE)
    progress.close()
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines() == [
        "update 2/60  return -3.50  steps 1.5k  750 steps/s",
        "update 45/60  return 480.12  steps 2.2M  1.2M steps/s  1:02:05 left",
    ]


def test_silence(capsys):
    progress = make_progress(False, 0, 60)
    assert isinstance(progress, NoProgress)
    progress.show(EARLY)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_silence_in_a_terminal_too(terminal):
    terminal()
    assert isinstance(make_progress(False, 0, 60), NoProgress)


def test_a_bar_in_a_terminal(terminal):
    screen = terminal()
    progress = make_progress(True, 40, 60)
    assert isinstance(progress, RichProgress)
    assert "\x1b[?25l" in screen.getvalue()  # the cursor is hidden
    progress.show(LATE)
    progress.close()
    out = screen.getvalue()
    assert "compiling" in out and "40/60" in out and "45/60" in out
    assert "return 480.12  steps 2.2M  1.2M steps/s  1:02:05 left" in out
    assert out.count("\x1b[?25h") == 1 and out.index("\x1b[?25l") < out.index(
        "\x1b[?25h"
    )


def test_the_bar_goes_away_when_training_fails(terminal, tmp_path):
    """Compilation fails here; the cursor must come back all the same."""
    from jaxpg.envs.probes import constant_reward
    from jaxpg.train.config import PolicyConfig, TrainConfig
    from jaxpg.train.loop import train

    def step(key, state, action):
        raise ZeroDivisionError("this world is broken")

    policy = PolicyConfig(hidden=(2,))
    config = TrainConfig(runs_dir=tmp_path, num_envs=2, num_devices=1, policy=policy)
    screen = terminal()
    with pytest.raises(ZeroDivisionError):
        train(config, env=constant_reward()._replace(step=step))
    out = screen.getvalue()
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1


def test_unknown_time_is_not_shown():
    assert "left" not in describe_glance(EARLY) and "left" in describe_glance(LATE)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (2.5e6, "2.5M"), (3e9, "3.0G")],
)
def test_short(number, expected):
    assert short(number) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.6, "1:00:00")],
)
def test_clock(seconds, expected):
    assert clock(seconds) == expected


def test_table(capsys):
    table(
        "Results", [{"seed": 1, "mean_return": 2.345}, {"seed": 2, "mean_return": 3.0}]
    )
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("Results")
    for text in ("seed", "mean return", "2.35", "3.00"):
        assert text in out
    assert (cell(2), cell(2.345), cell(None), cell(float("nan"))) == (
        "2",
        "2.35",
        "None",
        "nan",
    )
