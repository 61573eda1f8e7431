r"""The study of ratios: the behaviour policy drifts away, and the horizon grows.

    jaxpg study off-policy --quick

Every form of importance ratios at every KL(mu || pi) per decision and every horizon:
its variance and its bias. On a tabular world three things stand beside what is
measured, all exact: the second moment of the trajectory's weight, E_mu[W^2], and the
rate at which it grows per decision (`jaxpg.exact.weights`), and the bias of forms that
drop ratios, which is that of another mixture of states and values
(`jaxpg.exact.mixed_gradient`).
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpg import exact
from jaxpg.credit import CreditConfig
from jaxpg.estimators import EstimatorConfig
from jaxpg.study.bench import Bench, make_bench, reference_of
from jaxpg.study.measure import Contender, keys_of, measure_batches, why_not
from jaxpg.study.naming import estimator_name, expand_names, parse_estimator
from jaxpg.study.progress import StudyProgress
from jaxpg.study.settings import OffPolicyConfig
from jaxpg.study.statistics import Reference, summarize
from jaxpg.study.store import Store, default_folder, open_store
from jaxpg.study.subjects import (
    Subject,
    drifted,
    fresh_subject,
    from_checkpoint,
    mean_kl_of,
)
from jaxpg.study.variance import StudyResult, peak_bytes

__all__ = ["study_off_policy"]

LIMITS = {
    "future-dropped": ("target", "behaviour"),
    "past-dropped": ("behaviour", "target"),
    "past-dropped-whole": ("behaviour", "target"),
    "first-order": ("behaviour", "behaviour"),
}
"""Whose states and whose values each form has in the limit."""


def study_off_policy(
    config: OffPolicyConfig | None = None, *, show: bool = True, report: bool = True
) -> StudyResult:
    """Measure every form of ratios at every KL and every horizon.

    Args:
        config: the settings; None for the defaults.
        show: whether to print progress.
        report: whether to draw figures and write the report.

    Returns:
        One row per form, KL and horizon; what was left out.

    Raises:
        ValueError: if settings do not fit together.
    """
    config = OffPolicyConfig() if config is None else config
    _check_ratios(config)
    folder = config.folder or default_folder("off-policy", config.env)
    store, changes = open_store(folder, "off-policy", config)
    notes = [f"resumed: {change}" for change in changes]
    cells = [(horizon, kl) for horizon in config.horizons for kl in config.kls]
    rows: list[dict[str, Any]] = []
    label = ""
    with StudyProgress(show, len(cells), "off-policy") as progress:
        for horizon, kl in cells:
            name = f"horizon-{horizon:05d}-kl-{kl:g}"
            cell = store.get(name)
            if cell is None:
                progress.say(f"horizon {horizon}, KL {kl:g}")
                cell = store.put(name, _cell(config, store, horizon, kl, progress))
                progress.advance(1)
            else:
                progress.skip(1)
            label = cell["label"]
            notes += [note for note in cell["notes"] if note not in notes]
            rows += cell["rows"]
    facts = {"label": label, "batch_size": config.batch_size}
    store.finish({"facts": facts, "summary": [], "notes": notes}, rows)
    if report:
        from jaxpg.study.reports import write_off_policy_report

        write_off_policy_report(folder)
    return StudyResult(folder, rows, [], notes)


def _cell(
    config: OffPolicyConfig,
    store: Store,
    horizon: int,
    kl: float,
    progress: StudyProgress,
) -> dict[str, Any]:
    """All forms at one horizon and KL."""
    began = time.monotonic()
    subject = drifted(_subject(config, horizon), kl, keys_of(config.seed)[3])
    bench = make_bench(_with_own(config), subject)
    quiet = StudyProgress(False, 1.0, "")
    reference = reference_of(bench, config, store, quiet, f"reference-{horizon:05d}")
    notes = list(bench.notes)
    able = []
    for contender in bench.group(True):
        reason = why_not(contender, config.batch_size, bench.chunk_size)
        if reason is None:
            able.append(contender)
        else:
            notes.append(reason)
    measured, own = (
        measure_batches(
            some,
            bench.subject,
            bench.samplers[off],
            bench.placement,
            config.batch_size,
            config.num_trajectories // config.batch_size,
        )
        for off, some in ((True, able), (False, bench.group(False)))
    )
    world = _of_world(bench, horizon, kl, keys_of(config.seed)[4])
    rows = []
    for contender in able:
        cell = summarize(
            measured.gradients[contender.name],
            config.batch_size,
            reference,
            bench.subject.blocks(),
            config.seed,
        )
        tamed = contender.divides or contender.estimator.config.credit.max_rho
        counterpart = own.gradients[_own_name(contender.name)]
        limit = None if tamed else _limit(bench, contender, reference)
        rows.append(
            {
                "estimator": contender.name,
                "batch_size": config.batch_size,
                **world,
                **cell,
                "ess": float(np.mean(measured.ess[contender.name])),
                "on_policy_variance": float(counterpart.var(axis=0, ddof=1).sum()),
                **_biases(limit, reference),
            }
        )
    progress.say(f"horizon {horizon}, KL {kl:g}")
    return {
        "label": subject.label,
        "rows": rows,
        "notes": notes,
        "seconds": time.monotonic() - began,
        "peak_bytes": peak_bytes(),
    }


def _subject(config: OffPolicyConfig, horizon: int) -> Subject:
    """The same world and policy with another horizon."""
    if config.checkpoint is not None:
        return from_checkpoint(
            config.checkpoint,
            update=config.update,
            member=config.member,
            max_steps=horizon,
        )
    env = f"chain-{horizon}" if config.env == "chain" else config.env
    subject = fresh_subject(
        env, seed=config.seed, policy=config.policy, max_steps=horizon
    )
    return subject._replace(label=config.env) if subject.mdp else subject


def _of_world(bench: Bench, horizon: int, kl: float, key: Any) -> dict[str, Any]:
    """The drift as it is, and what theory says of the weights."""
    subject = bench.subject
    found = {
        "horizon": horizon,
        "kl": kl,
        "kl_measured": float(jax.jit(mean_kl_of(subject, key))(subject.behaviour)),
        "weight_second_moment": None,
        "growth_rate": None,
    }
    if subject.mdp is None:
        return found
    mdp, policy, pi, mu = subject.mdp, subject.policy, subject.params, subject.behaviour
    moment = float(exact.weight_second_moments(mdp, policy, pi, mu)[-1])
    return found | {
        "weight_second_moment": moment if np.isfinite(moment) else None,
        "growth_rate": float(exact.weight_growth_rate(mdp, policy, pi, mu)),
    }


def _limit(
    bench: Bench, contender: Contender, reference: Reference
) -> np.ndarray | None:
    """What a form has for its mean, exactly; None where the world has no tables."""
    subject = bench.subject
    if subject.mdp is None:
        return None
    ratio = contender.estimator.config.credit.ratio
    if ratio not in LIMITS:
        return reference.gradient
    assert subject.behaviour is not None
    who = {"target": subject.params, "behaviour": subject.behaviour}
    states, values = (who[name] for name in LIMITS[ratio])
    limit = exact.mixed_gradient(
        subject.mdp, subject.policy, subject.params, states, values, 1.0
    )
    return np.asarray(ravel_pytree(limit)[0], np.float64)


def _biases(limit: np.ndarray | None, reference: Reference) -> dict[str, float | None]:
    """Along the gradient, and as a whole; relative to the gradient's length."""
    if limit is None:
        return {"exact_bias": None, "exact_bias_norm": None}
    off = limit - reference.gradient
    return {
        "exact_bias": float(off @ reference.gradient / reference.norm_sq),
        "exact_bias_norm": float(np.sqrt(off @ off / reference.norm_sq)),
    }


def _with_own(config: OffPolicyConfig) -> OffPolicyConfig:
    """The same study with each form's counterpart on policy."""
    names = expand_names(config.estimators)
    own = tuple(dict.fromkeys(_own_name(name) for name in names))
    return dataclasses.replace(config, estimators=(*names, *own))


def _own_name(name: str) -> str:
    """The estimator without ratios that a form becomes on policy."""
    config = parse_estimator(name)
    return estimator_name(
        EstimatorConfig(
            credit=CreditConfig(credit=config.credit.credit), baseline=config.baseline
        )
    )


def _check_ratios(config: OffPolicyConfig) -> None:
    without = [
        name
        for name in expand_names(config.estimators)
        if parse_estimator(name).credit.ratio == "none"
    ]
    if without:
        raise ValueError(
            f"estimators hold {', '.join(without)}, needs names with a ratio, such as "
            "causal or first-order, for another policy acts; take them out"
        )
