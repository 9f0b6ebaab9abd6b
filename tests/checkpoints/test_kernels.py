"""The kernels that decode, run by Triton's interpreter on a CPU: the numbers of PyTorch's operations, bit for bit.

The interpreter cuts off what bfloat16 cannot hold and drops its smallest numbers, where a GPU rounds; so bfloat16 is
tested on a GPU (`tests/gpu/test_stored_gpu.py`).
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bigkit.checkpoints import codecs
from bigkit.checkpoints.codecs import find_codec, find_stack_codec
from bigkit.checkpoints.fits import CODES
from tests.checkpoints.test_as_stored import awq, gptq, int4, int32

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (multiply|cast):RuntimeWarning")
DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernels, interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop("bigkit.checkpoints.kernels", None)
    module = importlib.import_module("bigkit.checkpoints.kernels")
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    yield module
    sys.modules.pop("bigkit.checkpoints.kernels", None)


def both(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What the kernels and what PyTorch's operations make of it."""
    expected = work()
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "kernels_for", lambda tensor: kernels)
        return work(), expected


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether all numbers are the same to the last bit, zeros with their sign; NaN is NaN."""
    whole = torch.int32 if found.dtype == torch.float32 else torch.int16
    numbers = ~expected.isnan()
    return torch.equal(found.isnan(), ~numbers) and torch.equal(
        found.view(whole)[numbers], expected.view(whole)[numbers]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_all_bytes_and_all_scales(kernels: Any, monkeypatch: Any, dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(1, 256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    parts = {"_blocks": blocks, "_scales": scales}
    found, expected = both(kernels, monkeypatch, lambda: codecs.decode_mxfp4(parts, dtype))
    assert found.shape == (1, 512, 256) and same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", CODES)
def test_all_bytes_and_extreme_scales(kernels: Any, monkeypatch: Any, codes: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    extreme = [0.0, -0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 0.3, -2.7, 448, 3.4e38, float("inf"), float("nan")]
    scales = torch.cat([torch.tensor(extreme), torch.rand(52) * 2.0 ** torch.randint(-140, 127, (52,)).float()])
    weight = torch.arange(256, dtype=torch.uint8).repeat(64, 1).view(codes)
    parts = {"weight": weight, "weight_scale": scales[:, None]}
    found, expected = both(kernels, monkeypatch, lambda: codecs.decode_scaled(parts, dtype))
    assert same(found, expected)


@pytest.mark.parametrize("shape", [(3, 40, 96), (2, 130, 64), (1, 7, 32), (2, 23, 1440)])
def test_chosen_experts(kernels: Any, monkeypatch: Any, shape: tuple[int, ...]) -> None:
    """Some twice, or none; sizes that are no multiples of what a program reads, two tiles across; a loop."""
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    monkeypatch.setattr(kernels, "READERS", 2)
    count, outputs, inputs = shape
    parts = {
        "_blocks": torch.randint(0, 256, (count, outputs, inputs // 32, 16), dtype=torch.uint8),
        "_scales": torch.randint(100, 140, (count, outputs, inputs // 32), dtype=torch.uint8),
    }
    rows, columns = -(-outputs // 128) * 128, 2 * inputs
    fp8 = {"": torch.randn(count, rows, columns).to(torch.float8_e4m3fn), "_scale_inv": torch.rand(count, 2, 4)}
    for stored in (parts, fp8):
        codec = find_stack_codec("w", [f"w{suffix}" for suffix in stored])
        assert codec is not None
        for experts in (torch.tensor([count - 1, 0, count - 1]), torch.tensor([], dtype=torch.long), slice(0, 2)):
            work = partial(codec.chosen, stored, experts, torch.float32)
            found, expected = both(kernels, monkeypatch, work)
            assert found.shape == expected.shape and same(found, expected)


@pytest.mark.parametrize(("shape", "scales"), [
    ((256, 384), (2, 3)), ((200, 300), (2, 3)), ((64, 100), (64, 1)), ((64, 100), (64,)), ((64, 100), ()),
    ((64, 100), (1, 1)), ((300, 256), (3, 2)), ((96, 128), (3, 4)), ((5, 1), (5, 1)),
])  # fmt: skip
def test_blocks_rows_and_one_scale(kernels: Any, monkeypatch: Any, shape: Any, scales: Any) -> None:
    parts = {"weight": torch.randn(shape).to(torch.float8_e4m3fn), "weight_scale": torch.rand(scales)}
    found, expected = both(kernels, monkeypatch, lambda: codecs.decode_scaled(parts, torch.float32))
    assert found.shape == shape and same(found, expected)


def zeros(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    rows, groups = parts["weight_scale"].shape
    return {**parts, "weight_zero_point": int32(rows // 8, groups)}


def ordered(parts: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Inputs that belong to groups in any order."""
    count = 96
    return {**parts, name: (torch.randperm(count) // 32).int()}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["int4", "int4-zeros", "int4-order", "gptq", "gptq-order", "gptq-plain", "awq"])
def test_numbers_in_int32(kernels: Any, monkeypatch: Any, kind: str, bits: int) -> None:
    torch.manual_seed(0)
    rows, columns = 40, 96
    parts = {"int4": int4, "gptq": gptq, "awq": awq}[kind.partition("-")[0]](rows, columns)
    if bits == 8:
        if kind == "awq":
            pytest.skip("AWQ has 4 bits")
        packed = "weight_packed" if "int4" in kind else "qweight"
        parts[packed] = int32(rows, columns // 4) if "int4" in kind else int32(columns // 4, rows)
        parts |= {"qzeros": int32(3, rows // 4)} if "qzeros" in parts else {}
    if kind == "int4-zeros":
        parts = zeros(parts) if bits == 4 else {**parts, "weight_zero_point": int32(rows // 4, 3)}
    if kind.endswith("order"):
        parts = ordered(parts, "weight_g_idx" if kind == "int4-order" else "g_idx")
    if kind == "gptq-plain":
        del parts["g_idx"]
    for offset in (0, 1):
        kinds = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
        codec = find_codec((rows, columns), kinds, offset)
        assert codec is not None and codec.format.endswith(str(bits))
        for dtype in DTYPES:
            found, expected = both(kernels, monkeypatch, partial(codec.decode, parts, dtype))
            assert found.is_contiguous() and same(found, expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 64, 96), (5, 8, 64), (4, 130, 64)])
def test_four_bits(kernels: Any, monkeypatch: Any, kind: str, shape: tuple[int, ...]) -> None:
    """All experts and chosen ones; the last shape's blocks are no multiple of a program's."""
    pytest.importorskip("bitsandbytes")
    stacks = importlib.import_module("bigkit.quantize.stacks")
    torch.manual_seed(0)
    weights = torch.randn(*shape)
    parts = {
        name: part.detach() for name, part in stacks.quantized_stack(weights, shape[0], kind, weights.device).items()
    }
    codec = find_stack_codec("w", [f"w{suffix}" for suffix in parts])
    assert codec is not None and codec.in_place
    for dtype in DTYPES:
        for experts in ([2, 0, 2], [1], []):
            chosen = torch.tensor(experts, dtype=torch.long)
            found, expected = both(kernels, monkeypatch, partial(codec.decode, parts, dtype, chosen))
            assert found.shape == (len(experts), *shape[1:]) and same(found, expected)
        found, expected = both(kernels, monkeypatch, partial(codec.decode, parts, dtype))
        assert found.shape == shape and same(found, expected)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_four_bits_that_the_kernel_leaves(kernels: Any, monkeypatch: Any, kind: str) -> None:
    """Experts whose last block is a short one, and scales that have scales themselves."""
    pytest.importorskip("bitsandbytes")
    stacks = importlib.import_module("bigkit.quantize.stacks")
    weights = torch.randn(3, 3, 34 if kind == "nf4" else 64)
    parts = {name: part.detach() for name, part in stacks.quantized_stack(weights, 3, kind, weights.device).items()}
    codec = find_stack_codec("w", [f"w{suffix}" for suffix in parts])
    assert codec is not None
    monkeypatch.setattr(kernels, "looked_up", None)
    found, expected = both(kernels, monkeypatch, lambda: codec.chosen(parts, torch.tensor([2, 0]), torch.float32))
    assert same(found, expected) and torch.equal(found, codec.decode(parts, torch.float32)[[2, 0]])


def test_where_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codecs.kernels_for(torch.ones(2)) is None, "a CPU"

    class OnGpu:
        is_cuda = True
        contiguous = True

        def is_contiguous(self) -> bool:
            return self.contiguous

    tensor: Any = OnGpu()
    monkeypatch.setattr(codecs, "_kernels", lambda: "kernels")
    assert codecs.kernels_for(tensor) == "kernels"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert codecs.kernels_for(tensor) is None
    monkeypatch.undo()
    monkeypatch.setattr(codecs, "_kernels", lambda: "kernels")
    tensor.contiguous = False
    assert codecs.kernels_for(tensor) is None
    tensor.contiguous, tensor.fake_mode = True, None
    assert codecs.kernels_for(tensor).__name__ == "bigkit.checkpoints.like_kernels", "a dry run"


def test_without_a_compiler_a_warning_and_pytorchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = importlib.import_module("bigkit.checkpoints.kernels")

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(kernels, "try_out", fail)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    codecs._kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"takes longer: Triton makes no kernel \(Failed to find C compiler\)"):
            assert codecs._kernels() is None
        assert codecs._kernels() is None  # and no second warning, which would be an error
    finally:
        codecs._kernels.cache_clear()


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, bigkit.checkpoints.as_stored; sys.exit('bigkit.checkpoints.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
