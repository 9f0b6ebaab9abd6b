"""The mixture of experts that ships: Transformers loads it, bigkit knows it by name, and it has learned Python."""

import json
import math

import pytest
import torch
import transformers as tf

from bigkit import cli, dry_run, estimate_memory, load_checkpoint_and_dispatch, plan, zoo
from bigkit.model.experts import active_parameters, experts_of
from bigkit.zoo.gpt import PYMOE, SEPARATOR, encode, heldout_text, perplexity

FIGURES = json.loads((PYMOE / "training.json").read_text())


@pytest.fixture(scope="module")
def whole():
    return tf.AutoModelForCausalLM.from_pretrained(PYMOE).eval()


def test_shipped_files(whole):
    files = sorted(PYMOE.glob("model-*.safetensors"))
    assert len(files) == 5 and sum(file.stat().st_size for file in files) < 25e6
    assert type(whole) is tf.Qwen3MoeForCausalLM and whole.dtype == torch.bfloat16
    sizes = [(parameter.numel(), parameter.nbytes) for parameter in whole.parameters()]
    assert tuple(map(sum, zip(*sizes))) == (11_169_408, 22_338_816)
    assert FIGURES["parameters"] == 11_169_408
    card = (PYMOE / "README.md").read_text()
    assert "11,169,408" in card and f"{active_parameters(zoo.describe('pymoe')):,}" in card
    for figure in FIGURES["bits_per_byte"].values():
        assert f"{figure:.3f}" in card


def test_known_by_name():
    assert "pymoe" in zoo.names()
    experts = experts_of(zoo.describe("pymoe"))
    assert [(one.count, one.per_token, one.bytes_each()) for one in experts] == [(16, 2, 196_608)] * 6
    assert "of 11.2 M parameters a token uses 2.91 M" in str(estimate_memory("pymoe"))
    apart = plan("pymoe", {0: "12MB", "cpu": "1GB"})
    assert apart.feasible and apart.device_map[experts[0].name] == "cpu" and apart.device_map[""] == 0
    run = dry_run("pymoe", hardware="T4", batch_size=1, prompt_tokens=8, new_tokens=1)
    assert run.fits and "pymoe" in run.explain()


def test_known_in_a_shell(capsys):
    assert cli.main(["estimate-memory", "pymoe"]) in (0, None)
    assert "2.91 M" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_dispatched_it_writes_the_same(whole, place):
    empty = zoo.empty_model("pymoe", dtype="bfloat16").eval()
    places = {"": 0, **{one.name: place for one in experts_of(zoo.describe("pymoe"))}}
    model = load_checkpoint_and_dispatch(empty, PYMOE, places, stand_in={0: "cpu"}, force_hooks=True, strict=True)
    ids = torch.tensor([[SEPARATOR, *encode("def ")]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))


def test_it_knows_python(whole):
    model = whole.float()
    assert math.log2(perplexity(model, heldout_text()[:2048], 512)) == pytest.approx(1.257, abs=0.005)
    ids = torch.tensor([[SEPARATOR, *encode("for i in ran")]])
    assert bytes(model.generate(ids, max_new_tokens=3, do_sample=False)[0, -3:].tolist()) == b"ge("


@pytest.mark.soak
def test_held_out_figure(whole):
    found = math.log2(perplexity(whole.float(), heldout_text(), 512))
    assert found == pytest.approx(FIGURES["bits_per_byte"]["held_out"], abs=0.002)
