"""`PlanExplorer` over several hosts: what is typed is the plan that `plan_hosts` makes, and one host comes back."""

from __future__ import annotations

import json

import pytest

from bigkit import HostsPlan, plan_hosts
from bigkit.widgets import PlanExplorer


@pytest.fixture
def explorer() -> PlanExplorer:
    return PlanExplorer("llama-2-70b", "2 x RTX 4090", quantization="nf4", hosts="4090 | 2 x L4", network="WLAN")


def test_hosts_are_those_of_the_plan(explorer: PlanExplorer) -> None:
    ask = {"dtype": "bfloat16", "quantization": "nf4", "context": 4096}
    expected = plan_hosts("llama-2-70b", ["RTX 4090", "2 x L4"], "WLAN", **ask)
    assert explorer.plan == expected == HostsPlan.from_json(explorer.to_json())
    assert json.loads(explorer.to_json())["network"]["name"] == "WLAN"
    assert 'aria-label="llama-2-70b over 2 hosts' in explorer.picture.value and "process" in explorer.text.value
    blocks = "+".join(str(stage.blocks) for stage in expected.stages)
    assert repr(explorer) == f"PlanExplorer(llama-2-70b nf4, 2 hosts, blocks {blocks}, {expected.one:.3g} tokens/s)"
    assert explorer.device_map["0: model.embed_tokens"] == 0 if len(explorer.device_map) > 2 else True
    scope: dict[str, HostsPlan] = {}
    exec(explorer.to_code(), scope)
    assert scope["p"] == expected
    assert PlanExplorer.from_state(explorer.state).plan == expected


def test_so_many_hosts_are_such_as_the_machine_shown(explorer: PlanExplorer) -> None:
    explorer.hosts.value = "2 hosts"
    assert [stage.host for stage in explorer.plan.stages] == ["2 x RTX 4090"] * 2
    with explorer.together():
        for gpu in explorer.gpus:
            gpu.value = 16
    assert {stage.host for stage in explorer.plan.stages} == {"2 x 16GiB (as fast as RTX 4060 Ti 16GB)"}
    explorer.gpus[0].value = 24
    assert "unlike GPUs" in explorer.error.value


def test_back_to_one_host_and_what_is_wrong(explorer: PlanExplorer) -> None:
    explorer.compare()
    explorer.network.value = "RDMA 400G"
    assert "The line is RDMA 400G" in explorer.verdict.value
    explorer.hosts.value = "<b>no such</b>"
    assert "unknown hardware" in explorer.error.value and "<b>no such" not in explorer.error.value
    explorer.hosts.value = ""
    assert explorer.error.value == "" and "One of them is over several hosts." in explorer.verdict.value
    explorer.drag("layer:1", "device:1")
    assert explorer.strategy.value == "custom"
    explorer.hosts.value = "2 hosts"
    explorer.model.value = "t5-large"
    assert "2 chains of blocks" in explorer.error.value
    explorer.reset()
    assert isinstance(explorer.plan, HostsPlan)
