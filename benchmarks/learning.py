"""What every algorithm learns, how surely, and in how many steps.

    python benchmarks/learning.py                       every row, about an hour
    python benchmarks/learning.py --only PPO Pendulum   rows whose label has each word

A row trains five seeds side by side with the settings that `jaxpg train ALGORITHM --env
ENVIRONMENT` takes by default (`jaxpg/settings`), then plays 250 whole episodes with the
last policy of each seed, actions drawn and greedy, and in the real Gymnasium where it
has the same world. The bar must be met by at least four seeds with actions drawn. Rows
are stored as they come, so an interrupted benchmark keeps what it has.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import timing

from jaxpg.train.config import TrainConfig
from jaxpg.train.evaluate import (
    evaluate_in_gymnasium,
    make_evaluator,
    summarize,
)
from jaxpg.train.loop import train
from jaxpg.train.run import load_params, open_run
from jaxpg.train.tuned import tuned

NUM_SEEDS = 5
NEEDED = 4
RESULT = "learning-cpu"

IN_GYMNASIUM = {
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "MountainCarContinuous-v0",
}


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        env: name of the environment.
        algorithm: name of the algorithm.
        bar: mean return that four of five seeds must reach; None reports without one.
        note: what differs from the pair's own settings; "" for nothing.
        policy: those settings of the policy.
        most: whether the bar is an upper one, which a baseline must stay under.
        episodes: played for each seed.
    """

    env: str
    algorithm: str
    bar: float | None
    note: str = ""
    policy: dict[str, Any] = {}  # noqa: RUF012
    most: bool = False
    episodes: int = 250

    @property
    def label(self) -> str:
        return " ".join(x for x in (self.env, self.algorithm, self.note) if x)


FEED_FORWARD = {"memory": 0}
TANH = {"head": "tanh"}

ROWS = [
    *(
        Row("CartPole-v1", name, 475.0)
        for name in (
            "reinforce",
            "a2c",
            "vtrace",
            "npg",
            "enac",
            "trpo",
            "ppo",
            "off-policy",
        )
    ),
    Row("Acrobot-v1", "ppo", -90.0),
    Row("Acrobot-v1", "trpo", -90.0),
    Row("Pendulum-v1", "ppo", -250.0),
    Row("Pendulum-v1", "ppo", -250.0, "tanh", TANH),
    Row("Pendulum-v1", "trpo", -250.0),
    Row("Pendulum-v1", "trpo", -250.0, "tanh", TANH),
    Row("MountainCarContinuous-v0", "ppo", 85.0),
    Row("MountainCar-v0", "ppo", None),
    Row("MountainCar-v0", "trpo", None),
    Row("Breakout-MinAtar", "ppo", 15.0),
    Row("SpaceInvaders-MinAtar", "ppo", 45.0),
    Row("MemoryChain-bsuite", "ppo", 0.9, episodes=4000),
    Row(
        "MemoryChain-bsuite",
        "ppo",
        0.1,
        "feed-forward",
        FEED_FORWARD,
        most=True,
        episodes=4000,
    ),
    Row("CartPoleNoVelocity-v1", "ppo", 400.0),
    Row("CartPoleNoVelocity-v1", "trpo", 400.0),
    Row(
        "CartPoleNoVelocity-v1",
        "ppo",
        200.0,
        "feed-forward",
        FEED_FORWARD,
        most=True,
    ),
    Row("Reacher-misc", "ppo", None),
    Row("Reacher-misc", "trpo", None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="words of the label")
    options = parser.parse_args()
    rows = [r for r in ROWS if all(w.lower() in r.label.lower() for w in options.only)]
    for row in rows:
        result = measure(row)
        store(row, result)
        print(describe(row, result), flush=True)


def measure(row: Row) -> dict[str, Any]:
    """Train and play one row."""
    config = settings(row)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, runs_dir=Path(folder), name="run")
        began = time.perf_counter()
        trained = train(config, show=False)
        seconds = time.perf_counter() - began
        run = open_run(trained.folder, num_devices=1)
        _, trees = load_params(run)
        drawn, greedy = (played(run, trees, row, how) for how in (False, True))
        abroad = in_gymnasium(run, trees[0]) if row.env in IN_GYMNASIUM else None
        random = at_random(run, row)
    steps = trained.metrics["env_steps"][-config.num_seeds :]
    means = [x["mean"] for x in drawn]
    return {
        "env": row.env,
        "algorithm": row.algorithm,
        "note": row.note,
        "bar": row.bar,
        "most": row.most,
        "episodes": row.episodes,
        "env_steps": int(np.mean(steps)),
        "seconds": seconds,
        "num_seeds": config.num_seeds,
        "drawn": means,
        "greedy": [x["mean"] for x in greedy],
        "gymnasium": abroad,
        "before": random,
        "met": met(row, means),
    }


def settings(row: Row) -> TrainConfig:
    """The pair's own settings, with what the row changes, for five seeds."""
    config = tuned(row.env, row.algorithm)
    policy = dataclasses.replace(config.policy, **row.policy)
    return dataclasses.replace(
        config,
        policy=policy,
        num_seeds=NUM_SEEDS,
        eval_episodes=0,
        checkpoint_every=config.num_updates,
    )


def met(row: Row, means: list[float]) -> int | None:
    """How many seeds meet the bar."""
    if row.bar is None:
        return None
    if row.most:
        return sum(mean <= row.bar for mean in means)
    return sum(mean >= row.bar for mean in means)


def played(run: Any, trees: list, row: Row, greedy: bool) -> list[dict[str, float]]:
    play = make_evaluator(run.env, run.policy, row.episodes, greedy=greedy)
    keys = jax.random.split(jax.random.key(0xE7A1), len(trees))
    return [summarize(play(p, k)) for p, k in zip(trees, keys, strict=True)]


def at_random(run: Any, row: Row) -> float:
    """The untrained policy, whose actions are nearly uniform (or of first scale)."""
    play = make_evaluator(run.env, run.policy, row.episodes)
    key = jax.random.key(1)
    params = run.policy.init(key, run.env.reset(key)[1])
    return summarize(play(params, key))["mean"]


def in_gymnasium(run: Any, params: Any) -> float:
    """The first seed's policy in the real world of the same name, actions drawn."""
    results = evaluate_in_gymnasium(run.env.name, run.policy, params, 0, 100)
    return summarize(results)["mean"]


def store(row: Row, result: dict[str, Any]) -> None:
    try:
        rows = timing.load(RESULT)["rows"]
    except FileNotFoundError:
        rows = {}
    rows = rows | {row.label: result}
    ordered = {r.label: rows[r.label] for r in ROWS if r.label in rows}
    timing.save(RESULT, {"needed": NEEDED, "rows": ordered})


def describe(row: Row, result: dict[str, Any]) -> str:
    means = ", ".join(f"{x:.1f}" for x in result["drawn"])
    verdict = "reported" if row.bar is None else f"{result['met']}/{NUM_SEEDS} met"
    return (
        f"{row.label}: {verdict}; drawn {means}; {result['env_steps']} steps a seed, "
        f"{result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
