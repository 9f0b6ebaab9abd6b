"""Decoding without Python in between: one CUDA graph a token.

A decode step starts some thousand small kernels, and Python needs longer to ask for them than the GPU to run them. A
CUDA graph is a recording of all of these, with the addresses that they read and write; replaying it is one call. So
whatever differs from step to step must lie at fixed addresses:

    inputs     copied into tensors that the graph reads
    cache      a static one: the first that is seen lends its tensors to all that follow
    outputs    copied out of tensors that the graph writes
    weights    where they rest, or in slots that the graph fills itself (`captured.py`)

The first step of a shape runs as ever, so that libraries and slots are ready; the second is recorded; from then on the
recording is replayed. A prompt is no step, and runs as ever.

Leaves out: caches that grow (they have no fixed address), several tokens a step, training, and speed by fused kernels,
which is what `torch.compile` adds after half a minute.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import tree_flatten, tree_unflatten
from .captured import Rings, devices_of, refuse_what_waits
from .recording import Recording

_NOTHING_ELSE = "generate outside of bigkit.graph_decode, or leave it out"
_OTHER_WAYS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")  # several tokens a pass


@contextmanager
def graph_decode(model: nn.Module) -> Iterator[Decoder]:
    """Within it, `generate` replays each decode step of a model as one CUDA graph.

    The tokens are those of `generate` with a static cache. Hooks and prints in the forward run only while a step is
    recorded. Weights that are exchanged between two calls of `generate` are seen; within one they must stay.

    Args:
        model: a model of Transformers, on one or several GPUs; blocks may rest in pinned RAM.

    Yields:
        What counts the steps: `captured`, `replayed`, and `eager` ones (of prompts and before a capture).

    Raises:
        ValueError: the host has to take part in each step: parts of the model work on the CPU, rest on disk or in RAM
            that is not pinned, choose experts on the host, or look for outliers.
        RuntimeError: while generating: something else in the step makes the host wait.

    Example:
        >>> with bigkit.graph_decode(model) as decoder:  # doctest: +SKIP
        ...     model.generate(tokens, max_new_tokens=100)
        >>> decoder.replayed  # doctest: +SKIP
        97
    """
    generator = next((part for part in model.modules() if hasattr(type(part), "get_compiled_call")), None)
    if generator is None:
        raise ValueError(f"graph_decode needs a model of Transformers, not a {type(model).__name__}: {_NOTHING_ELSE}")
    if any(part.training for part in generator.modules()):
        raise ValueError("graph_decode is for inference, and the model is in training mode: call model.eval() first")
    refuse_what_waits(generator)
    decoder = Decoder(generator)
    replaced = {"forward": decoder, "generate": decoder.generate, "get_compiled_call": decoder.get_compiled_call}
    before = {name: vars(generator)[name] for name in replaced if name in vars(generator)}
    vars(generator).update(replaced)
    try:
        yield decoder
    finally:
        for name, own in replaced.items():
            if vars(generator).get(name) is own:
                del vars(generator)[name]
                vars(generator).update({name: before[name]} if name in before else {})
        decoder.close()


class Decoder:
    """Stands in the place of a model's forward, and replays its decode steps.

    Attributes:
        captured, replayed, eager: forwards that were recorded, replayed, and run as ever.
    """

    def __init__(self, model: nn.Module) -> None:
        self.captured = self.replayed = self.eager = 0
        self._model, self._forward = model, model.forward
        self._generate: Callable[..., Any] = getattr(model, "generate", model.forward)
        functools.update_wrapper(self, model.forward)  # `generate` asks which arguments there are
        self._rings, self._devices = Rings(model), devices_of(model)
        self._home: _Home | None = None
        self._lock = threading.RLock()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, with a static cache unless another one is given."""
        given = kwargs.get("generation_config")
        if others := [name for name in _OTHER_WAYS if kwargs.get(name) or getattr(given, name, None)]:
            raise ValueError(f"graph_decode replays steps of one token, and {others[0]} makes longer ones: {_NOTHING_ELSE}")
        named = kwargs.get("cache_implementation") or getattr(given, "cache_implementation", None)
        if kwargs.get("past_key_values") is None and named is None:
            kwargs["cache_implementation"] = "static"
        return self._generate(*args, **kwargs)

    def get_compiled_call(self, compile_config: Any = None) -> Callable[..., Any]:
        """What `generate` decodes with where it would compile: the model itself."""
        return self._model.__call__

    def close(self) -> None:
        """Let go of all graphs. What uses their cache may go on."""
        self._home = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = next((name for name, value in kwargs.items() if hasattr(value, "is_compileable")), None)
        if args or name is None or not _is_step(kwargs) or torch.is_grad_enabled() or self._rings.watched():
            return self._as_ever(*args, **kwargs)
        cache = kwargs[name]
        with self._lock:
            if not getattr(cache, "is_initialized", True):
                return self._as_ever(**kwargs)
            if not cache.is_compileable:
                raise ValueError(
                    f"graph_decode needs a cache with fixed addresses, and a {type(cache).__name__} has none: let "
                    f"generate make its own, give a StaticCache, or {_NOTHING_ELSE}"
                )
            home = self._bind(cache)
            leaves, spec = tree_flatten({key: value for key, value in kwargs.items() if key != name})
            if any(_is_tensor(leaf) and leaf.device not in self._devices for leaf in leaves):
                return self._as_ever(**kwargs)
            key = (name, spec_key(spec), tuple(map(_kind, leaves)), home.state(), torch.is_inference_mode_enabled())
            step = home.steps.setdefault(key, _Step(self._rings.steps_before))
            if step.before > 0:
                step.before -= 1
                return self._as_ever(**kwargs)
            if step.recording is None:
                self._record(step, home, leaves, spec, name)
                self.captured += 1
            else:
                self.replayed += 1
            return step.replay(home, leaves, cache)

    def _as_ever(self, *args: Any, **kwargs: Any) -> Any:
        self.eager += 1
        return self._forward(*args, **kwargs)

    def _bind(self, cache: Any) -> _Home:
        home = self._home
        if home is None or (home.cache() is not cache and not (home.fits(cache) and self._rings.unchanged())):
            self._home = None  # free before there is a new one
            home = self._home = _Home(cache)
            self._rings.remember()
        home.bind(cache)
        return home

    def _record(self, step: _Step, home: _Home, leaves: list[Any], spec: Any, name: str) -> None:
        """Record a step. Nothing of it is computed yet."""
        step.inputs = [leaf.clone(memory_format=torch.contiguous_format) if _is_tensor(leaf) else leaf for leaf in leaves]
        cache, before = home.cache(), home.scalars()
        recording = Recording(self._devices, self._rings)

        def forward() -> Any:
            return self._forward(**tree_unflatten(step.inputs, spec), **{name: cache})

        try:
            output = recording.record(forward)
            step.counted = home.counted(before)
            step.keep(output, cache)
        except BaseException as error:
            home.put_back(before)
            if not isinstance(error, Exception):
                raise
            cause = recording.error or error
            reason = str(cause).strip().partition("\n")[0]
            raise RuntimeError(
                f"a decode step of this {type(self._model).__name__} cannot be recorded as a CUDA graph ({reason}): "
                f"{_NOTHING_ELSE}"
            ) from cause
        step.recording = recording


class _Step:
    """The decode step of one shape.

    Args:
        before: how many of its steps run as ever before one is recorded.
    """

    def __init__(self, before: int) -> None:
        self.before = before
        self.recording: Recording | None = None
        self.inputs: list[Any] = []  # what the graph reads; other leaves are as they were
        self.counted: dict[int, int] = {}  # number of a cell of the cache -> what a step adds to it
        self._outputs: list[Any] = []
        self._spec: Any = None

    def keep(self, output: Any, cache: Any) -> None:
        """Note what the forward returned.

        Raises:
            TypeError: it holds something else than tensors, plain values and the cache.
        """
        leaves, self._spec = tree_flatten(output)
        self._outputs = [_CACHE if leaf is cache else leaf for leaf in leaves]
        for leaf in self._outputs:
            if not (_is_tensor(leaf) or leaf is _CACHE or isinstance(leaf, (bool, int, float, str, type(None)))):
                raise TypeError(f"its output holds a {type(leaf).__name__}")

    def replay(self, home: _Home, leaves: list[Any], cache: Any) -> Any:
        """Run the step once; what it returns has memory of its own."""
        assert self.recording is not None
        for own, leaf in zip(self.inputs, leaves):
            if _is_tensor(leaf):
                own.copy_(leaf)
        self.recording.replay()
        home.count(self.counted)
        copies = [cache if leaf is _CACHE else leaf.clone() if _is_tensor(leaf) else leaf for leaf in self._outputs]
        return tree_unflatten(copies, self._spec)


class _Home:
    """The tensors of a static cache, at addresses that graphs know. Caches of the same shape take turns there.

    Args:
        cache: the first; its tensors become the home's.

    Attributes:
        steps: what was called, and the state of the cache -> its step.
    """

    def __init__(self, cache: Any) -> None:
        self.steps: dict[Any, _Step] = {}
        self._cells = _cells(cache)
        self._tensors = [holder[name] for holder, name in self._cells if _is_tensor(holder[name])]
        self._places = [(holder, name) for holder, name in self._cells if _is_tensor(holder[name])]
        self._plain = [(holder, name) for holder, name in self._cells if not _is_tensor(holder[name])]
        self._shape = _shape(self._cells)
        self._cache = weakref.ref(cache)

    def cache(self) -> Any:
        """Whose turn it is."""
        return self._cache()

    def fits(self, cache: Any) -> bool:
        """Whether a cache has the same shape."""
        return _shape(_cells(cache)) == self._shape

    def bind(self, cache: Any) -> None:
        """Let a cache have its turn: what it holds moves here. The one before keeps a copy, if somebody still has it."""
        if self.cache() is not cache:
            if self.cache() is not None:
                for (holder, name), own in zip(self._places, self._tensors):
                    if holder[name] is own:
                        holder[name] = own.clone()
            cells = _cells(cache)
            self._places = [(holder, name) for holder, name in cells if _is_tensor(holder[name])]
            self._plain = [(holder, name) for holder, name in cells if not _is_tensor(holder[name])]
            self._cache = weakref.ref(cache)
        for (holder, name), own in zip(self._places, self._tensors):
            if holder[name] is not own:
                own.copy_(holder[name])
                holder[name] = own

    def scalars(self) -> list[Any]:
        """The plain values that the cache keeps."""
        return [holder[name] for holder, name in self._plain]

    def state(self) -> tuple[Any, ...]:
        """The same with counts left out that only say how full a window is: before and after it is, steps differ."""
        return tuple(
            holder[name] >= holder["max_cache_len"] if name == _COUNT else holder[name]
            for holder, name in self._plain
        )

    def counted(self, before: list[Any]) -> dict[int, int]:
        """What a step has added to the counts.

        Raises:
            TypeError: it has changed another value.
        """
        changed = {i: now - then for i, (now, then) in enumerate(zip(self.scalars(), before)) if now != then}
        for i in changed:
            if self._plain[i][1] != _COUNT:
                raise TypeError(f"its cache changes {self._plain[i][1]!r} in each step")
        self.put_back(before)
        return changed

    def count(self, added: dict[int, int]) -> None:
        """Count what a replay has done."""
        for i, amount in added.items():
            holder, name = self._plain[i]
            holder[name] += amount

    def put_back(self, before: list[Any]) -> None:
        """Undo what a recording has left in the cache: nothing was computed."""
        for (holder, name), value in zip(self._plain, before):
            holder[name] = value
        for (holder, name), own in zip(self._places, self._tensors):
            holder[name] = own


_COUNT = "cumulative_length_int"  # of layers with a sliding window: tokens so far
_CACHE = object()  # stands for the cache in what a forward returned


def _cells(cache: Any) -> list[tuple[Any, Any]]:
    """Where a cache keeps its tensors and plain values: (dict or list, key), in an order that is the same for all."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [cache]
    while waiting:
        holder = waiting.pop()
        own = holder if isinstance(holder, (dict, list)) else vars(holder)
        for name, value in enumerate(own) if isinstance(own, list) else own.items():
            if isinstance(value, (Tensor, bool, int)) and name != "_is_user_defined":
                found.append((own, name))
            elif isinstance(value, (dict, list)) or hasattr(value, "layers") or hasattr(value, "get_max_length"):
                waiting.append(value)
    return found


def _shape(cells: list[tuple[dict[Any, Any], Any]]) -> list[Any]:
    """What must be the same in two caches that take turns: all but the counts."""
    return [(name, 0 if name == _COUNT else _kind(holder[name])) for holder, name in cells]


def _kind(leaf: Any) -> Any:
    """What must be the same from step to step: of a tensor all but its values."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if _is_tensor(leaf) else leaf


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_step(kwargs: dict[str, Any]) -> bool:
    """Whether a forward is for one token of each sequence."""
    tokens = next((kwargs[name] for name in ("decoder_input_ids", "input_ids") if _is_tensor(kwargs.get(name))), None)
    return tokens is not None and tokens.ndim == 2 and tokens.shape[1] == 1


def spec_key(spec: Any) -> Any:
    """Something to find the structure of arguments by."""
    with suppress(TypeError):
        hash(spec)
        return spec
    return repr(spec)
