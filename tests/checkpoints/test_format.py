"""Files of checkpoints: against the safetensors library, and with every fault."""

import json
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from bigkit.checkpoints.format import Checkpoint, CheckpointError, read_header
from bigkit.checkpoints.index import INDEX, PICKLE, SINGLE
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from tests import forked
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what does not match
            report = load_checkpoint_in_model(model, folder)
    except (CheckpointError, FileNotFoundError) as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        assert all(parameter.is_meta for parameter in model.parameters())
        return
    for name, tensor in model.state_dict().items():
        assert name in report.missing or tensor.is_meta or tensor.sum() is not None
    assert isinstance(str(report), str)


BROKEN = given(data=st.data())
test_broken_checkpoints = settings(max_examples=150)(BROKEN(broken_checkpoints_give_one_clear_error))
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
test_whatever_we_accept = settings(max_examples=300)(HEADER(whatever_we_accept_the_library_reads_alike))
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


WRITE_ANEW = """
import sys, torch
from torch import nn
from bigkit import load_checkpoint_in_model, load_state_dict
from bigkit.checkpoints.load import Checkpoint
from bigkit.checkpoints.one_by_one import stream_tensors
how, file = sys.argv[1:]
model = nn.Sequential(*[nn.Linear(200, 200) for _ in range(3)])
torch.save(model.state_dict(), file)
if how == "into a model":
    load_checkpoint_in_model(model, file)
    tensors = model.state_dict()
elif how == "as a state dict":
    tensors = load_state_dict(file)
else:
    tensors = dict(stream_tensors(source := Checkpoint.open(file), list(source), torch.device("cpu")))
    del source
torch.save(tensors, file)
assert torch.load(file).keys() == tensors.keys()
"""


@pytest.mark.parametrize("how", ["into a model", "as a state dict", "as a stream"])
def test_a_pickle_may_be_written_anew_in_place_after_loading(tmp_path, how):
    done = forked.run(WRITE_ANEW, how, tmp_path / PICKLE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_files_of_before_pytorch_1_6_are_loaded(tmp_path, dtype, shards):
    good = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(dtype)
    state, files = good.state_dict(), [PICKLE] if shards == 1 else ["a.bin", "b.bin"]
    index = {name: files[int(name[0]) % shards] for name in state}
    for file in files:
        part = {name: tensor for name, tensor in state.items() if index[name] == file}
        torch.save(part, tmp_path / file, _use_new_zipfile_serialization=False)
    if shards > 1:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(dtype)
    load_checkpoint_in_model(model, tmp_path, strict=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [SINGLE, PICKLE, INDEX, "model.pt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer.*git lfs pull"),
        (b"\n <!DOCTYPE html><title>Not found</title>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b"", "is empty"),
    ],
)
def test_what_stands_in_the_place_of_a_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint_in_model(nn.Linear(2, 2), tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "shape", [[2**61] * 300, [2**61] * 50_000, [1] * 65, [2**61, 2**61, 0], [2**31] * 2, [2**62], [1, [2] * 50_000]]
)
def test_shapes_that_no_tensor_has_are_refused_at_once(tmp_path, shape):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="tensor 'a' in .* has the shape") as error:
        Checkpoint.open(tmp_path)
    assert time.perf_counter() - start < 2 and len(str(error.value)) < 500


@pytest.mark.parametrize("save", [torch.save, save_file])
@pytest.mark.parametrize("index", ["weight_map.index.json", "x.safetensors.index.json", "my.bin.index.json"])
def test_an_index_may_have_any_name_if_it_is_the_only_one(tmp_path, index, save):
    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    end = ".bin" if save is torch.save else ".safetensors"
    places = {name: f"part{name[0]}{end}" for name in state}
    for file in {*places.values()}:
        save({name: state[name] for name in state if places[name] == file}, str(tmp_path / file))
    (tmp_path / index).write_text(json.dumps(places))
    assert {*Checkpoint.open(tmp_path)} == {*state}
    (tmp_path / "other.index.json").write_text(json.dumps(places))
    if index == "weight_map.index.json":
        with pytest.raises(CheckpointError, match="several files and no index"):
            Checkpoint.open(tmp_path)
