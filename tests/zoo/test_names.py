"""bigkit.zoo: shipped models and their tables, folders, timm names, and a Hub that runs on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigkit import zoo
from bigkit.zoo import catalog, hub
from bigkit.zoo.catalog import specs_from_json, specs_to_json
from bigkit.zoo.headers import spec_from_tensors
from tests.hub_server import FakeHub

SHIPPED = {entry.name: entry for entry in zoo.ENTRIES}

# Published parameter counts: with the output head, tied tensors once.
PARAMETERS = {
    "gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "t5-large": 737_668_096, "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288, "bloom": 176_247_271_424, "llama-2-7b": 6_738_415_616, "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248, "llama-3.1-405b": 405_853_388_800, "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704, "qwen3-32b": 32_762_123_264, "gemma-2-9b": 9_241_705_984,
    "resnet50.a1_in1k": 25_557_032, "vit-base-patch16-224": 86_567_656,
    "vit_base_patch16_224.augreg_in21k_ft_in1k": 86_567_656, "convnext_base.fb_in22k_ft_in1k": 88_591_464,
    "smollm3-3b": 3_075_098_624, "phi-4": 14_659_507_200, "mistral-small-24b": 23_572_403_200,
    "gemma-3-4b": 4_300_079_472, "gemma-3-27b": 27_432_406_640, "whisper-large-v3": 1_543_490_560,
    "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672, "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-next-80b-a3b": 79_674_391_296, "llama-4-scout": 108_641_793_536, "qwen3.5-35b-a3b": 35_107_181_936,
    "nemotron-3-nano-30b": 31_577_937_344,
}  # fmt: skip
# The newer ones, from smollm3-3b on, were seen as the Hub, llama.cpp, Ollama or Keras count them, in files of public
# repositories; qwen3-next-80b-a3b's as that of Qwen3-Coder-Next and qwen3.5-35b-a3b's as that of a model tuned from it.
# As the model cards round them, in billions: parameters, and those that a token uses (None: counted otherwise there).
# Seen in: vLLM Ascend's guide (qwen3-30b-a3b), the names (qwen3-next-80b-a3b, qwen3.5-35b-a3b), NVIDIA's page
# (nemotron-3-nano-30b), the Hub's collection (minimax-m2), NeMo's guide (gpt-oss), Transformers' guide (llama-4-scout),
# GLM-5's README, arXiv 2606.19348 (deepseek-v4-flash), its name (mistral-small-4), mlx-lm's port (minimax-m3, of which
# the card says "about 428").
CARDS = {
    "qwen3-30b-a3b": (30.5, None), "qwen3-next-80b-a3b": (80, None), "qwen3.5-35b-a3b": (35, None),
    "nemotron-3-nano-30b": (31.6, 3.6), "minimax-m2": (229, None), "gpt-oss-120b": (117, None),
    "gpt-oss-20b": (21, None), "llama-4-scout": (109, None), "glm-5": (744, None), "deepseek-v4-flash": (284, None),
    "mistral-small-4": (119, None), "deepseek-v3": (671, None), "minimax-m3": (427, None),
}  # fmt: skip
TINY_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
              "max_position_embeddings": 64, "torch_dtype": "bfloat16"}  # fmt: skip
TINY_PARAMETERS = 2 * 50 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_weights(folder: Path, shards: int = 1, rows: int = 256) -> int:
    """Safetensors files of two big blocks; returns the bytes of their tensors."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.layers.{i}.mlp.up.weight": torch.zeros(rows, 1024, dtype=torch.bfloat16) for i in range(2)}
    tensors |= {"model.embed_tokens.weight": torch.zeros(10, 8), "lm_head.weight": torch.zeros(10, 8)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        weight_map = {}
        for number in range(shards):
            name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {key: tensors[key] for key in list(tensors)[number::shards]}
            save_file(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(tensor.nbytes for tensor in tensors.values())


# ---------------------------------------------------------------------------------------------------------------------
# Shipped models


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    assert zoo.describe(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", CARDS)
def test_counts_are_those_of_the_cards(name):
    from bigkit.model.experts import active_parameters

    spec, (total, active) = zoo.describe(name), CARDS[name]
    digits = 1 if isinstance(total, float) else 0
    assert round(spec.parameters / 1e9, digits) == total
    assert active is None or abs(active_parameters(spec) / 1e9 - active) < (0.06 if digits else 0.6)


def test_what_is_published_in_fp8_is_counted_so():
    """DeepSeek-V3 and Kimi-K2: one byte for all but embeddings, head, norms and routers, and a scale for 128 x 128."""
    for name in ("deepseek-v3", "kimi-k2"):
        spec = zoo.describe(name)
        kept = [tensor for key, (tensor, _) in spec.tensors.items()
                if any(part in key for part in ("embed_tokens", "lm_head", "norm", "gate.", "rotary"))]  # fmt: skip
        codes = spec.parameters - sum(tensor.elements for tensor in kept if not tensor.buffer)
        plain = sum(tensor.bytes() for tensor in kept)
        assert codes + codes // 128**2 * 4 + plain == pytest.approx(spec.bytes(), rel=1e-5)
        assert spec.bytes() < 0.503 * spec.bytes(spec.precision("bfloat16"))


def test_counts_that_need_a_word():
    assert zoo.describe("bert-base-cased", base=True).parameters == 108_310_272
    deepseek = zoo.describe("deepseek-v3")  # the checkpoint stores each router's bias as a weight, here it is a buffer
    biases = sum(t.elements for name, (t, _) in deepseek.tensors.items() if name.endswith("e_score_correction_bias"))
    assert deepseek.parameters + biases == 671_026_419_200
    for name, routers, experts, published in (
        ("kimi-k2", 60, 384, 1_026_408_232_448), ("minimax-m2", 62, 256, 228_689_764_864),
        ("glm-4.6", 89, 160, 352_797_829_024),
    ):  # fmt: skip
        assert zoo.describe(name).parameters + routers * experts == published


@pytest.mark.parametrize(("name", "last", "routers", "tables", "published"), [
    ("glm-4.6", 91, 90, 0, 356_785_898_816), ("glm-4.5-air", 45, 46, 2, 110_468_824_832),
    ("deepseek-v3.2", 60, 59, 2, 685_355_329_792),
])  # fmt: skip
def test_checkpoints_hold_a_block_more(name, last, routers, tables, published):
    """For the token after the next: a block, what joins two states to one, three norms, in some the tables of words."""
    spec = zoo.describe(name)
    hidden, words = spec.facts["hidden_size"], spec.facts["vocab_size"]
    prefix = f"model.layers.{last}."
    block = sum(t.elements for key, (t, _) in spec.tensors.items() if key.startswith(prefix) and not t.buffer)
    biases = routers * next(t.elements for key, (t, _) in spec.tensors.items() if "e_score_correction_bias" in key)
    assert spec.parameters + biases + block + 2 * hidden**2 + 3 * hidden + tables * words * hidden == published


def test_idefics_has_lost_its_tables():
    idefics = zoo.describe("idefics-80b-instruct", base=True)  # in 2023 each of its 100 attentions held rotary tables
    weights = 4 * idefics.parameters
    rotary_tables = (80 + 20) * 2 * 2048 * 128 * 4
    assert round((weights + rotary_tables) / 2**30, 2) == 297.12


@pytest.mark.parametrize("name", SHIPPED)
def test_every_name_of_a_model_finds_it(name):
    entry = SHIPPED[name]
    wanted = zoo.describe(name)
    forms = [name.upper(), *entry.aliases]
    if entry.hub_id:
        page = f"https://huggingface.co/{entry.hub_id}"
        forms += [entry.hub_id, page, f"{page}/tree/main", f"{page}/blob/main/config.json", f"hf.co/{entry.hub_id}"]
    if entry.library == "timm":
        forms += [f"hf-hub:{entry.hub_id}"]
    for form in forms:
        found = zoo.describe(form)
        assert found.root is wanted.root, form
        assert found.library == entry.library


def test_names_are_unique():
    forms = [form.lower() for entry in zoo.ENTRIES for form in {entry.name, entry.hub_id, *entry.aliases} if form]
    assert len(forms) == len(set(forms)) and len(zoo.names()) >= 21


def test_base_is_without_the_head():
    base, full = zoo.describe("llama-2-7b", base=True), zoo.describe("llama-2-7b")
    assert full.parameters - base.parameters == 32000 * 4096
    assert (base.facts["has_head"], full.facts["has_head"]) == (False, True)
    assert zoo.describe("t5-large").facts["has_head"] and not zoo.describe("t5-large", base=True).facts["has_head"]
    assert base.attention[0].layer == "layers.0" and full.attention[0].layer == "model.layers.0"


def test_blocks_of_the_cache_are_layers_of_the_model():
    for name in zoo.names():
        spec = zoo.describe(name)
        layers = {layer.name for layer in spec.layers()}
        assert {block.layer for block in spec.attention} <= layers, name


def test_facts_of_shipped_models():
    assert zoo.describe("deepseek-v3").kv_bytes(1000) == 61 * 576 * 1000 * 2
    assert zoo.describe("llama-2-70b").kv_bytes(512) == 167_772_160
    assert zoo.describe("bloom").facts["torch_dtype"] == "bfloat16"
    assert zoo.describe("resnet50.a1_in1k").repeated_blocks == {"Bottleneck"}
    for name in zoo.names():
        assert "uncounted_cache" not in zoo.describe(name).facts


def test_shipped_models_need_no_torch():
    code = """
        import sys, time
        from bigkit import zoo
        started = time.perf_counter()
        spec = zoo.describe("https://huggingface.co/meta-llama/Llama-3.1-405B/tree/main")
        print(time.perf_counter() - started, spec.parameters)
        heavy = {"torch", "transformers", "timm", "huggingface_hub", "numpy"} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seconds, parameters = done.stdout.split()
    assert int(parameters) == PARAMETERS["llama-3.1-405b"] and float(seconds) < 0.5


QUICK = ("pygpt", "gpt2", "t5-large", "gemma-2-9b", "qwen3-30b-a3b", "resnet50.a1_in1k", "vit-base-patch16-224")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.soak) for name in SHIPPED if name not in QUICK)]
)
def test_tables_are_what_the_real_classes_build(name):
    """Rebuild a shipped table, and compare it to the letter; the fix is `python scripts/make_tables.py`."""
    path = Path(__file__).parents[2] / "scripts" / "make_tables.py"
    spec = importlib.util.spec_from_file_location("make_tables", path)
    assert spec and spec.loader
    make_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tables)
    text = make_tables.to_text(make_tables.table(SHIPPED[name]))
    assert text == catalog.table_path(SHIPPED[name]).read_text(encoding="utf-8")


def test_every_shipped_model_has_a_table():
    assert {path.stem for path in catalog.table_path(zoo.ENTRIES[0]).parent.glob("*.json")} == set(SHIPPED)


def test_tables_survive_json():
    for entry in zoo.ENTRIES:
        specs = catalog.specs(entry.name)
        assert specs_to_json(specs_from_json(specs_to_json(specs))) == specs_to_json(specs)


@pytest.mark.parametrize(
    "name", ["gpt2", "t5-large", "llama-3.1-405b", "deepseek-v3", "pygpt", "pymoe", "resnet50.a1_in1k"]
)
@pytest.mark.parametrize("base", [True, False])
def test_empty_model_is_the_model_described(name, base):
    model = zoo.empty_model(name, base=base)
    named = {key: tuple(value.shape) for key, value in model.named_parameters(remove_duplicate=False)}
    named |= {key: tuple(value.shape) for key, value in model.named_buffers(remove_duplicate=False)}
    assert named == {key: tensor.shape for key, (tensor, _) in zoo.describe(name, base=base).tensors.items()}
    assert all(parameter.is_meta and parameter.dtype.itemsize == 4 for parameter in model.parameters())


def test_dtype_of_an_empty_model():
    import torch

    assert next(zoo.empty_model("opt-1.3b", dtype=None).parameters()).dtype == torch.float16
    assert next(zoo.empty_model("opt-1.3b", dtype="bf16").parameters()).dtype == torch.bfloat16
    assert next(zoo.empty_model("resnet50", dtype=torch.float16).parameters()).dtype == torch.float16


# ---------------------------------------------------------------------------------------------------------------------
# Folders and timm


def test_folder_with_a_config(tmp_path):
    folder = write_config(tmp_path / "tiny", TINY_LLAMA)
    for form in (folder, str(folder), str(folder / "config.json")):
        spec = zoo.describe(form)
        assert (spec.parameters, spec.library) == (TINY_PARAMETERS, "transformers")
        assert [block.per_token for block in spec.attention] == [32, 32]
        assert spec.facts["torch_dtype"] == "bfloat16" and spec.facts["has_head"]
    assert zoo.describe(folder, base=True).parameters == TINY_PARAMETERS - 50 * 32


def test_folder_named_like_a_shipped_model(tmp_path, monkeypatch):
    write_config(tmp_path / "gpt2", TINY_LLAMA)
    monkeypatch.chdir(tmp_path)
    assert zoo.describe("gpt2").parameters == PARAMETERS["gpt2"]
    assert zoo.describe("./gpt2").parameters == TINY_PARAMETERS


def test_folder_of_a_timm_model(tmp_path):
    folder = write_config(tmp_path / "net", {"architecture": "resnet18", "num_classes": 7})
    spec = zoo.describe(folder)
    assert spec.library == "timm" and spec.tensors["fc.weight"][0].shape == (7, 512)


def test_folder_of_a_gpt(tmp_path):
    config = {"architectures": ["GPT"], "model_type": "bigkit-gpt", "n_layer": 2, "n_head": 2, "n_embd": 16,
              "vocab_size": 256, "block_size": 32}  # fmt: skip
    spec = zoo.describe(write_config(tmp_path, config))
    assert spec.library == "bigkit" and [block.per_token for block in spec.attention] == [32, 32]


@pytest.mark.parametrize("shards", [1, 2])
def test_folder_with_weights_alone(tmp_path, shards):
    size = write_weights(tmp_path, shards)
    spec = zoo.describe(tmp_path)
    assert (spec.library, spec.bytes()) == ("safetensors", size)
    assert [layer.name for layer in spec.layers() if layer.cls == "Block"] == ["model.layers.0", "model.layers.1"]
    assert spec.root.children["model"].children["layers"].children["0"].children["mlp"].children["up"].linear
    with pytest.raises(zoo.NoConfig, match="no config.json"):
        zoo.empty_model(tmp_path)


def test_weights_beside_a_config_of_an_unknown_type(tmp_path):
    size = write_weights(tmp_path)
    tomorrow = TINY_LLAMA | {"model_type": "from-tomorrow", "architectures": ["TomorrowForCausalLM"]}
    write_config(tmp_path, tomorrow)
    spec = zoo.describe(tmp_path)
    assert (spec.library, spec.bytes()) == ("safetensors", size)
    assert [block.layer for block in spec.attention] == ["model.layers.0", "model.layers.1"]
    with pytest.raises(zoo.UnknownModel, match="from-tomorrow"):
        zoo.empty_model(tmp_path)
    assert zoo.describe(write_config(tmp_path, TINY_LLAMA), "safetensors").bytes() == size


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, zoo.NoConfig, "neither a config.json"),
        ({"config.json": "{"}, zoo.NoConfig, "not valid JSON"),
        ({"config.json": "[1]"}, zoo.NoConfig, "holds a list"),
        ({"config.json": '{"model_type": "from-tomorrow"}'}, zoo.NoConfig, "neither a config.json"),
        ({"config.json": '{"model_type": "llama", "hidden_size": "wide"}'}, zoo.NoConfig, "no valid config"),
        ({"config.json": '{"model_type": "llama", "num_hidden_layers": -1}'}, zoo.NoConfig, "num_hidden_layers = -1"),
        ({"config.json": '{"model_type": "x", "auto_map": {"AutoModel": "m.M"}}'}, zoo.RemoteCodeNeeded, "trust_"),
        ({"config.json": '{"architecture": "resnet1"}'}, zoo.UnknownModel, "resnet1"),
        ({"model.safetensors": "short"}, zoo.NoConfig, "no complete safetensors"),
        ({"model.safetensors.index.json": "{}"}, zoo.NoConfig, "weight_map"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'}, zoo.NoConfig, "gone"),
    ],
)
def test_folders_that_hold_no_model(tmp_path, files, error, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=words) as caught:
        zoo.describe(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_library_that_does_not_fit(tmp_path):
    write_config(tmp_path, TINY_LLAMA)
    with pytest.raises(zoo.ZooError, match="transformers model"):
        zoo.describe(tmp_path, "timm")
    with pytest.raises(zoo.ZooError, match="library_name must be"):
        zoo.describe("gpt2", "keras")


RESNETS = ["resnet18", "resnet18.a1_in1k", "timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"]


@pytest.mark.parametrize("form", RESNETS)
def test_timm_names(form):
    import timm

    spec = zoo.describe(form)
    real = timm.create_model("resnet18.a1_in1k", pretrained=False)
    assert spec.bytes() == sum(t.nbytes for t in [*real.parameters(), *real.buffers()])
    assert spec.library == "timm" and spec.facts["has_head"]


def test_timm_tags_decide_the_number_of_classes():
    spec = zoo.describe("vit_tiny_patch16_224.augreg_in21k")
    assert spec.tensors["head.weight"][0].shape[0] == 21843
    with pytest.raises(zoo.UnknownModel, match="no_such_tag"):
        zoo.describe("resnet18.no_such_tag", "timm")


# ---------------------------------------------------------------------------------------------------------------------
# Names that are wrong


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("", zoo.UnknownModel, "not empty"),
        ("a/b/c", zoo.UnknownModel, "OWNER/MODEL"),
        ("no such model", zoo.UnknownModel, "OWNER/MODEL"),
        ("./nowhere", zoo.UnknownModel, "no folder"),
        ("https://example.com/gpt2", zoo.BadURL, "not on the Hub"),
        ("https://huggingface.co/datasets/squad", zoo.BadURL, "no model page"),
        ("https://huggingface.co/spaces/a/b", zoo.BadURL, "no model page"),
        ("https://huggingface.co/", zoo.BadURL, "no model page"),
        ("lama-2-7b", zoo.OfflineError, "llama-2-7b"),
        ("meta-llama/Llama-2-13b-hf", zoo.OfflineError, "HF_HUB_OFFLINE"),
        ("qqqq/zzzz", zoo.OfflineError, "folder with its config.json. `bigkit models` lists what is shipped"),
    ],
)
def test_errors_offline(name, error, words):
    with pytest.raises(error, match=words) as caught:
        zoo.describe(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://huggingface.co/a/b", ("a/b", None)),
        ("https://huggingface.co/a/b/", ("a/b", None)),
        ("http://www.huggingface.co/a/b?library=transformers#x", ("a/b", None)),
        ("huggingface.co/a/b/blob/v1.0/config.json", ("a/b", "v1.0")),
        ("https://hf.co/gpt2/tree/main", ("gpt2", "main")),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F1", ("a/b", "refs/pr/1")),
        ("https://huggingface.co/a/b/commit/0123abc", ("a/b", "0123abc")),
        ("https://huggingface.co/a/b/discussions/3", ("a/b", None)),
        ("a/b", None),
        ("gpt2", None),
    ],
)
def test_urls(url, expected):
    assert hub.parse_url(url) == expected


# ---------------------------------------------------------------------------------------------------------------------
# The Hub: a server on this machine, and a client process that knows no other

CLIENT = """
import json, sys
from bigkit import zoo
for line in sys.stdin:
    name, options = json.loads(line)
    try:
        spec = zoo.describe(name, **options)
        answer = [spec.library, spec.name, spec.parameters, spec.bytes(), len(spec.attention)]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""


class Client:
    """`zoo.describe` in another process, which takes a server on this machine for the Hub."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        paths = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home),
                 "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        self.process = subprocess.Popen([sys.executable, "-c", CLIENT], env={**kept, **paths, **environment}, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def describe(self, name: str, **options: Any) -> list[Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([name, options]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def online(tmp_path_factory) -> Iterator[tuple[FakeHub, Client, Path]]:
    """A Hub with a handful of models, and a client."""
    shelf = tmp_path_factory.mktemp("hub")
    with FakeHub() as server:
        tiny = write_config(shelf / "tiny", TINY_LLAMA)
        write_weights(tiny)
        wide = write_config(shelf / "wide", TINY_LLAMA | {"vocab_size": 60})
        server.add("someone/tiny", tiny, **{"v2": wide, "refs/pr/1": wide})
        server.add("someone/gated", tiny, gated=True, readers={"right"})
        server.add("someone/secret", tiny, readers={"right"})
        write_weights(shelf / "single")
        server.add("someone/single", shelf / "single")
        write_weights(shelf / "sharded", shards=3)
        server.add("someone/sharded", write_config(shelf / "sharded", {"model_type": "from-tomorrow"}))
        (shelf / "empty").mkdir()
        server.add("someone/empty", shelf / "empty")
        server.add("someone/net", write_config(shelf / "net", {"architecture": "resnet18", "num_classes": 7}))
        server.add("someone/code", write_remote_code(shelf / "code"))
        server.add("meta-llama/Llama-2-7b-hf", tiny, old=tiny)
        client = Client(server.url, shelf / "home")
        yield server, client, shelf
        client.close()


def write_remote_code(folder: Path) -> Path:
    """A model whose classes are in its repository."""
    (folder / "x").parent.mkdir()
    auto_map = {"AutoConfig": "code_tiny.TinyConfig", "AutoModelForCausalLM": "code_tiny.TinyForCausalLM"}
    write_config(folder, {"model_type": "tiny-remote", "architectures": ["TinyForCausalLM"], "auto_map": auto_map})
    source = """
        from torch import nn
        from transformers import PretrainedConfig, PreTrainedModel

        class TinyConfig(PretrainedConfig):
            model_type = "tiny-remote"

        class TinyForCausalLM(PreTrainedModel):
            config_class = TinyConfig

            def __init__(self, config):
                super().__init__(config)
                self.lm_head = nn.Linear(3, 5)
                self.post_init()
    """
    (folder / "code_tiny.py").write_text(textwrap.dedent(source))
    return folder


@pytest.fixture
def ask(online):
    """Ask the client; the answer, and the requests that it took."""
    server, client, _ = online

    def describe(name: str, **options: Any):
        server.requests.clear()
        return client.describe(name, **options), list(server.requests)

    return describe


def weight_requests(requests):
    return [request for request in requests if request.path.endswith(".safetensors") and request.method == "GET"]


def test_hub_config_and_nothing_else(ask):
    answer, requests = ask("someone/tiny")
    assert answer == ["transformers", "someone/tiny", TINY_PARAMETERS, answer[3], 2]
    assert requests and {request.path for request in requests} == {"/someone/tiny/resolve/main/config.json"} | {
        request.path for request in requests if request.path.startswith("/api/models/someone/tiny")
    }


def test_hub_urls_and_revisions(ask, online):
    url = f"{online[0].url}/someone/tiny"
    assert ask(url)[0][:3] == ["transformers", "someone/tiny", TINY_PARAMETERS]
    wide = TINY_PARAMETERS + 2 * 10 * 32
    for name, options in (
        (f"{url}/tree/v2", {}),
        (f"{url}/blob/refs%2Fpr%2F1/config.json", {}),
        ("someone/tiny", {"revision": "v2"}),
    ):
        answer, requests = ask(name, **options)
        assert answer[2] == wide, (name, answer)
        assert all("/main/" not in request.path for request in requests)
    answer, _ = ask("someone/tiny", revision="v9")
    assert answer[0] == "UnknownModel" and "no revision 'v9'" in answer[1]


def test_hub_is_not_asked_for_shipped_models(ask):
    answer, requests = ask("meta-llama/Llama-2-7b-hf")
    assert answer[2] == PARAMETERS["llama-2-7b"] and requests == []
    answer, requests = ask("meta-llama/Llama-2-7b-hf", revision="old")
    assert answer[2] == TINY_PARAMETERS and requests


@pytest.mark.parametrize(("name", "files"), [("someone/single", 1), ("someone/sharded", 3)])
def test_hub_headers_without_the_weights(ask, online, name, files):
    folder = online[2] / name.split("/")[1]
    answer, requests = ask(name)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert answer[0] == "safetensors" and 0 < weights - answer[3] < 2000 * files
    fetched = weight_requests(requests)
    assert len(fetched) == files and all(request.range for request in fetched)
    assert sum(request.sent for request in fetched) < weights / 2


def test_hub_headers_on_demand(ask):
    answer, requests = ask("someone/tiny", library_name="safetensors")
    assert answer[0] == "safetensors" and len(weight_requests(requests)) == 1
    assert not any(request.path.endswith("config.json") for request in requests)


def test_hub_timm_model(ask):
    answer, requests = ask("someone/net")
    assert answer[0] == "timm" and weight_requests(requests) == []


def test_hub_gated(ask):
    answer, _ = ask("someone/gated", token="wrong")
    assert answer[0] == "GatedModel" and "licence" in answer[1] and "token=" in answer[1]
    assert ask("someone/gated")[0][0] == "GatedModel"
    answer, requests = ask("someone/gated", token="right")
    assert answer[2] == TINY_PARAMETERS and {request.token for request in requests} == {"right"}


def test_hub_private(ask):
    assert ask("someone/secret")[0][0] == "UnknownModel"
    assert ask("someone/secret", token="right")[0][2] == TINY_PARAMETERS


def test_hub_missing(ask):
    answer, _ = ask("meta-llama/Llama-2-7b-hff")
    assert answer[0] == "UnknownModel" and "Shipped, and close to it: llama-2-7b" in answer[1] and "\n" not in answer[1]
    answer, _ = ask("someone/empty")
    assert answer[0] == "NoConfig" and "\n" not in answer[1]


def test_hub_remote_code(ask):
    answer, requests = ask("someone/code")
    assert answer[0] == "RemoteCodeNeeded" and "trust_remote_code=True" in answer[1]
    assert not any(request.path.endswith(".py") for request in requests)
    assert ask("someone/code", trust_remote_code=True)[0][:3] == ["transformers", "someone/code", 20]


def test_hub_broken_then_offline(online, tmp_path):
    server, client, shelf = online
    assert client.describe("someone/tiny")[2] == TINY_PARAMETERS
    server.broken = True
    try:
        kind, message = client.describe("someone/other")
        assert kind == "OfflineError" and "500" in message and "\n" not in message
    finally:
        server.broken = False
    nobody = Client("http://127.0.0.1:9", tmp_path)  # the discard port: nothing answers
    kind, message = nobody.describe("someone/other")
    nobody.close()
    assert kind == "OfflineError" and "cannot be reached" in message
    offline = Client(server.url, shelf / "home", HF_HUB_OFFLINE="1")
    assert offline.describe("someone/tiny")[2] == TINY_PARAMETERS  # from the cache that the online client filled
    kind, message = offline.describe("someone/never")
    offline.close()
    assert kind == "OfflineError" and "HF_HUB_OFFLINE is set" in message


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-32b", "qwen3-0.6b", "mistral-7b"])
@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_headers_alone_count_what_the_classes_do(name, quantization):
    """As files have them, by name: the head comes first there, and must not be taken for the blocks."""
    spec = zoo.describe(name)
    tied = {own for names in spec.ties for own in names[1:]}
    stored = {own: tensor for own, (tensor, _) in spec.tensors.items() if tensor.persistent and own not in tied}
    config = zoo.catalog.config(zoo.catalog.find(name))
    alone = spec_from_tensors(name, dict(sorted(stored.items())), config)
    sizes = [each.bytes(each.precision("bfloat16", quantization)) for each in (spec, alone)]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)  # the classes have some buffers that no file has
    assert [layer.name for layer in alone.layers()][-1] == [layer.name for layer in spec.layers()][-1] or tied
