"""Settings of the discrete variational autoencoder, and what does not fit together."""

import dataclasses
import math
from typing import Literal

from jaxpg._checks import check_choice, check_positive, check_range

__all__ = ["ESTIMATORS", "MAX_CODES", "DiscreteVAESettings", "num_codes"]

ESTIMATORS = {
    "score": "the score alone",
    "leave-one-out": "less the mean of the other samples",
    "moving-average": "less a moving average of earlier costs",
    "nvil": "less a learned function of the image, over a moving scale",
    "vimco": "the bound of several samples, each against the others",
    "arm": "antithetic draws, as they come",
    "disarm": "antithetic draws, noise integrated out",
    "rebar": "less a relaxed run, its scale and temperature learned",
    "relax": "less a relaxed run and a learned critic",
    "gumbel-softmax": "through relaxed draws; biased",
    "straight-through": "hard draws, relaxed derivatives; biased",
    "exact": "every code, nothing drawn",
}
"""What each estimator does, by name."""

MAX_CODES = 2**12
"""More codes than these are not enumerated: each is decoded for every image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteVAESettings:
    """A variational autoencoder of handwritten digits with discrete latents."""

    latent: Literal["bernoulli", "categorical"] = "bernoulli"
    """Bits (a sigmoid belief network), or groups of unit vectors."""
    num_layers: int = 1
    """Stochastic layers, one above the other."""
    num_bits: int = 32
    """Bits of each layer, with Bernoulli latents."""
    num_groups: int = 8
    """Unit vectors of each layer, with categorical latents."""
    num_values: int = 8
    """Length of each unit vector, with categorical latents."""
    hidden: int = 64
    """Units of the hidden layer of every network; 0 makes them linear."""
    estimator: Literal[
        "score",
        "leave-one-out",
        "moving-average",
        "nvil",
        "vimco",
        "arm",
        "disarm",
        "rebar",
        "relax",
        "gumbel-softmax",
        "straight-through",
        "exact",
    ] = "leave-one-out"
    """What the gradient of the bound is estimated by. arm and disarm are for bits,
    exact for codes that are few enough to be enumerated."""
    num_samples: int = 6
    """Runs of the model for each image and update. An estimator that needs several runs
    for one sample takes that many samples fewer: disarm 3, rebar 2, of one layer."""
    batch_size: int = 96
    """Images for each update."""
    learning_rate: float = 2e-3
    """Of Adam, for the model."""
    temperature: float = 0.5
    """Of relaxed draws: gumbel-softmax and straight-through; rebar and relax begin with
    it."""
    decay: float = 0.99
    """Of moving-average and nvil, per update."""
    scale: bool = True
    """With nvil: divide by a moving standard deviation, where it is above 1."""
    control_learning_rate: float = 1e-2
    """Of Adam, for what lowers the variance: the baseline of nvil, scale, temperature
    and critic of rebar and relax."""
    evaluation_samples: int = 100
    """Codes for each image of the importance-weighted bound."""

    def __post_init__(self) -> None:
        check_choice("latent", self.latent, ("bernoulli", "categorical"))
        check_choice("estimator", self.estimator, ESTIMATORS)
        counts = ("num_layers", "num_bits", "num_groups", "num_samples", "batch_size")
        for name in (*counts, "evaluation_samples"):
            check_positive(name, getattr(self, name))
        for name in ("learning_rate", "control_learning_rate", "temperature"):
            check_range(name, getattr(self, name), 0.0, open_low=True)
        check_range("decay", self.decay, 0.0, 1.0)
        _check_networks(self)
        _check_estimator(self)


def num_codes(settings: DiscreteVAESettings) -> int:
    """How many codes all layers have together.

    Args:
        settings: of the model.

    Returns:
        Their number.

    >>> num_codes(DiscreteVAESettings(num_bits=3, num_layers=2))
    64
    """
    if settings.latent == "bernoulli":
        each = 2**settings.num_bits
    else:
        each = settings.num_values**settings.num_groups
    return each**settings.num_layers


def _check_networks(settings: DiscreteVAESettings) -> None:
    if settings.num_values < 2:
        raise ValueError(
            f"num_values is {settings.num_values}, needs at least 2: a vector of one "
            "value says nothing; use num_values=2, or latent='bernoulli'"
        )
    if settings.hidden < 0:
        raise ValueError(
            f"hidden is {settings.hidden}, needs a whole number of at least 0; 0 makes "
            "the networks linear"
        )


def _check_estimator(settings: DiscreteVAESettings) -> None:
    name, samples = settings.estimator, settings.num_samples
    if name in ("arm", "disarm") and settings.latent != "bernoulli":
        raise ValueError(
            f"estimator is {name!r} and latent is {settings.latent!r}, needs "
            "latent='bernoulli': it is made for bits; for categorical latents use "
            "'leave-one-out' or 'rebar'"
        )
    if name in ("leave-one-out", "vimco") and samples < 2:
        raise ValueError(
            f"num_samples is {samples} with estimator {name!r}, needs at least 2: a "
            "sample is judged by the others; use 2 or more, or 'moving-average'"
        )
    if name == "exact" and num_codes(settings) > MAX_CODES:
        codes = f"2^{math.log2(num_codes(settings)):.0f}"
        raise ValueError(
            f"estimator is 'exact' and there are {codes} codes, needs at most "
            f"{MAX_CODES} to visit every one; use fewer (num_bits=8, or num_groups=2), "
            "or an estimator that samples"
        )
