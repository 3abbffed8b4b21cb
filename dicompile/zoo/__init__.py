"""Well-known models: their published configs, bundled, and inputs of the size that they were published for."""

from dicompile.zoo.models import MODELS, get_model
from dicompile.zoo.published import Config, Published, Size, get_diffusers

__all__ = ["MODELS", "Config", "Published", "Size", "get_diffusers", "get_model"]
