"""A dry run beside the real run of the same work."""

import pytest
import torch

from bigkit import dry_run, zoo
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.dryrun.workload import Workload, fill, passes, work
from bigkit.machine.allocator import replay
from bigkit.measure.allocations import record_allocations, settle


@pytest.mark.parametrize("name", ["gpt2", "qwen3-0.6b", "bert-base-cased"])
def test_peaks_are_those_of_the_real_run(name):
    load = Workload(4, 256, 3)
    model = zoo.empty_model(name, dtype="bfloat16").eval()
    with record_allocations() as mark:
        fill(model, {"": 0})
        for step in passes(model, load, "cuda"):
            mark(step.phase)
    del model
    real, recording = mark.recording.peaks, mark.recording
    run = dry_run(name, None, load.batch, load.prompt, load.new, "H200", dtype="bfloat16", generate=False)
    assert run.peak_allocated[0] == pytest.approx(real["allocated"], rel=0.005)
    # Where the driver puts segments, which decides between equal blocks, depends on what the process did before.
    usual = replay(recording.events, recording.streams).peak_reserved
    assert run.peak_reserved[0] == pytest.approx(usual, rel=0.03)
    assert run.peak_reserved[0] == pytest.approx(real["reserved"], rel=0.06)


@pytest.mark.parametrize("quantization", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("prompt", [16, 600])
def test_peaks_of_quantized_models(quantization, prompt):
    pytest.importorskip("bitsandbytes")
    from bigkit.dryrun.fake_bnb import config_of, fill_quantized, quantize_empty

    load = Workload(4, prompt, 3)
    config = config_of(quantization, "float16")
    model = quantize_empty(zoo.empty_model("gpt2", dtype="float16").eval(), config)
    with record_allocations() as mark:
        fill_quantized(model, {"": 0}, torch.device("cuda", 0), config)
        for step in passes(model, load, "cuda"):
            mark(step.phase)
    del model
    real, recording = mark.recording.peaks, mark.recording
    run = dry_run("gpt2", None, load.batch, load.prompt, load.new, "H200", quantization=quantization, generate=False)
    assert run.peak_allocated[0] == pytest.approx(real["allocated"], rel=0.005)
    # Where the driver puts segments, which decides between equal blocks, depends on what the process did before.
    usual = replay(recording.events, recording.streams).peak_reserved
    assert run.peak_reserved[0] == pytest.approx(usual, rel=0.03)
    assert run.peak_reserved[0] == pytest.approx(real["reserved"], rel=0.06)


@pytest.mark.parametrize("name, batch, prompt", [("gpt2", 4, 200), ("qwen3-0.6b", 1, 16)])
def test_peaks_with_cuda_graphs(name, batch, prompt):
    load = Workload(batch, prompt, 6, graphs=True)
    model = zoo.empty_model(name, dtype="bfloat16").eval()
    held, before = settle(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fill(model, {"": 0})
    work(model, load, "cuda", lambda step: None)
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - held
    del model
    run = dry_run(name, None, batch, prompt, 6, "H200", dtype="bfloat16", graphs=True)
    assert run.peak_allocated[0] == pytest.approx(allocated, rel=0.01)
    assert run.peak_reserved[0] == pytest.approx(reserved, rel=0.1)  # a segment of 20 MiB more or less


def test_fake_gpus_beyond_the_real_ones_and_real_work_after_them():
    with fake_gpus() as notes:
        a = torch.ones(4, device="cuda:7")
        a[:2] = 1
        b = a.to("cuda:6") @ a.to("cuda:6")
        assert b.device.index == 6
    assert set(notes.trace.recordings) == {"cuda:6", "cuda:7"}
    assert (torch.ones(3, device="cuda:0") * 2).sum().item() == 6
