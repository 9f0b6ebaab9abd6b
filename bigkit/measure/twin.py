"""How long the host takes for a step of an architecture, told by a twin: the same modules, and next to no work.

Where Python sets the pace, a step takes what the sequence of calls takes, whatever their widths. So a twin has the
model's own classes, depth, heads and experts; its widths are divided until a head is 16 wide. It runs the same
`generate` on this machine, and what it takes is kept with the machine's other figures. A dry run counts the host's
steps in the twin and in the model, so that a twin of another depth serves too. A small model of images without a config
of Transformers, as timm's are, is its own twin: one image is next to no work.

Weights that rest elsewhere take time of the host's, too: hooks lend them, look up which experts are there, ask for
copies. A twin's may rest as its model's do. What the host then waits for readers of files is not counted, since a dry
run knows how long reading takes.

Leaves out: other models that are not Transformers', and how steady the host is: a rented one changed its pace by two
between a twin's run and its model's, some seconds later.
"""

from __future__ import annotations

import copy
import re
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..devices import Device
from ..dryrun.fake_bnb import config_of, fill_quantized, quantize_empty
from ..dryrun.inputs import main_input
from ..dryrun.run import dry_run
from ..dryrun.workload import Step, Workload, fill, work
from ..machine.ledger import HostStep, Twin, resting
from ..maps.plan import Plan
from ..meta.empty import init_empty_weights
from ..offload.dispatch import dispatch_model
from ..offload.lenders import streamers_in
from ..offload.rows import count_rows
from ..offload.transfer import Slot
from ..units import GiB, dtype_name, format_bytes, parse_bytes

HEAD, ROW = 16, 8  # width of a twin's narrowest head, and what widths are a multiple of: kernels want 16 bytes
QUANTIZED = 64  # the same for both if its layers are quantized: bitsandbytes takes blocks of so many weights
LOAD = Workload(batch=1, prompt=16, new=6)
PLAIN = replace(LOAD, generate=False)
FIRST, OTHERS = slice(1), slice(1, None)  # of a run's steps: the prompt, and its tokens
SINGLE = Workload(batch=1, prompt=1)  # no masks, no experts in groups: another sequence of calls than a longer prompt's
EXPERT = 64  # width of a twin's experts, of which there may be hundreds
SMALL = GiB  # bytes of weights, up to which a model of images is its own twin
HEADS = re.compile(r".*head_dim|d_kv|attention_head_size|kv_channels")
WIDTHS = re.compile(
    r"(.*_)?hidden_size|(.*_)?d_model|n_embd|(.*_)?embed_dim|embedding_size|.*hidden_dim|word_embed_proj_dim|dim|"
    r"(.*_)?intermediate_size|.*ffn_dim|.*ffn_size|d_ff|n_inner|d_inner|.*_lora_rank|rotary_dim|lru_width|"
    r".*projection_dim|time_step_rank|mamba_d_head|mamba_d_ssm|.*mlp_dim"
)


def narrow(config: Any, head: int = HEAD, row: int = ROW) -> Any:
    """A copy of a config of Transformers whose widths are divided: same depth, same heads, same experts.

    Args:
        config: with the sizes of a model.
        head: the width of its narrowest head in the copy.
        row: what widths are rounded up to a multiple of.

    >>> import transformers
    >>> twin = narrow(transformers.LlamaConfig())
    >>> twin.hidden_size, twin.intermediate_size, twin.num_attention_heads, twin.num_hidden_layers
    (512, 1376, 32, 32)
    """
    twin = copy.deepcopy(config)
    _divide(twin, max(1, min(_heads(twin), default=head) // head), row)
    return twin


def _parts(config: Any) -> list[Any]:
    """A config and those inside it."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return [config, *(part for value in inner for part in _parts(value))]


def _heads(config: Any) -> list[int]:
    """The widths of all heads in a config, said or implied."""
    widths = []
    for part in _parts(config):
        said = [value for name, value in vars(part).items() if HEADS.fullmatch(name) and type(value) is int and value]
        hidden, heads = getattr(part, "hidden_size", None), getattr(part, "num_attention_heads", None)
        implied = [hidden // heads] if isinstance(hidden, int) and isinstance(heads, int) and heads else []
        widths += said or implied
    return widths


def _divide(config: Any, factor: int, row: int) -> None:
    for part in _parts(config):
        for name, value in list(vars(part).items()):
            if type(value) is not int or value <= 0:
                continue
            if HEADS.fullmatch(name) or WIDTHS.fullmatch(name):
                width = -(-value // factor // row) * row
                setattr(part, name, min(value, EXPERT if name.startswith("moe_") else width))


def twin_of(model: nn.Module, quantized: bool = False) -> nn.Module:
    """An empty twin of a model, of the same classes; `quantized` if its layers will be.

    Raises:
        ValueError: no twin can be made of it; the sentence says why.
    """
    from ..zoo._transformers import from_config

    config, dtype = getattr(model, "config", None), getattr(model, "dtype", torch.bfloat16)
    if not hasattr(config, "to_dict"):
        size = sum(parameter.nbytes for parameter in model.parameters())
        if main_input(model) == "pixel_values" and size <= SMALL:
            return copy.deepcopy(model)
        raise ValueError(
            f"a {type(model).__name__} of {format_bytes(size)} has no config of Transformers, of which a narrow twin "
            f"can be made: expected one, or a model of images of at most {format_bytes(SMALL)}"
        )
    try:
        with init_empty_weights():
            sizes = narrow(config, QUANTIZED, QUANTIZED) if quantized else narrow(config)
            twin: nn.Module = from_config(type(model), sizes, dtype).eval()
    except Exception as error:
        raise ValueError(f"no narrow twin of {type(model).__name__} can be made ({error})") from error
    return twin


def measure_twin(
    model: nn.Module,
    device: str,
    quantization: str | None = None,
    repeats: int = 5,
    plan: Plan | Mapping[str, Device] | None = None,
    expert_cache: int | str = 0,
) -> Twin:
    """Run a twin of a model on this machine, and say what the host took.

    Args:
        model: empty, of Transformers; it is not changed.
        device: "cuda" or "cpu".
        quantization: of its linear layers: one of `QUANTIZATIONS`.
        repeats: runs that count, after one that does not.
        plan, expert_cache: where the model's parts rest, see `dispatch_model`: the twin's do the same. None: all lies
            where it works.

    Raises:
        ValueError: no twin can be made, or it cannot do the work.
    """
    twin = NarrowTwin(model, device, quantization, plan, expert_cache)
    # Experts: `generate` decodes with another implementation of them than a plain call does.
    for load in (LOAD, SINGLE, *([PLAIN] if any(map(count_rows, twin.twin.modules())) else [])):
        for _ in range(1 + repeats):
            twin.run(load)
    return twin.told()


class NarrowTwin:
    """A twin of a model on this machine, which runs when it is told to: in turn with the model, for example.

    Args:
        model, device, quantization, plan, expert_cache: see `measure_twin`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str,
        quantization: str | None = None,
        plan: Plan | Mapping[str, Device] | None = None,
        expert_cache: int | str = 0,
    ) -> None:
        self.model, self.device, self.quantization = model, device, quantization
        self.places = dict(plan.device_map if isinstance(plan, Plan) else plan or {})
        self.rests = resting(self.places, expert_cache)
        self.waited = 0.0  # seconds for readers of files
        self.issued: dict[Workload, list[int]] = {}
        self.runs: dict[Workload, list[list[HostStep]]] = {}
        self.twin = twin_of(model, quantization is not None)
        if quantization is None:
            fill(self.twin, {"": device})
        else:
            how = config_of(quantization, "bfloat16")
            fill_quantized(quantize_empty(self.twin, how), {"": device}, device, how)
        self.cache = 0
        if self.rests:
            self.cache = self._share(parse_bytes(expert_cache))
            self._spread()

    def _share(self, expert_cache: int) -> int:
        """Bytes for as many of the twin's experts as a cache holds of the model's."""
        whole, own = (
            sum(p.nbytes for module in one.modules() if count_rows(module) for p in module.parameters())
            for one in (self.model, twin_of(self.model))
        )
        return -(-expert_cache * own // max(whole, 1))

    def _spread(self) -> None:
        """Let the twin's parts rest as the model's do, and count what the host waits for readers."""
        folder = tempfile.mkdtemp(prefix="bigkit-twin")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        gpus = [place for place in self.places.values() if isinstance(place, int)]
        dispatch_model(
            self.twin, self.places, None if gpus else 0, offload_dir=folder, ram_cache=0, expert_cache=self.cache,
            stand_in={} if self.device.startswith("cuda") else dict.fromkeys(gpus or [0], "cpu"),
        )  # fmt: skip
        for streamer in streamers_in(self.twin):
            vars(streamer.lane)["arrive"] = partial(self._arrive, streamer.lane.arrive)

    def _arrive(self, arrive: Callable[[Slot], None], slot: Slot) -> None:
        begin, reads = time.perf_counter(), bool(slot.pending)
        arrive(slot)
        self.waited += (time.perf_counter() - begin) * reads

    def run(self, load: Workload = LOAD) -> None:
        """Do some work once, and note what the host took; the first time of each does not count."""
        if load not in self.issued:
            self.issued[load] = issued_in(self.model, load, self.quantization, self.places or None, self.cache)
        steps = timed(self.twin, load, self.device, lambda: time.perf_counter() - self.waited)
        noted = [HostStep(*step, issued) for step, issued in zip(steps, self.issued[load])]
        self.runs.setdefault(load, []).append(noted)

    def told(self) -> Twin:
        """The medians of all runs that count."""

        def median(load: Workload, part: slice) -> HostStep | None:
            return _median([step for run in self.runs.get(load, [])[1:] for step in run[part]])

        prefill = median(LOAD, FIRST)
        assert prefill is not None
        others = median(LOAD, OTHERS), median(SINGLE, FIRST), median(PLAIN, OTHERS)
        return Twin(type(self.model).__name__, self.quantization, prefill, *others, self.rests)


def issued_in(
    model: nn.Module, load: Workload, quantization: str | None, plan: Any = None, expert_cache: int = 0
) -> list[int]:
    """Steps of the host in each step of the work of a model's twin, counted by a dry run."""
    work = load.batch, load.prompt, load.new
    how: Any = {"quantization": quantization, "generate": load.generate, "expert_cache": expert_cache}
    plain = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.bfloat16)
    # A dtype says that its layers are plain, or quantized here, whatever its config says of a checkpoint.
    how["dtype"] = "bfloat16" if quantization else dtype_name(plain)
    run = dry_run(lambda: twin_of(model, quantization is not None), plan, *work, **how)
    ends = [0, *(end for _, end in run.steps)]
    return [sum(operation.issued for operation in run.operations[a:b]) for a, b in zip(ends, ends[1:])]


def timed(
    model: nn.Module, load: Workload, device: str, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, float]]:
    """Seconds of each step of a model's work by a clock, and those before the model, or its encoder, was called."""
    steps: list[tuple[float, float]] = []
    called: list[float] = []
    start = 0.0

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return clock()

    def after(_: Step) -> None:
        nonlocal start
        end = now()
        steps.append((end - start, called[0] - start))
        called.clear()
        start = end

    asked: list[Any] = [model]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        asked.append(model.get_encoder())  # type: ignore[operator]  # generate calls it by itself
    hooks = [part.register_forward_pre_hook(lambda *_: called.append(clock()), prepend=True) for part in asked]
    start = now()
    try:
        work(model, load, device, after)
    finally:
        for hook in hooks:
            hook.remove()
    return steps


def _median(steps: list[HostStep]) -> HostStep | None:
    if not steps:
        return None
    return HostStep(
        statistics.median(step.seconds for step in steps),
        statistics.median(step.before for step in steps),
        round(statistics.median(step.issued for step in steps)),
    )
