"""`accelerate.utils.bnb`: bigkit's own calls under their old address."""

from __future__ import annotations

from torch import nn

from ...quantize.load import load_and_quantize_model
from ...quantize.replace import replace_with_bnb_layers
from ..differences import refuse_unknown as __getattr__


def has_4bit_bnb_layers(model: nn.Module) -> bool:
    """Whether a model has layers of 4 bits."""
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())
