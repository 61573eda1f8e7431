"""The checker behind jaxtyping's annotations: beartype, with 1 accepted for 1.0."""

import inspect

from beartype import BeartypeConf, beartype

_decorate = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict = {}


def check(function):
    """What jaxtyping has made of one signature, checked.

    jaxtyping decorates a nested function each time the outer one runs, with a stub that
    holds nothing but the signature. Writing the check takes longer than making it, so
    that stubs of equal signatures share one.
    """
    signature = inspect.signature(function)
    key = (function.__module__, function.__qualname__, signature)
    try:
        hash(key)
    except TypeError:  # a default that cannot be hashed
        return _decorate(function)
    if key not in _checked:
        _checked[key] = _decorate(function)
    return _checked[key]
