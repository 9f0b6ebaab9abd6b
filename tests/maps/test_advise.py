"""Advice: what ranks first, what a token waits for, and what would have to change."""

import json
import os
import platform
import time
from dataclasses import replace

import pytest

from bigkit import advise, describe, dry_run, plan
from bigkit.machine.hardware import FRAGMENTATION, HARDWARE, Hardware, machine_of
from bigkit.machine.ledger import Calibration, Ledger
from bigkit.model.spec import Attention, ModelSpec, ModuleSpec, TensorSpec


def test_what_fits_is_ranked_by_speed_and_then_by_quality():
    found = advise("llama-2-7b", "1 x RTX 4090")
    assert found.best.loss == 0, "Python is the limit, so fewer bits gain nothing"
    assert found.best.bottleneck == "Python" and found.best.plan.offloaded == 0
    large = advise("llama-2-70b", "1 x RTX 4090")
    assert large.best.plan.quantization == "nf4-double" and large.best.bottleneck in ("link", "disk")
    assert [o.token for o in large.options] == sorted(o.token for o in large.options)
    assert "waits for" in str(large) and len(repr(large)) < 110


def test_targets():
    best = {
        target: advise("llama-2-70b", "2 x A100-80GB", target=target).best
        for target in ("quality", "memory", "context")
    }
    assert best["quality"].loss == 0
    assert best["memory"].plan.quantization == "nf4-double"
    assert best["context"].plan.context == 4096, "what it was trained for; the memory would hold more"
    with pytest.raises(ValueError, match="unknown target 'cheap'"):
        advise("gpt2", "T4", target="cheap")
    with pytest.raises(ValueError, match="unknown hardware 'TPU'"):
        advise("gpt2", "TPU")


MEASURES = {
    "speed": lambda option: option.seconds,
    "quality": lambda option: option.loss,
    "memory": lambda option: sum(share.used for share in option.plan.shares),
    "context": lambda option: -option.plan.context,
}


@pytest.mark.parametrize("target", MEASURES)
@pytest.mark.parametrize(("model", "machine"), [("llama-3.1-405b", "8 x H100-80GB"), ("llama-3.1-8b", "RTX 4090")])
def test_ranks_and_stars_follow_the_target(model, machine, target):
    found = advise(model, machine, context=4096, target=target)
    measures = [MEASURES[target](option) for option in found.options]
    assert measures == sorted(measures) and found.options[0].front
    for i, option in enumerate(found.options):
        assert option.front == all(option.loss < better.loss for better in found.options[:i])
    assert any(option.loss == 0 for option in found.front)


def test_memory_is_all_that_a_way_takes():
    """Of 70 B on a card of 24 GiB each way fills the card; what rests in RAM and on disk decides."""
    found = advise("llama-2-70b", "1 x RTX 4090", context=4096, target="memory")
    assert [option.plan.quantization for option in found.options] == ["nf4-double", "nf4", "int8", None]
    assert all(option.memory > option.plan.offloaded for option in found.options)


def test_the_longest_context_lets_more_weights_rest_elsewhere():
    asked = {"context": 4096, "stored": (None,)}
    near, far = (advise("llama-3.1-8b", "RTX 4090", target=target, **asked).best for target in ("speed", "context"))
    assert near.plan.offloaded == 0 < far.plan.offloaded and far.plan.context > near.plan.max_context
    assert not plan_of("llama-3.1-8b", far.plan.context + 512).feasible


def plan_of(model, context):
    return plan(model, hardware="RTX 4090", dtype="bfloat16", context=context, strict=False)


def test_models_that_do_not_generate_have_a_pass_and_no_tokens():
    for name in ("resnet50", "bert-base-cased", "vit-base-patch16-224"):
        found = advise(name, "RTX 4090", batch=4, context=512)
        assert all(option.token is None and option.seconds == option.prefill > 0 for option in found.options)
        assert "tokens/s" not in str(found) + repr(found) and "a pass" in found.best.speed
    assert [option.plan.quantization for option in advise("resnet50", "T4").options] == [None], "none can be quantized"
    long, short = (advise("bert-base-cased", "T4", batch=64, context=n).best.seconds for n in (512, 8))
    assert long > short
    assert advise("t5-large", "T4", context=512).best.token > 0


def test_nothing_fits_and_why():
    found = advise("deepseek-v3", "laptop, no GPU", stored=[None, "int8"])
    assert found.best is None and found.cures and "nothing fits" in repr(found)
    assert "Does not fit." in str(found) and "lacks" in str(found)
    assert json.loads(found.to_json())["options"] == []


def test_bytes_over_the_link_decide():
    """A model that rests in RAM half: the link's time by hand."""
    machine = Hardware("small", tuple(HARDWARE["1 x RTX 4090"].gpus), 512 * 2**30, 0)
    found = advise("llama-2-70b", machine, stored=(None,))
    option = found.best
    assert option.waits["link"] == pytest.approx(option.plan.offloaded / (0.87 * machine.gpus[0].link))
    assert option.token == option.waits["link"] and option.waits["disk"] == 0


def test_experts_that_are_not_met_are_not_read():
    def model(experts):
        experts_of = ModuleSpec("E", {"w": TensorSpec((64, 10**8), "float16")})
        block = ModuleSpec("Block", {}, {"mlp": ModuleSpec("Mlp", {}, {"experts": experts_of})})
        facts = {"num_experts": 64, "experts_per_token": 2, "hidden_size": 8} if experts else {"hidden_size": 8}
        return ModelSpec(
            "m", ModuleSpec("Net", {}, {"h": block}), (), ("Block",), (Attention("h", 8),), facts, "module"
        )

    dense, sparse = (advise(model(experts), "H200", stored=(None,)).best for experts in (False, True))
    assert sparse.waits["GPU"] == pytest.approx(dense.waits["GPU"] * 2 / 64, rel=0.01)
    many = advise(model(True), "H200", batch=256, stored=(None,)).best
    assert many.waits["GPU"] > 0.99 * dense.waits["GPU"]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b"])
def test_experts_on_three_machines(name):
    """24 GB with little RAM, with much, and 8 x 80 GB: what a token waits for is what is chosen, and more is faster."""
    model = describe(name)
    small, roomy, server = (
        advise(model, machine_of(asked)) for asked in ("24GB, 64GiB RAM", "24GB, 512GiB RAM", "8 x A100-80GB")
    )
    for found in (small, roomy, server):
        assert found.best is not None and found.front[0] is found.best
        seconds = [option.token for option in found.options]
        assert seconds == sorted(seconds)
        for option in found.options:
            assert all(share.budget is None or share.used <= share.budget for share in option.plan.shares)
            if option.plan.experts and option.bottleneck == "link" and found is not server:
                (few, count), gpu = option.plan.experts, machine_of("24GB").gpus[0]
                link = option.plan.offloaded * few / count / (0.87 * gpu.link)
                beside = max(option.waits["Python"], option.waits["GPU"]) + option.waits["disk"]
                assert option.waits["link"] == pytest.approx(link) and option.token == pytest.approx(link + beside)
    assert server.best.token < roomy.best.token <= small.best.token
    assert server.best.plan.offloaded == 0 and len(server.options) == 4
    on_disk = [next(share.weights for share in found.best.plan.shares if share.device == "disk") for found in
               (small, roomy)]  # fmt: skip
    assert on_disk[1] == 0 and (on_disk[0] > 0) == (name == "deepseek-v3")
    if name == "deepseek-v3":  # its experts in flight were 42 GiB, which kept all but four bits from 24 GB
        seconds = {option.plan.quantization: option.token for option in roomy.options}
        assert {*list(seconds)[:2]} == {"nf4-double", "nf4"} and seconds[None] < 4


def test_a_dry_run_agrees():
    """The short formula beside the traced run, for models that fit: within a factor of two."""
    for name, gpu in (("gpt2-xl", "A100-40GB"), ("qwen3-0.6b", "T4")):
        told = advise(name, gpu, context=128, stored=(None,)).best
        run = dry_run(name, None, 1, 128, 1, gpu, dtype=told.plan.dtype)
        assert 0.5 < told.token / run.seconds["token"] < 2


def test_the_largest_models_take_no_time():
    start = time.process_time()
    for name in ("deepseek-v3", "llama-3.1-405b", "bloom"):
        for machine in ("8 x H100-80GB", "1 x RTX 4090", "laptop, no GPU"):
            advise(describe(name), machine_of(machine))
    assert time.process_time() - start < 10


def calibration(**measured):
    products = {"float16": ((1e9, 1e14),), "bfloat16": ((1e9, 1e14),), "float32": ((1e9, 1e13),)}
    return Calibration("a machine, 2 cores", **{"products": products, "issue": 1e-6, **measured})


def test_rates_measured_here_are_used_and_said(monkeypatch, tmp_path):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    card = replace(machine_of("RTX 4090").gpus[0], name="My GPU")
    mine = Hardware("this machine: 1 x My GPU", (card,), 512 * 2**30, 0)
    asked = {"model": "llama-2-70b", "batch": 1, "context": 512, "stored": (None,)}
    before = advise(hardware=mine, **asked)
    assert not before.measured and "measured" not in str(before)
    known = calibration(gpu="My GPU", link_pinned=10e9, memory=9e11, context=2**30)
    Ledger.load().add(known)
    after = advise(hardware=mine, **asked)
    assert after.measured and "bigkit calibrate measured on this machine" in str(after)
    assert json.loads(after.to_json())["measured"] is True
    assert after.best.waits["link"] == pytest.approx(after.best.plan.offloaded / 10e9)
    assert after.best.plan.shares[0].overhead == 2**30 + int(FRAGMENTATION * card.memory)
    run = dry_run("gpt2", None, 1, 8, 1, mine, dtype="float16")
    assert run.rates["cuda:0"].measured and run.rates["cuda:0"].link == 10e9, "a dry run takes the same"
    assert not advise(hardware="RTX 4090", **asked).measured, "another machine of the same kind was not measured"
    other = replace(mine, gpus=(replace(card, name="Another GPU"),))
    assert not advise(hardware=other, **asked).measured


def test_a_machine_without_a_gpu_is_measured_too(monkeypatch, tmp_path):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    mine = Hardware("this machine: no GPU", (), 64 * 2**30, 10**12)
    name = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    Ledger.load().add(replace(calibration(host_memory=7e9, disk_warm=2e9), machine=name))
    found = advise("llama-2-7b", mine, 1, 512, stored=(None,))
    share = found.best.plan.shares[0]
    assert found.measured and found.best.waits["RAM"] == pytest.approx((share.weights + share.kv_cache) / 7e9)
