"""The models that ship with bigkit: their names, config files and ready-made layer tables.

A shipped model can be estimated and planned without torch, Transformers, timm or a network: `spec` reads a table of a
few kilobytes. `configs/NAME.json` holds the facts of the model's public config.json, `tables/NAME.json` what the real
classes build from it, without the head ("base") and with it ("full"); `scripts/make_tables.py` makes the tables and a
test rebuilds every one.

Leaves out: weights. Only `pygpt` and `pymoe`, trained for this project, come with them: each has a folder of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..model.spec import Attention, ModelSpec, ModuleSpec, TensorSpec
from ..model.stored import with_stored

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One shipped model.

    Args:
        name: its short name.
        hub_id: the repository on the Hub that its config was taken from; "" if it has none.
        library: what builds it: "transformers", "timm" or "bigkit".
        about: one line for a menu.
        aliases: other names by which it is found, besides `name` and `hub_id`, in any case.
    """

    name: str
    hub_id: str
    library: str
    about: str
    aliases: tuple[str, ...] = ()


def _hf(name: str, hub_id: str, about: str, *aliases: str) -> Entry:
    return Entry(name, hub_id, "transformers", about, aliases)


def _timm(name: str, about: str) -> Entry:
    architecture = name.partition(".")[0]
    return Entry(name, f"timm/{name}", "timm", about, (architecture, f"timm/{architecture}"))


ENTRIES = (
    Entry("pygpt", "", "bigkit", "8M GPT on bytes of Python source; its trained weights ship with bigkit"),
    Entry("pymoe", "", "transformers",
        "11M mixture of 16 experts, 2 at work, on bytes of Python source; its trained weights ship with bigkit"),
    _hf("gpt2", "openai-community/gpt2", "124M decoder, 2019"),
    _hf("gpt2-xl", "openai-community/gpt2-xl", "1.6B decoder, 2019"),
    _hf("bert-base-cased", "google-bert/bert-base-cased", "108M encoder, 2018"),
    _hf("t5-large", "google-t5/t5-large", "738M encoder-decoder, 2019"),
    _hf("opt-1.3b", "facebook/opt-1.3b", "1.3B decoder, 2022"),
    _hf("opt-13b", "facebook/opt-13b", "13B decoder, 2022"),
    _hf("opt-30b", "facebook/opt-30b", "30B decoder, 2022"),
    _hf("bloom", "bigscience/bloom", "176B multilingual decoder, ALiBi, 2022", "bloom-176b"),
    _hf("llama-2-7b", "meta-llama/Llama-2-7b-hf", "6.7B decoder, 2023",
        "Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b"),
    _hf("llama-2-70b", "meta-llama/Llama-2-70b-hf", "69B decoder with grouped-query attention, 2023",
        "Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf", "meta-llama/Llama-2-70b"),
    _hf("llama-3.1-8b", "meta-llama/Llama-3.1-8B", "8.0B decoder, 128k context, 2024",
        "meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
    _hf("llama-3.1-405b", "meta-llama/Llama-3.1-405B", "406B decoder, 128k context, 2024",
        "meta-llama/Meta-Llama-3.1-405B", "meta-llama/Llama-3.1-405B-Instruct",
        "meta-llama/Meta-Llama-3.1-405B-Instruct"),
    _hf("mistral-7b", "mistralai/Mistral-7B-v0.1", "7.2B decoder, sliding window of 4096, 2023", "Mistral-7B-v0.1"),
    _hf("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", "47B mixture of 8 experts, 2 at work, 2023",
        "Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    _hf("qwen3-0.6b", "Qwen/Qwen3-0.6B", "0.6B decoder, tied embeddings, 2025"),
    _hf("qwen3-32b", "Qwen/Qwen3-32B", "33B decoder, 2025"),
    _hf("gemma-2-9b", "google/gemma-2-9b", "9.2B decoder, every other layer a sliding window, 2024",
        "google/gemma-2-9b-it"),
    _hf("deepseek-v3", "deepseek-ai/DeepSeek-V3", "671B mixture of 256 experts, 8 at work, MLA, in FP8, 2024",
        "deepseek-ai/DeepSeek-V3-Base", "deepseek-ai/DeepSeek-R1", "deepseek-r1"),
    # Where the dimensions of the models from here to kimi-k2 were seen. In Transformers, as defaults of the class:
    # smollm3-3b, gpt-oss-120b, qwen3-30b-a3b (48 layers: MindSpeed's recipe), qwen3-next-80b-a3b, qwen3.5-35b-a3b (what
    # its images become: configs of Qwen3.6-35B-A3B), glm-4.5-air, glm-5, minimax-m2, minimax-m3 (its dense layers:
    # Megatron Bridge's recipe and a port to MLX), deepseek-v3.2, deepseek-v4-flash, mistral-small-4's and
    # llama-4-scout's text. In configs, or copies of them, on the Hub and in public repositories:
    # phi-4, mistral-small-24b, gemma-3-4b, gemma-3-27b, whisper-large-v3, glm-4.6, llama-4-scout. In recipes:
    # gpt-oss-20b (slime's), nemotron-3-nano-30b and kimi-k2 (Megatron Bridge's). Each has its checkpoint's count of
    # parameters, to the last (tests/zoo/test_names.py), but glm-5, minimax-m3, deepseek-v4-flash and mistral-small-4:
    # the card's or a port's.
    _hf("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "3.1B decoder, 2025", "HuggingFaceTB/SmolLM3-3B-Base"),
    _hf("phi-4", "microsoft/phi-4", "15B decoder, 2024"),
    _hf("mistral-small-24b", "mistralai/Mistral-Small-24B-Instruct-2501", "24B decoder, 2025",
        "mistralai/Mistral-Small-24B-Base-2501"),
    _hf("gemma-3-4b", "google/gemma-3-4b-it", "4.3B text and images, five of six layers a sliding window, 2025",
        "google/gemma-3-4b-pt"),
    _hf("gemma-3-27b", "google/gemma-3-27b-it", "27B text and images, five of six layers a sliding window, 2025",
        "google/gemma-3-27b-pt"),
    _hf("whisper-large-v3", "openai/whisper-large-v3", "1.5B from speech to text, 2023"),
    _hf("gpt-oss-20b", "openai/gpt-oss-20b", "21B mixture of 32 experts, 4 at work, in MXFP4, 2025"),
    _hf("gpt-oss-120b", "openai/gpt-oss-120b", "117B mixture of 128 experts, 4 at work, in MXFP4, 2025"),
    _hf("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "31B mixture of 128 experts, 8 at work, 2025"),
    _hf("qwen3-next-80b-a3b", "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "80B mixture of 512 experts, 10 at work, mostly linear attention, 2025", "Qwen/Qwen3-Next-80B-A3B-Thinking"),
    _hf("qwen3.5-35b-a3b", "Qwen/Qwen3.5-35B-A3B", "35B mixture of 256 experts, mostly linear attention, images, 2026"),
    _hf("nemotron-3-nano-30b", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "32B mixture of 128 experts, mostly Mamba-2, 2025"),
    _hf("glm-4.5-air", "zai-org/GLM-4.5-Air", "107B mixture of 128 experts, 8 at work, 2025"),
    _hf("glm-4.6", "zai-org/GLM-4.6", "353B mixture of 160 experts, 8 at work, 2025"),
    _hf("glm-5", "zai-org/GLM-5", "744B mixture of 256 experts, 8 at work, MLA with an indexer, 2026"),
    _hf("llama-4-scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "109B mixture of 16 experts, 1 at work, chunked attention, images, 2025", "meta-llama/Llama-4-Scout-17B-16E"),
    _hf("minimax-m2", "MiniMaxAI/MiniMax-M2", "229B mixture of 256 experts, 8 at work, in FP8, 2025"),
    _hf("minimax-m3", "MiniMaxAI/MiniMax-M3",
        "427B mixture of 128 experts, 4 at work, block-sparse attention, images, 2026"),
    _hf("deepseek-v3.2", "deepseek-ai/DeepSeek-V3.2", "672B mixture of 256 experts, MLA with an indexer, 2025",
        "deepseek-ai/DeepSeek-V3.2-Exp"),
    _hf("deepseek-v4-flash", "deepseek-ai/DeepSeek-V4-Flash",
        "284B mixture of 256 experts, 6 at work, compressed attention, 2026"),
    _hf("mistral-small-4", "mistralai/Mistral-Small-4-119B-2603",
        "119B mixture of 128 experts, 4 at work, MLA, 2026; without its images"),
    _hf("kimi-k2", "moonshotai/Kimi-K2-Instruct", "1.0T mixture of 384 experts, 8 at work, MLA, in FP8, 2025",
        "moonshotai/Kimi-K2-Base"),
    _hf("idefics-80b-instruct", "HuggingFaceM4/idefics-80b-instruct", "80B images and text, cross-attention, 2023",
        "HuggingFaceM4/idefics-80b"),
    _hf("vit-base-patch16-224", "google/vit-base-patch16-224", "87M vision transformer through Transformers, 2020"),
    _timm("resnet50.a1_in1k", "26M convolutional network through timm"),
    _timm("convnext_base.fb_in22k_ft_in1k", "89M convolutional network through timm"),
    _timm("vit_base_patch16_224.augreg_in21k_ft_in1k", "87M vision transformer through timm"),
)  # fmt: skip


@cache
def _index() -> dict[str, Entry]:
    index: dict[str, Entry] = {}
    for entry in ENTRIES:
        for name in (entry.name, entry.hub_id, entry.hub_id.rpartition("/")[2], *entry.aliases):
            if name:
                index.setdefault(name.lower(), entry)
    return index


def names() -> tuple[str, ...]:
    """The short names of the models that ship with bigkit.

    >>> "llama-2-7b" in names()
    True
    """
    return tuple(entry.name for entry in ENTRIES)


def find(name: str) -> Entry | None:
    """The shipped model of that name, Hub id or alias, in any case; None if there is none.

    >>> find("Meta-Llama/LLAMA-2-7b-hf").name
    'llama-2-7b'
    """
    return _index().get(name.lower())


def alike(name: str) -> Entry | None:
    """The shipped model whose name has the same letters, digits and points, whatever else is between them; None if
    there is none.

    >>> alike("Llama 3.1 8B").name
    'llama-3.1-8b'
    """
    return next((entry for known, entry in _index().items() if _letters(known) == _letters(name)), None)


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == ".")


def closest(name: str) -> list[str]:
    """The three shipped names that look most like `name`.

    >>> closest("lama2-7b")[0]
    'llama-2-7b'
    """
    from difflib import get_close_matches

    index = _index()
    last = name.lower().rpartition("/")[2]
    matches = get_close_matches(last, index, n=9, cutoff=0.5)
    return list(dict.fromkeys(index[match].name for match in matches))[:3]


def config(entry: Entry) -> dict[str, Any]:
    """The shipped config of a model, as its config.json says it."""
    with_weights = _HERE / entry.name / "config.json"
    path = with_weights if with_weights.is_file() else _HERE / "configs" / f"{entry.name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def table_path(entry: Entry) -> Path:
    """Where the model's layer table is."""
    return _HERE / "tables" / f"{entry.name}.json"


@cache
def specs(name: str) -> dict[str, ModelSpec]:
    """The layer tables of a shipped model, by its short name: "base" without the output head, "full" with it."""
    entry = _index()[name.lower()]
    table = specs_from_json(json.loads(table_path(entry).read_text(encoding="utf-8")))
    return {form: with_stored(spec) for form, spec in table.items()}


def specs_to_json(specs: Mapping[str, ModelSpec]) -> dict[str, Any]:
    """Several specs in one JSON-ready table (a model with its head and without).

    Equal modules are written once, and runs of numbered children as "0..79".
    """
    nodes: list[dict[str, Any]] = []
    seen: dict[str, int] = {}

    def number(module: ModuleSpec) -> int:
        node: dict[str, Any] = {"class": module.cls}
        if module.tensors:
            node["tensors"] = {name: _tensor_to_json(tensor) for name, tensor in module.tensors.items()}
        if module.children:
            node["children"] = _fold({name: number(child) for name, child in module.children.items()})
        if module.linear:
            node["linear"] = True
        key = repr(node)
        if key not in seen:
            seen[key] = len(nodes)
            nodes.append(node)
        return seen[key]

    models = {
        key: {
            "name": spec.name,
            "root": number(spec.root),
            "ties": [list(group) for group in spec.ties],
            "no_split": list(spec.no_split),
            "attention": [_attention_to_json(record) for record in spec.attention],
            "facts": dict(spec.facts),
            "library": spec.library,
        }
        for key, spec in specs.items()
    }
    return {"format": 1, "models": models, "modules": nodes}


def specs_from_json(data: Mapping[str, Any]) -> dict[str, ModelSpec]:
    """The inverse of `specs_to_json`."""
    if data.get("format") != 1:
        raise ValueError(f"this layer table has format {data.get('format')!r}; this version of bigkit reads format 1")
    modules: list[ModuleSpec] = []
    for node in data["modules"]:  # children always come before their parents
        tensors = {name: _tensor_from_json(tensor) for name, tensor in node.get("tensors", {}).items()}
        children = {name: modules[i] for name, i in _unfold(node.get("children", {}))}
        modules.append(ModuleSpec(node["class"], tensors, children, node.get("linear", False)))
    return {
        key: ModelSpec(
            name=model["name"],
            root=modules[model["root"]],
            ties=tuple(tuple(group) for group in model["ties"]),
            no_split=tuple(model["no_split"]),
            attention=tuple(Attention(*record) for record in model["attention"]),
            facts=model["facts"],
            library=model["library"],
        )
        for key, model in data["models"].items()
    }


def _attention_to_json(record: Attention) -> list[Any]:
    rest = [record.float32, record.every]
    return [record.layer, record.per_token, record.window, record.fixed, *(rest if rest != [0, 1] else [])]


def _tensor_to_json(tensor: TensorSpec) -> list[Any]:
    kind = "buffer" if tensor.persistent else "temporary buffer"
    return [list(tensor.shape), tensor.dtype, *([kind] if tensor.buffer else [])]


def _tensor_from_json(record: list[Any]) -> TensorSpec:
    shape, dtype, *kind = record
    return TensorSpec(tuple(shape), dtype, buffer=bool(kind), persistent=kind != ["temporary buffer"])


def _fold(children: dict[str, int]) -> dict[str, int]:
    """{"0": 7, "1": 7, "2": 7, "norm": 3} -> {"0..2": 7, "norm": 3}."""
    folded: list[tuple[str, str, int]] = []
    for name, node in children.items():
        if folded and name.isdigit() and folded[-1][1].isdigit() and folded[-1][2] == node:
            first, last, _ = folded[-1]
            if str(int(last) + 1) == name:
                folded[-1] = (first, name, node)
                continue
        folded.append((name, name, node))
    return {first if first == last else f"{first}..{last}": node for first, last, node in folded}


def _unfold(children: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    for name, node in children.items():
        run = re.fullmatch(r"(\d+)\.\.(\d+)", name)
        names = map(str, range(int(run[1]), int(run[2]) + 1)) if run else (name,)
        yield from ((each, node) for each in names)
