"""`jaxpg eval`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxpg._checks import check_positive
from jaxpg.cli.process import use_compilation_cache
from jaxpg.cli.systems import evaluate_system
from jaxpg.cli.words import parse
from jaxpg.systems.runs import is_system_run

__all__ = ["EvalOptions", "eval_command"]

EVALUATION = 0xE7A1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate a trained policy on whole episodes; the last line is 'mean NUMBER'."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, as printed by training."""
    episodes: int = 1000
    """Episodes, for each seed of the run."""
    greedy: bool = False
    """Take the policy's mode instead of drawing from it."""
    gymnasium: bool = False
    """Evaluate in the real Gymnasium environment of the same name, on the CPU."""
    checkpoint: str = "latest"
    """Which checkpoint: latest, the number of an update, or best: the one whose last
    update was made from the batch with the highest mean return."""
    seed: int = 0
    """Random seed of the evaluation."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder: the next start is faster."""

    def __post_init__(self) -> None:
        check_positive("episodes", self.episodes)


def eval_command(words: list[str]) -> int:
    """Evaluate a run."""
    options = parse(EvalOptions, words, "jaxpg eval")
    if options.compilation_cache:
        use_compilation_cache()
    from jaxpg.train.evaluate import summarize
    from jaxpg.train.progress import table

    if is_system_run(options.run):
        return evaluate_system(options.run, options.checkpoint)
    from jaxpg.train.run import load_params, open_run

    run = open_run(options.run, num_devices=1)
    update, trees = load_params(run, options.checkpoint)
    play = _make_player(run, options)
    rows = [
        member | summarize(play(params, index))
        for index, (member, params) in enumerate(
            zip(run.config.members(), trees, strict=True)
        )
    ]
    where = "Gymnasium's" if options.gymnasium else "jaxpg's"
    how = "greedy" if options.greedy else "drawn"
    table(f"{where} {run.env.name}, update {update}, actions {how}", rows)
    print(f"mean {sum(row['mean'] for row in rows) / len(rows):.2f}")
    return 0


def _make_player(run: Any, options: EvalOptions) -> Callable[[Any, int], Any]:
    """`play(params, index) -> EpisodeResults` of the seed at that index."""
    import jax

    from jaxpg.train.evaluate import evaluate_in_gymnasium, make_evaluator

    if options.gymnasium:
        return lambda params, index: evaluate_in_gymnasium(
            run.env.name,
            run.policy,
            params,
            options.seed + index,
            options.episodes,
            greedy=options.greedy,
            max_steps=run.config.max_steps,
        )
    play = make_evaluator(run.env, run.policy, options.episodes, greedy=options.greedy)
    # Away from the keys that training with the same seed derives.
    key = jax.random.fold_in(jax.random.key(options.seed), EVALUATION)
    return lambda params, index: play(params, jax.random.fold_in(key, index))
