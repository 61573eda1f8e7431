"""The report of a study: one HTML file with its figures inside, no network needed."""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpg.study import figures
from jaxpg.study.tables import (
    best_bias,
    bias_table,
    comparison_size,
    number,
    percent,
    size_table,
    variance_table,
)
from jaxpg.train.progress import clock
from jaxpg.train.provenance import read_json, write_text_atomically

__all__ = ["variance_findings", "write_page", "write_variance_report"]

Results = dict[str, Any]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; }
figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; white-space: nowrap; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
code, pre { font-size: .85rem; background: #f5f5f5; } pre { padding: .7rem;
  overflow-x: auto; }
"""


class Page:
    """Pieces of a report in order."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder = folder
        self.results = results
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def items(self, lines: Sequence[str]) -> None:
        inner = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        self._parts.append(f"<ul>{inner}</ul>")

    def figure(self, name: str, make: Callable[[Results], Any], caption: str) -> None:
        """Draw, keep as PNG and SVG, and take into the page."""
        (self.folder / "figures").mkdir(exist_ok=True)
        picture = figures.save(make(self.results), self.folder / "figures", name)
        data = base64.b64encode(picture).decode()
        self._parts.append(
            f'<figure><img alt="{html.escape(caption)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}'
            "</figcaption></figure>"
        )

    def table(self, lines: Sequence[dict[str, str]]) -> None:
        if not lines:
            return
        head = "".join(f"<th>{html.escape(name)}</th>" for name in lines[0])
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line.values())}"
            "</tr>"
            for line in lines
        )
        self._parts.append(
            f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        )

    def preformatted(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def write(self, title: str) -> None:
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
            f"<h1>{html.escape(title)}</h1>{''.join(self._parts)}</html>\n"
        )
        write_text_atomically(self.folder / "report.html", page)


def write_page(
    folder: Path, title: str, fill: Callable[[Page], None], *, closing: bool = True
) -> None:
    """Write a folder's report.

    Args:
        folder: with a `results.json`.
        title: of the page.
        fill: puts the pieces together.
        closing: whether notes, command and versions come last.
    """
    page = Page(folder, read_json(folder / "results.json"))
    fill(page)
    if closing:
        _close(page)
    page.write(title)


def write_variance_report(folder: Path) -> None:
    """The report of a study of variance, with its figures.

    Args:
        folder: of a finished study.
    """

    def fill(page: Page) -> None:
        results = page.results
        page.paragraph(_setting(results))
        page.heading("What was found")
        page.items(variance_findings(results))
        page.figure(
            "variance",
            figures.variance_figure,
            "Total variance of the gradient against batch size, measured over "
            "independent batches of N trajectories, and relative to one estimator's on "
            "the same trajectories. Bands: 95% bootstrap over batches.",
        )
        page.table(variance_table(results["rows"], results["summary"]))
        page.paragraph(
            "Variance in units of return squared, and relative to plain reward-to-go "
            "(or to the first) on the same trajectories; bias along the gradient, "
            "relative to its length, with its standard error; noise scale and "
            "critical N in trajectories; slope of log variance on log N; time with "
            "sampling; variance × seconds relative to plain reward-to-go (or to the "
            "first)."
        )
        page.heading("Cost")
        page.figure(
            "cost",
            figures.cost_figure,
            "Noise, time of one trajectory, and their product: what a unit of accuracy "
            "costs. Sampling is part of the time.",
        )
        page.heading("Bias")
        page.figure(
            "bias",
            figures.bias_figure,
            "Bias along the gradient; points are shifted to be told apart. Estimators "
            "that are not proved unbiased are compared, batch by batch, with one that "
            "is; the others with the reference.",
        )
        page.table(bias_table(results["rows"]))
        page.heading("Signal")
        page.figure(
            "signal",
            figures.signal_figure,
            "Signal-to-noise ratio (1 at the critical batch size), mean cosine of a "
            "batch's gradient to the reference, and N times the variance over |∇J|², "
            "flat where variance falls as 1/N.",
        )
        page.heading("Variance by block of parameters")
        page.figure(
            "blocks", figures.block_figure, "Share of each array of the parameters."
        )
        page.heading("Variance at every batch size")
        page.table(size_table(results["rows"], "variance"))

    stored = read_json(folder / "results.json")
    write_page(folder, f"Variance of estimators: {stored['facts']['label']}", fill)


def variance_findings(results: Results) -> list[str]:
    """What a study of variance says, in sentences.

    Args:
        results: what `results.json` holds.
    """
    table = {found["estimator"]: found for found in results["summary"]}
    rows = {
        name: row
        for name in table
        for row in results["rows"]
        if row["estimator"] == name and row["noise_scale"] is not None
        if row["batch_size"] == _size(results, name)
    }
    if not rows:
        return []
    unbiased = {n: r for n, r in rows.items() if not _is_biased(results, n)}
    found = []
    best = min(unbiased or rows, key=lambda n: rows[n]["noise_scale"])
    worst = max(rows, key=lambda n: rows[n]["noise_scale"])
    ratio = rows[worst]["noise_scale"] / rows[best]["noise_scale"]
    found.append(
        f"Least variance without a visible bias: {best}, noise scale "
        f"{number(rows[best]['noise_scale'])} trajectories; most: {worst}, "
        f"{number(rows[worst]['noise_scale'])}, {ratio:.1f} times as much."
    )
    cheap = min(unbiased or rows, key=lambda n: _cost(rows[n]))
    micro = 1e6 * rows[cheap]["seconds"] / rows[cheap]["batch_size"]
    beside = _cost(rows[best]) / _cost(rows[cheap])
    found.append(
        f"Least variance × seconds: {cheap} ({number(micro)} µs a trajectory)"
        + ("." if best == cheap else f"; {best} costs {beside:.2f} times as much.")
    )
    slopes = [f["slope"] for f in table.values() if f["independent_terms"]]
    if slopes and None not in slopes:
        found.append(
            "Log-log slope of variance on N for means of independent terms: "
            f"{', '.join(f'{s:.2f}' for s in slopes)} (theory: -1)."
        )
    biased = [
        f"{n} ({percent(r[best_bias(r)])} at N = {r['batch_size']})"
        for n in table
        if _is_biased(results, n)
        for r in [_smallest(results, n)]
    ]
    if biased:
        found.append(f"Biased by more than 4 standard errors: {', '.join(biased)}.")
    return found


def _cost(row: dict[str, Any]) -> float:
    return float(row["noise_scale"] * row["seconds"] / row["batch_size"])


def _size(results: Results, name: str) -> int | None:
    return comparison_size(results["rows"], name)


def _smallest(results: Results, name: str) -> dict[str, Any]:
    mine = [r for r in results["rows"] if r["estimator"] == name]
    return min(mine, key=lambda r: r["batch_size"])


def _is_biased(results: Results, name: str) -> bool:
    """Seen to be: at some size by more than 4 standard errors."""
    return any(
        abs(row[best_bias(row)]) > 4 * row[f"{best_bias(row)}_error"]
        for row in results["rows"]
        if row["estimator"] == name and row[f"{best_bias(row)}_error"]
    )


def _setting(results: Results) -> str:
    facts = results["facts"]
    reference = facts["reference"]
    own = facts["trajectories"].get("own") or facts["trajectories"].get("behaviour")
    told = (
        "the exact gradient"
        if reference["exact"]
        else f"a reference batch of {reference['trajectories']:,} other trajectories, "
        f"known to {percent(reference['relative_error'])} of its length"
    )
    return (
        f"{facts['label']}: {facts['parameters']:,} parameters, "
        f"{own['trajectories']:,} trajectories of {own['mean_length']:.1f} decisions "
        f"and mean return {own['mean_return']:.2f}, each sampled once and shared by "
        f"all estimators ({clock(facts['seconds'])}, at most "
        f"{facts['peak_bytes'] / 2**30:.1f} GiB). "
        f"Estimates are held against {told}."
    )


def _close(page: Page) -> None:
    results = page.results
    if results["notes"]:
        page.heading("Left out")
        page.items(results["notes"])
    page.heading("How it was made")
    page.preformatted(results["command"])
    made = results["provenance"]
    page.paragraph(
        f"{results['date']}; "
        + ", ".join(
            f"{name} {made[name]}"
            for name in ("jaxpg", "jax", "jaxlib", "numpy", "python")
            if made.get(name)
        )
        + f"; {made['cpu_threads']} threads of {made['cpu']}, {made['backend']}."
    )
    page.preformatted("\n".join(f"{k}: {v}" for k, v in results["settings"].items()))
