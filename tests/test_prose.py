"""What the prose of README and of the course names exists (files, names of bigkit with their arguments, commands), and
its sizes and measured figures are those of outputs and results.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import bigkit
from bigkit.cli import _parser
from bigkit.widgets.hook_theatre import TIMES
from bigkit.zoo.gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "bigkit/accelerate/README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def prose(page: Path) -> str:
    """The Markdown of a page or notebook."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def quoted(page: Path) -> list[str]:
    """What stands between backticks, code blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", prose(page), flags=re.DOTALL))


def named(path: str) -> Any:
    """The thing that a dotted name under `bigkit` stands for; an AttributeError or ImportError if there is none."""
    thing: Any = bigkit
    for part in path.split(".")[1:]:
        try:
            thing = getattr(thing, part)
        except AttributeError:
            thing = import_module(f"{thing.__name__}.{part}")
    return thing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_prose_names_exist(page: Path) -> None:
    files = [text for text in quoted(page) if re.fullmatch(r"[\w-]+(/[\w.-]+)+\.\w+", text)]
    assert [file for file in files if not any((ROOT / base / file).exists() for base in ("", "bigkit"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_commands_that_prose_quotes_exist(page: Path) -> None:
    for text in quoted(page):
        if name := re.match(r"(?:with )?(bigkit(?:\.\w+)+)", text):
            named(name[1])
        if text.startswith("bigkit "):
            words = shlex.split(text)[1:]
            if len(words) > 1:  # `bigkit plan` names the command alone
                _, unknown = _parser().parse_known_args(words)
                assert not unknown, text
            else:
                with pytest.raises(SystemExit) as stop:
                    _parser().parse_args([*words, "--help"])
                assert stop.value.code == 0, text


@pytest.mark.parametrize("page", PAGES[:2], ids=["README", "accelerate"])
def test_calls_in_code_blocks_have_arguments_that_exist(page: Path) -> None:
    for block in PYTHON.findall(prose(page)):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bigkit"):
                for alias in node.names:
                    named(f"{node.module}.{alias.name}")
            if isinstance(node, ast.Call) and re.fullmatch(r"bigkit(\.\w+)+", ast.unparse(node.func)):
                values = {word.arg: None for word in node.keywords if word.arg}
                inspect.signature(named(ast.unparse(node.func))).bind(*node.args, **values)


def test_readme_lists_the_course_as_the_index_does() -> None:
    row = r"^\|[\d? ]+\| \[(?:\d+ )?(.*?)\]\((?:notebooks/)?(.*?)\) \| (.*) \|$"
    index = re.findall(row, prose(ROOT / "notebooks/index.ipynb"), re.MULTILINE)
    assert len(index) > 20 and re.findall(row, prose(ROOT / "README.md"), re.MULTILINE) == index


# Row of notebook 19's table -> rows of benchmarks/README.md, which is made from the kept results.
FIGURES = {
    "both links": ("| one GPU |", "| two GPUs |"),
    "21 MLPs on the CPU": ("| one GPU |", "| one GPU; 21 of 32 MLPs on 16 CPU threads, 3 slots |"),
    "24 MLPs, one CUDA graph": ("| one GPU |", "| one GPU; 24 of 32 MLPs on 16 CPU threads, 4 slots; one CUDA graph |"),
    "a pass over 64 tokens": ("| takes |",),
    "a draft, 80 % right": ("that is right in 80 of 100 tokens",),
    "CUDA graph, all on the GPU": ("| Llama-7B, bfloat16 |", "| the same in nf4 |", "| in int8 without outliers |"),
    "cache of 32,768 tokens": ("| resting in RAM", "| offloaded by Transformers |"),
}


@pytest.mark.parametrize("row", FIGURES)
def test_measured_figures_of_the_course_are_those_of_the_results(row: str) -> None:
    kept = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8").splitlines()
    found = [" ".join(kept[i : i + 2]) for i, line in enumerate(kept) if any(anchor in line for anchor in FIGURES[row])]
    assert len(found) >= len(FIGURES[row])
    measured = [float(number) for text in found for number in re.findall(r"\d+\.?\d*", text)]
    course = prose(ROOT / "notebooks/19-go-faster-than-the-link.ipynb")
    (told,) = re.findall(rf"^\| {re.escape(row)}[^|]*\|(.*)", course, re.MULTILINE)
    for number in re.findall(r"\d+\.?\d*", told):
        places = len(number.partition(".")[2])
        assert any(round(value, places) == float(number) for value in measured), f"{row}: {number}"


# ---------------------------------------------------------------------------------------------------------------------
# Sizes in the course's prose

FIGURE = re.compile(r"(\d[\d,]*\.?\d*)\s?(TiB|GiB|MiB|KiB|GB|MB|kB|billion)\b")
UNITS = {
    "TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "GB": 1e9, "MB": 1e6, "kB": 1e3, "billion": 1e9,
}  # fmt: skip
NO_PROSE = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|`[^`]*`|\]\([^)]*\)|<details>.*?</details>", re.DOTALL)


def own_numbers(page: Path) -> set[float]:
    """Every number in a notebook's code, its outputs and the labels of its pictures."""
    found = set[float]()
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            for output in cell["outputs"]:
                data = output.get("data", {})
                labels = re.findall(r'alt="([^"]*)"', "".join(data.get("text/html", "")))
                text += " ".join(["", *output.get("text", ""), *data.get("text/plain", ""), *labels])
            numbers = re.findall(r"\d[\d,_]*\.?\d*(?:e\d+)?", text)
            found |= {float(number.replace(",", "").replace("_", "")) for number in numbers}
    return found


@cache
def from_elsewhere() -> dict[str, float]:
    """Sizes that prose tells and no cell of its notebook computes -> what they are, in their unit."""
    half = bigkit.Precision("bfloat16")
    block = bigkit.describe("pygpt").layers()[3].bytes(half) / 1e6
    large, gpt2 = bigkit.describe("llama-2-70b").bytes(half), bigkit.describe("gpt2")
    away = bigkit.advise("llama-2-70b", "1 x RTX 4090", stored=(None,)).best.plan.offloaded
    with bigkit.init_empty_weights():
        xl = 4 * sum(tensor.numel() for tensor in GPT(GPTConfig("gpt2-xl")).parameters()) / 1e9
    idefics = bigkit.estimate_memory("idefics-80b-instruct").rows[0].total_size / 2**30
    return {
        "6.6 GB": xl,
        "3.3 GB": 0.51 * xl,  # the share that notebook 08 measures
        "1.58 MB": block,
        "404 MB": TIMES * block,
        "20.9 billion": bigkit.describe("gpt-oss-20b").parameters / 1e9,
        "671 billion": bigkit.describe("deepseek-v3").parameters / 1e9,
        "128 GiB": large / 2**30,
        "18.5 GiB": (large - away) / 2**30,
        "13.5 GB": bigkit.describe("llama-2-7b").bytes(half) / 1e9,
        "150 MiB": 5 * 30,
        "14.2 MB": gpt2.layers()[3].bytes(half) / 1e6,
        "13.7 GB": 0.87 * bigkit.HARDWARE["Colab T4"].gpus[0].link / 1e9,
        "296.93 GB": idefics,  # in the table of 2023 a GB is a GiB
        "0.19 GB": 297.12 - idefics,
    }


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda page: page.stem)
def test_sizes_in_prose_are_those_of_the_outputs_or_of_bigkit(page: Path) -> None:
    own, known = own_numbers(page), from_elsewhere()
    text = prose(page).partition("**What you'll need**")[2]  # that itself is rounded up
    for match in FIGURE.finditer(NO_PROSE.sub("", text.partition("\n\n#")[2]).split("## Exercises")[0]):
        number, unit = match.groups()
        told, places = float(number.replace(",", "")), len(number.partition(".")[2])
        meant = {known[match[0]]} if match[0] in known else {value / by for value in own for by in (1, UNITS[unit])}
        assert any(round(value, places) == told for value in meant), f"{match[0]} in {page.name}"
