"""`ShardExplorer`: into which files a checkpoint is cut, and which file holds a tensor.

Leaves out: the weights; names and sizes are enough.
"""

from __future__ import annotations

import json

import ipywidgets as widgets

from ..api import Source, describe
from ..checkpoints.shards import Cut, cut_model, read_limit
from ..draw.canvas import shards_figure, shards_label, shards_text, svg
from ..units import dtype_name, format_bytes
from ._explorer import (
    AS_STORED,
    DTYPES,
    LONGEST_REPR,
    WIDE,
    Explorer,
    menu,
    model_field,
    named,
    pill,
    preformatted,
    short,
)

LIMITS = tuple(digit * 10**power for power in range(3, 11) for digit in (1, 2, 5))  # 1 KB .. 50 GB
INDEX_LINES = 24


class ShardExplorer(Explorer):
    """Cut a checkpoint into files, and see what changes as the largest size of a file does.

    The files are those that `save_model` writes. The controls are `model`, `dtype`, `limit` (bytes) and `find` (part of
    a tensor's name); set their `value` in code or by hand. `cut` is the `Cut` that is shown, or None if there is none
    yet.

    Args:
        model: a shipped name, Hub id, Hub URL, timm name or folder; or an `nn.Module` or `ModelSpec`.
        max_shard_size: the most bytes of a file, as a number or text ("5MB").
        dtype: what floating tensors are cast to; None takes what the model has.
        find: part of a tensor's name.

    Raises:
        ValueError: a size or dtype that does not exist. A model that is not found is said in the explorer.

    >>> explorer = ShardExplorer("pygpt", "5MB")
    >>> explorer.limit.value = 10_000_000
    >>> explorer
    ShardExplorer(pygpt bfloat16, limit 10 MB: 2 files, largest 9.87 MB, 16.32 MB in all)
    """

    def __init__(
        self,
        model: Source = "pygpt",
        max_shard_size: int | str = "5MB",
        *,
        dtype: str | None = "bfloat16",
        find: str = "",
    ) -> None:
        self.cut: Cut | None = None
        self._named: tuple[str, str | None] = ("", None)  # model and dtype of `cut`
        name, self._specs = named(model)
        limit = read_limit(max_shard_size)

        wide = widgets.Layout(width="100%")
        self.model = model_field(name)
        self.dtype = menu("Dtype", DTYPES, AS_STORED if dtype is None else dtype_name(dtype))
        self.limit = widgets.SelectionSlider(
            options=[(_size(size), size) for size in sorted({*LIMITS, limit})], value=limit, description="File size",
            continuous_update=False, style=WIDE, layout=wide,
        )  # fmt: skip
        self.limit.add_class("bigkit-limit-slider")
        self.find = widgets.Text(
            value=find, description="Find", placeholder="part of a tensor's name", continuous_update=False,
            style=WIDE, layout=wide,
        )  # fmt: skip
        super().__init__(
            [
                ("Model", [self.model, self.dtype]),
                ("Largest file", [self.limit]),
                ("Which file holds this tensor?", [self.find]),
            ],
            [("Index", self._index_pane)],
        )

    @property
    def found(self) -> dict[str, str]:
        """Tensor name -> file, for the names that contain what `find` says; none if it says nothing."""
        part = self.find.value.strip()
        return self._shown().find(part) if part else {}

    def compute(self) -> None:
        """Cut the model that is named."""
        name = self.model.value.strip()
        if name not in self._specs:
            self._specs[name] = describe(name)
        dtype = None if self.dtype.value == AS_STORED else self.dtype.value
        self.cut, self._named = cut_model(self._specs[name], self.limit.value, dtype), (name, dtype)

    def show(self) -> None:
        """Show the cut."""
        made, part = self._shown(), self.find.value.strip()
        count, files = len(made.files), set(self.found.values())
        largest = format_bytes(max(made.sizes.values()), "si")
        said = [f"{format_bytes(made.bytes, 'si')} in all, the largest {largest}."]
        if alone := len(made.alone):
            said.append(f"Larger than the limit, so alone in a file: {_count(alone, 'tensor')}.")
        if ties := len(made.ties):
            said.append(f"Tied, and not stored again: {_count(ties, 'name')}.")
        if part:
            where = f" in {_count(len(files), 'file')}" if len(files) != 1 else f" in {min(files)}"
            said.append(f"{_count(len(self.found), 'name')} with {part!r}{where if files else ''}.")
        news = "slow" if made.alone or (part and not files) else "good"
        self.verdict.value = pill(news, f"{_count(count, 'file')}.", " ".join(said))
        self.picture.value = svg(shards_figure(made, part), shards_label(made, part))
        self.text.value = preformatted(shards_text(made, part))

    def to_code(self) -> str:
        """Python that cuts the same way, without weights and with them."""
        made, (name, dtype) = self._shown(), self._named
        return (
            "from bigkit import describe\nfrom bigkit.checkpoints.shards import cut_model\n\n"
            f"cut = cut_model(describe({name!r}), max_shard_size={made.limit}, dtype={dtype!r})\n"
            "files = cut.sizes\n\n"
            "# With the model itself, this writes the files:\n"
            f"# bigkit.checkpoints.save.save_model(model, folder, max_shard_size={made.limit})\n"
        )

    def to_json(self) -> str:
        """The cut as JSON text: every file with its tensors and their bytes."""
        made, (name, dtype) = self._shown(), self._named
        content = {
            "model": name, "dtype": dtype, "max_shard_size": made.limit, "total_size": made.bytes,
            "files": {file: dict(tensors) for file, tensors in made.files.items()}, "ties": dict(made.ties),
        }  # fmt: skip
        return json.dumps(content, indent=2) + "\n"

    def _shown(self) -> Cut:
        if self.cut is None:
            raise ValueError("there is nothing cut yet: give the explorer a model that it can find")
        return self.cut

    def _index_pane(self) -> str:
        made = self._shown()
        if len(made.files) == 1:
            return "<p>One file needs no index.</p>"
        lines = made.index().splitlines()
        rest = [f"    … {len(lines) - INDEX_LINES:,} more lines"] if len(lines) > INDEX_LINES else []
        return "<p>model.safetensors.index.json</p>" + preformatted("\n".join(lines[:INDEX_LINES] + rest))

    def __repr__(self) -> str:
        made = getattr(self, "cut", None)
        if made is None:
            return "ShardExplorer(no model yet)"
        name, dtype = self._named
        head = f"ShardExplorer({short(name)} {dtype or AS_STORED}, limit {_size(made.limit)}: "
        sizes = f"{_count(len(made.files), 'file')}, largest {_size(max(made.sizes.values()))}"
        part = self.find.value.strip()
        tails = [f", {part!r} in {len(set(self.found.values())):,}"] if part else []
        tails += [f", {_size(made.bytes)} in all", ""]
        return next(text for tail in tails if len(text := f"{head}{sizes}{tail})") <= LONGEST_REPR)


def _size(size: int) -> str:
    """Bytes in decimal units, as a limit is given: "5 MB", "9.98 MB".

    >>> _size(5_000_000)
    '5 MB'
    """
    return format_bytes(size, "si").replace(".00 ", " ")


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
