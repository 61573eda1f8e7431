r"""The score-function gradient through any stochastic operation, beyond control.

    d/dtheta E[C] = E[ dC/dtheta + sum_z dlog p(z)/dtheta (Q[z] - b[z]) ]

Mark draws and costs in an ordinary JAX function, and hand it to an operator:

    from jaxpg import stochastic

    def program(params, key, image):
        code = stochastic.sample(key, Bernoulli(encode(params, image)), name="code")
        return -log_likelihood(params, image, code)

    loss = stochastic.score_function(program, num_samples=8, leave_one_out=True)
    gradient, report = jax.grad(loss, has_aux=True)(params, key, image)

    nodes        sample, cost: the marks
    influence    which draw can move which cost, read off the traced program
    execution    a program evaluated with everything on record
    credits      sums along the graph: reward-to-go, histories
    surrogates   what weighs the scores of a run; first order and any order
    score        score_function: unbiased, any graph, any order
    enumeration  exact_expectation: the oracle
    levels       moving averages and learned baselines, NVIL's scale
    multi_sample vimco: many samples, one bound
    noise, reruns  draws made of noise; a program run again on another draw
    antithetic   arm, disarm: two runs on opposite noise
    controls     rebar, relax: a relaxed run as control variate
    relaxation   gumbel_softmax and straight-through, biased, to compare with

A program describes one datum; `jax.vmap` the operator over data. Each file imports only
earlier ones.
"""

from jaxpg.stochastic.antithetic import arm, disarm
from jaxpg.stochastic.controls import (
    DEFAULT_CONTROL,
    rebar,
    relax,
    squared_gradient,
)
from jaxpg.stochastic.enumeration import exact_expectation
from jaxpg.stochastic.execution import RETURNED, Program
from jaxpg.stochastic.levels import LevelBaseline, moving_average, nvil
from jaxpg.stochastic.multi_sample import multi_sample_bound, vimco
from jaxpg.stochastic.nodes import cost, sample
from jaxpg.stochastic.relaxation import gumbel_softmax
from jaxpg.stochastic.score import Loss, Report, score_function

__all__ = [
    "DEFAULT_CONTROL",
    "RETURNED",
    "LevelBaseline",
    "Loss",
    "Program",
    "Report",
    "arm",
    "cost",
    "disarm",
    "exact_expectation",
    "gumbel_softmax",
    "moving_average",
    "multi_sample_bound",
    "nvil",
    "rebar",
    "relax",
    "sample",
    "score_function",
    "squared_gradient",
    "vimco",
]
