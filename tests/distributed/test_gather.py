"""Splitting and gathering is the identity, in real groups of processes and side by side with Accelerate."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from bigkit.distributed.gather import gather, gather_for_results, gather_object
from bigkit.distributed.split import len_of
from bigkit.distributed.state import PartialState
from tests.distributed.inputs import MAKERS, same
from tests.ranks import Ranks


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


def test_accelerates_other_operations(three: Ranks) -> None:
    def operate(state: PartialState) -> dict[str, Any]:
        from bigkit.accelerate import utils
        from bigkit.accelerate.logging import get_logger

        rank = state.process_index
        own = torch.full((2,), float(rank))
        objects = [rank, "x"]
        padded = utils.pad_across_processes({"a": torch.ones(1, rank + 1)}, dim=1, pad_index=9, pad_first=True)["a"]
        get_logger("ranks").warning("in order", in_order=True)
        return {
            "broadcast": utils.broadcast({"a": own}, 2)["a"].tolist(),
            "objects": utils.broadcast_object_list(objects, 1) == objects == [1, "x"],
            "sum": utils.reduce(own, "sum").tolist(),
            "mean": utils.reduce([own])[0].tolist(),
            "padded": padded.tolist()[0],
            "dicts": utils.gather_object({"rank": rank}),
        }

    for rank, found in enumerate(three(operate)):
        assert found == {
            "broadcast": [2.0, 2.0],
            "objects": True,
            "sum": [3.0, 3.0],
            "mean": [1.0, 1.0],
            "padded": [9.0] * (2 - rank) + [1.0] * (rank + 1),
            "dicts": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        }
