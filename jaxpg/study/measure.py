r"""Batch gradients of many estimators, from trajectories that all of them share.

    gradients[k, e] = estimator e on batch k of N trajectories,     k = 0 .. K - 1

Every batch is weighed by its own statistics, so what is measured is the estimator as it
is used, own error of its baseline included, and never a variance divided by N.

Batches that fit into a chunk are weighed whole. Larger ones are visited twice, as in
`jaxpg.streams`: sums over all their chunks first, then each chunk weighed with them.
All weightings of a chunk share one forward pass.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxpg.chunks import Chunks
from jaxpg.credit import Credit
from jaxpg.estimators import (
    Estimator,
    EstimatorConfig,
    estimate_credit,
    estimate_gradient,
    estimate_terms,
    estimate_weights,
    make_estimator,
    summarize_batch,
)
from jaxpg.gradients import score_gradients
from jaxpg.optimal import with_squares
from jaxpg.study.sampling import Sampler
from jaxpg.study.subjects import Subject
from jaxpg.train.sharding import Placement
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "Contender",
    "Measured",
    "chunk_of",
    "fit_contenders",
    "make_contenders",
    "measure_batches",
    "why_not",
]

FITS = 10
"""Batches that learned baselines are fitted to, before and apart from the study's."""

Advance = Callable[[int], None]

Kept = dict[tuple[Any, ...], PyTree]
"""Sums over a chunk, by estimators and chunk: a larger batch's are sums of them."""


class Contender(NamedTuple):
    """An estimator that takes part.

    Attributes:
        name: from `estimator_name`.
        estimator: the estimator.
        state: what its baseline has learned.
    """

    name: str
    estimator: Estimator
    state: PyTree

    @property
    def is_off_policy(self) -> bool:
        """Whether it looks at the behaviour policy's trajectories."""
        return self.estimator.config.credit.ratio != "none"

    @property
    def divides(self) -> bool:
        """Whether weights are divided by a statistic of the whole batch's weights."""
        config = self.estimator.config
        return config.standardize or config.credit.self_normalize


class Measured(NamedTuple):
    """What K batches gave.

    Attributes:
        gradients: by estimator, [K, D], float32 or wider.
        ess: by estimator with ratios, [K]: the effective share of decisions, in (0, 1].
    """

    gradients: dict[str, np.ndarray]
    ess: dict[str, np.ndarray]


def make_contenders(
    subject: Subject, configs: dict[str, EstimatorConfig]
) -> list[Contender]:
    """Estimators for a subject; baselines that learn have learned nothing yet.

    Args:
        subject: the policy and its world.
        configs: settings by name.
    """
    obs = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(subject.env.reset, jax.random.key(0))[1],
    )

    def make(name: str, config: EstimatorConfig) -> Contender:
        estimator = make_estimator(
            config,
            subject.policy,
            subject.max_steps,
            observation_space=subject.env.observation_space,
        )
        return Contender(
            name, estimator, estimator.baseline.init(jax.random.key(0), obs)
        )

    return [make(name, config) for name, config in configs.items()]


def fit_contenders(
    contenders: list[Contender], subject: Subject, sampler: Sampler
) -> list[Contender]:
    """Let baselines that learn from earlier batches see some, which nothing else sees.

    Args:
        contenders: those that learn nothing stay as they are.
        subject: the policy and its world.
        sampler: of trajectories with a key of their own.
    """

    def fitted(contender: Contender) -> Contender:
        if not jax.tree.leaves(contender.state):
            return contender

        @jax.jit
        def fit(state: PyTree, rows: Trajectory) -> PyTree:
            credit = estimate_credit(contender.estimator, subject.params, rows)
            return contender.estimator.baseline.fit(state, rows, credit)[0]

        state, length = contender.state, sampler.longest(range(FITS))
        for index in range(FITS):
            state = fit(state, sampler.rows(index, length))
        return contender._replace(state=state)

    return [fitted(contender) for contender in contenders]


def chunk_of(chunk_size: int, placement: Placement) -> int:
    """Trajectories that are sampled together, on all devices."""
    return chunk_size * placement.num_devices


def why_not(contender: Contender, batch_size: int, chunk_size: int) -> str | None:
    """Why an estimator cannot be measured at a batch size; None where it can.

    Args:
        contender: the estimator.
        batch_size: N.
        chunk_size: trajectories that one device holds at once.

    """
    least = contender.estimator.min_trajectories
    if batch_size < least:
        return f"{contender.name} needs batches of at least {least}"
    if contender.divides and batch_size > chunk_size:
        return (
            f"{contender.name} divides by a statistic of all weights of a batch, which "
            f"chunks cannot add up; it is measured up to N = {chunk_size} "
            "(--chunk-size)"
        )
    return None


def measure_batches(
    contenders: list[Contender],
    subject: Subject,
    sampler: Sampler,
    placement: Placement,
    batch_size: int,
    num_batches: int,
    advance: Advance = lambda trajectories: None,
    parts: int | None = None,
    kept: Kept | None = None,
) -> Measured:
    """Gradients of K independent batches of N trajectories.

    Args:
        contenders: all on policy, or all with ratios.
        subject: the policy that is differentiated.
        sampler: of whoever acts.
        placement: how trajectories are spread over devices.
        batch_size: N, a power of two like the sampler's chunk.
        num_batches: K.
        advance: told of trajectories that are done.
        parts: keep means over this many equal parts of the batches alone, in place of
            all K, where gradients are large; None keeps every one.
        kept: sums over chunks, which serve batches of every size; filled here.

    Returns:
        Flat gradients, and effective sample sizes.
    """
    gathered = _Gathered(parts)
    measure = _within_chunks if _fits(batch_size, sampler, placement) else _over_chunks
    kept = {} if kept is None else kept
    for found in measure(
        contenders, subject, sampler, placement, batch_size, num_batches, kept
    ):
        gathered.add(*found)
        advance(len(found[0]) * batch_size)
    gradients, reaches = gathered.all()
    return Measured(
        {c.name: gradients[:, i] for i, c in enumerate(contenders)},
        {
            c.name: _effective_share(reaches[:, i])
            for i, c in enumerate(contenders)
            if c.is_off_policy
        },
    )


Pair = tuple[np.ndarray, np.ndarray]


class _Gathered:
    """Batches' gradients as they come: all of them, or means over runs of them."""

    def __init__(self, runs: int | None) -> None:
        self._size = runs
        self._found: list[Pair] = []

    def add(self, gradients: np.ndarray, reaches: np.ndarray) -> None:
        if self._size is not None:
            gradients = gradients.astype(np.float64).mean(axis=0)[None]
            reaches = reaches.astype(np.float64).mean(axis=0)[None]
        self._found.append((gradients, reaches))

    def all(self) -> Pair:
        gradients, reaches = (np.concatenate(x) for x in zip(*self._found, strict=True))
        if self._size is None:
            return gradients, reaches
        runs = [
            [np.mean(x, axis=0) for x in np.array_split(y, min(self._size, len(y)))]
            for y in (gradients, reaches)
        ]
        return np.stack(runs[0]), np.stack(runs[1])


def _fits(batch_size: int, sampler: Sampler, placement: Placement) -> bool:
    """Whether batches lie within one device's share of a chunk."""
    return batch_size <= sampler.chunk_size // placement.num_devices


def _within_chunks(
    contenders: list[Contender],
    subject: Subject,
    sampler: Sampler,
    placement: Placement,
    batch_size: int,
    num_batches: int,
    kept: Kept,
) -> Iterator[Pair]:
    """Several whole batches in a chunk, one after another."""
    del kept
    estimators, states = _split(contenders)

    def of_rows(shared: Any, rows: Trajectory) -> Any:
        params, states = shared
        batches = jax.tree.map(lambda x: x.reshape(-1, batch_size, *x.shape[1:]), rows)

        def of_batch(batch: Trajectory) -> Any:
            summaries = [None] * len(estimators)
            total, reach = _sums(estimators, params, states, batch, summaries)
            return total / batch_size, reach

        return jax.lax.map(of_batch, batches)

    run = jax.jit(lambda *x: placement.map_rows(of_rows, *x))
    chunks = range(-(-num_batches * batch_size // sampler.chunk_size))
    length = sampler.longest(chunks)
    left = num_batches
    for index in chunks:
        found = run((subject.params, states), sampler.rows(index, length))
        gradients, reaches = (np.asarray(x)[:left] for x in found)
        left -= len(gradients)
        yield gradients, reaches


def _over_chunks(
    contenders: list[Contender],
    subject: Subject,
    sampler: Sampler,
    placement: Placement,
    batch_size: int,
    num_batches: int,
    kept: Kept,
) -> Iterator[Pair]:
    """One batch of several chunks: sums of all of them, then each one's part."""
    estimators, states = _split(contenders)

    def summarize(params: Params, rows: Trajectory) -> Any:
        found = [summarize_batch(e, params, rows) for e in estimators]
        return jax.tree.map(lambda x: x[None], found)

    def of_rows(shared: Any, rows: Trajectory) -> Any:
        params, states, summaries = shared
        found = _sums(estimators, params, states, rows, summaries)
        return jax.tree.map(lambda x: x[None], found)

    # Devices' parts are added on the host: with collectives, programs that wait for one
    # another in a queue can lock each other out on two CPU devices.
    first = jax.jit(lambda *x: placement.map_rows(summarize, *x))
    second = jax.jit(lambda *x: placement.map_rows(of_rows, *x))
    names = tuple(contender.name for contender in contenders)

    def summary(index: int) -> PyTree:
        if (names, index) not in kept:
            found = [first(subject.params, part) for part in sampler.parts(index)]
            kept[names, index] = jax.tree.map(
                lambda x, y: x.astype(y.dtype), _total(found), found[0]
            )
        return kept[names, index]

    per_batch = max(1, batch_size // sampler.chunk_size)
    needs_batch = any(e.needs_batch for e in estimators)
    for batch in range(num_batches):
        chunks = range(batch * per_batch, (batch + 1) * per_batch)
        summaries: Any = [()] * len(estimators)
        if needs_batch:
            summaries = functools.reduce(_plus, (summary(i) for i in chunks))
        shared = (subject.params, states, summaries)
        total, reach = _total(
            second(shared, part) for i in chunks for part in sampler.parts(i)
        )
        yield (total / batch_size)[None], reach[None]


def _sums(
    estimators: list[Estimator],
    params: Params,
    states: list[PyTree],
    rows: Trajectory,
    summaries: list[Any],
) -> tuple[Array, Array]:
    """Each estimator's sum of terms, [E, D], and its sums of reach, [E, 3]."""
    together = list(zip(estimators, states, summaries, strict=True))
    plain = [i for i, e in enumerate(estimators) if not e.is_per_parameter]
    found: dict[int, Array] = {}
    if plain:
        weights = jnp.stack(
            [
                estimate_weights(e, params, state, rows, summary=summary)
                for e, state, summary in (together[i] for i in plain)
            ]
        )
        cut = all(e.cut_rows for e in estimators)
        totals = score_gradients(
            estimators[0].log_prob_fn,
            params,
            rows,
            weights,
            num_trajectories=1,
            chunks=Chunks("auto", cut_rows=cut),
        )
        flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(totals)
        found |= {i: flat[k] for k, i in enumerate(plain)}
    for i, (e, state, summary) in enumerate(together):
        if e.is_per_parameter:
            terms = estimate_terms(e, params, state, rows, summary=summary)
            total = jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)
            found[i] = ravel_pytree(total)[0]
    reach = [_reach_sums(e, params, rows) for e in estimators]
    return jnp.stack([found[i] for i in range(len(estimators))]), jnp.stack(reach)


def _reach_sums(estimator: Estimator, params: Params, rows: Trajectory) -> Array:
    """Sums of the ratios that stand on decisions, of their squares, and of ones."""
    count = jnp.sum(rows.mask).astype(rows.reward.dtype)
    if estimator.config.credit.ratio == "none":
        return jnp.stack([count, count, count])
    credit: Credit = with_squares(estimate_credit(estimator, params, rows))
    reach = jnp.where(rows.mask, credit.reach, 0.0)
    return jnp.stack([jnp.sum(reach), jnp.sum(reach**2), count])


def _effective_share(sums: np.ndarray) -> np.ndarray:
    """(sum w)^2 / (n sum w^2), [K]."""
    total, squares, count = np.asarray(sums, np.float64).T
    return total**2 / np.maximum(squares * count, 1e-300)


def _split(contenders: list[Contender]) -> tuple[list[Estimator], list[PyTree]]:
    return [c.estimator for c in contenders], [c.state for c in contenders]


def _total(parts: Iterable[PyTree]) -> PyTree:
    """The sum over chunks and devices, in float64: a thousand of them keep digits."""

    def on_the_host(part: PyTree) -> PyTree:
        return jax.tree.map(lambda x: np.asarray(x, np.float64).sum(axis=0), part)

    return functools.reduce(_plus, map(on_the_host, parts))


def _plus(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(operator.add, one, other)


def gradient_seconds(
    contender: Contender, subject: Subject, rows: Trajectory
) -> Callable[[], Any]:
    """One gradient of rows in memory, compiled, to be timed."""
    run = jax.jit(
        lambda params, state, rows: estimate_gradient(
            contender.estimator, params, state, rows, chunks=Chunks("auto")
        )
    )
    here = jax.device_put((subject.params, contender.state, rows), jax.devices()[0])
    return lambda: run(*here)


def keys_of(seed: int) -> tuple[PRNGKey, ...]:
    """Keys of the trajectories, the reference, the fits, the drift and the KL."""
    return tuple(jax.random.split(jax.random.key(seed), 5))
