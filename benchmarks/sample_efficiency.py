"""How many samples REINFORCE needs: causality, baselines, the natural direction.

    python benchmarks/sample_efficiency.py [--quick]

CartPole-v1, 16 episodes an update, few enough for the variance of an estimator to show.
Each method's step size is chosen from a grid by the area under its own learning curve
over the first 100,000 environment steps: a sweep of five seeds with every value, and of
the values that whose seeds' median area is largest. What is drawn and stored was then
learned anew with ten other seeds and that value, so that no curve profits from the luck
of the seeds that chose it.

A curve is a batch's mean return at the number of steps that were taken when the batch
was complete; seeds are put together at equal steps, by linear interpolation. A seed
whose updates end before the last step keeps its last return in the area; a median is
drawn only as far as every seed has come.

The policy (two hidden layers of 64), the seeds and the batches' size are the same for
all. REINFORCE steps with Adam, whose step hardly depends on the gradient's length; the
natural gradients step by a KL, which is what is swept for them. The one called "natural
gradient" has reward-to-go and the time-dependent baseline; eNAC has its regression's.

Methods are measured two at a time, on one core each.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timing

from jaxpg.train.config import ALGORITHMS, TrainConfig
from jaxpg.train.loop import RunResult, train

ENV = "CartPole-v1"
EPISODES = 16
BUDGET = 100_000
GRID_SEEDS = 5
SEEDS = 10
POINTS = 101
LEVELS = (100.0, 200.0, 400.0)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
KLS = (0.003, 0.01, 0.03, 0.1)


class Method(NamedTuple):
    """One line of the table.

    Attributes:
        algorithm: name of the algorithm.
        settings: what differs from its own.
        num_updates: enough for nearly every seed to take all the steps.
        setting: the step size that is swept.
        values: its grid.
    """

    algorithm: str
    settings: dict[str, Any]
    num_updates: int = 60
    setting: str = "learning_rate"
    values: tuple[float, ...] = RATES


def reinforce(
    credit: str, baseline: str, num_updates: int = 60, **settings: Any
) -> Method:
    settings |= {"credit": credit, "baseline": baseline}
    return Method("reinforce", settings, num_updates)


TIMED = "reward-to-go, time-dependent"
METHODS = {
    "total return": reinforce("total-return", "none", 320),
    "total return, leave-one-out": reinforce("total-return", "leave-one-out"),
    "reward-to-go": reinforce("reward-to-go", "none"),
    "reward-to-go, leave-one-out": reinforce("reward-to-go", "leave-one-out"),
    "reward-to-go, standardised": reinforce("reward-to-go", "none", standardize=True),
    TIMED: reinforce("reward-to-go", "time-dependent"),
    "reward-to-go, value network": reinforce("reward-to-go", "value-network"),
    "reward-to-go, optimal": reinforce("reward-to-go", "optimal"),
    "natural gradient": Method("npg", {}, 40, "max_kl", KLS),
    "eNAC": Method("enac", {}, 50, "max_kl", KLS),
}
PANELS = {
    "causality": [
        "total return",
        "total return, leave-one-out",
        "reward-to-go",
        "reward-to-go, leave-one-out",
        TIMED,
    ],
    "baselines, with reward-to-go": [
        "reward-to-go",
        "reward-to-go, standardised",
        "reward-to-go, leave-one-out",
        TIMED,
        "reward-to-go, value network",
        "reward-to-go, optimal",
    ],
    "direction": [TIMED, "natural gradient", "eNAC"],
}
STYLES = {
    "total return": ("#555555", "-"),
    "total return, leave-one-out": ("#CC79A7", "-"),
    "reward-to-go": ("#000000", "-"),
    "reward-to-go, leave-one-out": ("#0072B2", "-"),
    "reward-to-go, standardised": ("#E69F00", "-"),
    TIMED: ("#009E73", "-"),
    "reward-to-go, value network": ("#D55E00", "-"),
    "reward-to-go, optimal": ("#56B4E9", "-"),
    "natural gradient": ("#D55E00", "--"),
    "eNAC": ("#0072B2", "--"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a trial, not stored")
    quick = parser.parse_args().quick
    began = time.perf_counter()
    table = {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        # The longest ones are the last of the table, and come first.
        running = {
            name: pool.submit(measure, METHODS[name], quick)
            for name in reversed(METHODS)
        }
        for name, row in running.items():
            table[name] = row.result()
            print(describe(name, table[name]), flush=True)
    results = {
        "settings": {
            "env": ENV,
            "episodes_per_update": EPISODES,
            "budget_env_steps": BUDGET,
            "grid_seeds": GRID_SEEDS,
            "seeds": SEEDS,
        },
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() + seconds_of_children(),
        "env_steps": grid().tolist(),
        "table": {name: table[name] for name in METHODS},
    }
    folder = Path(tempfile.mkdtemp()) if quick else timing.RESULTS
    picture = folder / "sample-efficiency.png"
    plot(results, picture)
    if not quick:
        timing.save("sample-efficiency-cpu", results)
    print(
        f"{results['seconds']:.0f} s, {results['cpu_seconds']:.0f} s of a core; drawn "
        f"in {picture}"
    )


def seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(method: Method, quick: bool) -> dict[str, Any]:
    """Choose a method's step size, then learn anew with other seeds."""
    updates = 5 if quick else method.num_updates
    swept = learn(method, method.values, range(GRID_SEEDS), updates)
    areas = {v: np.median(area(swept[v])) for v in method.values}
    value = max(areas, key=areas.__getitem__)
    seeds = range(GRID_SEEDS, GRID_SEEDS + SEEDS)
    learned = learn(method, (value,), seeds, updates)[value]
    low, middle, high = over_seeds(learned)
    return {
        "algorithm": method.algorithm,
        "settings": method.settings,
        "num_updates": updates,
        "setting": method.setting,
        "grid": {f"{v:g}": float(a) for v, a in areas.items()},
        "value": value,
        "at_the_grids_edge": value in (method.values[0], method.values[-1]),
        "areas": area(learned),
        "env_steps_taken": [int(steps[-1]) for steps, _ in learned],
        "steps_to": {f"{level:g}": steps_to(learned, level) for level in LEVELS},
        "median": middle,
        "q25": low,
        "q75": high,
    }


Curve = tuple[np.ndarray, np.ndarray]


def learn(
    method: Method, values: tuple[float, ...], seeds: range, num_updates: int
) -> dict[float, list[Curve]]:
    """Each value's curves, one per seed: environment steps and batches' returns."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            env=ENV,
            seed=seeds[0],
            num_seeds=len(seeds),
            sweep=((method.setting, values),),
            # One after another: side by side, each would pay for the longest episodes.
            members_at_once=1,
            num_envs=EPISODES,
            num_devices=1,
            num_updates=num_updates,
            checkpoint_every=num_updates,
            eval_episodes=0,
            runs_dir=Path(folder),
            name="run",
            algorithm=dataclasses.replace(
                ALGORITHMS[method.algorithm](), episodes_per_env=1, **method.settings
            ),
        )
        result = train(config, show=False)
    return {
        value: [curve(result, method.setting, value, seed) for seed in seeds]
        for value in values
    }


def curve(result: RunResult, setting: str, value: float, seed: int) -> Curve:
    columns = result.metrics
    mine = (columns[setting] == value) & (columns["seed"] == seed)
    return columns["env_steps"][mine], columns["mean_return"][mine]


def grid() -> np.ndarray:
    return np.linspace(0, BUDGET, POINTS)


def area(curves: list[Curve]) -> list[float]:
    """Each seed's mean return over the first steps: the area under its curve."""
    return [float(np.interp(grid(), *curve).mean()) for curve in curves]


def over_seeds(curves: list[Curve]) -> list[list[float | None]]:
    """Quartiles and median at equal steps, as far as every seed has come."""
    each = np.array([np.interp(grid(), *curve) for curve in curves])
    quartiles = np.percentile(each, (25, 50, 75), axis=0)
    come = grid() <= min(steps[-1] for steps, _ in curves)
    return [
        [float(x) if there else None for x, there in zip(line, come, strict=True)]
        for line in quartiles
    ]


def steps_to(curves: list[Curve], level: float) -> float | None:
    """Median steps to a batch whose mean return is `level`; None if most reach none."""
    first = [
        next((s for s, r in zip(*curve, strict=True) if r >= level), np.inf)
        for curve in curves
    ]
    middle = float(np.median(first))
    return middle if middle <= BUDGET else None


def describe(name: str, row: dict[str, Any]) -> str:
    steps = ", ".join(
        f"{level}: {'-' if x is None else f'{x / 1000:.0f}k'}"
        for level, x in row["steps_to"].items()
    )
    edge = " (at the grid's edge)" if row["at_the_grids_edge"] else ""
    return (
        f"{name}: {row['setting']} {row['value']:g}{edge}, mean return over "
        f"{BUDGET // 1000}k steps {np.median(row['areas']):.0f} (median; quartiles "
        f"{np.percentile(row['areas'], 25):.0f} to "
        f"{np.percentile(row['areas'], 75):.0f}), steps to {steps}; at least "
        f"{min(row['env_steps_taken']) / 1000:.0f}k steps each"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Return against environment steps: medians and quartiles, three questions."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12.6, 5.0), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    steps = np.array(results["env_steps"])
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        for name in names:
            row, (colour, style) = results["table"][name], STYLES[name]
            low, middle, high = (
                np.array(row[mark], float) for mark in ("q25", "median", "q75")
            )
            axis.fill_between(steps, low, high, color=colour, alpha=0.13, lw=0)
            label = f"{name} ({row['value']:g})"
            axis.plot(steps, middle, style, color=colour, lw=2.0, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("environment steps", fontsize=9)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(color="#555555", alpha=0.2, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.legend(
            loc="upper left",
            bbox_to_anchor=(0.0, -0.14),
            frameon=False,
            fontsize=8,
        )
    axes[0].set_ylabel("mean return of an update's 16 episodes", fontsize=9)
    settings = results["settings"]
    figure.suptitle(
        f"{ENV}, {EPISODES} episodes an update: median and middle half of "
        f"{settings['seeds']} seeds; in brackets the step size chosen on "
        f"{settings['grid_seeds']} others",
        fontsize=11,
    )
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
