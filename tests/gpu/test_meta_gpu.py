"""Building on a real GPU, and asking a real machine for its budgets."""

import torch
from torch import nn

import bigkit
from bigkit import get_balanced_memory, get_max_memory, infer_auto_device_map, init_empty_weights, init_on_device, zoo


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.arange(8.0))


def test_parameters_are_created_on_the_gpu_and_buffers_stay():
    with init_on_device("cuda:0"):
        net = Net()
    assert net.a.weight.device == torch.device("cuda:0") and net.a.weight is net.b.weight
    assert net.table.device.type == "cpu"
    with init_on_device("cuda:0", include_buffers=True):
        net = Net()
    assert net.table.device == torch.device("cuda:0") and net.table.tolist() == list(range(8))


def test_an_empty_model_touches_no_gpu_memory():
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with init_empty_weights():
        nn.Sequential(*[nn.Linear(30_000, 30_000) for _ in range(20)])
    assert torch.cuda.max_memory_allocated() == before


def test_budgets_are_what_is_free():
    budgets = get_max_memory()
    free, total = torch.cuda.mem_get_info(0)
    assert abs(budgets[0] - free) < 2**28 and budgets[0] <= total and budgets["cpu"] > 0
    hold = torch.empty(2**30, dtype=torch.uint8, device="cuda:0")
    assert get_max_memory()[0] <= budgets[0] - 2**30 + 2**24
    del hold


def test_auto_map_of_this_machine():
    model = zoo.empty_model("opt-1.3b")
    assert infer_auto_device_map(model) == {"": 0}
    if torch.cuda.device_count() > 1:  # spread over them, none left out
        spread = infer_auto_device_map(model, get_balanced_memory(model))
        assert {*spread.values()} == {*range(torch.cuda.device_count())}
    else:
        assert get_balanced_memory(model)[0] < 0.91 * torch.cuda.mem_get_info(0)[1]
    used = {*bigkit.plan("opt-1.3b", dtype="float16").device_map.values()}
    assert used == {*range(torch.cuda.device_count())}


def test_weights_take_what_the_plan_says():
    def asked() -> int:  # without what the allocator adds, which depends on what was there before
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    before = asked()
    model = zoo.empty_model("qwen3-0.6b").to(torch.bfloat16).to_empty(device="cuda:0")
    model.tie_weights()
    planned = bigkit.plan("qwen3-0.6b", {0: "80GiB"}, dtype="bfloat16")
    assert abs(planned.used[0] - (asked() - before)) <= 2**16
