"""`DryRunExplorer` and its picture: what turning a control does."""

import json
import re

import pytest

from bigkit import dry_run
from bigkit.draw.dryrun import dryrun_figure, dryrun_label, dryrun_text, merge
from bigkit.machine.streams import Span
from bigkit.widgets import DryRunExplorer, dryrun_explorer


@pytest.fixture(scope="module")
def explorer():
    return DryRunExplorer("gpt2", "T4", batch=1, prompt=64, new=1, dtype="float16")


def test_controls_change_what_is_shown(explorer):
    explorer.reset()
    first, picture = explorer.run, explorer.picture.value
    asked = "1 x 64 tokens, then 1 more each"
    assert re.match(rf"DryRunExplorer\(gpt2, 1 x T4, {asked}: fits, peak \d+\.\d\d MiB\)", repr(explorer))
    explorer.batch.value = 8
    assert explorer.run.peak_allocated[0] > first.peak_allocated[0] and explorer.picture.value != picture
    assert 'role="img"' in picture and "aria-label" in picture and "GPU 0" in picture
    explorer.reset()
    assert explorer.run is first, "what was rehearsed once is not rehearsed again"


def test_a_link_changes_time_and_no_memory():
    slow = DryRunExplorer("gpt2", "T4", batch=1, prompt=16, new=1)
    before = slow.run.seconds["token"]
    slow.link.value = "PCIe 5.0 x16"
    assert "PCIe 5.0" in slow.run.hardware and slow.run.seconds["token"] <= before
    slow.count.value = 2
    assert set(slow.run.peak_allocated) == {0, 1} and "It fits." in slow.verdict.value


def test_what_goes_wrong_is_said_and_the_picture_stays(explorer):
    explorer.reset()
    picture = explorer.picture.value
    explorer.model.value = "no-such-model-at-all"
    assert 'role="alert"' in explorer.error.value and explorer.picture.value == picture
    explorer.reset()
    assert explorer.error.value == ""


def test_code_and_export_give_the_same_run(explorer, tmp_path):
    explorer.reset()
    explorer.link.value = "PCIe 5.0 x16"
    space = {}
    exec(explorer.to_code(), space)
    assert space["hardware"] == explorer.hardware
    assert space["run"].peak_reserved == explorer.run.peak_reserved and space["run"].seconds == explorer.run.seconds
    data = json.loads(explorer.export(tmp_path / "run.json").read_text())
    assert data["devices"]["0"]["peak_reserved"] == explorer.run.peak_reserved[0]
    assert explorer.export(tmp_path / "run.svg").read_text().startswith("<svg")


def test_presets_set_the_controls(explorer, monkeypatch):
    explorer.reset()
    run, asked = explorer.run, []
    monkeypatch.setattr(dryrun_explorer, "dry_run", lambda *values, **options: asked.append(values) or run)
    for name, controls in dryrun_explorer.PRESETS.items():
        explorer.preset.value = name
        assert explorer.preset.value == name and asked.pop()[0] == controls["model"] and not asked
        assert all(getattr(explorer, control).value == value for control, value in controls.items())
    explorer.link.value = "PCIe 5.0 x16"
    assert explorer.preset.value == "my own"
    explorer.reset()
    monkeypatch.undo()


@pytest.mark.soak
def test_presets_are_rehearsed(explorer):
    explorer.preset.value = "gpt2-xl on a T4"
    assert explorer.run.model == "gpt2-xl"
    explorer.reset()
    assert explorer.run.model == "gpt2" and explorer.preset.value == "my own"
    explorer.preset.value = "opt-13b on a T4, half in RAM"
    assert explorer.run.fits and 0.4 < explorer.plan.offloaded / sum(s.weights for s in explorer.plan.shares) < 0.6
    explorer.reset()


def test_it_says_that_it_works(monkeypatch):
    explorer = DryRunExplorer("pygpt", "T4", batch=1, prompt=16, new=0)
    said = []
    monkeypatch.setattr(dryrun_explorer, "dry_run", lambda *a, **k: said.append(explorer.working.value) or 1 / 0)
    before = explorer.verdict.value
    explorer.batch.value = 2
    assert "Rehearsing pygpt" in said[0] and 'role="status"' in said[0]
    assert "division by zero" in explorer.error.value and explorer.verdict.value == before


def test_the_picture_says_what_the_text_says():
    places = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0, "transformer.ln_f": 0, "lm_head": 0}
    places |= {f"transformer.h.{i}": "cpu" if i % 2 else 0 for i in range(12)}
    run = dry_run("gpt2", places, 1, 64, 1, "T4", dtype="float16")
    picture = dryrun_figure(run).svg
    assert picture == dryrun_figure(run).svg, "the same run, the same picture"
    for word in ("weights", "slots", "KV cache", "activations", "link to GPU 0", "Python", "prefill"):
        assert word in picture
    text = dryrun_text(run)
    assert "slots" in text and "token 1" in text and "tokens/s" in text and text.startswith("gpt2: fits")
    assert "It fits." in dryrun_label(run)


def test_stretches_are_in_order_and_apart():
    spans = [Span("x", "", i, i + 0.5) for i in range(5)]
    assert merge(spans, 0.1) == [(i, i + 0.5, 0.5) for i in range(5)]
    assert merge(spans, 0.6) == [(0, 4.5, 2.5)] and merge([], 1) == []


def test_another_link_needs_no_other_rehearsal(monkeypatch):
    import bigkit.widgets.dryrun_explorer as home
    from bigkit import dry_run

    explorer = home.DryRunExplorer("gpt2", "T4", batch=1, prompt=32, new=1)
    monkeypatch.setattr(home, "dry_run", None)
    explorer.link.value = next(iter(home.LINKS))
    run = explorer.run
    again = dry_run("gpt2", explorer.plan, 1, 32, 1, explorer.hardware, dtype="float16")
    assert (run.hardware, run.seconds, run.capacity) == (again.hardware, again.seconds, again.capacity)
    assert run.peak_reserved == again.peak_reserved and run.rates == again.rates


def test_another_gpu_needs_no_other_rehearsal(monkeypatch):
    import bigkit.widgets.dryrun_explorer as home

    explorer = home.DryRunExplorer("gpt2", "RTX 4090", batch=1, prompt=32, new=1)
    monkeypatch.setattr(home, "dry_run", None)
    for gpu in ("RTX 3090", "A100-40GB", "RTX 5090", "L4", "H100-80GB", "T4"):  # the last two: other attention
        explorer.gpu.value = gpu
        assert gpu in explorer.run.hardware and explorer.run.capacity[0] < home.GPUS[gpu].memory
