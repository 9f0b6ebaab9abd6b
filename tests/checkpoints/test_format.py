"""Files of checkpoints: against the safetensors library, and with every fault."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from bigkit.checkpoints.format import INDEX, PICKLE, SINGLE, Checkpoint, CheckpointError, read_header
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from tests.checkpoints.nets import Net, empty


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_model(Net(), folder, "2KB")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def broken_checkpoints_give_one_clear_error(tmp_path_factory, good, data):
    """Flipped, cut, inserted and swapped bytes, in headers, indexes and data: right values or CheckpointError."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    files = dict(good)
    victim = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[victim])
    header = 8 + int.from_bytes(content[:8], "little") if victim.endswith("safetensors") else len(content)
    place = data.draw(st.integers(0, min(header, len(content)) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "length", "missing", "digits", "text"]))
    if kind == "flip":
        content[place] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "length":
        content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    elif kind == "digits":
        digits = [i for i in range(header) if chr(content[i]).isdigit()]
        content[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0123456789-.e")))
    elif kind == "text":
        old = data.draw(
            st.sampled_from([b"F32", b"shape", b"data_offsets", b"weight_map", b".safetensors", b"model", b"["])
        )
        new = data.draw(
            st.sampled_from([b"F16", b"../../x", b"/etc/passwd", b"null", b"{", b"I64", b"{}", b"[[", b"\\u0000"])
        )
        content = bytearray(bytes(content).replace(old, new, 1))
    files[victim] = bytes(content)
    for name, body in files.items():
        if kind != "missing" or name != victim:
            (folder / name).write_bytes(body)
    model = empty()
    try:
        report = load_checkpoint_in_model(model, folder)
    except (CheckpointError, FileNotFoundError) as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        assert all(parameter.is_meta for parameter in model.parameters())
        return
    for name, tensor in model.state_dict().items():
        assert name in report.missing or tensor.is_meta or tensor.sum() is not None
    assert isinstance(str(report), str)


BROKEN = given(data=st.data())
test_broken_checkpoints = settings(max_examples=250)(BROKEN(broken_checkpoints_give_one_clear_error))
test_broken_checkpoints_for_long = pytest.mark.soak(
    settings(max_examples=10_000)(BROKEN(broken_checkpoints_give_one_clear_error))
)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 300)))
def test_random_bytes_are_no_safetensors_file(tmp_path_factory, body, length):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes((length.to_bytes(8, "little") if length is not None else b"") + body)
    try:
        theirs = set(load_file(path))
    except Exception:
        theirs = None
    try:
        ours = set(read_header(path))
    except CheckpointError:
        ours = None
    assert ours == theirs or theirs is None


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "F99", 7]),
        "shape": st.one_of(st.lists(st.integers(-1, 4), max_size=2), st.just("x"), st.just([2**63])),
        "data_offsets": st.one_of(st.lists(st.integers(-4, 40), min_size=2, max_size=2), st.just([0]), st.just(None)),
    }
)


def whatever_we_accept_the_library_reads_alike(tmp_path_factory, header, size):
    path = tmp_path_factory.getbasetemp() / "entries.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(size)))
    try:
        ours = Checkpoint.open(path)
    except CheckpointError:
        return
    theirs = load_file(path)
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours.read(name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


HEADER = given(header=st.dictionaries(st.sampled_from(["a", "b", "c"]), ENTRY, max_size=3), size=st.integers(0, 40))
test_whatever_we_accept = settings(max_examples=500)(HEADER(whatever_we_accept_the_library_reads_alike))
test_whatever_we_accept_for_long = pytest.mark.soak(
    settings(max_examples=20_000)(HEADER(whatever_we_accept_the_library_reads_alike))
)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x.bin", "", 7, None, "x.txt", "C:x.bin", "a\\b.bin"]
)
def test_an_index_cannot_point_out_of_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(CheckpointError, match="weight"):
        Checkpoint.open(tmp_path)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/bigkit-evil",))


def test_pickles_run_no_code(tmp_path):
    Path("/tmp/bigkit-evil").unlink(missing_ok=True)
    torch.save({"weight": Evil()}, tmp_path / PICKLE)
    with pytest.raises(CheckpointError, match="cannot be loaded|can be loaded safely"):
        load_checkpoint_in_model(nn.Linear(2, 2), tmp_path)
    assert not Path("/tmp/bigkit-evil").exists()


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        Checkpoint.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        Checkpoint.open(tmp_path / "x.safetensors")
    for name in "ab":
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several files and no index"):
        Checkpoint.open(tmp_path)


def test_safetensors_come_before_pickles(tmp_path):
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / PICKLE)
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / SINGLE)
    model = nn.Linear(2, 2)
    load_checkpoint_in_model(model, tmp_path)
    assert model.weight.sum() == 4
