"""What flows through jaxpg, and the one statement of how it is aligned in time.

Alignment. Index t is always *decision t*: `action[t]` is taken at `obs[t]` with
log-probability `log_prob[t]`, and `reward[t]`, `terminated[t]`, `truncated[t]` and
`next_obs[t]` are what the environment answered to it, before any reset. Nothing is
shifted anywhere else in the library.

Rows and episodes. A `Trajectory` describes one *row* of storage with T slots for
decisions; a batch has B rows in front. A row may hold a part of an episode, one whole
episode, or several one after another. `time[t]` counts the decisions taken since the
episode began, so an episode starts exactly where `time == 0`, and `episode_id` tells
episodes apart across the whole batch. Slots with `mask == False` hold no decision:
their other fields are finite and must not be counted.

Ends. `terminated` says that the task ended (the value of what follows is zero),
`truncated` that somebody stopped the clock (what follows still has value). When both
are true, terminated wins. `ends` is either of them.
"""

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Params", "PRNGKey", "PyTree", "StepOutput", "Trajectory"]

PyTree: TypeAlias = Any
"""Any nesting of arrays that JAX understands."""

Params: TypeAlias = PyTree
"""Parameters of a policy or a baseline: a plain tree of arrays."""

PRNGKey: TypeAlias = Key[Array, ""]
"""One typed key from `jax.random.key`; a function that takes it consumes it."""


class StepOutput(NamedTuple):
    """What an environment answers to one action, before any reset.

    Attributes:
        obs: the observation after the action; at an episode's end its true last one.
        reward: the reward of this action, in the environment's own units.
        terminated: the task ended here.
        truncated: a time limit stopped the episode here.
    """

    obs: PyTree
    reward: Float[Array, "*#B"]
    terminated: Bool[Array, "*#B"]
    truncated: Bool[Array, "*#B"]


class Trajectory(NamedTuple):
    """One row of decisions: facts only, no discount, no values, no advantages.

    Shapes are for one row; a batch has B in front of every leaf.

    Attributes:
        obs: what the policy saw, leaves [T, ...].
        action: what it did, leaves [T, ...].
        log_prob: log-probability of `action` under the behaviour policy, in nats, [T].
        reward: [T].
        terminated: [T].
        truncated: [T].
        mask: whether slot t holds a real decision, [T].
        time: decisions taken since the episode began, 0 at its start, [T].
        episode_id: which episode decision t belongs to, unique in the batch, [T].
        next_obs: the observation after decision t and before any reset, leaves
            [T, ...]; None where the rollout was asked not to keep it.
        carry: the policy's memory before the row's first decision; None without memory.
    """

    obs: PyTree
    action: PyTree
    log_prob: Float[Array, "*B T"]
    reward: Float[Array, "*B T"]
    terminated: Bool[Array, "*B T"]
    truncated: Bool[Array, "*B T"]
    mask: Bool[Array, "*B T"]
    time: Int[Array, "*B T"]
    episode_id: Int[Array, "*B T"]
    next_obs: PyTree = None
    carry: PyTree = None

    @property
    def ends(self) -> Bool[Array, "*B T"]:
        """Whether a real decision was the last of its episode."""
        return (self.terminated | self.truncated) & self.mask

    @property
    def starts(self) -> Bool[Array, "*B T"]:
        """Whether a real decision was the first of its episode."""
        return (self.time == 0) & self.mask

    @property
    def num_decisions(self) -> Int[Array, ""]:
        """How many real decisions the row or the batch holds."""
        return jnp.sum(self.mask)
