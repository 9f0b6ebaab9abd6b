"""The CPU works where weights rest: for a few tokens it computes blocks' MLPs, and the link brings other weights.

A token reads each weight once. Over the link that is slower than from RAM, and the processor beside the RAM is idle. So
of some blocks only the part with state (attention and its KV cache) visits the GPU; what is a function of one tensor,
the MLP, is computed where its weights rest, while the link brings the next block. For many tokens (a prompt) the same
block is streamed whole: the link takes as long for all of them as for one, and the CPU does not.

Nothing rests twice: such a block is three units over the same memory. `whole` is lent for many tokens; `rest` and `mlp`
for few, the one by the streamer of the GPU and the other by one of the CPU, which lends RAM as it is.

Python starts the steps of attention between two MLPs, and neither CPU nor link is the limit then; as a CUDA graph a
token calls the host for each MLP (`host_calls.py`), and runs no Python but that.

What the CPU computes is not bit-equal to what the GPU computes: both round, in another order.

Leaves out: how much it should be (`maps/on_cpu.py`), blocks on disk, weights that no CPU kernel reads as they rest, and
experts: nobody knows which are needed before their router has run, so CPU and link would wait for the same moment.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..devices import join
from ..maps.on_cpu import FEW, mlp_of
from ..maps.partition import spread
from ..meta.skeleton import spec_from_module
from .codec import PLAIN, codec_of
from .grouping import Cut, Layout, experts_in, has_forward
from .handle import Away
from .hooks import AlignDevicesHook, this_thread
from .host_calls import Desk, HostCalls, alone, calls_now
from .mapped import PageLane
from .stream import Streamer
from .weights import Unit

READ = (torch.bfloat16, torch.float32)  # dtypes of weights for which PyTorch's CPU kernels keep up with the RAM


class Split(NamedTuple):
    """A block whose MLP the CPU computes for few tokens: three units over the same memory."""

    whole: Unit
    rest: Unit
    mlp: Unit


def choose(model: nn.Module, layout: Layout, whole_classes: Iterable[str], budget: int) -> dict[str, str]:
    """Choose blocks, evenly along the model and among the links, whose MLPs the CPU computes.

    Args:
        model, layout: the model, and where it rests and works.
        whole_classes: see `Cut`.
        budget: bytes of weights that the CPU is to read for a token.

    Returns:
        Name of a block -> name of its MLP.

    Raises:
        ValueError: no MLP rests in RAM in a form that the CPU computes with.
    """
    if not budget:
        return {}
    groups = [group for group in Cut(model, layout, whole_classes).groups if not group.loose and not group.routed]
    experts, root = experts_in(model), spec_from_module(model).root
    found = {}
    for group in groups:
        record = reduce(lambda record, own: record.children[own], filter(None, group.name.split(".")), root)
        mlp = join(group.name, mlp_of(record))
        streamed = layout.rests(group.name) == "cpu" and layout.works(group.name) != "cpu"
        if streamed and mlp != group.name and _is_computed(model.get_submodule(mlp), experts):
            found[group.name] = mlp
    if not found:
        routed = any(id(part) in experts for part in model.modules())
        why = "; experts are not computed there, since only their router's choice says which" if routed else ""
        raise ValueError(f"on_cpu: no block has an MLP that rests in RAM in float32 or bfloat16{why}: leave it out")
    chosen = set()
    works = {name: layout.works(name) for name in found}
    for device in {*works.values()}:
        own = [name for name in found if works[name] == device]
        sizes = [sum(p.nbytes for p in model.get_submodule(found[name]).parameters()) for name in own]
        chosen |= {own[i] for i in spread(sizes, budget * len(own) // len(found))}
    return {name: mlp for name, mlp in found.items() if name in chosen}


def _is_computed(mlp: nn.Module, experts: set[int]) -> bool:
    """Whether a block's MLP is a function of one tensor, and rests in a form that the CPU computes with."""
    plain = all(codec_of(p) is PLAIN and p.dtype in READ for p in mlp.parameters())
    routed = any(id(part) in experts for part in mlp.modules())
    forward = getattr(mlp.forward, "__wrapped__", mlp.forward)
    return plain and not routed and has_forward(mlp) and len(inspect.signature(forward).parameters) == 1


def split_units(model: nn.Module, units: Sequence[Unit], chosen: Mapping[str, str]) -> list[Split]:
    """The three units of each chosen block; the first is among `units`."""
    splits = []
    for unit in units:
        if unit.name in chosen and not unit.loose:
            mlp = model.get_submodule(chosen[unit.name])
            inside = {id(module) for module in mlp.modules()}
            own = [weight for weight in unit.weights if all(id(place[0]) in inside for place in weight.places)]
            others = [weight for weight in unit.weights if weight not in own]
            rest, part = ([weight.alias([*weight.places]) for weight in some] for some in (others, own))
            splits.append(Split(unit, Unit(unit.name, unit.module, rest), Unit(chosen[unit.name], mlp, part)))
    return splits


def cpu_streamer(splits: Sequence[Split]) -> Streamer:
    """What lends the MLPs on the CPU."""
    cpu = torch.device("cpu")
    return MlpStreamer(cpu, [split.mlp for split in splits], PageLane(cpu), prefetch=False)


class MlpStreamer(Streamer):
    """Lends MLPs on the CPU.

    Attributes:
        desks: device -> where hidden states are handed over in CUDA graphs.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.desks: dict[torch.device, Desk] = {}


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


class BlockHook(AlignDevicesHook):
    """The hook of such a block: brings all of it for many tokens, and for few what the CPU does not compute."""

    few: AlignDevicesHook  # the hook for few tokens
    mlp: Unit
    orders: tuple[dict[int, int], dict[int, int]]  # what follows each unit, with many tokens and with few

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.unit is None:
            return super().pre_forward(module, *args, **kwargs)
        few = _is_few(args, kwargs) and self._unchanged()
        assert self.streamer is not None
        self.streamer.after = self.orders[few]  # each learns its own: a prompt's would mislead the next token
        return self.few.pre_forward(module, *args, **kwargs) if few else super().pre_forward(module, *args, **kwargs)

    def _unchanged(self) -> bool:
        """Whether the modules of the MLP are what they were: adapters work on the GPU."""
        site = self.mlp.weights[0].lender.sites[self.mlp.index]
        return site._ids() == site._modules

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if this_thread.begun.get(self.few) is not None:
            return self.few.post_forward(module, output)
        return super().post_forward(module, output)

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.few.init_hook(module)
        return super().init_hook(module)

    def retire(self) -> None:
        super().retire()
        self.few.retire()

    def detach_hook(self, module: nn.Module) -> nn.Module:
        if self.few.streamer is not None and self.few.unit is not None:
            self.few.streamer.sites[self.few.unit.index].released = True
        return super().detach_hook(module)


class MlpHook(AlignDevicesHook):
    """The hook of the MLP: computes on the CPU, unless the block around it has been lent these weights on the GPU."""

    threads: int | None = None  # that PyTorch is to use meanwhile; None leaves them as they are
    _before: int | None = None  # how many it used before

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.unit is None or not isinstance(next(module.parameters()), Away):
            return args, kwargs
        if calls_now() is not None:
            return super().pre_forward(module, self._desk().give((*args, *kwargs.values())[0]))
        return super().pre_forward(module, *args, **kwargs)

    def _desk(self) -> Desk:
        assert isinstance(self.streamer, MlpStreamer) and self.output_device is not None
        return self.streamer.desks[self.output_device]

    def prepare_for_graphs(self) -> None:
        """Have a desk for few tokens: while a graph is recorded, none can be made."""
        if isinstance(self.streamer, MlpStreamer) and self.unit is not None and self.output_device is not None:
            widest = max(size for weight in self.unit.module.parameters() for size in weight.shape)
            desk, nbytes = self.streamer.desks.get(self.output_device), FEW * widest * 4
            if desk is None or desk.most < nbytes:
                self.streamer.desks[self.output_device] = Desk(self.output_device, nbytes)

    def _lend(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self.threads is not None:
            self._before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
        return super()._lend(module, args, kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if this_thread.begun.get(self) is None:
            return output
        if (calls := calls_now()) is not None:
            output = self._called(module, output, calls)
        return super().post_forward(module, output)

    def _called(self, module: nn.Module, output: Tensor, calls: HostCalls) -> Tensor:
        """Let a graph call for the output, which has been computed of whatever lay there."""
        desk, plain, threads = self._desk(), alone(module), torch.get_num_threads()
        given, place, inference = desk.given, desk.place(output), torch.is_inference_mode_enabled()
        place.copy_(output)  # on a stand-in, where all of it is done while it is recorded

        def compute() -> None:
            torch.set_num_threads(threads)
            with torch.inference_mode(inference), torch.no_grad():  # views of one mode are not written to in another
                place.copy_(plain.forward(given))  # users' hooks of the MLP itself are in the graph

        assert self.output_device is not None
        calls.add(compute, self.output_device)
        return desk.take(output)

    def _give_back(self, loan: Any, failed: bool = False) -> None:
        if self._before is not None:
            torch.set_num_threads(self._before)
            self._before = None
        super()._give_back(loan, failed)


def _is_few(args: Any, kwargs: Any) -> bool:
    """Whether a block is called with few tokens: rows of the first floating-point tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            return value.numel() // max(value.shape[-1], 1) <= FEW
    return False


def _orders(streamer: Streamer, splits: Sequence[Split]) -> tuple[dict[int, int], dict[int, int]]:
    """Unit -> the one that follows, at first: of whole blocks, and of what is left of those that are split."""
    rests = {split.whole.index: split.rest.index for split in splits if split.rest in streamer.units}
    many = [unit.index for unit in streamer.units if unit.index not in rests.values()]
    few = [rests.get(i, i) for i in many]
    learned = streamer.after
    return tuple(learned | dict(zip(order, [*order[1:], order[0]])) for order in (many, few))  # type: ignore[return-value]


def add_hooks(
    hooks: dict[nn.Module, AlignDevicesHook], splits: Sequence[Split], skip_keys: tuple[str, ...],
    threads: int | None = None,
) -> None:  # fmt: skip
    """Put the hooks of such blocks and of their MLPs among those of a model; modules within an MLP get none."""
    orders = {split.rest.weights[0].lender: _orders(split.rest.weights[0].lender, splits) for split in splits}
    for split in splits:
        gpu, cpu = split.rest.weights[0].lender, split.mlp.weights[0].lender
        block = BlockHook.placed(gpu.device, skip_keys, gpu, split.whole)
        assert isinstance(block, BlockHook)
        block.few, block.mlp = AlignDevicesHook.placed(gpu.device, skip_keys, gpu, split.rest), split.mlp
        block.orders = orders[gpu]
        for part in split.mlp.module.modules():
            hooks.pop(part, None)
        mlp = MlpHook.placed(cpu.device, skip_keys, cpu, split.mlp)
        assert isinstance(mlp, MlpHook)
        mlp.output_device, mlp.threads = gpu.device, threads
        hooks |= {split.whole.module: block, split.mlp.module: mlp}
