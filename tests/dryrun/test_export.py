"""Dry runs for other viewers: PyTorch's own reader of snapshots, and the form of a Chrome trace."""

import json
import pickle

import torch
from hypothesis import given

from bigkit import dry_run
from bigkit.dryrun.export import memory_snapshot
from bigkit.machine.allocator import CachingAllocator, Recording, replay
from tests.machine.test_allocator import events_of, runs


def test_pytorch_reads_the_snapshot(tmp_path):
    run = dry_run("gpt2", {"transformer": 0, "lm_head": 1}, 1, 32, 2, dtype="float16")
    snapshot = pickle.loads(run.save_snapshot(tmp_path / "run.pickle").read_bytes())
    viz = torch.cuda._memory_viz
    assert "segment" in viz.segsum(snapshot).lower()
    text = viz.trace(snapshot)
    assert "cudaMalloc" in text and "Device 1" in text
    for plot in (viz.trace_plot, viz.segment_plot):
        assert "<html" in plot(snapshot).lower() or "<script" in plot(snapshot).lower()
    allocations = [entry for entry in snapshot["device_traces"][0] if entry["action"] == "alloc"]
    frames = {(entry["frames"][0]["filename"], entry["frames"][0]["name"]) for entry in allocations}
    assert {("weights", "fill"), ("KV cache", "prefill"), ("KV cache", "token 2"), ("activations", "token 1")} <= frames


@given(runs)
def test_the_last_moment_is_what_the_allocator_holds(run):
    events, _ = events_of(run)
    gpu = CachingAllocator()
    replay(events, (), gpu)
    snapshot = memory_snapshot({0: Recording(events)}, {0: ["x"] * len(events)})
    assert sum(segment["total_size"] for segment in snapshot["segments"]) == gpu.reserved
    assert sum(segment["allocated_size"] for segment in snapshot["segments"]) == gpu.allocated
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == address and block["size"] >= block["requested_size"]
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]


def test_a_chrome_trace_has_a_row_for_each_lane(tmp_path):
    run = dry_run("pygpt", {"": "cpu"}, 1, 8, 1)
    data = json.loads(run.save_chrome_trace(tmp_path / "run.json").read_text())
    names = {event["args"]["name"] for event in data["traceEvents"] if event["name"] == "thread_name"}
    assert names == {"python", "cuda:0", "copy to cuda:0"}
    work = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert len(work) == len(run.spans) and all(event["dur"] >= 0 for event in work)
    assert max(event["ts"] + event["dur"] for event in work) <= 1e6 * sum(step.seconds for step in run.times) * 1.2
