"""Reports of the studies of ratios, of learning and of batch sizes."""

import math
from pathlib import Path
from typing import Any

from jaxpg.study import ratio_figures
from jaxpg.study.report import Page, write_page
from jaxpg.study.tables import number, percent
from jaxpg.train.provenance import read_json

__all__ = [
    "off_policy_findings",
    "off_policy_table",
    "write_off_policy_report",
]

Results = dict[str, Any]


def write_off_policy_report(folder: Path) -> None:
    """The report of a study of ratios, with its figures.

    Args:
        folder: of a finished study.
    """

    def fill(page: Page) -> None:
        results = page.results
        page.paragraph(
            f"{results['facts']['label']}: a behaviour policy acts at a KL(mu || pi) "
            "per decision from the policy that is asked about, in episodes of T "
            "decisions; "
            f"batches of {results['facts']['batch_size']} trajectories, shared by all "
            "forms of ratios."
        )
        page.heading("What was found")
        page.items(off_policy_findings(results))
        page.figure(
            "variance",
            ratio_figures.variance_of_ratios_figure,
            "N times the variance over |∇J|², with 95% bootstrap bands, against the "
            "horizon. Pale line: the exact second moment of the trajectory's weight "
            "times T, which the whole product must follow.",
        )
        page.figure(
            "bias",
            ratio_figures.bias_of_ratios_figure,
            "Bias relative to the gradient, where it is over twice its standard error; "
            "pale lines: the exact bias of what each form has for its limit.",
        )
        page.figure(
            "ess",
            ratio_figures.ess_figure,
            "Effective sample size of the ratios that stand on decisions; pale line: "
            "the exact one of whole trajectories.",
        )
        page.table(off_policy_table(results["rows"]))

    stored = read_json(folder / "results.json")
    write_page(folder, f"Importance ratios: {stored['facts']['label']}", fill)


def off_policy_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A form and a KL a line, at the longest horizon.

    Args:
        rows: of a study of ratios.
    """
    longest = max(row["horizon"] for row in rows)
    return [
        {
            "estimator": row["estimator"],
            "KL": f"{row['kl']:g}",
            "T": str(row["horizon"]),
            "N V / |∇J|²": number(row["noise_scale"]),
            "bias": f"{percent(row['bias'])} ± {percent(row['bias_error'])}",
            "exact |bias|": percent(row["exact_bias_norm"]),
            "ESS": percent(row["ess"]),
            "E[W²]": number(row["weight_second_moment"]),
            "growth / decision": number(row["growth_rate"]),
        }
        for row in rows
        if row["horizon"] == longest
    ]


def off_policy_findings(results: Results) -> list[str]:
    """What a study of ratios says, in sentences.

    Args:
        results: what `results.json` holds.
    """
    rows = results["rows"]
    longest = max(row["horizon"] for row in rows)
    found = []
    for kl in sorted({row["kl"] for row in rows}):
        last = {
            row["estimator"]: row
            for row in rows
            if row["kl"] == kl and row["horizon"] == longest and row["noise_scale"]
        }
        if len(last) < 2:
            continue
        least = min(last, key=lambda n: last[n]["error"])
        worst = max(last, key=lambda n: last[n]["noise_scale"])
        rate = last[worst]["growth_rate"]
        theory = "" if rate is None else f" (theory: the weight's by {rate:.3f})"
        measured = _growth(rows, worst, kl)
        told = (
            ""
            if measured is None
            else (f"; its variance grows by {measured:.3f} nats a decision{theory}")
        )
        found.append(
            f"KL {kl:g}, T = {longest}: {worst} has "
            f"{last[worst]['noise_scale'] / last[least]['noise_scale']:.3g} times the "
            f"variance of {least}, the form of least squared error, whose bias is "
            f"{percent(last[least]['bias'])} along the gradient{told}."
        )
    return found


def _growth(rows: list[dict[str, Any]], name: str, kl: float) -> float | None:
    """Growth of log variance per decision between the two longest horizons."""
    mine = sorted(
        (row["horizon"], row["noise_scale"] / row["horizon"])
        for row in rows
        if row["estimator"] == name and row["kl"] == kl and row["noise_scale"]
    )
    if len(mine) < 2:
        return None
    (before, low), (after, high) = mine[-2:]
    return math.log(high / low) / (after - before)
