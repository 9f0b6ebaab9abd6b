"""GGUF files: what the header says is what is planned, and every lie of a header is one clear sentence."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest

import bigkit
from bigkit import zoo
from bigkit.machine.hardware import CONTEXT_BYTES, FRAGMENTATION, GPUS, HARDWARE
from bigkit.model.activations import working_bytes
from bigkit.model.gguf import TYPES, read_gguf
from bigkit.model.header import CheckpointError
from bigkit.model.precision import Precision
from bigkit.units import dtype_bits
from tests.model import gguf_files as files


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "tiny.gguf"
    size = files.write(path, *files.llama())
    return str(path), size


def test_sizes_of_types():
    """A table for planning and one for reading say the same."""
    for name, values, block in TYPES.values():
        if name.lower() not in ("bf16", "f64", "i8", "i16", "i32", "i64"):
            assert dtype_bits(name.lower()) * values == 8 * block, name


def test_a_model_is_known_by_its_header(model):
    path, size = model
    spec = bigkit.describe(path)
    assert (spec.bytes(), spec.library, spec.parameters) == (size, "gguf", 2 * 64 * 256 + 256 * 4 + 3 * 589_824)
    assert spec.bytes(spec.precision("float16")) == size == spec.bytes(spec.precision("float32", "nf4"))
    assert [(block.layer, block.per_token) for block in spec.attention] == [(f"blk.{i}", 2 * 2 * 64) for i in range(3)]
    assert spec.kv_bytes(100, dtype=spec.computes_in()) == 3 * 256 * 100 * 2
    assert spec.facts["vocab_size"] == 64 and spec.facts["hidden_size"] == 256
    [row] = bigkit.estimate_memory(path).inference
    assert (row.weights, row.kv_cache, row.stored) == (size, 3 * 256 * 2048 * 2, "as stored (mostly Q4_K)")
    assert "Q4_K" in str(bigkit.estimate_memory(path))


def test_a_plan_prints_the_command_of_llama_cpp(model, tmp_path):
    path, size = model
    plan = bigkit.plan(path, {0: "1GiB"}, context=512)
    assert plan.feasible and sum(share.weights for share in plan.shares) == size
    assert f"llama-server -m {path} --n-gpu-layers 99 -c 512" in plan.explain()
    two = bigkit.plan(path, {0: size * 2 // 3, 1: size * 2 // 3})
    assert "-ts 2,2" in two.explain() or "-ts 1,3" in two.explain()
    size = files.write(tmp_path / "long.gguf", *files.llama(12))
    small = bigkit.plan(tmp_path / "long.gguf", {0: size * 3 // 4, "cpu": "1GiB"}, "sequential", kv_dtype="int8")
    away = [layer.name[4:] for layer in small.layers if layer.device == "cpu" and layer.name.startswith("blk.")]
    flags = rf'--n-gpu-layers 99 -ot "blk\.({"|".join(away)})\.=CPU" -ctk q8_0 -ctv q8_0'
    assert 0 < len(away) < 12 and flags in small.explain()
    alone = bigkit.plan(path, {"cpu": "1GiB"}).explain()
    assert "--n-gpu-layers 0" in alone
    assert bigkit.advise(path, "RTX 4090").best.plan.quantization is None


def test_what_llama_cpp_takes_beside_the_weights(model):
    """Llama 3 8B with micro batches of 512: "CUDA0 compute buffer size = 258.50 MiB", whatever the context."""
    spec = bigkit.describe(model[0])
    spec = replace(spec, facts={**spec.facts, "hidden_size": 4096, "vocab_size": 128256})
    assert (
        working_bytes(spec, Precision("bfloat16"), 1, 512)
        == working_bytes(spec, Precision("bfloat16"), 1, 99_000)
        == 258.5 * 2**20
    )


def test_advice_for_a_file_is_about_that_file(tmp_path):
    """Stored as it is; no Python, and what rests in RAM is read there by the CPU while the GPU waits."""
    size = files.write(tmp_path / "long.gguf", *files.llama(12))
    best = bigkit.advise(tmp_path / "long.gguf", "RTX 4090").best
    assert best.label == "q4_k as stored" and {*best.waits} == {"GPU", "RAM", "disk"} and best.waits["RAM"] == 0
    memory = int((CONTEXT_BYTES + size * 3 // 4) / (1 - FRAGMENTATION))
    small = replace(HARDWARE["1 x RTX 4090"], gpus=(replace(GPUS["RTX 4090"], memory=memory),))
    away = bigkit.advise(tmp_path / "long.gguf", small, context=16).best
    in_ram = sum(share.weights for share in away.plan.shares if share.device == "cpu")
    assert away.waits["RAM"] == pytest.approx(in_ram / small.ram_rate) and away.token == sum(away.waits.values())


def test_experts_are_placed_apart(tmp_path):
    path = tmp_path / "moe.gguf"
    size = files.write(path, *files.llama(experts=8))
    spec = bigkit.describe(path)
    assert spec.bytes() == size
    from bigkit.model.experts import active_bytes, experts_of

    assert [(one.name, one.count, one.per_token) for one in experts_of(spec)] == [
        (f"blk.{i}.experts", 8, 2) for i in range(3)
    ]
    assert active_bytes(spec) < size / 2
    plan = bigkit.plan(str(path), {0: "64MiB", "cpu": "1GiB"}, experts_on_cpu=2)
    assert "--n-gpu-layers 99 --n-cpu-moe 2" in plan.explain()


def test_windows_latents_and_states(tmp_path):
    keys, tensors = files.llama(**{"llama.attention.sliding_window": 32})
    keys["llama.attention.sliding_window_pattern"] = [True, True, False]
    files.write(tmp_path / "window.gguf", keys, tensors)
    assert [block.window for block in bigkit.describe(tmp_path / "window.gguf").attention] == [32, 32, None]
    keys |= {"llama.attention.kv_lora_rank": 64, "llama.rope.dimension_count": 16}
    files.write(tmp_path / "mla.gguf", keys, tensors)
    assert bigkit.describe(tmp_path / "mla.gguf").attention[0].per_token == 80
    sizes = {"inner_size": 512, "state_size": 16, "conv_kernel": 4, "group_count": 1}
    sizes = {f"llama.ssm.{name}": size for name, size in sizes.items()}
    keys, tensors = files.llama(**{"llama.attention.head_count_kv": [0, 2, 0], **sizes})
    tensors["blk.0.ssm_in.weight"] = ("F16", (512, 256))
    files.write(tmp_path / "hybrid.gguf", keys, tensors)
    blocks = bigkit.describe(tmp_path / "hybrid.gguf").attention
    assert [(block.layer, block.per_token) for block in blocks] == [("blk.0", 0), ("blk.1", 256)]
    assert blocks[0].float32 == 512 * 16 + 3 * (512 + 2 * 16)


def test_split_files(tmp_path):
    keys, tensors = files.llama()
    names, size = list(tensors), 0
    for i in range(2):
        part = {name: tensors[name] for name in names[i::2]}
        own = {**(keys if i == 0 else {}), "split.no": i, "split.count": 2, "split.tensors.count": len(tensors)}
        size += files.write(tmp_path / f"m-0000{i + 1}-of-00002.gguf", own, part)
    for i in (1, 2):
        assert bigkit.describe(tmp_path / f"m-0000{i}-of-00002.gguf").bytes() == size
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(zoo.UnknownModel, match="m-00002-of-00002.gguf' are not beside it"):
        bigkit.describe(tmp_path / "m-00001-of-00002.gguf")


def test_running_is_refused_with_a_word_of_what_does(model):
    from bigkit import load_checkpoint_in_model

    path, _ = model
    with pytest.raises(zoo.NoConfig, match="llama.cpp runs"):
        zoo.empty_model(path)
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="llama.cpp runs"):
        load_checkpoint_in_model(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("lies", "words"),
    [
        ({"magic": b"GGML"}, "begins with b'GGML'"),
        ({"version": 1}, "version 1, expected 2 or 3"),
        ({"version": 3 << 24}, "the other order of bytes"),
        ({"tensors": 2**60}, "number of tensors is"),
        ({"keys": 2**60}, "number of keys is"),
        ({"keys": 999}, "(would take|the length of)"),
        ({"tensors": 999}, "(would take|the length of|twice)"),
        ({"type": 77}, "has the type 77"),
        ({"offset": 0}, "lies in the tensor"),
        ({"offset": 16}, "no multiple of 32"),
        ({"offset": 2**40}, "ends at byte"),
        ({"length": 100}, "are left"),
        ({"length": 3}, "begins with"),
        ({"length": 0}, "begins with b''"),
        ({"length": 3000}, "ends at byte"),
    ],
)
def test_every_lie_is_one_sentence(tmp_path, lies, words):
    path = tmp_path / "lie.gguf"
    files.write(path, *files.llama(), lies)
    with pytest.raises(CheckpointError, match=words) as error:
        read_gguf(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(zoo.NoConfig):
        bigkit.describe(path)


def test_damaged_headers_never_crash_or_hang(tmp_path):
    path = tmp_path / "broken.gguf"
    files.write(path, *files.llama())
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(2500)] = chance.choice((0, 1, 255, chance.randrange(256)))
        path.write_bytes(data)
        try:
            bigkit.describe(path).bytes()
        except zoo.ZooError as error:
            assert "\n" not in str(error)


def test_reading_needs_no_torch(model):
    code = f"import bigkit, sys; bigkit.plan({model[0]!r}, {{0: '1GiB'}}); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
