"""The script that trains a mixture of experts: what it writes is Transformers' own, and learned something."""

import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers as tf

from bigkit import init_empty_weights, load_checkpoint_and_dispatch
from bigkit.machine.routing import Routing
from bigkit.meta.skeleton import spec_from_module
from bigkit.model.experts import experts_of
from bigkit.zoo.gpt import heldout_text
from tests import forked

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    stdlib, library = folder / "python", Path(sysconfig.get_path("stdlib"))
    stdlib.mkdir()
    for name in "bisect colorsys graphlib shlex fnmatch fractions textwrap argparse ast".split():
        (stdlib / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())
    out = folder / "out"
    # The figure of the held-out text is that of its beginning here.
    script = (
        "import runpy\nfrom bigkit.zoo import gpt\ntext = gpt.heldout_text()[:2000]\n"
        "gpt.heldout_text = lambda: text\nrunpy.run_path('train_moe.py', run_name='__main__')"
    )
    words = ["--stdlib", stdlib, "--out", out, "--device", "cpu"]
    small = "--layers 2 --heads 2 --hidden_size 32 --expert_size 32 --block_size 64 --batch 8 --sample_tokens 4"
    small += " --no-compile --steps 30 --evaluate_every 1000 --lr 0.01"
    done = forked.run(script, *words, *small.split(), folder=ROOT / "scripts", variables={"PATH": ""}, seconds=600)
    assert done.returncode == 0, done.stderr
    return out


def test_figures(trained):
    figures = json.loads((trained / "training.json").read_text())
    assert 1 < figures["bits_per_byte"]["held_out"] < 6.5 < figures["history"][0]["validation"]
    assert len(figures["routing"]) == 2 and all(len(row) == 16 for row in figures["routing"])
    assert all(math.isclose(sum(row), 1, abs_tol=0.01) for row in figures["routing"])
    found = Routing.load(trained / "routing.json")
    assert (found.layers, found.tokens, found.experts) == (2, 512, 16) and "".join(found.text) == heldout_text()[:512]
    assert all(sample["drawn"].startswith(sample["prompt"]) for sample in figures["samples"])


def test_files_are_transformers_own(trained):
    assert 2 <= len([*trained.glob("model-*.safetensors")]) <= 8
    model = tf.AutoModelForCausalLM.from_pretrained(trained)
    assert type(model) is tf.Qwen3MoeForCausalLM and model.dtype == torch.bfloat16
    experts = experts_of(spec_from_module(model))
    assert [(one.count, one.per_token) for one in experts] == [(16, 2)] * 2
    with init_empty_weights():
        empty = tf.Qwen3MoeForCausalLM(model.config).eval()
    places = {"": "cpu", **{one.name: "disk" for one in experts}}
    found = load_checkpoint_and_dispatch(empty, trained, places, strict=True, dtype="bfloat16")
    ids = torch.randint(256, (1, 20))
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert torch.equal(found.generate(ids, **options), model.generate(ids, **options))
