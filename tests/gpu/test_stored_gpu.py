"""Weights as they are stored, decoded by kernels of a GPU: the same bits as by PyTorch's operations."""

import pytest
import torch

import bigkit
from bigkit.checkpoints import codecs
from bigkit.checkpoints.fits import CODES
from bigkit.checkpoints.ring import Slab
from bigkit.offload.gather import seen_by_gpu
from bigkit.offload.rows import count_rows
from tests.checkpoints import test_as_stored
from tests.checkpoints.test_as_stored import FORMATS, PROMPT, empty, write
from tests.checkpoints.test_kernels import same

GPU = torch.device("cuda:0")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def kernels():
    if codecs._kernels() is None:
        pytest.skip("Triton makes no kernels here")


def both(monkeypatch, work):
    found = work()
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "kernels_for", lambda tensor: None)
        return found, work()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_all_bytes_and_all_scales(dtype, monkeypatch):
    blocks = torch.arange(256, dtype=torch.uint8, device=GPU).repeat(256, 1).view(1, 256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8, device=GPU).view(1, 256, 1).expand(1, 256, 16).contiguous()
    parts = {"_blocks": blocks, "_scales": scales}
    found, expected = both(monkeypatch, lambda: codecs.decode_mxfp4(parts, dtype))
    assert same(found, expected)
    assert same(found.cpu(), codecs.decode_mxfp4({name: part.cpu() for name, part in parts.items()}, dtype))


@pytest.mark.parametrize("columns", [5760, 2880])
def test_mxfp4_out_of_pinned_ram(columns, monkeypatch):
    """gpt-oss' own sizes: the kernel reads chosen experts over the link, beside products on another stream."""
    torch.manual_seed(0)
    count, rows, side = 6, 2880, torch.cuda.Stream()
    parts, pinned = {}, {}
    for suffix, last, least, most in (("_blocks", (90, 16), 0, 256), ("_scales", (90,), 118, 121)):
        parts[suffix] = part = torch.randint(least, most, (count, columns, *last), dtype=torch.uint8)
        slab = Slab(part.nbytes, pin=True)
        slab.pin()
        slab.bytes[: part.nbytes].copy_(part.view(-1))
        pinned[suffix] = seen_by_gpu(slab, GPU)[: part.nbytes].view(part.shape)
    codec = codecs.find_stack_codec("w", ["w_blocks", "w_scales"])
    assert codec.reads_in_place(pinned)
    x = torch.randn(4, 1, rows, device=GPU, dtype=torch.bfloat16)
    for chosen in ([5, 0, 3, 1], [2, 4, 2, 0]):
        experts = torch.tensor(chosen, device=GPU)
        with monkeypatch.context() as patch:
            patch.setattr(codecs, "kernels_for", lambda tensor: None)
            expected = codec.chosen({suffix: part.to(GPU) for suffix, part in parts.items()}, experts, torch.bfloat16)
        product = torch.bmm(x, expected)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = codec.chosen(pinned, experts, torch.bfloat16)
        products = [torch.bmm(x, expected) for _ in range(8)]
        torch.cuda.current_stream().wait_stream(side)
        assert same(found, expected) and all(torch.equal(one, product) for one in products)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", CODES)
def test_all_bytes_and_extreme_scales(codes, dtype, monkeypatch):
    torch.manual_seed(0)
    extreme = [0.0, -0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 0.3, -2.7, 448, 3.4e38, float("inf"), float("nan")]
    scales = torch.cat([torch.tensor(extreme), torch.rand(500) * 2.0 ** torch.randint(-140, 127, (500,)).float()])
    weight = torch.arange(256, dtype=torch.uint8).repeat(512, 1).view(codes)
    parts = {"weight": weight.to(GPU), "weight_scale": scales[:, None].to(GPU)}
    found, expected = both(monkeypatch, lambda: codecs.decode_scaled(parts, dtype))
    assert same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["int4", "gptq", "awq"])
def test_numbers_in_int32(format, dtype, monkeypatch):
    torch.manual_seed(0)
    parts = FORMATS[format](200, 352)
    kinds = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    codec = codecs.find_codec((200, 352), kinds)
    parts = {name: part.to(GPU) for name, part in parts.items()}
    found, expected = both(monkeypatch, lambda: codec.decode(parts, dtype))
    assert found.is_contiguous() and same(found, expected)


@pytest.mark.parametrize("place", ["gpu", "cpu", "disk"])
@pytest.mark.parametrize("format", [*FORMATS, "mxfp4"])
def test_tokens_are_those_of_the_decoded_weights(format, place, tmp_path):
    plain = write(tmp_path, format).to(GPU)
    model = empty(plain)
    layers = {f"model.layers.{i}": place for i in range(plain.config.num_hidden_layers)}
    places = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0, **layers}
    if format == "mxfp4":
        places = {"": 0, **{name: place for name, module in model.named_modules() if count_rows(module)}}
    places = {"": 0} if place == "gpu" else places
    model = bigkit.load_checkpoint_and_dispatch(model, tmp_path, places, strict=True)
    ids = PROMPT.to(GPU)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    expected = plain.generate(ids, **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("format", ["fp8", "gptq", "mxfp4"])
def test_by_graphs(format, tmp_path):
    plain = write(tmp_path, format).to(GPU)
    model = empty(plain)
    places = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0, "model.layers": "cpu"}
    if format == "mxfp4":
        places = {"": 0, **{name: "cpu" for name, module in model.named_modules() if count_rows(module)}}
    model = bigkit.load_checkpoint_and_dispatch(model, tmp_path, places, strict=True)
    ids = PROMPT.to(GPU)
    expected = plain.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY)
    with bigkit.graph_decode(model) as decoder:
        assert torch.equal(model.generate(ids, **GREEDY), expected) and decoder.replayed


@pytest.mark.parametrize("prompt", [1, 33])
def test_at_the_size_of_gpt_oss(prompt, tmp_path, monkeypatch):
    """A block as wide as gpt-oss', experts in RAM: the decoded model's logits at each step, in Python and by graphs."""
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
             "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 4, "num_hidden_layers": 1}  # fmt: skip
    config = type(test_as_stored.OSS)(**{**test_as_stored.OSS.to_dict(), **sizes, "layer_types": None})
    monkeypatch.setattr(test_as_stored, "OSS", config)
    plain = write(tmp_path, "mxfp4").to(GPU)
    model = empty(plain)
    places = {"": 0, **{name: "cpu" for name, module in model.named_modules() if count_rows(module)}}
    model = bigkit.load_checkpoint_and_dispatch(model, tmp_path, places, strict=True)
    ids = torch.randint(5, 90, (1, prompt), generator=torch.Generator().manual_seed(1)).to(GPU)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(plain.generate(ids, **options).logits)
    for _ in range(2):
        assert torch.equal(torch.stack(model.generate(ids, **options).logits), expected)
    expected = torch.stack(plain.generate(ids, cache_implementation="static", disable_compile=True, **options).logits)
    with bigkit.graph_decode(model) as decoder:
        for _ in range(2):
            assert torch.equal(torch.stack(model.generate(ids, **options).logits), expected)
        assert decoder.replayed
