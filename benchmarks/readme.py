"""Write the numbers of both README pages from the stored results.

    python benchmarks/readme.py

Each block between `<!-- begin: name -->` and `<!-- end: name -->` is replaced by what
the function of that name makes of `results/*.json`; a test holds the two together.
"""

import re
from pathlib import Path
from typing import Any

import timing

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", HERE / "README.md"]


def main() -> None:
    for page in PAGES:
        page.write_text(fill(page.read_text()))


def fill(text: str) -> str:
    """The text with every block written anew."""
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)"
        block = make()
        text = re.sub(
            pattern, lambda m, b=block: f"{m[1]}{b}{m[2]}", text, flags=re.DOTALL
        )
    return text


def cold_start() -> str:
    stored = timing.load("cold-start-cpu")
    summary = stored["summary"]
    return (
        f"Measured ({machine(stored)}): {summary['reached_target']} of "
        f"{summary['runs']} seeds reach a mean return of {stored['target']:.0f} over "
        f"100 evaluation episodes, and the whole command, imports and compilation "
        f"included, takes {summary['seconds_median']:.1f} s (median; "
        f"{summary['seconds_low']:.1f} to {summary['seconds_high']:.1f}). In "
        f"Gymnasium's own CartPole-v1 the first one's policy scores "
        f"{summary['gymnasium_mean']:.1f}.\n"
    )


def throughput() -> str:
    stored = timing.load("throughput-cpu")
    settings = stored["settings"]
    ceiling = stored["arithmetic_ceiling_steps_per_second"]
    lines = [
        f"REINFORCE's whole update (rollout, returns, gradient, step) on "
        f"{settings['env']}, actor of two hidden layers of 64, "
        f"{settings['num_envs']} environments, {settings['num_devices']} devices "
        f"({machine(stored)}), median of {settings['rounds']} rounds. Only real "
        f"decisions count; there is no baseline, so that no weight is zero and no "
        f"gradient skipped. Episodes step with Adam, {settings['num_steps']}-step "
        f"segments plainly. The float32 matrix product runs at "
        f"{stored['matmul_gflops']:.0f} GFLOP/s there, which would allow "
        f"{ceiling / 1e6:.1f}M steps/s.",
        "",
        "| what | million steps/s | slots busy |",
        "|---|---|---|",
    ]
    for name, row in stored["table"].items():
        busy = row["slots_busy"]
        lines.append(
            f"| {name} | {row['median'] / 1e6:.2f} "
            f"({row['low'] / 1e6:.2f} to {row['high'] / 1e6:.2f}) | "
            f"{'' if busy is None else f'{100 * busy:.0f}%'} |"
        )
    return "\n".join(lines) + "\n"


def variants() -> str:
    stored = timing.load("rollout-variants-cpu")
    lines = [
        "| variant | rollout, M steps/s | ratio | whole loop, M steps/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, row in stored["table"].items():
        cells = [
            f"{row[part]['steps_per_second'] / 1e6:.2f} | "
            f"{row[part]['speed_up']['median']:.2f}"
            for part in ("rollout", "whole loop")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n({machine(stored)})\n"


def kernels() -> str:
    stored = timing.load("kernels-cpu")
    lines = ["| kernel | ns | uses | GFLOP/s |", "|---|---|---|---|"]
    for name, row in stored["table"].items():
        rate = f"{row['gflops']:.0f}" if row["gflops"] else ""
        lines.append(f"| {name} | {row['ns']:.0f} | {row['uses']} | {rate} |")
    lines.append(f"| sum | {stored['sum']:.0f} | | |")
    return "\n".join(lines) + f"\n\n({machine(stored)})\n"


def machine(stored: dict[str, Any]) -> str:
    made = stored["provenance"]
    return (
        f"{made['cpu_threads']} cores of an {made['cpu']}, jax {made['jax']}, "
        f"{stored['date']}"
    )


BLOCKS = {
    "cold-start": cold_start,
    "throughput": throughput,
    "variants": variants,
    "kernels": kernels,
}

if __name__ == "__main__":
    main()
