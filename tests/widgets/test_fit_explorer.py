"""`FitExplorer`: does it fit, how fast is it, and what turning a control does."""

import html
import json
import re

import pytest

from bigkit import HARDWARE, advise, estimate_memory
from bigkit.machine.hardware import machine_of
from bigkit.units import format_bytes
from bigkit.widgets import FitExplorer


def test_controls_change_the_advice_and_reset_brings_it_back(tmp_path):
    explorer = FitExplorer("llama-2-70b", "1 x RTX 4090")
    first, picture = explorer.advice, explorer.picture.value
    assert first == advise("llama-2-70b", "1 x RTX 4090") and 'role="img"' in picture and "tokens/s" in picture
    explorer.hardware.value = "8 x H100-80GB"
    assert explorer.advice.best.plan.offloaded == 0 and explorer.picture.value != picture
    explorer.target.value = "memory"
    assert explorer.advice.best.plan.quantization == "nf4-double"
    explorer.reset()
    assert explorer.advice == first and explorer.hardware.value == "1 x RTX 4090"
    data = json.loads(explorer.export(tmp_path / "a.json").read_text())
    assert data["options"][0]["token"] == first.best.token
    assert explorer.export(tmp_path / "a.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("hardware", "says"),
    [
        ("H200", r"^Fits: [\d.]+ tokens/s, stored as"),
        ("1 x RTX 4090", r"^Fits with [\d.]+ GiB in RAM: [\d.]+ tokens/s, stored as nf4-double\."),
        ("laptop", r"^Fits with [\d.]+ GiB on disk: [\d.]+ s a token, stored as"),
        ("Binder", r"^Does not fit\. .* lacks "),
    ],
)
def test_one_sentence_says_whether_it_fits_and_how_fast(hardware, says):
    explorer = FitExplorer("llama-2-70b", hardware)
    text = re.sub("<[^>]+>", "", explorer.verdict.value).strip()
    assert re.search(says, text), text
    assert len(repr(explorer)) < 110 and ("does not fit" in repr(explorer)) == (explorer.advice.best is None)
    assert explorer.advice.verdict in explorer.text.value


def test_a_machine_of_your_own_keeps_the_speed_of_its_kind():
    explorer = FitExplorer("llama-2-7b", "RTX 4090")
    explorer.count.value = 3
    assert explorer.machine == machine_of("3 x RTX 4090") and explorer.hardware.value == "my own machine"
    explorer.memory.value = 48
    assert explorer.advice.hardware == "3 x RTX 4090 48GiB"
    explorer.ram.value = 256
    assert explorer.machine == machine_of("3 x RTX 4090 48GiB, 256GiB RAM")
    explorer.gpu.value = "T4"
    assert explorer.memory.value == 15 and explorer.machine == machine_of("3 x T4, 256GiB RAM")
    explorer.count.value = 0
    assert explorer.machine == machine_of("no GPU, 256GiB RAM")
    explorer.gpu.value = "GB10"
    assert explorer.machine is HARDWARE["GB10, 128 GB"] and explorer.hardware.value == "GB10, 128 GB"
    explorer.count.value = 2
    assert "cannot have 2 GPUs" in explorer.error.value and "Fits" in explorer.verdict.value
    explorer.reset()
    assert explorer.machine is HARDWARE["1 x RTX 4090"] and not explorer.error.value


@pytest.mark.parametrize("hardware", ["4 x L4, 64GiB RAM", "2 x 24GB", "RTX 4090 48GB", None])
def test_any_machine_that_advise_reads_can_be_given_and_changed(hardware):
    explorer = FitExplorer("gpt2", hardware)
    assert explorer.machine == machine_of(hardware) or hardware is None  # its free memory changes
    assert explorer.hardware.value == explorer.machine.name
    explorer.ram.value = 77
    assert explorer.machine.ram == 77 * 2**30 and explorer.machine.gpus == machine_of(hardware).gpus


@pytest.mark.parametrize("hardware", [*HARDWARE, "3 x T4, 100GB RAM", "24GB", "RTX 4090 48GB"])
def test_the_code_gives_the_same_advice(hardware):
    explorer = FitExplorer("llama-2-7b", hardware, context=4096, batch=2, target="context", kv_dtype="float8")
    space = {}
    exec(explorer.to_code(), space)
    assert space["advice"] == explorer.advice


@pytest.mark.parametrize(
    "turns", [{"count": 3}, {"memory": 0}, {"hardware": "Colab T4"}, {"gpu": "GB10"}, {"memory": 48, "ram": 9}]
)
def test_the_state_gives_the_same_answer_and_undo_the_one_before(turns):
    explorer = FitExplorer("llama-2-70b")
    before = explorer.advice
    with explorer.together():
        for name, value in turns.items():
            explorer.turn(name, value)
    again = FitExplorer.from_state(explorer.state)
    assert again.advice == explorer.advice != before and again.machine == explorer.machine
    explorer.undo()
    assert explorer.advice == before


@pytest.mark.parametrize("gpu", ["A10G", "GB10"])
def test_a_gpu_brings_its_memory_in_one_step_of_undo(gpu):
    explorer = FitExplorer("llama-3.1-8b")
    before = explorer.state
    explorer.gpu.value = gpu
    assert explorer.advice.hardware == machine_of(gpu).name or explorer.machine.gpus[0].name == gpu
    explorer.undo()
    assert explorer.state == before


def test_a_way_that_is_clicked_tells_its_plan_and_two_answers_are_compared():
    explorer = FitExplorer("llama-3.1-405b", "8 x H100-80GB")
    for plan, _ in explorer.advice.ways:
        assert html.escape(str(plan)) in explorer.tell(f"way:{plan.stored}:weights")
    assert explorer.tell("end:0") == ""
    old = explorer.advice
    explorer.compare()
    explorer.hardware.value = "4 x L4"
    said = explorer.differences(old, explorer.advice)
    assert old.verdict in said[0] and explorer.advice.verdict in said[0]
    assert html.escape(said[0]) in explorer.verdict.value and explorer.differences(old, old) == []


def test_code_for_this_machine_names_none():
    assert "advise('gpt2', batch=1" in FitExplorer("gpt2", None).to_code()


def test_memory_is_what_estimate_memory_counts():
    explorer = FitExplorer("glm-4.6", "8 x H200", context=4096, batch=3)
    explorer.panes.selected_index = 1
    told = estimate_memory("glm-4.6", batch=3, context=4096)
    assert told._repr_html_() in explorer.panes.children[1].value
    rows = {row.stored: row for row in told.inference}
    for option in explorer.advice.options:
        row = rows[option.plan.stored]
        assert sum(share.weights for share in option.plan.shares) == row.weights
        assert sum(share.kv_cache for share in option.plan.shares) == row.kv_cache
        assert format_bytes(option.memory) in explorer.text.value


def test_what_cannot_be_counted_so_is_said():
    explorer = FitExplorer("resnet50.a1_in1k", "T4")
    assert "tokens/s" not in explorer.verdict.value + explorer.picture.value + repr(explorer)
    assert "a pass" in explorer.verdict.value and "A pass waits for" in explorer.verdict.value
    explorer.model.value, explorer.context.value = "gpt2", 4096
    assert "gpt2 has positions for 1,024 tokens: these are counted, not 4,096." in explorer.verdict.value
    explorer.model.value = "no-such-model-at-all"
    assert 'role="alert"' in explorer.error.value
