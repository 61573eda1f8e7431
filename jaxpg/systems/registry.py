"""Systems by name: their settings, and the function that makes them."""

from jaxpg.systems.base import Recipe

__all__ = ["SYSTEMS"]

SYSTEMS: dict[str, Recipe] = {}
"""By their names on the command line."""
