"""One model over several processes: each runs a stretch of its blocks and sends hidden states to the next.

    ids ─> process 0: embedding, h.0 .. h.4 ──hidden states──> process 1: h.5 .. h.9, head ──> a token
             ^                                                                                  │
             └────────────────────────── one number for each sequence ──────────────────────────┘

Every process calls the model's own `forward` with the same ids, so that masks, positions and caches are those of the
whole model. Modules that rest elsewhere are emptied: an embedding gives zeros of the right shape, a block gives back
what it got, and the block before the first own one gives what the process before has sent. Attention caches of emptied
blocks count tokens and hold one number for each. In `generate` the last process alone sees logits: it draws, asks the
stopping criteria, and sends each sequence's token, as `~token` if the sequence is done.

Transformers' `DistributedConfig(pp_size=...)` has the same contract (the same call on every process). It is not used:
it cuts by the number of layers, knows models of Llama's names only, sends all logits to all processes, and its emptied
layers leave their caches at length 0, by which masks and positions go.

Leaves out: which blocks go where (`maps/hosts.py`), loading them (`hosts.py`), how messages travel (`line.py`), many
groups (`in_flight.py`), training.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ._transformers import draw_one_by_one, pad_token
from .line import Line
from .taint import Taint

_REFUSED = {  # options of `generate` that need logits, or what the model computes, on every process
    "num_beams": 1, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "guidance_scale": None, "penalty_alpha": None, "dola_layers": None,
    "prompt_lookup_num_tokens": None,
}  # fmt: skip


def stage_of(model: nn.Module) -> Stage:
    """This process's stage of a model that `bigkit.pipeline` has returned.

    Raises:
        ValueError: it has not.
    """
    if (stage := stage_if_any(model)) is None:
        raise ValueError(f"this {type(model).__name__} is no pipeline: load it with bigkit.pipeline")
    return stage


def stage_if_any(model: nn.Module) -> Stage | None:
    """The same, or None."""
    stage = getattr(getattr(model.forward, "func", None), "__self__", None)
    return stage if isinstance(stage, Stage) else None


@dataclass
class Call:
    """A call of `generate`, or of `forward` outside of it.

    Args:
        number: how many there were, with this one; the same on every process.
        digest: of its inputs and options.
        choosing: whether the last process draws a token from its logits.
        taint: what follows zeros through the first forward.
    """

    number: int = 0
    digest: int = 0
    choosing: bool = False
    taint: Taint | None = None


class Stage:
    """A process's part of a model, and its line to the others.

    Args:
        model: the model, whole and empty; the modules of other stages lose their tensors.
        stages: for each process the names of the modules that rest there; all but the first begin with a block.
        rank: which of them this process is.

    Raises:
        ValueError: a module cannot be left out here.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Sequence[str]], rank: int) -> None:
        self.model, self.rank, self.last = model, rank, len(stages) - 1
        self.own = tuple(stages[rank])
        self.received = torch.empty(0)
        self.kind = 0  # what a block returns: 0 for a tensor, or the length of a tuple
        self.hidden: Tensor | None = None  # what the last own block gave in this forward
        self.compute: Callable[..., tuple[Any, Tensor | None]] = self.local  # `graph_decode` puts a replay in its place
        self.slot = 0  # of the group that computes
        self.device = torch.device("cpu")
        self.group = threading.local()  # `turns`, if this thread is that of one of several groups
        self.lines: dict[tuple[str, int], Line] = {}  # ("to" or "from", rank)
        self.calls = 0
        self.call = Call()
        self.given_up: set[int] = set()  # calls that have failed: their messages are thrown away when they come
        self.lost = (
            False  # whether a thread of a call that was interrupted still waits for a message, and would take it
        )
        self.checked = rank == 0
        self.ends: list[Any] = []  # embeddings and heads that are elsewhere
        own = {id(tensor) for name in self.own for tensor in model.get_submodule(name).parameters()}
        entry = _before(self.own[0]) if rank else ""
        for name in (name for i, names in enumerate(stages) for name in names if i != rank):
            module = model.get_submodule(name)
            if not any(id(tensor) in own for tensor in module.parameters()):  # a tied one stays
                self._empty(module, name, entry)
        if rank < self.last:
            model.get_submodule(_before(stages[rank + 1][0])).register_forward_hook(self._send_output)

    def attach(self, device: torch.device, tag: int = 0) -> None:
        """Let `forward` and `generate` of the model, which is loaded now, speak with the other processes.

        Args:
            device: where the stage works.
            tag: a number that all processes share, and no other pipeline of theirs has.
        """
        self.device = device
        to = [self.rank + 1] if self.rank < self.last else range(self.last)
        sources = {self.rank - 1, self.last} - {self.rank, -1}
        groups = self.last + 1
        self.lines = {("to", rank): Line(rank, tag, groups) for rank in to} | {
            ("from", rank): Line(rank, tag, groups) for rank in sources
        }
        model: Any = self.model
        dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)
        for end in self.ends:  # models ask it for its dtype and device
            end.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.forward_of_model = model.forward
        model.forward = wraps(model.forward)(partial(self._forward))
        if hasattr(model, "generate"):
            model.generate = wraps(model.generate)(partial(self._generate, model.generate))
        if hasattr(model, "choose"):
            model.choose = partial(self._choose, model.choose)

    # -- modules that rest elsewhere

    def _empty(self, module: nn.Module, name: str, entry: str) -> None:
        """Take a module's tensors and parts away, and let it give what stands for its output."""
        index: Any = next((part.layer_idx for part in module.modules() if hasattr(part, "layer_idx")), None)
        forward: Callable[..., Any] = partial(self._skip, index, name == entry)
        if isinstance(module, nn.Embedding):
            forward = partial(self._zeros, module.embedding_dim)
        elif isinstance(module, nn.Linear):
            forward = partial(self._no_logits, module.out_features)
        elif not name.rpartition(".")[2].isdigit():
            raise ValueError(f"{name} is a {type(module).__name__}, and only blocks, embeddings and heads can be away")
        module._parameters = dict.fromkeys(module._parameters)
        module._buffers = dict.fromkeys(module._buffers)
        module._modules.clear()
        module.forward = forward
        self.ends += [module] if isinstance(module, (nn.Embedding, nn.Linear)) else []

    def _zeros(self, width: int, *_: Any, **__: Any) -> Tensor:
        zeros = torch.zeros(*self.received.shape[:-1], width, dtype=self.received.dtype, device=self.device)
        if self.call.taint is not None:
            self.call.taint.mark(zeros)
        return zeros

    def _no_logits(self, width: int, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], width)

    def _skip(self, index: int | None, is_entry: bool, *args: Any, **options: Any) -> Any:
        """What a block elsewhere would return: what it got, or what has arrived in its place."""
        inputs = (*args, options.get("hidden_states"), *options.values())
        hidden = next(value for value in inputs if isinstance(value, Tensor))
        for cache in (*args[1:], *options.values()):
            _count(cache, index, hidden)
        if is_entry:
            if hidden.shape != self.received.shape:
                ours, theirs = tuple(hidden.shape), tuple(self.received.shape)
                raise RuntimeError(_unlike(self.rank, f"hidden states of shape {theirs} came where {ours} are due"))
            hidden = self.received
        return (hidden, *[None] * (self.kind - 1)) if self.kind else hidden

    # -- messages

    @property
    def turns(self) -> Any:
        """Those of the groups under way (`in_flight.py`), of which this thread is one; else None."""
        return getattr(self.group, "turns", None)

    @contextmanager
    def _calling(self, **about: Any) -> Iterator[None]:
        """The next call of all processes, by whose number they know each other's messages."""
        if self.lost:
            raise RuntimeError("a call was interrupted while it waited for another process: start all processes anew")
        self.calls += 1
        call = self.call = Call(self.calls, **about)
        try:
            yield
        except BaseException:
            self.given_up.add(call.number)
            raise
        finally:
            self.call = Call()

    def _post(self, tensor: Tensor, *ranks: int, call: Call | None = None) -> None:
        call = call or self.call
        for rank in ranks:
            self.lines["to", rank].post([call.number, call.digest, self.kind], tensor)

    def _take(self, rank: int, device: torch.device) -> Tensor:
        (number, digest, kind), tensor = self.lines["from", rank].take(device)
        while number in self.given_up:
            (number, digest, kind), tensor = self.lines["from", rank].take(device)
        if (number, digest) != (self.call.number, self.call.digest):
            raise RuntimeError(_unlike(self.rank, f"it was called with other inputs or options than process {rank}"))
        if rank < self.rank:
            self.kind = kind
        return tensor

    def flush(self) -> None:
        """Wait until all that was sent has left."""
        for line in self.lines.values():
            line.flush()

    def _send_output(self, block: nn.Module, args: Any, output: Any) -> None:
        """The last own block has worked: its hidden states go to the next process, at once if no graph holds them."""
        self.hidden = output if isinstance(output, Tensor) else output[0]
        self.kind = 0 if isinstance(output, Tensor) else len(output)
        if self.compute == self.local:
            self._post(self.hidden, self.rank + 1)

    def _to_all(self, tensor: Tensor | None, device: torch.device) -> Tensor:
        """What the last process has, on every process, there on the device by which it travels.

        Another group may have its turn meanwhile.
        """
        turns, call = self.turns, self.call
        if tensor is not None and turns is not None:
            turns.send_when_there(tensor, lambda copied: self._post(copied, *range(self.last), call=call))
        elif tensor is not None:
            self._post(tensor.to(device), *range(self.last))
        if turns is not None:
            turns.pass_on()
            self.call = call
        return self._take(self.last, device) if tensor is None else tensor

    # -- a forward

    def _forward(self, *args: Any, **options: Any) -> Any:
        if self.call.choosing:
            return self._run(*args, **options)
        with self._calling():
            return self._share(self._run(*args, **options))

    def _run(self, *args: Any, **options: Any) -> Any:
        """The model's own forward, with what other processes have for it; a group's runs on the thread of all."""
        if self.rank:
            options["received"] = self._take(self.rank - 1, self.device)
        slot = 0 if self.turns is None else self.turns.slot

        def work() -> tuple[Any, Tensor | None]:
            self.slot = slot
            with torch.no_grad(), nullcontext() if self.checked else self._checking():
                return self.compute(*args, **options)

        output, hidden = work() if self.turns is None else self.turns.on_caller(work)
        if self.turns is not None and self.device.type == "cuda":  # it was made on another stream than this group's
            for tensor in (hidden, *_parts(output)):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(torch.cuda.current_stream())
        if self.rank < self.last:
            if hidden is None:
                raise RuntimeError(f"the blocks of {type(self.model).__name__} did not run in this forward")
            if self.compute != self.local:
                self._post(hidden, self.rank + 1)
        return output

    def local(self, *args: Any, received: Tensor | None = None, **options: Any) -> tuple[Any, Tensor | None]:
        """The model's own forward on this process alone, from hidden states to hidden states (None on the last one)."""
        self.received, self.hidden = self.received if received is None else received, None
        return self.forward_of_model(*args, **options), self.hidden

    def _share(self, output: Any) -> Any:
        """The logits of the last process in everyone's output."""
        name = "logits" if hasattr(output, "logits") else "last_hidden_state"
        own = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output[name]
        # Two messages of nccl that cross wait for each other; of several groups, logits go through RAM.
        by = self.device if self.turns is None else torch.device("cpu")
        logits = self._to_all(own if self.rank == self.last else None, by).to(own.device)
        if self.turns is None:
            self.flush()
        if isinstance(output, Tensor):
            return logits
        if isinstance(output, tuple):
            return (logits, *output[1:])
        output[name] = logits
        return output

    @contextmanager
    def _checking(self) -> Iterator[None]:
        """In the first forward, see that own modules use nothing that another process would have to send as well."""
        taint = self.call.taint = Taint()
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(partial(taint.refuse, name), with_kwargs=True)
            for name in self.own
            if name.rpartition(".")[2].isdigit()
        ]
        try:
            with taint:
                yield
            self.checked = True
        finally:
            self.call.taint = None
            for hook in hooks:
                hook.remove()

    # -- a token

    def _generate(self, generate: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The model's own `generate`, in which the last process draws."""
        library = hasattr(self.model, "prepare_inputs_for_generation")
        if wrong := [name for name in ("assistant_model", "custom_generate") if options.get(name) is not None]:
            raise ValueError(f"{wrong[0]}: a pipeline draws one token at a time on its last process")
        if library:
            options["custom_generate"] = partial(self._decode, streamer=options.pop("streamer", None))
        with self._calling(digest=0 if library else _digest(*args, options), choosing=True):
            said = generate(*args, **options)
        if self.turns is None:
            self.flush()
        return said

    def _decode(self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
                generation_config: Any, streamer: Any = None, **options: Any) -> Any:  # fmt: skip
        """Transformers' loop for one token after another (`custom_generate` of `generate`)."""
        wrong = [name for name, fine in _REFUSED.items() if getattr(generation_config, name, fine) not in (fine, None)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: a pipeline draws one token at a time on its last process")
        settings = {k: v for k, v in generation_config.to_diff_dict().items() if not k.startswith("_")}
        self.call.digest = _digest(input_ids, options.get("attention_mask"), settings)
        agreed = _Agreed(self, logits_processor, stopping_criteria, generation_config)
        if streamer is not None:
            streamer.put(input_ids.cpu())  # `generate` does so for its own loops
        generation_config.do_sample = False  # it is drawn: what `_sample` sees has one token left
        generation_config.disable_compile = True  # messages are no part of a graph
        rules = (agreed.processors(), agreed.criteria(), generation_config)
        return draw_one_by_one(model, input_ids, *rules, streamer=streamer, **options)

    def _choose(self, choose: Callable[..., Tensor], scores: Tensor, *args: Any) -> Tensor:
        """For a model with a `generate` of its own, which asks `choose(scores, ...)` for ids of shape (batch, 1)."""
        chosen = choose(scores, *args) if self.rank == self.last else None
        return self.agree(chosen)

    def agree(self, tokens: Tensor | None) -> Tensor:
        """The tokens that the last process has drawn, on every process (int64; on the CPU, but for where they were)."""
        mine = None if tokens is None else tokens.to(torch.int64)
        return self._to_all(mine, torch.device("cpu"))


class _Agreed:
    """The last logits processor and the only stopping criterion of every process: what the last process says.

    On the last one it applies the user's processors, draws, and asks the user's criteria.
    """

    def __init__(self, stage: Stage, processors: Any, criteria: Any, config: Any) -> None:
        self.stage, self.user_processors, self.user_criteria = stage, processors, criteria
        self.sample, self.pad = config.do_sample, pad_token(config)
        self.done: Tensor | None = None  # of this token, and
        self.over: Tensor | None = None  # of all so far: (batch,)
        if any(hasattr(criterion, "eos_token_id") for criterion in criteria):
            self.eos_token_id = True  # `_sample` pads finished sequences where a criterion has it

    def processors(self) -> Any:
        return type(self.user_processors)([self])

    def criteria(self) -> Any:
        return type(self.user_criteria)([self._verdict()])

    def _verdict(self) -> Any:
        def verdict(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            assert self.done is not None
            return self.done.to(input_ids.device)

        if hasattr(self, "eos_token_id"):
            verdict.eos_token_id = True  # type: ignore[attr-defined]
        return verdict

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(batch, vocabulary) -> the same, with nothing but the token of each sequence left."""
        drawn = self._draw(input_ids, scores) if self.stage.rank == self.stage.last else None
        said = self.stage.agree(drawn).to(scores.device)
        self.done = said < 0
        tokens = torch.where(self.done, ~said, said)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _draw(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = self.user_processors(input_ids, scores)
        if self.sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if self.over is not None and self.pad is not None and hasattr(self, "eos_token_id"):
            tokens = torch.where(self.over, self.pad.to(tokens.device), tokens)
        done = self.user_criteria(torch.cat([input_ids, tokens[:, None]], dim=-1), None)
        self.over = done if self.over is None else done | self.over
        return torch.where(done, ~tokens, tokens)


def _parts(output: Any) -> Iterable[Any]:
    """The values in what a model returned."""
    return output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)


def _count(cache: Any, index: int | None, hidden: Tensor) -> None:
    """Let the cache of a block that is elsewhere know how many tokens there are."""
    if hasattr(cache, "room") and hasattr(cache, "length"):  # `zoo.gpt.LayerCache`
        cache.length += hidden.shape[1]
    elif index is not None and hasattr(cache, "layers") and hasattr(cache, "get_seq_length"):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or hasattr(layer, "get_seq_length") and hasattr(layer, "keys"):
            one = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)  # one number for each token
            cache.update(one, one, index)


def _digest(*things: Any) -> int:
    """A number for the inputs of a call, by which processes see that they got the same."""
    text = hashlib.blake2b(digest_size=7)
    for thing in things:
        text.update(repr(thing.tolist() if isinstance(thing, Tensor) else thing).encode())
    return int.from_bytes(text.digest(), "little")


def _unlike(rank: int, problem: str) -> str:
    return f"process {rank} stopped: {problem}. Make the same calls with the same inputs on every process"


def _before(block: str) -> str:
    """The name of the block before; empty for what is no numbered block, or the first."""
    parent, _, own = block.rpartition(".")
    return f"{parent}.{int(own) - 1}" if own.isdigit() and int(own) else ""
