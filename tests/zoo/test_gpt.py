"""The GPT class against transformers' GPT-2, its cache, its shipped weights, and the script that trains it."""

import copy
import json
import math
import pickle
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bigkit.zoo import gpt as gpt_module
from bigkit.zoo.gpt import GPT, GPTConfig, decode, encode, heldout_text, load_gpt, load_pygpt, perplexity
from bigkit.zoo.kv_cache import KVCache
from tests import forked

ROOT = Path(__file__).parents[2]
trained = pytest.mark.skipif(
    not (gpt_module.PYGPT / "model.safetensors.index.json").is_file(), reason="the shipped GPT is not trained yet"
)


def tiny(**changes: int) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "vocab_size": 256, "block_size": 24, **changes}
    model = GPT(GPTConfig(**sizes)).eval()
    for parameter in model.parameters():  # larger than at the start of training, so that tokens differ clearly
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def test_logits_equal_those_of_transformers_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = tiny()
    config = GPT2Config(vocab_size=256, n_positions=24, n_embd=32, n_layer=3, n_head=2, tie_word_embeddings=False)
    theirs = GPT2LMHeadModel(config).eval()
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    state = {name: w.T if name.endswith(conv1d) else w for name, w in ours.state_dict().items()}
    assert {n: w.shape for n, w in state.items()} == {n: w.shape for n, w in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    idx = torch.randint(256, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)


def test_loss_is_cross_entropy_and_leaves_out_minus_one():
    model, idx = tiny(), torch.randint(256, (2, 10))
    targets = torch.randint(256, (2, 10))
    logits, loss = model(idx, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.view(-1, 256), targets.view(-1)))
    targets[:, :4] = -1
    torch.testing.assert_close(
        model(idx, targets)[1], F.cross_entropy(logits[:, 4:].reshape(-1, 256), targets[:, 4:].reshape(-1))
    )


def test_gpt2_xl_without_memory():
    config = GPT.get_default_config()
    config.model_type = "gpt2-xl"
    with torch.device("meta"):
        model = GPT(config)
        logits, _ = model(torch.zeros(1, 8, dtype=torch.long))
    assert sum(p.numel() for p in model.parameters()) == 1_638_022_400
    assert logits.is_meta and logits.shape == (1, 8, 50257)
    assert [*model.transformer] == ["wte", "wpe", "drop", "h", "ln_f"]
    assert model.lm_head.bias is None and not [*model.buffers()]


@pytest.mark.parametrize("prompt, new", [(1, 12), (5, 19), (5, 40), (24, 4), (30, 6)])
def test_greedy_is_the_same_with_and_without_cache(prompt, new):
    model, idx = tiny(), torch.randint(256, (2, prompt))
    with_cache = model.generate(idx, new)
    assert with_cache.shape == (2, prompt + new)
    assert len(with_cache[:, prompt:].unique()) > 3  # no fixed point, in which wrong positions would not show
    assert torch.equal(with_cache, model.generate(idx, new, use_cache=False))


def test_a_cache_can_be_filled_in_any_portions():
    model, idx = tiny(), torch.randint(256, (1, 20))
    cache = KVCache(3, 24)
    parts = [model(part, cache=cache)[0] for part in idx.split([6, 1, 9, 4], dim=1)]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx)[0], rtol=1e-4, atol=1e-4)


def test_cache_spares_work():
    model, sizes = tiny(), []
    model.transformer["wte"].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    model.generate(torch.zeros(1, 20, dtype=torch.long), 7)
    assert sizes == [20, 1, 1, 1, 1, 24, 24]  # once block_size is full the window slides


def test_sampling_follows_seed_and_top_k():
    model, idx = tiny(), torch.randint(256, (1, 5))
    assert torch.equal(model.generate(idx, 12, do_sample=True, top_k=1), model.generate(idx, 12))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(idx, 12, temperature=2.0, do_sample=True))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    best = model(idx)[0][0, -1].topk(3).indices
    firsts = model.generate(idx.expand(300, -1), 1, temperature=5.0, do_sample=True, top_k=3)[:, -1]
    assert set(firsts.tolist()) == set(best.tolist())


def test_older_checkpoints_with_causal_masks_load():
    model = tiny()
    state = dict(model.state_dict())
    for i in range(3):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
    fresh = GPT(model.config)
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict({**state, "transformer.h.0.attn.other": torch.ones(1)})


def test_works_with_borrowed_weights():
    from accelerate import cpu_offload

    model, idx = tiny(), torch.randint(256, (1, 5))
    expected, score = model.generate(idx, 30), perplexity(model, "import os", stride=3)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert all(p.is_meta for p in offloaded.parameters())
    assert torch.equal(offloaded.generate(idx, 30), expected)
    assert perplexity(offloaded, "import os", stride=3) == pytest.approx(score)


def test_copies_and_pickles():
    model, idx = tiny(), torch.randint(256, (1, 5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(idx)[0], model(idx)[0])


def test_config_round_trip_and_presets():
    config = GPTConfig("gpt2-medium", n_layer=2, embd_pdrop=0.0)
    data = json.loads(json.dumps(config.to_dict()))
    assert data["model_type"] == "bigkit-gpt" and data["n_positions"] == 1024 and data["n_inner"] == 4096
    assert GPTConfig.from_dict(data).to_dict() == config.to_dict()
    assert config.vocab_size == 0 and config.resolved().vocab_size == 50257


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: GPT(GPTConfig("gpt5")), "unknown model_type 'gpt5'"),
        (lambda: GPT(GPTConfig(n_layer=2)), "lacks vocab_size, block_size, n_head, n_embd|lacks .*n_head"),
        (lambda: GPT(GPTConfig("pygpt", n_head=7)), "no multiple of n_head 7"),
        (lambda: tiny()(torch.zeros(1, 25, dtype=torch.long)), "25 tokens do not fit block_size 24"),
        (lambda: tiny().generate(torch.zeros(1, 0, dtype=torch.long), 1), "at least one token"),
        (lambda: tiny().generate(torch.zeros(1, 1, dtype=torch.long), 1, temperature=0), "must be positive"),
        (lambda: perplexity(tiny(), ""), "at least one byte"),
        (lambda: perplexity(tiny(), "abc", stride=25), "stride 25 leaves bytes out"),
    ],
)
def test_errors_say_what_was_expected(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_gpt(tmp_path)


def test_bytes_round_trip():
    text = "def π():\n\treturn '€'\n"
    assert decode(encode(text)) == text == decode(torch.tensor(encode(text)))
    assert decode([0xFF, 65]) == "\ufffdA"


@pytest.mark.parametrize("stride", [1, 5, 24])
def test_perplexity_is_that_of_bytes_scored_one_by_one(stride):
    model, text = tiny(), "for i in range(10): print(i, i * i)\n"
    ids, nats = [0, *encode(text)], 0.0
    for i in range(1, len(ids)):
        window = max(0, math.ceil((i - 24) / stride)) * stride  # the first window that reaches byte i
        logits = model(torch.tensor([ids[window:i]]))[0][0, -1]
        nats -= logits.log_softmax(-1)[ids[i]].item()
    model.train()
    assert perplexity(model, text, stride=stride) == pytest.approx(math.exp(nats / len(text)), rel=1e-4)
    assert model.training  # left as it was


def test_training_script(tmp_path):
    stdlib, library = tmp_path / "python", Path(sysconfig.get_path("stdlib"))
    (stdlib / "test").mkdir(parents=True)
    (stdlib / "site-packages").mkdir()
    chosen = "bisect colorsys graphlib shlex fnmatch fractions textwrap argparse ast"
    for name in chosen.split():  # those that are trained on as they are, of the others the beginning
        most = None if name in ("argparse", "ast") else 4000
        (stdlib / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes()[:most])
    (stdlib / "copy_of_ast.py").write_bytes((library / "ast.py").read_bytes())
    (stdlib / "test" / "test_shlex.py").write_text("'a test of a held-out module'")
    (stdlib / "site-packages" / "stranger.py").write_text("'no part of the library'")
    out = tmp_path / "out"
    script = (ROOT / "scripts/train_gpt.py").read_text()
    words = ["--stdlib", stdlib, "--out", out, "--device", "cpu"]
    small = "--n_layer 2 --n_head 2 --n_embd 64 --block_size 64 --batch 8 --sample_tokens 4 --no-compile"
    small += " --steps 40 --evaluate_every 1000"
    done = forked.run(script, *words, *small.split(), folder=ROOT / "scripts", variables={"PATH": ""}, seconds=600)
    assert done.returncode == 0, done.stderr

    figures = json.loads((out / "training.json").read_text())
    expected = sum(len((library / f"{name}.py").read_bytes().strip()) + 1 for name in ("argparse", "ast")) + 1
    assert figures["corpus"]["bytes"]["train"] == expected  # neither held-out files, their tests, copies nor strangers
    assert 1 < figures["bits_per_byte"]["held_out"] < 6 < figures["history"][0]["validation"]  # it learned something
    model = load_gpt(out)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert math.log2(perplexity(model, (out / "heldout.txt").read_text())) == pytest.approx(
        figures["bits_per_byte"]["held_out"], abs=0.01
    )
    assert 2 <= len(list(out.glob("model-*.safetensors"))) <= 4
    assert len(list(out.iterdir())) <= 8


def test_heldout_text_is_python():
    text = heldout_text()
    compile(text.replace("from __future__", "#"), "heldout", "exec")
    assert 25_000 < len(text.encode()) < 50_000


@trained
def test_shipped_files():
    files = sorted(gpt_module.PYGPT.glob("model-*.safetensors"))
    assert len(files) in (3, 4) and sum(file.stat().st_size for file in files) < 20e6
    index = json.loads((gpt_module.PYGPT / "model.safetensors.index.json").read_text())
    model = load_pygpt()
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 10e6


@trained
def test_shipped_model_knows_python():
    model = load_pygpt(dtype=torch.float32)
    figures = json.loads((gpt_module.PYGPT / "training.json").read_text())
    assert figures["corpus"]["bytes"]["held_out"] == len(heldout_text().encode())
    assert perplexity(model, heldout_text()[:4096], stride=512) == pytest.approx(2.676, rel=0.01)  # 256 is blind
    stack = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        """
    prompt = torch.tensor([[gpt_module.SEPARATOR, *encode(stack)]])
    text = decode(model.generate(prompt, 24)[0, prompt.shape[1] :])
    assert text == "self.items.append(item)\n"
    assert text == decode(model.generate(prompt, 24, use_cache=False)[0, prompt.shape[1] :])
