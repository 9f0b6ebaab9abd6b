"""The narrow twin of a model: the same operations as the model's, and found again by models of its class."""

import copy
import json
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers

from bigkit import dispatch_model, dry_run, init_empty_weights, zoo
from bigkit.dryrun.workload import Workload
from bigkit.machine.hardware import GPUS, Hardware
from bigkit.machine.ledger import Calibration, HostStep, Ledger, Twin
from bigkit.measure import twin as twin_module
from bigkit.measure.calibrate import calibrate, machine_name
from bigkit.measure.twin import LOAD, issued_in, measure_twin, narrow, timed, twin_of
from bigkit.offload.rows import count_rows
from bigkit.offload.transfer import PlainLane
from bigkit.zoo._transformers import from_config
from tests.maps.tiny_models import model_class, shrink

SMALL = Calibration(
    "here", memory=1e12, products={"bfloat16": ((1.0, 1e14),)}, attention=((1.0, 1e14),), issue=1e-6, kernel=1e-6,
    link_pinned=1e10, disk_warm=1e9,
)  # fmt: skip


def rehearsed(build):
    return dry_run(build, None, LOAD.batch, LOAD.prompt, 1, "H200")


def shallow(kind):
    """A model of real width with the first blocks of its type's default configuration."""
    sizes = {"num_layers": 2, "num_decoder_layers": 2} if kind == "t5" else {"num_hidden_layers": 2}
    config = transformers.CONFIG_MAPPING[kind](**sizes)
    with init_empty_weights():
        return from_config(model_class(config), config, torch.bfloat16).eval()


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma2", "opt", "t5", "mixtral", "falcon", "mamba2"])
def test_a_twin_does_the_same_operations_on_much_less(kind):
    model = shallow(kind)
    twin = twin_of(model)
    assert type(twin) is type(model) and len([*twin.modules()]) == len([*model.modules()])
    assert 3 * sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in model.parameters())
    twins, models = rehearsed(lambda: twin_of(model)), rehearsed(lambda: copy.deepcopy(model))
    assert twins.steps == models.steps
    for one, other in zip(twins.operations, models.operations):
        assert (one.name, one.issued, one.dtype) == (other.name, other.issued, other.dtype)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # of Transformers
def test_twins_of_every_type_that_generates_text():
    wrong, same = [], 0
    for kind in transformers.CONFIG_MAPPING:
        try:
            config = transformers.CONFIG_MAPPING[kind]()
            for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
                if isinstance(getattr(config, name, None), int):
                    setattr(config, name, min(4, getattr(config, name)))
            with init_empty_weights():
                model = model_class(config)(config).eval()
            if not model.can_generate() or model.main_input_name != "input_ids":
                continue
            whole = rehearsed(lambda model=model: copy.deepcopy(model))
        except Exception:
            continue  # it cannot be rehearsed at all
        try:
            twin = rehearsed(lambda model=model: twin_of(model))
            if [op.name for op in twin.operations] == [op.name for op in whole.operations]:
                same += 1
            else:
                wrong.append(f"{kind}: {len(twin.operations)} operations instead of {len(whole.operations)}")
        except Exception as error:
            wrong.append(f"{kind}: {type(error).__name__}: {error}")
    print(f"{same} twins are alike", *wrong, sep="\n")
    assert same > 20 * len(wrong)


def test_what_cannot_be_narrowed_says_so():
    with init_empty_weights():
        wide = torch.nn.Sequential(torch.nn.Linear(2**15, 2**14))
    with pytest.raises(ValueError, match="a Sequential of 2.* GiB has no config .* of images of at most 1.00 GiB"):
        twin_of(wide)
    config = shrink(transformers.Qwen2Config())
    assert narrow(config).hidden_size == config.hidden_size, "one that is narrow stays"


def test_a_small_model_of_images_is_its_own_twin():
    model = zoo.empty_model("resnet50.a1_in1k")
    twin = measure_twin(model, "cpu", repeats=1)
    whole = dry_run(lambda: zoo.empty_model("resnet50.a1_in1k"), None, 1, hardware="H200")
    assert twin.model == "ResNet" and twin.token is None
    assert twin.prefill.issued == sum(operation.issued for operation in whole.operations[: whole.steps[0][1]])
    assert next(model.parameters()).is_meta, "the model itself is not changed"


def test_what_passes_before_a_model_ends_where_its_encoder_begins():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "vocab_size": 64, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(num_layers=12, num_decoder_layers=1, **sizes)
    ).eval()
    generated, plain = (
        [timed(model, Workload(1, 16, 1, generate=generate), "cpu") for _ in range(8)][3:] for generate in (True, False)
    )
    ours, alone = (min(run[0][0] - run[0][1] for run in runs) for runs in (generated, plain))
    assert ours > 0.7 * alone, "twelve blocks of an encoder, which generate calls before the model"


def test_a_dry_run_takes_the_twins_pace():
    name = partial(shallow, "qwen3")
    counted = dry_run(name, None, 1, 16, 2, "H200")
    ends = [0, *(end for _, end in counted.steps)]
    prompt, token, _ = (sum(op.issued for op in counted.operations[a:b]) for a, b in zip(ends, ends[1:]))
    twin = Twin("Qwen3ForCausalLM", None, HostStep(0.5, 0.2, prompt), HostStep(0.25, 0.05, token))
    machine = Hardware("that one", (GPUS["H200"],), 0, 0)
    run = dry_run(name, None, 1, 16, 2, machine, calibration=SMALL.with_twin(twin))
    assert run.seconds["prefill"] == pytest.approx(0.5, rel=0.01)
    assert run.seconds["token"] == pytest.approx(0.25, rel=0.01)
    assert run.ranges["token"].rests_on == "measured here" and "measured here" in str(run)
    plain = dry_run(name, None, 1, 16, 2, machine, calibration=SMALL.with_twin(twin), generate=False)
    assert plain.seconds["token"] == pytest.approx(0.2, rel=0.15), "nothing passes between two plain calls"
    deeper = dry_run(name, None, 1, 16, 2, machine, calibration=SMALL.with_twin(
        replace(twin, prefill=HostStep(0.5, 0.2, prompt // 2), token=HostStep(0.25, 0.05, token // 2))))  # fmt: skip
    assert deeper.seconds["token"] == pytest.approx(0.45, rel=0.01), "twice the steps of a twin of half the depth"
    slow = replace(SMALL, products={"bfloat16": ((1.0, 1e12),)})
    long = dry_run(name, None, 32, 777, 0, machine, calibration=slow.with_twin(twin))
    assert long.times[0].bottleneck == "cuda:0" and long.seconds["prefill"] > 0.6


def test_a_mixture_that_is_called_plainly_has_a_pace_of_its_own():
    config = shrink(transformers.Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2))
    with init_empty_weights():
        model = transformers.Qwen3MoeForCausalLM(config).eval()
    twin = measure_twin(model, "cpu", repeats=1)
    assert twin.plain and twin.token and twin.plain.issued != twin.token.issued, "generate decodes with other experts"
    assert Twin.from_json(json.loads(json.dumps(asdict(twin)))) == twin
    twin = replace(twin, plain=HostStep(0.5, 0.1, twin.plain.issued))
    told = {
        generate: dry_run(
            lambda: copy.deepcopy(model), None, 1, 16, 2, "H200", generate=generate, calibration=SMALL.with_twin(twin)
        ).seconds["token"]
        for generate in (True, False)
    }
    assert told[False] == pytest.approx(0.4, rel=0.01) and told[True] == pytest.approx(twin.token.seconds, rel=0.01)


def test_without_a_twin_it_says_that_it_is_a_guess():
    run = dry_run(partial(shallow, "qwen3"), None, 1, 16, 2, "H200")
    found = run.ranges["token"]
    assert found.rests_on == "a guess" and found.low < 0.7 * found.value and found.high > 1.5 * found.value
    other = Twin("LlamaForCausalLM", None, HostStep(9.0, 0.0, 10))
    run = dry_run(
        partial(shallow, "qwen3"), None, 1, 16, 2, "H200", calibration=replace(SMALL, issue=1e-4).with_twin(other)
    )
    assert run.twin is None and run.ranges["token"].rests_on == "a guess from other models measured here"


def test_calibrate_keeps_a_models_pace(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    Ledger.load().add(replace(SMALL, machine=machine_name()))
    config = shrink(transformers.Qwen3Config())
    config.architectures = ["Qwen3ForCausalLM"]
    calibration = calibrate(model=config, quick=True)
    [twin] = Ledger.load().calibrations[machine_name()].twins
    assert calibration.twins == (twin,) and twin.model == "Qwen3ForCausalLM" and twin.token
    assert all(0 < step.before < step.seconds < 10 for step in (twin.prefill, twin.token, twin.single))
    config.num_hidden_layers = 2
    config.layer_types = config.layer_types[:2]
    calibrate(model=config, quick=True)
    twins = Ledger.load().calibrations[machine_name()].twins
    assert len(twins) == 2 and twins[1].token.issued < twins[0].token.issued
    known = Ledger.load().calibrations[machine_name()]
    assert known.twin("Qwen3ForCausalLM", None, twins[0].prefill.issued + 1) == twins[0]
    assert known.twin("Qwen3ForCausalLM", "nf4", 100) is None and "Qwen3ForCausalLM" in known.explain()
    Ledger.load().add(replace(known, memory=2e12, twins=()))
    assert Ledger.load().calibrations[machine_name()].twins == twins, "calibrating anew keeps them"
    Ledger.load().add(replace(known, versions={"torch": "another"}, twins=()))
    assert Ledger.load().calibrations[machine_name()].twins == (), "but not with other libraries"


def test_a_twin_that_rests_as_the_model_does():
    """Its hooks do what the model's do, the host's steps are counted with them, and such models find it."""
    config = shrink(transformers.Qwen3MoeConfig())
    with init_empty_weights():
        model = transformers.Qwen3MoeForCausalLM(config)
    blocks = [name for name, module in model.named_modules() if count_rows(module)]
    places = {"": 0, **dict(zip(blocks, ["cpu", "disk"] * len(blocks)))}
    size = sum(p.nbytes for name in blocks for p in model.get_submodule(name).parameters())
    seen = []
    with mock.patch.object(twin_module, "dispatch_model", lambda *given, **options: seen.append(options) or
                           dispatch_model(*given, **options)):  # fmt: skip
        twin = measure_twin(model, "cpu", repeats=1, plan=places, expert_cache=size)
    own = sum(p.nbytes for m in twin_of(model).modules() if count_rows(m) for p in m.parameters())
    assert seen[0]["expert_cache"] == own, "all of the model's experts: all of the twin's"
    assert twin.rests == ("model.layers.*.mlp.experts: cpu", "model.layers.*.mlp.experts: disk", "some on the GPU")
    assert 0 < twin.token.before < twin.token.seconds and all(p.is_meta for p in model.parameters())
    plain = replace(twin, token=HostStep(9.0, 0.1, twin.token.issued), rests=())
    known = Calibration.from_json(asdict(SMALL.with_twin(twin).with_twin(plain)))
    issued = twin.prefill.issued
    assert known.twins == (twin, plain) and twin.rests[0] in known.explain()
    assert known.twin("Qwen3MoeForCausalLM", None, issued, twin.rests) == twin
    assert known.twin("Qwen3MoeForCausalLM", None, issued, ("another: cpu",)) == plain
    assert known.twin("Qwen3MoeForCausalLM", None, issued) == plain
    run = dry_run(model, places, 1, 16, 2, Hardware("one", (GPUS["H200"],), 0, 0), calibration=known, expert_cache=size)
    assert run.twin == twin


def test_a_twins_clock_stands_still_while_files_are_read(monkeypatch):
    config = shrink(transformers.Qwen3MoeConfig())
    with init_empty_weights():
        model = transformers.Qwen3MoeForCausalLM(config)
    places = {"": 0, **{name: "disk" for name, module in model.named_modules() if count_rows(module)}}

    waits = []

    def slow(self, slot):
        if slot.pending:
            waits.append(100.0)
            slot.pending = []

    fill = PlainLane.fill

    def filled(self, slot, unit):
        fill(self, slot, unit)
        slot.pending = ["a reader"]

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(waits))
    monkeypatch.setattr(twin_module, "time", clock)
    monkeypatch.setattr(PlainLane, "fill", filled)
    monkeypatch.setattr(PlainLane, "arrive", slow)
    monkeypatch.setattr(PlainLane, "finish", lambda self, slot: None)
    twin = measure_twin(model, "cpu", repeats=1, plan=places)
    blocks = len(places) - 1
    assert len(waits) >= 4 * blocks, "two prompts of each length read all blocks"
    assert twin.prefill.seconds < 100 and twin.token.seconds < 100


def test_a_twin_is_not_kept_as_its_checkpoint_is_stored():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
    how = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    counts = []
    for more in ({}, {"quantization_config": how}):
        with init_empty_weights():
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)).to(torch.bfloat16)
        counts.append(issued_in(model, LOAD, None))
    assert counts[0] == counts[1], "it is filled with plain weights, and so it is counted"


def test_a_quantized_twin():
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=640, num_attention_heads=2, num_hidden_layers=2
    )
    with init_empty_weights():
        model = transformers.LlamaForCausalLM(config)
    assert measure_twin(model, "cpu", "nf4", repeats=1).quantization == "nf4"
