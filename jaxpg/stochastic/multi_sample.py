"""VIMCO: the multi-sample bound, each sample weighed against the others.

    L = log 1/K sum_k w[k],     log w[k] = -C[k]

where C is the program's cost, for a variational bound log q(z|x) - log p(x, z). With
one sample L is the evidence's lower bound, and with more it comes nearer to log p(x).
A sample is credited with what it adds to L above what the others would have made of it,
their geometric mean in its place:

    signal[k] = L - log 1/K (sum_{j != k} w[j] + exp(1/(K-1) sum_{j != k} log w[j]))

References: Burda, Grosse and Salakhutdinov 2016, "Importance weighted autoencoders";
Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives".
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpg.stochastic.execution import Program, Record, execute, trace
from jaxpg.stochastic.score import Loss, Report, report_of
from jaxpg.stochastic.surrogates import Signals, mean_of_others, signals_of
from jaxpg.types import Params, PRNGKey, PyTree

__all__ = ["bound_with_scores", "multi_sample_bound", "vimco"]


def multi_sample_bound(costs: Float[Array, " K"]) -> Float[Array, ""]:
    """log 1/K sum_k exp(-costs[k]), in nats.

    Args:
        costs: of K independent runs, log q(z|x) - log p(x, z).

    Returns:
        A lower bound of log p(x), nearer to it the larger K is.

    Bias: low for log p(x), by O(1/K).

    Reference: Burda et al. 2016, equation 8.

    >>> round(float(multi_sample_bound(jnp.array([1.0, 1.0]))), 4)
    -1.0
    """
    return jax.nn.logsumexp(-costs) - math.log(costs.shape[0])


def vimco(program: Program, *, num_samples: int, has_aux: bool = False) -> Loss:
    """Lower minus the multi-sample bound of a program's cost.

        loss = -L,     with sum_k signal[k] grad log p(z[k]) in the derivative of L

    Args:
        program: as for `score_function`; its cost is log q(z|x) - log p(x, z). All of
            its nodes are credited with all of it.
        num_samples: K, at least 2.
        has_aux: whether it returns `(cost, output)`.

    Returns:
        `loss(params, key, *inputs) -> (-L, report)`, the report with K in front.
        Baselines of the program's own are not used: the others are the baseline.

    Raises:
        ValueError: if there are fewer than two samples.

    Bias: unbiased for the derivative of -E[L].

    Reference: Mnih and Rezende 2016, equations 9 and 10.

    >>> from jaxpg.distributions import Bernoulli
    >>> from jaxpg.stochastic import sample
    >>> def program(logit, key):  # q's bit against p = 0.5, likelihood exp(bit)
    ...     q = Bernoulli(logit[None])
    ...     bit = sample(key, q)
    ...     return q.log_prob(bit) + jnp.log(2.0) - bit[0].astype(logit.dtype)
    >>> bound, _ = vimco(program, num_samples=1000)(jnp.array(0.0), jax.random.key(0))
    >>> abs(-bound.item() - jnp.log((1 + jnp.e) / 2).item()) < 0.05
    True
    """
    if num_samples < 2:
        raise ValueError(
            f"num_samples is {num_samples}, needs at least 2, because the others are a "
            "sample's baseline; for one sample use score_function"
        )

    def loss(
        params: Params, key: PRNGKey, *inputs: PyTree
    ) -> tuple[Float[Array, ""], Report]:
        traced = trace(program, params, key, inputs, has_aux=has_aux)

        def run(key: PRNGKey) -> tuple[Record, Signals, Array, Array]:
            record = execute(traced, params, key, inputs)
            signals = signals_of(traced.graph, record)
            log_probs = [jnp.sum(node.log_prob) for node in record.nodes.values()]
            return record, signals, record.total, sum(log_probs, jnp.zeros(()))

        keys = jax.random.split(key, num_samples)
        record, signals, costs, log_probs = jax.vmap(run)(keys)
        return bound_with_scores(costs, log_probs), report_of(record, signals)

    return loss


def bound_with_scores(
    costs: Float[Array, " K"], log_probs: Float[Array, " K"]
) -> Float[Array, ""]:
    """Minus the bound, with each sample's signal on its score in the derivative.

    Args:
        costs: of K independent runs.
        log_probs: of all that each of them drew, in nats.

    Returns:
        -L.

    Bias: first derivative unbiased for that of -E[L].
    """
    signal = jax.lax.stop_gradient(_above_the_others(-costs))
    score = jnp.sum(signal * (log_probs - jax.lax.stop_gradient(log_probs)))
    return -multi_sample_bound(costs) - score


def _above_the_others(log_weights: Float[Array, " K"]) -> Float[Array, " K"]:
    number = log_weights.shape[0]
    own = jnp.eye(number, dtype=bool)
    replaced = jnp.where(own, mean_of_others(log_weights), log_weights[None])
    return jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(replaced, axis=1)
