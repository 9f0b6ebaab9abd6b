"""Inputs for a model, made from its configuration: token ids, images, sound.

A model says by `main_input_name` what it is fed with, and by the parameters of its forward what else it takes. Models
that generate get the main input alone, as a text model or a speech model does; others (CLIP, for example) get each of
`MADE` that they take.

Leaves out: images inside a text, whose place in the prompt only the model's processor knows; masks of regions; video.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SECONDS, RATE = 10, 16_000  # of a piece of sound, and its samples a second


class NotMade(ValueError):
    """No input can be made for a model; the text says why in one sentence."""


def inputs_of(model: nn.Module, batch: int, prompt: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs by the names of the forward's parameters; the main input is the first.

    Args:
        model: of Transformers, timm or torchvision, or the shipped GPT.
        batch: sequences, images or pieces of sound.
        prompt: tokens of each sequence. Sound has the length that the model's encoder takes, else ten seconds.
        device: where they are made.

    Raises:
        ValueError: the main input is none of these.

    >>> from bigkit import zoo
    >>> {name: tuple(x.shape) for name, x in inputs_of(zoo.empty_model("whisper-large-v3"), 2, 8, "cpu").items()}
    {'input_features': (2, 128, 3000)}
    """
    main = main_input(model)
    if main not in MADE:
        raise NotMade(f"a {type(model).__name__} takes {main!r}: expected token ids, images or sound")
    names = [main]
    if not bool(getattr(model, "can_generate", lambda: False)()):
        taken = inspect.signature(model.forward).parameters
        names += [name for name in MADE if name in taken and name != main]
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)
    config = getattr(model, "config", None)
    made: dict[str, Tensor] = {}
    for name in names:
        values = MADE[name](model, config, batch, prompt)
        made[name] = (values if name == "input_ids" else values.to(dtype)).to(device)
    return made


def main_input(model: nn.Module) -> str:
    """The name of a model's main input.

    >>> from bigkit import zoo
    >>> main_input(zoo.empty_model("gpt2")), main_input(zoo.empty_model("resnet50.a1_in1k"))
    ('input_ids', 'pixel_values')
    """
    has_config = getattr(model, "config", None) is not None
    return str(getattr(model, "main_input_name", "input_ids" if has_config else "pixel_values"))


def vocabulary(model: nn.Module) -> int:
    """How many token ids a model knows."""
    config: Any = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", 0) or getattr(getattr(config, "text_config", None), "vocab_size", 2))


def _ids(model: nn.Module, config: Any, batch: int, prompt: int) -> Tensor:
    # Not random: a model's Python may ask whether they are padding.
    return torch.arange(7, 7 + batch * prompt).reshape(batch, prompt) % vocabulary(model)


def _images(model: nn.Module, config: Any, batch: int, prompt: int) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.rand(batch, getattr(vision, "num_channels", None) or 3, height, width)


def _features(model: nn.Module, config: Any, batch: int, prompt: int) -> Tensor:
    sound = getattr(config, "audio_config", config)
    frames = getattr(sound, "max_source_positions", None)
    bands = getattr(sound, "num_mel_bins", None) or 80
    # Whisper's kind halves the frames of a spectrogram; others take (frames, bands), a hundred frames a second.
    return torch.rand(batch, bands, 2 * frames) if frames else torch.rand(batch, 100 * SECONDS, bands)


def _samples(model: nn.Module, config: Any, batch: int, prompt: int) -> Tensor:
    return torch.rand(batch, SECONDS * RATE)


MADE: dict[str, Callable[[nn.Module, Any, int, int], Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _images,
    "input_features": _features,
    "input_values": _samples,
}
