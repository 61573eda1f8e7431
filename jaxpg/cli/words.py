"""The words of a command line: how settings are read out of them."""

import dataclasses
import itertools
from typing import Any

import tyro

__all__ = [
    "Sweep",
    "UsageError",
    "differences",
    "parse",
    "take_sweeps",
    "value_of",
]

Sweep = tuple[tuple[str, tuple[float, ...]], ...]


class UsageError(Exception):
    """The command line itself is wrong: exit code 2."""


def parse(kind: type, words: list[str], program: str, default: Any = None) -> Any:
    """An object of `kind` from the words, whose help has one flat list of flags."""
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, args=words, prog=program, config=flat, **given)


def value_of(flag: str, words: list[str], default: Any) -> Any:
    """What follows a flag, before anything else is known of the words."""
    for word, following in itertools.pairwise([*words, ""]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return default


def take_sweeps(words: list[str]) -> tuple[list[str], Sweep]:
    """Take `--sweep NAME VALUE VALUE ...` out of the words, each time it is there."""
    rest, sweeps = list(words), []
    while "--sweep" in rest:
        begin = rest.index("--sweep")
        taken = list(
            itertools.takewhile(lambda x: not x.startswith("--"), rest[begin + 1 :])
        )
        del rest[begin : begin + 1 + len(taken)]
        try:
            name, *values = taken
            sweeps.append((name.replace("-", "_"), tuple(float(x) for x in values)))
        except ValueError as error:
            raise UsageError(
                f"{' '.join(['--sweep', *taken])} needs the name of a setting and "
                "numbers, for example --sweep learning_rate 1e-4 3e-4 1e-3"
            ) from error
    return rest, tuple(sweeps)


def differences(old: Any, new: Any) -> list[str]:
    """Which settings of two objects of one kind are not the same, in words."""
    found = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before):
            found += differences(before, after)
        elif before != after:
            found.append(f"{field.name} was {before}, now {after}")
    return found
