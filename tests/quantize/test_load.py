"""Loading quantized models and quantizing loaded ones, on the CPU: in memory, from files, offloaded, interrupted."""

import copy
import json
import os
import re
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import bigkit
from bigkit import (
    load_and_quantize_model,
    save_model,
)
from bigkit.model.precision import QUANTIZATIONS, quantized_bytes
from bigkit.quantize import load
from bigkit.quantize.bnb import (
    nbytes,
    take_apart,
)
from bigkit.units import format_bytes
from bigkit.zoo.gpt import GPT, PYGPT, GPTConfig
from tests import forked
from tests.quantize.helpers import (
    CPU,
    KINDS,
    MAPS,
    config,
    empty,
    every_kind,
    four,
    llama,
    run,
    small,
    states_equal,
    tokens,
)

bnb = pytest.importorskip("bitsandbytes")


@every_kind
def test_quantizing_in_place_gives_the_same(saved, kind):
    model, folder = saved
    made = config(kind, keep_in_fp32_modules=["ln_f"], torch_dtype="bf16")
    streamed = load_and_quantize_model(empty(), made, folder, CPU)
    in_place = load_and_quantize_model(copy.deepcopy(model), made, device_map=CPU)
    assert not states_equal(streamed, in_place)
    assert streamed.transformer["ln_f"].weight.dtype == torch.float32
    assert streamed.transformer["h"][0].mlp.c_fc.bias.dtype == torch.bfloat16
    assert type(streamed.lm_head) is nn.Linear and streamed.lm_head.weight.dtype == torch.bfloat16


def test_pickled_checkpoints_too(saved, tmp_path):
    model, folder = saved
    save_model(model, tmp_path / "pickled", safe_serialization=False)
    ours = load_and_quantize_model(empty(), config("nf4"), tmp_path / "pickled", CPU)
    assert not states_equal(ours, load_and_quantize_model(empty(), config("nf4"), folder, CPU))


def test_one_tensor_at_a_time(saved, monkeypatch):
    """Whenever the next weight is read, the one before is gone."""
    from bigkit.quantize import load as quantize

    _, folder = saved
    stream, alive = quantize.stream_tensors, []

    def watched(*arguments):
        for name, tensor in stream(*arguments):
            assert not [ref for ref in alive if ref() is not None], name
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    monkeypatch.setattr(quantize, "stream_tensors", watched)
    for kind in ("int8", "nf4"):
        alive.clear()
        load_and_quantize_model(empty(), config(kind, torch_dtype="fp16"), folder, CPU)
        assert len(alive) == 8


PEAK = """
import sys, torch, json
from torch import nn
from bigkit import *
import bitsandbytes
def now(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024
made = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="fp16")
load_and_quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(1, 1)), made, device_map={"": "cpu"})
with init_empty_weights():
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(8)], nn.Linear(1, 1))
open("/proc/self/clear_refs", "w").write("5")
before = now("VmHWM")
load_and_quantize_model(model, made, sys.argv[1], {"": "cpu"})
print(now("VmHWM") - before)
"""


def test_peak_is_the_quantized_model_and_one_tensor(tmp_path):
    """8 weights of 8 MiB (float16) become 2.25 MiB each; the whole process is watched, mapped files included."""
    for i in range(8):
        save_file({f"{i}.weight": torch.randn(2048, 2048).half()}, tmp_path / f"{i}.safetensors")
    save_file({"8.weight": torch.ones(1, 1).half(), "8.bias": torch.ones(1).half()}, tmp_path / "8.safetensors")
    files = {f"{i}.weight": f"{i}.safetensors" for i in range(9)} | {"8.bias": "8.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    weight, quantized_weight = 2**23, quantized_bytes((2048, 2048), "nf4", 2048)
    # A freed tensor goes back to the system at once. By default the C library learns to keep some for the next one, up
    # to 64 MiB and not in each run: what it keeps says nothing about what was held.
    quiet = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    code = [sys.executable, "-c", PEAK, tmp_path]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, env=quiet)
    assert done.returncode == 0, done.stderr
    assert 8 * quantized_weight <= int(done.stdout) + weight
    assert int(done.stdout) < 8 * quantized_weight + 2 * weight + 2**24


@every_kind
def test_resident_memory_counts_all_of_a_quantized_weight(four_saved, kind):
    """A budget of exactly two blocks keeps two; a byte less keeps one."""
    folder, _ = four_saved
    blocks_away = {name: "cpu" if ".h." in name else 0 for name in MAPS["mixed"]}
    plain = load_and_quantize_model(empty(four), config(kind), folder / "full", CPU)
    block = sum(nbytes(parameter) for parameter in plain.transformer["h"][0].parameters())
    codes = sum(parameter.nbytes for parameter in plain.transformer["h"][0].parameters())
    assert block > codes
    for budget, count in ((2 * block, 2), (2 * block - 1, 1)):
        away = load_and_quantize_model(
            empty(four), config(kind), folder / "full", blocks_away, stand_in={0: "cpu"}, resident_memory=budget
        )
        names = {name for name, device in away.hf_device_map.items() if device == 0}
        assert sum(name.startswith("transformer.h.") for name in names) == count


@given(kind=st.sampled_from(QUANTIZATIONS), outputs=st.integers(1, 70), inputs=st.integers(1, 300), bias=st.booleans())
def test_planned_sizes_are_what_is_held(kind, outputs, inputs, bias):
    model = nn.Sequential(nn.Linear(inputs, outputs, bias), nn.Linear(outputs, 3))
    planned = bigkit.plan(model, {"cpu": "1GB"}, dtype="float32", quantization=kind)
    load_and_quantize_model(model, config(kind), device_map=CPU)
    held = nbytes(model[0].weight)
    parts = take_apart(model[0].weight).values()
    assert sum(part.untyped_storage().nbytes() for part in parts) == sum(part.nbytes for part in parts) <= held
    assert quantized_bytes((outputs, inputs), kind, outputs) == held
    rest = [*model[1].parameters(), *([model[0].bias] if bias else [])]
    assert planned.used["cpu"] == held + sum(tensor.nbytes for tensor in rest)


@every_kind
def test_maps_by_name_are_planned_with_true_sizes(saved, kind):
    """The model fits to the byte; with a byte less it does not. Kept modules count at their own dtype."""
    _, folder = saved
    made = config(kind, keep_in_fp32_modules=["ln_f"], skip_modules=["lm_head", "c_fc"], torch_dtype="bf16")
    model = load_and_quantize_model(empty(), made, folder, CPU)
    held = sum(map(nbytes, model.parameters()))
    fits = load_and_quantize_model(empty(), made, folder, "auto", max_memory={"cpu": held, "disk": 0})
    assert fits.hf_device_map == CPU and not states_equal(fits, model)
    with pytest.raises(bigkit.PlanError, match="RAM lacks 1 B"):
        load_and_quantize_model(empty(), made, folder, "auto", max_memory={"cpu": held - 1, "disk": 0})


@every_kind
@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("stored", ["full", "quantized"])
def test_offloaded_is_bit_equal(four_saved, kind, where, stored):
    folder, saved_as = four_saved
    model = saved_as(kind)
    expected = run(model)
    offload = folder / "offload"
    away = load_and_quantize_model(
        empty(four), config(kind), folder / (kind if stored == "quantized" else "full"), MAPS[where],
        offload_folder=offload, stand_in={0: "cpu"},
    )  # fmt: skip
    assert away.hf_device_map == MAPS[where]
    block = away.transformer["h"][3]
    assert "rests" in repr(block.mlp.c_fc.weight) and block.mlp.c_fc.weight.dtype != torch.float32
    for _ in range(3):
        assert torch.equal(run(away), expected)
    assert "rests" in repr(block.mlp.c_fc.weight)
    save_model(away, folder / "again", "60KB")  # what rests elsewhere is saved from there
    assert not states_equal(load_and_quantize_model(empty(four), config(kind), folder / "again", CPU), model)
    assert torch.equal(run(away), expected)
    bigkit.remove_hook_from_module(away, recurse=True)
    assert torch.equal(run(away), expected) and not states_equal(away, model)


@every_kind
def test_models_of_transformers_generate_offloaded(kind):
    torch.manual_seed(0)
    model = llama()
    away = load_and_quantize_model(
        copy.deepcopy(model), config(kind), device_map={"model": "cpu", "lm_head": 0}, stand_in={0: "cpu"}
    )
    model = load_and_quantize_model(model, config(kind), device_map=CPU)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(away.generate(tokens(), **options), model.generate(tokens(), **options))
    assert "rests in RAM" in repr(away.model.layers[1].mlp.up_proj.weight)


@every_kind
def test_only_quantized_bytes_travel(four_saved, kind):
    folder, _ = four_saved
    away = load_and_quantize_model(empty(four), config(kind), folder / "full", MAPS["RAM"], stand_in={0: "cpu"})
    moved = []
    streamer = away.transformer["h"][0].mlp.c_fc.weight.streamer
    streamer.listeners.append(lambda event: moved.append((event.unit, event.nbytes)) if event.kind == "fetch" else None)
    run(away)
    run(away)
    per_block = [size for unit, size in moved if unit.startswith("transformer.h.")]
    whole = sum(tensor.nbytes for tensor in four().transformer["h"][0].parameters())
    parts = 12 + 4 * {"int8": 2, "nf4": 2, "fp4": 2}.get(kind, 3)  # each part of a unit begins at a multiple of 512
    assert len(per_block) >= 6 and max(per_block) < whole * (0.3 if kind == "int8" else 0.2) + 512 * parts


@every_kind
def test_a_checkpoint_that_is_quantized_rests_in_its_own_files(four_saved, kind):
    folder, saved_as = four_saved
    saved_as(kind)
    offload = folder / "offload"
    away = load_and_quantize_model(
        empty(four), config(kind), folder / kind, MAPS["disk"], offload_folder=offload, stand_in={0: "cpu"}
    )
    assert not offload.exists() or not list(offload.iterdir())
    weight = away.transformer["h"][0].mlp.c_fc.weight.weight
    assert {part.source.path.parent for part in weight.parts.values()} == {(folder / kind).resolve()}


def test_what_is_written_for_disk_goes_with_the_model(four_saved):
    import gc

    folder, _ = four_saved
    offload = folder / "offload"
    with pytest.raises(ValueError, match="give an offload_folder"):
        load_and_quantize_model(empty(four), config("nf4"), folder / "full", MAPS["disk"], stand_in={0: "cpu"})
    away = load_and_quantize_model(
        empty(four), config("nf4"), folder / "full", MAPS["disk"], offload_folder=offload, stand_in={0: "cpu"}
    )
    assert list(offload.iterdir())
    run(away)
    del away
    gc.collect()
    assert not list(offload.iterdir())


@every_kind
def test_planned_maps_offload_and_stay_in_the_budget(four_saved, kind):
    """A GPU for half of the quantized blocks: an automatic map sends the others to RAM, and disk when that is full."""
    folder, saved_as = four_saved
    model = saved_as(kind)
    block = sum(map(nbytes, model.transformer["h"][0].parameters()))
    rest = sum(map(nbytes, model.parameters())) - 4 * block
    for budgets, expected in (
        ({0: rest + 3 * block, "cpu": "1GB"}, {0, "cpu"}),
        ({0: rest + 3 * block, "cpu": block}, {0, "cpu", "disk"}),
    ):
        away = load_and_quantize_model(
            empty(four), config(kind), folder / "full", "sequential", max_memory=budgets,
            offload_folder=folder / "offload", stand_in={0: "cpu"},
        )  # fmt: skip
        assert set(away.hf_device_map.values()) == expected, away.hf_device_map
        assert torch.equal(run(away), run(model))


def test_a_quantized_model_can_be_dispatched_again(four_saved):
    folder, saved_as = four_saved
    for kind in KINDS:
        model = saved_as(kind)
        expected = run(model)
        bigkit.cpu_offload(model, 0, stand_in={0: "cpu"})
        assert "rests in RAM" in repr(model.lm_head.weight)
        assert torch.equal(run(model), expected)
        bigkit.dispatch_model(model, MAPS["mixed"], offload_dir=folder / "offload", stand_in={0: "cpu"})
        assert torch.equal(run(model), expected)


def unchanged(model, before):
    """Whether a model has its layers of full precision, and computes what it did."""
    layers = [module for module in model.modules() if type(module).__name__ in ("Linear8bitLt", "Linear4bit")]
    return not layers and torch.equal(run(model), before) and not model._forward_pre_hooks


DISK = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.ln_f": "cpu",
        "transformer.h.0": "cpu", "transformer.h.1": "disk", "lm_head": "cpu"}  # fmt: skip


@every_kind
@pytest.mark.parametrize(
    ("error", "said", "options"),
    [
        (ValueError, "'transformer.h.1.*must be written to disk.*give an offload_folder", {"device_map": DISK}),
        (OSError, "could not write weights", {"device_map": DISK, "offload_folder": __file__}),
        (ValueError, "gives no device", {"device_map": {"transformer": "cpu"}}),
        (TypeError, "resident_memroy", {"device_map": CPU, "resident_memroy": 1}),
        (bigkit.PlanError, "lacks", {"device_map": "auto", "max_memory": {"cpu": 1, "disk": 0}}),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_changes(kind, error, said, options):
    model = small().eval()
    before = run(model)
    with pytest.raises(error, match=said):
        load_and_quantize_model(model, config(kind), **options)
    assert unchanged(model, before)


@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("after", range(0, 8, 3))
@pytest.mark.parametrize("where", ["memory", "checkpoint"])
def test_an_interrupt_leaves_the_model_as_it_was_or_unusable(saved, monkeypatch, kind, error, after, where):

    real, made = load.quantized, []

    def interrupted(*arguments):
        if len(made) == after:
            raise error("now")
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(load, "quantized", interrupted)
    model, folder = saved
    before = run(model)
    with pytest.raises(error, match="now"):
        load_and_quantize_model(model, config(kind), folder if where == "checkpoint" else None, CPU)
    if where == "checkpoint" or after == 0:
        assert unchanged(model, before)
    else:
        with pytest.raises(RuntimeError, match="quantizing this GPT was interrupted.*load the model again"):
            run(model)
        with pytest.raises(RuntimeError, match="interrupted"):
            model.generate(tokens()[:1, :4], 2)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("from_files", [False, True])
def test_a_model_that_could_not_be_dispatched_is_unusable(saved, monkeypatch, from_files):

    def fails(model, device_map, slots=2, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(load, "dispatch_model", fails)
    model, folder = saved
    with pytest.raises(torch.OutOfMemoryError):
        load_and_quantize_model(model, config("nf4"), folder if from_files else None, CPU)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(model)


@every_kind
def test_full_training_is_refused_with_the_reason(saved, kind):
    _, folder = saved
    model = load_and_quantize_model(empty(), config(kind), folder, CPU)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    model(tokens())
    model.train()
    with pytest.raises(RuntimeError, match="its weights are codes, which have no gradients.*Train an adapter"):
        model(tokens())
    with torch.no_grad():
        model(tokens())
    model.transformer["ln_f"].requires_grad_(True)  # a few weights of one's own choice are one's own business
    _, loss = model(tokens(), tokens())
    loss.backward()
    assert model.transformer["ln_f"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_lora_trains_on_a_quantized_model(kind, tmp_path):
    peft = pytest.importorskip("peft")

    def base():
        return load_and_quantize_model(empty(lambda: GPT(GPTConfig("pygpt"))), config(kind), PYGPT, CPU)

    def batch(generator=None):
        at = torch.randint(0, len(ids) - 33, (4,), generator=generator)
        rows = torch.stack([ids[i : i + 33] for i in at.tolist()])
        return rows[:, :-1], rows[:, 1:]

    ids = torch.tensor(list(b"for every_word in the_text:  # a house style that the model has not seen\n" * 40))
    torch.manual_seed(0)
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], init_lora_weights=True)
    )
    kinds = {type(module).__name__ for module in adapted.modules() if hasattr(module, "lora_A")}
    assert kinds == {"Linear8bitLt" if kind == "int8" else "Linear4bit"}  # peft's, around ours
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert 0 < sum(parameter.numel() for parameter in trained) < 0.05 * 8e6
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    adapted.train()
    for _ in range(10):
        x, y = batch()
        loss = adapted(x, targets=y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses
    after = model.state_dict()
    changed = [name for name, old in before.items() if not torch.equal(after[_inside(name, after)], old)]
    assert changed == []
    adapted.save_pretrained(tmp_path)
    adapted.eval()
    x, _ = batch(torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = adapted(x)[0]
        again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
        assert torch.equal(again(x)[0], expected)


def _inside(name, state):
    """The name of a tensor once peft has put its layer inside one of its own."""
    module, _, own = name.rpartition(".")
    for cut in range(len(parts := name.split(".")), 0, -1):
        wrapped = ".".join([*parts[:cut], "base_layer", *parts[cut:]])
        if wrapped in state:
            return wrapped
    return name


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None
import torch, bigkit
from torch import nn
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
made = bigkit.BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
assert bigkit.plan(model, {"cpu": "1GB"}, quantization=made.quantization).feasible
for call in (bigkit.load_and_quantize_model, bigkit.replace_with_bnb_layers):
    try:
        call(model, made)
    except ImportError as error:
        print(error)
assert type(model[0]) is nn.Linear
bigkit.save_model(model, sys.argv[1])
assert bigkit.load_checkpoint_in_model(model, sys.argv[1]).clean
"""


def test_without_bitsandbytes_the_rest_works(tmp_path):
    done = forked.run(WITHOUT, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("8-bit and 4-bit weights need bitsandbytes" in line for line in lines)
    assert "pip install" in lines[0] and "everything else in bigkit works" in lines[0]


def test_importing_bigkit_imports_no_bitsandbytes():
    code = "import sys, bigkit.quantize.load, bigkit.quantize.bnb; print('bitsandbytes' in sys.modules)"
    assert forked.run(code).stdout == "False\n"


def mixtral():
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 2}  # fmt: skip
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(4, 64, 8))
        self.up, self.head = nn.Linear(64, 64), nn.Linear(64, 8)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.conv = nn.Parameter(torch.zeros(1, 64, 64)), nn.Conv1d(8, 8, 3)
        self.up, self.head = nn.Linear(64, 64), nn.Linear(64, 8)


@pytest.mark.parametrize(
    ("make", "names", "size"), [(mixtral, None, 0), (Stacked, "'experts'", 4 * 64 * 8 * 2), (Convolutions, None, 0)]
)  # fmt: skip
def test_experts_that_are_not_quantized_are_named_with_their_bytes(make, names, size):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_and_quantize_model(make(), config("nf4", torch_dtype="fp16"), device_map=CPU)
    messages = [str(warning.message) for warning in caught if "not quantized" in str(warning.message)]
    assert len(messages) == (names is not None)
    if names:
        assert re.search(names, messages[0]) and messages[0].endswith(f"stay in float16: {format_bytes(size)}")


@pytest.mark.parametrize("again", ["the same files", "its own files", "in place"])
def test_a_model_that_is_quantized_already_is_refused_in_a_sentence(saved, tmp_path, again):
    model = load_and_quantize_model(empty(), config("int8"), saved[1], CPU)
    save_model(model, tmp_path / "quantized")
    folder = {"the same files": saved[1], "its own files": tmp_path / "quantized", "in place": None}[again]
    with pytest.raises(ValueError, match="this GPT is quantized already: .* Build it again"):
        load_and_quantize_model(model, config("int8"), folder, CPU)
    assert run(model).isfinite().all()
    if folder:
        load_and_quantize_model(empty(), config("int8"), folder, CPU)
