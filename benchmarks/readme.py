"""Write the numbers of both README pages from the stored results.

    python benchmarks/readme.py

Each block between `<!-- begin: name -->` and `<!-- end: name -->` is replaced by what
the function of that name makes of `results/*.json`; a test holds the two together.
"""

import re
import statistics
from pathlib import Path
from typing import Any

import timing

from jaxpg.algos.registry import RECIPES

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


def peers() -> str:
    """Every method, beside other libraries on the same work."""
    return peers_of("peers-cpu")


def peers_reinforce() -> str:
    """REINFORCE alone, on another machine and with later code."""
    return peers_of("peers-reinforce-cpu")


def peers_of(name: str) -> str:
    stored = timing.load(name)
    lines = [
        "| work | library | 1000 steps/s | jaxpg is ahead by | compiled in | peak |",
        "|---|---|---|---|---|---|",
    ]
    for place, rows in stored["table"].items():
        method, num_envs = place.split()
        for name, row in rows.items():
            rate, ratio = row["steps_per_second"], row["ratio"]
            times = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            lines.append(
                f"| {method}, {num_envs} environments | {name} | "
                f"{rate['median'] / 1e3:.0f} | {'' if name == 'jaxpg' else times} | "
                f"{row['compile_seconds']:.1f} s | {row['peak_mib']:.0f} MiB |"
            )
    return "\n".join(lines) + (
        f"\n\n({stored['settings']['env']}, {stored['settings']['rounds']} rounds in "
        f"turns, ratios taken round by round; {machine(stored)})\n"
    )


def peers_days() -> str:
    """How far ahead on three days, with the code of each."""
    names = ("peers-cpu-2026-11-24", "peers-cpu-2026-11-28", "peers-cpu")
    days = [timing.load(name) for name in names]
    libraries = ("PureJaxRL", "Stoix", "rejax")
    heads = [f"{name}, {day['date'][:10]}" for name in libraries for day in days]
    lines = [f"| work | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for place in days[0]["table"]:
        tables = [day["table"][place] for day in days]
        cells = [
            f"{table[name]['ratio']['median']:.2f}" if name in table else ""
            for name in libraries
            for table in tables
        ]
        lines.append(f"| {place} environments | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def peers_learning() -> str:
    stored = timing.load("peers-learning-cpu")
    lines = [
        "| environments | library | mean return over the run | at its end |",
        "|---|---|---|---|",
    ]
    for place, rows in stored["table"].items():
        for name, row in rows.items():
            cells = [
                f"{row[part]['median']:.0f} ({row[part]['low']:.0f} to "
                f"{row[part]['high']:.0f})"
                for part in ("mean_return", "last_return")
            ]
            lines.append(f"| {place.split()[1]} | {name} | {' | '.join(cells)} |")
    settings = stored["settings"]
    return "\n".join(lines) + (
        f"\n\n({settings['env']}, {settings['env_steps'] // 1000}k steps, medians and "
        f"ranges of {settings['seeds']} seeds; {machine(stored)})\n"
    )


def throughput() -> str:
    stored = timing.load("throughput-cpu")
    lines = [
        "| world | environments | algorithm | thousand steps/s | of the environment "
        "alone | compiled in | working memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, rows in stored["table"].items():
        env, num_envs = place.split()
        for name, row in rows.items():
            if name == "environment alone":
                continue
            lines.append(
                f"| {env} | {num_envs} | {name} | {row['median'] / 1e3:.0f} "
                f"({row['low'] / 1e3:.0f} to {row['high'] / 1e3:.0f}) | "
                f"{100 * row['of_environment_alone']:.0f}% | "
                f"{row['compile_seconds']:.1f} s | "
                f"{row['working_bytes'] / 2**20:.0f} MiB |"
            )
    return "\n".join(lines) + f"\n\n({machine(stored)})\n"


def grid() -> str:
    """Every algorithm in every place, in thousand steps a second."""
    stored = timing.load("throughput-grid-cpu")
    names = list(RECIPES)
    lines = [
        f"| world | environments | alone | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for place, rows in stored["table"].items():
        env, num_envs = place.split()
        rates = [rows[name]["median"] / 1e3 for name in ("environment alone", *names)]
        cells = " | ".join(f"{x:.0f}" if x >= 9.95 else f"{x:.1f}" for x in rates)
        lines.append(f"| {env} | {num_envs} | {cells} |")
    return "\n".join(lines) + f"\n\n({machine(stored)})\n"


def compilation() -> str:
    stored = timing.load("compilation-cpu")
    lines = [
        "| algorithm | traced in | lowered in | compiled in | kernels | peak |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in stored["table"].items():
        seconds = [
            f"{row[part]['median']:.2f} s" for part in ("trace", "lower", "compile")
        ]
        peak = f"{row['peak_mib']['median']:.0f} MiB"
        lines.append(f"| {name} | {' | '.join(seconds)} | {row['kernels']} | {peak} |")
    settings = stored["settings"]
    return "\n".join(lines) + (
        f"\n\n(CartPole-v1, {settings['num_envs']} environments, default settings, "
        f"medians of {settings['rounds']} processes in turns; {machine(stored)})\n"
    )


def scaling() -> str:
    stored = timing.load("scaling-cpu")
    lines = [
        "| algorithm | scaling | devices | environments | all-reduces an update "
        "| bytes | largest | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in stored["rows"]:
        counts = ", ".join(
            str(count) if kind == "all-reduce" else f"{count} {kind}"
            for kind, count in row["exchanges"].items()
        )
        seconds = row["milliseconds"]
        lines.append(
            f"| {row['algorithm']} | {row['scaling']} | {row['num_devices']} | "
            f"{row['num_envs']} | {counts or 0} | {row['bytes']} | "
            f"{row['largest_bytes']} | {'' if seconds is None else f'{seconds:.0f}'} |"
        )
    return "\n".join(lines) + f"\n\n({machine(stored)})\n"


def large_batches() -> str:
    stored = timing.load("memory-ppo-cpu")
    rows, again = (
        [row for row in stored["rows"] if row["form"] == form]
        for form in ("stored", "replayed")
    )
    first, last = rows[0], rows[-1]
    working = [row["working_bytes_per_step"] for row in rows]
    costs = " and ".join(
        f"{row['times_as_long']['median']:.2f} times as long on {row['env']} with "
        f"{row['num_envs']} environments"
        for row in stored["cost"]
    )
    return (
        f"PPO stores its batch, {stored['stored_bytes_per_step']} bytes a step on "
        f"CartPole-v1 with advantages, targets and values. From "
        f"{first['num_envs']} to {last['num_envs']} environments of 128 steps the "
        f"compiled program asks for {max(working):.0f} bytes a step in all, in "
        f"proportion to the batch: most where observations, and those after them, are "
        f"turned from the order of time into rows. The "
        f"whole process peaks at {first['peak_bytes'] / 2**20:.0f} to "
        f"{last['peak_bytes'] / 2**20:.0f} MiB. With `--replay-envs "
        f"{stored['settings']['replay_envs']} --standardize batch` nothing is stored "
        f"and rows are played again wherever they are looked at: the program then asks "
        f"for {again[0]['working_bytes'] / 2**20:.0f} MiB at {again[0]['num_envs']} "
        f"environments and {again[-1]['working_bytes'] / 2**20:.0f} MiB at "
        f"{again[-1]['num_envs']}, and an update takes {costs} ({machine(stored)}).\n"
    )


def slow_worlds() -> str:
    stored = timing.load("slow-worlds-cpu")
    names = list(next(iter(stored["table"].values())))
    lines = [
        "| world | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for world, rows in stored["table"].items():
        cells = [f"{rows[name]['median'] / 1e3:.4g}" for name in names]
        lines.append(f"| {world} | " + " | ".join(cells) + " |")
    settings = stored["settings"]
    return "\n".join(lines) + (
        f"\n\n(thousand steps/s of {settings['num_envs']} worlds on one device, median "
        f"of {settings['rounds']} rounds in turns; {machine(stored)})\n"
    )


def ceilings() -> str:
    stored = timing.load("ceilings-cpu")
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


def oracle() -> str:
    """The rows that a reader chooses between."""
    stored = timing.load("oracle-table")
    chosen = [
        row
        for row in stored["rows"]
        if not row["settings"] and not row["baseline"].endswith("-plain")
        if row["credit"] == "reward-to-go" or row["baseline"] == "none"
        if row["ratio"] == "none" or row["baseline"] == "none"
    ]
    return oracle_lines(chosen, stored["batch_size"])


def whole_oracle() -> str:
    """Every row, with what it claims to be."""
    stored = timing.load("oracle-table")
    return oracle_lines(stored["rows"], stored["batch_size"])


def oracle_lines(rows: list[dict[str, Any]], batch_size: int) -> str:
    lines = [
        f"| credit | baseline | ratios | claim | bias | N·variance, N = {batch_size} | "
        "N → ∞ |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        settings = [f"{name} {value}" for name, value in row["settings"]]
        settings += ["standardised"] if row["standardize"] else []
        ratios = ", ".join([row["ratio"], *settings])
        bias = "0" if row["bias"] < 1e-10 else f"{100 * row['bias']:.0f}%"
        limit = row["limit_variance"]
        cells = [row["credit"], row["baseline"], ratios, row["claim"], bias]
        cells += [f"{row['variance']:.2f}", "" if limit is None else f"{limit:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory() -> str:
    stored = timing.load("memory-cpu")
    batch = stored["bytes_per_trajectory_stored"]
    lines = [
        "| trajectories | as a batch | "
        + " | ".join(f"{name}: peak, µs each" for name in growing(stored))
        + " |",
        "|---" * (2 + len(growing(stored))) + "|",
    ]
    numbers = sorted({row["trajectories"] for row in stored["growth"]})
    for number in numbers:
        cells = [
            f"{row['peak_bytes'] / 2**20:.0f} MiB, "
            f"{row['microseconds_per_trajectory']:.0f}"
            for name in growing(stored)
            for row in stored["growth"]
            if row["trajectories"] == number and row["method"] == name
        ]
        size = f"{number * batch / 2**30:.2f} GiB"
        lines.append(f"| {number} | {size} | {' | '.join(cells)} |")
    working = sorted({row["working_bytes"] / 1e6 for row in stored["growth"]})
    own = " to ".join(f"{x:.1f}" for x in dict.fromkeys((working[0], working[-1])))
    lines += [
        "",
        f"The compiled program itself works in {own} MB at every size; the rest of a "
        f"process is imports and compiling ({machine(stored)}; a shared machine).",
    ]
    return "\n".join(lines) + "\n"


def growing(stored: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in stored["growth"]))


def methods() -> str:
    stored = timing.load("memory-cpu")
    lines = [
        "| baseline, statistic | µs per trajectory | beside the plain gradient |",
        "|---|---|---|",
    ]
    for name, row in stored["methods"].items():
        times = row["times_the_plain_gradient"]
        lines.append(
            f"| {name} | {row['microseconds_per_trajectory']:.0f} | "
            f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f}) |"
        )
    return "\n".join(lines) + f"\n\n({machine(stored)})\n"


def learning() -> str:
    stored = timing.load("learning-cpu")
    lines = [
        "| world | algorithm | steps a seed | drawn: median (range) of seeds | greedy "
        "| Gymnasium | untrained | bar | met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in stored["rows"].values():
        name = f"{row['algorithm']} {row['note']}".strip()
        if row["bar"] is None:
            bar, met = "", ""
        else:
            sign = "≤" if row["most"] else "≥"
            bar, met = f"{sign} {row['bar']:g}", f"{row['met']}/{row['num_seeds']}"
        abroad = "" if row["gymnasium"] is None else f"{row['gymnasium']:.4g}"
        lines.append(
            f"| {row['env']} | {name} | {row['env_steps'] / 1e6:.2f}M | "
            f"{spread(row['drawn'])} | {statistics.median(row['greedy']):.4g} | "
            f"{abroad} | {row['before']:.3g} | {bar} | {met} |"
        )
    total = sum(row["seconds"] for row in stored["rows"].values())
    return "\n".join(lines) + (
        f"\n\n({machine(stored)}; five seeds side by side in one program, "
        f"{total / 60:.0f} minutes of training in all, on a shared machine)\n"
    )


def sample_efficiency() -> str:
    stored = timing.load("sample-efficiency-cpu")
    settings = stored["settings"]
    lines = [
        "| method | step size | mean return over the budget | steps to 200 | to 400 |",
        "|---|---|---|---|---|",
    ]
    for name, row in stored["table"].items():
        reached = [
            "not reached" if steps is None else f"{steps / 1e3:.0f}k"
            for steps in (row["steps_to"]["200"], row["steps_to"]["400"])
        ]
        area = statistics.median(row["areas"])
        lines.append(
            f"| {name} | {row['value']:g} | {area:.0f} | {' | '.join(reached)} |"
        )
    return "\n".join(lines) + (
        f"\n\n({settings['env']}, {settings['episodes_per_update']} episodes an "
        f"update, {settings['budget_env_steps'] // 1000}k steps; medians of "
        f"{settings['seeds']} seeds, step sizes chosen on {settings['grid_seeds']} "
        f"others; {machine(stored)})\n"
    )


def variance() -> str:
    """What the reference study found, in three sentences."""
    early, late = (
        timing.load(f"variance-{stage}") for stage in ("untrained", "nearly-trained")
    )

    def relative(stored: dict[str, Any], name: str, size: int) -> str:
        (row,) = [
            row
            for row in stored["rows"]
            if row["estimator"] == f"reward-to-go/{name}" and row["batch_size"] == size
        ]
        ends = (row[f"relative_variance_{end}"] for end in ("low", "high"))
        low, high = (f"{x:.2g}" for x in ends)
        return f"{row['relative_variance']:.2g} ({low} to {high})"

    (shrunk,) = [
        row
        for row in early["rows"]
        if row["estimator"] == "reward-to-go/batch-mean" and row["batch_size"] == 16
    ]
    mean_return = late["facts"]["trajectories"]["own"]["mean_return"]
    return (
        f"With 64 trajectories of a nearly trained policy (mean return "
        f"{mean_return:.0f}) a time-dependent baseline leaves "
        f"{relative(late, 'time-dependent', 64)} of the variance of plain "
        f"reward-to-go and a value network {relative(late, 'value-network', 64)}, "
        f"while the mean return of the others makes it "
        f"{relative(late, 'leave-one-out', 64)} times as large. The jointly optimal "
        f"number per decision must be estimated, and in small batches its own error is "
        f"worse than no baseline: {relative(late, 'optimal-time', 16)} times the "
        f"variance at N = 16, {relative(late, 'optimal-time', 512)} at N = 512. Before "
        f"any training every baseline saves less "
        f"({relative(early, 'time-dependent', 64)} at N = 64), and a batch mean that "
        f"contains a trajectory's own return shows its bias, "
        f"{100 * shrunk['paired_bias']:.1f} ± {100 * shrunk['paired_bias_error']:.1f}% "
        f"at N = 16 where theory says {-100 / 16:.2f}%.\n\n"
        f"({machine(late)}; in brackets 95% bootstrap intervals over batches)\n"
    )


def spread(numbers: list[float]) -> str:
    middle, low, high = statistics.median(numbers), min(numbers), max(numbers)
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def machine(stored: dict[str, Any]) -> str:
    made = stored["provenance"]
    return (
        f"{made['cpu_threads']} cores of an {made['cpu']}, jax {made['jax']}, "
        f"{stored['date']}"
    )


def hard_attention() -> str:
    stored = timing.load("hard-attention")
    settings = stored["settings"]
    sees = {
        "convolutional": "all of the canvas",
        "attention": "4 glimpses, where it chooses",
        "fully-connected": "all of the canvas",
        "random-glimpses": "4 glimpses, anywhere",
    }
    lines = ["| model | sees | held-out accuracy |", "|---|---|---|"]
    for name, row in stored["table"].items():
        median, low, high = (100 * row[part] for part in ("median", "low", "high"))
        lines.append(
            f"| {name.replace('-', ' ')} | {sees[name]} | "
            f"{median:.1f}% ({low:.1f} to {high:.1f}) |"
        )
    return "\n".join(lines) + (
        f"\n\n(median and range of {settings['num_seeds']} seeds, "
        f"{settings['num_updates']} updates each, learning rates "
        + ", ".join(f"{rate:g}" for rate in settings["learning_rates"].values())
        + f" in this order; jax {stored['provenance']['jax']}, "
        f"{stored['date']})\n"
    )


def discrete_vae() -> str:
    """Bias and variance where the exact gradient is known, and where training ends."""
    stored = timing.load("discrete-vae")
    found, learned = stored["bias"], stored["learning"]
    models = ["8 bits", "32 bits", "8 groups of 8", "2 layers of 32 bits"]
    lines = [
        "| estimator | bias | variance | " + " | ".join(models) + " |",
        "|---|---|---|" + "---|" * len(models),
    ]
    for name, row in found.items():
        if not isinstance(row, dict):
            continue
        bounds = [
            f"{statistics.mean(learned[model][name]['test_bound'][-1]):.2f}"
            if name in learned[model]
            else ""
            for model in models
        ]
        error = 196 * row["along_error"]
        bias = "0" if name == "exact" else f"{100 * row['along']:+.1f} ± {error:.1f}%"
        spread = "0" if name == "exact" else f"{row['variance']:.3g}"
        lines.append(f"| {name} | {bias} | {spread} | {' | '.join(bounds)} |")
    settings = stored["settings"]
    return "\n".join(lines) + (
        f"\n\nBias along the exact gradient, in % of its length with a 95% interval, "
        f"and total variance over its squared length: a model of 8 bits after "
        f"{found['at']} updates, {found['images']} images, {found['gradients']} "
        f"estimates. Then the evidence bound on test images in nats, mean of "
        f"{settings['seeds']} seeds after {settings['updates']} updates; VIMCO's is "
        f"another bound (jax {stored['provenance']['jax']}, {stored['date']}).\n"
    )


BLOCKS = {
    "cold-start": cold_start,
    "peers": peers,
    "peers-days": peers_days,
    "peers-reinforce": peers_reinforce,
    "peers-learning": peers_learning,
    "throughput": throughput,
    "grid": grid,
    "compilation": compilation,
    "scaling": scaling,
    "large-batches": large_batches,
    "slow-worlds": slow_worlds,
    "ceilings": ceilings,
    "variants": variants,
    "kernels": kernels,
    "oracle": oracle,
    "whole-oracle": whole_oracle,
    "memory": memory,
    "methods": methods,
    "learning": learning,
    "sample-efficiency": sample_efficiency,
    "variance": variance,
    "hard-attention": hard_attention,
    "discrete-vae": discrete_vae,
}

if __name__ == "__main__":
    main()
