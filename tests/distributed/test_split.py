"""Shares are exact for every type and size, by hypothesis and side by side with Accelerate."""

import copy
from collections import defaultdict, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from bigkit.distributed.shares import Shares, share
from bigkit.distributed.split import len_of, split
from tests.distributed.inputs import MAKERS, encoding, join, same


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=25)
@given(items=st.integers(0, 20), processes=st.integers(1, 9), padding=st.booleans())
def test_shares_of_every_type(kind: str, items: int, processes: int, padding: bool) -> None:
    inputs, untouched = MAKERS[kind](items), MAKERS[kind](items)
    parts = [split(inputs, processes, process, padding) for process in range(processes)]
    assert same(untouched, inputs), "the caller's data changed"
    expected = Shares(items, processes, padding)
    assert [len_of(part) for part in parts] == [len(part) for part in expected.parts]
    for process, part in enumerate(parts):
        if kind != "range" or not padding:
            assert type(part) is type(inputs)
        keep = len(share(items, processes, process))
        for rank in range(keep, len_of(part)):  # what is padded is the last item of all
            assert same(_row(part, rank), _row(inputs, items - 1))
    cut = [_rows(part, len(share(items, processes, process))) for process, part in enumerate(parts)]
    assert same(inputs, join(cut))


def _rows(thing: Any, stop: int) -> Any:
    """The first `stop` items."""
    if hasattr(thing, "column_names"):
        return thing.select(range(stop))
    if hasattr(thing, "items"):
        made = copy.copy(thing)
        for name in thing:
            made[name] = _rows(thing[name], stop)
        return made
    return thing[:stop]


def _row(thing: Any, i: int) -> Any:
    if hasattr(thing, "items"):
        return {name: _row(column, i) for name, column in thing.items()}
    return thing[i]


def test_the_words_of_the_manual() -> None:
    prompts = ["a dog", "a cat", "a chicken"]
    assert [split(prompts, 2, process) for process in (0, 1)] == [["a dog", "a cat"], ["a chicken"]]
    padded = [split(prompts, 2, process, apply_padding=True) for process in (0, 1)]
    assert padded == [["a dog", "a cat"], ["a chicken", "a chicken"]]
    assert [split(prompts, 5, process) for process in range(5)] == [["a dog"], ["a cat"], ["a chicken"], [], []]
    assert [split([], 2, process, apply_padding=True) for process in (0, 1)] == [[], []]


Point = namedtuple("Point", "x y")
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a text": ("a dog", TypeError, "cut into letters: put it in a list"),
    "bytes": (b"a dog", TypeError, "cut into letters"),
    "a set": ({"a", "b"}, TypeError, "cannot split inputs, a set"),
    "a generator": ((i for i in range(3)), TypeError, "a generator"),
    "a number": (3, TypeError, "a int"),
    "None": (None, TypeError, "a NoneType"),
    "a named tuple": (Point(1, 2), TypeError, "a Point"),
    "keys": ({"a": 1}.keys(), TypeError, "a dict_keys"),
    "a text in a dict": ({"a": [1], "b": {"c": "x"}}, TypeError, r"inputs\['b'\]\['c'\] is one str"),
    "uneven columns": ({"a": [1, 2], "b": [1]}, ValueError, r"inputs\['a'\] has 2, inputs\['b'\] has 1"),
    "uneven inside": ({"a": [1, 2], "b": {"c": [1, 2, 3]}}, ValueError, r"inputs\['b'\] has 3"),
    "a scalar": (torch.tensor(3), ValueError, "without dimensions"),
    "a scalar array": (np.array(3), ValueError, "without dimensions"),
    "one tokenized text": (BatchEncoding({"input_ids": [5, 6, 7]}), ValueError, "tokens of one text"),
    "one tokenized text, as tensor": (BatchEncoding({"input_ids": torch.tensor([5, 6])}), ValueError, "of one text"),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_on_one_process_too(name: str, processes: int) -> None:
    thing, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said):
        split(thing, processes, 0)


def test_a_fast_tokenizers_encodings_are_cut_too() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "dog": 2, "cat": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    whole = tokenizer(["a dog", "a cat", "dog cat"])
    mine = split(whole, 2, 1, apply_padding=True)
    assert type(mine) is BatchEncoding and mine["input_ids"] == [[2, 3], [2, 3]]
    assert mine.tokens(0) == mine.tokens(1) == ["dog", "cat"] and whole.tokens(2) == ["dog", "cat"]
    assert len(whole["input_ids"]) == 3


def test_a_share_of_a_tensor_is_a_view_and_of_a_list_is_not() -> None:
    tensor, prompts = torch.arange(4), [1, 2, 3, 4]
    assert split(tensor, 2, 1).data_ptr() == tensor[2:].data_ptr()
    split(prompts, 1, 0).clear()
    assert prompts == [1, 2, 3, 4]
    kept = defaultdict(list, a=[1, 2])
    assert split(kept, 2, 1) == {"a": [2]} and split(kept, 2, 1).default_factory is list


def theirs(inputs: Any, processes: int, process: int, padding: bool) -> Any:
    """Accelerate's share, of a copy: it changes dicts."""
    from accelerate import PartialState as Other

    me = SimpleNamespace(num_processes=processes, process_index=process, device=torch.device("cpu"))
    with Other.split_between_processes(me, copy.copy(inputs), padding) as mine:  # type: ignore[arg-type]
        return mine


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["list", "tuple", "tensor", "dict of lists", "dataset"]),
    items=st.integers(0, 20), processes=st.integers(1, 9), padding=st.booleans(),
)  # fmt: skip
def test_same_shares_as_accelerate(kind: str, items: int, processes: int, padding: bool) -> None:
    if padding and (kind in ("tuple", "tensor") or not items):
        return  # theirs fails, needs a group (below), or fails
    make = MAKERS.get(kind, lambda n: {"a": list(range(n)), "b": [f"{i}" for i in range(n)]})
    for process in range(processes):
        ours = split(make(items), processes, process, padding)
        assert same(ours, theirs(make(items), processes, process, padding))


def test_what_accelerate_hands_out_whole_is_split_or_refused() -> None:
    for whole in (np.arange(4), range(4), "abcd", encoding(4)):
        assert len_of(theirs(whole, 2, 1, False) if not isinstance(whole, str) else list("abcd")) == 4
    assert split(np.arange(4), 2, 1).tolist() == [2, 3] and split(range(4), 2, 1) == range(2, 4)
    assert split(encoding(4), 2, 1)["input_ids"].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(TypeError):
        split("abcd", 2, 1)


def test_what_accelerate_changes_loses_or_fails_on() -> None:
    from accelerate import PartialState as Other

    kept = {"a": [1, 2, 3]}
    with Other.split_between_processes(SimpleNamespace(num_processes=2, process_index=1), kept) as mine:  # type: ignore[arg-type]
        assert kept == {"a": [3]} and mine is kept, "theirs: the caller's dict is cut"
    kept = {"a": [1, 2, 3]}
    assert split(kept, 2, 1) == {"a": [3]} and kept == {"a": [1, 2, 3]}

    nested = {"x": {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8]}}
    assert theirs(copy.deepcopy(nested), 2, 0, False) == {"x": {"a": [1], "b": [5]}}, "theirs: half of the items"
    assert theirs(copy.deepcopy(nested), 2, 1, False) == {"x": {"a": [2], "b": [6]}}, "the rest is lost"
    assert [split(nested, 2, process)["x"]["a"] for process in (0, 1)] == [[1, 2], [3, 4]]

    with pytest.raises(TypeError):
        theirs((1, 2, 3), 2, 1, True)
    assert split((1, 2, 3), 2, 1, True) == (3, 3)
    with pytest.raises(IndexError):
        theirs([], 2, 1, True)
    assert split([], 2, 1, True) == []
