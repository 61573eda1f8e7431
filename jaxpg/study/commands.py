"""The studies as commands: options, what is printed at the end, resuming."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxpg.study.batch_size import study_batch_size
from jaxpg.study.learning import study_learning
from jaxpg.study.off_policy import study_off_policy
from jaxpg.study.report import variance_findings
from jaxpg.study.reports import (
    batch_size_findings,
    batch_size_table,
    learning_findings,
    learning_table,
    off_policy_findings,
    off_policy_table,
)
from jaxpg.study.settings import (
    BatchSizeConfig,
    LearningConfig,
    OffPolicyConfig,
    VarianceConfig,
    quick_batch_size,
    quick_learning,
    quick_off_policy,
    quick_variance,
)
from jaxpg.study.store import default_folder, read_settings
from jaxpg.study.subjects import usual_policy
from jaxpg.study.tables import brief, show, variance_table
from jaxpg.study.variance import StudyResult, study_variance
from jaxpg.train.provenance import read_json

__all__ = ["STUDIES", "StudyCommand", "defaults_of", "run_study"]


class StudyCommand(NamedTuple):
    """One study on the command line.

    Attributes:
        summary: what it is, in a line.
        settings: the frozen dataclass of its settings.
        quick: settings that finish within two minutes.
        run: `run(settings) -> StudyResult`.
        show: prints what was found.
    """

    summary: str
    settings: type
    quick: Callable[..., Any]
    run: Callable[[Any], StudyResult]
    show: Callable[[StudyResult], None]


def show_variance(result: StudyResult) -> None:
    """Print the table and the findings of a study of variance."""
    results = read_json(result.folder / "results.json")
    lines = variance_table(result.rows, result.summary)
    show(results["facts"]["label"], brief(lines))
    for line in variance_findings(results):
        print(f"- {line}")


def show_off_policy(result: StudyResult) -> None:
    """Print the table and the findings of a study of ratios."""
    results = read_json(result.folder / "results.json")
    show(f"{results['facts']['label']}, longest horizon", off_policy_table(result.rows))
    for line in off_policy_findings(results):
        print(f"- {line}")


def show_learning(result: StudyResult) -> None:
    """Print the table and the findings of a study of learning."""
    results = read_json(result.folder / "results.json")
    show(results["facts"]["label"], learning_table(result.rows))
    for line in learning_findings(results):
        print(f"- {line}")


def show_batch_size(result: StudyResult) -> None:
    """Print the table and the findings of a study of batch sizes."""
    results = read_json(result.folder / "results.json")
    show(results["facts"]["label"], batch_size_table(result.rows))
    for line in batch_size_findings(results):
        print(f"- {line}")


STUDIES: dict[str, StudyCommand] = {
    "variance": StudyCommand(
        "bias, variance, SNR, noise scale and cost of estimators x batch sizes",
        VarianceConfig,
        quick_variance,
        study_variance,
        show_variance,
    ),
    "off-policy": StudyCommand(
        "bias and variance of importance ratios as KL and horizon grow",
        OffPolicyConfig,
        quick_off_policy,
        study_off_policy,
        show_off_policy,
    ),
    "learning": StudyCommand(
        "learning curves of estimators x batch sizes x step sizes, over seeds",
        LearningConfig,
        quick_learning,
        study_learning,
        show_learning,
    ),
    "batch-size": StudyCommand(
        "time to a target return against batch size, beside the noise scale",
        BatchSizeConfig,
        quick_batch_size,
        study_batch_size,
        show_batch_size,
    ),
}
"""Studies by name."""


def defaults_of(name: str, env: str | None, quick: bool) -> Any:
    """Settings that the command line starts from.

    Args:
        name: of the study.
        env: the environment that is asked for; None for the study's own.
        quick: whether it must finish within two minutes.
    """
    command = STUDIES[name]
    given: dict[str, Any] = {} if env is None else {"env": env}
    settings = command.quick(**given) if quick else command.settings(**given)
    if not hasattr(settings, "policy"):
        return settings
    policy = usual_policy(settings.env)
    return dataclasses.replace(settings, policy=policy)


def run_study(name: str, settings: Any, resume: Path | None = None) -> int:
    """Run a study, or finish one, and say where it lies.

    Args:
        name: of the study.
        settings: its settings; not read where one is resumed.
        resume: folder of a study that was begun.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: with the command that goes on with the study.
    """
    command = STUDIES[name]
    if resume is not None:
        settings = read_settings(resume, name, command.settings)
        settings = dataclasses.replace(settings, folder=resume)
    folder = settings.folder or default_folder(name, settings.env)
    print(f"study folder: {folder}", flush=True)
    try:
        result = command.run(dataclasses.replace(settings, folder=folder))
    except KeyboardInterrupt:
        cure = f"jaxpg study {name} --resume {folder}"
        raise KeyboardInterrupt(f"interrupted; go on with: {cure}") from None
    command.show(result)
    for note in result.notes:
        print(f"note: {note}")
    print(f"report: {result.folder / 'report.html'}")
    return 0
