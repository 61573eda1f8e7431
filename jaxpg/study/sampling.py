"""Trajectories of a study: each sampled once, and shown to every estimator.

Trajectory i is a pure function of (params, key, i). Batches of N are disjoint ranges of
numbers, and batches of different N are ranges of the same numbers, so that all
estimators at all sizes see the same luck (common random numbers). Chunks are kept while
memory lasts, and played again, to the bit, where it does not.

Rows are cut behind the last decision of any of them, at a power of two times 16, so
that little is computed for nothing and few programs are compiled. For sums over rows,
which do not mind their order, a chunk comes in parts of rows of similar lengths: most
episodes are much shorter than the longest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpg.rollout import rollout_episodes
from jaxpg.study.subjects import Subject
from jaxpg.train.sharding import Placement
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = ["Sampler", "Seen", "cut_length"]

SHORTEST = 16


class Seen(NamedTuple):
    """What the trajectories of a chunk were like.

    Attributes:
        length: decisions of the longest, rounded up as rows are cut.
        decisions: of all together.
        total_return: undiscounted, of all together.
    """

    length: int
    decisions: int
    total_return: float


class Sampler:
    """Chunks of trajectories by number, with a memory of some bytes."""

    def __init__(
        self,
        subject: Subject,
        acting: Params,
        key: PRNGKey,
        chunk_size: int,
        placement: Placement,
        memory_bytes: int,
    ) -> None:
        self.chunk_size = chunk_size
        self.seen: dict[int, Seen] = {}
        self._kept: dict[int, Trajectory] = {}
        self._parts: dict[int, list[Trajectory]] = {}
        self._left = memory_bytes
        self._num_parts = _most_parts(chunk_size, placement.num_devices)
        self._max_steps = subject.max_steps

        def play(shared: tuple[Params, PRNGKey], ids: Array) -> PyTree:
            params, key = shared
            rows = rollout_episodes(subject.env, subject.policy, params, key, ids)
            each = jnp.sum(jnp.where(rows.mask, rows.reward, 0.0), axis=1)
            return rows, jnp.sum(rows.mask, axis=1, dtype=jnp.int32), each

        @jax.jit
        def sample(first: Array) -> tuple[Trajectory, Array, Array]:
            ids = first + jnp.arange(chunk_size, dtype=jnp.int32)
            return placement.map_rows(play, (acting, key), ids)

        self._sample = sample

    def rows(self, index: int, length: int | None = None) -> Trajectory:
        """Trajectories index * C to (index + 1) * C - 1.

        Args:
            index: which chunk.
            length: slots of each row, at least as many as are needed; None for that.
        """
        if index in self._kept:
            rows = self._kept[index]
        else:
            rows = self._play(index)
            self._keep(index, rows)
        return rows if length is None else _stretched(rows, length)

    def _play(self, index: int) -> Trajectory:
        rows, lengths, returns = self.again(index)
        seen = _see(lengths, returns, self._max_steps)
        self.seen[index] = seen
        return jax.tree.map(lambda x: x[:, : seen.length], rows)

    def parts(self, index: int) -> list[Trajectory]:
        """The same trajectories in parts of equal size, each of similar lengths.

        Args:
            index: which chunk.
        """
        if index in self._parts:
            return self._parts[index]
        rows = jax.tree.map(np.asarray, self._play(index))
        lengths = rows.mask.sum(axis=1)
        shares = np.split(np.argsort(lengths, kind="stable"), self._num_parts)
        parts = [_taken(rows, s, lengths, self._max_steps) for s in shares]
        size = sum(x.nbytes for x in jax.tree.leaves(parts))
        if size <= self._left:
            self._parts[index] = parts
            self._left -= size
        return parts

    def longest(self, indices: range) -> int:
        """Slots that hold every trajectory of these chunks; samples what is new."""
        return max(self.look(index).length for index in indices)

    def look(self, index: int) -> Seen:
        """What a chunk's trajectories were like; samples it where it is new."""
        if index not in self.seen:
            self.rows(index)
        return self.seen[index]

    def again(self, index: int) -> Any:
        """Sample a chunk anew, to be timed."""
        return self._sample(jnp.asarray(index * self.chunk_size, jnp.int32))

    def statistics(self) -> dict[str, float]:
        """Mean return and length of all trajectories so far."""
        number = len(self.seen) * self.chunk_size
        seen = self.seen.values()
        return {
            "trajectories": number,
            "decisions": sum(x.decisions for x in seen),
            "mean_return": sum(x.total_return for x in seen) / number,
            "mean_length": sum(x.decisions for x in seen) / number,
        }

    def _keep(self, index: int, rows: Trajectory) -> None:
        size = sum(x.nbytes for x in jax.tree.leaves(rows))
        if size <= self._left:
            self._kept[index] = rows
            self._left -= size


def cut_length(longest: int, max_steps: int) -> int:
    """Slots for rows of at most `longest` decisions.

    >>> cut_length(3, 500), cut_length(40, 500), cut_length(300, 500)
    (16, 64, 500)
    """
    length = SHORTEST
    while length < longest:
        length *= 2
    return min(length, max_steps)


def _most_parts(chunk_size: int, num_devices: int) -> int:
    """Parts of at least 16 rows a device, at most 8."""
    return max(1, min(8, chunk_size // (16 * num_devices)))


def _taken(
    rows: Trajectory, which: np.ndarray, lengths: np.ndarray, max_steps: int
) -> Trajectory:
    """Some of the rows, cut behind the longest of them."""
    longest = cut_length(int(lengths[which].max()), max_steps)
    return jax.tree.map(lambda x: x[which, :longest], rows)


def _see(lengths: Any, returns: Any, max_steps: int) -> Seen:
    lengths, returns = np.asarray(lengths), np.asarray(returns, np.float64)
    cut = cut_length(int(lengths.max()), max_steps)
    return Seen(cut, int(lengths.sum()), float(returns.sum()))


def _stretched(rows: Trajectory, length: int) -> Trajectory:
    """The rows with empty slots behind them; what stands there counts nothing."""
    missing = length - rows.mask.shape[1]
    if missing == 0:
        return rows

    def stretch(x: Array) -> Array:
        last = x[:, -1:]
        return jnp.concatenate([x, jnp.repeat(last, missing, axis=1)], axis=1)

    longer = jax.tree.map(stretch, rows)
    real = jnp.arange(length) < rows.mask.shape[1]
    return longer._replace(mask=longer.mask & real[None])
