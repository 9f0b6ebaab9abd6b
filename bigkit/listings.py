"""What ships, as tables: models and machines. And tables of text as Markdown.

Leaves out: looking one up (`zoo/`, `machine/hardware.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from . import zoo
from .machine.hardware import GPUS, HARDWARE, machine_of
from .units import GB, format_bytes, format_count, text_table


def models(words: Sequence[str] = ()) -> str:
    """The models that need no download, those with all of some words in their rows: parameters, and weights as stored.

    Raises:
        ValueError: there is none.

    >>> print(models(["mixtral"]))
    model         parameters    weights  what it is                                 on the Hub
    ------------  ----------  ---------  -----------------------------------------  ---------------------------
    mixtral-8x7b      46.7 B  86.99 GiB  47B mixture of 8 experts, 2 at work, 2023  mistralai/Mixtral-8x7B-v0.1
    """
    rows = []
    for entry in zoo.ENTRIES:
        spec = zoo.describe(entry.name)
        rows.append([entry.name, format_count(spec.parameters), format_bytes(spec.bytes()), entry.about, entry.hub_id])
    return _chosen(["model", "parameters", "weights", "what it is", "on the Hub"], rows, words, "<>><<")


def machines(words: Sequence[str] = ()) -> str:
    """The machines that have a name, and one for each kind of GPU: the memory of a GPU, how fast it reads that and what
    comes over its link, its 16-bit operations, and RAM.

    Raises:
        ValueError: there is none with all of these words.
    """
    rows = []
    for machine in dict.fromkeys([*HARDWARE.values(), *map(machine_of, GPUS)]):
        sizes = ["-"] * 4
        for gpu in machine.gpus[:1]:
            rates = (gpu.bandwidth / GB, gpu.link / GB, gpu.flops / 1e12)
            sizes = [format_bytes(gpu.memory), *(f"{rate:,.0f}" for rate in rates)]
        rows.append([machine.name, *sizes, format_bytes(machine.ram)])
    return _chosen(["machine", "memory of a GPU", "GB/s", "link GB/s", "TFLOP/s", "RAM"], rows, words, "<")


def _chosen(headers: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str], aligned: str) -> str:
    """The rows that have all of some words, as a table."""
    rows = [row for row in rows if all(word.lower() in " ".join(row).lower() for word in words)]
    if not rows:
        raise ValueError(f"nothing that ships with bigkit has {' '.join(words)!r} in its name or description")
    return text_table(headers, rows, aligned)


def as_markdown(text: str) -> str:
    """The tables of a text (a row of dashes under the headers) as Markdown; each other line is a paragraph.

    >>> print(as_markdown("bits  bytes\\n----  -----\\n4       0.5\\n\\n* so"))
    | bits | bytes |
    | --- | --- |
    | 4 | 0.5 |
    <BLANKLINE>
    \\* so
    """
    written, spans = list[str](), list[slice]()
    lines = text.split("\n")
    for line, following in zip(lines, [*lines[1:], ""]):
        if re.fullmatch(r"-+(  +-+)+", following):
            spans = [slice(*match.span()) for match in re.finditer("-+", following)]
            spans[-1] = slice(spans[-1].start, None)
        if not line:
            spans = []
        if set(line) == {"-", " "} and spans:
            written.append("|" + " --- |" * len(spans))
        elif spans:
            cells = (line[span].strip().replace("|", "\\|").replace("*", "\\*") for span in spans)
            written.append(f"| {' | '.join(cells)} |")
        else:
            written += [line.strip().replace("*", "\\*"), ""]
    return re.sub("\n{3,}", "\n\n", "\n".join(written)).strip()
