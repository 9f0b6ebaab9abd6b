"""Real runs on the GPU beside their dry runs: calls, and the work that `DryRunExplorer` measures."""

import pytest

from bigkit import dry_run, record, zoo
from bigkit.dryrun.workload import Workload, fill, passes
from bigkit.machine.ledger import Ledger
from bigkit.measure.allocations import settle
from bigkit.measure.record import measure


def test_memory_is_as_predicted_and_noted(tmp_path):
    load = Workload(2, 64, 3)
    predicted = dry_run("gpt2", None, load.batch, load.prompt, load.new, "H200", dtype="bfloat16")
    settle()
    model = fill(zoo.empty_model("gpt2", dtype="bfloat16").eval(), {"": 0})
    with record(model, predicted, ledger=tmp_path / "ledger.json") as recorder:
        for _ in passes(model, load, "cuda"):
            pass
    assert [call.phase for call in recorder.calls] == ["prefill", "token", "token", "token"]
    errors = {name: error for name, _, _, error in recorder.rows()}
    assert errors["allocated cuda:0"] == pytest.approx(0, abs=0.005)
    assert errors["reserved cuda:0"] == pytest.approx(0, abs=0.03)
    assert {"prefill", "token"} <= errors.keys()
    assert Ledger.load(tmp_path / "ledger.json").bias()["allocated cuda:0"].runs == 1


def test_peaks_and_steps_of_the_real_run():
    run = dry_run("gpt2", None, 4, 256, 3, "H200", dtype="bfloat16")
    real = measure(zoo.empty_model("gpt2", dtype="bfloat16"), {"": 0}, Workload(4, 256, 3))
    assert real.recording.about["held"] == "0", "nothing was on the GPU before"
    assert run.peak_allocated[0] == pytest.approx(real.recording.peaks["allocated"], rel=0.005)
    assert [name for name, _ in real.recording.marks] == [name for name, _ in run.timeline(0).marks]
    assert len(real.seconds) == 4 and all(seconds > 0 for seconds in real.seconds)
    allocated, reserved = real.curves()
    assert max(allocated) == real.recording.peaks["allocated"] and max(reserved) == real.recording.peaks["reserved"]


def test_half_in_ram():
    places = {f"transformer.h.{i}": "cpu" if i % 2 else 0 for i in range(12)}
    places |= {"transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0, "transformer.ln_f": 0, "lm_head": 0}
    run = dry_run("gpt2", places, 1, 64, 2, "H200", dtype="bfloat16")
    real = measure(zoo.empty_model("gpt2", dtype="bfloat16"), places, Workload(1, 64, 2))
    assert run.peak_allocated[0] == pytest.approx(real.recording.peaks["allocated"], rel=0.01)


def test_the_explorer_measures_what_it_shows():
    pytest.importorskip("ipywidgets")
    from bigkit.widgets import DryRunExplorer

    explorer = DryRunExplorer("gpt2", "T4", batch=1, prompt=64, new=2)
    explorer.gpu.value = "the one here"
    explorer.real.click()
    assert explorer.error.value == "" and explorer.measured is not None
    assert "Measured on" in explorer.picture.value
