"""Reports of the studies of ratios, of learning and of batch sizes."""

import math
import operator
from pathlib import Path
from typing import Any

from jaxpg.study import curves_figures, ratio_figures
from jaxpg.study.report import Page, write_page
from jaxpg.study.tables import number, percent, with_interval
from jaxpg.train.provenance import read_json

__all__ = [
    "batch_size_findings",
    "batch_size_table",
    "learning_findings",
    "learning_table",
    "off_policy_findings",
    "off_policy_table",
    "write_batch_size_report",
    "write_learning_report",
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
            "Variance over that of the same estimator on policy, with 95% bootstrap "
            "bands, against the horizon. Pale line: the exact second moment of the "
            "trajectory's weight. Where it is far above a form's line, the sample did "
            "not hold the rare trajectories that make the variance.",
        )
        page.figure(
            "bias",
            ratio_figures.bias_of_ratios_figure,
            "Bias along the gradient; pale lines: the exact bias of what each form has "
            "for its limit. Bars that leave the picture are longer than the gradient.",
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
            "over on-policy": number(row["variance"] / row["on_policy_variance"]),
            "bias": f"{percent(row['bias'])} ± {percent(row['bias_error'])}",
            "exact bias": percent(row["exact_bias"]),
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
            else (
                f"; over on-policy it grows by {measured:.3f} nats a decision{theory}"
            )
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
        (row["horizon"], row["variance"] / row["on_policy_variance"])
        for row in rows
        if row["estimator"] == name and row["kl"] == kl and row["noise_scale"]
    )
    if len(mine) < 2:
        return None
    (before, low), (after, high) = mine[-2:]
    return math.log(high / low) / (after - before)


def write_learning_report(folder: Path) -> None:
    """The report of a study of learning, with its figures.

    Args:
        folder: of a finished study.
    """

    def fill(page: Page) -> None:
        results = page.results
        facts = results["facts"]
        page.paragraph(
            f"REINFORCE on {facts['label']}: {facts['num_episodes']} episodes for "
            "every run, step sizes "
            f"{', '.join(f'{x:g}' for x in facts['learning_rates'])}. "
            f"Each cell's step size was chosen by {facts['seeds']} seeds, and is shown "
            f"on {facts['seeds']} others."
        )
        page.heading("What was found")
        page.items(learning_findings(results))
        page.figure(
            "learning", curves_figures.learning_figure, "Return at equal episodes."
        )
        page.figure(
            "seconds",
            curves_figures.seconds_figure,
            "Return at equal wall-clock: seconds of one run at the rate that its "
            "program reached, seeds side by side.",
        )
        page.table(learning_table(results["rows"]))

    stored = read_json(folder / "results.json")
    write_page(folder, f"Learning: {stored['facts']['label']}", fill)


def learning_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """An estimator and a batch size a line.

    Args:
        rows: of a study of learning.
    """
    return [
        {
            "estimator": row["estimator"],
            "N": str(row["batch_size"]),
            "step size": f"{row['learning_rate']:g}",
            **{
                told: f"{row[f'{name}_iqm']:.0f} ({row[f'{name}_low']:.0f} to "
                f"{row[f'{name}_high']:.0f})"
                for name, told in (("area", "mean return"), ("last", "last tenth"))
            },
            "median of the last": f"{row['last_median']:.0f}",
            "seconds": number(row["seconds"]),
        }
        for row in rows
    ]


def learning_findings(results: Results) -> list[str]:
    """What a study of learning says, in sentences.

    Args:
        results: what `results.json` holds.
    """
    found = []
    for size in sorted({row["batch_size"] for row in results["rows"]}):
        mine = [row for row in results["rows"] if row["batch_size"] == size]
        best, worst = (
            pick(mine, key=lambda row: row["area_iqm"]) for pick in (max, min)
        )
        found.append(
            f"N = {size}: mean return over all episodes {best['area_iqm']:.0f} "
            f"({best['area_low']:.0f} to {best['area_high']:.0f}) with "
            f"{best['estimator']}, {worst['area_iqm']:.0f} ({worst['area_low']:.0f} to "
            f"{worst['area_high']:.0f}) with {worst['estimator']}."
        )
    return found


def write_batch_size_report(folder: Path) -> None:
    """The report of a study of batch sizes, with its figures.

    Args:
        folder: of a finished study.
    """

    def fill(page: Page) -> None:
        results = page.results
        facts = results["facts"]
        page.paragraph(
            f"REINFORCE on {facts['label']} to a mean return of "
            f"{facts['target_return']:g}. Each batch size's step size was chosen by "
            f"{facts['seeds']} seeds, and is shown on {facts['seeds']} others."
        )
        page.heading("What was found")
        page.items(batch_size_findings(results))
        page.figure(
            "race",
            curves_figures.race_figure,
            "Updates, episodes and seconds to the target, medians and quartiles over "
            "seeds. Dotted: what the measured noise scale predicts; dashed: the best "
            "curve of that form.",
        )
        page.table(batch_size_table(results["rows"]))
        for line in results["summary"]:
            page.heading(f"Noise scale of {line['estimator']} along a run")
            page.table(
                [
                    {
                        "update": str(stage["update"]),
                        "mean return": number(stage["mean_return"]),
                        "noise scale": with_interval(stage, "noise_scale"),
                    }
                    for stage in line["stages"]
                ]
            )

    stored = read_json(folder / "results.json")
    write_page(folder, f"Batch sizes: {stored['facts']['label']}", fill)


def batch_size_table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """An estimator and a batch size a line.

    Args:
        rows: of a study of batch sizes.
    """
    return [
        {
            "estimator": row["estimator"],
            "N": str(row["batch_size"]),
            "step size": f"{row['learning_rate']:g}",
            "reached": f"{row['reached']}/{row['seeds']}",
            **{
                name: "" if row[name] is None else with_interval(row, name)
                for name in ("updates", "episodes", "seconds")
            },
        }
        for row in rows
    ]


def batch_size_findings(results: Results) -> list[str]:
    """What a study of batch sizes says, in sentences.

    Args:
        results: what `results.json` holds.
    """
    found = []
    for line in results["summary"]:
        mine = [
            row
            for row in results["rows"]
            if row["estimator"] == line["estimator"] and row["updates"] is not None
        ]
        if not mine:
            continue
        told = [
            f"the fewest {name} at N = {best['batch_size']} ({number(best[name])})"
            for name in ("updates", "episodes", "seconds")
            for best in [min(mine, key=operator.itemgetter(name))]
        ]
        scales = [
            f"{said} {number(line[name])}"
            for name, said in (
                ("noise_scale", "measured (median of the stages)"),
                ("fitted_noise_scale", "fitted to the updates"),
            )
            if line[name] is not None
        ]
        found.append(f"{line['estimator']}: {', '.join(told)}.")
        if scales:
            found.append(f"Noise scale in episodes: {'; '.join(scales)}.")
    return found
