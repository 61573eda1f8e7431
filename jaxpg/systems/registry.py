"""Systems by name: their settings, and the function that makes them."""

from jaxpg.systems.attention_settings import HardAttentionSettings
from jaxpg.systems.base import Recipe, RunSettings
from jaxpg.systems.discrete_vae import discrete_vae
from jaxpg.systems.hard_attention import hard_attention
from jaxpg.systems.latent_settings import DiscreteVAESettings

__all__ = ["SYSTEMS"]

SYSTEMS: dict[str, Recipe] = {
    "hard-attention": Recipe(
        "a window that learns where to look, on cluttered canvases",
        HardAttentionSettings,
        hard_attention,
        RunSettings(num_updates=12000, evaluate_every=500, checkpoint_every=1000),
    ),
    "discrete-vae": Recipe(
        "digits from bits or categories, by any estimator of its gradient",
        DiscreteVAESettings,
        discrete_vae,
        RunSettings(num_updates=3000, evaluate_every=250, checkpoint_every=1000),
    ),
}
"""By their names on the command line."""
