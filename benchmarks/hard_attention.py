"""Does it pay to look? Attention beside random glimpses and nets that see everything.

    python benchmarks/hard_attention.py                        everything, over an hour
    python benchmarks/hard_attention.py --models attention     some; others stay stored
    python benchmarks/hard_attention.py --num-updates 20 --num-seeds 1    a trial

All four models learn from fresh canvases of the same training digits, for as many
updates, and answer the same held-out canvases. Settings are the defaults, chosen on a
fifth of the training digits (`--held-out validation`), but for the learning rate of the
nets that see everything, which bear a higher one. Writes results/hard-attention.json,
hard-attention-paths.png and hard-attention-curves.png; a trial writes nothing.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import timing
from matplotlib.figure import Figure

from jaxpg.systems import RunSettings, training
from jaxpg.systems.attention_models import make_learner
from jaxpg.systems.attention_settings import HardAttentionSettings
from jaxpg.systems.canvases import fixed_canvases
from jaxpg.systems.digits import load_digits
from jaxpg.systems.gaze_pictures import paths_figure
from jaxpg.systems.runs import open_run

RESULT = "hard-attention"
MODELS = {
    "convolutional": "#0072B2",
    "attention": "#D55E00",
    "fully-connected": "#009E73",
    "random-glimpses": "#555555",
}
LEARNING_RATES = {"convolutional": 2e-3, "fully-connected": 2e-3}
NUM_UPDATES = 12000
NUM_SEEDS = 5
EVALUATE_EVERY = 500


def main(models: list[str], num_updates: int, num_seeds: int) -> None:
    is_trial = (num_updates, num_seeds) != (NUM_UPDATES, NUM_SEEDS)
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            config = RunSettings(
                num_updates=num_updates,
                num_seeds=num_seeds,
                evaluate_every=min(EVALUATE_EVERY, num_updates),
                checkpoint_every=num_updates,
                runs_dir=Path(folder),
                name=model,
            )
            settings = HardAttentionSettings(
                model=model,
                decay_updates=num_updates,
                learning_rate=learning_rate(model),
            )
            result = training.train("hard-attention", settings, config)
            row = summary(result.evaluation)
            print(model, row, flush=True)
            if not is_trial:
                store(model, row | {"curve": curve(result.metrics)})
                if model == "attention":
                    draw_paths(result.folder)


def learning_rate(model: str) -> float:
    return LEARNING_RATES.get(model, HardAttentionSettings.learning_rate)


def store(model: str, row: dict[str, Any]) -> None:
    """A model's row beside those that are stored, and the picture of all."""
    try:
        table = timing.load(RESULT)["table"]
    except FileNotFoundError:
        table = {}
    table = {name: (table | {model: row}).get(name) for name in MODELS}
    table = {name: row for name, row in table.items() if row is not None}
    asked = {
        "num_updates": NUM_UPDATES,
        "num_seeds": NUM_SEEDS,
        "learning_rates": {name: learning_rate(name) for name in table},
    }
    timing.save(RESULT, {"settings": asked, "table": table})
    draw_curves({name: row["curve"] for name, row in table.items()})


def summary(evaluation: list[dict[str, float]]) -> dict[str, Any]:
    """Accuracy on the held-out canvases over seeds."""
    found = [line["accuracy"] for line in evaluation]
    ends = {"low": min(found), "high": max(found)}
    return {"median": statistics.median(found), **ends, "each": found}


def curve(metrics: dict[str, Any]) -> list[dict[str, float]]:
    """Median and range of the accuracy at each evaluation."""
    accuracy, updates = metrics["eval_accuracy"], metrics["update"]
    rated = sorted({int(u) for u, x in zip(updates, accuracy, strict=True) if x == x})
    return [
        {
            "update": update,
            "median": float(statistics.median(accuracy[updates == update])),
            "low": float(accuracy[updates == update].min()),
            "high": float(accuracy[updates == update].max()),
        }
        for update in rated
    ]


def draw_paths(folder: Path) -> None:
    """Where the first seed looks on held-out canvases."""
    run = open_run(folder)
    _, state = training.load_state(run)
    learner = make_learner(run.settings)
    data = load_digits()
    canvases = fixed_canvases(
        data.test,
        jax.numpy.asarray(data.train.images),
        1,
        seed=7,
        size=run.settings.canvas,
        num_pieces=run.settings.num_pieces,
        piece=run.settings.piece,
    )
    params = jax.tree.map(lambda x: x[0], state["params"])
    figure = paths_figure(
        learner.eye, learner.choose, params, canvases, run.settings.glimpse
    )
    figure.savefig(timing.RESULTS / "hard-attention-paths.png", dpi=110)


def draw_curves(curves: dict[str, list[dict[str, float]]]) -> None:
    """Accuracy on held-out canvases against updates."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for model, points in curves.items():
        x = [point["update"] for point in points]
        low, middle, high = (
            [100 * point[part] for point in points]
            for part in ("low", "median", "high")
        )
        axis.fill_between(x, low, high, color=MODELS[model], alpha=0.2, lw=0)
        axis.plot(x, middle, color=MODELS[model], label=model.replace("-", " "))
    axis.set_xlabel("updates")
    axis.set_ylabel("held-out accuracy (%)\nmedian and range of seeds")
    axis.set_ylim(0, 100)
    axis.legend(loc="lower right", fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(timing.RESULTS / "hard-attention-curves.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--num-updates", type=int, default=NUM_UPDATES)
    parser.add_argument("--num-seeds", type=int, default=NUM_SEEDS)
    main(**vars(parser.parse_args()))
