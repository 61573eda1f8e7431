"""The study of variance: every estimator, at every batch size, on the same luck.

    jaxpg study variance --env CartPole-v1 --quick

For each batch size N a number K of independent batches of N trajectories is weighed by
every estimator; what their gradients say is `jaxpg.study.statistics`. A tabular world
gives the exact gradient; elsewhere the reference is a very large batch of trajectories
that no estimator sees.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpg.study.bench import (
    Bench,
    make_bench,
    make_subject,
    reference_of,
    seconds_of,
)
from jaxpg.study.laws import (
    exact_leave_one_out_law,
    exact_term_law,
    fit_slope,
    has_independent_terms,
    is_proved_unbiased,
    law_of,
    pooled_errors,
)
from jaxpg.study.measure import Contender, measure_batches, why_not
from jaxpg.study.progress import StudyProgress
from jaxpg.study.settings import VarianceConfig
from jaxpg.study.statistics import (
    Reference,
    compare_bias,
    compare_variance,
    summarize,
)
from jaxpg.study.store import default_folder, open_store
from jaxpg.study.subjects import Subject

__all__ = ["StudyResult", "study_variance"]

BYTES_OF_GRADIENTS = 2**29

BASE = "reward-to-go/none"
"""What variances are relative to, where it takes part."""


class StudyResult(NamedTuple):
    """What a study left behind.

    Attributes:
        folder: everything it wrote.
        rows: one per estimator and batch size, or per curve.
        summary: what was found, by estimator.
        notes: what was left out, and why.
    """

    folder: Path
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    notes: list[str]


def study_variance(
    config: VarianceConfig | None = None,
    *,
    subject: Subject | None = None,
    show: bool = True,
    report: bool = True,
) -> StudyResult:
    """Measure every estimator at every batch size.

    Args:
        config: the settings; None for the defaults.
        subject: a policy in an environment of your own, in the place of `config.env`.
        show: whether to print progress.
        report: whether to draw figures and write the report.

    Returns:
        Rows, what was found, and what was left out.

    Raises:
        ValueError: if settings do not fit together.
    """
    config = VarianceConfig() if config is None else config
    subject = make_subject(config) if subject is None else subject
    label = config.env if subject.mdp is not None else subject.env.name
    folder = config.folder or default_folder("variance", label)
    store, changes = open_store(folder, "variance", config)
    bench = make_bench(config, subject)
    subject = bench.subject
    notes = [*(f"resumed: {change}" for change in changes), *bench.notes]
    sizes = sorted(set(config.batch_sizes))
    total = sum(n * _num_batches(config, bench, n) for n in sizes)
    total += 0 if bench.is_exact else config.reference_trajectories
    rows: list[dict[str, Any]] = []
    costs: list[tuple[float, int]] = []
    with StudyProgress(show, total, "variance") as progress:
        reference = reference_of(bench, config, store, progress)
        notes += _of_reference(reference)
        timings = seconds_of(bench, store, progress)
        for size in sizes:
            cell = store.get(f"size-{size:07d}")
            if cell is None:
                progress.say(f"N = {size}")
                found = _cell(bench, config, reference, size, progress)
                cell = store.put(f"size-{size:07d}", found)
            else:
                progress.skip(size * _num_batches(config, bench, size))
            costs.append((cell["seconds"], cell["peak_bytes"]))
            notes += [note for note in cell["notes"] if note not in notes]
            rows += [_with_seconds(row, timings) for row in cell["rows"]]
    summary = _summaries(bench, reference, rows, timings)
    facts = {
        "label": subject.label,
        "parameters": subject.num_parameters,
        "reference": {
            "exact": bench.is_exact,
            "trajectories": reference.trajectories,
            "norm": float(np.sqrt(max(reference.norm_sq, 0.0))),
            "relative_error": float(
                np.sqrt(reference.error_sq / reference.norm_sq)
                if reference.is_seen
                else 1.0
            ),
        },
        "trajectories": bench.statistics(store),
        "seconds": sum(seconds for seconds, _ in costs),
        "peak_bytes": max(peak for _, peak in costs),
        "behaviour_kl": config.behaviour_kl,
    }
    results = {"facts": facts, "summary": summary, "notes": notes}
    store.finish(results, rows)
    if report:
        from jaxpg.study.report import write_variance_report

        write_variance_report(folder)
    return StudyResult(folder, rows, summary, notes)


def _num_batches(config: VarianceConfig, bench: Bench, size: int) -> int:
    """K: as many as there are, as the settings allow, and as memory does."""
    entries = len(bench.contenders) * bench.subject.num_parameters
    fits = max(8, BYTES_OF_GRADIENTS // (4 * entries))
    return max(1, min(config.num_trajectories // size, config.max_batches, fits))


def _cell(
    bench: Bench,
    config: VarianceConfig,
    reference: Reference,
    size: int,
    progress: StudyProgress,
) -> dict[str, Any]:
    """All estimators at one batch size."""
    rows, notes, began = [], [], time.monotonic()
    count = _num_batches(config, bench, size)
    for off, sampler in bench.samplers.items():
        able = []
        for contender in bench.group(off):
            reason = why_not(contender, size, bench.chunk_size)
            if reason is None:
                able.append(contender)
            else:
                notes.append(reason)
        if not able:
            continue
        share = 1.0 / len(bench.samplers)
        measured = measure_batches(
            able,
            bench.subject,
            sampler,
            bench.placement,
            size,
            count,
            lambda n, share=share: progress.advance(share * n),  # type: ignore[misc]
            kept=bench.kept,
        )
        for contender in able:
            found = summarize(
                measured.gradients[contender.name],
                size,
                reference,
                bench.subject.blocks(),
                config.seed,
            )
            row = {"estimator": contender.name, "batch_size": size, **found}
            row |= _compared(able, contender, measured.gradients, reference, config)
            if off:
                row["ess"] = float(np.mean(measured.ess[contender.name]))
            rows.append(row)
    return {
        "rows": rows,
        "notes": notes,
        "seconds": time.monotonic() - began,
        "peak_bytes": peak_bytes(),
    }


def _of_reference(reference: Reference) -> list[str]:
    """What must be known of the reference before anything relative to it is read."""
    cure = "; give more --reference-trajectories"
    if not reference.is_seen:
        return [
            "the reference batch does not show any gradient over its own error, so "
            f"nothing is told relative to it{cure}"
        ]
    error = np.sqrt(reference.error_sq / reference.norm_sq)
    if error < 0.1:
        return []
    return [f"the reference's own error is {100 * error:.0f}% of the gradient{cure}"]


def peak_bytes() -> int:
    """The most memory that this process has held, imports and compiling included."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _compared(
    able: list[Contender],
    contender: Contender,
    gradients: dict[str, np.ndarray],
    reference: Reference,
    config: VarianceConfig,
) -> dict[str, Any]:
    """Beside the others, batch by batch."""
    own = gradients[contender.name]
    base = BASE if BASE in gradients else able[0].name
    found = compare_variance(own, gradients[base], config.seed)
    proved = [c.name for c in able if is_proved_unbiased(c.estimator.config)]
    others = [gradients[name] for name in proved if contender.name not in proved]
    return {"base": base, **found, **compare_bias(own, others, reference)}


def _with_seconds(row: dict[str, Any], timings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one gradient, sampling included, and variance times seconds."""
    sampling = timings["sampling_off_policy" if "ess" in row else "sampling"]
    own = timings["gradient"][row["estimator"]]
    seconds = row["batch_size"] * (sampling + own)
    variance = row["variance"]
    product = None if variance is None else variance * seconds
    return {**row, "seconds": seconds, "variance_times_seconds": product}


def _summaries(
    bench: Bench, reference: Reference, rows: list[dict[str, Any]], timings: Any
) -> list[dict[str, Any]]:
    """What is found of each estimator over all sizes."""
    return [
        _summary(bench, reference, contender, rows, timings)
        for contender in bench.contenders
    ]


def _summary(
    bench: Bench,
    reference: Reference,
    contender: Contender,
    rows: list[dict[str, Any]],
    timings: Any,
) -> dict[str, Any]:
    mine = [row for row in rows if row["estimator"] == contender.name]
    config = contender.estimator.config
    sizes, variances, errors, batches = (
        [row.get(name) for row in mine]
        for name in ("batch_size", "variance", "variance_error", "batches")
    )
    errors = pooled_errors(variances, errors, batches)
    slope = fit_slope(sizes, variances, errors)
    law = law_of(config, sizes, variances, errors)
    oracle = _oracle_law(bench, contender)
    best = oracle or law
    return {
        "estimator": contender.name,
        "independent_terms": has_independent_terms(config),
        "proved_unbiased": is_proved_unbiased(config),
        "slope": None if slope is None else slope.value,
        "slope_error": None if slope is None else slope.error,
        "law": None if law is None else law._asdict(),
        "exact_law": None if oracle is None else oracle._asdict(),
        "critical_batch_size": None
        if best is None
        else best.critical_batch_size(reference.scale),
        "seconds_per_trajectory": timings["gradient"][contender.name],
        "sampling_seconds_per_trajectory": timings[
            "sampling_off_policy" if contender.is_off_policy else "sampling"
        ],
    }


def _oracle_law(bench: Bench, contender: Contender) -> Any:
    """The exact law where the world is small and the law is known."""
    config = contender.estimator.config
    mdp = bench.subject.mdp
    if mdp is None or mdp.horizon > 4:
        return None
    if has_independent_terms(config):
        return exact_term_law(bench.subject, contender.estimator, contender.state)
    undiscounted = config.credit.discount == 1.0 and config.credit.ratio == "none"
    if config.baseline in ("leave-one-out", "batch-mean") and undiscounted:
        return exact_leave_one_out_law(bench.subject, contender.estimator)
    return None
