"""Real runs beside their predictions: calls on the CPU, and a run that an H200 recorded, laid over its dry run here."""

import json
from pathlib import Path

import pytest
import torch

from bigkit import cpu_offload, dry_run, record
from bigkit.draw.dryrun import dryrun_figure, dryrun_label, dryrun_text
from bigkit.dryrun.workload import Workload, passes
from bigkit.machine.allocator import Recording
from bigkit.machine.hardware import GPUS, Hardware
from bigkit.machine.ledger import Ledger
from bigkit.measure.record import Measurement, measure, obstacle
from bigkit.units import GiB, MiB
from bigkit.widgets import DryRunExplorer, dryrun_explorer
from bigkit.zoo import build, catalog
from bigkit.zoo.gpt import load_pygpt

transformers = pytest.importorskip("transformers")

RECORDED = Path(__file__).parents[1] / "data" / "allocations" / "gpt2-xl.json.gz"  # 12 blocks, bfloat16, 4 x 256 + 4
TIMES = (0.02, 0.01, 0.01, 0.01, 0.01)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_generate_is_a_prefill_and_tokens(tmp_path):
    model = llama()
    ids = torch.ones((2, 5), dtype=torch.long)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with record(model, ledger=tmp_path / "ledger.json") as recorder:
        again = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(plain, again)
    assert [call[:3] for call in recorder.calls] == [("prefill", 2, 5), *[("token", 2, 1)] * 3]
    assert all(call.seconds > 0 for call in recorder.calls)
    if not torch.cuda.is_available():
        assert recorder.peaks["resident memory"] > 2**26
    model(ids)
    assert len(recorder.calls) == 4, "the hooks are gone"
    [run] = Ledger.load(tmp_path / "ledger.json").runs
    assert run == json.loads(json.dumps(recorder.entry())) | {"time": run["time"]}
    assert (run["name"], run["batch"], run["prompt"], run["predicted"]) == ("LlamaForCausalLM", 2, 5, {})


def test_the_shipped_gpt_against_its_dry_run(tmp_path):
    load = Workload(2, 12, 3)
    predicted = dry_run("pygpt", None, load.batch, load.prompt, load.new)
    model = load_pygpt()
    with record(model, predicted, "gpt", ledger=tmp_path / "ledger.json") as recorder:
        for _ in passes(model, load, "cpu"):
            pass
    assert [call.phase for call in recorder.calls] == ["prefill", "token", "token", "token"]
    rows = {name: (expected, real, error) for name, expected, real, error in recorder.rows()}
    assert {"prefill", "token"} <= rows.keys()
    for name, (expected, real, error) in rows.items():
        assert expected == recorder.predicted[name] and real == recorder.measured[name]
        assert error == pytest.approx(expected / real - 1)
    assert "predicted" in recorder.explain() and len(repr(recorder)) < 110
    bias = Ledger.load(tmp_path / "ledger.json").bias(recorder.machine)
    assert bias["token"].ratio == pytest.approx(rows["token"][1] / rows["token"][0]) and bias["token"].runs == 1
    assert Ledger.load(tmp_path / "ledger.json").bias("another machine") == {}


def test_other_work_than_was_predicted_is_not_compared(tmp_path):
    model = load_pygpt()
    with record(model, dry_run("pygpt", None, 1, 8), ledger=tmp_path / "ledger.json") as recorder:
        model(torch.zeros((1, 9), dtype=torch.long))
    with pytest.raises(ValueError, match="1 x 8 tokens were predicted, and 1 x 9 ran"):
        recorder.rows()
    assert "no comparison" in recorder.explain()
    [run] = Ledger.load(tmp_path / "ledger.json").runs
    assert run["predicted"] == {} and run["measured"]["prefill"] > 0


def test_a_model_that_is_spread_out_runs_as_before(tmp_path):
    model = llama()
    ids = torch.arange(6)[None]
    plain = model(ids).logits
    model = cpu_offload(model, "cpu")
    with record(model, save=False) as recorder, torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    assert [call[:3] for call in recorder.calls] == [("prefill", 1, 6)]


def test_nothing_is_noted_of_a_run_that_fails(tmp_path):
    model = load_pygpt()
    with pytest.raises(RuntimeError, match="halfway"):
        with record(model, ledger=tmp_path / "ledger.json") as recorder:
            model(torch.zeros((1, 4), dtype=torch.long))
            raise RuntimeError("halfway")
    with record(model, ledger=tmp_path / "ledger.json"):
        pass
    assert len(recorder.calls) == 1 and not list(tmp_path.iterdir())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_an_encoder_decoder_has_the_prompt_of_its_encoder():
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with record(model, save=False) as recorder:
        for _ in passes(model, Workload(2, 7, 2), "cpu"):
            pass
    assert [call[:3] for call in recorder.calls] == [("prefill", 2, 7), ("token", 2, 1), ("token", 2, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# The work of a dry run, for real


@pytest.fixture(scope="module")
def run():
    config = {**catalog.config(catalog.find("gpt2-xl")), "n_layer": 12}
    return dry_run(lambda: build.build(config, dtype="bfloat16").eval(), None, 4, 256, 4, "H200", generate=False)


@pytest.fixture(scope="module")
def measured():
    return Measurement(Recording.load(RECORDED), TIMES)


def test_curves_of_a_real_run_reach_its_peaks(measured):
    allocated, reserved = measured.curves()
    assert {"allocated": max(allocated), "reserved": max(reserved)} == measured.recording.peaks
    assert len(allocated) == len(reserved) == measured.recording.marks[-1][1]
    assert all(a <= r for a, r in zip(allocated, reserved))


def test_each_step_lies_over_the_step_that_was_predicted(run, measured):
    marks = run.timeline(0).marks
    places = measured.over(marks)
    assert len(marks) == len(measured.recording.marks) and places == sorted(places)
    for (_, mine), (_, theirs) in zip(measured.recording.marks[:-1], marks):
        assert places[mine] == pytest.approx(theirs), "a step begins where it was predicted to begin"
    assert places[0] == 0 and places[-1] < marks[-1][1]


def test_fewer_steps_than_predicted_and_none_at_all(run):
    marks = run.timeline(0).marks
    assert Measurement(Recording(events=[512, -1]), ()).over(marks) == []
    short = Measurement(Recording(events=[512, 512], marks=[("fill", 2)], segments=[(0, 2**21, 0)]), ())
    assert short.over(marks) == [0, marks[0][1] / 2] and short.curves() == ([512, 1024], [2**21] * 2)


def test_an_h200_is_drawn_over_its_dry_run(run, measured):
    assert run.peak_allocated[0] == measured.recording.peaks["allocated"], "predicted to the byte"
    figure, label = dryrun_figure(run, measured), dryrun_label(run, measured)
    picture = figure.svg
    assert picture == dryrun_figure(run, measured).svg, "the same run, the same picture"
    assert [shape.kind for shape in figure.shapes].count("measured") == 2, "two curves more"
    assert picture.count("measured") >= 3 and "measured" not in dryrun_figure(run).svg
    assert "Measured on NVIDIA H200: 1.06 GiB, prefill 20.0 ms, token 10.0 ms." in label
    rows = {line[:14].strip(): line for line in dryrun_text(run, measured).splitlines()}
    assert rows["peak allocated"].split()[-2] == "+0.0" and rows["prefill"].split()[-1] == "%"


def test_bars_of_time_are_as_long_as_what_was_measured(run, measured):
    picture = dryrun_figure(run, measured)
    bars = [shape for shape in picture.shapes if shape.kind == "measured step"]
    scale = bars[0].width / TIMES[0]
    assert [bar.width for bar in bars] == pytest.approx([scale * seconds for seconds in TIMES])
    assert bars[-1].x + bars[-1].width <= picture.left + picture.room + 1e-6


def test_what_stands_in_the_way():
    run = dry_run("pygpt", {"": 0}, 1, 16, 1, "T4")
    here = Hardware("this machine", (GPUS["T4"],), 8 * GiB, 0)
    assert obstacle(run, here) == ""
    assert obstacle(run, Hardware("this machine", (), 8 * GiB, 0)) == "no CUDA GPU here"
    assert "rest in RAM" in obstacle(run, here, in_ram=6 * GiB)
    assert "needs" in obstacle(dry_run("llama-2-7b", None, 1, 16, 0, "H100-80GB", dtype="float32"), here)
    with pytest.raises(ValueError, match="only GPU 0 and RAM can be measured, not GPU 1"):
        measure(None, {"a": 0, "b": 1}, Workload(1, 8))


def test_the_button_says_why_not_or_measures(measured, monkeypatch):
    """The run itself is replaced by the recorded one: that it runs is tested on a GPU."""
    explorer = DryRunExplorer("gpt2", "T4", batch=1, prompt=64, new=4)
    if not explorer._here.gpus:
        assert explorer.real.disabled and explorer.real.description == "Measure: no CUDA GPU here"
        with pytest.raises(ValueError, match="gpt2 cannot be measured: no CUDA GPU here"):
            explorer.measure()
    asked = []
    monkeypatch.setattr(dryrun_explorer.Hardware, "detect", lambda: Hardware("this machine", (GPUS["T4"],), 2**36, 0))
    monkeypatch.setattr(dryrun_explorer, "measure", lambda model, *work: asked.append(work) or measured)
    explorer = DryRunExplorer("gpt2", "T4", batch=1, prompt=64, new=4)
    assert explorer.real.description == "Measure it" and explorer.measured is None
    explorer.real.click()
    assert asked == [(explorer.plan.device_map, explorer.run.load, 2)] and explorer.measured is measured
    assert "Measured on NVIDIA H200" in explorer.picture.value and "measured on NVIDIA H200" in explorer.text.value
    explorer.batch.value = 2
    assert explorer.measured is None and "Measured" not in explorer.picture.value
    explorer.batch.value = 1
    assert explorer.measured is measured, "what was measured once is kept"
    explorer.gpu.value = dryrun_explorer.HERE
    assert explorer.run.hardware == "this machine"


def test_a_run_that_fails_leaves_what_was_shown(monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(dryrun_explorer.Hardware, "detect", lambda: Hardware("this machine", (GPUS["T4"],), 2**36, 0))
    monkeypatch.setattr(dryrun_explorer, "measure", fails)
    explorer = DryRunExplorer("gpt2", "T4", batch=1, prompt=64, new=0)
    before = explorer.verdict.value, explorer.picture.value
    explorer.real.click()
    assert "CUDA out of memory." in explorer.error.value
    assert (explorer.verdict.value, explorer.picture.value) == before
    explorer.prompt.value = 16
    assert explorer.error.value == ""


@pytest.mark.parametrize("first, second, last, more", [(2**28, 2**30, 39.5, True), (2**30, 2**28, 40, False)])
def test_curves_are_played_where_the_segments_lay(first, second, last, more):
    """Two holes of 5 MiB: the lower one is filled, and what is free beside it decides whether 14.5 MiB find room."""
    events = [5, 5, 5, 5, 5, 5, 5, 5, -2, -6, 4.5, -3, -4, 14.5]
    segments = [(0, 20 * MiB, first), (4, 20 * MiB, second)] + [(13, 16 * MiB, 2**31)] * more
    sizes = [int(event * MiB) if event > 0 else event for event in events]
    allocated, _ = Measurement(Recording(events=sizes, segments=segments), ()).curves()
    assert allocated[-1] == last * MiB
