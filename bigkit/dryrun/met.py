"""What of a dry run's memory differs by GPU or by version, and what of it was compared with real runs.

    RULES          each rule, its value, where it comes from, and what it was compared with
    rules_text     the same as a table
    about_met      what a dry run says if its GPU or its versions were never compared

Everything else follows from the model's own code. Leaves out: time (`machine/roofline.py` says where its figures come
from), and settings of PYTORCH_ALLOC_CONF, which dry runs do not read.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ..machine.allocator import MEDIUM, MEDIUM_SEGMENT, ROUND, ROUND_LARGE, SMALL, SMALL_SEGMENT
from ..machine.hardware import CONTEXT_BYTES
from ..units import MiB, format_bytes, text_table
from .costs import FEW_INPUTS
from .rehearse import HOPPERS, PROCESSORS, USUAL

HEADER = "AllocatorConfig.h, the same in 2.11, 2.13, 2.15"
H200 = "H200, PyTorch 2.11"
NEVER = "nothing"
COMPARED = (9, 0)  # compute capability of the GPUs on which dry runs were compared with real ones: H200s
VERSIONS = {"torch": "2.11", "transformers": "5.17"}  # of those runs
NO_OTHER = "Dry runs were compared with real ones on H200s, with PyTorch 2.11 and Transformers 5.17, and with no other."


class Rule(NamedTuple):
    """A rule that may differ.

    Args:
        what: which one.
        value: what dry runs take.
        source: where it comes from.
        compared: with what it was compared.
    """

    what: str
    value: str
    source: str
    compared: str


RULES = (
    Rule("requests are rounded up to", format_bytes(ROUND), HEADER, H200),
    Rule("small requests, and their segments", f"{format_bytes(SMALL)}, {format_bytes(SMALL_SEGMENT)}", HEADER, H200),
    Rule("larger ones, and their segments", f"{format_bytes(MEDIUM)}, {format_bytes(MEDIUM_SEGMENT)}", HEADER, H200),
    Rule("segments of the largest are rounded up to", format_bytes(ROUND_LARGE), HEADER, H200),
    Rule("workspace of cuBLAS, Hopper", format_bytes(HOPPERS), "seen with CUDA 13.0", H200),
    Rule("workspace of cuBLAS, other GPUs", format_bytes(USUAL), "PyTorch's CUDABlas.cpp", NEVER),
    Rule("workspace of cuBLASLt, once", format_bytes(MiB), "seen with CUDA 13.0", H200),
    Rule("attention, Hopper and Blackwell", "cuDNN, flash, efficient", "PyTorch's sdp_utils.cpp", H200),
    Rule("attention, other GPUs", "flash, efficient", "PyTorch's sdp_utils.cpp", NEVER),
    Rule(
        "16-bit convolutions are laid out anew",
        f"from {FEW_INPUTS} inputs on",
        "seen with cuDNN 9.19",
        H200,
    ),
    Rule("operations", "those of the PyTorch that is installed", "its own code", H200),
    Rule("processors, by which bitsandbytes decides", f"{len(PROCESSORS)} kinds, else 132", "vendors", H200),
    Rule("CUDA context", f"{format_bytes(CONTEXT_BYTES)}, or as calibrated", "seen with CUDA 12 and 13", H200),
)


def rules_text() -> str:
    """The rules as a table.

    >>> [line for line in rules_text().splitlines() if line.endswith("nothing")][1][:30]
    'attention, other GPUs         '
    """
    return text_table(["rule", "value", "source", "compared with"], [list(rule) for rule in RULES], "<<<<")


def about_met(capability: tuple[int, int]) -> list[str]:
    """What must be said of a dry run on a GPU of this compute capability, with the versions that are installed.

    >>> about_met((7, 5)) == [NO_OTHER]
    True
    """
    met = capability == COMPARED and all(_installed(library) == known for library, known in VERSIONS.items())
    return [] if met else [NO_OTHER]


def _installed(library: str) -> str:
    """The first two numbers of an installed version; empty if it is not there."""
    try:
        return ".".join(version(library).split(".")[:2])
    except PackageNotFoundError:
        return ""
