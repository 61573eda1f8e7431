"""Environments by name: jaxpg's own, registered ones and gymnax's.

    make("CartPole-v1")                                 # gymnax's defaults
    make("Pendulum-v1", g=9.81)                         # a parameter of the world
    make("FrozenLake-misc", map_name="8x8")             # an argument of its class
    make("Probe-RememberFirst-v0", num_steps=6)         # an argument of our factory
    make("CartPole-v1", max_steps=200)                  # truncated earlier
    make("CartPoleNoVelocity-v1", gravity=5.0)          # gymnax's, partially observed

Own names are looked up first; gymnax is imported only for names that need it.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

from jaxpg._checks import nearest
from jaxpg.envs.base import Environment, with_time_limit
from jaxpg.envs.from_gymnax import default_promotion, from_gymnax, import_gymnax
from jaxpg.envs.probes import PROBES
from jaxpg.envs.wrappers import hide_components

__all__ = ["load_problem", "make", "names", "register"]

Factory = Callable[..., Environment]


def _no_velocity(name: str, source: str, hidden: tuple[int, ...]) -> Factory:
    """A factory for gymnax's world `source` without the components that are speeds."""

    def factory(**parameters: Any) -> Environment:
        env = _make_gymnax(source, parameters)
        return hide_components(env, hidden)._replace(name=name)

    return factory


_PARTIALLY_OBSERVED: dict[str, Factory] = {
    name: _no_velocity(name, source, hidden)
    for name, source, hidden in (
        ("CartPoleNoVelocity-v1", "CartPole-v1", (1, 3)),
        ("PendulumNoVelocity-v1", "Pendulum-v1", (2,)),
    )
}
"""Worlds that need memory, by name: what moves is seen, how fast it moves is not."""

_factories: dict[str, Factory] = {**PROBES, **_PARTIALLY_OBSERVED}

_MNIST = "MNISTBandit-bsuite"


def make(name: str, *, max_steps: int | None = None, **kwargs: Any) -> Environment:
    """Build the environment called `name`.

    Args:
        name: one of `names()`.
        max_steps: truncate after so many decisions, at least 1; it can only shorten
            gymnax's episodes (`max_steps_in_episode` lengthens them).
        **kwargs: for own environments arguments of the factory, for gymnax's fields of
            `EnvParams` or arguments of the class.

    Returns:
        The environment, called `name`.

    Raises:
        ValueError: if the name or a keyword is unknown, a value does not fit, or the
            environment cannot load here.

    >>> make("Probe-ConstantReward-v0").max_steps
    1
    """
    factory = _factories.get(name)
    if factory is None:
        env = _make_gymnax(name, kwargs)
    else:
        valid = _arguments(factory)
        if "max_steps" in valid and max_steps is not None:
            kwargs["max_steps"] = max_steps
        if not _takes_any(factory):
            _check_keywords(name, kwargs, valid)
        env = factory(**kwargs)
    return env if max_steps is None else with_time_limit(env, max_steps)


def register(name: str, factory: Factory) -> None:
    """Let `make(name, **kwargs)` return `factory(**kwargs)`.

    Args:
        name: a new name; one of gymnax's is taken over.
        factory: returns an `Environment`.

    Raises:
        ValueError: if the name is empty or taken, or `factory` cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name is {name!r}, needs a string with at least one letter")
    if name in _factories:
        raise ValueError(
            f"name {name!r} is taken by {_factories[name]}; choose another"
        )
    if not callable(factory):
        raise ValueError(f"factory is {factory!r}, needs a function -> Environment")
    _factories[name] = factory


def names() -> list[str]:
    """All names that `make` knows: own and registered ones first, then gymnax's."""
    foreign = import_gymnax().registered_envs
    return [*_factories, *(name for name in foreign if name not in _factories)]


def load_problem(name: str) -> str | None:
    """Why `make(name)` could fail here, or None; loads and downloads nothing.

    Args:
        name: one of `names()`.

    Returns:
        A sentence without the name, such as "needs the MNIST images, ...".

    >>> load_problem("Probe-ConstantReward-v0")
    """
    if name in _factories or name != _MNIST:
        return None
    import_gymnax()
    from gymnax.utils.load_mnist import load_mnist

    folder = inspect.signature(load_mnist).parameters["directory"].default
    archives = {name for name in _listing(folder) if name.endswith("-ubyte.gz")}
    if len(archives) >= 4:
        return None
    return "needs the MNIST images, which gymnax downloads when it is made"


def _make_gymnax(name: str, kwargs: dict[str, Any]) -> Environment:
    gymnax = import_gymnax()
    if name not in gymnax.registered_envs:
        raise ValueError(f"name is {name!r}, unknown; {nearest(name, names())}")
    kind, params = _load(name, {})
    fields = {field.name for field in dataclasses.fields(params)}
    arguments = _arguments(type(kind)) - fields
    _check_keywords(name, kwargs, fields | arguments)
    built = {key: value for key, value in kwargs.items() if key in arguments}
    if built:
        kind, params = _load(name, built)
    replaced = {key: value for key, value in kwargs.items() if key in fields}
    return from_gymnax(kind, params.replace(**replaced), name)


def _load(name: str, arguments: dict[str, Any]) -> tuple[Any, Any]:
    try:
        with default_promotion():
            return import_gymnax().make(name, **arguments)
    # gymnax's classes raise whatever they please: missing data, no network, bad values.
    except Exception as error:
        problem = load_problem(name)
        reason = f"{name} {problem}: " if problem else f"{name} cannot load: "
        raise ValueError(f"{reason}{type(error).__name__}: {error}") from error


def _arguments(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _takes_any(function: Callable[..., Any]) -> bool:
    """Whether `function` has a `**kwargs`, and so checks keywords by itself."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _check_keywords(name: str, kwargs: Iterable[str], valid: Iterable[str]) -> None:
    for keyword in kwargs:
        if keyword not in valid:
            known = ", ".join(sorted({*valid, "max_steps"}))
            raise ValueError(f"{keyword} is no parameter of {name}; it has: {known}")


def _listing(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []
