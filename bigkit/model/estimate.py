"""How much memory a model takes: the classic table, and what it leaves out.

Three tables, each from shapes alone:

    rows        the classic estimate: largest layer, total size, training with Adam, per dtype
    inference   what it takes to run: weights as they are really stored (bitsandbytes included), KV cache, activations
    training    what it takes to train: Adam in float32 and in mixed precision, LoRA, QLoRA, each in its parts

The classic table divides everything by the dtype's width (int4: by 8), buffers, norms and embeddings too, counts a bool
as a bit, looks at the model without its head, and prints steps of 1024 labelled KB, MB, GB. It is kept to the digit,
because people compare with it; the other two tables say what happens.

Leaves out: memory that only a run can show (fragmentation, library workspaces: `dryrun/run.py`) and names (`api.py`).
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..units import dtype_bits, dtype_name, format_bytes, format_count, is_floating, text_table
from .activations import generates as generates
from .activations import working_bytes
from .attention import kv_dtype_name
from .experts import active_bytes, active_parameters, sentence
from .precision import QUANTIZATIONS, Precision, quantized_stacks
from .spec import ModelSpec
from .stored import is_as_stored
from .training import LORA_RANK as LORA_RANK
from .training import TrainingRow as TrainingRow
from .training import training_rows

CLASSIC = ("float32", "float16", "int8", "int4")
STORED = ("float32", "bfloat16", "float8_e4m3fn", "int8", "nf4", "nf4-double")


def whole_number(value: object, name: str, least: int = 0) -> int:
    """A count of tokens or sequences as users have it: an int of Python or numpy, 8.0 or "8".

    Raises:
        ValueError: it is no whole number, or too small.

    >>> whole_number("2048", "context"), whole_number(8.0, "batch")
    (2048, 8)
    """
    try:
        number = int(value)  # type: ignore[call-overload]
        if number < least or isinstance(value, bool) or (not isinstance(value, str) and number != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}") from None
    return int(number)


def tokens_seen(model: ModelSpec, context: int) -> int:
    """Tokens of each sequence that memory and time are counted for, when a context is asked for.

    Learned positions are a hard limit. An image brings its patches and the class token, whatever the context (0: the
    facts do not say how many).
    """
    facts = model.facts
    if model.attention or "vocab_size" in facts or not ("image_size" in facts or "num_features" in facts):
        return min(context, longest_context(facts) or context) if facts.get("positions") == "learned" else context
    image, patch = facts.get("image_size"), facts.get("patch_size")
    return (image // patch) ** 2 + 1 if image and patch else 0


def longest_context(facts: Mapping[str, Any]) -> int | None:
    """The tokens that a model has learned positions for, or was trained with; None if nothing says so."""
    return facts.get("max_position_embeddings") if facts.get("positions") in ("learned", "rotary") else None


def remarks(name: str, facts: Mapping[str, Any], context: int) -> tuple[str, ...]:
    """What must be said beside every figure: a context that is too long, packed checkpoints, caches not counted."""
    notes, most = [], longest_context(facts)
    if most and context > most and facts["positions"] == "learned":
        notes.append(f"{name} has positions for {most:,} tokens: these are counted, not {context:,}.")
    elif most and context > most:
        notes.append(f"Context {context:,} is beyond the {most:,} tokens that {name} was trained for.")
    if packed := facts.get("quantization"):
        others = "where a dtype is named, its weights count decoded" if "decoding" in facts else "all count it decoded"
        notes.append(f"The checkpoint of {name} is quantized ({packed}): {others}.")
    if packed == "torchao":
        notes.append("bigkit counts torchao's weights and does not run them: load them with Transformers and torchao.")
    if uncounted := facts.get("uncounted_cache"):
        notes.append(f"The cache of {', '.join(map(str, uncounted))} is not counted.")
    return tuple(notes)


def stacked_experts(model: ModelSpec, precision: Precision) -> tuple[str, ...]:
    """What must be said of a mixture of experts in few bits: experts in one tensor are no linear layers."""
    names = [*(f"{name}.weight" for name in model.quantized(precision)), *quantized_stacks(model, precision)]
    weights = sum(model.tensors[name][0].elements for name in names)
    if not precision.quantization or not model.facts.get("num_experts") or 2 * weights >= model.parameters:
        return ()
    share = 100 * weights / model.parameters
    return (f"{share:.0f} % of the parameters of {model.name} are quantized: its stacked experts are not.",)


def load_text(batch: int, context: int, kv_dtype: str | None = None) -> str:
    """The load that figures are counted for, in words.

    >>> load_text(4, 2048), load_text(1, 0), load_text(1, 8, "int4")
    ('batch 4, context 2,048', 'batch 1', 'batch 1, context 8, KV cache in int4')
    """
    cache = f", KV cache in {kv_dtype}" if kv_dtype else ""
    return f"batch {batch}" + (f", context {context:,}" if context else "") + cache


def stored_as(model: ModelSpec, precision: Precision) -> str:
    """How a model's weights are stored, in words: "nf4", "bfloat16 as stored", or "float16 decoded"."""
    if precision.quantization or precision.dtype:
        return precision.quantization or str(precision.dtype)
    if is_as_stored(model, precision):
        return f"{model.facts['quantization']} as stored"
    sizes = Counter[str]()
    for tensor, _ in model.tensors.values():
        sizes[tensor.dtype] += tensor.elements
    known = "decoded" if model.facts.get("quantization") else "as stored"
    return " ".join([*(dtype for dtype, _ in sizes.most_common(1)), known])


@dataclass(frozen=True)
class ClassicRow:
    """One dtype of the classic table; sizes in bytes.

    `trainable` is False where no optimizer trains weights of that dtype alone; the figure is then only 4 x the size.
    """

    dtype: str
    largest_layer: int
    total_size: int
    training: int
    largest_module: int
    trainable: bool


@dataclass(frozen=True)
class InferenceRow:
    """What running takes when the weights are stored in one way; bytes.

    `active` are those of the weights that one token uses: all but the experts that are not chosen for it.
    """

    stored: str
    weights: int
    kv_cache: int
    activations: int
    active: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True)
class MemoryEstimate:
    """The estimate of one model: `rows` (classic), `inference`, `training`, and what they were counted for.

    `print` gives text, a notebook shows tables, `to_json` gives every figure in bytes. `active` is the number of
    parameters that one token uses; fewer than `parameters` in a mixture of experts. `kv_dtype` is that of keys and
    values in the cache, None if as the model computes. `training` is for each of `gpus`.
    """

    name: str
    library: str
    parameters: int
    classes: tuple[str, str]  # of the classic estimate, of the other two
    largest_layer_name: str
    largest_module_name: str
    batch: int
    context: int
    rows: tuple[ClassicRow, ...]
    inference: tuple[InferenceRow, ...]
    training: tuple[TrainingRow, ...]
    notes: tuple[str, ...] = ()
    active: int = 0
    kv_dtype: str | None = None
    gpus: int = 1
    checkpointing: bool = False

    def to_json(self) -> str:
        """Every figure as JSON text, sizes in bytes."""
        return json.dumps(asdict(self), indent=1)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, headers, rows) of the three tables, sizes as text."""
        size = format_bytes
        classic = [
            [row.dtype, *(size(n, "classic") for n in (row.largest_layer, row.largest_module, row.total_size)),
             size(row.training, "classic") + ("" if row.trainable else " *")]
            for row in self.rows
        ]  # fmt: skip
        routed = self.active < self.parameters
        inference = [[row.stored, *map(size, (row.weights, row.kv_cache, row.activations, row.total)),
                      *([size(row.active)] if routed else [])] for row in self.inference]  # fmt: skip
        training = [[row.method, format_count(row.trained),
                     *map(size, (row.weights, row.gradients, row.optimizer, row.activations, row.total))]
                    for row in self.training]  # fmt: skip
        load, cached = load_text(self.batch, self.context), load_text(self.batch, self.context, self.kv_dtype)
        return [
            (f"Classic estimate of {self.name} ({self.classes[0]}; steps of 1024, labelled KB, MB, GB)",
             ["dtype", "largest layer", "largest module", "total size", "training using Adam"], classic),
            (f"To run {self.classes[1]}, {cached}",
             ["stored as", "weights", "KV cache", "activations", "total", *(["used by a token"] if routed else [])],
             inference),
            (f"To train {self.classes[1]}, {load}{self._training_text()}",
             ["method", "trained", "weights", "gradients", "optimizer", "activations", "total"], training),
        ]  # fmt: skip

    def _training_text(self) -> str:
        return (f", on each of {self.gpus} GPUs" if self.gpus > 1 else "") + (
            ", with activation checkpointing" if self.checkpointing else ""
        )

    def __str__(self) -> str:
        blocks = [f"{title}\n{text_table(headers, rows)}" for title, headers, rows in self.tables() if rows]
        return "\n\n".join([*blocks, *self.notes])

    def _repr_html_(self) -> str:
        return "".join(_html_table(*table) for table in self.tables() if table[2]) + "".join(
            f"<p>{html.escape(note)}</p>" for note in self.notes
        )

    def __repr__(self) -> str:
        run = [f", {row.stored} {format_bytes(row.total)} to run" for row in self.inference[:1]]
        active = f" ({format_count(self.active)} for a token)" if self.active < self.parameters else ""
        return f"MemoryEstimate({self.name}, {format_count(self.parameters)} parameters{active}{''.join(run)})"


def estimate(
    base: ModelSpec,
    full: ModelSpec | None = None,
    dtypes: Iterable[object] = CLASSIC,
    stored: Iterable[str] = STORED,
    batch: int = 1,
    context: int = 2048,
    kv_dtype: object = None,
    gpus: int = 1,
    checkpointing: bool = False,
) -> MemoryEstimate:
    """Count a model's memory.

    Args:
        base: the model that the classic table describes (without its head).
        full: the model that is run and trained (with its head); None for the same.
        dtypes: rows of the classic table: dtype names, or "int4".
        stored: rows of the inference table: dtype names or quantizations of `precision.QUANTIZATIONS`.
        batch, context: sequences, and tokens each, that KV cache and activations are counted for; see `tokens_seen`.
        kv_dtype: of keys and values in the cache, one of `attention.KV_DTYPES`; None: as the model computes.
        gpus, checkpointing: of the training table, see `training_rows`.

    Raises:
        ValueError: an unknown dtype, or a batch or context that is not positive.
    """
    batch, context = whole_number(batch, "batch", 1), whole_number(context, "context", 1)
    gpus = whole_number(gpus, "gpus", 1)
    cached = kv_dtype_name(kv_dtype)
    dtypes = [dtypes] if isinstance(dtypes, str) else dtypes
    stored = [stored] if isinstance(stored, str) else stored
    full = full or base
    asked, context = context, tokens_seen(full, context)
    packed_as = full.facts.get("stored_as")  # a GGUF file, which is run as it is
    if packed_as:
        dtypes = stored = ()
    total, layers, modules = _classic_bits(base)
    layer_name, module_name = max(layers, key=layers.__getitem__), max(modules, key=modules.__getitem__)
    rows = []
    for name in map(dtype_name, dtypes):
        sizes = [bits * dtype_bits(name) // 256 for bits in (layers[layer_name], total, modules[module_name])]
        trainable = is_floating(name) and dtype_bits(name) >= 16
        rows.append(ClassicRow(name, sizes[0], sizes[1], 4 * sizes[1], sizes[2], trainable))
    about = sentence(full, Precision()) if packed_as else sentence(full)
    notes = [about] if about else []
    if not all(row.trainable for row in rows):
        notes.append("* 4 x the size, as the classic table counts; weights of this dtype alone cannot be trained.")
    inference = tuple(_inference(full, name, batch, context, cached) for name in stored)
    if is_as_stored(full, Precision()):
        row, kind = _inference(full, "auto", batch, context, cached), f"as stored ({full.facts['quantization']})"
        inference = (replace(row, stored=kind), *inference)
    if packed_as:
        row = _inference(full, "auto", batch, context, cached)
        inference = (replace(row, stored=f"as stored (mostly {packed_as})"),)
    if not any(row.activations for row in inference):
        notes.append("Activations are not estimated: the config does not say how wide the model is.")
    notes += remarks(full.name, full.facts, asked)
    if packed := next((row.stored for row in inference if row.stored in QUANTIZATIONS), None):
        notes += stacked_experts(full, full.precision(None, packed))
    return MemoryEstimate(
        name=base.name, library=base.library, parameters=full.parameters, classes=(base.root.cls, full.root.cls),
        largest_layer_name=layer_name, largest_module_name=module_name, batch=batch, context=context, rows=tuple(rows),
        inference=inference, training=() if packed_as else training_rows(full, batch, context, gpus, checkpointing),
        gpus=gpus, checkpointing=checkpointing, notes=tuple(notes), active=active_parameters(full), kv_dtype=cached,
    )  # fmt: skip


def _classic_bits(model: ModelSpec) -> tuple[int, dict[str, int], dict[str, int]]:
    """Bits of the model in float32, of each layer, and of each module's own tensors; ties once, a bool as one bit."""
    repeated = {name for group in model.ties for name in group[1:]}
    layers, modules = Counter({"": 0}), Counter({"": 0})
    for layer in model.layers():
        for name, tensor, _ in layer.spec.named_tensors(layer.name):
            if name not in repeated:
                dtype = "float32" if is_floating(tensor.dtype) else tensor.dtype
                bits = tensor.elements * (1 if dtype == "bool" else dtype_bits(dtype))
                layers[layer.name] += bits
                modules[name.rpartition(".")[0]] += bits
    return layers.total(), layers, modules


def _inference(model: ModelSpec, name: str, batch: int, context: int, kv_dtype: str | None) -> InferenceRow:
    quantization = name if (name := str(name).lower()) in QUANTIZATIONS else None
    precision = model.precision(None if quantization else name, quantization)
    computes = model.computes_in(precision)
    kv_cache = model.kv_bytes(context, batch, computes, kv_dtype)
    activations = working_bytes(model, precision, batch, context)
    weights, active = model.bytes(precision), active_bytes(model, precision)
    return InferenceRow(precision.label, weights, kv_cache, activations, active)


def _html_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, texts: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(text))}</{tag}>" for text in texts) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    head = f"<caption>{html.escape(title)}</caption><thead>{cells('th', headers)}</thead>"
    return f"<table>{head}<tbody>{body}</tbody></table>"
