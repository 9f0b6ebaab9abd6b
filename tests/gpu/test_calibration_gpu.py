"""What `calibrate()` finds on a GPU is of the right order, and what it finds of a model serves dry runs of it."""

import statistics

import pytest
import torch
import transformers

from bigkit import calibrate, dry_run, init_empty_weights
from bigkit.dryrun.fake_bnb import config_of, fill_quantized, quantize_empty
from bigkit.dryrun.workload import Workload, fill
from bigkit.machine.hardware import Hardware
from bigkit.machine.ledger import Ledger
from bigkit.measure.calibrate import machine_name
from bigkit.measure.twin import measure_twin, timed
from bigkit.offload.rows import count_rows


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return calibrate(tmp_path_factory.mktemp("calibration"), save=False, quick=True)


@pytest.mark.parametrize("place, share", [("cpu", 0), ("cpu", 0.5), ("disk", 0)])
def test_a_twin_whose_experts_rest_elsewhere(place, share, calibration):
    """Hooks, tables and readers are the model's own; a dry run of the model finds the twin."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=1024, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=6, vocab_size=32000,
        num_experts=32, num_experts_per_tok=4,
    )  # fmt: skip
    with init_empty_weights():
        model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    blocks = {name: module for name, module in model.named_modules() if count_rows(module)}
    places = {"": 0, **dict.fromkeys(blocks, place)}
    cache = round(share * sum(p.nbytes for module in blocks.values() for p in module.parameters()))
    plain, twin = measure_twin(model, "cuda"), measure_twin(model, "cuda", plan=places, expert_cache=cache)
    assert twin.rests and twin.token.seconds > plain.token.seconds / 2, "hosts of rented GPUs change their pace"
    known = calibration.with_twin(plain).with_twin(twin)
    run = dry_run(model, places, 1, 16, 4, "H200", calibration=known, expert_cache=cache)
    assert run.twin == twin and run.seconds["token"] >= 0.9 * twin.token.seconds
    print(f"{place}, {share}: token {1000 * plain.token.seconds:.1f} ms, with hooks {1000 * twin.token.seconds:.1f} ms")


def test_every_rate_of_a_gpu_is_found(calibration):
    assert calibration.gpu == torch.cuda.get_device_name(0)
    assert 1e-6 < calibration.issue < 1e-4 and 1e-7 < calibration.kernel < 1e-4
    assert len(calibration.pieces) == 4 and all(rate > 1e8 for _, rate in calibration.pieces)
    assert calibration.disk_warm > 1e8 and calibration.link_pinned > calibration.link_pageable > 1e8
    assert all(rate > 1e10 for _, rate in (*calibration.products["bfloat16"], *calibration.attention))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_dry_run_takes_the_pace_of_a_twin_from_the_ledger(quantization, tmp_path, monkeypatch):
    """As a user calls it: calibrate this machine, calibrate a model on it, then ask for a dry run of the model here.

    The model is so small that Python sets its pace, whoever else uses the GPU.
    """
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    calibrate(tmp_path, quick=True)
    config = transformers.Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, vocab_size=32000)
    config.architectures = ["Qwen3ForCausalLM"]
    calibrate(model=config, quantization=quantization)
    here = Hardware.detect()
    [twin] = Ledger.load().calibrations[machine_name()].twins
    assert (twin.model, twin.quantization) == ("Qwen3ForCausalLM", quantization)
    assert 1e-4 < twin.token.before < twin.token.seconds < 1 and twin.single.seconds < 1

    def empty():
        with init_empty_weights():
            return transformers.Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()

    load, dtype = (1, 16, 8), "bfloat16" if quantization else None
    run = dry_run(empty, 0, *load, here, quantization=quantization, dtype=dtype)
    assert run.twin == twin and run.ranges["token"].rests_on == "measured here" and run.times[-1].bottleneck == "python"
    assert dry_run(empty, 0, *load, "L4", quantization=quantization, dtype=dtype).twin is None
    if quantization:
        how = config_of(quantization, "bfloat16")
        model = fill_quantized(quantize_empty(empty(), how), {"": 0}, torch.device("cuda", 0), how)
    else:
        model = fill(empty(), {"": 0})
    steps = [timed(model, Workload(*load), "cuda") for _ in range(4)][1:]
    token = statistics.median(step[0] for run in steps for step in run[1:])
    print(f"token of {twin.model}, {quantization}: {1000 * run.seconds['token']:.1f} foretold, {1000 * token:.1f} ms")
    assert 0.5 < run.seconds["token"] / token < 2, "hosts of rented GPUs change their pace"
