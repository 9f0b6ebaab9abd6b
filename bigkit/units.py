"""Quantities as text: bytes (and back), seconds, counted nouns, lists of names, tables; and the bits of each dtype.

Every sentence, table and picture says a quantity with one of these, so that one quantity has one spelling.
Leaves out: anything that needs torch; dtypes are named by strings here ("float32", never `torch.float32`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

KiB, MiB, GiB, TiB, PiB = 2**10, 2**20, 2**30, 2**40, 2**50
KB, MB, GB, TB, PB = 10**3, 10**6, 10**9, 10**12, 10**15

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}
_BYTES = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")

# Torch stores one bool per byte, so 8. Sub-byte dtypes count the bits of one value, packed.
_BITS: dict[str, Any] = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8, "float8_e8m0fnu": 8,
    "float4_e2m1fn_x2": 8,  # one element is a byte that packs two 4-bit values
    "complex32": 32, "bcomplex32": 32, "complex64": 64, "complex128": 128,
    "bool": 8, "uint8": 8, "int8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32, "int64": 64, "uint64": 64,
    "quint8": 8, "qint8": 8, "qint32": 32, "quint4x2": 4, "quint2x4": 2,
    # Of llama.cpp's types, scales included (`model/gguf.py`); no cast changes them.
    "f32": 32, "f16": 16, "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "q2_k": 2.625, "q3_k": 3.4375,
    "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "q8_k": 9.125, "iq1_s": 1.5625, "iq1_m": 1.75, "iq2_xxs": 2.0625,
    "iq2_xs": 2.3125, "iq2_s": 2.5625, "iq3_xxs": 3.0625, "iq3_s": 3.4375, "iq4_nl": 4.5, "iq4_xs": 4.25,
    "tq1_0": 1.6875, "tq2_0": 2.0625, "mxfp4": 4.25, "nvfp4": 4.5,
    **{f"{sign}int{bits}": bits for sign in ("", "u") for bits in range(1, 8)},
}  # fmt: skip
_ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16",
            "float": "float32", "double": "float64", "fp8": "float8_e4m3fn", "float8": "float8_e4m3fn"}  # fmt: skip


def parse_bytes(size: int | float | str) -> int:
    """A number of bytes from a number, or from a text such as "10GiB", "1.5 GB", "300"; fractions are dropped.

    Binary units (KiB, MiB, GiB, TiB) are powers of 1024, decimal units (KB, MB, GB, TB) powers of 1000. "1gb" is
    refused: some libraries read it as a gigabit, others as a gigabyte; "1gib" is a GiB.

    Raises:
        ValueError: the text is no size, or it is negative or ambiguous.
        TypeError: neither a number nor a text.

    >>> parse_bytes("10GiB"), parse_bytes("10GB"), parse_bytes(42)
    (10737418240, 10000000000, 42)
    """
    if isinstance(size, bool) or not isinstance(size, (Real, str)):
        raise TypeError(f"a size must be a number of bytes or a text like '10GiB', not {type(size).__name__} {size!r}")
    if not isinstance(size, str):
        if not 0 <= size < float("inf"):
            raise ValueError(f"a size must be zero or more bytes, not {size!r}")
        return int(size)
    number, unit = match.groups() if (match := _BYTES.fullmatch(size)) else ("", "?")
    if number and unit.endswith("b") and unit[-2:-1] not in ("i", "I"):
        good = unit[:-1].upper().replace("I", "i") + "B"
        raise ValueError(f"{size!r} is ambiguous (bits or bytes?): write {number + good!r} for bytes")
    if unit.upper() not in _UNITS:
        raise ValueError(f"{size!r} is no size: write a number and KiB, MiB, GiB, TiB (1024) or KB, MB, GB, TB (1000)")
    return int((int(number) if number.isdigit() else float(number)) * _UNITS[unit.upper()])


def format_bytes(size: float, style: str = "iec") -> str:
    """A number of bytes as text.

    Args:
        size: bytes; negative values keep their sign.
        style: "iec" (1024, KiB MiB GiB), "si" (1000, KB MB GB), "classic": 1024-based steps *labelled* KB, MB, GB, as
            `accelerate estimate-memory` prints them; "exact": the shortest text that `parse_bytes` reads as so many.

    >>> format_bytes(433248256), format_bytes(433248256, "classic"), format_bytes(20 * GiB, "exact")
    ('413.18 MiB', '413.18 MB', '20GiB')
    """
    if style not in ("iec", "si", "classic", "exact"):
        raise ValueError(f"style must be 'iec', 'si', 'classic' or 'exact', not {style!r}")
    if style == "exact":
        names = "TiB GiB MiB KiB TB GB MB KB B".split()
        texts = (f"{size / _UNITS[name.upper()]:.{digits}f}{name}" for name in names for digits in range(4))
        return min((text for text in texts if parse_bytes(text) == size), key=len)
    step = 1000 if style == "si" else 1024
    value, letter = size, ""
    for letter in ("", *"KMGTP"):
        shown = value if style == "classic" else round(value, 2 if letter else 0)  # 1023.999 KiB is 1.00 MiB
        if abs(shown) < step or letter == "P":
            break
        value /= step
    if style == "classic":
        return f"{round(value, 2)} {f'{letter}B' if letter else 'bytes'}"
    return f"{value:.2f} {letter}{'i' if style == 'iec' else ''}B" if letter else f"{round(value)} B"


def dtype_name(dtype: object) -> str:
    """The plain name of a dtype: `torch.float32`, "torch.float32", "fp32" and "float32" all give "float32".

    Raises:
        ValueError: no dtype of that name is known.

    >>> dtype_name("torch.bfloat16"), dtype_name("fp16")
    ('bfloat16', 'float16')
    """
    name = str(dtype).removeprefix("torch.").lower()
    name = _ALIASES.get(name, name)
    if name not in _BITS:
        raise ValueError(f"unknown dtype {dtype!r}: expected a torch dtype or its name, such as 'float16' or 'int8'")
    return name


def dtype_bits(dtype: object) -> int:
    """Bits that one element of `dtype` takes in memory (a bool takes a whole byte; int4 takes 4).

    >>> dtype_bits("bfloat16"), dtype_bits("int4"), dtype_bits("bool")
    (16, 4, 8)
    """
    bits: int = _BITS.get(str(dtype)) or _BITS[dtype_name(dtype)]  # llama.cpp's types have fractions
    return bits


def is_floating(dtype: object) -> bool:
    """Whether a cast such as `model.to(torch.float16)` changes tensors of this dtype (integers and bools stay)."""
    return dtype_name(dtype).startswith(("float", "bfloat"))


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names in quotes, the first few of many.

    >>> listed(["h.0", "h.1", "h.2"], most=2)
    "'h.0', 'h.1' and 1 more"
    """
    names = list(names)
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def format_seconds(value: float) -> str:
    """A time with three figures.

    >>> format_seconds(0.000789), format_seconds(0.25), format_seconds(12.345), format_seconds(0)
    ('789 µs', '250 ms', '12.3 s', '0 s')
    """
    if not value:
        return "0 s"
    scale, unit = (1, "s") if value >= 0.9995 else (1e-3, "ms") if value >= 0.9995e-3 else (1e-6, "µs")
    return f"{three_figures(value / scale)} {unit}"


def three_figures(value: float) -> str:
    """A number with three figures, or all of those before the point.

    >>> three_figures(12.345), three_figures(12345), three_figures(0)
    ('12.3', '12,345', '0')
    """
    return f"{value:,.0f}" if value >= 99.95 or not value else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def format_count(count: int) -> str:
    """A number of parameters with three figures: millions, billions, trillions.

    >>> format_count(8_030_261_248), format_count(124_439_808), format_count(4_096)
    ('8.03 B', '124 M', '4,096')
    """
    sizes = ((scale, unit) for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if count >= 0.9995 * scale)
    scale, unit = next(sizes, (1, ""))
    return f"{three_figures(count / scale)} {unit}" if unit else f"{count:,}"


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]], aligned: str = "<") -> str:
    """Columns as plain text: `aligned` left ("<") or right (">"); those beyond it are aligned right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows)]
    forms = [f"{side}{width}" for side, width in zip(aligned.ljust(len(widths), ">"), widths)]
    return "\n".join("  ".join(map(format, row, forms)).rstrip() for row in (headers, ["-" * n for n in widths], *rows))


def counted(count: int, noun: str) -> str:
    """A number and its noun, which takes an "s" unless there is one of it.

    >>> counted(1, "file"), counted(1200, "tensor")
    ('1 file', '1,200 tensors')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
