"""Shares and gathers are exact: by hypothesis over every type and size, in real groups of 1, 2, 3 and 8 processes, and
side by side with Accelerate, whose differences are each named in a test."""

from __future__ import annotations

import copy
import multiprocessing.connection
import os
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

import bigkit
from bigkit.distributed.gather import gather, gather_for_results, gather_object
from bigkit.distributed.shares import Shares, share
from bigkit.distributed.split import len_of, split
from bigkit.distributed.state import PartialState, ProcessLost, split_between_processes
from tests.ranks import ROOT, Ranks, free_port

WORLDS = (1, 2, 3, pytest.param(8, marks=pytest.mark.soak))


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    group = Ranks(request.param)
    yield group
    group.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    group = Ranks(3)
    yield group
    group.close()


def dataset(n: int) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"id": list(range(n)), "text": [f"prompt {i}" for i in range(n)]})


def encoding(n: int) -> BatchEncoding:
    return BatchEncoding({"input_ids": torch.arange(2 * n).view(n, 2), "length": [2] * n})


# Every type that can be split, with n items in it.
MAKERS = {
    "list": lambda n: [f"prompt {i}" for i in range(n)],
    "tuple": lambda n: tuple(range(n)),
    "range": lambda n: range(3, 3 + 2 * n, 2),
    "tensor": lambda n: torch.arange(3 * n, dtype=torch.float32).view(n, 3),
    "bfloat16": lambda n: torch.arange(n).to(torch.bfloat16),
    "bool": lambda n: torch.arange(n) % 2 == 0,
    "no width": lambda n: torch.zeros(n, 0),
    "ndarray": lambda n: np.arange(2 * n).reshape(n, 2),
    "objects": lambda n: np.array([f"prompt {i}" for i in range(n)], dtype=object),
    "dict": lambda n: {"id": list(range(n)), "x": torch.arange(n), "y": np.arange(n)},
    "nested": lambda n: {"a": {"b": list(range(n)), "c": {"d": tuple(range(n))}}, "e": torch.arange(n)},
    "ordered": lambda n: OrderedDict(b=list(range(n)), a=tuple(range(n))),
    "encoding": encoding,
    "dataset": dataset,
}


def same(one: Any, other: Any) -> bool:
    """Equal in type, order and content."""
    if isinstance(one, range):
        return list(one) == list(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if hasattr(one, "column_names"):
        return one.to_dict() == other.to_dict()
    if hasattr(one, "items"):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


def join(parts: list[Any]) -> Any:
    """Shares put together by hand, an oracle for `gather_for_results`."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    if isinstance(first, range):
        return [item for part in parts for item in part]
    if hasattr(first, "column_names"):
        import datasets

        return datasets.concatenate_datasets(parts)
    if hasattr(first, "items"):
        made = copy.copy(first)
        for name in first:
            made[name] = join([part[name] for part in parts])
        return made
    return type(first)(item for part in parts for item in part)


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


@given(st.integers(0, 200), st.integers(1, 40))
def test_shares_are_contiguous_even_and_complete(items: int, processes: int) -> None:
    parts = [share(items, processes, process) for process in range(processes)]
    assert [position for part in parts for position in part] == list(range(items))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


@given(st.integers(0, 60), st.integers(1, 20), st.booleans())
def test_shares_as_data(items: int, processes: int, padding: bool) -> None:
    split = Shares(items, processes, padding)
    assert sorted(set(split.gathered)) == list(range(items))
    assert len(split.gathered) - split.padded == items and split.rounds == max(map(len, split.parts))
    if padding:
        assert split.idle == 0 and len(set(map(len, split.parts))) == 1
    else:
        assert split.padded == 0 and split.gathered == tuple(range(items))
    assert split.rounds * processes == items + split.padded + split.idle
    assert split.speedup <= processes


@pytest.mark.parametrize("wrong", [(-1, 2, 0), (3, 0, 0), (3, 2, 2), (3, 2, -1)])
def test_no_share_of_what_does_not_exist(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected zero or more items"):
        share(*wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Splitting, without processes


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


# ---------------------------------------------------------------------------------------------------------------------
# In processes


def test_who_am_i(ranks: Ranks) -> None:
    def who(state: PartialState) -> tuple[Any, ...]:
        again = PartialState()
        return (
            state.process_index, again.process_index, state.num_processes, state.local_process_index,
            state.is_main_process, state.is_last_process, state.is_local_main_process, str(state.device),
        )  # fmt: skip

    n = ranks.size
    assert ranks(who) == [(i, i, n, i, i == 0, i == n - 1, i == 0, "cpu") for i in range(n)]


@pytest.mark.parametrize("padding", [False, True])
def test_split_and_gather_is_the_identity(ranks: Ranks, padding: bool) -> None:
    kinds = [kind for kind in MAKERS if kind != "dataset" or find_spec("datasets")]

    def there_and_back(state: PartialState, inputs: list[Any], padding: bool) -> list[Any]:
        found = []
        for thing in inputs:
            with state.split_between_processes(thing, apply_padding=padding) as mine:
                found.append(gather_for_results(mine, len_of(thing)))
        return found

    sizes = sorted({0, 1, ranks.size, ranks.size + 1, 13})
    inputs = [MAKERS[kind](size) for kind in kinds for size in sizes]
    for back in ranks(there_and_back, inputs, padding):
        assert all(same(thing, found) for thing, found in zip(inputs, back))


def identity_on_anything(three: Ranks, data: st.DataObject) -> None:
    """Real processes, driven by hypothesis: any mix of nested columns, of any length, padded or not."""
    items, padding = data.draw(st.integers(0, 12)), data.draw(st.booleans())
    column = st.sampled_from([name for name in MAKERS if name != "dataset"]).map(lambda name: MAKERS[name](items))
    names = st.text(max_size=3)
    inputs = data.draw(st.recursive(column, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3)))

    def there_and_back(state: PartialState, inputs: Any, padding: bool) -> Any:
        with state.split_between_processes(inputs, padding) as mine:
            return gather_for_results(mine, len_of(inputs))

    for back in three(there_and_back, inputs, padding):
        assert same(inputs, back) or _ranges_as_lists(inputs) == _ranges_as_lists(back)


test_identity_on_anything = settings(max_examples=20)(given(data=st.data())(identity_on_anything))
test_identity_on_anything_for_long = pytest.mark.soak(
    settings(max_examples=300)(given(data=st.data())(identity_on_anything))
)


def _ranges_as_lists(thing: Any) -> Any:
    if isinstance(thing, dict):
        return {name: _ranges_as_lists(item) for name, item in thing.items()}
    if hasattr(thing, "tolist"):
        return thing.tolist()
    if isinstance(thing, BatchEncoding):
        return _ranges_as_lists(dict(thing))
    return list(thing)


def test_gather_joins_in_order_whatever_the_lengths(ranks: Ranks) -> None:
    def collect(state: PartialState) -> tuple[Any, ...]:
        rank = state.process_index
        rows = torch.full((rank % 3, 2), rank, dtype=torch.float16)
        nested = {"x": [torch.tensor(rank)], "y": (torch.tensor([rank > 0]), torch.arange(rank) + 1j)}
        words = [f"{rank}{letter}" for letter in "ab"[: rank % 3]]
        return gather(rows), gather(nested), gather_object(words)

    n = ranks.size
    for rows, nested, words in ranks(collect):
        assert rows.tolist() == [[rank, rank] for rank in range(n) for _ in range(rank % 3)]
        assert rows.dtype == torch.float16
        assert nested["x"][0].tolist() == list(range(n)) and nested["y"][0].tolist() == [rank > 0 for rank in range(n)]
        assert nested["y"][1].tolist() == [complex(i, 1) for rank in range(n) for i in range(rank)]
        assert words == [f"{rank}{letter}" for rank in range(n) for letter in "ab"[: rank % 3]]


def test_gather_refuses_what_does_not_fit_together(three: Ranks) -> None:
    def shapes(state: PartialState) -> None:
        gather(torch.zeros(2, 3 + (state.process_index == 2)))

    def dtypes(state: PartialState) -> None:
        gather({"a": torch.zeros(1, dtype=torch.float16 if state.process_index else torch.float32)})

    def objects(state: PartialState) -> None:
        gather({"a": ["x"]})

    def no_list(state: PartialState) -> None:
        gather_object("abc")  # type: ignore[arg-type]

    for function, said in (
        (shapes, "process 2 has"), (dtypes, "torch.float16"), (objects, r"['a'][0] is a str"), (no_list, "in a list"),
    ):  # fmt: skip
        answers = three.tries(function)
        assert all(not fine and said in text for fine, text in answers), answers
    assert three(lambda state: state.process_index) == [0, 1, 2], "the group still works"


def test_results_that_are_lost_or_doubled_are_an_error(three: Ranks) -> None:
    def lose(state: PartialState, change: int) -> list[int]:
        with state.split_between_processes(list(range(7))) as mine:
            return gather_for_results((mine * 2)[: len(mine) + change * (state.process_index == 1)], 7)

    def disagree(state: PartialState) -> None:
        gather_for_results([1], 3 if state.process_index else 4)

    assert three(lose, 0) == [list(range(7))] * 3
    for change in (-1, 2):
        for fine, text in three.tries(lose, change):
            assert not fine and f"process 1 has {2 + change}" in text and "[3, 2, 2]" in text
    for fine, text in three.tries(disagree):
        assert not fine and "[3, 4] items" in text


def test_main_process_first_and_only(ranks: Ranks, tmp_path: Any) -> None:
    def order(state: PartialState, folder: str) -> tuple[Any, ...]:
        path = f"{folder}/{state.num_processes}"
        with state.main_process_first():
            found = os.path.exists(path)
            open(path, "a").close()
        state.wait_for_everyone()
        with state.local_main_process_first():
            pass

        @state.on_main_process
        def once() -> int:
            """Only one."""
            return 5

        last = state.on_last_process(lambda: True)()
        return found, once(), once.__name__, state.on_local_main_process(lambda x: x)(3), last

    for rank, answer in enumerate(ranks(order, str(tmp_path))):
        last = True if rank == ranks.size - 1 else None
        assert answer == (rank > 0, None if rank else 5, "once", None if rank else 3, last)


def test_an_error_in_the_first_process_leaves_no_other_waiting(three: Ranks) -> None:
    def fail(state: PartialState) -> None:
        with state.main_process_first():
            if state.is_main_process:
                raise OSError("no such model")

    answers = three.tries(fail)
    assert [fine for fine, _ in answers] == [False, True, True] and "no such model" in answers[0][1]


def test_a_process_that_dies_is_an_error_for_the_others() -> None:
    group = Ranks(3)

    def die(state: PartialState) -> None:
        if state.process_index == 1:
            os._exit(1)
        gather_object([1])

    group.send(die)
    for rank in (0, 2):
        assert group.pipes[rank].poll(20)
        fine, text = cloudpickle.loads(group.pipes[rank].recv_bytes())
        assert not fine and ProcessLost.__name__ in text
        assert f"process {rank} of 3 cannot finish gather_object: another process has ended" in text
    for process in group.processes:
        process.kill()


def test_a_process_that_does_not_come_is_an_error_in_time() -> None:
    group = Ranks(2)

    def late(state: PartialState) -> None:
        state.destroy()
        other = PartialState(timeout=1)
        if other.process_index == 0:
            other.wait_for_everyone()
        else:
            time.sleep(2)

    port = str(free_port())  # a second group of the same processes needs a store of its own
    group(lambda state, port: os.environ.update(MASTER_PORT=port), port)
    answers = group.tries(late)
    assert [fine for fine, _ in answers] == [False, True] and "cannot finish wait_for_everyone" in answers[0][1]
    for process in group.processes:
        process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Unlaunched, and launched badly


def test_unlaunched_is_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    state = PartialState(cpu=True)
    assert (state.process_index, state.num_processes) == (0, 1) and state.is_main_process and state.is_last_process
    assert repr(state) == "PartialState(process 0 of 1, cpu)"
    state.wait_for_everyone()
    state.print("hello", end="!")
    assert capsys.readouterr().out == "hello!"
    with split_between_processes(range(3)) as mine:
        assert mine == range(3)
    assert gather_for_results([1, 2], 2) == [1, 2] and gather(torch.tensor(1)).tolist() == [1]
    with pytest.raises(ValueError, match="one result for each input"):
        gather_for_results([1, 2], 3)
    state.destroy()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK and MASTER_ADDR and MASTER_PORT is not"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "start the script with `bigkit launch`"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 'x'"),
    ],
)
def test_half_a_launch_is_refused(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=said):
        PartialState()


def test_the_hook_on_uncaught_errors_is_there_only_while_a_launcher_waits() -> None:
    before = sys.excepthook
    state = PartialState(cpu=True)
    assert sys.excepthook is before, "a single process is left alone"
    state.destroy()
    assert sys.excepthook is before

    def joined(state: PartialState, port: str) -> list[bool]:
        state.destroy()
        before = sys.excepthook
        os.environ.update(MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
        state = PartialState(cpu=True)
        hooks = [sys.excepthook is before]
        PartialState(cpu=True)
        state.destroy()
        return [*hooks, sys.excepthook is before]

    group = Ranks(1)
    assert group(joined, str(free_port())) == [[False, True]]
    group.close()


def test_a_call_outside_the_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    for call in (lambda: gather(torch.ones(1)), lambda: gather_object([1]), lambda: gather_for_results([1], 1)):
        with pytest.raises(RuntimeError, match="process 1 of 3 called gather.* outside the group"):
            call()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="process 1 of this host has no GPU: there are 1"):
        PartialState()


def test_public_names_need_no_torch_until_used() -> None:
    code = "import bigkit, bigkit.distributed.shares, sys; print('torch' in sys.modules, bigkit.PartialState.__name__)"
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert said == "False PartialState\n"
    assert {"PartialState", "gather", "split_between_processes", "notebook_launcher"} <= set(bigkit.__all__)


# ---------------------------------------------------------------------------------------------------------------------
# Side by side with Accelerate


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


def test_same_padded_tensors_and_gathers_as_accelerate() -> None:
    group = Ranks(2)

    def both(state: PartialState) -> list[bool]:
        from accelerate import PartialState as Other
        from accelerate.utils import gather as their_gather
        from accelerate.utils import gather_object as their_gather_object

        other = Other(cpu=True)
        found = [(other.process_index, other.num_processes) == (state.process_index, state.num_processes)]
        for n in (1, 3, 4, 5):
            rows = torch.arange(2 * n).view(n, 2)
            with state.split_between_processes(rows, True) as ours, other.split_between_processes(rows, True) as mine:
                found += [torch.equal(ours, mine), torch.equal(gather(ours), their_gather(mine))]
            found.append(gather_object(ours.tolist()) == their_gather_object(mine.tolist()))
        found.append(torch.equal(gather(torch.tensor(3)), their_gather(torch.tensor(3))))
        return found

    assert all(all(found) for found in group(both))
    group.close()


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


def test_accelerate_aborts_on_uneven_gathers_and_waits_after_errors() -> None:
    group = Ranks(2)

    def uneven(state: PartialState) -> None:
        from accelerate import PartialState as Other
        from accelerate.utils import gather as their_gather

        rows = torch.zeros(1 + state.process_index)
        assert len(gather(rows)) == 3, "ours"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it says when it aborts
        Other(cpu=True)
        their_gather(rows)

    group.send(uneven)
    assert multiprocessing.connection.wait([process.sentinel for process in group.processes], 20)
    time.sleep(0.1)
    assert any(process.exitcode not in (0, None) for process in group.processes)
    for process in group.processes:
        process.kill()

    group = Ranks(2)

    def fails(state: PartialState, theirs: bool) -> float:
        from accelerate import PartialState as Other

        first = Other(cpu=True) if theirs else state
        start = time.monotonic()
        try:
            with first.main_process_first():
                if state.is_main_process:
                    raise OSError("no such model")
        except OSError:
            time.sleep(1)  # busy with something else
            if theirs:
                state.wait_for_everyone()
        return time.monotonic() - start

    assert group(fails, False)[1] < 0.9 < group(fails, True)[1]
    group.close()
