"""Policies: a network and a head behind one pure interface.

    init(key, obs) -> params
    initial_carry() -> carry                      (None without memory)
    step(params, carry, obs) -> (Distribution, carry)
    unroll(params, trajectory) -> Distribution [T]

A *head* turns a network's raw outputs into a distribution over the action space; a
network comes from Flax NNX, Flax Linen, or any pair of plain functions. `step` serves
the rollout, `unroll` the gradient, and the two agree decision by decision, across the
ends of episodes too. Where observations say which actions are allowed (`MaskedObs`),
the others have probability zero.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpg._checks import check_positive
from jaxpg.distributions import Distribution
from jaxpg.envs.base import (
    Discrete,
    Masked,
    MaskedObs,
    MultiBinary,
    MultiDiscrete,
    Space,
)
from jaxpg.heads import Head, categorical_head, head_for
from jaxpg.layers import split_module
from jaxpg.networks import (
    Network,
    cnn_network,
    feedforward,
    gru_network,
    mlp_network,
)
from jaxpg.types import Params, PRNGKey, PyTree, Trajectory

__all__ = [
    "Policy",
    "cnn_policy",
    "from_apply",
    "from_linen",
    "from_network",
    "from_nnx",
    "log_prob_fn",
    "mlp_policy",
    "recurrent_policy",
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
        noise_hold: how many consecutive decisions of an episode share the key that
            their actions are drawn with. At 1 draws are independent. Above it the
            trajectory's law is not the product of its decisions' densities, and
            estimates made of scores are biased.
    """

    init: Callable[[PRNGKey, PyTree], Params]
    initial_carry: Callable[[], PyTree]
    step: Callable[[Params, PyTree, PyTree], tuple[Any, PyTree]]
    unroll: Callable[[Params, Trajectory], Any]
    is_recurrent: bool = False
    noise_hold: int = 1


def from_network(
    network: Network,
    head: Head,
    *,
    observation_space: Space | None = None,
    noise_hold: int = 1,
) -> Policy:
    """A policy from a network, with or without memory, and a head.

        step(params, carry, obs) = head(mask(network.step(params, carry, obs), obs))

    where `mask` gives the logit -inf to actions that a `MaskedObs` does not allow. A
    row that knows its memory (`trajectory.carry`) is unrolled from there, any other
    from the initial one.

    Args:
        network: gives `head.num_outputs` numbers for one observation.
        head: turns the outputs into a distribution.
        observation_space: where observations live; lets masks that do not fit the head
            be refused here and not at `init`.
        noise_hold: how many consecutive decisions share the key of their draws.

    Returns:
        A policy whose params are `{"network": ..., "head": ...}`.

    Raises:
        ValueError: if `noise_hold` is not positive or a mask does not fit the head; at
            `init`, if the network gives another number of outputs.

    Bias: at `noise_hold` above 1 estimates made of scores are biased.

    >>> head = categorical_head(Discrete(2))
    >>> policy = from_network(mlp_network(Masked(Discrete(3), 2), 2), head)
    >>> obs = MaskedObs(jnp.array(0), jnp.array([True, False]))
    >>> params = policy.init(jax.random.key(0), obs)
    >>> policy.step(params, None, obs)[0].log_prob(jnp.array(1)).item()
    -inf
    """
    check_positive("noise_hold", noise_hold)
    if isinstance(observation_space, Masked):
        _check_mask(observation_space.num_actions, head)

    def init(key: PRNGKey, obs: PyTree) -> Params:
        params = {"network": network.init(key, obs), "head": head.init()}
        carry = network.initial_carry()
        outputs, _ = jax.eval_shape(network.step, params["network"], carry, obs)
        if outputs.shape != (head.num_outputs,):
            raise ValueError(
                f"the network gives outputs of shape {outputs.shape}, but the head for "
                f"{head.space!r} needs ({head.num_outputs},)"
            )
        if isinstance(obs, MaskedObs):
            _check_mask(obs.action_mask.shape[-1], head)
        return params

    def distribution(params: Params, outputs: Array, obs: PyTree) -> Distribution:
        return head.distribution(params["head"], _allowed_only(head, outputs, obs))

    def step(params: Params, carry: PyTree, obs: PyTree) -> tuple[Distribution, PyTree]:
        outputs, carry = network.step(params["network"], carry, obs)
        return distribution(params, outputs, obs), carry

    def unroll(params: Params, trajectory: Trajectory) -> Distribution:
        obs, carry = trajectory.obs, trajectory.carry
        carry = network.initial_carry() if carry is None else carry
        outputs, _ = network.unroll(params["network"], carry, obs, trajectory.starts)
        return jax.vmap(distribution, (None, 0, 0))(params, outputs, obs)

    return Policy(
        init, network.initial_carry, step, unroll, network.is_recurrent, noise_hold
    )


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

    return from_network(feedforward(init, apply), head)


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
    init, bind = split_module(make_module)
    return from_apply(init, lambda params, obs: bind(params)(obs), head)


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
    network = mlp_network(
        observation_space, chosen.num_outputs, hidden=hidden, activation=activation
    )
    return from_network(network, chosen, observation_space=observation_space)


def cnn_policy(
    observation_space: Space,
    action_space: Space,
    *,
    channels: Sequence[int] = (16,),
    kernel: int = 3,
    hidden: Sequence[int] = (128,),
    activation: str = "relu",
    head: Head | None = None,
) -> Policy:
    """Convolutions on an image, then a multilayer perceptron.

    Args:
        observation_space: a `Box` of shape (height, width, channels), masked or not.
        action_space: chooses the head.
        channels: how many each convolution gives.
        kernel: height and width of each convolution.
        hidden: width of each hidden layer after the convolutions.
        activation: a name of `networks.ACTIVATIONS`.
        head: overrides the usual head for the action space.

    Returns:
        A memoryless policy.

    Raises:
        ValueError: if a space or a size does not fit.
    """
    chosen = head_for(action_space) if head is None else head
    network = cnn_network(
        observation_space,
        chosen.num_outputs,
        channels=channels,
        kernel=kernel,
        hidden=hidden,
        activation=activation,
    )
    return from_network(network, chosen, observation_space=observation_space)


def recurrent_policy(
    observation_space: Space,
    action_space: Space,
    *,
    hidden: Sequence[int] = (64,),
    memory: int = 64,
    channels: Sequence[int] = (),
    kernel: int = 3,
    activation: str = "tanh",
    head: Head | None = None,
) -> Policy:
    """Hidden layers and a gated recurrent unit, for what one observation cannot tell.

    Args:
        observation_space: flattened as in `mlp_policy`; with convolutions a `Box` of
            shape (height, width, channels), masked or not.
        action_space: chooses the head.
        hidden: width of each hidden layer before the memory.
        memory: width of the memory.
        channels: how many each convolution gives; without any, none is made.
        kernel: height and width of each convolution.
        activation: a name of `networks.ACTIVATIONS`.
        head: overrides the usual head for the action space.

    Returns:
        A recurrent policy, whose memory is zeros at an episode's start.

    Raises:
        ValueError: if a space or a size does not fit.
    """
    chosen = head_for(action_space) if head is None else head
    network = gru_network(
        observation_space,
        chosen.num_outputs,
        hidden=hidden,
        memory=memory,
        channels=channels,
        kernel=kernel,
        activation=activation,
    )
    return from_network(network, chosen, observation_space=observation_space)


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


def _check_mask(length: int, head: Head) -> None:
    """Refuse masks over actions that the head does not have."""
    if not isinstance(head.space, Discrete | MultiDiscrete | MultiBinary):
        raise ValueError(
            f"observations mask {length} actions, but the action space is "
            f"{head.space!r}, needs one of numbers or bits; give the policy "
            "obs.features alone"
        )
    if length != head.num_outputs:
        raise ValueError(
            f"action_mask has length {length}, but the head for {head.space!r} needs "
            f"{head.num_outputs}, one entry for each logit"
        )


def _allowed_only(head: Head, logits: Array, obs: PyTree) -> Array:
    """Logits of -inf for what `obs` forbids."""
    if not isinstance(obs, MaskedObs):
        return logits
    _check_mask(obs.action_mask.shape[-1], head)
    # A slot that holds no decision is zeros and forbids all: what it answers counts
    # nowhere, but must be finite, or 0 * NaN would reach the gradient.
    empty = ~jnp.any(obs.action_mask)
    return jnp.where(obs.action_mask | empty, logits, -jnp.inf)
