"""`ShardExplorer`: into which files a checkpoint is cut, and which file holds a tensor.

Leaves out: the weights; names and sizes are enough.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from ..api import Source
from ..checkpoints.shards import Cut, cut_model, read_limit
from ..draw.shards import shards_figure, shards_text
from ..units import counted, format_bytes
from ._controls import AS_STORED, chosen, dtype_menu, field, slider
from ._explorer import Explorer
from ._html import pill, preformatted, short

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

    missing = "no model yet"

    def __init__(
        self, model: Source = "pygpt", max_shard_size: int | str = "5MB", *, dtype: str | None = "bfloat16",
        find: str = "",
    ) -> None:  # fmt: skip
        self._settings: tuple[str, str | None] = ("", None)  # model and dtype of `cut`
        limit = read_limit(max_shard_size)
        limits = [(_size(size), size) for size in sorted({*LIMITS, limit})]
        super().__init__(
            {
                "Model": {"model": self.model_field(model), "dtype": dtype_menu(dtype)},
                "Largest file": {"limit": slider("File size", limits, limit).add_class("bigkit-limit-slider")},
                "Which file holds this tensor?": {
                    "find": field(widgets.Text, "Find", find, placeholder="part of a tensor's name"),
                },
            },
            {"Index": self._index_pane},
        )

    cut = property(lambda self: self.result)

    @property
    def found(self) -> dict[str, str]:
        """Tensor name -> file, for the names that contain what `find` says; none if it says nothing."""
        part = self.find.value.strip()
        return self.shown.find(part) if part else {}

    def compute(self) -> Cut:
        dtype = chosen(self.dtype)
        cut = cut_model(self.spec(), self.limit.value, dtype)
        self._settings = (self.model.value.strip(), dtype)
        return cut

    def show(self, cut: Cut) -> None:
        part, matches = self.find.value.strip(), self.found
        files = set(matches.values())
        facts = [f"{format_bytes(cut.bytes, 'si')} in all, the largest {format_bytes(max(cut.sizes.values()), 'si')}."]
        if alone := len(cut.alone):
            facts.append(f"Larger than the limit, so alone in a file: {counted(alone, 'tensor')}.")
        if ties := len(cut.ties):
            facts.append(f"Tied, and not stored again: {counted(ties, 'name')}.")
        if part:
            where = f" in {counted(len(files), 'file')}" if len(files) > 1 else f" in {min(files)}" if files else ""
            facts.append(f"{counted(len(matches), 'name')} with {part!r}{where}.")
        news = "slow" if cut.alone or (part and not files) else "good"
        verdict = pill(news, f"{counted(len(cut.files), 'file')}.", " ".join(facts))
        self.put(verdict, shards_figure(cut, part), shards_text(cut, part))

    def to_code(self) -> str:
        cut, (name, dtype) = self.shown, self._settings
        limit = repr(format_bytes(cut.limit, "exact"))
        return (
            "from bigkit import describe\nfrom bigkit.checkpoints.shards import cut_model\n\n"
            f"cut = cut_model(describe({name!r}), max_shard_size={limit}, dtype={dtype!r})\n"
            "files = cut.sizes\n\n"
            "# With the model itself, this writes the files:\n"
            f"# bigkit.checkpoints.save.save_model(model, folder, max_shard_size={limit})\n"
        )

    def content(self) -> dict[str, Any]:
        """The cut as plain data: every file with its tensors and their bytes."""
        cut, (name, dtype) = self.shown, self._settings
        return {
            "model": name, "dtype": dtype, "max_shard_size": cut.limit, "total_size": cut.bytes,
            "files": {file: dict(tensors) for file, tensors in cut.files.items()}, "ties": dict(cut.ties),
        }  # fmt: skip

    def _index_pane(self) -> str:
        cut = self.shown
        if len(cut.files) == 1:
            return "<p>One file needs no index.</p>"
        lines = cut.index().splitlines()
        rest = [f"    … {len(lines) - INDEX_LINES:,} more lines"] if len(lines) > INDEX_LINES else []
        return "<p>model.safetensors.index.json</p>" + preformatted("\n".join(lines[:INDEX_LINES] + rest))

    def summary(self, cut: Cut) -> list[str]:
        """The model, the limit and the files and, if there is room, the files that hold what is looked for."""
        name, dtype = self._settings
        head = f"{short(name)} {dtype or AS_STORED}, limit {_size(cut.limit)}: "
        head += f"{counted(len(cut.files), 'file')}, largest {_size(max(cut.sizes.values()))}"
        part = self.find.value.strip()
        tails = [f", {part!r} in {len(set(self.found.values())):,}"] if part else []
        return [head + tail for tail in (*tails, f", {_size(cut.bytes)} in all", "")]


def _size(size: int) -> str:
    """Bytes in decimal units, as a limit is given: "5 MB", "9.98 MB".

    >>> _size(5_000_000)
    '5 MB'
    """
    return format_bytes(size, "si").replace(".00 ", " ")
