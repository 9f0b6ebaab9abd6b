"""What the components of a pipeline take beside their weights: each runs once on a GPU that does not exist.

Inputs are made by the names that Diffusers' classes give them (`hidden_states`, `encoder_hidden_states`, `timestep`,
...), with sizes from the component's own config, for an image of the size that the denoiser was trained for, or of
another one.

Leaves out: video, audio, and classes with other inputs; their activations are not known. Guidance runs two samples at
a time, unless the denoiser takes the guidance as a number.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..machine.hardware import GPUS
from ..meta.skeleton import spec_from_module
from ..model.pipeline import Component, PipelineSpec
from ..zoo.pipelines import empty_components, find_pipeline
from .fake_gpu import fake_gpus
from .rehearse import target_of
from .result import held_by_kind
from .workload import fill


@dataclass(frozen=True)
class Convolutions:
    """What cuDNN takes for a decoder's convolutions.

    Args:
        share: bytes for each byte of activations. Measured once: 0.99 GB beside 1.61 GB, the decoder of Flux's shape in
            bfloat16 at 1024 x 1024 pixels, on one H200 with PyTorch 2.11.
    """

    share: float = 0.62


CONVOLUTIONS = Convolutions()
TOKENS = 512  # of a prompt, for encoders that take so many
DEVICE = "cuda:0"


def describe_pipeline(
    name: str | os.PathLike[str], dtype: object = "bfloat16", batch: int = 1,
    image: int | tuple[int, int] | None = None, *, revision: str | None = None, token: str | bool | None = None,
) -> PipelineSpec | None:  # fmt: skip
    """The components of a pipeline with what each takes; None if there is no pipeline of that name.

    Args:
        name: a folder or a repository with a `model_index.json`.
        dtype: of the weights; Diffusers loads in float32 unless it is told otherwise.
        batch: images at a time.
        image: height and width of them in pixels, or both in one; None is what the denoiser was trained for.
        revision, token: on the Hub.

    Raises:
        ZooError: it cannot be read.
        ValueError: an image has no such size.
        ImportError: Diffusers is not installed.
    """
    found = find_pipeline(name, revision, token)
    if found is None:
        return None
    components, notes = [], []
    built = list(empty_components(*found, dtype, token))
    scale = max((_scale(model) for _, phase, model in built if phase == "decode" and isinstance(model, nn.Module)),
                default=8)  # fmt: skip
    side = next((_side(model) for _, phase, model in built if phase == "denoise" and _side(model)), None) or 128
    size = (side, side) if image is None else _latents(image, scale)
    for own, phase, model in built:
        if isinstance(model, str):
            notes.append(f"{own} is left out: {model}.")
            continue
        spec = spec_from_module(model, own)
        activations, load = _activations(model, phase, batch, size)
        components.append(Component(own, spec, phase, activations, load))
    return PipelineSpec(str(name), str(found[1].get("_class_name", "")), tuple(components), tuple(notes))


def peak_beside_weights(model: nn.Module, work: Callable[[], Any]) -> int:
    """The most bytes that tensors take beside the weights while `work` runs on a fake GPU.

    Args:
        model: empty; it is left without memory, on the fake GPU.
        work: called without gradients; what it makes goes to `DEVICE`.
    """
    with fake_gpus(target_of(GPUS["H100-80GB"])) as log, torch.no_grad():
        log.kind = "weights"
        fill(model.eval(), {"": 0}, log.parameter)
        log.kind = "activations"
        work()
    held = held_by_kind(log.trace.recordings[DEVICE].events, log.trace.kinds[DEVICE])
    return max(held["activations"], default=0)


def _latents(image: int | tuple[int, int], scale: int) -> tuple[int, int]:
    """Height and width of an image's latents, of which one stands for `scale` pixels; rounded down to even numbers."""
    height, width = image if isinstance(image, tuple) else (image, image)
    if not all(isinstance(side, int) and side >= 2 * scale for side in (height, width)):
        raise ValueError(f"image={image!r}: expected pixels, or (height, width), {2 * scale} each at least")
    return height // (2 * scale) * 2, width // (2 * scale) * 2


def _scale(model: nn.Module) -> int:
    """Pixels of an image, in a row, for which a decoder takes one latent."""
    blocks = getattr(getattr(model, "config", None), "block_out_channels", (0,) * 4)
    return int(2 ** (len(blocks) - 1))


def _activations(model: nn.Module, phase: str, batch: int, size: tuple[int, int]) -> tuple[int | None, str]:
    """Bytes, and what for; None if the class takes other inputs than those that are known here."""
    way: Callable[[], Any]
    height, width = size
    if phase == "encode":
        tokens = min(getattr(model.config, "max_position_embeddings", None) or TOKENS, TOKENS)
        way = lambda: model(input_ids=torch.zeros(batch, tokens, dtype=torch.long, device=DEVICE))  # noqa: E731
        load = f"{tokens} tokens"
    elif phase == "decode":
        channels: Any = getattr(model.config, "latent_channels", 4)
        dtype = next(model.parameters()).dtype
        decoder: Any = model
        way = lambda: decoder.decode(torch.zeros(batch, channels, *size, dtype=dtype, device=DEVICE))  # noqa: E731
        load = f"{_scale(model) * height} x {_scale(model) * width} pixels"
    else:
        two = batch if getattr(model.config, "guidance_embeds", False) else 2 * batch
        way = lambda: model(**_inputs(model, two, size))  # noqa: E731
        load = f"{two} x {height} x {width} latents"
    try:
        peak = peak_beside_weights(model, way)
        return round(peak * (1 + CONVOLUTIONS.share * (phase == "decode"))), load
    except Exception:  # a class may want anything
        return None, ""


def _side(model: nn.Module | str) -> int | None:
    """Height and width of the latents that a denoiser was made for."""
    size = getattr(getattr(model, "config", None), "sample_size", None)
    return size if isinstance(size, int) else None


def _inputs(model: nn.Module, batch: int, size: tuple[int, int]) -> dict[str, Tensor | dict[str, Tensor]]:
    """Inputs of a denoiser by the names of its parameters. With `img_ids`, 2 x 2 latents are one token (Flux)."""
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    packed = "img_ids" in names
    dtype = next(model.parameters()).dtype

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    channels, tokens = config.in_channels, TOKENS if hasattr(config, "joint_attention_dim") else 77
    text = next((width for name in ("cross_attention_dim", "joint_attention_dim", "caption_channels", "text_embed_dim")
                 if isinstance(width := getattr(config, name, None), int)), 0)  # fmt: skip
    patches = (size[0] // 2) * (size[1] // 2)
    latents = zeros(batch, patches, channels) if packed else zeros(batch, channels, *size)
    known = {
        "sample": latents, "hidden_states": latents, "timestep": zeros(batch),
        "encoder_hidden_states": zeros(batch, tokens, text) if text else None,
        "pooled_projections": zeros(batch, config.pooled_projection_dim)
        if isinstance(getattr(config, "pooled_projection_dim", None), int) else None,
        "img_ids": zeros(patches, 3), "txt_ids": zeros(tokens, 3),
        "guidance": zeros(batch) if getattr(config, "guidance_embeds", False) else None,
    }  # fmt: skip
    if getattr(config, "addition_embed_type", None) == "text_time":
        rest = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        known["added_cond_kwargs"] = {"text_embeds": zeros(batch, rest), "time_ids": zeros(batch, 6)}  # type: ignore[assignment]
    return {name: value for name, value in known.items() if name in names and value is not None}
