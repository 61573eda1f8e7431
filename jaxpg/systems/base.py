"""A system: something trained by the score function that lives in no environment.

    init(key) -> state      update(key, state) -> (state, info)
    evaluate(key, state) -> numbers      picture(state, path)

What the next update needs is state, what a person wants to see is info. The data are
closed over, so all but `picture` is pure and can be compiled and vmapped over seeds.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array

from jaxpg._checks import check_positive
from jaxpg.types import PRNGKey, PyTree

__all__ = ["Recipe", "RunSettings", "System"]


class System(NamedTuple):
    """Something to train, as pure functions of one seed.

    Attributes:
        init: `init(key) -> state`, a tree of arrays that holds all that a resumed run
            needs, optimiser included.
        update: `update(key, state) -> (state, info)`, info of scalars by name.
        evaluate: `evaluate(key, state) -> scalars by name`, on data that `update`
            never sees.
        picture: `picture(state, path)` draws what one seed has learned into a PNG; None
            where there is nothing to show.
        headline: the scalar of `evaluate` that the learning curve shows.
    """

    init: Callable[[PRNGKey], PyTree]
    update: Callable[[PRNGKey, PyTree], tuple[PyTree, dict[str, Array]]]
    evaluate: Callable[[PRNGKey, PyTree], dict[str, Array]]
    picture: Callable[[PyTree, Path], None] | None
    headline: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run that do not depend on the system."""

    seed: int = 0
    """First random seed."""
    num_seeds: int = 1
    """Seeds that are trained side by side in one program: seed, seed + 1, ..."""
    num_updates: int = 1000
    """Updates to make."""
    evaluate_every: int = 250
    """Updates between evaluations; there is always one at the end."""
    checkpoint_every: int = 250
    """Updates between checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints stay."""
    runs_dir: Path = Path("runs")
    """Folder that runs are kept in."""
    name: str | None = None
    """Folder of this run in there. Unset: system, seed and time."""

    def __post_init__(self) -> None:
        for name in (
            "num_seeds",
            "num_updates",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            check_positive(name, getattr(self, name))

    def members(self) -> list[dict[str, float]]:
        """Each member's seed, in the order of the leading axis."""
        return [{"seed": self.seed + s} for s in range(self.num_seeds)]


class Recipe(NamedTuple):
    """One kind of system.

    Attributes:
        summary: what it is, in a line.
        settings: its frozen dataclass of numbers, words, tuples and paths.
        make: `make(settings) -> System`; reads the data.
        run: how it is trained where nothing else is asked for.
    """

    summary: str
    settings: type
    make: Callable[[Any], System]
    run: RunSettings
