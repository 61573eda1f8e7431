"""Settings of hard attention and of the models beside it, and what does not fit."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from jaxpg._checks import check_choice, check_positive, check_range

__all__ = ["Credit", "HardAttentionSettings", "Model"]

Model = Literal["attention", "random-glimpses", "convolutional", "fully-connected"]
Credit = Literal["reward", "likelihood"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardAttentionSettings:
    """Settings of the attention model and of those beside it."""

    model: Model = "attention"
    """What learns: attention, random-glimpses, convolutional or fully-connected."""
    data_dir: Path | None = None
    """Folder with MNIST's four IDX files. Unset: the digits of scikit-learn."""
    canvas: int = 28
    """Height and width of a canvas, in pixels; with MNIST 60 or more."""
    num_pieces: int = 4
    """Pieces of clutter on each canvas."""
    piece: int = 4
    """Height and width of a piece."""
    num_glimpses: int = 4
    """Looks at a canvas, the first at its middle."""
    glimpse: int = 12
    """Height and width of the window, 8 or more."""
    scales: int = 2
    """Squares of the sensor, each twice as wide as the one before."""
    features: int = 128
    """Width of the layers that see."""
    memory: int = 128
    """Width of the core's memory."""
    std: float = 0.1
    """Standard deviation of a place, in half canvases."""
    credit: Credit = "reward"
    """What places are credited with: whether the answer is right ("reward"), or the
    cross-entropy ("likelihood"), which makes one objective of both."""
    credit_weight: float = 1.0
    """Weight of the score-function term beside the cross-entropy, for "reward"."""
    batch_size: int = 64
    """Canvases of an update, all drawn anew."""
    learning_rate: float = 1e-3
    """Of Adam."""
    decay_updates: int = 12000
    """Updates over which the learning rate falls, by a cosine, to a twentieth."""
    spread_updates: int = 1000
    """Updates over which digits spread from the middle of canvases to all of them, so
    that there is something to see before there is somewhere to look; 0: from the first
    on."""
    max_grad_norm: float = 5.0
    """Longer gradients are cut to this norm."""
    placements: int = 4
    """Canvases of each held-out digit when evaluated."""
    held_out: Literal["test", "validation"] = "test"
    """What is evaluated on; "validation" takes a fifth of the training digits out of
    training for it, to choose settings by."""

    def __post_init__(self) -> None:
        check_choice("model", self.model, get_args(Model))
        check_choice("credit", self.credit, get_args(Credit))
        check_choice("held_out", self.held_out, ("test", "validation"))
        for name in ("batch_size", "decay_updates", "placements", "num_glimpses"):
            check_positive(name, getattr(self, name))
        for name in ("num_pieces", "spread_updates"):
            check_range(name, getattr(self, name), 0)
        check_range(
            "glimpse", self.glimpse, 8, cure="two filters of 3 x 3 see through it"
        )
        for name in ("std", "learning_rate", "max_grad_norm"):
            check_range(name, getattr(self, name), 0.0, open_low=True)
        if self.model == "attention" and self.num_glimpses < 2:
            raise ValueError(
                "num_glimpses is 1, needs 2 or more: the first is at the middle, so "
                "there is no place to choose"
            )
