"""Fake GPUs: what is noted of a run, against PyTorch's own counters and real runs on the CPU."""

import math
import subprocess
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigkit import dry_run, zoo
from bigkit.dryrun.fake_gpu import Target, choose_kernel, fake_gpus
from bigkit.dryrun.workload import Workload, fill, passes
from bigkit.machine.allocator import replay
from bigkit.zoo import build, catalog

NO_WORKSPACE = Target(workspace=0)
A100 = Target((8, 0), ("flash", "efficient"))


def tiny(name, **sizes):
    """A shipped model's architecture, small enough for a CPU."""
    return build.build({**catalog.config(catalog.find(name)), **sizes}, dtype="float32").eval()


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
TINY = {
    "llama-3.1-8b": LLAMA,
    "gemma-2-9b": {**LLAMA, "head_dim": 16, "sliding_window": 16},
    "mistral-7b": {**LLAMA, "sliding_window": 16},
    "qwen3-0.6b": {**LLAMA, "head_dim": 16},
    "mixtral-8x7b": {**LLAMA, "num_local_experts": 4},
    "deepseek-v3": {
        **LLAMA,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1},
    "bloom": {"n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 128},
    "opt-1.3b": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "word_embed_proj_dim": 64,
    },
    "t5-large": {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 128},
    "bert-base-cased": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 128,
    },
    "vit-base-patch16-224": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 32,
    },
    "resnet50.a1_in1k": {},
    "pygpt": {},
}


def rehearse(model, load, target=Target(), places=None):
    with fake_gpus(target) as notes:
        notes.kind = "weights"
        fill(model, places or {"": 0})
        notes.kind = "activations"
        notes.trace.mark("filled")
        for phase, _ in passes(model, load, "cuda:0"):
            notes.trace.mark(phase)
    return notes.trace


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_rehearsed(name):
    model = tiny(name, **TINY[name])
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trace = rehearse(model, Workload(2, 24, 2))
    recording = trace.recordings["cuda:0"]
    told = replay(recording.events)
    filled = dict(recording.marks[:1])["filled"]
    assert size <= told.allocated[filled - 1] <= size + 512 * filled + 2**20
    assert told.peak_allocated > told.allocated[filled - 1]
    assert [name for name, _ in recording.marks[1:]] in (["prefill"], ["prefill", "decode", "decode"])
    assert any(operation.flops for operation in trace.operations)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2", "opt-1.3b", "bert-base-cased"])
def test_products_are_counted_as_pytorch_counts_them(name):
    """FLOP of the same run on the CPU, attention left out: its kernels differ."""
    load = Workload(2, 24, 0, all_logits=True)
    sizes = {**TINY[name], **({"num_key_value_heads": 4} if name == "llama-3.1-8b" else {})}
    trace = rehearse(tiny(name, **sizes), load)
    counter = FlopCounterMode(display=False)
    model = fill(tiny(name, **sizes), {"": "cpu"})
    with counter:
        list(passes(model, load, "cpu"))
    products = ("mm", "addmm", "bmm", "baddbmm")
    mine = sum(operation.flops for operation in trace.operations if operation.name in products)
    real = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in products)
    assert mine == real > 0


def test_what_lives_is_what_python_holds():
    with fake_gpus(NO_WORKSPACE) as notes:
        a = torch.zeros(1000, device="cuda:0")
        b = a + 1
        view = b[10:]
        del b
        c = view.to("cuda:1")
        events = notes.trace.recordings["cuda:0"].events
        assert events == [4000, 4000], "a view keeps its storage"
        del view
        assert events == [4000, 4000, -2]
        assert notes.trace.recordings["cuda:1"].events == [990 * 4]
        a.add_(1)
        assert len(events) == 3, "in place"
    assert c.device == torch.device("cuda:1") and a.shape == (1000,)


def test_parts_on_several_devices():
    model = build.build(catalog.config(catalog.find("pygpt")), dtype="float32").eval()
    places = {"": 0, "transformer.ln_f": 1, "lm_head": 1}
    with fake_gpus() as notes:
        fill(model, places)
        with pytest.raises(RuntimeError, match="cuda:0|device"):  # as a real run without hooks would fail
            list(passes(model, Workload(1, 8), "cuda:0"))
    assert set(notes.trace.recordings) == {"cuda:0", "cuda:1"}


def qkv(heads=8, kv_heads=8, tokens=64, past=0, width=64, dtype=torch.float16, wide=None):
    q = torch.empty(2, heads, tokens, width, dtype=dtype, device="meta")
    k = torch.empty(2, kv_heads, past + tokens, width, dtype=dtype, device="meta")
    return q, k, torch.empty(2, kv_heads, past + tokens, wide or width, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("tensors", "mask", "causal", "gqa", "target", "kernel"),
    [
        (qkv(), None, True, False, A100, "flash"),
        (qkv(kv_heads=2), None, True, True, A100, "flash"),
        (qkv(kv_heads=2), None, True, False, A100, "math"),
        (qkv(), torch.empty(2, 1, 64, 64), False, False, A100, "efficient"),
        (qkv(), torch.empty(2, 1, 64, 64).transpose(2, 3), False, False, A100, "math"),  # T5's bias lies so
        (qkv(kv_heads=2), torch.empty(2, 1, 64, 64), False, True, A100, "math"),
        (qkv(dtype=torch.float32), None, True, False, A100, "efficient"),
        (qkv(width=192, wide=128), None, True, False, A100, "efficient"),  # MLA
        (qkv(width=512), None, True, False, A100, "efficient"),
        (qkv(width=60), None, True, False, A100, "flash"),  # padded to 64
        (qkv(width=60), torch.empty(1), False, False, A100, "math"),
        (qkv(past=8), None, True, False, A100, "efficient"),  # flash aligns the causal mask otherwise
        (qkv(), None, True, False, Target(), "cudnn"),  # and the rest as on an H200
        (qkv(kv_heads=2, width=256), None, True, True, Target(), "cudnn"),
        (qkv(width=192, wide=128), None, True, False, Target(), "cudnn"),
        (qkv(), torch.empty(2, 1, 64, 64, dtype=torch.bool), False, False, Target(), "cudnn"),
        (qkv(dtype=torch.float32), None, True, False, Target(), "efficient"),
        (qkv(dtype=torch.float16), None, True, False, Target(capability=(7, 5)), "efficient"),
        (qkv(dtype=torch.bfloat16), None, True, False, Target(capability=(7, 5)), "math"),
        (qkv(), None, True, False, Target(attention=()), "math"),
        (qkv(), None, True, False, Target(attention=("cudnn", "flash")), "cudnn"),
    ],
)
def test_the_kernel_of_attention(tensors, mask, causal, gqa, target, kernel):
    assert choose_kernel(target, *tensors, mask, causal, gqa) == kernel


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "math"])
def test_attention_stores_no_scores_unless_it_is_math(kernel):
    target = Target(attention=() if kernel == "math" else (kernel,), workspace=0)
    with fake_gpus(target) as notes:
        q, k, v = (torch.empty(1, 8, 4096, 64, dtype=torch.float16, device="cuda:0") for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert out.shape == q.shape
        kept = notes.trace.recordings["cuda:0"].events
        assert kernel != "cudnn" or kept[-5:] == [out.numel() * 2, 8, 8, -5, -6], "no log-sum-exp; seed and offset go"
    peak = replay(kept).peak_allocated
    scores = 8 * 4096**2 * 2
    assert peak > scores if kernel == "math" else peak < 5 * q.numel() * 2


def test_math_on_fake_tensors_gives_what_pytorch_gives_on_real_ones():
    """The same operations, with numbers: causal, masked and grouped."""
    from bigkit.dryrun.fake_gpu import _math

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask[0, 0, 2] = False  # a row that sees nothing
    for options in (
        {"is_causal": True, "enable_gqa": True},
        {"attn_mask": mask, "enable_gqa": True},
        {"attn_mask": torch.randn(6, 6), "enable_gqa": True, "scale": 0.3},
    ):
        for dtype in (torch.float32, torch.bfloat16):
            a, b, c = (tensor.to(dtype) for tensor in (q, k, v))
            if "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
                options = {**options, "attn_mask": options["attn_mask"].to(dtype)}
            with sdpa_kernel(SDPBackend.MATH):
                real = F.scaled_dot_product_attention(a, b, c, **options)
            mine = _math(a, b, c, options.get("attn_mask"), options.get("is_causal", False), options.get("scale"), True)
            torch.testing.assert_close(mine, real)


def test_convolutions_of_16_bits_are_laid_out_anew():
    with fake_gpus(NO_WORKSPACE) as notes:
        image, weight = (
            torch.empty(*s, dtype=torch.float16, device="cuda:0") for s in ((8, 64, 56, 56), (64, 64, 3, 3))
        )
        F.conv2d(image, weight, padding=1)
        F.conv2d(image, weight[:, :, :1, :1].contiguous())
    sizes = [event for event in notes.trace.recordings["cuda:0"].events if event > 0]
    assert sizes == [2 * 8 * 64 * 56**2, 2 * 64 * 64 * 9, 2 * 8 * 64 * 56**2, 6496272, 2 * 64 * 64, 2 * 8 * 64 * 56**2]


def requests_of(work):
    """What is asked for, and given back, after the tensors that the work begins with."""
    with fake_gpus(NO_WORKSPACE) as notes:
        run = work(lambda *shape: torch.empty(*shape, dtype=torch.float16, device="cuda:0"))
        events = notes.trace.recordings["cuda:0"].events
        begin = len(events)
        kept = run()
        assert kept is not None
        return events[begin:]


def test_images_with_the_channels_last_need_the_filter_laid_out_alone():
    def work(new):
        image, weight = new(8, 64, 56, 56).to(memory_format=torch.channels_last), new(128, 64, 2, 2)
        return lambda: F.conv2d(image, weight, stride=2)

    assert requests_of(work) == [2 * 8 * 128 * 28**2, 2 * 128 * 64 * 4, -5]


def test_a_convolution_of_few_inputs_is_done_as_it_lies():
    def work(new):
        image, weight = new(8, 3, 224, 224), new(128, 3, 4, 4)
        return lambda: F.conv2d(image, weight, stride=4)

    assert requests_of(work) == [2 * 8 * 128 * 56**2]


def test_a_layer_norm_copies_what_does_not_lie_in_one_piece_before_it_asks_for_more():
    def work(new):
        x, weight = new(8, 64, 100).transpose(1, 2), new(64)
        return lambda: F.layer_norm(x, (64,), weight, weight)

    size = 2 * 8 * 100 * 64
    copy, out, mean, deviation, *frees = requests_of(work)
    assert [copy, out, mean, deviation] == [size, size, 8 * 100 * 4, 8 * 100 * 4] and frees[0] == -3


def test_a_mask_is_padded_for_the_efficient_kernel():
    with fake_gpus(A100) as notes:
        q = torch.empty(1, 4, 10, 64, dtype=torch.float16, device="cuda:0")
        mask = torch.ones(1, 1, 10, 10, dtype=torch.bool, device="cuda:0")
        assert F.scaled_dot_product_attention(q, q, q, mask).shape == q.shape
    assert 10 * 16 * 2 in notes.trace.recordings["cuda:0"].events
    assert "_scaled_dot_product_efficient_attention, masked" in [operation.name for operation in notes.trace.operations]


def test_reading_an_expanded_tensor_costs_what_is_there():
    with fake_gpus(NO_WORKSPACE) as notes:
        row = torch.empty(1, 1000, device="cuda:0")
        wide = row.expand(50, 1000) + 0
        table = torch.empty(10**6, 8, device="cuda:0")
        F.embedding(torch.zeros(5, dtype=torch.long, device="cuda:0"), table)
    added, looked_up = (o for o in notes.trace.operations if o.name in ("add", "embedding"))
    assert added.bytes == 4000 + wide.numel() * 4
    assert looked_up.bytes == 2 * 5 * 8 * 4


def last_of(work):
    with fake_gpus(NO_WORKSPACE) as notes:
        work(lambda *shape: torch.empty(*shape, device="cuda:0"))
        return notes.trace.operations[-1]


@pytest.mark.parametrize(
    "work, one_by_one",
    [
        (lambda new: new(8, 16) + new(8, 16), 0),
        (lambda new: new(8, 16) * 2, 0),
        (lambda new: new(8, 16).t() * new(8, 16).t(), 0),  # the same order in all, whatever it is
        (lambda new: new(8, 16) * new(16), 128),
        (lambda new: new(16, 8).t() * new(8, 16), 128),
        (lambda new: new(8, 32)[:, :16].neg(), 128),
        (lambda new: new(8, 16).copy_(new(16, 8).t()), 128),
        (lambda new: torch.cat((new(8, 16), new(8, 16))), 0),
        (lambda new: torch.cat((new(8, 32)[:, :16], new(8, 16)), 1), 256),
        (lambda new: new(8, 16).sum(0), 0),
    ],
)
def test_elements_in_one_order_are_taken_several_at_once(work, one_by_one):
    assert last_of(work).scattered == one_by_one


def test_a_stride_wastes_the_rest_of_each_sector():
    plain = last_of(lambda new: new(1, 64, 64) * new(4, 64, 64))
    heads = last_of(lambda new: new(4, 64, 64) + new(64, 64, 4).permute(2, 0, 1))
    assert plain.bytes == 4 * 64 * 64 * (1 + 4 + 4)
    assert heads.bytes == 4 * 64 * 64 * (4 + 4) + 4 * 64 * 64 * 16, "16 bytes a step for 4 that are needed"


def strides_of_one_token(device):
    """Strides on the way of a token through a block, in a batch of eight."""
    x, weight = torch.zeros(8, 1, 64, device=device), torch.zeros(32, 64, device=device)
    y = F.linear(x, weight)
    heads = y.view(8, 1, 4, 8).transpose(1, 2)
    keys = torch.zeros(8, 4, 5, 8, device=device)
    grouped = heads[:, :, None].expand(8, 4, 2, 1, 8)
    flat = torch.empty_strided((8, 4, 1, 8), (32, 8, 8, 1), device=device).transpose(1, 2).reshape(8, 1, -1)
    tensors = {
        "product": y, "heads": heads, "flat": flat, "flattened": heads.transpose(1, 2).flatten(2),
        "reshaped": heads.permute(0, 2, 1, 3).reshape(8, 1, 32), "joined": torch.cat((keys, heads), 2),
        "part": y.split([16, 16], -1)[1].view(8, 1, 2, -1).transpose(1, 2), "grouped": grouped.reshape(8, 8, 1, 8),
        "scores": torch.matmul(heads, keys.transpose(2, 3)), "batched": heads.reshape(32, 1, 8).view(8, 4, 1, 8),
        "turned": heads * keys[:1, :1, :1], "cast": heads.double(), "last": x[:, -1:], "squeezed": x.squeeze(1),
        "rows": x[:1].view(-1, 64),
    }  # fmt: skip
    return {name: tensor.stride() for name, tensor in tensors.items()}


def test_single_tokens_lie_in_memory_as_real_ones_do():
    with fake_gpus():
        fake = strides_of_one_token("cuda:0")
    assert fake == strides_of_one_token("cpu")


def test_single_tokens_of_a_batch_are_multiplied_as_one_matrix():
    with fake_gpus() as notes:
        heads = torch.empty_strided((8, 4, 1, 8), (32, 8, 8, 1), device="cuda:0")
        F.linear(heads.transpose(1, 2).contiguous().reshape(8, 1, -1), torch.empty(16, 32, device="cuda:0"))
    assert [operation.name for operation in notes.trace.operations] == ["mm"]


@pytest.mark.parametrize(
    "dtype, rows, width, name",
    [
        (torch.bfloat16, 129, 64, "mm, odd rows"), (torch.float16, 128, 63, "mm, odd rows"),
        (torch.bfloat16, 128, 64, "mm"), (torch.float32, 129, 63, "mm"),
    ],
)  # fmt: skip
def test_products_with_odd_rows_are_told_apart(dtype, rows, width, name):
    with fake_gpus() as notes:
        F.linear(
            torch.empty(7, width, dtype=dtype, device="cuda"), torch.empty(rows, width, dtype=dtype, device="cuda")
        )
    assert notes.trace.operations[-1].name == name


def test_a_batch_reads_a_large_matrix_again_and_again():
    def work(new):
        return torch.bmm(new(8, 1, 4096), new(4096, 4096).expand(8, 4096, 4096))

    assert last_of(work).bytes == 8 * (4096 + 4096**2 + 4096) * 4
    small = last_of(lambda new: torch.bmm(new(8, 1, 64), new(64, 64).expand(8, 64, 64)))
    assert small.bytes == 4 * (8 * 64 + 64**2 + 8 * 64), "which the cache holds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_experts_in_every_dtype(dtype):
    with fake_gpus(NO_WORKSPACE) as notes:
        rows = torch.empty(32, 64, dtype=dtype, device="cuda:0")
        experts = torch.empty(4, 128, 64, dtype=dtype, device="cuda:0").transpose(1, 2)
        ends = torch.empty(4, dtype=torch.int32, device="cuda:0")
        out = torch._grouped_mm(rows, experts, offs=ends)
    assert out.dtype == dtype and out.shape == (32, 128) and out.device.type == "cuda"
    product = notes.trace.operations[-1]
    assert product.name == "_grouped_mm" and product.flops == 2 * 32 * 64 * 128 and product.parts == 4
    assert sum(event > 0 for event in notes.trace.recordings["cuda:0"].events) == 4, "no casts are noted"


@pytest.mark.parametrize("rows", [1, 9, 64])
def test_rows_meet_as_many_experts_as_chance_gives_them(rows):
    with fake_gpus(NO_WORKSPACE) as notes:
        inputs = torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda:0")
        experts = torch.empty(16, 128, 64, dtype=torch.bfloat16, device="cuda:0").transpose(1, 2)
        torch._grouped_mm(inputs, experts, offs=torch.empty(16, dtype=torch.int32, device="cuda:0"))
    chosen = torch.randint(16, (20000, rows), generator=torch.Generator().manual_seed(0))
    met = sum(len(row.unique()) for row in chosen) / len(chosen)
    assert notes.trace.operations[-1].name == "_grouped_mm"
    read = notes.trace.operations[-1].bytes - 2 * rows * (64 + 128)
    assert read / (2 * 64 * 128) == pytest.approx(met, rel=0.01)


@contextmanager
def a_machine_with_a_gpu():
    """As far as PyTorch can tell; who touches that GPU is told off."""
    touched = mock.Mock(side_effect=AssertionError("the real GPU was touched"))
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(torch.cuda, "is_available", lambda: True))
        enter(mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")))
        enter(mock.patch.object(torch.cuda, "_lazy_init", touched))
        yield
    assert not touched.called


@pytest.mark.parametrize("machine", [nullcontext, a_machine_with_a_gpu])
def test_constants_are_born_on_their_own_gpu(machine):
    with machine(), fake_gpus():
        assert torch.tensor([1.0], device="cuda:3").device == torch.device("cuda:3")
        assert torch.ones(2, device="cuda").device == torch.device("cuda:0")


@pytest.mark.parametrize(
    "name, quantization, rests",
    [("llama-3.1-8b", None, 0), ("mixtral-8x7b", None, 0), ("llama-3.1-8b", None, "cpu"), ("gpt2", "nf4-double", 0)],
)
def test_a_real_gpu_is_left_alone_and_changes_nothing(name, quantization, rests):
    def run():
        build = (lambda: tiny(name, **TINY[name])) if quantization is None else name
        return dry_run(build, {"": rests}, 2, 24, 2, "H200", dtype="bfloat16", quantization=quantization)

    if quantization:
        pytest.importorskip("bitsandbytes")
    without = run()
    with a_machine_with_a_gpu():
        beside = run()
    assert beside.recordings == without.recordings
    assert list(beside.operations) == list(without.operations) and beside.seconds == without.seconds


def test_nothing_is_left_behind():
    """Neither in PyTorch nor in `torch.cuda`; and nothing real was allocated."""
    before = torch.cuda.get_device_capability
    with pytest.raises(ZeroDivisionError):
        with fake_gpus():
            1 / 0  # noqa: B018
    assert torch.cuda.get_device_capability is before
    assert torch.ones(2).sum() == 2 and type(torch.ones(1)) is torch.Tensor


def test_a_build_without_cuda_is_lent_a_guard():
    """The guard that a CPU build lacks is taken away in a process of its own, and the run must work all the same."""
    code = """
import torch
from bigkit import fake
try:
    registry = fake._guards()
except RuntimeError as error:
    print("skip", error); raise SystemExit
torch.version.cuda = registry[1] = None
with fake.fake_gpus() as notes:
    a = torch.ones(4, device="cuda:2")
    a.copy_(a); a[:2] = 1; a.uniform_()
    b = a.to("cuda:1") + 1
print(sorted(notes.trace.recordings), registry[1])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    if out.startswith("skip"):
        pytest.skip(out)
    assert out.strip() == "['cuda:1', 'cuda:2'] None"


def test_sizes_are_bounded_by_arithmetic():
    """A Llama block in bfloat16 with fused attention works in 3 * intermediate + 4 * hidden elements for each token."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = build.build(
        {**catalog.config(catalog.find("llama-2-7b")), **sizes, "num_hidden_layers": 2, "vocab_size": 512},
        dtype="bfloat16",
    ).eval()
    load = Workload(2, 1024, 0)
    recording = rehearse(model, load, NO_WORKSPACE).recordings["cuda:0"]
    told = replay(recording.events)
    weights = told.allocated[dict(recording.marks)["filled"] - 1]
    cache = 2 * 2 * 2 * 1024 * 1024 * 2
    formula = 2 * 1024 * (3 * 3072 + 4 * 1024) * 2
    assert math.isclose(told.peak_allocated - weights - cache, formula, rel_tol=0.1)


def test_zoo_names_are_known():
    assert set(TINY) <= set(zoo.names())


def test_steps_of_the_host_are_modules_operations_and_launches():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x.view(4, 2)) + 1

    with fake_gpus() as notes:
        x = torch.ones(8, device="cuda:0")
        model = Twice()
        model(x)
        torch.neg(x)
    first, second = notes.trace.operations[-2:]
    assert (first.name, first.issued) == ("add", 5)  # two modules, a view, the sum, its launch
    assert (second.name, second.issued) == ("neg", 2)
    assert not nn.modules.module._global_forward_pre_hooks
