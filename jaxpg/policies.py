"""Policies: a network and a head behind one pure interface.

    init(key, obs) -> params
    initial_carry() -> carry                      (None without memory)
    step(params, carry, obs) -> (Distribution, carry)
    unroll(params, trajectory) -> Distribution [T]

A *head* turns a network's raw outputs into a distribution over the action space; a
network comes from Flax NNX, Flax Linen, or any pair of plain functions. `step` serves
the rollout, `unroll` the gradient, and the two agree decision by decision.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
from jaxtyping import Array

from jaxpg.distributions import Distribution
from jaxpg.envs.base import Discrete, Space
from jaxpg.heads import Head, categorical_head, head_for
from jaxpg.networks import flat_features, mlp
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "Policy",
    "from_apply",
    "from_linen",
    "from_nnx",
    "log_prob_fn",
    "mlp_policy",
    "tabular_policy",
]


class Policy(NamedTuple):
    """A policy as a record of pure functions.

    Attributes:
        init: `init(key, obs) -> params`, from one observation.
        initial_carry: the memory at an episode's start; None for a memoryless policy.
        step: one decision's distribution and the next memory.
        unroll: the distributions of a whole row, [T], restarting at episode starts.
        is_recurrent: whether memory matters; rows of a memoryless one may be cut.
    """

    init: Callable[[PRNGKey, PyTree], Params]
    initial_carry: Callable[[], PyTree]
    step: Callable[[Params, PyTree, PyTree], tuple[Any, PyTree]]
    unroll: Callable[[Params, Trajectory], Any]
    is_recurrent: bool = False


def from_apply(
    init: Callable[[PRNGKey, PyTree], Params],
    apply: Callable[[Params, PyTree], Array],
    head: Head,
) -> Policy:
    """A memoryless policy from two plain functions of one observation.

    Args:
        init: `init(key, obs) -> params` of the network.
        apply: `apply(params, obs) -> [head.num_outputs]`.
        head: turns the outputs into a distribution.

    Returns:
        A policy whose params are `{"network": ..., "head": ...}`.

    Raises:
        ValueError: at `init`, if the network gives another number of outputs.

    >>> init = lambda key, obs: {"w": jnp.zeros((obs.shape[0], 2))}
    >>> apply = lambda params, obs: obs @ params["w"]
    >>> policy = from_apply(init, apply, categorical_head(Discrete(2)))
    >>> params = policy.init(jax.random.key(0), jnp.ones(4))
    >>> policy.step(params, None, jnp.ones(4))[0].logits.tolist()
    [0.0, 0.0]
    """

    def init_both(key: PRNGKey, obs: PyTree) -> Params:
        params = {"network": init(key, obs), "head": head.init()}
        outputs = jax.eval_shape(apply, params["network"], obs)
        if outputs.shape != (head.num_outputs,):
            raise ValueError(
                f"the network gives outputs of shape {outputs.shape}, but the head for "
                f"{head.space!r} needs ({head.num_outputs},)"
            )
        return params

    def distribution(params: Params, obs: PyTree) -> Distribution:
        return head.distribution(params["head"], apply(params["network"], obs))

    def step(params: Params, carry: PyTree, obs: PyTree) -> tuple[Distribution, PyTree]:
        return distribution(params, obs), carry

    def unroll(params: Params, trajectory: Trajectory) -> Distribution:
        return jax.vmap(distribution, (None, 0))(params, trajectory.obs)

    return Policy(init_both, lambda: None, step, unroll)


def tabular_policy(observation_space: Discrete, action_space: Discrete) -> Policy:
    """One free logit for every pair of an observation's number and an action.

    Args:
        observation_space: numbered observations.
        action_space: numbered actions.

    Returns:
        A memoryless policy whose network params are a table [O, A]; drawn normal.

    Raises:
        ValueError: if a space is not `Discrete`.

    >>> policy = tabular_policy(Discrete(3), Discrete(2))
    >>> policy.init(jax.random.key(0), jnp.array(0))["network"].shape
    (3, 2)
    """
    for name, space in (("observation", observation_space), ("action", action_space)):
        if not isinstance(space, Discrete):
            raise ValueError(
                f"{name}_space is {space!r}, needs Discrete; for others use mlp_policy"
            )
    shape = (observation_space.n, action_space.n)

    def init(key: PRNGKey, obs: PyTree) -> Array:
        del obs
        return jax.random.normal(key, shape)

    return from_apply(
        init, lambda table, obs: table[obs], categorical_head(action_space)
    )


def from_linen(module: Any, head: Head) -> Policy:
    """A memoryless policy from a Flax Linen module of one observation.

    Args:
        module: maps one observation to [head.num_outputs].
        head: turns the outputs into a distribution.

    Returns:
        A policy whose network params are the module's variables.
    """
    return from_apply(module.init, module.apply, head)


def from_nnx(make_module: Callable[[Any], Any], head: Head) -> Policy:
    """A memoryless policy from a Flax NNX module of one observation.

    The module is split once into a static graph and its state; parameters cross the
    boundary as nested dictionaries of arrays, so no NNX object enters a loop. All state
    is taken for parameters: modules with dropout or batch statistics do not fit.

    Args:
        make_module: `make_module(rngs) -> module` that maps one observation to
            [head.num_outputs].
        head: turns the outputs into a distribution.

    Returns:
        A policy whose network params are plain nested dictionaries.
    """
    from flax import nnx

    def build(key: PRNGKey) -> Any:
        return make_module(nnx.Rngs(params=key))

    def abstract() -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))

    def init(key: PRNGKey, obs: PyTree) -> Params:
        del obs  # an NNX module knows its input sizes when it is built
        _, state = nnx.split(build(key))
        return nnx.to_pure_dict(state)

    def apply(params: Params, obs: PyTree) -> Array:
        graph, state = abstract()
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(obs)

    return from_apply(init, apply, head)


def mlp_policy(
    observation_space: Space,
    action_space: Space,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    head: Head | None = None,
) -> Policy:
    """The default policy: a multilayer perceptron on the flattened observation.

    Args:
        observation_space: `Discrete` observations are one-hot coded, others flattened.
        action_space: chooses the head.
        hidden: width of each hidden layer.
        activation: a name of `networks.ACTIVATIONS`.
        head: overrides the usual head for the action space.

    Returns:
        A memoryless policy.

    Raises:
        ValueError: if a space or a size does not fit.
    """
    chosen = head_for(action_space) if head is None else head
    encode, num_features = flat_features(observation_space)

    from flax import nnx

    class Encoded(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.network = mlp(
                num_features,
                hidden,
                chosen.num_outputs,
                rngs=rngs,
                activation=activation,
            )

        def __call__(self, obs: PyTree) -> Array:
            return self.network(encode(obs))

    return from_nnx(Encoded, chosen)


def log_prob_fn(policy: Policy) -> Callable[[Params, Trajectory], Array]:
    """The log-probability of a row's own actions, [T]: what the engine needs to know.

    Args:
        policy: any policy.

    Returns:
        `log_prob_fn(params, trajectory) -> [T]`, in nats.
    """

    def log_probs(params: Params, trajectory: Trajectory) -> Array:
        distribution = cast(Distribution, policy.unroll(params, trajectory))
        return distribution.log_prob(trajectory.action)

    return log_probs
