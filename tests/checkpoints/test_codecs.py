"""Formats of quantized weights against the libraries that write them, or against loops over single numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigkit.checkpoints import codecs
from bigkit.checkpoints.codecs import decode_scaled, find_codec

ROWS, COLUMNS = 48, 64


def decoded(parts: dict[str, Tensor], shape: tuple[int, int] = (ROWS, COLUMNS), offset: int = 1) -> tuple[str, Tensor]:
    kinds = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    codec = find_codec(shape, kinds, offset)
    assert codec is not None
    weight = codec.decode(parts, torch.float32)
    assert weight.shape == shape
    return codec.format, weight


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scale", [(), (1,), (ROWS, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_one_byte_and_a_scale_for_all_or_for_each_row(scale: tuple[int, ...], dtype: torch.dtype) -> None:
    codes, scales = (torch.randn(ROWS, COLUMNS) * 20).to(dtype), torch.rand(scale)
    format, weight = decoded({"weight": codes, "weight_scale": scales})
    assert format == ("int8" if dtype == torch.int8 else "fp8")
    assert torch.equal(weight, codes.float() * scales)


@pytest.mark.parametrize("shape", [(256, 384), (200, 130), (128, 64)])
def test_fp8_in_blocks(shape: tuple[int, int]) -> None:
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    expected = codes.float()
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            expected[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128] *= scales[row, column]
    assert torch.equal(decoded({"weight": codes, "weight_scale_inv": scales}, shape)[1], expected)


def test_fp8_in_blocks_as_transformers_decodes_it() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes, scales = torch.randn(256, 384).to(torch.float8_e4m3fn), torch.rand(2, 3)
    try:
        theirs = fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    except (AttributeError, TypeError):
        pytest.skip("this version of Transformers decodes by another call")
    ours = codecs.decode_scaled({"weight": codes, "weight_scale_inv": scales}, torch.bfloat16)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("group", [16, COLUMNS])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_packed_in_int32(bits: int, zero: bool, group: int) -> None:
    half, per = 1 << (bits - 1), 32 // bits
    codes = torch.randint(-half, half, (ROWS, COLUMNS))
    scales, zeros = torch.rand(ROWS, COLUMNS // group), torch.randint(-half, half, (ROWS, COLUMNS // group))

    def pack(numbers: Tensor) -> Tensor:  # along the rows of a matrix
        shifted = (numbers + half).unflatten(1, (-1, per)) << torch.arange(0, 32, bits)
        return shifted.sum(2).to(torch.int64).where(shifted.sum(2) < 2**31, shifted.sum(2) - 2**32).to(torch.int32)

    parts = {"weight_packed": pack(codes), "weight_scale": scales, "weight_shape": torch.tensor([ROWS, COLUMNS])}
    if zero:
        parts["weight_zero_point"] = pack(zeros.t()).t().contiguous()
    spread = (zeros if zero else zeros * 0).repeat_interleave(group, 1)
    format, weight = decoded(parts)
    assert format == f"int{bits}"
    assert torch.equal(weight, (codes - spread) * scales.repeat_interleave(group, 1))


def test_numbers_packed_by_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8)
    packed = helpers.pack_to_int32(codes, 4)
    assert torch.equal(codecs.unpack(packed, 4, 1)[:, :COLUMNS] - 8, codes.int())


def gptq(numbers: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of 4 bits in an int32 along `dim`, written bit by bit."""
    numbers = numbers.movedim(dim, -1).contiguous()
    packed = torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // 8, dtype=torch.int64)
    for place, which in enumerate(order):
        packed |= numbers[..., which::8] << (4 * place)
    return packed.where(packed < 2**31, packed - 2**32).to(torch.int32).movedim(-1, dim).contiguous()


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_gptq(offset: int, reordered: bool) -> None:
    group = 16
    codes = torch.randint(0, 16, (COLUMNS, ROWS))
    zeros, scales = torch.randint(0, 15, (COLUMNS // group, ROWS)), torch.rand(COLUMNS // group, ROWS)
    index = torch.arange(COLUMNS) // group
    index = index[torch.randperm(COLUMNS)] if reordered else index
    parts = {"qweight": gptq(codes, 0), "qzeros": gptq(zeros, 1), "scales": scales, "g_idx": index.int()}
    format, weight = decoded(parts, offset=offset)
    expected = torch.stack([(codes[i] - zeros[index[i]] - offset) * scales[index[i]] for i in range(COLUMNS)], 1)
    assert format == "gptq-int4" and torch.equal(weight, expected)


def test_awq() -> None:
    group, order = 32, (0, 2, 4, 6, 1, 3, 5, 7)
    codes = torch.randint(0, 16, (COLUMNS, ROWS))
    zeros, scales = torch.randint(0, 16, (COLUMNS // group, ROWS)), torch.rand(COLUMNS // group, ROWS)
    parts = {"qweight": gptq(codes, 1, order), "qzeros": gptq(zeros, 1, order), "scales": scales}
    format, weight = decoded(parts)
    expected = torch.stack([(codes[i] - zeros[i // group]) * scales[i // group] for i in range(COLUMNS)], 1)
    assert format == "awq-int4" and torch.equal(weight, expected)


def value_of_e2m1(code: int) -> float:
    """By the definition: a sign, two bits of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return -size if sign else size


def test_e2m1() -> None:
    assert [value_of_e2m1(code) for code in range(16)] == list(codecs.E2M1)
    assert torch.equal(codecs.e2m1(torch.tensor([[0x21, 0xF7]], dtype=torch.uint8)), torch.tensor([[0.5, 1, 6, -6]]))


def test_nvfp4() -> None:
    packed = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8)
    scales, whole = torch.rand(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn), torch.tensor([7.0])
    parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}
    format, weight = decoded(parts)
    for row, column in ((0, 0), (3, 17), (47, 63)):
        code = int(packed[row, column // 2]) >> (4 * (column % 2)) & 15
        assert weight[row, column] == value_of_e2m1(code) * (scales[row, column // 16].float() / whole[0])
    assert format == "nvfp4"
    other = {"weight": packed, "weight_scale": scales, "weight_scale_2": 1 / whole[0]}  # ModelOpt's
    format, again = decoded(other)
    assert format == "nvfp4" and torch.allclose(again, weight, rtol=1e-6)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_mxfp8(name: str) -> None:
    """A power of two for each 32 weights of a row, as its exponent plus 127 in a byte."""
    codes = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 134, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    format, weight = decoded({"weight": codes, name: exponents})
    assert format == "fp8"
    for row, column in ((0, 0), (3, 31), (3, 32), (47, 63)):
        assert weight[row, column] == codes[row, column].float() * 2.0 ** (int(exponents[row, column // 32]) - 127)


def test_mxfp4_as_transformers_decodes_it() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 32, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 32, 2), dtype=torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    parts = {"_blocks": blocks, "_scales": scales}
    ours = codecs.decode_mxfp4(parts, torch.bfloat16)
    assert ours.shape == (3, 64, 32) and torch.equal(ours, theirs)
    one = {suffix: part[1] for suffix, part in parts.items()}
    assert torch.equal(codecs.decode_mxfp4(one, torch.bfloat16), ours[1])
    assert torch.equal(codecs.decode_mxfp4(parts, torch.float32).bfloat16(), ours), "exact in either dtype"


def test_what_is_not_quantized_and_what_is_not_known() -> None:
    plain = {"weight": ((4, 8), torch.bfloat16), "bias": ((4,), torch.bfloat16)}
    assert find_codec((4, 8), plain) is None and find_codec((4, 8), {}) is None
    strange = {"weight_packed": ((4, 3), torch.int32), "weight_scale": ((4, 1), torch.float32)}
    with pytest.raises(ValueError, match=r"weight_packed torch.int32 \[4, 3\].* no format"):
        find_codec((4, 8), strange)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize(("shape", "scales"), [
    ((256, 384), (2, 3)), ((200, 300), (2, 3)), ((200, 256), (2, 2)), ((64, 100), (64, 1)), ((64, 100), (1, 1)),
    ((64, 100), ()), ((64, 100), (1,)), ((300, 256), (3, 2)), ((96, 128), (3, 4)),
])  # fmt: skip
def test_scales_are_multiplied_in_float32(
    shape: tuple[int, ...], scales: tuple[int, ...], codes: torch.dtype, dtype: torch.dtype
) -> None:
    """Bit for bit the product in float32 with every scale repeated, rounded once; the last blocks may be cut."""
    torch.manual_seed(0)
    weight, scale = (torch.randn(shape) * 30).to(codes), torch.rand(scales)
    repeated = scale
    for dim in range(len(scales) * (scale.numel() > 1)):
        size = 128 if scales[dim] == -(-shape[dim] // 128) else -(-shape[dim] // scales[dim])
        repeated = repeated.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    found = decode_scaled({"weight": weight, "weight_scale": scale}, dtype)
    assert torch.equal(found, (weight.float() * repeated).to(dtype))
