"""A KV cache that rests in RAM: of a long context, only the layers that work, come next, or find room are on the GPU.

    RAM    pinned, per layer: one row for each token, its keys and values side by side
    GPU    two slots: rows of one layer are put in the order of an attention, while those of the next layer arrive;
           and between prompts, slots of their own for as many layers as there is room for

A layer needs all its rows to work, but adds only one for each token. So rows come over the link once a token, and only
new ones go back, on a stream of their own: a link has two directions. Transformers' own offloaded cache moves whole
layers both ways at once, which takes hardly longer than one way. What makes a token faster is less to bring: a prompt
needs memory for its activations, and a token does not, so layers stay there until the next prompt, of any cache.

Layers with a sliding window or a recurrent state stay on the GPU: they do not grow.

Leaves out: attention on the CPU, where the cache rests, and which layers had better stay (`maps/`).
"""

from __future__ import annotations

import weakref
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..checkpoints.ring import Slab
from ..maps.cures import SLOTS
from ..maps.partition import spread
from ..units import parse_bytes
from ._torch import is_real_cuda

_IN_ORDER = torch.contiguous_format
ROWS = 256  # tokens by which a layer's RAM grows at least


class RestingCache(DynamicCache):
    """A cache for `generate(past_key_values=...)` whose layers rest in RAM. Its values are those of `DynamicCache`.

    Args:
        config: the model's.
        layers_on_device: how many of the layers that grow never go to RAM, spread evenly along the model.
        room: bytes of each GPU in which other layers stay between prompts (int or text, such as "4GB"). None is what
            PyTorch keeps of the memory that the prompt needed, less what an attention works with; 0 lets none stay.

    Raises:
        ValueError: `layers_on_device` is not between 0 and the number of layers that grow; `config` is none.

    It can be copied and pickled, so that a prompt that many requests begin with is computed once.

    >>> from transformers import LlamaConfig
    >>> small = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2)
    >>> cache = RestingCache(small, layers_on_device=2)
    >>> [type(layer).__name__ for layer in cache.layers]
    ['DynamicLayer', 'RestingLayer', 'DynamicLayer', 'RestingLayer']
    >>> keys, values = cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), layer_idx=1)
    >>> keys.shape, cache.layers[1].get_seq_length()
    (torch.Size([1, 2, 3, 4]), 3)
    """

    def __init__(self, config: Any, *, layers_on_device: int = 0, room: int | str | None = None) -> None:
        if not hasattr(config, "get_text_config"):
            raise ValueError(f"a RestingCache needs a configuration, not a {type(config).__name__}: give model.config")
        super().__init__(config=config)
        grow = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not isinstance(layers_on_device, Integral) or not 0 <= layers_on_device <= len(grow):
            raise ValueError(
                f"layers_on_device is {layers_on_device!r}, and {len(grow)} layers of this model have a cache that "
                f"grows: give a number from 0 to {len(grow)}"
            )
        stay = spread([1] * len(grow), layers_on_device)
        windows = _AllWindows(None if room is None else parse_bytes(room), _repeats(config))
        for i in (own for k, own in enumerate(grow) if k not in stay):
            self.layers[i] = RestingLayer(windows)

    def resting_bytes(self) -> int:
        """Bytes of RAM that its layers have taken so far."""
        return sum(layer.rows.nbytes() for layer in self.layers if isinstance(layer, RestingLayer) and layer.rows)

    def layers_that_stay(self) -> int:
        """How many of its layers are on the device for good, or until the next prompt."""
        resting = [layer for layer in self.layers if isinstance(layer, RestingLayer)]
        windows = {id(own): own for layer in resting for own in layer.windows.values()}
        return len(self.layers) - len(resting) + sum(len(own.own) for own in windows.values())


class RestingLayer(DynamicLayer):
    """One layer of a `RestingCache`.

    Args:
        windows: device -> the slots there, shared by all layers of a cache.
    """

    def __init__(self, windows: _AllWindows) -> None:
        self.windows, self.length = windows, 0
        self.rows: _Rows | None = None
        super().__init__()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = _Rows(key_states, value_states)
        self.windows[self.device].enter(self)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add rows, and give all.

        Args:
            key_states, value_states: new ones, shape (batch, heads, tokens, width).

        Raises:
            RuntimeError: gradients are wanted.
            ValueError: they are of another batch, or other heads, than those that rest.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("a RestingCache is for inference: run the model under torch.no_grad()")
        shapes, rows = _shapes_of(key_states, value_states), self.rows
        fits = rows is not None and rows.shapes == shapes and self.device == key_states.device
        if rows is None or not self.length and not (fits and rows.dtype == key_states.dtype):
            self.lazy_initialization(key_states, value_states)
        elif not fits:
            raise ValueError(
                f"a layer of this RestingCache holds keys and values of {rows.shapes} (batch, heads, width) on "
                f"{self.device}, and got {shapes} on {key_states.device}: call reset() before another batch"
            )
        assert self.rows is not None
        window, start, stop = self.windows[self.device], self.length, self.length + key_states.shape[-2]
        self.rows.grow(stop)
        slot = window.take(self, stop)
        try:
            for own, new in zip(self.rows.split(slot.memory[start:stop]), (key_states, value_states)):
                own.copy_(new)
            window.send_back(slot, self, start, stop)
            self.length = slot.length = stop
            if start:  # a prompt finds nothing in the layers to come
                window.fetch_next(self)
        except BaseException:
            slot.rows = None
            raise
        # As they lie in a `DynamicCache`: for another order an attention may choose a kernel that rounds otherwise.
        keys, values = self.rows.split(slot.memory[:stop]) if start else (key_states, value_states)
        return keys.clone(memory_format=_IN_ORDER), values.clone(memory_format=_IN_ORDER)

    def get_seq_length(self) -> int:
        return self.length

    # -- the whole, in RAM

    def _whole(self) -> tuple[Tensor, Tensor] | None:
        if self.rows is None:
            return None
        self.windows[self.device].finish()
        keys, values = self.rows.split(
            torch.cat([torch.empty(0, self.rows.width, dtype=self.dtype), *self.rows.parts(0, self.length)])
        )
        return keys, values

    @property
    def keys(self) -> Tensor | None:
        """All keys, shape (batch, heads, tokens, width), copied in RAM; None before the first."""
        return None if (whole := self._whole()) is None else whole[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """Set by classes of Transformers, to None."""

    @property
    def values(self) -> Tensor | None:
        """All values, as `keys`."""
        return None if (whole := self._whole()) is None else whole[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """Set by classes of Transformers, to None."""

    def _replace(self, whole: tuple[Tensor, Tensor]) -> None:
        """Let other keys and values rest, perhaps of another batch."""
        keys, values = whole
        self.rows = _Rows(keys, values, is_real_cuda(self.device))
        self.rows.grow(self.length)
        self.rows.write(torch.cat([part.permute(2, 0, 1, 3).flatten(1) for part in (keys, values)], 1), 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if (whole := self._whole()) is not None:
            self._replace((whole[0][indices.cpu()], whole[1][indices.cpu()]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if (whole := self._whole()) is not None:
            self._replace((whole[0].repeat_interleave(repeats, 0), whole[1].repeat_interleave(repeats, 0)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a positive number is the length that stays, as older Transformers have it."""
        most = tokens_to_remove if tokens_to_remove > 0 else max(0, self.length + tokens_to_remove)
        self.length = min(self.length, most)

    def reset(self) -> None:
        self.length = 0  # its RAM stays for the next prompt

    # -- copies

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "rows": self._whole()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["rows"] is not None:
            self._replace(state["rows"])
            self.windows[self.device].enter(self)


def _shapes_of(keys: Tensor, values: Tensor) -> list[tuple[int, ...]]:
    """Batch, heads and width of a head, of each."""
    return [(*part.shape[:2], part.shape[3]) for part in (keys, values)]


class _Rows:
    """The RAM of one layer: slabs, each for some rows.

    Args:
        keys, values: the first, for their shapes (batch, heads, tokens, width).
    """

    def __init__(self, keys: Tensor, values: Tensor, pin: bool | None = None) -> None:
        self.dtype, self.shapes = keys.dtype, _shapes_of(keys, values)
        self.widths = [batch * heads * width for batch, heads, width in self.shapes]
        self.width = sum(self.widths)  # elements of a row
        self.pin = is_real_cuda(keys.device) if pin is None else pin
        self.slabs: list[tuple[int, Tensor, Slab]] = []  # first row, rows as a tensor of shape (rows, width), memory
        self.capacity = 0
        self.sent: Any = None  # event after the last rows were written here

    def nbytes(self) -> int:
        return self.capacity * self.width * self.dtype.itemsize

    def grow(self, rows: int) -> None:
        """Have room for so many rows: as many slabs as the logarithm of it, so that there are few copies."""
        if rows > self.capacity:
            more = -(-max(rows - self.capacity, self.capacity // 8) // ROWS) * ROWS
            slab = Slab(more * self.width * self.dtype.itemsize, self.pin)
            slab.pin()
            self.slabs.append((self.capacity, slab.bytes.view(self.dtype).view(more, self.width), slab))
            self.capacity += more

    def parts(self, start: int, stop: int) -> list[Tensor]:
        """Rows as they lie in the slabs."""
        parts = [memory[max(0, start - first) : max(0, stop - first)] for first, memory, _ in self.slabs]
        return [part for part in parts if len(part)]

    def write(self, rows: Tensor, start: int) -> None:
        """Let rows, shape (rows, width), rest here from a place on; a GPU's are queued on its current stream."""
        parts = self.parts(start, start + len(rows))
        for part, own in zip(parts, rows.split([*map(len, parts)])):
            part.copy_(own, non_blocking=True)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Keys and values of rows, shape (rows, width): views of shape (batch, heads, rows, width of a head)."""
        return [
            part.view(len(rows), *shape).permute(1, 2, 0, 3)
            for part, shape in zip(rows.split(self.widths, 1), self.shapes)
        ]


class _Slot:
    """Memory on the device for the rows of one layer."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, 0)
        self.rows: _Rows | None = None  # of the layer whose they are
        self.length = 0  # rows that it holds
        self.ready: Any = None  # event after the last copy into it
        self.sent: Any = None  # event after the last copy out of it


class _AllWindows(dict[torch.device, "_Windows"]):
    """Device -> the slots there.

    Args:
        room: see `RestingCache`.
        repeats: query heads that share a head of keys.
    """

    def __init__(self, room: int | None, repeats: int) -> None:
        super().__init__()
        self.room, self.repeats = room, repeats

    def __reduce__(self) -> Any:
        return _AllWindows, (self.room, self.repeats)  # a copy has slots of its own

    def __missing__(self, device: torch.device) -> _Windows:
        return self.setdefault(device, _Windows(device, self.room, self.repeats))


class _Windows:
    """The slots on one device, and the streams that fill and empty them."""

    everywhere: weakref.WeakSet[_Windows] = weakref.WeakSet()

    def __init__(self, device: torch.device, room: int | None, repeats: int) -> None:
        self.device, self.given, self.repeats = device, room, repeats
        self.room: int | None = None  # bytes in which layers stay; None: not asked for since the last prompt
        self.layers: list[weakref.ref[RestingLayer]] = []  # in their order; each refers to this object
        self.slots = [_Slot() for _ in range(SLOTS)]
        self.own: dict[int, _Slot] = {}  # number of a layer that stays -> its slot
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if is_real_cuda(device) else []
        self.everywhere.add(self)

    def take(self, layer: RestingLayer, rows: int) -> _Slot:
        """The slot that holds all rows of a layer, with room for `rows`."""
        self._let_stay(layer, rows - layer.length)
        slot = self._holding(layer) or self._fetch(layer)
        if slot in self.slots:
            self.slots.remove(slot)
            self.slots.append(slot)  # used last
        if self.streams:
            current = torch.cuda.current_stream(self.device)
            for event in (slot.ready, slot.sent):
                if event is not None:
                    current.wait_event(event)
        self._room(slot, layer, rows, keep=layer.length)
        return slot

    def enter(self, layer: RestingLayer) -> None:
        """A layer has rows now."""
        if layer not in self._present():
            self.layers.append(weakref.ref(layer))

    def _present(self) -> list[RestingLayer]:
        return [own for ref in self.layers if (own := ref()) is not None]

    def _let_stay(self, layer: RestingLayer, tokens: int) -> None:
        """Choose the layers that stay, once a token; a prompt gets their room."""
        if tokens > ROWS or not layer.length:
            for windows in [*self.everywhere]:
                if windows.device == self.device:
                    windows.own, windows.room = {}, None
        elif layer is self.layers[0]():
            sizes = [own.rows.nbytes() for own in self._present() if own.rows]
            if self.room is None:
                works = max(sizes) * self._layers_at_work(layer)
                self.room = _left_by_prompt(self.device) - works if self.given is None else self.given
                if self.streams:
                    torch.cuda.empty_cache()  # what the prompt left is in pieces of other sizes
            self.own = {i: self.own.get(i) or _Slot() for i in spread(sizes, self.room)}

    def _layers_at_work(self, layer: RestingLayer) -> int:
        """How many layers an attention takes: keys and values in its order, and again for each query head, unless a
        kernel reads heads that are shared. None does so with a mask, which sequences of several lengths have."""
        assert layer.rows is not None
        alone = layer.rows.shapes[0][0] == 1 and layer.rows.dtype.itemsize == 2
        return 1 + (0 if alone or self.repeats == 1 else self.repeats)

    def _holding(self, layer: RestingLayer) -> _Slot | None:
        found = (slot for slot in (*self.slots, *self.own.values()) if slot.rows is layer.rows)
        return next((slot for slot in found if slot.length >= layer.length), None)

    def fetch_next(self, layer: RestingLayer) -> None:
        """Begin to bring the layer that works next and does not stay, while this one works; or one that will stay."""
        layers = self._present()
        at = layers.index(layer)
        for following in (*layers[at + 1 :], *layers[:at]):
            held = self._holding(following)
            if held is None and following.length:
                self._fetch(following)
            if held is None or held in self.slots:
                return

    def _fetch(self, layer: RestingLayer) -> _Slot:
        assert layer.rows is not None
        slot = self.own.get(self._present().index(layer), self.slots[0])  # its own, or that used longest ago
        slot.rows = None
        if not self.streams:
            self._room(slot, layer, layer.length)
            self._copy(slot, layer)
        else:
            current, (inward, _) = torch.cuda.current_stream(self.device), self.streams
            inward.wait_stream(current)  # what has read the slot was queued there
            self._room(slot, layer, layer.length)
            for event in (slot.sent, layer.rows.sent):
                if event is not None:
                    inward.wait_event(event)
            with torch.cuda.stream(inward):
                self._copy(slot, layer)
                slot.ready = inward.record_event(slot.ready)
        slot.rows, slot.length = layer.rows, layer.length
        return slot

    def _copy(self, slot: _Slot, layer: RestingLayer) -> None:
        assert layer.rows is not None
        at = 0
        for part in layer.rows.parts(0, layer.length):
            slot.memory[at : at + len(part)].copy_(part, non_blocking=True)
            at += len(part)

    def send_back(self, slot: _Slot, layer: RestingLayer, start: int, stop: int) -> None:
        """Write new rows to where they rest."""
        assert layer.rows is not None
        if not self.streams:
            return layer.rows.write(slot.memory[start:stop], start)
        outward = self.streams[1]
        outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(outward):
            layer.rows.write(slot.memory[start:stop], start)
            slot.sent = outward.record_event(slot.sent)
            layer.rows.sent = outward.record_event(layer.rows.sent)

    def _room(self, slot: _Slot, layer: RestingLayer, rows: int, keep: int = 0) -> None:
        """Let a slot have room for so many rows of a layer, and keep the first of what it holds."""
        assert layer.rows is not None
        width, old = layer.rows.width, slot.memory
        if old.dtype == layer.dtype and old.shape[1] == width and len(old) >= rows and old.device == self.device:
            return
        with torch.inference_mode(False):
            size: Any = {"size": (layer.rows.capacity, width), "dtype": layer.dtype, "device": self.device}
            try:
                slot.memory = torch.empty(**size)
            except torch.OutOfMemoryError:
                if not self.own:
                    raise
                self.own, self.room = {}, 0  # there was no room
                slot.memory = torch.empty(**size)
        for stream in self.streams:
            slot.memory.record_stream(stream)
        if self.streams:  # memory that is new to these streams may still be in use
            self.streams[0].wait_stream(torch.cuda.current_stream(self.device))
        if keep:
            slot.memory[:keep].copy_(old[:keep])

    def finish(self) -> None:
        """Wait for all copies."""
        for stream in self.streams:
            stream.synchronize()


def _repeats(config: Any) -> int:
    """Query heads that share a head of keys."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 1)
    return int(heads // (getattr(text, "num_key_value_heads", None) or heads))


def _left_by_prompt(device: torch.device) -> int:
    """Bytes that PyTorch has taken from a GPU and that nothing needs now."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if is_real_cuda(device) else 0
