"""A cut says what `save_model` writes, its picture and text tell the same, and the explorer follows its controls."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from bigkit import describe, init_empty_weights, zoo
from bigkit.checkpoints.index import INDEX, SINGLE
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.checkpoints.shards import Cut, cut, cut_model
from bigkit.draw.canvas import WIDTH, Box, Picture
from bigkit.draw.colours import YELLOW
from bigkit.draw.shards import STRIPS, shards_figure, shards_label, shards_text, shards_verdict
from bigkit.widgets import ShardExplorer
from bigkit.widgets._explorer import LONGEST_REPR


class Tied(nn.Module):
    """Ties in each way that counts: a weight, a bias, a whole module, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.embed = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.arange(4.0), persistent=False)
        self.register_buffer("kept", self.cache)  # stored, though the first name of the pair is not


def written(folder: Path) -> dict[str, dict[str, int]]:
    """File -> tensor -> bytes, as another library reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = {name: file.get_tensor(name).nbytes for name in file.keys()}
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == header + sum(found[path.name].values())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("limit", ["10GB", "3KB", 1000, 700, 1])
def test_a_cut_is_what_save_model_writes(tmp_path: Path, limit: int | str, dtype: str | None) -> None:
    model = Tied()
    made = cut_model(describe(model), limit, dtype)
    save_model(model.to(getattr(torch, dtype)) if dtype else model, tmp_path, limit)
    assert written(tmp_path) == {file: dict(tensors) for file, tensors in made.files.items()}
    assert made.ties == {"head.weight": "embed.weight", "again.weight": "first.weight", "again.bias": "first.bias"}
    assert "kept" in made.weight_map and "cache" not in made.weight_map
    if len(made.files) == 1:
        assert list(made.files) == [SINGLE] and not (tmp_path / INDEX).exists()
    else:
        assert (tmp_path / INDEX).read_text() == made.index()
    with init_empty_weights():
        empty = Tied()
    assert load_checkpoint_in_model(empty, tmp_path, strict=True).clean


def test_pickles_are_cut_the_same_way(tmp_path: Path) -> None:
    save_model(Tied(), tmp_path, 1000, safe_serialization=False)
    made = cut_model(describe(Tied()), 1000, file="pytorch_model.bin")
    held = {path.name: torch.load(path, weights_only=True) for path in tmp_path.glob("*.bin")}
    assert {file: list(tensors) for file, tensors in made.files.items()} == {f: list(held[f]) for f in sorted(held)}


def test_the_files_that_ship_are_those_of_a_cut() -> None:
    from bigkit.zoo.gpt import PYGPT

    index = json.loads((PYGPT / INDEX).read_text())
    whole = cut_model(describe("pygpt"), "1GB", "bfloat16")
    largest = max(size for tensors in whole.files.values() for size in tensors.values())
    made = cut_model(describe("pygpt"), whole.bytes // 4 + largest, "bfloat16")
    assert json.loads(made.index()) == index
    assert written(PYGPT) == made.files


@pytest.mark.parametrize("name", ["gpt2", "bert-base-cased", "t5-large", "llama-2-7b", "resnet50.a1_in1k"])
def test_a_spec_is_cut_as_its_module_would_be(name: str) -> None:
    """The tables that ship say the same as a model built now, in names, order, ties and bytes."""
    from bigkit.meta.held import held_in

    held = held_in(zoo.empty_model(name, dtype=None), state=True)
    made = cut_model(describe(name), "500MB")
    assert {name: size for tensors in made.files.values() for name, size in tensors.items()} == {
        one.name: one.tensor.nbytes for one in held
    }
    assert made.ties == {name: one.name for one in held for name in [*one.places][1:]}
    assert made.files == cut({one.name: one.tensor.nbytes for one in held}, "500MB").files


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 40))
def test_the_rule(sizes: list[int], limit: int) -> None:
    """One file is open and filled in order; what is larger than the limit goes past it into a file of its own."""
    named = {str(i): size for i, size in enumerate(sizes)}
    oracle = split_state_dict_into_shards_factory(
        dict(named), get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    made = cut(named, limit)
    if oracle.is_sharded:
        assert {file: [*tensors] for file, tensors in made.files.items()} == oracle.filename_to_tensors
    assert made.bytes == sum(sizes) and len(made.weight_map) == len(sizes)
    assert [sizes[int(name)] for name in made.alone] == [size for size in sizes if size > limit]
    assert all(size <= limit or len(made.files[file]) == 1 for file, size in made.sizes.items())


def test_names_of_files() -> None:
    sizes = {"a": 1, "b": 1}
    assert list(cut(sizes, 2, generation=".v2").files) == ["model.safetensors"]
    assert list(cut(sizes, 1, generation=".v2").files) == [f"model.v2-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert list(cut(sizes, 1, "pytorch_model.bin").files) == [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    assert cut({}, 1).files == {"model.safetensors": {}}
    for wrong in (0, "0GB", -1, "5gb", "much"):
        with pytest.raises(ValueError, match="at least one byte|zero or more|ambiguous|is no size"):
            cut(sizes, wrong)


def test_find_follows_ties() -> None:
    made = cut_model(describe("gpt2"), "200MB")
    assert made.find("wte") == {"transformer.wte.weight": "model-00001-of-00003.safetensors"}
    assert made.find("lm_head") == {"lm_head.weight": "model-00001-of-00003.safetensors"}
    assert made.find("no such tensor") == {} and len(made.find("")) == len(made.weight_map) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Picture and text

CUTS = {
    "one file": lambda: cut_model(describe("t5-large"), "10GB"),
    "four files": lambda: cut_model(describe("pygpt"), "5MB", "bfloat16"),
    "some alone": lambda: cut_model(describe("resnet50.a1_in1k"), "1MB"),
    "all alone": lambda: cut_model(describe("llama-3.1-405b"), "1KB"),
    "many files": lambda: cut_model(describe("deepseek-v3"), "2GB"),
    "nothing": lambda: cut({}),
}


@pytest.fixture(params=CUTS)
def made(request: pytest.FixtureRequest) -> Cut:
    return CUTS[request.param]()


def boxes(picture: Picture, *kinds: str) -> list[Box]:
    """Every box of some kinds, from the top and the left."""
    found = [shape for shape in picture.shapes if isinstance(shape, Box) and shape.kind in kinds]
    return sorted(found, key=lambda box: (box.y, box.x))


def test_every_tensor_is_drawn_as_wide_as_its_bytes(made: Cut) -> None:
    kinds = ("tensors", "matches", "larger than the limit")
    drawn = boxes(shards_figure(made), *kinds)
    sizes = [size for tensors in made.files.values() for size in tensors.values() if size]
    assert len(drawn) == len(sizes)
    if sizes:
        scale = sum(box.width for box in drawn) / sum(sizes)
        assert [box.width for box in drawn] == pytest.approx([size * scale for size in sizes], abs=1e-6)
        assert max(box.x + box.width for box in drawn) <= WIDTH - 7.9
    assert len({box.y for box in drawn}) <= 2 * STRIPS + 16
    limit = boxes(shards_figure(made), "limit")
    assert not limit or limit[0].width == pytest.approx(made.limit * scale)


def test_a_file_is_one_box_in_one_row(made: Cut) -> None:
    drawn = iter(boxes(shards_figure(made), "tensors", "larger than the limit"))
    for tensors in made.files.values():
        own = [next(drawn) for size in tensors.values() if size]
        assert len({box.y for box in own}) <= 1
        assert [box.x + box.width for box in own[:-1]] == pytest.approx([box.x for box in own[1:]])


def test_what_is_found_is_yellow_and_what_is_too_large_is_hatched() -> None:
    made = cut_model(describe("gpt2"), "100MB")
    picture = shards_figure(made, "lm_head")
    (box,) = boxes(picture, "larger than the limit")
    assert box.colour == YELLOW and box.hatch == "/" and not boxes(picture, "matches")
    matches = boxes(shards_figure(made, "h.3.mlp"), "matches")
    assert len(matches) == 4 and {box.colour for box in matches} == {YELLOW}
    assert not boxes(shards_figure(made), "matches")


def test_the_text_tells_every_file_until_there_are_too_many(made: Cut) -> None:
    text = shards_text(made)
    assert text.startswith(f"{made.model or 'checkpoint'}: {shards_verdict(made)}")
    named = re.findall(r"^model\S*\.safetensors", text, re.MULTILINE)
    if len(made.files) <= 24:
        assert named == list(made.files)
    else:
        assert named == [*list(made.files)[:20], *list(made.files)[-4:]] and f"{len(made.files) - 24:,} more" in text
    assert ("larger than the limit" in text) == bool(made.alone)
    assert shards_verdict(made) in shards_label(made)


def test_the_text_answers_where_a_tensor_is() -> None:
    made = cut_model(describe("gpt2"), "100MB")
    text = shards_text(made, "lm_head")
    assert "lm_head.weight (stored as transformer.wte.weight): model-00001-of-00005.safetensors" in text
    assert "names that contain 'nothing': 0" in shards_text(made, "nothing")
    assert "124 more" in shards_text(made, "transformer")


# ---------------------------------------------------------------------------------------------------------------------
# ShardExplorer


def looks(explorer: ShardExplorer) -> tuple[str, str, str, str]:
    return explorer.picture.value, explorer.text.value, explorer.verdict.value, repr(explorer)


def test_something_shows_before_anything_is_touched() -> None:
    explorer = ShardExplorer()
    svg = ElementTree.fromstring(explorer.picture.value)
    assert svg.get("role") == "img" and "pygpt" in (svg.get("aria-label") or "")
    assert "model-00001-of-00004.safetensors" in explorer.text.value and "4 files." in explorer.verdict.value
    assert explorer.error.value == ""


def test_turning_each_control_and_reset() -> None:
    explorer = ShardExplorer("gpt2", "100MB")
    start = looks(explorer)
    for control, value in (
        (explorer.limit, 20_000_000), (explorer.dtype, "float32"), (explorer.find, "h.7.mlp"),
        (explorer.model, "pygpt"), (explorer.dtype, "as stored"),
    ):  # fmt: skip
        before = looks(explorer)
        control.value = value
        assert explorer.error.value == ""
        assert explorer.picture.value != before[0] and explorer.text.value != before[1], control.description
    assert explorer.cut == cut_model(describe("pygpt"), 20_000_000)
    explorer.buttons.children[0].click()
    assert looks(explorer) == start


def test_lookup() -> None:
    explorer = ShardExplorer("gpt2", "100MB", find="lm_head")
    assert explorer.found == {"lm_head.weight": "model-00001-of-00003.safetensors"}
    assert "model-00001-of-00003.safetensors" in explorer.verdict.value and "'lm_head' in 1" in repr(explorer)
    explorer.find.value = " h.1"
    assert len(explorer.found) == 36, "blocks 1, 10 and 11 of 12 tensors each"
    explorer.find.value = "<b>"
    assert explorer.found == {} and "<b>&#x27;" not in explorer.verdict.value and "&lt;b&gt;" in explorer.verdict.value
    explorer.find.value = ""
    assert explorer.found == {}


def test_index_pane() -> None:
    explorer = ShardExplorer("pygpt", "5MB")
    explorer.panes.selected_index = 0
    shown = re.sub("<[^>]+>", "", explorer.panes.children[0].value)
    assert "total_size&quot;: 16320512" in shown and "more lines" in shown
    explorer.limit.value = 50 * 10**9
    assert "needs no index" in explorer.panes.children[0].value


def test_reprs_are_short_and_say_what_was_turned() -> None:
    explorer = ShardExplorer("gpt2")
    for name in ("vit_base_patch16_224.augreg_in21k_ft_in1k", "llama-3.1-405b", "idefics-80b-instruct", "deepseek-v3"):
        explorer.model.value = name
        for limit in (1000, 50 * 10**9):
            explorer.limit.value = limit
            for part in ("", "layers.1", "a part of a name that is rather long for a repr", "x" * 200):
                explorer.find.value = part
                assert len(repr(explorer)) <= LONGEST_REPR, repr(explorer)
    assert repr(ShardExplorer("pygpt", "5MB")) == (
        "ShardExplorer(pygpt bfloat16, limit 5 MB: 4 files, largest 4.74 MB, 16.32 MB in all)"
    )


def test_bad_names_and_sizes() -> None:
    explorer = ShardExplorer("no-such-model")
    assert 'role="alert"' in explorer.error.value and "yet" in repr(explorer)
    explorer.buttons.children[1].click()
    with pytest.raises(ValueError, match="give the explorer a model"):
        explorer.to_code()
    explorer.model.value = "gpt2"
    assert explorer.error.value == "" and "<svg" in explorer.picture.value
    before = looks(explorer)
    explorer.model.value = "/no/such/folder"
    assert 'role="alert"' in explorer.error.value and looks(explorer) == before
    assert "'gpt2'" in explorer.to_code(), "the code is for what is shown"
    for wrong in (0, "5gb", "-1GB"):
        with pytest.raises(ValueError):
            ShardExplorer("gpt2", wrong)
    with pytest.raises(ValueError, match="unknown dtype"):
        ShardExplorer("gpt2", dtype="int9")


def test_a_model_of_your_own_and_any_limit() -> None:
    explorer = ShardExplorer(Tied(), 1234, dtype=None)
    assert explorer.cut == cut_model(describe(Tied()), 1234) and explorer.limit.value == 1234
    explorer.find.value = "head"
    assert set(explorer.found) == {"head.weight"}


def test_code_and_export_give_the_same_cut(tmp_path: Path) -> None:
    explorer = ShardExplorer("gpt2", "100MB")
    scope: dict[str, Cut] = {}
    exec(explorer.to_code(), scope)
    assert scope["cut"] == explorer.cut and scope["files"] == explorer.cut.sizes
    content = json.loads(explorer.export(tmp_path / "cut.json").read_text())
    assert content["files"] == explorer.cut.files and content["max_shard_size"] == 100_000_000
    ElementTree.parse(explorer.export(tmp_path / "cut.svg"))


def test_no_torch_is_needed() -> None:
    use = "from bigkit.widgets import ShardExplorer; ShardExplorer('llama-3.1-405b', '5GB')"
    code = f"import sys; {use}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
