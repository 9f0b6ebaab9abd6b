"""Saving: there and back, over other checkpoints, on full disks, and killed at any moment."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bigkit import disk_offload
from bigkit.checkpoints.format import Checkpoint
from bigkit.checkpoints.index import INDEX, PICKLE, PICKLE_INDEX, SINGLE
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.checkpoints.state_dict import load_state_dict
from bigkit.checkpoints.write import write_safetensors
from tests import forked
from tests.checkpoints.nets import Net, empty, same


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["10GB", "3KB", 1])
def test_round_trip(tmp_path, safe, size):
    model, again = Net(), empty()
    save_model(model, tmp_path, size, safe)
    report = load_checkpoint_in_model(again, tmp_path, strict=True)
    assert report.clean and same(model, again)
    assert again.head.weight is again.embed.weight and isinstance(again.scale, nn.Parameter)
    names = {file.name for file in tmp_path.iterdir()}
    if size == "10GB":
        assert names == {SINGLE if safe else PICKLE}
    else:
        assert (INDEX if safe else PICKLE_INDEX) in names and not any(name.startswith(".") for name in names)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    st.integers(1, 400),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, *FLOAT8]),
)
def test_any_tensors_in_any_shards_come_back(tmp_path_factory, shapes, size, dtype):
    folder = tmp_path_factory.mktemp("any")

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            for i, shape in enumerate(shapes):
                self.register_buffer(f"t{i}", torch.ones(shape).mul(i).to(dtype))

    save_model(Bag(), folder, size)
    again = Bag()
    for name in list(again._buffers):
        again._buffers[name] = torch.zeros_like(again._buffers[name], dtype=torch.uint8).to(dtype)
    assert load_checkpoint_in_model(again, folder, strict=True).clean
    for name, tensor in Bag().named_buffers():
        assert again._buffers[name].dtype == dtype and torch.equal(tensor.float(), again._buffers[name].float())


def test_files_are_those_that_the_safetensors_library_writes(tmp_path):
    save_model(Net(), tmp_path)
    save_file(load_file(tmp_path / SINGLE), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_index_is_the_one_that_transformers_writes(tmp_path):
    save_model(Net(), tmp_path, "2KB")
    index = json.loads((tmp_path / INDEX).read_text())
    held = {name: file.name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held and "head.weight" not in held
    assert index["metadata"]["total_size"] == sum(t.nbytes for n, t in Net().state_dict().items() if n != "head.weight")


FORMATS = [("10GB", True), ("1KB", True), ("10GB", False), ("1KB", False)]


@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_a_new_checkpoint_replaces_an_old_one_of_its_format(tmp_path, before, after):
    (tmp_path / "config.json").write_text("{}")
    old, model, again = Net(), Net(), empty()
    save_model(old, tmp_path, *before)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if (before[1], after[1]) == (True, False):  # it would be there, and nobody would read it
        with pytest.raises(ValueError, match="is read before pickles: remove it, or save elsewhere"):
            save_model(model, tmp_path, *after)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
        return
    save_model(model, tmp_path, *after)
    assert load_checkpoint_in_model(again, tmp_path, strict=True).clean and same(model, again)
    files_now = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    new = {file.name for file in Checkpoint.open(tmp_path).files} | ({INDEX, PICKLE_INDEX} & files_now.keys())
    if before[1] == after[1]:
        assert files_now.keys() == new | {"config.json"} and len(new & {SINGLE, INDEX, PICKLE, PICKLE_INDEX}) == 1
    else:
        assert files.items() <= files_now.items()  # pickles stay


def test_files_that_are_not_of_the_old_checkpoint_stay(tmp_path):
    """Other formats, other models, and shards that no index names."""
    foreign = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.safetensors", "model.onnx",
               "model-00001-of-00007.safetensors", "consolidated-00001-of-00002.safetensors", "notes.txt"]  # fmt: skip
    for name in foreign:
        (tmp_path / name).write_text(name)
    for size in ("1KB", "10GB", "1KB", "2KB"):
        save_model(Net(), tmp_path, size)
        assert {name: (tmp_path / name).read_text() for name in foreign} == {name: name for name in foreign}
    save_model(Net(), tmp_path, "10GB")
    assert {file.name for file in tmp_path.iterdir()} == {*foreign, SINGLE}


def test_a_broken_index_and_shards_of_a_killed_save_are_replaced(tmp_path):
    (tmp_path / INDEX).write_text("{")
    (tmp_path / "model.v3-00001-of-00002.safetensors").write_text("")
    save_model(Net(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]


def test_dtypes_without_a_name_are_refused_before_anything_is_written(tmp_path):
    model = nn.Module()
    model.waves = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    message = "'waves' is complex128, which safetensors files cannot hold: convert it first"
    with pytest.raises(ValueError, match=message):
        save_model(model, tmp_path / "new")
    with pytest.raises(ValueError, match=message):
        disk_offload(model, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not model.waves.is_meta
    save_model(model, tmp_path, safe_serialization=False)
    assert torch.load(tmp_path / PICKLE)["waves"].dtype == torch.complex128


def test_a_lazily_conjugated_tensor_is_saved_with_its_values(tmp_path):
    model = nn.Module()
    model.register_buffer("waves", torch.randn(3, dtype=torch.complex64).conj())
    model.register_buffer("imaginary", model.waves.imag)
    for safe in (True, False):
        save_model(model, tmp_path / str(safe), safe_serialization=safe)
        state = load_state_dict(tmp_path / str(safe))
        assert torch.equal(state["waves"], model.waves) and torch.equal(state["imaginary"], model.imaginary)


def test_meta_and_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'scale', 'embed.weight'.* on meta"):
        save_model(empty(), tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        save_model(Net(), tmp_path / "file")
    with pytest.raises(ValueError, match="at least one byte"):
        save_model(Net(), tmp_path, 0)


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = Net()
    save_model(old, tmp_path, "1KB")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write_safetensors(*arguments)

    monkeypatch.setattr("bigkit.checkpoints.save.write_safetensors", full)
    with pytest.raises(OSError, match="No space left on device.*untouched"):
        save_model(Net(), tmp_path, "1KB")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("U", (), {"free": 10})())
    with pytest.raises(OSError, match="no room for the checkpoint"):
        save_model(Net(), tmp_path, "1KB")


@pytest.mark.parametrize("safe", [True, False])
def test_a_file_that_cannot_grow_leaves_the_old_checkpoint(tmp_path, safe):
    """What a full disk does to the libraries that write: here the limit is one of the process."""
    import resource

    old = Net()
    save_model(old, tmp_path, "1KB", safe)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not save to .*model.*untouched"):
            save_model(nn.Linear(2000, 1000), tmp_path, safe_serialization=safe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


TOUCHES_DISK = ("open", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "chmod")


def filled(value):
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(2)])
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    return net


def save_and_die(folder, size, point):
    """Save in a child that kills itself before the given call that touches the disk; whether it got there."""
    child = os.fork()
    if child == 0:
        steps = iter(range(10**6))

        def traced(real):
            def stepped(*arguments, **options):
                if next(steps) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return stepped

        try:
            for name in TOUCHES_DISK:
                setattr(os, name, traced(getattr(os, name)))
            save_model(filled(2.0), folder, size)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_saver_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """SIGKILL before every call that touches the disk, over three kinds of saves."""
    killed, seen = 0, set()
    for old_size, new_size in (("1200", "1200"), ("1GB", "1200"), ("1200", "1GB")):
        for point in range(10**6):
            folder = tmp_path / f"{old_size}-{new_size}-{point}"
            save_model(filled(1.0), folder, old_size)
            died = save_and_die(folder, new_size, point)
            again = filled(0.0)
            assert load_checkpoint_in_model(again, folder, strict=True).clean
            values = {float(parameter.detach().unique()) for parameter in again.parameters()}
            assert len(values) == 1 and values <= {1.0, 2.0}, (point, values)
            seen |= values
            save_model(filled(3.0), folder, new_size)  # the next save clears up what the dead one left
            assert not list(folder.glob(".saving-*"))
            if not died:
                break
            killed += 1
    assert killed >= 25 and seen == {1.0, 2.0}


def test_saving_while_a_model_uses_the_old_pages(tmp_path):
    save_model(Net(), tmp_path, "1KB")
    user = empty()
    load_checkpoint_in_model(user, tmp_path)
    before = {name: tensor.clone() for name, tensor in user.state_dict().items()}
    save_model(Net(), tmp_path, "1KB")
    assert all(torch.equal(before[name], tensor) for name, tensor in user.state_dict().items())


def stack():
    return nn.Sequential(*[nn.Linear(20, 20, bias=False) for _ in range(6)])


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("sizes", [["2KB"] * 4, ["2KB", "10GB", "3KB", "10GB"], ["10GB"] * 4])
def test_several_writers_of_one_folder_take_turns(tmp_path, monkeypatch, safe, sizes):
    from bigkit.checkpoints import save

    def slowly(*arguments, put_in_place=save._put_in_place):
        time.sleep(0.02)
        put_in_place(*arguments)
        time.sleep(0.02)

    monkeypatch.setattr(save, "_put_in_place", slowly)
    save_model(stack(), tmp_path, safe_serialization=safe)
    models = [stack() for _ in sizes]
    with ThreadPoolExecutor(len(sizes)) as pool:
        done = [pool.submit(save_model, model, tmp_path, size, safe) for model, size in zip(models, sizes)]
        for saved in done:
            saved.result()
    state, files = load_state_dict(tmp_path), {file.name for file in tmp_path.iterdir()}
    assert any(all(torch.equal(state[name], own) for name, own in model.state_dict().items()) for model in models)
    assert files == {file.name for file in Checkpoint.open(tmp_path).files} | (files & {INDEX, PICKLE_INDEX})


RANKS = """
import os, sys, torch
from torch import nn
from bigkit import load_state_dict, save_model
torch.set_num_threads(1)
model = nn.Sequential(*[nn.Linear(200, 200, bias=False) for _ in range(6)])
for _ in range(12):
    ranks = []
    for _ in range(4):
        rank = os.fork()
        if not rank:
            save_model(model, sys.argv[1], 160_010)
            os._exit(0)
        ranks.append(rank)
    assert all(os.waitpid(rank, 0)[1] == 0 for rank in ranks)
    state = load_state_dict(sys.argv[1])
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_process_of_a_launch_may_save(tmp_path):
    done = forked.run(RANKS, tmp_path)
    assert done.returncode == 0, done.stderr


def compiled_within(model):
    model[0] = torch.compile(model[0], backend="eager")
    return model


WRAPPERS = [
    lambda model: torch.compile(model, backend="eager"),
    nn.DataParallel,
    compiled_within,
    lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    checkpoint_wrapper,
]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("safe", [True, False])
def test_a_wrapped_model_is_saved_and_loaded_under_plain_names(tmp_path, wrap, safe):
    wrapped = wrap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    save_model(wrapped, tmp_path / "a", safe_serialization=safe)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_checkpoint_in_model(plain, tmp_path / "a", strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters()))
    again = wrap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    load_checkpoint_in_model(again, tmp_path / "a", strict=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters()))
    save_file(dict(wrapped.state_dict()), tmp_path / "own names.safetensors")  # as training loops write them
    load_checkpoint_in_model(again, tmp_path / "own names.safetensors", strict=True)
