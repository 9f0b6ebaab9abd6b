"""Decoding without Python in between: one CUDA graph a token.

A decode step starts some thousand small kernels, and Python needs longer to ask for them than the GPU to run them. A
CUDA graph is a recording of all of these, with the addresses that they read and write; replaying it is one call. So
whatever differs from step to step must lie at fixed addresses:

    inputs     copied into tensors that the graph reads
    cache      a static one: the first that is seen lends its tensors to all that follow
    outputs    copied out of tensors that the graph writes
    weights    where they rest, or in slots that the graph fills itself (`captured.py`)
    the CPU    MLPs of `on_cpu=`, for which the graph calls the host (`host_calls.py`)

The first step of a shape runs as ever, so that libraries and slots are ready; the second is recorded; from then on the
recording is replayed. A prompt is no step, and runs as ever.

Leaves out: caches that grow (they have no fixed address), several tokens a step, training, and speed by fused kernels,
which is what `torch.compile` adds after half a minute.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import is_tensor, nn

from ..distributed.pipeline import stage_if_any
from ._torch import tree_flatten, tree_unflatten
from .captured import Rings, devices_of, refuse_what_waits
from .recording import Recording
from .static_cache import Home, kind_of, windows_roll

_CACHE = object()  # stands for the cache in what a forward returned
_NOTHING_ELSE = "generate outside of bigkit.graph_decode, or leave it out"
# Several tokens a pass.
_OTHER_WAYS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


@contextmanager
def graph_decode(model: nn.Module) -> Iterator[Decoder]:
    """Within it, `generate` replays each decode step as one CUDA graph: the GPU no longer waits for Python.

    The tokens are those of `generate` with a static cache. Hooks and prints in the forward run only while a step is
    recorded; those within an MLP that the CPU computes run in each, on a thread that must ask nothing of a GPU. What
    changes between two calls of `generate` is seen: weights, modules, hooks, adapters that are switched, numbers and
    flags of modules, autocast; within one call nothing may change. Nested for the same model, the outer one counts.

    Args:
        model: a model of Transformers, on one or several GPUs; blocks may rest in pinned RAM, and the CPU may compute
            their MLPs (`on_cpu=`). Or one that `bigkit.pipeline` has returned: each process replays its stage, and
            messages stay outside of the graph. Enter it on every process; within `map_in_flight` each group under way
            has a recording and a cache.

    Yields:
        What counts the steps: `captured`, `replayed`, and `eager` ones (of prompts and before a capture).

    Raises:
        ValueError: the host has to take part in each step: parts of the model work on the CPU (other than those MLPs),
            rest on disk or in RAM that is not pinned, choose experts on the host, or set outliers of int8 apart.
        RuntimeError: while generating: something else in the step makes the host wait, or the CPU's part failed.

    Example:
        >>> with bigkit.graph_decode(model) as decoder:  # doctest: +SKIP
        ...     model.generate(tokens, max_new_tokens=100)
        >>> decoder.replayed  # doctest: +SKIP
        97
    """
    generator = next((part for part in model.modules() if hasattr(type(part), "get_compiled_call")), None)
    if generator is None:
        raise ValueError(f"graph_decode needs a model of Transformers, not a {type(model).__name__}: {_NOTHING_ELSE}")
    stage = stage_if_any(generator)
    if isinstance(around := vars(generator).get("forward") if stage is None else stage.compute, Decoder):
        yield around
        return
    if any(part.training for part in generator.modules()):
        raise ValueError("graph_decode is for inference, and the model is in training mode: call model.eval() first")
    Recording.refuse(devices_of(generator))
    refuse_what_waits(generator)
    decoder = Decoder(generator)
    replaced: dict[str, Any] = {"generate": decoder.generate, "get_compiled_call": decoder.get_compiled_call}
    if stage is None:
        replaced["forward"] = decoder
    else:  # messages are no part of a graph
        stage.compute = decoder
    before = {name: vars(generator)[name] for name in replaced if name in vars(generator)}
    vars(generator).update(replaced)
    try:
        yield decoder
    finally:
        if stage is not None:
            stage.compute = stage.local
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
        self._stage = stage_if_any(model)
        self._model, self._forward = model, model.forward if self._stage is None else self._stage.local
        self._generate: Callable[..., Any] = getattr(model, "generate", model.forward)
        functools.update_wrapper(self, model.forward)  # `generate` asks which arguments there are
        self._rings, self._devices = Rings(model), devices_of(model)
        self._homes: dict[int, Home] = {}  # of each group of sequences under way
        self._lock = threading.RLock()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"this {type(self._model).__name__} is within graph_decode and cannot be copied or pickled: do so before, "
            "or afterwards"
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, with a static cache unless another one is given."""
        given = kwargs.get("generation_config")
        if others := [name for name in _OTHER_WAYS if kwargs.get(name) or getattr(given, name, None)]:
            raise ValueError(
                f"graph_decode replays steps of one token, and {others[0]} makes longer ones: {_NOTHING_ELSE}"
            )
        named = kwargs.get("cache_implementation") or getattr(given, "cache_implementation", None)
        if kwargs.get("past_key_values") is None and named is None:
            if given is None:
                kwargs["cache_implementation"] = "static"
            else:  # `generate` wants options in one place
                kwargs["generation_config"] = own = copy.deepcopy(given)
                own.cache_implementation = "static"
        with self._lock:
            self._forget_what_is_old()
        return self._generate(*args, **kwargs)

    def _forget_what_is_old(self) -> None:
        """Let go of recordings of a model that is another one now."""
        if not self._rings.unchanged():
            self.close()
            refuse_what_waits(self._model)  # it may have been dispatched anew
            self._rings, self._devices = Rings(self._model), devices_of(self._model)

    def get_compiled_call(self, compile_config: Any = None) -> Callable[..., Any]:
        """What `generate` decodes with where it would compile: the model itself."""
        return self._model.__call__

    def close(self) -> None:
        """Let go of all graphs. What uses their cache may go on."""
        self._homes.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = next((name for name, value in kwargs.items() if hasattr(value, "is_compileable")), None)
        if args or name is None or torch.is_grad_enabled() or self._rings.watched():
            return self._as_ever(*args, **kwargs)
        cache, (sequences, tokens) = kwargs[name], _tokens(kwargs)
        group = 0 if self._stage is None else self._stage.slot
        with self._lock:
            is_new = not getattr(cache, "is_initialized", True)
            if is_new or tokens != 1:
                self._forget_what_is_old()
                if is_new and group in self._homes:
                    self._homes[group].welcome(cache, sequences)
                return self._as_ever(**kwargs)
            if not cache.is_compileable:
                raise ValueError(
                    f"graph_decode needs a cache with fixed addresses, and a {type(cache).__name__} has none: let "
                    f"generate make its own, give a StaticCache, or {_NOTHING_ELSE}"
                )
            home = self._bind(cache, group)
            leaves, spec = tree_flatten({key: value for key, value in kwargs.items() if key != name})
            if any(is_tensor(leaf) and leaf.device not in self._devices for leaf in leaves):
                return self._as_ever(**kwargs)
            key = (name, spec_key(spec), tuple(map(kind_of, leaves)), home.state(), torch.is_inference_mode_enabled())
            step = home.steps.setdefault(key, _Step(self._rings.steps_before))
            if step.before > 0:
                before, output = home.scalars(), self._as_ever(**kwargs)
                step.before -= not home.began(before)
                return output
            if step.recording is None:
                self._rings.refuse_batch(sequences)
                self._record(step, home, leaves, spec, name)
                self.captured += 1
            else:
                self.replayed += 1
            return step.replay(home, leaves, cache)

    def _as_ever(self, *args: Any, **kwargs: Any) -> Any:
        self.eager += 1
        return self._forward(*args, **kwargs)

    def _bind(self, cache: Any, group: int) -> Home:
        home = self._homes.get(group)
        if home is not None and home.cache() is not cache:
            self._forget_what_is_old()
            home = self._homes.get(group)
        if home is None or (home.cache() is not cache and not home.fits(cache)):
            home = None
            self._homes.pop(group, None)  # free before there is a new one
            home = self._homes[group] = Home(cache)
            self._rings.remember()
        home.bind(cache)
        return home

    def _record(self, step: _Step, home: Home, leaves: list[Any], spec: Any, name: str) -> None:
        """Record a step. Nothing of it is computed yet."""
        step.inputs = [one.clone(memory_format=torch.contiguous_format) if is_tensor(one) else one for one in leaves]
        cache, before = home.cache(), home.scalars()
        recording = Recording(self._devices, self._rings)

        def forward() -> Any:
            with windows_roll(cache):
                return self._forward(**tree_unflatten(step.inputs, spec), **{name: cache})

        try:
            output = recording.record(forward)
            step.counted = home.counted(before)
            step.keep(output, cache)
        except BaseException as error:
            home.put_back(before)
            cause = recording.error or error
            if not isinstance(cause, Exception):
                raise cause from None
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
            if not (is_tensor(leaf) or leaf is _CACHE or isinstance(leaf, (bool, int, float, str, type(None)))):
                raise TypeError(f"its output holds a {type(leaf).__name__}")

    def replay(self, home: Home, leaves: list[Any], cache: Any) -> Any:
        """Run the step once; what it returns has memory of its own."""
        assert self.recording is not None
        for own, leaf in zip(self.inputs, leaves):
            if is_tensor(leaf):
                own.copy_(leaf)
        self.recording.replay()
        home.count(self.counted)
        copies = [cache if leaf is _CACHE else leaf.clone() if is_tensor(leaf) else leaf for leaf in self._outputs]
        return tree_unflatten(copies, self._spec)


def _tokens(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Sequences, and tokens of each, that a forward is for."""
    names = ("decoder_input_ids", "input_ids", "inputs_embeds")
    given = next((kwargs[name] for name in names if is_tensor(kwargs.get(name)) and kwargs[name].ndim > 1), None)
    return (0, 0) if given is None else (given.shape[0], given.shape[1])


def spec_key(spec: Any) -> Any:
    """Something to find the structure of arguments by."""
    with suppress(TypeError):
        hash(spec)
        return spec
    return repr(spec)
