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
    score        score_function: unbiased, any graph, any order
    enumeration  exact_expectation: the oracle

A program describes one datum; `jax.vmap` the operator over data. Each file imports only
earlier ones.
"""

from jaxpg.stochastic.enumeration import exact_expectation
from jaxpg.stochastic.execution import RETURNED, Program
from jaxpg.stochastic.nodes import cost, sample
from jaxpg.stochastic.score import Loss, Report, score_function

__all__ = [
    "RETURNED",
    "Loss",
    "Program",
    "Report",
    "cost",
    "exact_expectation",
    "sample",
    "score_function",
]
