"""`accelerate.utils.constants`: names of files, and the layers that `attach_layerwise_casting_hooks` casts."""

from torch import nn

from ...checkpoints.index import INDEX as SAFE_WEIGHTS_INDEX_NAME
from ...checkpoints.index import PICKLE as WEIGHTS_NAME
from ...checkpoints.index import PICKLE_INDEX as WEIGHTS_INDEX_NAME
from ...checkpoints.index import SINGLE as SAFE_WEIGHTS_NAME
from ..differences import refuse_unknown as __getattr__

MODEL_NAME, SAFE_MODEL_NAME = "pytorch_model", "model"
WEIGHTS_PATTERN_NAME, SAFE_WEIGHTS_PATTERN_NAME = "pytorch_model{suffix}.bin", "model{suffix}.safetensors"
SUPPORTED_PYTORCH_LAYERS_FOR_UPCASTING = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip
