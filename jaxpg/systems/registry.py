"""Systems by name: their settings, and the function that makes them."""

from jaxpg.systems.base import Recipe, RunSettings
from jaxpg.systems.hard_attention import HardAttentionSettings, hard_attention

__all__ = ["SYSTEMS"]

SYSTEMS: dict[str, Recipe] = {
    "hard-attention": Recipe(
        "a window that learns where to look, on cluttered canvases",
        HardAttentionSettings,
        hard_attention,
        RunSettings(num_updates=3000, evaluate_every=250, checkpoint_every=500),
    ),
}
"""By their names on the command line."""
