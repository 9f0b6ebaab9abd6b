"""What was measured over what was foretold: a run that an H200 recorded, laid over its dry run here."""

from pathlib import Path

import pytest

from bigkit import dry_run
from bigkit.draw.dryrun import dryrun_figure, dryrun_label, dryrun_text
from bigkit.dryrun.workload import Workload
from bigkit.machine.allocator import Recording
from bigkit.machine.hardware import GPUS, Hardware
from bigkit.measure.run import Measurement, measure, obstacle
from bigkit.units import GiB, MiB
from bigkit.widgets import DryRunExplorer, dryrun_explorer
from bigkit.zoo import build, catalog

RECORDED = Path(__file__).parents[1] / "data" / "allocations" / "gpt2-xl.json.gz"  # 12 blocks, bfloat16, 4 x 256 + 4
TIMES = (0.02, 0.01, 0.01, 0.01, 0.01)


@pytest.fixture(scope="module")
def run():
    config = {**catalog.config(catalog.find("gpt2-xl")), "n_layer": 12}
    return dry_run(lambda: build.build(config, dtype="bfloat16").eval(), None, 4, 256, 4, "H200")


@pytest.fixture(scope="module")
def measured():
    return Measurement(Recording.load(RECORDED), TIMES)


def test_curves_of_a_real_run_reach_its_peaks(measured):
    allocated, reserved = measured.curves()
    assert {"allocated": max(allocated), "reserved": max(reserved)} == measured.recording.peaks
    assert len(allocated) == len(reserved) == measured.recording.marks[-1][1]
    assert all(a <= r for a, r in zip(allocated, reserved))


def test_each_step_lies_over_the_step_that_was_foretold(run, measured):
    marks = run.timeline(0).marks
    places = measured.over(marks)
    assert len(marks) == len(measured.recording.marks) and places == sorted(places)
    for (_, mine), (_, theirs) in zip(measured.recording.marks[:-1], marks):
        assert places[mine] == pytest.approx(theirs), "a step begins where it was foretold to begin"
    assert places[0] == 0 and places[-1] < marks[-1][1]


def test_fewer_steps_than_foretold_and_none_at_all(run):
    marks = run.timeline(0).marks
    assert Measurement(Recording(events=[512, -1]), ()).over(marks) == []
    short = Measurement(Recording(events=[512, 512], marks=[("fill", 2)], segments=[(0, 2**21, 0)]), ())
    assert short.over(marks) == [0, marks[0][1] / 2] and short.curves() == ([512, 1024], [2**21] * 2)


def test_an_h200_is_drawn_over_its_dry_run(run, measured):
    assert run.peak_allocated[0] == measured.recording.peaks["allocated"], "foretold to the byte"
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
    assert asked == [(explorer.plan.device_map, explorer.run.load)] and explorer.measured is measured
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
