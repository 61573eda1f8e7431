"""What a person sees while a study goes on: a bar with the time left, or lines."""

import sys
import time
from typing import Any

from jaxpg.train.progress import clock

__all__ = ["StudyProgress"]

SECONDS_BETWEEN_LINES = 5.0


class StudyProgress:
    """Work done of work to do, in any unit; as a context it ends with what it shows."""

    def __init__(self, show: bool, total: float, what: str) -> None:
        self._show = show
        self._total = total
        self._done = 0.0
        self._counted = 0.0
        self._is_first = True
        self._what = what
        self._text = "compiling"
        self._began = time.monotonic()
        self._last = self._began
        self._bar: Any = None

    def __enter__(self) -> "StudyProgress":
        if self._show and sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn(self._what),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.description}"),
            )
            self._task = self._bar.add_task(self._text, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, amount: float) -> None:
        """Count work that was found done, which says nothing of the speed."""
        self._done += amount
        self._draw()

    def advance(self, amount: float) -> None:
        """Count work that was done now."""
        self._done += amount
        if self._is_first:  # it was compiled, which says nothing of the speed
            self._is_first, self._began = False, time.monotonic()
        else:
            self._counted += amount
        self._draw()

    def say(self, text: str) -> None:
        """What goes on now."""
        self._text = text
        self._draw(at_once=True)

    def seconds_left(self) -> float | None:
        """At the speed so far; None while it is unknown."""
        if self._counted <= 0.0:
            return None
        rate = self._counted / (time.monotonic() - self._began)
        return max(0.0, self._total - self._done) / rate

    def describe(self) -> str:
        """One line of plain text."""
        left = self.seconds_left()
        share = 100.0 * self._done / self._total
        end = "" if left is None else f"  {clock(left)} left"
        return f"{self._what} {share:3.0f}%  {self._text}{end}"

    def _draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._bar is not None:
            left = self.seconds_left()
            end = "" if left is None else f"  {clock(left)} left"
            self._bar.update(
                self._task, completed=self._done, description=f"{self._text}{end}"
            )
        elif self._show and (at_once or now - self._last > SECONDS_BETWEEN_LINES):
            print(self.describe(), flush=True)
            self._last = now
