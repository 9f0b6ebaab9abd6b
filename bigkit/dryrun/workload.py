"""The work that is predicted and measured: a model with random weights, one pass over a prompt, then token by token.

The same functions run on a real GPU and on fake devices, so what is compared is the same work: `fill` gives every
tensor of an empty model memory on its device, in the model's order; `work` runs the prompt and then token by token,
greedily. A model of Transformers that can generate does it with its own `generate`: its cache classes, masks, positions
and the implementation of experts that it decodes with are those of a user's run. Others, and all with
`Workload(generate=False)`, are called once for the prompt and once a token (`passes`).

Leaves out: images inside a text, beams, and stopping early.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..devices import Device, placement
from ..model.config import facts
from ..model.estimate import whole_number
from ..offload.graphs import graph_decode
from ..offload.inputs import torch_device
from ..units import counted
from .inputs import NotMade, inputs_of, main_input, vocabulary

CACHES = ("past_key_values", "cache_params", "mems", "state")  # fields of an output that hold what was seen


@dataclass(frozen=True)
class Workload:
    """What a model is asked to do.

    Args:
        batch: sequences, or images.
        prompt: tokens of each sequence's prompt. A vision model sees an image of its own size instead.
        new: tokens that are then generated one at a time.
        all_logits: keep the logits of every prompt token, as a plain call of the model does; False keeps those of the
            last one alone, as generation does.
        cache: keep the KV cache of a prompt after which nothing is generated.
        generate: run `model.generate` where there is one; False calls the model itself, as scoring a text does.
        graphs: generate within `bigkit.graph_decode`.

    Raises:
        ValueError: graphs are asked for, and `generate` is not.

    >>> Workload(batch=8, prompt=512)
    Workload(batch=8, prompt=512, new=0, all_logits=False, cache=True, generate=True, graphs=False)
    """

    batch: int = 1
    prompt: int = 512
    new: int = 0
    all_logits: bool = False
    cache: bool = True
    generate: bool = True
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.graphs and (self.all_logits or not (self.cache and self.generate)):
            raise ValueError("graphs=True is about generate: leave all_logits, cache and generate as they are")
        for name, least in (("batch", 1), ("prompt", 1), ("new", 0)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, least))


class Step(NamedTuple):
    """A moment in the work: the phase that ended ("prefill" or "decode") and the KV cache that is kept (None: none)."""

    phase: str
    cache: Any = None


def step_name(number: int) -> str:
    """What a step is called: "prefill" is step 0, "token 1" the next.

    >>> step_name(0), step_name(1)
    ('prefill', 'token 1')
    """
    return f"token {number}" if number else "prefill"


def torch_places(device_map: Mapping[str, Device]) -> Callable[[str], torch.device]:
    """A function from the name of a module or tensor to its torch device: that of the innermost entry around it.

    Raises:
        ValueError: by the function, if the map has no such entry.

    >>> torch_places({"h.0": 0, "h.1": "cuda:1"})("h.1.mlp.weight")
    device(type='cuda', index=1)
    """
    device_of = placement(device_map)

    def place(name: str) -> torch.device:
        device = device_of(name)
        if device is None:
            raise ValueError(f"the device map has no entry for {name!r}: expected one for it or for a module around it")
        return torch_device(device)

    return place


def at_random(empty: Tensor, device: torch.device, std: float = 0.02) -> nn.Parameter:
    """A parameter like an empty tensor, with random values of a standard deviation; whole numbers are 0."""
    data = torch.empty(empty.shape, dtype=empty.dtype, device=device)
    data.normal_(0, std) if data.is_floating_point() and data.element_size() > 1 else data.zero_()
    return nn.Parameter(data, requires_grad=False)


@torch.no_grad()
def fill(
    model: nn.Module, device_map: Mapping[str, Device], make: Callable[[Tensor, torch.device], nn.Parameter] = at_random
) -> nn.Module:
    """Give every tensor memory on its device: parameters random values, buffers their own.

    Args:
        model: empty (on the meta device), buffers real; it is changed. Tied parameters stay tied.
        device_map: module name -> device.
        make: gives a parameter for an empty tensor, on a device.

    >>> from bigkit import zoo
    >>> fill(zoo.empty_model("pygpt"), {"": "cpu"}).lm_head.weight.device
    device(type='cpu')
    """
    place = torch_places(device_map)
    filled: dict[int, nn.Parameter] = {}  # id of an empty tensor -> the one with memory
    moved: dict[int, Tensor] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in filled:
                filled[id(parameter)] = make(parameter, place(prefix + name))
            module._parameters[name] = filled[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if id(buffer) not in moved:
                device = place(prefix + name)
                moved[id(buffer)] = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            module._buffers[name] = moved[id(buffer)]
    return model


def work(model: nn.Module, load: Workload, device: torch.device | str | int, after: Callable[[Step], None]) -> None:
    """Do the work, and say after each step that it is done; the arguments and errors are those of `passes`.

    >>> from bigkit import zoo
    >>> model = fill(zoo.empty_model("pymoe"), {"": "cpu"}).eval()
    >>> work(model, Workload(batch=2, prompt=8, new=2), "cpu", lambda step: print(step.phase))
    prefill
    decode
    decode
    """
    plain = load.all_logits or not load.cache or not load.generate
    if plain or not (_generates(model) and hasattr(model, "generation_config")):
        if load.graphs:
            raise NotRun(f"{type(model).__name__} has no generate of Transformers, which graph_decode is for")
        for step in passes(model, load, device):
            after(step)
        return
    with graph_decode(model) if load.graphs else nullcontext():
        _generate(model, load, device, after)


def _generate(
    model: nn.Module, load: Workload, device: torch.device | str | int, after: Callable[[Step], None]
) -> None:
    _check_positions(model, load)
    inputs = inputs_of(model, load.batch, load.prompt, torch_device(device))
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    config: Any = copy.deepcopy(model.generation_config)
    never = vocabulary(model)  # an id that no token has: nothing ends early
    config.update(max_new_tokens=load.new + 1, max_length=None, do_sample=False, num_beams=1, eos_token_id=never)
    if getattr(model.config, "is_encoder_decoder", False) and config.decoder_start_token_id is None:
        config.decoder_start_token_id = 0
    steps = 0

    def done(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal steps
        steps += 1
        caches = [getattr(output, name, None) for name in CACHES]
        after(Step("decode" if steps > 1 else "prefill", [cache for cache in caches if cache is not None]))
        if steps > load.new:
            raise _Done

    hook = model.register_forward_hook(done)
    try:
        model.generate(**inputs, generation_config=config)  # type: ignore[operator]
    except _Done:
        pass
    finally:
        hook.remove()


class NotRun(NotMade):
    """The model cannot do the work; the text says why in one sentence."""


class _Done(Exception):
    """The last token is computed: on fake GPUs nobody knows whether a sequence is finished."""


@torch.no_grad()
def passes(model: nn.Module, load: Workload, device: torch.device | str | int) -> Iterator[Step]:
    """Run the work; yields a `Step` after the prompt, then one after each new token.

    Args:
        model: with memory, in eval mode, wherever its parts lie.
        load: what to run. Tokens are generated only by models that can generate.
        device: where the inputs are made.

    Raises:
        ValueError: more tokens than the model has positions for, or it takes neither token ids, images nor sound.

    >>> from bigkit.zoo.gpt import load_pygpt
    >>> [step.phase for step in passes(load_pygpt(), Workload(batch=1, prompt=8, new=2), "cpu")]
    ['prefill', 'decode', 'decode']
    """
    _check_positions(model, load)
    device = torch_device(device)
    inputs, options = inputs_of(model, load.batch, load.prompt, device), _options(model, load)
    taken = inspect.signature(model.forward).parameters
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = torch.zeros((load.batch, 1), dtype=torch.long, device=device)
    if _is_gpt(model):
        yield from _gpt_passes(model, load, inputs["input_ids"])
        return
    output = model(**inputs, **options) if {*inputs} <= {*taken} else model(*inputs.values())  # timm's x is an image
    if not _generates(model):
        yield Step("prefill")
        return
    logits = output.logits
    token = logits[:, -1:].argmax(-1)
    state = {"past_key_values": output.past_key_values}
    if "decoder_input_ids" in inputs:
        state["encoder_outputs"] = (output.encoder_last_hidden_state,)
    del output, logits
    yield Step("prefill", state["past_key_values"])
    for _ in range(load.new):
        name = "decoder_input_ids" if "encoder_outputs" in state else "input_ids"
        output = model(**{name: token}, **state, **options)
        token = output.logits[:, -1:].argmax(-1)
        state["past_key_values"] = output.past_key_values
        del output
        yield Step("decode", state["past_key_values"])


def _check_positions(model: nn.Module, load: Workload) -> None:
    if (most := most_tokens(model)) is not None and load.prompt + load.new > most:
        raise NotRun(
            f"{type(model).__name__} has learned positions for {most:,} tokens, and {load.prompt:,} + {load.new:,} "
            "were asked for: take a shorter prompt, or fewer new tokens"
        )


def in_words(model: nn.Module, load: Workload) -> str:
    """What a model is asked to do, in words.

    >>> from bigkit import zoo
    >>> in_words(zoo.empty_model("gpt2"), Workload(2, 8, 3))
    '2 x 8 tokens, then 3 more each'
    """
    if (main := main_input(model)) == "pixel_values":
        return counted(load.batch, "image")
    if main != "input_ids":
        then = f", then {load.new:,} tokens each" if load.new and _generates(model) else ""
        return f"{counted(load.batch, 'piece')} of sound{then}"
    then = f", then {load.new:,} more each" if load.new and _generates(model) else ""
    return f"{load.batch:,} x {load.prompt:,} tokens{then}{', by CUDA graphs' if load.graphs else ''}"


def most_tokens(model: nn.Module) -> int | None:
    """The most tokens that a model's table of learned positions has room for; None if it has no such table.

    >>> from bigkit import zoo
    >>> most_tokens(zoo.empty_model("gpt2")), most_tokens(zoo.empty_model("llama-3.1-8b"))
    (1024, None)
    """
    config: Any = getattr(model, "config", None)
    about = facts(config.to_dict()) if hasattr(config, "to_dict") else {}
    most = about.get("max_position_embeddings")
    if about.get("positions") != "learned" or not most:
        return None
    tables = (module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))
    return most if any(most <= rows <= most + 2 for rows in tables) else None  # OPT's begins with row 2


def _options(model: nn.Module, load: Workload) -> dict[str, Any]:
    """What a plain call of the model is told besides its inputs."""
    options: dict[str, Any] = {}
    if _generates(model) and not _is_gpt(model):
        options["use_cache"] = load.cache or load.new > 0
        if not load.all_logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = 1
    return options


def _generates(model: nn.Module) -> bool:
    return _is_gpt(model) or bool(getattr(model, "can_generate", lambda: False)())


def _is_gpt(model: nn.Module) -> bool:
    from ..zoo.gpt import GPT

    return isinstance(model, GPT)


def _gpt_passes(model: nn.Module, load: Workload, prompt: Tensor) -> Iterator[Step]:
    from ..zoo.kv_cache import KVCache

    cache = KVCache(model.config.n_layer, load.prompt + load.new)  # type: ignore[union-attr, arg-type]
    token = prompt
    for i in range(1 + load.new):
        token = model(token, cache=cache)[0][:, -1:].argmax(-1)
        yield Step("decode" if i else "prefill", cache)
