"""Chosen experts alone travel to a GPU: gathered by it, copied, from disk; tokens are those of the resident model."""

import copy

import pytest
import torch

import bigkit
from bigkit.checkpoints import codecs, decoded
from bigkit.checkpoints.codecs import find_stack_codec
from bigkit.checkpoints.decoded import DecodedStack
from bigkit.checkpoints.ring import Slab
from bigkit.offload import experts as experts_module
from bigkit.offload import gather, pieces
from bigkit.offload.experts import ExpertStreamer, expert_hits
from bigkit.offload.gather import GatherStreamer, seen_by_gpu
from bigkit.offload.rows import count_rows
from bigkit.quantize.bnb import quantized
from bigkit.quantize.stacks import quantized_stack

GPU = torch.device("cuda:0")


def mixture(dtype=torch.bfloat16):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=500, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).to(dtype).eval().requires_grad_(False)


def apart(model, place):
    return {"": 0, **{name: place for name, module in model.named_modules() if count_rows(module)}}


def streamer_of(model) -> ExpertStreamer:
    return model.model.layers[0].mlp.experts._hf_hook.streamer


def test_pinned_ram_is_seen_without_a_copy():
    slab = Slab(1 << 20, pin=True)
    slab.pin()
    slab.bytes.copy_(torch.arange(1 << 20, dtype=torch.int64).to(torch.uint8))
    view = seen_by_gpu(slab, GPU)
    rows = torch.tensor([3, 1], device=GPU)
    assert view.device == GPU and view.data_ptr() == slab.bytes.data_ptr()
    assert torch.equal(view.view(1024, 1024)[rows].cpu(), slab.bytes.view(1024, 1024)[[3, 1]])
    before = torch.cuda.memory_allocated()
    seen_by_gpu(slab, GPU)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_tokens(place, rows, tmp_path):
    model = mixture()
    ids = torch.randint(5, 500, (rows, 40), device=GPU)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = copy.deepcopy(model).to(GPU).generate(ids, **options)
    found = bigkit.dispatch_model(model, apart(model, place), offload_dir=tmp_path, ram_cache="1GB")
    streamer = streamer_of(found)
    assert isinstance(streamer, GatherStreamer)
    for _ in range(2):
        assert torch.equal(found.generate(ids, **options), expected)
    assert bool(streamer.windows) == (place == "cpu" and rows == 1)
    assert bool(streamer.cache.misses) == (place == "disk")


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_experts_that_stay_on_the_gpu(place, rows, tmp_path):
    model = mixture()
    ids = torch.randint(5, 500, (rows, 40), device=GPU)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = copy.deepcopy(model).to(GPU).generate(ids, **options)
    size = sum(p.nbytes for module in model.modules() if count_rows(module) for p in module.parameters())
    found = bigkit.dispatch_model(model, apart(model, place), offload_dir=tmp_path, expert_cache=size * 3 // 4)
    for _ in range(2):
        assert torch.equal(found.generate(ids, **options), expected)
    hits, misses = expert_hits(found)
    assert hits > misses > 0 and bool(streamer_of(found).tables) == (place == "cpu")


def test_a_first_token_finds_memory_and_kernels():
    """A dispatch has taken the rows; nothing is in them, and nothing is counted, before a token chooses."""
    model = mixture()
    model.set_experts_implementation("batched_mm")
    size = sum(p.nbytes for module in model.modules() if count_rows(module) for p in module.parameters())
    before = torch.cuda.memory_allocated()
    found = bigkit.dispatch_model(copy.deepcopy(model), apart(model, "cpu"), expert_cache=size // 2)
    streamer = streamer_of(found)
    assert torch.cuda.memory_allocated() - before > size // 3
    assert len(streamer.tables) == 6 and expert_hits(found) == (0, 0)
    slots = [kept.slot for kept in streamer.on_device.values()]
    model.to(GPU)
    for tokens in (1, 1, 2, 1):
        ids = torch.randint(5, 500, (1, tokens), device=GPU)
        assert torch.equal(found(ids).logits, model(ids).logits)
    assert [kept.slot for kept in streamer.on_device.values()] == slots and sum(expert_hits(found)) > 0


def test_the_gpus_own_account_is_that_of_the_host(monkeypatch):
    """The same tokens, with tables on the GPU and without: logits, hits and misses, by turns with prompts."""
    model = mixture()
    model.set_experts_implementation("batched_mm")
    size = sum(p.nbytes for module in model.modules() if count_rows(module) for p in module.parameters())
    found = bigkit.dispatch_model(copy.deepcopy(model), apart(model, "cpu"), expert_cache=size // 2)
    with monkeypatch.context() as patch:
        patch.setattr(gather, "kernels_for", lambda tensor: None)
        other = bigkit.dispatch_model(copy.deepcopy(model), apart(model, "cpu"), expert_cache=size // 2)
        other(torch.ones(1, 1, dtype=torch.long, device=GPU))
    found(torch.ones(1, 1, dtype=torch.long, device=GPU))
    model.to(GPU)
    with torch.no_grad():
        for tokens in (1, 1, 1, 2, 1, 1, 40, 1, 3, *[1] * 20):
            ids = torch.randint(5, 500, (1, tokens), device=GPU)
            expected = model(ids).logits
            assert torch.equal(found(ids).logits, expected) and torch.equal(other(ids).logits, expected)
    assert expert_hits(found) == expert_hits(other) and min(expert_hits(found)) > 0
    assert len(streamer_of(found).tables) == 6 and not streamer_of(other).tables


@pytest.mark.parametrize("share", [2, 3, 4])
def test_graphs_use_the_gpus_account(share):
    """Replays, prompts of few and of many tokens, and weights that change: tokens and hits are those without graphs."""
    model = mixture()
    size = sum(p.nbytes for module in model.modules() if count_rows(module) for p in module.parameters())
    whole = copy.deepcopy(model).to(GPU)
    plain, found = (
        bigkit.dispatch_model(copy.deepcopy(model), apart(model, "cpu"), expert_cache=size * share // 4) for _ in "ab"
    )
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    static = {"cache_implementation": "static", "disable_compile": True, **options}
    with bigkit.graph_decode(found) as decoder:
        for _ in range(4):
            for tokens in (1, 2, 40, 3):
                ids = torch.randint(5, 500, (1, tokens), device=GPU)
                expected = whole.generate(ids, **static)
                assert torch.equal(plain.generate(ids, **static), expected)
                assert torch.equal(found.generate(ids, **options), expected)
            with torch.no_grad():
                for one in (whole, plain, found):
                    one.model.layers[2].mlp.experts.down_proj.mul_(-1)
    assert decoder.replayed > 50 and min(expert_hits(found)) > 0
    assert expert_hits(found) == expert_hits(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_experts_in_four_bits_are_decoded_by_one_kernel(kind, dtype, monkeypatch):
    """Bit for bit what gathering and bitsandbytes give, out of the GPU's memory and out of pinned RAM."""
    pytest.importorskip("bitsandbytes")
    experts = torch.randn(9, 130, 192, dtype=torch.bfloat16, device=GPU)
    parts = {name: part.detach() for name, part in quantized_stack(experts, 9, kind, GPU).items()}
    codec = find_stack_codec("w", [f"w{suffix}" for suffix in parts])
    in_ram = {}
    for name, part in parts.items():
        slab = Slab(part.nbytes, pin=True)
        slab.pin()
        slab.bytes.copy_(part.flatten().view(torch.uint8))
        in_ram[name] = seen_by_gpu(slab, GPU).view(part.dtype).view(part.shape)
    chosen = torch.tensor([7, 0, 7, 3], device=GPU)
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "kernels_for", lambda tensor: None)
        expected = codec.decode({name: part[chosen] for name, part in parts.items()}, dtype)
    for own in (parts, in_ram):
        assert torch.equal(codec.chosen(own, chosen, dtype), expected)


def test_unpinned_ram(monkeypatch):
    monkeypatch.setattr(Slab, "pin", lambda self, filled=False: None)
    model = mixture()
    ids = torch.randint(5, 500, (1, 40), device=GPU)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = copy.deepcopy(model).to(GPU).generate(ids, **options)
    found = bigkit.dispatch_model(model, apart(model, "cpu"))
    assert torch.equal(found.generate(ids, **options), expected) and not streamer_of(found).windows


def test_nothing_is_left_behind():
    model = mixture()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    found = bigkit.dispatch_model(model, apart(model, "cpu"))
    with torch.no_grad():
        for tokens in (1, 64, 1):
            found(torch.ones(1, tokens, dtype=torch.long, device=GPU))
    bigkit.remove_hook_from_module(found, recurse=True)
    del found, model
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 40e6  # the workspace of cuBLAS


@pytest.mark.parametrize("cache", [0, "3MB"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4-double", "int8"])
def test_quantized_experts(quantization, cache):
    """Chosen experts travel packed; tokens are those of a model whose experts are what these decode to."""
    bnb = pytest.importorskip("bitsandbytes")
    kind, _, double = quantization.partition("-")
    own = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    model = mixture().to(GPU)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config = bigkit.BnbQuantizationConfig(
        **own, bnb_4bit_use_double_quant=bool(double), torch_dtype=torch.bfloat16, skip_modules=linear
    )
    found = bigkit.load_and_quantize_model(
        copy.deepcopy(model), config, device_map=apart(model, "cpu"), expert_cache=cache
    )
    for module in model.modules():
        if count_rows(module):
            for stack in ("gate_up_proj", "down_proj"):
                for row in getattr(module, stack).data:
                    weight = quantized(row.clone(), quantization)
                    if kind == "int8":
                        row.copy_(bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB))
                    else:
                        row.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state).view(row.shape))
    ids = torch.randint(5, 500, (1, 40), device=GPU)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(found.generate(ids, **options), model.generate(ids, **options))
    hits, misses = expert_hits(found)
    assert not streamer_of(found).held() and bool(misses) == bool(cache)


@pytest.mark.parametrize("format", ["fp8", "mxfp4", "nf4", "int8"])
def test_a_prompts_product_in_pieces(format, monkeypatch):
    """Bit for bit that of the whole weight, with the kernel for all experts, and with less memory."""
    grouped = pytest.importorskip("transformers.integrations.moe")._grouped_linear
    count, rows, columns = 16, 512, 1024
    torch.manual_seed(0)
    if format == "fp8":
        codes = torch.randn(count, rows, columns, device=GPU).to(torch.float8_e4m3fn)
        parts = {"": codes, "_scale_inv": torch.rand(count, rows // 128, columns // 128, device=GPU)}
    elif format == "mxfp4":
        codes = torch.randint(0, 256, (count, columns, rows // 32, 16), dtype=torch.uint8, device=GPU)
        scales = torch.randint(118, 122, (count, columns, rows // 32), dtype=torch.uint8, device=GPU)
        parts = {"_blocks": codes, "_scales": scales}
    else:
        pytest.importorskip("bitsandbytes")
        experts = torch.randn(count, rows, columns, dtype=torch.bfloat16, device=GPU)
        parts = {name: part.detach() for name, part in quantized_stack(experts, count, format, GPU).items()}
    codec = find_stack_codec("w", [f"w{suffix}" for suffix in parts])
    counts = torch.randint(0, 90, (count,), device=GPU)
    counts[[3, 8, 9]] = 0
    ends = counts.cumsum(0).to(torch.int32)
    for transposed in (False, True):
        x = torch.randn(int(counts.sum()), rows if transposed else columns, dtype=torch.bfloat16, device=GPU)
        stack = DecodedStack(parts, codec, torch.bfloat16, (rows, columns))
        expected = grouped(x, stack.all(), ends, is_transposed=transposed)
        for at_a_time in (1, 3):
            monkeypatch.setattr(decoded, "AT_A_TIME", at_a_time * rows * columns)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = grouped(x, stack, ends, is_transposed=transposed)
            assert torch.equal(found, expected)
            most = torch.cuda.max_memory_allocated() - before - found.nbytes
            assert most < (at_a_time + 1) * rows * columns * 20, "of whole stacks it would be at least 33 MB"


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_large_blocks_in_pieces(place, rows, tmp_path, monkeypatch):
    """No slot holds all experts of a block: a few copied in turn give the tokens of the resident model."""
    monkeypatch.setattr(experts_module, "WHOLE", 0)
    monkeypatch.setattr(experts_module, "SOME", 0)
    monkeypatch.setattr(pieces, "PIECE", 1 << 18)
    monkeypatch.setattr(decoded, "AT_A_TIME", 1 << 16)
    model = mixture()
    ids = torch.randint(5, 500, (rows, 40), device=GPU)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = copy.deepcopy(model).to(GPU).generate(ids, **options)
    found = bigkit.dispatch_model(model, apart(model, place), offload_dir=tmp_path, ram_cache="1GB")
    for _ in range(2):
        assert torch.equal(found.generate(ids, **options), expected)
    streamer = streamer_of(found)
    held = sum(slot.base.nbytes for slot in (*streamer.slots, *streamer.pieces.slots) if slot.base.is_cuda)
    assert streamer.pieces.slots and (place == "cpu" or held < streamer.units[0].nbytes)
