"""The bench of a study: subject, estimators, trajectories, reference and clock."""

import functools
import statistics as plain
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg import exact
from jaxpg.study.measure import (
    Contender,
    Kept,
    fit_contenders,
    gradient_seconds,
    keys_of,
    make_contenders,
    measure_batches,
)
from jaxpg.study.naming import expand_names, parse_estimator
from jaxpg.study.progress import StudyProgress
from jaxpg.study.sampling import Sampler
from jaxpg.study.statistics import Reference, exact_reference, sampled_reference
from jaxpg.study.store import Store
from jaxpg.study.subjects import Subject, drifted, fresh_subject, from_checkpoint
from jaxpg.train.sharding import Placement, place

__all__ = ["Bench", "make_bench", "make_subject", "reference_of", "seconds_of"]

ANCHOR = "reward-to-go/time-dependent"
"""Unbiased, and of little variance: what the reference batch is weighed by."""

REFERENCE_PARTS = 32
ROUNDS = 5


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
        kept: sums over chunks, for batches of every size.
        discount: of the objective.
    """

    subject: Subject
    contenders: list[Contender]
    placement: Placement
    samplers: dict[bool, Sampler]
    reference: Sampler
    chunk_size: int
    notes: list[str]
    kept: Kept
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
    """The subject that the settings name, with its behaviour policy if there is one.

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


def make_bench(config: Any, subject: Subject) -> Bench:
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
    subject = subject._replace(
        params=_anywhere(subject.params), behaviour=_anywhere(subject.behaviour)
    )
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
    contenders = fit_contenders(
        contenders, subject, sampler(subject.params, key_fit, 0)
    )
    return Bench(
        subject,
        contenders,
        placement,
        samplers,
        sampler(subject.params, key_reference, 0),
        per_device,
        notes,
        {},
        config.discount,
    )


def _anywhere(params: Any) -> Any:
    """The same numbers, bound to no device: a checkpoint's are bound to its own."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)


def reference_of(
    bench: Bench,
    config: Any,
    store: Store,
    progress: StudyProgress,
    name: str = "reference",
) -> Reference:
    """The exact gradient, or the mean over a very large batch."""
    subject = bench.subject
    if subject.mdp is not None:
        gradient = exact.policy_gradient(
            subject.mdp, subject.policy, subject.params, config.discount
        )
        return exact_reference(ravel_pytree(gradient)[0])
    kept = store.get(name)
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
            f"reference_trajectories is {config.reference_trajectories}, needs at "
            f"least 8 chunks = {8 * config.chunk_size}, to know its own error; sample "
            "more, or take a smaller --chunk-size"
        )
    progress.say(f"reference of {config.reference_trajectories} trajectories")
    anchor = make_contenders(
        subject, {ANCHOR: parse_estimator(ANCHOR, config.discount)}
    )
    size = bench.chunk_size
    count = config.reference_trajectories // size
    parts = _means_of(anchor, bench, size, count, progress)
    found = sampled_reference(parts, count * size)
    kept = found._asdict() | {"gradient": found.gradient.tolist()}
    store.put(name, kept)
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


def seconds_of(bench: Bench, store: Store, progress: StudyProgress) -> dict[str, Any]:
    """Seconds per trajectory of sampling, and of each estimator's gradient."""
    kept = store.get("timings")
    if kept is not None:
        return kept
    progress.say("seconds of each estimator")
    runs: dict[str, Any] = {}
    for off, sampler in bench.samplers.items():
        rows = sampler.rows(0)
        number = sampler.chunk_size
        runs |= {
            c.name: gradient_seconds(c, bench.subject, rows) for c in bench.group(off)
        }
        sampling = "sampling_off_policy" if off else "sampling"
        runs[sampling] = functools.partial(sampler.again, 0)
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    middle = {name: plain.median(each) / number for name, each in seconds.items()}
    gradients = {name: x for name, x in middle.items() if "/" in name}
    found = {name: x for name, x in middle.items() if "/" not in name}
    return store.put("timings", found | {"gradient": gradients})
