r"""The oracle: exact values on tabular worlds, to hold every estimator against.

    J(theta)      = E[sum_t discount^t r[t]]              by dynamic programming
    grad J        = its derivative, by differentiating the recursion
    E[estimate]   = sum over all trajectories (or tuples of them) of
                    probability * estimate                 by enumeration

Nothing is sampled here. Run it in float64 (`jax.enable_x64`) for answers to 1e-10.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpg._checks import check_positive
from jaxpg.envs.tabular import TabularMDP
from jaxpg.policies import Policy
from jaxpg.types import Params, PyTree, Trajectory

__all__ = [
    "Paths",
    "action_probabilities",
    "action_values",
    "enumerate_trajectories",
    "expected_estimate",
    "expected_return",
    "mixed_gradient",
    "occupancies",
    "policy_gradient",
    "with_log_probs",
]


class Paths(NamedTuple):
    """All trajectories that a world can produce.

    Attributes:
        trajectories: one per row, [P, T], masked after its end; `log_prob` is zero.
        world_probability: the world's own part of each one's probability, [P]; times
            the policy's part it sums to one.
    """

    trajectories: Trajectory
    world_probability: Float[Array, "P"]


def action_probabilities(
    mdp: TabularMDP, policy: Policy, params: Params
) -> Float[Array, "S A"]:
    """The probability of each action in each state under a memoryless policy."""
    states = jnp.arange(mdp.reward.shape[0], dtype=jnp.int32)
    actions = jnp.arange(mdp.reward.shape[1], dtype=jnp.int32)

    def of_state(state: Array) -> Array:
        distribution, _ = policy.step(params, policy.initial_carry(), state)
        return jax.vmap(distribution.log_prob)(actions)

    return jnp.exp(jax.vmap(of_state)(states))


def expected_return(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Float[Array, ""]:
    """J(theta) = E[sum_t discount^t r[t]], by backward dynamic programming.

    Args:
        mdp: the world.
        policy: a memoryless policy over state numbers.
        params: its parameters; differentiate with respect to them.
        discount: the factor per decision, in [0, 1].

    Returns:
        The exact objective.
    """
    probabilities = action_probabilities(mdp, policy, params)
    continues = (~mdp.terminal).astype(mdp.reward.dtype)

    def backward(values: Array, _: None) -> tuple[Array, None]:
        future = jnp.einsum("sax,x,x->sa", mdp.transition, continues, values)
        return jnp.sum(probabilities * (mdp.reward + discount * future), axis=1), None

    zeros = jnp.zeros_like(mdp.initial)
    values, _ = jax.lax.scan(backward, zeros, None, mdp.horizon)
    return jnp.dot(mdp.initial, values)


def policy_gradient(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Params:
    """grad J, exactly: what every unbiased estimator must average to."""
    return jax.grad(lambda p: expected_return(mdp, policy, p, discount))(params)


def occupancies(mdp: TabularMDP, policy: Policy, params: Params) -> Float[Array, "T S"]:
    """The probability of being in each state at each decision, still alive.

    Args:
        mdp: the world.
        policy: a memoryless policy over state numbers.
        params: its parameters.

    Returns:
        d[t, s]; each d[t] sums to the probability that decision t is taken at all.
    """
    probabilities = action_probabilities(mdp, policy, params)
    continues = (~mdp.terminal).astype(mdp.reward.dtype)

    def forward(alive: Array, _: None) -> tuple[Array, Array]:
        moves = jnp.einsum("s,sa,sax->x", alive, probabilities, mdp.transition)
        return moves * continues, alive

    return jax.lax.scan(forward, mdp.initial, None, mdp.horizon)[1]


def action_values(
    mdp: TabularMDP, policy: Policy, params: Params, discount: float = 1.0
) -> Float[Array, "T S A"]:
    """Q[t, s, a]: the expected reward-to-go of action a in state s at decision t.

    Args:
        mdp: the world.
        policy: a memoryless policy over state numbers, followed from t + 1 on.
        params: its parameters.
        discount: the factor per decision, in [0, 1].

    Returns:
        Values in units of the reward.
    """
    probabilities = action_probabilities(mdp, policy, params)
    continues = (~mdp.terminal).astype(mdp.reward.dtype)

    def backward(values: Array, _: None) -> tuple[Array, Array]:
        future = jnp.einsum("sax,x,x->sa", mdp.transition, continues, values)
        q = mdp.reward + discount * future
        return jnp.sum(probabilities * q, axis=1), q

    zeros = jnp.zeros_like(mdp.initial)
    return jax.lax.scan(backward, zeros, None, mdp.horizon, reverse=True)[1]


def mixed_gradient(
    mdp: TabularMDP,
    policy: Policy,
    params: Params,
    states_of: Params,
    values_of: Params,
    discount: float = 1.0,
) -> Params:
    """sum_{t,s} d[t, s] sum_a grad pi(a | s) Q[t, s, a], with d and Q of any policies.

    With both of `params` this is the policy gradient (for discount 1); with one or both
    of a behaviour policy it is the limit of an off-policy form that drops ratios.

    Args:
        mdp: the world.
        policy: a memoryless policy over state numbers.
        params: the parameters that pi is differentiated at.
        states_of: the parameters that the states are visited with.
        values_of: the parameters that the values belong to.
        discount: of the values; the states' own is not discounted.

    Returns:
        A tree like `params`.

    Reference: Sutton et al. 2000, theorem 1; Degris, White and Sutton 2012.
    """
    visits = occupancies(mdp, policy, states_of)
    values = action_values(mdp, policy, values_of, discount)

    def objective(params: Params) -> Array:
        probabilities = action_probabilities(mdp, policy, params)
        return jnp.einsum("ts,sa,tsa->", visits, probabilities, values)

    return jax.grad(objective)(params)


def enumerate_trajectories(mdp: TabularMDP) -> Paths:
    """Every trajectory that the world can produce, whatever the policy.

    Args:
        mdp: a small world; there are up to S * (S * A)^horizon trajectories.

    Returns:
        The paths, with states as observations.
    """
    mdp = _on_the_host(mdp)
    paths = [
        path
        for state in np.flatnonzero(mdp.initial > 0.0)
        for path in _extend(mdp, int(state), float(mdp.initial[state]), ())
    ]
    return Paths(
        _as_trajectories(mdp, [steps for _, steps in paths]),
        jnp.asarray([probability for probability, _ in paths]),
    )


def expected_estimate(
    estimate: Callable[[Trajectory], PyTree],
    mdp: TabularMDP,
    policy: Policy,
    params: Params,
    batch_size: int,
) -> PyTree:
    """The exact mean of any estimator over all batches of independent trajectories.

    Args:
        estimate: maps a batch of `batch_size` rows to a tree of numbers.
        mdp: a small world.
        policy: the policy that acts, memoryless.
        params: its parameters.
        batch_size: N; the work is P^N for P trajectories.

    Returns:
        sum over batches of probability * estimate(batch).

    Raises:
        ValueError: if `batch_size` is not a positive whole number.
    """
    check_positive("batch_size", batch_size)
    paths = enumerate_trajectories(mdp)
    count = paths.world_probability.shape[0]
    batches = np.array(list(itertools.product(range(count), repeat=batch_size)))

    @jax.jit
    def mean(paths: Paths, params: Params, batches: Array) -> PyTree:
        trajectories = with_log_probs(paths.trajectories, policy, params)
        own = jnp.sum(jnp.where(trajectories.mask, trajectories.log_prob, 0.0), axis=1)
        probability = paths.world_probability * jnp.exp(own)

        def term(batch: Array) -> PyTree:
            rows = jax.tree.map(lambda x: x[batch], trajectories)
            chance = jnp.prod(probability[batch])
            return jax.tree.map(lambda x: chance * x, estimate(rows))

        terms = jax.lax.map(term, batches, batch_size=4096)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)

    return mean(paths, params, jnp.asarray(batches))


def with_log_probs(
    trajectories: Trajectory, policy: Policy, params: Params
) -> Trajectory:
    """The same trajectories, as the policy with these parameters would record them."""

    def of_row(row: Trajectory) -> Array:
        return policy.unroll(params, row).log_prob(row.action)

    return trajectories._replace(log_prob=jax.vmap(of_row)(trajectories))


def _on_the_host(mdp: TabularMDP) -> Any:
    """NumPy arrays, for loops in Python; `Any`, because they are no JAX arrays."""
    *arrays, horizon = cast(Any, mdp)
    return TabularMDP._make([*map(np.asarray, arrays), horizon])


Step = tuple[int, int, int]
"""State, action, state that was entered."""


def _extend(
    mdp: Any, state: int, probability: float, steps: tuple[Step, ...]
) -> list[tuple[float, tuple[Step, ...]]]:
    over = bool(steps) and bool(mdp.terminal[state])
    if over or len(steps) == mdp.horizon:
        return [(probability, steps)]
    return [
        path
        for action, chances in enumerate(mdp.transition[state])
        for arrived in np.flatnonzero(chances > 0.0)
        for path in _extend(
            mdp,
            int(arrived),
            probability * float(chances[arrived]),
            (*steps, (state, action, int(arrived))),
        )
    ]


def _as_trajectories(mdp: Any, paths: list[tuple[Step, ...]]) -> Trajectory:
    shape = (len(paths), mdp.horizon)
    table = np.zeros((*shape, 3), np.int32)
    mask = np.zeros(shape, bool)
    for row, steps in enumerate(paths):
        table[row, : len(steps)] = steps
        mask[row, : len(steps)] = True
    obs, action, arrived = (jnp.asarray(table[..., i]) for i in range(3))
    time = jnp.broadcast_to(jnp.arange(mdp.horizon, dtype=jnp.int32), shape)
    reward = jnp.where(mask, jnp.asarray(mdp.reward)[obs, action], 0.0)
    return Trajectory(
        obs=obs,
        action=action,
        log_prob=jnp.zeros(shape, reward.dtype),
        reward=reward,
        terminated=jnp.asarray(mdp.terminal)[arrived] & mask,
        truncated=(time == mdp.horizon - 1) & mask,
        mask=jnp.asarray(mask),
        time=time,
        episode_id=jnp.broadcast_to(
            jnp.arange(len(paths), dtype=jnp.int32)[:, None], shape
        ),
        next_obs=arrived,
    )
