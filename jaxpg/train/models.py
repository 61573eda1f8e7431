"""Networks of a run, from its settings: the policy's, and the critic's of one shape."""

from typing import Any

from jaxpg.algos.registry import RECIPES
from jaxpg.envs.base import Box, Environment
from jaxpg.heads import (
    Head,
    gaussian_head,
    head_for,
    state_dependent_noise_head,
    tanh_gaussian_head,
)
from jaxpg.networks import Network, cnn_network, gru_network, mlp_network
from jaxpg.normalizers import normalized
from jaxpg.policies import Policy, from_network
from jaxpg.train.config import PolicyConfig, TrainConfig

__all__ = ["build_critic", "build_policy"]

NOISE_FEATURES = 8
"""Random features of the state that held noise is a function of."""


def build_policy(config: TrainConfig, env: Environment) -> Policy:
    """The policy that the settings describe.

    Args:
        config: the run's settings.
        env: gives the spaces.

    Returns:
        The policy.

    Raises:
        ValueError: if the network does not fit the observations, or the head the
            actions.
    """
    settings = config.policy
    head = _head(settings, env)
    return from_network(
        _network(settings, env, head.num_outputs, output_scale=0.01),
        head,
        observation_space=env.observation_space,
        noise_hold=settings.noise_hold,
    )


def build_critic(config: TrainConfig, env: Environment) -> Network | None:
    """A network of one output like the policy's, for algorithms that need one.

    Args:
        config: the run's settings.
        env: gives the observation space.

    Returns:
        The network, or None.
    """
    if not RECIPES[config.algorithm_name].needs_critic:
        return None
    return _network(config.policy, env, 1, output_scale=1.0)


def _network(
    settings: PolicyConfig, env: Environment, num_outputs: int, *, output_scale: float
) -> Network:
    space = env.observation_space
    shared: dict[str, Any] = {
        "hidden": settings.hidden,
        "activation": settings.activation,
        "output_scale": output_scale,
    }
    channels = settings.channels if settings.network == "cnn" else ()
    if settings.memory:
        network = gru_network(
            space, num_outputs, memory=settings.memory, channels=channels, **shared
        )
    elif settings.network == "cnn":
        network = cnn_network(space, num_outputs, channels=channels, **shared)
    else:
        network = mlp_network(space, num_outputs, **shared)
    return normalized(network, space) if settings.normalize_observations else network


def _head(settings: PolicyConfig, env: Environment) -> Head:
    space = env.action_space
    if not isinstance(space, Box):
        _refuse_settings_of_boxes(settings, env)
        return head_for(space)
    scale = {"initial_log_std": settings.initial_log_std}
    match settings.head:
        case "tanh":
            return tanh_gaussian_head(
                space, state_dependent=settings.state_dependent_std, **scale
            )
        case "held-noise":
            return state_dependent_noise_head(space, NOISE_FEATURES, **scale)
        case _:
            return gaussian_head(
                space, state_dependent=settings.state_dependent_std, **scale
            )


def _refuse_settings_of_boxes(settings: PolicyConfig, env: Environment) -> None:
    plain = PolicyConfig()
    for name in ("head", "state_dependent_std", "initial_log_std"):
        if getattr(settings, name) != getattr(plain, name):
            raise ValueError(
                f"{name} is {getattr(settings, name)!r}, but {env.name} has the "
                f"action space {env.action_space!r}; it is for boxes only, leave it out"
            )
