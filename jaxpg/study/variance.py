"""The study of variance: every estimator, at every batch size, on the same luck.

    jaxpg study variance --env CartPole-v1 --quick

For each batch size N a number K of independent batches of N trajectories is weighed by
every estimator; what their gradients say is `jaxpg.study.statistics`. A tabular world
gives the exact gradient; elsewhere the reference is a very large batch of trajectories
that no estimator sees.
"""

import dataclasses
import statistics as plain
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg import exact
from jaxpg._checks import check_positive, check_range
from jaxpg.study.laws import (
    exact_leave_one_out_law,
    exact_term_law,
    fit_slope,
    has_independent_terms,
    law_of,
)
from jaxpg.study.measure import (
    Contender,
    fit_contenders,
    gradient_seconds,
    keys_of,
    make_contenders,
    measure_batches,
    why_not,
)
from jaxpg.study.naming import expand_names, parse_estimator
from jaxpg.study.progress import StudyProgress
from jaxpg.study.sampling import Sampler
from jaxpg.study.statistics import (
    Reference,
    exact_reference,
    sampled_reference,
    summarize,
)
from jaxpg.study.store import Store, default_folder, open_store
from jaxpg.study.subjects import (
    Subject,
    drifted,
    fresh_subject,
    from_checkpoint,
)
from jaxpg.train.config import PolicyConfig
from jaxpg.train.sharding import Placement, place

__all__ = [
    "StudyResult",
    "VarianceConfig",
    "make_subject",
    "quick_variance",
    "study_variance",
]

ANCHOR = "reward-to-go/time-dependent"
"""Unbiased, and of little variance: what the reference batch is weighed by."""

REFERENCE_PARTS = 32
BYTES_OF_GRADIENTS = 2**29


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceConfig:
    """Settings of the study of variance."""

    env: str = "CartPole-v1"
    """Environment (`jaxpg list envs`), or a tabular world with an exact gradient: mine,
    dark-mine, random-SEED, chain-HORIZON."""
    checkpoint: Path | None = None
    """Folder of a run whose policy is studied; unset: an untrained one."""
    update: str = "latest"
    """Which checkpoint of the run: latest, best, or an update's number."""
    member: int = 0
    """Which of the run's seeds or swept settings."""
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    """Networks of an untrained policy."""
    max_steps: int | None = None
    """Truncate episodes after this many decisions."""
    estimators: tuple[str, ...] = ("default",)
    """Names CREDIT/BASELINE/RATIO, parts of which may be left out, such as
    leave-one-out or causal; or groups: default, all, ratios."""
    batch_sizes: tuple[int, ...] = tuple(2**k for k in range(4, 17))
    """Trajectories in a batch; powers of two."""
    num_trajectories: int = 2**16
    """Trajectories that are sampled, and shared by all: at size N they make
    num_trajectories / N independent batches, but at most max_batches."""
    max_batches: int = 256
    """The most batches that are weighed at one size."""
    reference_trajectories: int = 2**16
    """Trajectories of the reference gradient, where no exact one is known."""
    discount: float = 1.0
    """Of the objective, in [0, 1]."""
    behaviour_kl: float | None = None
    """KL(mu || pi) per decision, in nats, of a behaviour policy mu that acts for
    estimators with ratios. Unset: there is none."""
    seed: int = 0
    """Random seed of everything."""
    chunk_size: int = 256
    """Trajectories that are held at once; a power of two. Sets memory, not results."""
    num_devices: int | None = None
    """Devices that share the trajectories, 1 or 2. Unset: 2 where there are."""
    memory_gib: float = 2.0
    """Trajectories are kept up to this, and played again beyond it."""
    folder: Path | None = None
    """Where the study is kept. Unset: studies/KIND-ENVIRONMENT-TIME."""

    def __post_init__(self) -> None:
        for name in ("num_trajectories", "max_batches", "reference_trajectories"):
            check_positive(name, getattr(self, name))
        for name, value in (
            ("chunk_size", self.chunk_size),
            *(("batch_sizes", size) for size in self.batch_sizes),
        ):
            _check_power_of_two(name, value)
        if not self.batch_sizes:
            raise ValueError("batch_sizes is empty, needs at least one; such as 16 64")
        check_range("discount", self.discount, 0.0, 1.0)
        if self.behaviour_kl is not None:
            check_range("behaviour_kl", self.behaviour_kl, 0.0, open_low=True)
        if max(self.batch_sizes) > self.num_trajectories:
            raise ValueError(
                f"batch_sizes go up to {max(self.batch_sizes)}, but num_trajectories is "
                f"{self.num_trajectories}; sample as many, better 8 times as many"
            )
        expand_names(self.estimators)


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


def quick_variance(**changes: Any) -> VarianceConfig:
    """Settings that finish within two minutes on two cores.

    Args:
        **changes: settings that differ from that.
    """
    small: dict[str, Any] = {
        "batch_sizes": (16, 32, 64, 128, 256, 512),
        "num_trajectories": 2**13,
        "max_batches": 128,
        "reference_trajectories": 2**13,
        "chunk_size": 128,
        "estimators": (
            "total-return",
            "reward-to-go",
            "batch-mean",
            "leave-one-out",
            "time-dependent",
            "optimal",
        ),
    }
    return VarianceConfig(**(small | changes))


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
    notes = [*(f"resumed: {change}" for change in changes), *bench.notes]
    sizes = sorted(set(config.batch_sizes))
    total = sum(n * _num_batches(config, bench, n) for n in sizes)
    total += 0 if bench.is_exact else config.reference_trajectories
    rows: list[dict[str, Any]] = []
    with StudyProgress(show, total, "variance") as progress:
        reference = _reference(bench, config, store, progress)
        timings = _timings(bench, store, progress)
        for size in sizes:
            cell = store.get(f"size-{size:07d}")
            if cell is None:
                progress.say(f"N = {size}")
                found = _cell(bench, config, reference, size, progress)
                cell = store.put(f"size-{size:07d}", found)
            else:
                progress.skip(size * _num_batches(config, bench, size))
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
                np.sqrt(reference.error_sq / max(reference.norm_sq, 1e-300))
            ),
        },
        "trajectories": bench.statistics(store),
        "behaviour_kl": config.behaviour_kl,
    }
    results = {"facts": facts, "summary": summary, "notes": notes}
    store.finish(results, rows)
    if report:
        from jaxpg.study.report import write_variance_report

        write_variance_report(folder)
    return StudyResult(folder, rows, summary, notes)


class Bench(NamedTuple):
    """Everything that measures.

    Attributes:
        subject: the policy and its world.
        contenders: the estimators.
        placement: devices.
        samplers: of pi's own trajectories (False) and of mu's (True).
        reference: sampler of the reference's trajectories.
        chunk_size: trajectories that one device holds.
        notes: what was left out, and why.
        discount: of the objective.
    """

    subject: Subject
    contenders: list[Contender]
    placement: Placement
    samplers: dict[bool, Sampler]
    reference: Sampler
    chunk_size: int
    notes: list[str]
    discount: float

    @property
    def is_exact(self) -> bool:
        """Whether the true gradient is known."""
        return self.subject.mdp is not None

    def group(self, off_policy: bool) -> list[Contender]:
        """Estimators that look at the same trajectories."""
        return [c for c in self.contenders if c.is_off_policy == off_policy]

    def statistics(self, store: Store) -> Any:
        """What the trajectories were like; kept, for a resumed study samples none."""
        kept = store.get("trajectories") or {}
        now = {
            "behaviour" if off else "own": sampler.statistics()
            for off, sampler in self.samplers.items()
            if sampler.seen
        }
        for who, found in now.items():
            if found["trajectories"] >= kept.get(who, {}).get("trajectories", 0):
                kept[who] = found
        return store.put("trajectories", kept)


def make_subject(config: Any) -> Subject:
    """The subject that the settings name, with its behaviour policy if they ask for one.

    Args:
        config: settings of a study.

    Raises:
        ValueError: if there is no such environment, run or checkpoint.
    """
    if config.checkpoint is not None:
        subject = from_checkpoint(
            config.checkpoint,
            update=config.update,
            member=config.member,
            max_steps=config.max_steps,
        )
    else:
        subject = fresh_subject(
            config.env,
            seed=config.seed,
            policy=config.policy,
            max_steps=config.max_steps,
        )
    if config.behaviour_kl is None:
        return subject
    return drifted(subject, config.behaviour_kl, keys_of(config.seed)[3])


def make_bench(config: VarianceConfig, subject: Subject) -> Bench:
    """Samplers and estimators; those that cannot take part are named in the notes.

    Args:
        config: settings of the study.
        subject: the policy and its world.

    Raises:
        ValueError: if no estimator is left.
    """
    names, notes = list(expand_names(config.estimators)), []
    configs = {name: parse_estimator(name, config.discount) for name in names}
    if subject.behaviour is None:
        for name in names:
            ratio = configs[name].credit.ratio
            if ratio != "none":
                notes.append(
                    f"{name} was left out: ratio {ratio!r} weighs what a behaviour "
                    "policy did, and none acts; give --behaviour-kl"
                )
                del configs[name]
    if not configs:
        raise ValueError(f"no estimator is left to study: {'; '.join(notes)}")
    num_devices = min(2, jax.device_count())
    placement = place(config.num_devices or num_devices)
    per_device = max(1, config.chunk_size // placement.num_devices)
    key_rows, key_reference, key_fit, _, _ = keys_of(config.seed)
    memory = int(config.memory_gib * 2**30)

    def sampler(acting: Any, key: Any, memory: int) -> Sampler:
        return Sampler(subject, acting, key, config.chunk_size, placement, memory)

    contenders = make_contenders(subject, configs)
    needed = {c.is_off_policy for c in contenders}
    samplers = {
        off: sampler(
            subject.behaviour if off else subject.params,
            key_rows,
            memory // len(needed),
        )
        for off in sorted(needed)
    }
    contenders = fit_contenders(contenders, subject, sampler(subject.params, key_fit, 0))
    return Bench(
        subject,
        contenders,
        placement,
        samplers,
        sampler(subject.params, key_reference, 0),
        per_device,
        notes,
        config.discount,
    )


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
    rows, notes = [], []
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
            if off:
                row["ess"] = float(np.mean(measured.ess[contender.name]))
            rows.append(row)
    return {"rows": rows, "notes": notes}


def _reference(
    bench: Bench, config: VarianceConfig, store: Store, progress: StudyProgress
) -> Reference:
    """The exact gradient, or the mean over a very large batch."""
    subject = bench.subject
    if subject.mdp is not None:
        gradient = exact.policy_gradient(
            subject.mdp, subject.policy, subject.params, config.discount
        )
        return exact_reference(ravel_pytree(gradient)[0])
    kept = store.get("reference")
    if kept is not None:
        progress.skip(config.reference_trajectories)
        return Reference(
            np.array(kept["gradient"]),
            kept["error_sq"],
            kept["along_error"],
            kept["trajectories"],
        )
    if config.reference_trajectories < 8 * config.chunk_size:
        raise ValueError(
            f"reference_trajectories is {config.reference_trajectories}, needs at least "
            f"8 chunks = {8 * config.chunk_size}, to know its own error; sample more, "
            "or take a smaller --chunk-size"
        )
    progress.say(f"reference of {config.reference_trajectories} trajectories")
    anchor = make_contenders(subject, {ANCHOR: parse_estimator(ANCHOR, config.discount)})
    size = bench.chunk_size
    count = config.reference_trajectories // size
    parts = _means_of(anchor, bench, size, count, progress)
    found = sampled_reference(parts, count * size)
    kept = found._asdict() | {"gradient": found.gradient.tolist()}
    store.put("reference", kept)
    return found


def _means_of(
    anchor: list[Contender],
    bench: Bench,
    size: int,
    count: int,
    progress: StudyProgress,
) -> np.ndarray:
    """Means of equal parts of a very large batch, [parts, D], in little memory."""
    return measure_batches(
        anchor,
        bench.subject,
        bench.reference,
        bench.placement,
        size,
        count,
        progress.advance,
        parts=REFERENCE_PARTS,
    ).gradients[ANCHOR]


def _timings(bench: Bench, store: Store, progress: StudyProgress) -> dict[str, Any]:
    """Seconds per trajectory of sampling, and of each estimator's gradient."""
    kept = store.get("timings")
    if kept is not None:
        return kept
    progress.say("seconds of each estimator")
    found: dict[str, Any] = {"gradient": {}}
    runs: dict[str, Any] = {}
    for off, sampler in bench.samplers.items():
        rows = sampler.rows(0)
        number = sampler.chunk_size
        runs |= {
            c.name: gradient_seconds(c, bench.subject, rows) for c in bench.group(off)
        }
        began = time.perf_counter()
        jax.block_until_ready(sampler.again(0))
        found["sampling_off_policy" if off else "sampling"] = (
            time.perf_counter() - began
        ) / number
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    found["gradient"] = {
        name: plain.median(each) / number for name, each in seconds.items()
    }
    return store.put("timings", found)


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
    sizes, variances, errors = (
        [row.get(name) for row in mine]
        for name in ("batch_size", "variance", "variance_error")
    )
    slope = fit_slope(sizes, variances, errors)
    law = law_of(config, sizes, variances, errors)
    oracle = _oracle_law(bench, contender)
    best = oracle or law
    return {
        "estimator": contender.name,
        "independent_terms": has_independent_terms(config),
        "slope": None if slope is None else slope.value,
        "slope_error": None if slope is None else slope.error,
        "law": None if law is None else law._asdict(),
        "exact_law": None if oracle is None else oracle._asdict(),
        "critical_batch_size": None
        if best is None
        else best.critical_batch_size(reference.norm_sq),
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


def _check_power_of_two(name: str, value: int) -> None:
    check_positive(name, value)
    if value & (value - 1):
        below = 1 << (value.bit_length() - 1)
        raise ValueError(
            f"{name} holds {value}, needs powers of two, so that batches fill chunks; "
            f"the nearest are {below} and {2 * below}"
        )

