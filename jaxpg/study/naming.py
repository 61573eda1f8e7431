r"""Estimators by name: CREDIT/BASELINE/RATIO, with the words of the API.

    reward-to-go/leave-one-out            leave-one-out        (the same, shorter)
    total-return/none                     total-return
    reward-to-go/none/causal              causal
    reward-to-go/none/first-order/max-rho=2
    reward-to-go/none/standardize

The three parts are told apart by their words, so any of them may be left out: credit is
reward-to-go then, baseline and ratio are none. What is left are modifiers:
`standardize`, `self-normalize`, `max-rho=NUMBER`.
"""

from typing import Any

from jaxpg._checks import nearest
from jaxpg.credit import CREDITS, RATIOS, CreditConfig
from jaxpg.estimators import BASELINES, EstimatorConfig

__all__ = [
    "ALL_ON_POLICY",
    "ON_POLICY",
    "RATIO_FORMS",
    "estimator_name",
    "expand_names",
    "parse_estimator",
]

ON_POLICY = (
    "total-return/none",
    "reward-to-go/none",
    "reward-to-go/batch-mean",
    "reward-to-go/leave-one-out",
    "reward-to-go/time-dependent",
    "reward-to-go/optimal",
    "reward-to-go/optimal-time",
    "reward-to-go/per-parameter",
)
"""What a study looks at unless it is told otherwise."""

ALL_ON_POLICY = (
    "total-return/none",
    "total-return/leave-one-out",
    *(f"reward-to-go/{name}" for name in BASELINES),
    "reward-to-go/none/standardize",
)
"""Every baseline, the biased ones included."""

RATIO_FORMS = (
    "total-return/none/whole",
    "reward-to-go/none/whole",
    *(f"reward-to-go/none/{name}" for name in RATIOS if name not in ("none", "whole")),
    "reward-to-go/none/causal/max-rho=1.5",
    "reward-to-go/none/causal/self-normalize",
)
"""Every form of importance ratios, and what tames the causal one."""

GROUPS = {"default": ON_POLICY, "all": ALL_ON_POLICY, "ratios": RATIO_FORMS}

FLAGS = {"standardize": "standardize", "self-normalize": "self_normalize"}


def parse_estimator(name: str, discount: float = 1.0) -> EstimatorConfig:
    """The settings that a name stands for.

    Args:
        name: credit, baseline, ratio and modifiers, in any order, with "/" between.
        discount: of the objective; below 1 reward-to-go keeps the leading discount, so
            that it estimates the gradient of the discounted return.

    Raises:
        ValueError: if a word is unknown, or the parts do not go together.

    >>> parse_estimator("causal").credit.ratio
    'causal'
    """
    credit: dict[str, Any] = {"discount": discount}
    settings: dict[str, Any] = {"baseline": "none"}
    for word in name.split("/"):
        if word == "none":
            continue
        if word in CREDITS:
            credit["credit"] = word
        elif word in BASELINES:
            settings["baseline"] = word
        elif word in RATIOS:
            credit["ratio"] = word
        elif word == "standardize":
            settings["standardize"] = True
        elif word == "self-normalize":
            credit["self_normalize"] = True
        else:
            credit["max_rho"] = _max_rho(word, name)
    if discount < 1.0 and credit.get("credit", "reward-to-go") == "reward-to-go":
        credit["keep_leading_discount"] = True
    return EstimatorConfig(credit=CreditConfig(**credit), **settings)


def estimator_name(config: EstimatorConfig) -> str:
    """The name of some settings; `parse_estimator` is its inverse.

    Args:
        config: settings of an estimator.

    >>> estimator_name(parse_estimator("leave-one-out"))
    'reward-to-go/leave-one-out'
    """
    credit = config.credit
    words: list[str] = [credit.credit, config.baseline]
    words += [] if credit.ratio == "none" else [credit.ratio]
    words += [] if credit.max_rho is None else [f"max-rho={credit.max_rho:g}"]
    words += [
        word
        for word, field in FLAGS.items()
        if getattr(config, field, False) or getattr(credit, field, False)
    ]
    return "/".join(words)


def expand_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Full names without repetition; "default", "all" and "ratios" stand for several.

    Args:
        names: of estimators or of groups of them.

    Raises:
        ValueError: if a name is unknown or there is none.
    """
    if not names:
        raise ValueError(
            f"estimators is empty, needs at least one name; {_choices('')}"
        )
    each = [inner for name in names for inner in GROUPS.get(name, (name,))]
    return tuple(dict.fromkeys(estimator_name(parse_estimator(x)) for x in each))


def _max_rho(word: str, name: str) -> float:
    key, _, value = word.partition("=")
    try:
        if key == "max-rho":
            return float(value)
    except ValueError:
        pass
    raise ValueError(f"estimator is {name!r}: {word!r} is unknown; {_choices(word)}")


def _choices(word: str) -> str:
    baselines = [name for name in BASELINES if name != "none"]
    ratios = [name for name in RATIOS if name != "none"]
    known = [*CREDITS, *baselines, *ratios, *FLAGS, *GROUPS]
    meant = nearest(word, known) + " " if word and "=" not in word else ""
    return (
        f"{meant if meant.startswith('did') else ''}a name is CREDIT/BASELINE/RATIO of "
        f"credits {', '.join(CREDITS)}; baselines none, {', '.join(baselines)}; ratios "
        f"none, {', '.join(ratios)}; and standardize, self-normalize, max-rho=NUMBER; "
        f"or one of {', '.join(GROUPS)}"
    )
