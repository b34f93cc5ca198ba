"""Pure networks, and how checkpoint folders load and save."""

from lightning_modules.networks.conditioner import Conditioner
from lightning_modules.networks.kontext_transformer import KontextTransformer

__all__ = ["Conditioner", "KontextTransformer"]
