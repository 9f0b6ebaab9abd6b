import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigkit.units import dtype_bits, format_bytes, format_seconds, is_floating, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("10GiB", 10 * 2**30), ("10GB", 10**10), ("1.5 KiB", 1536), ("300", 300), (7, 7), (7.9, 7),
     (" 2 TB ", 2 * 10**12), ("0MB", 0), (".5KB", 500), ("10gIB", 10 * 2**30)],
)  # fmt: skip
def test_parse(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["10gb", "GB", "", "1 2GB", "-1GB", "10XB", "1e3MB"])
def test_refused_texts_are_named(text):
    with pytest.raises(ValueError, match="ambiguous|no size"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_refused_numbers(value):
    with pytest.raises(ValueError, match="zero or more"):
        parse_bytes(value)


@pytest.mark.parametrize("value", [None, True, [1]])
def test_refused_types(value):
    with pytest.raises(TypeError, match="a size must be"):
        parse_bytes(value)


@given(st.integers(0, 2**60), st.sampled_from(["iec", "si"]))
def test_format_and_parse_agree(size, style):
    assert abs(parse_bytes(format_bytes(size, style)) - size) <= 0.006 * size + 1


def test_formats():
    assert format_bytes(1536) == "1.50 KiB" and format_bytes(1536, "si") == "1.54 KB"
    assert format_bytes(1023) == "1023 B" and format_bytes(-2048) == "-2.00 KiB"
    with pytest.raises(ValueError, match="style"):
        format_bytes(1, "imperial")


@pytest.mark.parametrize(("style", "step"), [("iec", 1024), ("si", 1000)])
@given(power=st.integers(1, 5), less=st.integers(1, 4000))
def test_no_number_is_rounded_up_to_the_next_unit(style, step, power, less):
    """2**20 - 1 bytes are 1.00 MiB, not 1024.00 KiB; the largest unit has no next one."""
    for size in (step**power - less, -(step**power) + less, step**power - less / 1000):
        number = float(format_bytes(size, style).split()[0])
        assert abs(number) < step


@given(st.floats(1e-7, 1e4))
def test_seconds_have_three_figures(value):
    number, unit = format_seconds(value).replace(",", "").split()
    assert abs(float(number) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit] - value) <= max(0.006 * value, 6e-9)
    assert unit == "s" or float(number) < 1000


@given(st.integers(0, 2**55))
def test_classic_is_what_accelerate_prints(size):
    from accelerate.commands.estimate import convert_bytes

    assert format_bytes(size, "classic") == convert_bytes(size)


def test_every_torch_dtype_has_its_size():
    for name in dir(torch):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype) and not name.startswith("bits") and "x" not in name:  # raw and packed ones
            bits = dtype_bits(dtype)
            assert bits == 8 * dtype.itemsize or bits < 8, name
            if bits == 8 * dtype.itemsize:
                assert is_floating(dtype) == dtype.is_floating_point, name


def test_unknown_dtype():
    with pytest.raises(ValueError, match="unknown dtype 'float17'"):
        dtype_bits("float17")


def test_a_binary_unit_is_in_bytes_however_it_is_written():
    assert parse_bytes("10gib") == parse_bytes("10GIb") == parse_bytes("10GiB") == 10 * 2**30
