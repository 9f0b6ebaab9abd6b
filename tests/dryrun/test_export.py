"""Dry runs for other viewers: the form of a Chrome trace."""

import json

from bigkit import dry_run


def test_a_chrome_trace_has_a_row_for_each_lane(tmp_path):
    run = dry_run("pygpt", {"": "cpu"}, 1, 8, 1)
    data = json.loads(run.save_chrome_trace(tmp_path / "run.json").read_text())
    names = {event["args"]["name"] for event in data["traceEvents"] if event["name"] == "thread_name"}
    assert names == {"python", "cuda:0", "copy to cuda:0"}
    work = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert len(work) == len(run.spans) and all(event["dur"] >= 0 for event in work)
    assert max(event["ts"] + event["dur"] for event in work) <= 1e6 * sum(step.seconds for step in run.times) * 1.2
