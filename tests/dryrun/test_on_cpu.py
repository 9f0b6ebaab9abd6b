"""MLPs that the CPU computes, in dry runs: what Python and a CUDA graph wait for, against the planner's clock."""

from dataclasses import replace

import pytest
import transformers as tf

from bigkit import dry_run, init_empty_weights, plan
from bigkit.dryrun.run import on_machine
from bigkit.machine.hardware import machine_of
from bigkit.machine.ledger import Calibration, Ledger
from bigkit.machine.roofline import CALL, HOST, Operation, Rates, run_steps
from bigkit.maps.on_cpu import HOST as FITTED
from bigkit.maps.on_cpu import Reading, token_seconds
from bigkit.maps.partition import spread

SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "vocab_size": 1000,
    "tie_word_embeddings": False,
}  # fmt: skip
MLP, ATTENTION = 3 * 1024 * 4096 * 2, 4 * 1024 * 1024 * 2 + 2 * 1024 * 2  # bytes; with the norms
BLOCKS, CALLING = 12, 4e-4
HERE = Calibration(
    "this", "H200", link_pinned=20e9, memory=4.2e12, issue=5.4e-6, kernel=1.8e-6, disk_warm=20e9, links=(20e9,),
    call=CALLING, cpu_reads={"bfloat16": ((4, 10e9, 21e9), (8, 15e9, 19e9))},
)  # fmt: skip


def model():
    with init_empty_weights():
        return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_hidden_layers=BLOCKS)).bfloat16()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    Ledger.load().add(HERE)
    return replace(machine_of("H200"), name="this machine: H200")


def planned(machine, **options):
    budgets = {0: f"{3 * (MLP + ATTENTION) // 2**20 + 20}MiB", "cpu": "4GiB"}
    return plan(model(), budgets, dtype="bfloat16", hardware=machine, overhead=0, context=40, **options)


def run(machine, given, graphs, new=6, calibration=HERE):
    more = {"batch_size": 1, "prompt_tokens": 20, "new_tokens": new, "hardware": machine, "graphs": graphs}
    return dry_run(model(), given, **more, calibration=calibration)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_token_takes_what_the_planners_clock_says(machine, graphs):
    given = planned(machine, on_cpu=True)
    count, threads = given.on_cpu[0] // MLP, given.on_cpu[1]
    found = run(machine, given, graphs)
    assert count > 2 and threads == 8 and not any("streamed here" in note for note in found.notes)
    last, hop = found.times[-1], CALLING if graphs else FITTED.hops
    assert last.busy["CPU"] == pytest.approx(count * (MLP / 15e9 + hop))
    layers = [layer for layer in given.layers if layer.works is not None]
    sizes = [(layer.bytes, MLP) for layer in layers]
    assert last.busy["copy to cuda:0"] == pytest.approx((sum(size for size, _ in sizes) - count * MLP) / 19e9, rel=0.01)
    gpu = last.busy["cuda:0"] if graphs else last.busy["python"]
    chosen = spread([MLP] * len(sizes), count * MLP)
    clock = token_seconds(sizes, chosen, gpu, Reading(8, 15e9, 19e9), given.slots, hop, graphs)
    assert last.seconds == pytest.approx(clock, rel=0.1)
    if graphs:  # in Python, such small blocks are faster without
        alone = run(machine, replace(given, on_cpu=None), graphs).times[-1]
        assert last.seconds < 0.9 * alone.seconds and "CPU" not in alone.busy


def test_a_prompt_of_many_tokens_is_streamed(machine):
    given = planned(machine, on_cpu=True)
    found = run(machine, given, False, new=1)
    whole = sum(layer.bytes for layer in given.layers if layer.works is not None)
    assert found.times[0].busy.get("CPU", 0) == 0 < found.times[1].busy["CPU"]
    brought = [step.busy["copy to cuda:0"] * 19e9 for step in found.times]
    assert brought[0] > 0.99 * whole > brought[1]


@pytest.mark.parametrize(
    "change, graphs, missing",
    [
        ({"cpu_reads": {}}, False, "what it reads beside a busy link"),
        ({"call": None}, True, "what a graph's call of it takes"),
        ({"call": None}, False, None),
    ],
)
def test_what_was_not_measured_is_streamed_and_said(machine, change, graphs, missing):
    found = run(machine, planned(machine, on_cpu=True), graphs, new=2, calibration=replace(HERE, **change))
    assert ("CPU" in found.times[-1].busy) is (missing is None)
    said = [note for note in found.notes if "MLPs that the CPU computes are streamed here" in note]
    assert len(said) == (missing is not None) and all(missing in note for note in said)


def test_nobody_knows_what_another_machines_cpu_reads(machine):
    found = run(machine, planned(machine, on_cpu=True), False, new=2)
    assert on_machine(found, machine_of("RTX 5090")) is None


def test_who_asks_the_cpu_waits_for_it():
    rates = Rates(1e9, {"float32": ((1.0, 1e9),)}, (), 0.0, 1.0, 1e9, 1e9, 1e9, reads=10.0, hop=3.0, call=1.0)
    work = Operation("add", "cuda:0", 0, 0, "float32", 0)
    for name, hop, python in ((HOST, 3, 8), (CALL, 1, 0)):
        spans = []
        operations = [work, Operation(name, "cuda:0", 0, 40, "", 0, unit="mlp"), replace(work, name="mul", issued=1)]
        [step] = run_steps(operations, [("token", 3)], {"cuda:0": rates}, spans)
        at = {span.name: (span.start, span.end) for span in spans if span.lane != "python"}
        assert at == {"add": (0, 1), "mlp": (1, 5 + hop), "mul": (5 + hop, 6 + hop)}
        assert step.busy == {"python": 0, "cuda:0": 2, "CPU": 4 + hop}
        assert [span.start for span in spans if span.lane == "python"] == [python]
