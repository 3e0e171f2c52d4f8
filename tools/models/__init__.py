"""Small models with seeded random weights and the demo tokenizer: exact tests in a second."""

from __future__ import annotations

from tools.models import dense, hybrid, mla, swa
from tools.models.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    "dense": dense.Recipe("float32"),
    "hybrid": hybrid.Recipe("float32", hidden=256),
    "mla": mla.Recipe("float32", latent=128, nope=64, value=64),
    "swa": swa.Recipe("float32"),
}
"""By the name that tests and `python -m tools.models` know them by; all in float32."""
