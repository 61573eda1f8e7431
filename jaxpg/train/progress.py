"""What a person sees while a run goes on: a live bar, or plain lines in a log."""

import sys
from typing import Any, NamedTuple, Protocol, runtime_checkable

__all__ = [
    "Glance",
    "PlainProgress",
    "Progress",
    "Reading",
    "RichProgress",
    "make_progress",
]


class Glance(NamedTuple):
    """The state of a run at one visit of the host.

    Attributes:
        update: updates made.
        num_updates: updates to make.
        env_steps: environment steps taken, over all seeds.
        steps_per_second: since the last visit.
        mean_return: mean return of the last update's episodes, over all seeds.
        seconds_left: at the present rate; None while it is unknown.
    """

    update: int
    num_updates: int
    env_steps: int
    steps_per_second: float
    mean_return: float
    seconds_left: float | None


class Reading(NamedTuple):
    """The state of a run without an environment at one visit of the host.

    Attributes:
        update: updates made.
        num_updates: updates to make.
        values: what its last update tells, by name, means over all seeds.
        updates_per_second: since the last visit.
        seconds_left: at the present rate; None while it is unknown.
    """

    update: int
    num_updates: int
    values: dict[str, float]
    updates_per_second: float
    seconds_left: float | None


@runtime_checkable
class Progress(Protocol):
    """Something that shows glances."""

    def show(self, glance: "Glance | Reading") -> None: ...

    def close(self) -> None: ...


class PlainProgress:
    """One line per glance, for logs and pipes."""

    def show(self, glance: Glance | Reading) -> None:
        print(describe_glance(glance), flush=True)

    def close(self) -> None:
        pass


class RichProgress:
    """A bar that is drawn in place, for terminals."""

    def __init__(self, first_update: int, num_updates: int) -> None:
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("update"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            progress.TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task(
            "compiling", total=num_updates, completed=first_update
        )
        self._bar.start()

    def show(self, glance: Glance | Reading) -> None:
        line = describe_glance(glance).split("  ", 1)[1]
        self._bar.update(self._task, completed=glance.update, description=line)

    def close(self) -> None:
        self._bar.stop()


class NoProgress:
    """Silence."""

    def show(self, glance: Glance | Reading) -> None:
        pass

    def close(self) -> None:
        pass


def make_progress(show: bool, first_update: int, num_updates: int) -> Progress:
    """The progress display that suits where standard output goes."""
    if not show:
        return NoProgress()
    if sys.stdout.isatty():
        return RichProgress(first_update, num_updates)
    return PlainProgress()


def describe_glance(glance: Glance | Reading) -> str:
    """One line of plain text.

    >>> describe_glance(Glance(5, 60, 120_000, 1.5e6, 87.25, 42.0))
    'update 5/60  return 87.25  steps 120.0k  1.5M steps/s  0:42 left'
    >>> describe_glance(Reading(5, 60, {"loss": 0.25}, 12.0, 4.0))
    'update 5/60  loss 0.250  12.0 updates/s  0:04 left'
    """
    left = "" if glance.seconds_left is None else f"  {clock(glance.seconds_left)} left"
    if isinstance(glance, Reading):
        told = "  ".join(f"{name} {x:.3f}" for name, x in glance.values.items())
        return (
            f"update {glance.update}/{glance.num_updates}  {told}  "
            f"{glance.updates_per_second:.1f} updates/s{left}"
        )
    return (
        f"update {glance.update}/{glance.num_updates}  "
        f"return {glance.mean_return:.2f}  "
        f"steps {short(glance.env_steps)}  "
        f"{short(glance.steps_per_second)} steps/s{left}"
    )


def short(number: float) -> str:
    """A number in thousands, millions or billions.

    >>> short(999), short(1.5e6), short(2e9)
    ('999', '1.5M', '2.0G')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> clock(42), clock(3725)
    ('0:42', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of values as a table."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left")
    for name in rows[0]:
        grid.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        grid.add_row(*(cell(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(grid)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
