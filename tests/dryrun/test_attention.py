"""Which kernel attention takes on a GPU that is not there, and what the slow path computes."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigkit.dryrun.attention import Target, attend_by_hand, choose_kernel
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.machine.allocator import replay

A100 = Target((8, 0), ("flash", "efficient"))


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
            causal, scale = options.get("is_causal", False), options.get("scale")
            mine = attend_by_hand(a, b, c, options.get("attn_mask"), causal, scale, gqa=True)
            torch.testing.assert_close(mine, real)


def test_a_mask_is_padded_for_the_efficient_kernel():
    with fake_gpus(A100) as notes:
        q = torch.empty(1, 4, 10, 64, dtype=torch.float16, device="cuda:0")
        mask = torch.ones(1, 1, 10, 10, dtype=torch.bool, device="cuda:0")
        assert F.scaled_dot_product_attention(q, q, q, mask).shape == q.shape
    assert 10 * 16 * 2 in notes.trace.recordings["cuda:0"].events
    assert "_scaled_dot_product_efficient_attention" in [operation.name for operation in notes.trace.operations]
