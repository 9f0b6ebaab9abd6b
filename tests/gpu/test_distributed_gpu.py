"""nccl between GPUs, and launching after CUDA was used here. Skipped, with the reason, where GPUs are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigkit import PartialState, notebook_launcher
from bigkit.distributed.launch import write_example
from tests.distributed.test_launch import launch

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def work(sizes: list[int]) -> list[Any]:
    """Split, compute and gather CUDA and CPU tensors of uneven lengths, and objects."""
    import torch
    import torch.distributed as dist

    from bigkit import PartialState, gather, gather_for_results, gather_object

    state = PartialState()
    found: list[Any] = [str(state.device), dist.get_backend_config() if dist.is_initialized() else ""]
    found.append(torch.cuda.current_device())
    for padding in (False, True):
        for size in sizes:
            numbers = torch.arange(2 * size).view(size, 2)
            with state.split_between_processes(numbers, apply_padding=padding) as mine:
                results = mine.to(state.device, torch.bfloat16) * 2
                both = gather_for_results({"gpu": results, "cpu": mine, "text": [str(row) for row in mine]}, size)
            assert both["gpu"].device == state.device and both["cpu"].device.type == "cpu"
            assert torch.equal(both["gpu"].cpu(), (numbers * 2).to(torch.bfloat16)), (padding, size)
            assert torch.equal(both["cpu"], numbers) and both["text"] == [str(row) for row in numbers]
    state.wait_for_everyone()
    found.append(gather(torch.tensor(state.process_index, device=state.device)).tolist())
    found.append(gather_object([state.process_index]))
    return found


def test_one_process_has_the_gpu() -> None:
    state = PartialState()
    assert state.device == torch.device("cuda", 0) and PartialState(cpu=True).device.type == "cpu"


def test_launching_after_cuda_was_used_here() -> None:
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert notebook_launcher(work, ([0, 1, 5],), 1)[0][0] == "cuda:0"


def test_gloo_alone_carries_cuda_tensors() -> None:
    def both() -> list[int]:
        import torch

        from bigkit import PartialState, gather

        state = PartialState(cpu=True)
        found = gather(torch.tensor([state.process_index], device="cuda:0"))
        assert found.device == torch.device("cuda:0")
        return found.tolist()

    assert notebook_launcher(both, (), 2) == [[0, 1]] * 2


def test_nccl_between_gpus(gpus: int) -> None:
    torch.ones(3, device="cuda")
    answers, everyone = notebook_launcher(work, ([0, 1, 2, 3, 7, 1000],), gpus), [*range(gpus)]
    for rank, answer in enumerate(answers):
        assert answer == [f"cuda:{rank}", "cpu:gloo,cuda:nccl", rank, everyone, everyone]


def test_a_failing_rank_on_gpus_ends_the_others(gpus: int) -> None:
    def fails() -> None:
        import torch

        from bigkit import PartialState, gather

        state = PartialState(timeout=60)
        gather(torch.ones(1, device=state.device))
        if state.process_index == 1:
            raise ValueError("no prompt for me")
        gather(torch.ones(1, device=state.device))

    with pytest.raises(RuntimeError, match=f"process 1 of {gpus} failed: ValueError: no prompt for me"):
        notebook_launcher(fails, (), gpus)


@needs_two
def test_the_example_takes_every_gpu(tmp_path: Path) -> None:
    write_example("inference", tmp_path)
    done = launch(tmp_path, "distributed_inference.py")
    assert done.returncode == 0, done.stderr
    for rank in range(torch.cuda.device_count()):
        assert f"process {rank} of {torch.cuda.device_count()} on cuda:{rank}" in done.stdout
    one = launch(tmp_path, "--gpu_ids", "1", "distributed_inference.py")
    assert "process 0 of 1 on cuda:0: 4 prompts" in one.stdout, one.stderr


def test_more_processes_than_gpus_say_so(tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text("from bigkit import PartialState\nPartialState()\n")
    count = torch.cuda.device_count()
    done = launch(tmp_path, "--num_processes", str(count + 1), "who.py")
    assert done.returncode != 0 and f"process {count} of this host has no GPU: there are {count}" in done.stderr


def test_diffusion_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    write_example("diffusion", tmp_path)
    done = subprocess.run([sys.executable, "distributed_diffusion.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a_cat_0.png", "a_chicken_0.png", "a_dog_0.png"]
