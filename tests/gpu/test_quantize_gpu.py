"""Quantized models on a real GPU: the CUDA kernels, weights that travel in their own bytes, and little memory."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigkit import (
    init_empty_weights,
    load_and_quantize_model,
    remove_hook_from_module,
    save_model,
)
from bigkit.checkpoints.format import Checkpoint
from bigkit.model.precision import quantized_bytes
from bigkit.quantize.bnb import is_quantized, nbytes, put_together, take_apart
from bigkit.zoo.gpt import GPT, PYGPT, GPTConfig, encode, heldout_text, load_pygpt, perplexity
from tests.quantize import helpers
from tests.quantize.helpers import states_equal

bnb = pytest.importorskip("bitsandbytes")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

KINDS = ("int8", "nf4", "nf4-double", "fp4")
every_kind = pytest.mark.parametrize("kind", KINDS)
BLOCKS = [f"transformer.h.{i}" for i in range(10)]
REST = dict.fromkeys(["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"], 0)


def config(kind, **options):
    return helpers.config(kind, **{"bnb_4bit_compute_dtype": "bf16", "torch_dtype": "bf16", **options})


def empty():
    with init_empty_weights():
        return GPT(GPTConfig("pygpt"))


def resident(kind, folder=PYGPT):
    return load_and_quantize_model(empty(), config(kind), folder, {"": 0})


def tokens(count=64):
    return torch.tensor([encode(heldout_text())[:count]], device="cuda")


def run(model, count=64):
    with torch.no_grad():
        return model(tokens(count))[0]


@every_kind
def test_weights_are_those_of_bitsandbytes_on_the_gpu(kind):
    model = resident(kind)
    full = load_pygpt().transformer["h"][4].mlp.c_fc
    if kind == "int8":
        theirs = bnb.nn.Linear8bitLt(256, 1024, has_fp16_weights=False, threshold=6.0)
    else:
        options = helpers.KINDS[kind]
        theirs = bnb.nn.Linear4bit(
            256, 1024, compute_dtype=torch.bfloat16, quant_type=options.get("bnb_4bit_quant_type", "fp4"),
            compress_statistics=options.get("bnb_4bit_use_double_quant", False),
        )  # fmt: skip
    theirs.load_state_dict(full.state_dict())
    theirs = theirs.to(torch.bfloat16).cuda().eval()
    ours = model.transformer["h"][4].mlp.c_fc
    assert not states_equal(ours, theirs) and ours.weight.is_cuda
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x), theirs(x))
        x[1, 7] = 40.0
        assert torch.equal(ours(x), theirs(x)), "with an outlier"


@every_kind
def test_perplexity_is_near_that_of_the_full_model(kind):
    text = heldout_text()[:4000]
    full = perplexity(load_pygpt("cuda"), text)
    assert perplexity(resident(kind), text) < full * {"int8": 1.005, "fp4": 1.04}.get(kind, 1.02)


@every_kind
def test_save_and_load_between_devices(kind, tmp_path):
    model = resident(kind)
    expected = run(model)
    save_model(model, tmp_path, "1MB")
    again = resident(kind, tmp_path)
    assert not states_equal(model, again) and torch.equal(run(again), expected)
    on_cpu = load_and_quantize_model(empty(), config(kind), tmp_path, {"": "cpu"})
    assert not states_equal(model, on_cpu)
    assert torch.equal(run(on_cpu.to("cuda")), expected)


@every_kind
@pytest.mark.parametrize("where", ["RAM", "disk", "mixed"])
@pytest.mark.parametrize("stored", ["full", "quantized"])
def test_offloaded_is_bit_equal_to_resident(kind, where, stored, tmp_path):
    model = resident(kind)
    expected = [run(model, count) for count in (1, 7, 64, 512)]
    folder = PYGPT
    if stored == "quantized":
        save_model(model, tmp_path / "quantized", "1MB")
        folder = tmp_path / "quantized"
    places = {"RAM": ["cpu"], "disk": ["disk"], "mixed": [0, "cpu", "disk"]}[where]
    device_map = {**REST, **{block: places[i % len(places)] for i, block in enumerate(BLOCKS)}}
    away = load_and_quantize_model(empty(), config(kind), folder, device_map, offload_folder=tmp_path / "offload")
    for _ in range(3):
        for count, result in zip((1, 7, 64, 512), expected):
            assert torch.equal(run(away, count), result)
    save_model(away, tmp_path / "again")
    assert not states_equal(resident(kind, tmp_path / "again"), model)
    remove_hook_from_module(away, recurse=True)
    assert not states_equal(away, model)


@every_kind
def test_long_generation_offloaded(kind):
    """Many tokens in a row, with weights that arrive while others work."""
    model = resident(kind)
    away = load_and_quantize_model(empty(), config(kind), PYGPT, {**REST, **dict.fromkeys(BLOCKS, "cpu")})
    prompt = tokens(16)
    assert torch.equal(away.generate(prompt, 60), model.generate(prompt, 60))


def test_put_together_over_gpu_memory():
    for kind in KINDS:
        layer = resident(kind).transformer["h"][0].attn.c_attn
        x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            expected = layer(x)
            slab = torch.empty(2**22, dtype=torch.uint8, device="cuda")
            parts, start = {}, 0
            for name, part in take_apart(layer.weight).items():
                parts[name] = slab[start : start + part.nbytes].view(part.dtype).view(part.shape).copy_(part)
                start += -(-part.nbytes // 512) * 512
            layer._parameters["weight"] = put_together(layer.weight, parts)
            assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)


@every_kind
def test_loading_takes_the_quantized_model_and_a_little(kind, tmp_path):
    """12 weights of 128 MiB (bfloat16): the GPU never holds two of them beside the quantized ones."""
    count, shape = 12, (8192, 8192)
    for i in range(count):
        save_file({f"{i}.weight": torch.randn(shape).bfloat16()}, tmp_path / f"part{i}.safetensors")
    save_file(
        {f"{count}.weight": torch.ones(1, 1).bfloat16(), f"{count}.bias": torch.ones(1)}, tmp_path / "last.safetensors"
    )
    files = {f"{i}.weight": f"part{i}.safetensors" for i in range(count)}
    files |= {f"{count}.weight": "last.safetensors", f"{count}.bias": "last.safetensors"}
    import json

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(8192, 8192, bias=False) for _ in range(count)], nn.Linear(1, 1))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load_and_quantize_model(model, config(kind), tmp_path, {"": 0})
    held = count * quantized_bytes(shape, kind, shape[0])
    assert sum(nbytes(p) for p in model.parameters() if is_quantized(p)) == held
    weight = 2 * shape[0] * shape[1]
    peak = torch.cuda.max_memory_allocated() - before
    # one weight that works, one that arrives, the chunks between them, and the float16 copy that int8 starts from
    assert peak < held + (4 if kind == "int8" else 3) * weight + 2**28
    assert Checkpoint.open(tmp_path).stored


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_trains_on_the_gpu(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = resident(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"])).cuda()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    adapted.train()
    data, losses = tokens(257), []
    for _ in range(20):
        loss = adapted(data[:, :-1], targets=data[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
