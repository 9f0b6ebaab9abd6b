"""Dry runs of whole models: what fits, on one device and on several, and the figures they report."""

import gc
import json
import logging
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bigkit import init_empty_weights, plan, zoo
from bigkit.dryrun.rehearse import target_of
from bigkit.dryrun.result import KINDS
from bigkit.dryrun.run import dry_run, on_machine
from bigkit.dryrun.workload import fill
from bigkit.machine.hardware import GPUS, HARDWARE, Gpu, Hardware, machine_of
from bigkit.machine.ledger import Calibration
from bigkit.units import GiB, MiB, format_bytes
from bigkit.zoo import build, catalog
from tests.dryrun.test_fake_gpu import tiny


def gpu(memory, **fields):
    return Hardware("a small GPU", (Gpu("small", memory, 1e12, 1e14, 3e10, **fields),), 0, 0)


def test_no_garbage_is_looked_for_meanwhile():
    """PyTorch and Transformers are a million objects: looking through them took a fifth of llama-3.1-405b's time."""
    looked = []
    dry_run(lambda: looked.append(gc.isenabled()) or zoo.empty_model("pygpt"), None, 1, 8)
    assert looked == [False] and gc.isenabled()


def test_a_llama_fits_a_gpu_of_the_right_size():
    run = dry_run("llama-2-7b", None, 1, 512, 2, "RTX 4090", dtype="float16")
    weights = zoo.describe("llama-2-7b").bytes(zoo.describe("llama-2-7b").precision("float16"))
    parts = run.timeline().at_peak()
    assert 0 <= parts["weights"] - weights < 2 * MiB  # and the buffers, in float32
    assert run.fits and run.problem == ""
    assert parts["KV cache"] >= 2 * 32 * 32 * 128 * 512 * 2 and parts["workspace"] == 8 * MiB + 128 * 1024
    assert sum(parts.values()) <= run.peak_allocated[0] <= run.peak_reserved[0] < run.timeline().capacity
    assert [step.name for step in run.times] == ["prefill", "token 1", "token 2"]
    peak = format_bytes(run.peak_reserved[0])
    assert repr(run) == f"DryRun(llama-2-7b, 1 x 512 tokens, then 2 more each: fits, peak {peak})"
    assert "Fits." in str(run) and "tokens/s" in str(run)


@pytest.mark.parametrize(
    "model, dtype, machine",
    [("llama-2-7b", "float32", "RTX 4090"), ("llama-3.1-8b", "float16", "T4"), ("mixtral-8x7b", "float16", "RTX 4090")],
)
def test_a_plan_that_offloads_is_true(model, dtype, machine):
    """What is planned for a machine is not found out of memory by its rehearsal."""
    hardware = machine_of(machine)
    placed = plan(model, hardware.max_memory(), dtype=dtype, batch=1, context=513, overhead=hardware.overhead)
    run = dry_run(model, placed, 1, 512, 1, hardware)
    assert placed.offloaded and run.fits and run.peak_reserved[0] > 0.9 * run.timeline().capacity


@pytest.mark.parametrize("model, most", [("gpt2", 1024), ("opt-1.3b", 2048), ("bert-base-cased", 512), ("pygpt", 512)])
def test_more_tokens_than_learned_positions_are_refused(model, most):
    """A real GPU would stop with an assertion in a kernel; a fake one looks up nothing."""
    assert dry_run(model, None, 1, most, 0, "H200").fits
    new = 0 if model == "bert-base-cased" else 1
    with pytest.raises(ValueError, match=f"learned positions for {most:,} tokens"):
        dry_run(model, None, 1, most + 1 - new, new, "H200")


def test_a_run_that_does_not_fit_says_where():
    run = dry_run("gpt2", None, 4, 512, 0, gpu(900 * MiB), dtype="float32")
    assert not run.fits and run.problem.startswith("GPU 0 runs out of memory while weights are placed (event ")
    run = dry_run("gpt2", None, 16, 512, 0, gpu(1300 * MiB), dtype="float32")
    assert "in step 'prefill'" in run.problem and "OUT OF MEMORY" in repr(run) and "DOES NOT FIT" in str(run)


def test_the_boundary_lies_between_allocated_and_reserved():
    run = dry_run("gpt2", None, 8, 256, 2, dtype="float32")
    allocated, reserved = run.peak_allocated[0], run.peak_reserved[0]
    assert run.fails_with(0, reserved) is None
    assert run.fails_with(0, allocated - 1) is not None
    fits = [limit for limit in range(allocated, reserved, 4 * MiB) if run.fails_with(0, limit) is None]
    assert fits == [limit for limit in range(allocated, reserved, 4 * MiB) if limit >= min(fits, default=reserved)]


def test_timelines_add_up():
    run = dry_run("gpt2", None, 2, 64, 3, dtype="float32")
    line = run.timeline(0)
    assert len(line.allocated) == len(line.reserved) == len(line.kinds["weights"]) == line.marks[-1][1]
    for i in range(0, len(line.allocated), 97):
        live = sum(line.kinds[kind][i] for kind in KINDS)
        assert live <= line.allocated[i] <= line.reserved[i]
    filled = line.marks[0][1]
    assert line.step_of(filled - 1) == "fill" and line.step_of(filled) == "prefill"
    ends = dict(line.marks)
    caches = [line.kinds["KV cache"][ends[name] - 1] for name in ("prefill", "token 1", "token 3")]
    assert caches == [2 * 12 * 2 * tokens * 768 * 4 for tokens in (64, 65, 67)]


def test_several_gpus_hold_their_parts():
    spec = zoo.describe("gpt2-xl")
    placed = plan(spec, {0: "2GiB", 1: "2GiB", 2: "2GiB"}, dtype="float16", batch=2, context=300)
    run = dry_run("gpt2-xl", placed, 2, 256, 1, "4 x A100-40GB")
    for share in placed.shares:
        if share.weights:
            assert run.timeline(share.device).at_peak()["weights"] == pytest.approx(share.weights, rel=0.01)
    used = {share.device for share in placed.shares if share.weights}
    assert set(run.peak_allocated) == used and run.fits
    alone = dry_run("gpt2-xl", None, 2, 256, 1, "A100-40GB", dtype="float16")
    assert sum(run.peak_allocated.values()) < alone.peak_allocated[0] + len(used) * GiB
    copies = [operation for operation in run.operations if operation.source.startswith("cuda")]
    assert copies and {operation.source for operation in copies} <= {f"cuda:{i}" for i in used}


GPT2 = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.ln_f": 0, "lm_head": 0, "transformer.drop": 0}
LAYERS, BLOCK = 6, 7_087_872  # of GPT-2's twelve blocks: those that travel are all run; numbers in a block


def half(away):
    return {**GPT2, **{f"transformer.h.{i}": away if i % 2 else 0 for i in range(LAYERS)}}


def few_blocks(dtype="float32"):
    """GPT-2 with fewer blocks."""
    return lambda: tiny("gpt2", dtype, n_layer=LAYERS)


@cache
def run_of_few_blocks(*load, dtype="float32"):
    return dry_run(few_blocks(dtype), None, *load, "T4")


@pytest.mark.parametrize("away", ["cpu", "disk"])
def test_weights_that_travel_are_held_in_slots(away):
    block, whole = BLOCK * 4, run_of_few_blocks(1, 64, 2)
    run = dry_run(few_blocks(), half(away), 1, 64, 2, "T4")
    parts = run.timeline().at_peak()
    assert parts["slots"] == pytest.approx(2 * block, rel=0.001)
    gone = whole.timeline().at_peak()["weights"] - parts["weights"]
    assert gone == pytest.approx(LAYERS // 2 * block, rel=0.001)
    assert parts["KV cache"] == whole.timeline().at_peak()["KV cache"]
    three = dry_run(few_blocks(), half(away), 1, 64, 0, "T4", slots=3)
    assert three.timeline().at_peak()["slots"] == pytest.approx(3 * block, rel=0.001)


def test_weights_that_travel_take_the_time_of_the_link():
    whole = run_of_few_blocks(1, 8, 3)
    run, disk = (dry_run(few_blocks(), half(away), 1, 8, 3, "T4") for away in ("cpu", "disk"))
    moved = sum(o.bytes for o in run.operations[run.steps[1][1] : run.steps[2][1]] if o.name == "fill")
    assert moved == pytest.approx(LAYERS // 2 * BLOCK * 4, rel=0.001), "each token brings each block once"
    link = moved / run.rates["cuda:0"].link
    assert max(link, whole.seconds["token"]) <= run.times[2].seconds <= link + whole.seconds["token"]
    assert disk.times[2].seconds == pytest.approx(moved / disk.rates["cuda:0"].disk, rel=0.2)
    assert disk.times[2].bottleneck == "disk"
    lanes = {span.lane for span in run.spans}
    assert lanes == {"python", "cuda:0", "copy to cuda:0"}
    for lane in lanes:
        spans = [span for span in run.spans if span.lane == lane]
        assert all(a.end <= b.start + 1e-12 for a, b in zip(spans, spans[1:])), "one thing at a time"


def test_no_lane_is_busy_for_more_than_the_whole_time():
    away = {**GPT2, **{f"transformer.h.{i}": "cpu" for i in range(LAYERS)}}
    run = dry_run(few_blocks(), away, 1, 16, 0, "T4")  # the link ends on a copy for the next token
    assert sum(step.busy["copy to cuda:0"] for step in run.times) > sum(step.seconds for step in run.times)
    assert run.busy["copy to cuda:0"] == 1 and all(0 <= share <= 1 for share in run.busy.values())


def test_everything_away_and_nothing_on_a_gpu():
    run = dry_run(few_blocks(), {"": "cpu"}, 1, 16, 1, "T4")
    assert run.timeline().at_peak()["weights"] < 100_000 and run.fits
    numbers = zoo.describe("gpt2").parameters - (12 - LAYERS) * BLOCK
    assert sum(o.bytes for o in run.operations if o.name == "fill") > 2 * numbers * 4 * 0.9


def test_blocks_that_stay_on_the_gpu_need_not_travel():
    stay = LAYERS // 2 * BLOCK * 4
    every = dry_run(few_blocks(), {"": "cpu"}, 1, 16, 1, "T4")
    some = dry_run(few_blocks(), {"": "cpu"}, 1, 16, 1, "T4", resident_memory=stay)
    moved = [sum(o.bytes for o in run.operations if o.name == "fill") for run in (every, some)]
    kept = some.timeline().at_peak()["weights"] - every.timeline().at_peak()["weights"]
    assert 0.8 * stay < kept <= stay and moved[1] <= moved[0] - 1.9 * kept


def test_a_prompt_without_a_cache():
    with_cache, without = (dry_run("gpt2", None, 1, 64, 0, dtype="float16", cache=flag) for flag in (True, False))
    assert with_cache.timeline().kinds["KV cache"][-1] == 2 * 12 * 64 * 768 * 2
    assert without.timeline().kinds["KV cache"][-1] == 0


def test_gpus_and_ram_together():
    places = {**GPT2, **{f"transformer.h.{i}": (0, 1, "cpu")[i // 2] for i in range(LAYERS)}}
    run = dry_run(few_blocks(), places, 1, 16, 1, "4 x A100-40GB")
    assert set(run.peak_allocated) == {0, 1}
    assert run.timeline(0).at_peak()["slots"] == run.timeline(1).at_peak()["slots"] > 0  # of one, the other's turn
    assert run.busy["copy to cuda:0"] == run.busy["copy to cuda:1"] > 0


def test_all_logits_cost_memory():
    last, every = (dry_run("gpt2", None, 4, 512, 0, dtype="float32", all_logits=flag) for flag in (False, True))
    assert every.peak_allocated[0] - last.peak_allocated[0] > 0.5 * 4 * 512 * 50257 * 4


def test_a_longer_prompt_and_a_slower_gpu_take_longer():
    short, long = (dry_run("llama-2-7b", None, 1, n, 0, "A100-80GB", dtype="float16") for n in (512, 4096))
    slow = dry_run("llama-2-7b", None, 1, 4096, 0, "T4", dtype="float16")
    assert short.seconds["prefill"] < long.seconds["prefill"] < slow.seconds["prefill"]
    assert long.times[0].bottleneck == "cuda:0" and long.tokens_per_second == 0


def test_what_was_measured_replaces_what_a_vendor_says():
    fast = Calibration("m", issue=1e-7, kernel=1e-7, memory=1e14, context=GiB, workspace=MiB, capability=(8, 0))
    run = dry_run("gpt2", None, 1, 16, 1, "T4", dtype="float32", calibration=fast)
    plain = dry_run("gpt2", None, 1, 16, 1, "T4", dtype="float32")
    assert run.seconds["token"] < plain.seconds["token"] / 5
    assert run.timeline().at_peak()["workspace"] == MiB + MiB, "and cuBLASLt's"
    assert run.timeline().capacity == GPUS["T4"].memory - GiB
    assert target_of(GPUS["T4"], fast).capability == (8, 0)


def test_a_model_of_your_own(tmp_path):
    class Net(torch.nn.Module):
        main_input_name = "pixel_values"

        def __init__(self):
            super().__init__()
            self.body = torch.nn.Conv2d(3, 8, 3)

        def forward(self, pixel_values):
            return self.body(pixel_values).mean()

    with init_empty_weights():
        net = Net()
    run = dry_run(net, None, 2)
    assert run.model == "Net" and run.peak_allocated[0] > 2 * 8 * 222 * 222 * 4
    again = dry_run(lambda: zoo.empty_model("pygpt"), None, 1, 8)
    assert again.model == "GPT" and again.fits


def test_figures_as_json():
    data = json.loads(dry_run("pygpt", None, 1, 8, 1).to_json())
    assert data["devices"]["0"]["peak_allocated"] <= data["devices"]["0"]["peak_reserved"]
    assert [step["step"] for step in data["times"]] == ["prefill", "token 1"] and data["problem"] == ""


@pytest.mark.parametrize("gpu", ["cuda:0", "cuda", torch.device("cuda:0"), torch.device("cuda")])
def test_devices_are_taken_in_every_spelling(gpu):
    plain = run_of_few_blocks(1, 8, 1, dtype="float16")
    run = dry_run(few_blocks("float16"), {"": gpu}, 1, 8, 1, "T4")
    assert run.recordings == plain.recordings and run.device_map == {"": 0}
    assert run.timeline(gpu) is run.timeline(0) and run.fails_with(gpu, 0) == 0
    disk = {**half(torch.device("cpu")), "transformer.h.1": "disk"}
    spread = {name: gpu if device == 0 else device for name, device in disk.items()}
    run = dry_run(few_blocks("float16"), spread, 1, 8, 0, "T4")
    assert {operation.source for operation in run.operations if operation.name == "fill"} == {"cpu", "disk"}


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(ValueError, match="knows GPUs, 'cpu' and 'disk', not mps"):
        dry_run("gpt2", {"transformer": 0, "lm_head": "mps"})
    with pytest.raises(ValueError, match="uses GPU 1, and 1 x RTX 4090 has 1"):
        dry_run("gpt2", {"": 1}, hardware="1 x RTX 4090")
    with pytest.raises(ValueError, match="unknown hardware 'RTX 9'"):
        dry_run("gpt2", hardware="RTX 9")
    with pytest.raises(ValueError, match="'transformer.wte.weight' has memory"):
        dry_run(fill(zoo.empty_model("pygpt"), {"": "cpu"}))
    assert HARDWARE["4 x L4"].gpus[0].capability == (8, 9)


@pytest.mark.parametrize("model", ["pygpt", "pymoe", "wide heads"])
def test_a_run_that_serves_other_gpus_is_what_they_would_do(model):
    """A run is taken over to another GPU only if it would ask for and compute the same there."""
    wide = {"n_embd": 144, "n_head": 2, "n_layer": 3, "vocab_size": 64}  # heads of 72: an odd width for some kernels

    def made():
        return build.build({**catalog.config(catalog.find("gpt2")), **wide}, dtype="float16").eval()

    def run(gpu):
        return dry_run(made if model == "wide heads" else model, None, 2, 16, 1, gpu)

    kinds = {target_of(gpu): name for name, gpu in GPUS.items()}  # one GPU of each kind
    own, shared, spliced = {name: run(name) for name in kinds.values()}, 0, 0
    for source, start in own.items():
        for name, expected in own.items():
            if found := on_machine(start, machine_of(name)):
                shared += source != name
                spliced += target_of(GPUS[name]) not in start.alike
                for part in (
                    "recordings",
                    "kinds",
                    "operations",
                    "steps",
                    "capacity",
                    "rates",
                    "met",
                    "hardware",
                    "notes",
                ):
                    assert getattr(found, part) == getattr(expected, part), (source, name, part)
                assert (found.peak_reserved, found.seconds) == (expected.peak_reserved, expected.seconds)
    assert shared > (1 if model == "pymoe" else 20)  # a mixture asks for the compute capability
    assert spliced > (-1 if model == "pymoe" else 20)


class TopOfNone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, ids):
        return torch.topk(self.layer(torch.zeros(*ids.shape, 4, device=ids.device)), 9).values


def test_an_error_of_the_model_is_one_sentence_and_no_traceback(monkeypatch):
    said = []
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(logger, "handlers", [SimpleNamespace(level=0, handle=said.append)])
    with init_empty_weights():
        model = TopOfNone()
    with pytest.raises(
        ValueError, match=r"TopOfNone cannot be run without data on 1 image: RuntimeError in test_run.py"
    ):
        dry_run(model, batch_size=1, prompt_tokens=8, new_tokens=0)
    assert said == [] and not logger.disabled


@pytest.mark.parametrize("strategy", ["balanced", "exact"])
@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("opt-1.3b", "330MiB"),  # ten blocks in RAM
        *(pytest.param(name, "140GiB", marks=pytest.mark.soak) for name in ("bloom", "llama-3.1-405b", "deepseek-v3")),
    ],
)
def test_none_of_eight_gpus_holds_more_than_its_plan_says(name, budget, strategy):
    budgets = {**dict.fromkeys(range(8), budget), "cpu": "600GiB"}
    found = plan(name, budgets, strategy, dtype="bfloat16", context=260)
    run = dry_run(name, found, 1, 256, 4, "8 x H200")
    for share in found.shares[:8]:
        peak = run.peak_allocated[share.device] - run.timeline(share.device).at_peak()["workspace"]
        assert share.weights < peak <= share.used <= share.budget, (share, run.timeline(share.device).at_peak())
