"""One question has one answer: fifty questions asked through Python, the command line, dry runs and explorers.

A question is a model, a place (a machine or budgets), how its weights are stored, and a load.
"""

import json
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch

from bigkit import HARDWARE, advise, describe, dry_run, estimate_memory, plan, zoo
from bigkit.cli import main
from bigkit.devices import whole_on
from bigkit.dryrun.run import _places
from bigkit.machine.hardware import CONTEXT_BYTES, machine_of
from bigkit.machine.ledger import overhead_of
from bigkit.maps.plan import PlanError
from bigkit.model.estimate import generates, remarks, tokens_seen
from bigkit.widgets import DryRunExplorer, FitExplorer, PlanExplorer


class Question(NamedTuple):
    model: str
    machine: str | dict = "1 x RTX 4090"
    stored: str | None = "bfloat16"  # a dtype, a quantization, or None: as stored
    context: int = 2048
    batch: int = 1


QUANTIZED = ("int8", "nf4", "nf4-double")
TWO = {0: "10GiB", 1: "8GiB", "cpu": "32GiB", "disk": "100GiB"}
ONE = {0: "6GiB", "cpu": "64GiB", "disk": "1TiB"}
QUESTIONS = [
    *(Question(name, stored=stored) for name in ("llama-2-7b", "llama-3.1-8b", "gemma-2-9b", "opt-13b")
      for stored in (None, "bfloat16", "nf4")),
    *(Question("llama-2-70b", machine, stored) for machine in ("1 x RTX 4090", "2 x RTX 4090", "8 x H100-80GB")
      for stored in ("bfloat16", "int8", "nf4-double")),
    *(Question("mixtral-8x7b", "4 x A100-40GB", stored, batch=4) for stored in (None, "bfloat16", "int8", "nf4")),
    *(Question("glm-4.6", "8 x H200", stored, 4096) for stored in (None, "nf4")),
    *(Question(name, "Colab T4", "float16", batch=8) for name in ("bert-base-cased", "resnet50.a1_in1k", "t5-large",
      "vit-base-patch16-224", "convnext_base.fb_in22k_ft_in1k")),
    *(Question(name, "Colab T4", "nf4", 512) for name in ("gpt2", "bert-base-cased", "t5-large")),
    *(Question(name, "1 x RTX 3090", context=context) for name, context in (("gpt2", 4096), ("gpt2-xl", 1024),
      ("llama-2-7b", 8192), ("pygpt", 2048), ("mistral-7b", 40_000))),
    *(Question("llama-2-7b", machine, stored) for machine in (TWO, ONE) for stored in (None, "float16", "int8")),
    Question("llama-3.1-405b", "Binder"), Question("glm-4.6", "laptop, no GPU", "nf4"),
    Question("qwen3-0.6b", "laptop, no GPU", None), Question("bloom", "4 x L4", "nf4-double", 128),
]  # fmt: skip
IDS = [f"{q.model}, {q.machine if isinstance(q.machine, str) else len(q.machine)}, {q.stored}, {q.context}"
       for q in QUESTIONS]  # fmt: skip
every_question = pytest.mark.parametrize("question", QUESTIONS, ids=IDS)


def storing(question):
    """The arguments that say how weights are stored."""
    if question.stored in QUANTIZED:
        return {"dtype": "float16", "quantization": question.stored}
    return {"dtype": question.stored}


def place(question):
    """The arguments that say where."""
    named = isinstance(question.machine, str)
    return {"hardware": question.machine} if named else {"max_memory": question.machine}


@cache
def answer(index):
    """What `bigkit.plan` says."""
    question = QUESTIONS[index]
    load = {"batch": question.batch, "context": question.context}
    return plan(question.model, **place(question), **storing(question), **load, strict=False)


def plan_of(question):
    return answer(QUESTIONS.index(question))


def command(question, name, *more):
    """The same question as a command line; returns the exit status."""
    where = ["--hardware", question.machine] if isinstance(question.machine, str) else [
        "--max_memory", *(f"{device}={size}" for device, size in question.machine.items())]  # fmt: skip
    how = [item for option, value in storing(question).items() if value for item in (f"--{option}", value)]
    load = ["--batch", str(question.batch), "--context", str(question.context)]
    return main([name, question.model, *load, *(where if name != "estimate-memory" else []),
                 *(how if name in ("plan", "dry-run") else []), *more])  # fmt: skip


def test_there_are_fifty():
    assert len(QUESTIONS) == len(set(IDS)) == 50


@every_question
def test_an_estimate_and_a_plan_count_the_same(question):
    found, spec = plan_of(question), describe(question.model)
    stored = question.stored or spec.facts.get("torch_dtype", "float32")
    told = estimate_memory(question.model, stored=[stored], batch=question.batch, context=question.context)
    [row] = told.inference
    assert told.parameters == spec.parameters and told.context == found.context
    buffers = spec.root.bytes(buffers_only=True)  # a cast to a dtype takes them along, loading as stored does not
    assert abs(sum(share.weights for share in found.shares) - row.weights) <= (buffers if not question.stored else 0)
    assert sum(share.kv_cache for share in found.shares) == row.kv_cache
    busy = [share for share in found.shares if share.activations or share.overhead]
    assert {share.activations for share in busy} <= {row.activations}
    expected = overhead_of(HARDWARE[question.machine]) if isinstance(question.machine, str) else 0
    assert all(share.overhead == expected for share in busy if isinstance(share.device, int))
    if question.stored is None:
        assert found.stored == f"{spec.facts.get('torch_dtype', 'float32')} as stored"


@every_question
def test_what_must_be_said_is_said_everywhere(question, capsys):
    """A context beyond the model's positions, and caches that are not counted."""
    found, spec = plan_of(question), describe(question.model)
    notes = remarks(question.model, spec.facts, question.context)
    beyond = question.context > spec.facts.get("max_position_embeddings", question.context)
    assert bool(notes) == (beyond and spec.facts["positions"] in ("learned", "rotary"))
    told = estimate_memory(question.model, batch=question.batch, context=question.context)
    for note in notes:
        assert note in str(found) and note in str(told) and note in found.notes and note in told.notes
        assert command(question, "plan") == 0 and note in capsys.readouterr().out
        assert command(question, "advise") == 0 and note in capsys.readouterr().out
        assert command(question, "estimate-memory") == 0 and note in capsys.readouterr().out


@pytest.mark.parametrize("question", [question for question in QUESTIONS if isinstance(question.machine, str)])
def test_advice_is_made_of_the_same_plans(question):
    found = advise(question.model, question.machine, question.batch, question.context)
    half = "float16" if question.machine == "Colab T4" else "bfloat16"
    for kind in (None, *QUANTIZED):
        same = plan(question.model, hardware=question.machine, dtype=half, quantization=kind, batch=question.batch,
                    context=question.context, strict=False)  # fmt: skip
        offered = [option for option in found.options if option.plan.quantization == kind]
        spec = describe(question.model)
        quantizes = kind is None or spec.quantized(spec.precision(half, kind)) != []
        assert len(offered) == (same.feasible and quantizes)
        for option in offered:
            assert option.plan == same and option.memory == sum(same.used.values())
            assert ("tokens/s" in option.speed) == generates(spec) == (option.token is not None)


@every_question
def test_the_command_line_says_the_same(question, capsys):
    found = plan_of(question)
    status = command(question, "plan", "--json")
    said = capsys.readouterr()
    assert status == (0 if found.feasible else 2)
    if found.feasible:
        assert json.loads(said.out) == json.loads(found.to_json())
        assert command(question, "plan") == 0 and capsys.readouterr().out == f"{found}\n"
    else:
        with pytest.raises(PlanError) as error:
            plan(question.model, **place(question), **storing(question), batch=question.batch, context=question.context)
        assert said.err == f"bigkit: {error.value}\n"
    told = estimate_memory(question.model, batch=question.batch, context=question.context)
    assert command(question, "estimate-memory") == 0 and capsys.readouterr().out == f"{told}\n"
    if isinstance(question.machine, str):
        advice = advise(question.model, question.machine, question.batch, question.context)
        assert command(question, "advise") == 0 and capsys.readouterr().out == f"{advice}\n"


def turn(explorer, **values):
    with explorer.together():
        for name, value in values.items():
            if name == "context":
                explorer.context.options = [(f"{value:,}", value)]
            getattr(explorer, name).value = value
    assert not explorer.error.value
    return explorer


@pytest.fixture(scope="module")
def explorers():
    return PlanExplorer("gpt2"), FitExplorer("gpt2")


@every_question
def test_explorers_say_the_same(question, explorers):
    placing, fitting = explorers
    found, load = plan_of(question), {"batch": question.batch, "context": question.context}
    if isinstance(question.machine, dict):
        quantization = question.stored if question.stored in QUANTIZED else None
        placing = PlanExplorer(question.model, question.machine, dtype=storing(question)["dtype"],
                               quantization=quantization, context=question.context, batch=question.batch)  # fmt: skip
    else:
        quantized = question.stored in QUANTIZED
        turn(placing, model=question.model, hardware=question.machine, dtype=storing(question)["dtype"] or "as stored",
             quantization=question.stored if quantized else "none", **load)  # fmt: skip
        turn(fitting, model=question.model, hardware=question.machine, **load)
        advice = fitting.advice
        assert advice == advise(question.model, question.machine, question.batch, question.context)
        assert advice.verdict in fitting.verdict.value and advice.verdict in fitting.text.value
        assert not advice.best or (advice.best.pace in advice.verdict and advice.best.plan.stored in advice.verdict)
    assert placing.plan == found
    words = "Does not fit." if not found.feasible else "Fits, offloaded." if found.offloaded else "Fits."
    assert words in placing.verdict.value and found.longest in placing.verdict.value
    for note in found.notes:
        assert note in placing.verdict.value
        assert isinstance(question.machine, dict) or note in fitting.verdict.value


REHEARSED = [
    Question("pygpt", "Colab T4", None, 128), Question("resnet50.a1_in1k", "Colab T4", None, 64, 2),
    *(pytest.param(question, marks=pytest.mark.soak) for question in (
        Question("gpt2", "Colab T4", "float16", 64, 2), Question("qwen3-0.6b", "1 x RTX 4090", None, 128),
        Question("llama-2-7b", "2 x RTX 4090", "float16", 256), Question("llama-2-7b", ONE, "float16", 128),
        Question("gpt2", "Colab T4", "nf4", 64), Question("bert-base-cased", "Colab T4", None, 64, 2),
        Question("mixtral-8x7b", "4 x A100-40GB", None, 64))),
]  # fmt: skip


@pytest.mark.parametrize("question", REHEARSED)
def test_a_dry_run_holds_what_was_planned(question, capsys):
    if question.stored in QUANTIZED:
        pytest.importorskip("bitsandbytes")
    spec, machine, new = describe(question.model), HARDWARE["1 x RTX 4090"], 2
    if isinstance(question.machine, str):
        machine = HARDWARE[question.machine]
    load = {"batch": question.batch, "context": question.context + new}
    placed = plan(spec, **place(question), **storing(question), **load)
    run = dry_run(question.model, placed, question.batch, question.context, new, machine)
    assert run.device_map == placed.device_map and run.fits
    for share in placed.shares:
        if not share.runs or share.device == "cpu" or not share.used:
            continue
        line = run.timeline(share.device)
        assert line.capacity == machine.gpus[share.device].memory - CONTEXT_BYTES
        held = line.kinds["weights"][-1]
        buffers = spec.root.bytes(buffers_only=True)
        assert 0 <= held - share.weights <= 2 * buffers + placed.slots * 2**20 + (2**20 if placed.quantization else 0)
        if generates(spec) and spec.attention:
            assert line.kinds["KV cache"][-1] == share.kv_cache
        assert line.at_peak()["slots"] <= share.reserve * 1.001
    assert (run.tokens_per_second > 0) == generates(spec)
    if generates(spec) and isinstance(question.machine, str) and not placed.quantization:
        told = advise(spec, question.machine, **load, stored=(None,)).best
        assert 0.4 < told.token / run.seconds["token"] < 2.5
    assert command(question, "dry-run", "--new", str(new), "--json") == 0 if isinstance(question.machine, str) else True
    if isinstance(question.machine, str):
        assert json.loads(capsys.readouterr().out) == json.loads(run.to_json())
        assert command(question, "dry-run", "--new", str(new)) == 0
        said = capsys.readouterr().out
        assert said == f"{placed}\n\n{run}\n" and run.speed in said
    assert run.asked in str(run) and ("image" in run.asked) == (tokens_seen(spec, 7) != 7)


def test_the_dry_run_explorer_plans_as_plan_does():
    explorer = DryRunExplorer("gpt2", "T4", 2, dtype=None, batch=2, prompt=64, new=1)
    same = plan("gpt2", hardware=explorer.hardware, batch=2, context=65)
    assert explorer.plan == same and explorer.run.device_map == same.device_map
    assert explorer.run == replace(dry_run("gpt2", same, 2, 64, 1, explorer.hardware), hardware=explorer.run.hardware)
    assert explorer.run.speed in explorer.verdict.value and explorer.run.speed in explorer.text.value


def test_a_dry_run_without_a_plan_is_spread_over_all_gpus_of_a_machine():
    run = dry_run("gpt2", None, 1, 32, 1, "2 x T4")
    assert run.device_map == plan("gpt2", hardware="2 x T4", context=33).device_map
    assert zoo.describe("gpt2").facts["generates"]


PLAIN = {"max_memory": {0: "1GiB", "cpu": "2GiB"}, "batch": 2, "context": 64}


@pytest.mark.parametrize(
    "spelled",
    [
        {"max_memory": {np.int64(0): np.int64(2**30), "cpu": 2.0 * 2**30}},
        {"max_memory": {"0": "1gib", torch.device("cpu"): "2gib"}},
        {"max_memory": {"cuda:0": "1024MiB", "cpu": "2 GiB"}, "batch": np.int32(2), "context": np.int64(64)},
        {"batch": "2", "context": "64"},
        {"batch": 2.0, "context": 64.0, "dtype": "auto", "keep": None},
    ],
)
def test_arguments_as_users_have_them(spelled):
    found = plan("gpt2", **{**PLAIN, **spelled})
    assert found == plan("gpt2", **PLAIN) and found.to_json() == plan("gpt2", **PLAIN).to_json()


@pytest.mark.parametrize("place", [0, "0", "cuda:0", torch.device("cuda:0"), np.int64(0), {"": 0}])
def test_one_device_is_a_map(place):
    expected = plan("pygpt", **PLAIN, strategy={"": 0})
    assert plan("pygpt", **PLAIN, strategy=place) == expected and _places(whole_on(place)) == expected.device_map


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"quantization": "nf4", "keep": "lm_head"}, {"quantization": "NF4", "keep": ["lm_head"]}),
        ({"dtype": "float16"}, {"dtype": torch.float16}),
        ({"dtype": "bf16"}, {"dtype": "BF16"}),
    ],
)
def test_ways_to_store_as_users_have_them(one, other):
    assert plan("llama-2-7b", hardware="4090", **one) == plan("llama-2-7b", hardware="1 x RTX 4090", **other)


@pytest.mark.parametrize(
    ("name", "machine"),
    [("rtx 4090", "1 x RTX 4090"), ("2xRTX4090", "2 x RTX 4090"), ("8 x h100", "8 x H100-80GB"),
     ("a100 80gb", "1 x A100-80GB"), ("colab t4", "Colab T4"), ("t4", "1 x T4")],
)  # fmt: skip
def test_machines_by_the_names_that_people_type(name, machine):
    assert machine_of(name) == machine_of(machine) and machine_of(name).name == machine


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plan("gpt2", hardware="a100"), "it could be 'A100-40GB', 'A100-80GB'"),
        (lambda: plan("gpt2", hardware="0 x T4"), "unknown hardware '0 x T4'"),
        (lambda: plan("gpt2", PLAIN["max_memory"], batch=1.5), "batch must be a whole number of at least 1, not 1.5"),
        (lambda: advise("gpt2", "T4", context="many"), "context must be a whole number of at least 0, not 'many'"),
        (lambda: estimate_memory("gpt2", batch=True), "batch must be a whole number of at least 1, not True"),
        (lambda: dry_run("pygpt", None, 1, 0, 0, "T4"), "prompt must be a whole number of at least 1, not 0"),
        (lambda: plan("gpt2", PLAIN["max_memory"], quantization="4bit"), "unknown quantization '4bit'"),
    ],
)
def test_what_is_not_understood_is_one_sentence(call, says):
    with pytest.raises(ValueError) as error:
        call()
    assert says in str(error.value)


def test_a_name_that_the_model_lacks_is_warned_of():
    with pytest.warns(UserWarning, match="special_dtypes names 'nope', but gpt2 has no such module"):
        plan("gpt2", PLAIN["max_memory"], special_dtypes={"nope": "float16", "lm_head.weight": "float16"})
    with pytest.raises(TypeError, match="hardware must be a Hardware or the name of one, not int"):
        plan("gpt2", hardware=3)
