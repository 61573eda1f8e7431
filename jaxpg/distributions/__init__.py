"""Action distributions: what a policy returns for one observation or for many.

A distribution is a NamedTuple of arrays, so it passes through `jit`, `vmap` and `scan`.
Leading axes `*B` are independent draws; the last axis is the event or its parameters:

    log_prob(a) = log p(a), whose gradient is the score; E[score] = 0
    entropy     = -E[log p(a)],   kl(q) = E[log p(a) - log q(a)],   both over a ~ p

All in nats. Actions and parameters must agree in every leading axis: nothing
broadcasts, because a silent [B, B] is worse than an error.

    base      what every distribution can do
    discrete  Categorical, MultiCategorical, Bernoulli; a logit of -inf masks an action
    one_hot   OneHotCategorical, for draws that are added up or relaxed
    gaussian  DiagonalGaussian, TanhGaussian (in a box), StateDependentGaussian

Each file imports only earlier ones.
"""

from jaxpg.distributions.base import Distribution, entropy_of
from jaxpg.distributions.discrete import Bernoulli, Categorical, MultiCategorical
from jaxpg.distributions.gaussian import (
    DiagonalGaussian,
    StateDependentGaussian,
    TanhGaussian,
)
from jaxpg.distributions.one_hot import OneHotCategorical

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagonalGaussian",
    "Distribution",
    "MultiCategorical",
    "OneHotCategorical",
    "StateDependentGaussian",
    "TanhGaussian",
    "entropy_of",
]
