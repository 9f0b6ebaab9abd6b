"""A real run on the GPU, held against its dry run."""

import pytest

from bigkit import dry_run, record, zoo
from bigkit.dryrun.workload import Workload, fill, passes
from bigkit.machine.ledger import Ledger
from bigkit.measure.allocations import settle


def test_memory_is_as_foretold_and_noted(tmp_path):
    load = Workload(2, 64, 3)
    foretold = dry_run("gpt2", None, load.batch, load.prompt, load.new, "H200", dtype="bfloat16")
    settle()
    model = fill(zoo.empty_model("gpt2", dtype="bfloat16").eval(), {"": 0})
    with record(model, foretold, ledger=tmp_path / "ledger.json") as recorder:
        for _ in passes(model, load, "cuda"):
            pass
    assert [call.phase for call in recorder.calls] == ["prefill", "token", "token", "token"]
    errors = {name: error for name, _, _, error in recorder.rows()}
    assert errors["allocated cuda:0"] == pytest.approx(0, abs=0.005)
    assert errors["reserved cuda:0"] == pytest.approx(0, abs=0.03)
    assert {"prefill", "token"} <= errors.keys()
    assert Ledger.load(tmp_path / "ledger.json").bias()["allocated cuda:0"].runs == 1
