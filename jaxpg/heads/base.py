"""What a head is."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from jaxpg.distributions import Distribution
from jaxpg.envs.base import Space
from jaxpg.types import Params

__all__ = ["Head"]


class Head(NamedTuple):
    """How raw network outputs become a distribution over one action space.

    Attributes:
        num_outputs: how many raw outputs the network must give.
        init: the head's own parameters, such as a log standard deviation.
        distribution: `distribution(head_params, outputs)`.
        space: the action space that it acts in.
    """

    num_outputs: int
    init: Callable[[], Params]
    distribution: Callable[[Params, Array], Distribution]
    space: Space
