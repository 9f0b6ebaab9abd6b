"""Real runs on the CPU, held against dry runs and kept in the ledger."""

import json

import pytest
import torch

from bigkit import cpu_offload, dry_run, record
from bigkit.dryrun.workload import Workload, passes
from bigkit.machine.ledger import Ledger
from bigkit.zoo.gpt import load_pygpt

transformers = pytest.importorskip("transformers")


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_generate_is_a_prefill_and_tokens(tmp_path):
    model = llama()
    ids = torch.ones((2, 5), dtype=torch.long)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with record(model, ledger=tmp_path / "ledger.json") as recorder:
        again = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(plain, again)
    assert [call[:3] for call in recorder.calls] == [("prefill", 2, 5), *[("token", 2, 1)] * 3]
    assert all(call.seconds > 0 for call in recorder.calls)
    if not torch.cuda.is_available():
        assert recorder.peaks["resident memory"] > 2**26
    model(ids)
    assert len(recorder.calls) == 4, "the hooks are gone"
    [run] = Ledger.load(tmp_path / "ledger.json").runs
    assert run == json.loads(json.dumps(recorder.entry())) | {"time": run["time"]}
    assert (run["name"], run["batch"], run["prompt"], run["predicted"]) == ("LlamaForCausalLM", 2, 5, {})


def test_the_shipped_gpt_against_its_dry_run(tmp_path):
    load = Workload(2, 12, 3)
    foretold = dry_run("pygpt", None, load.batch, load.prompt, load.new)
    model = load_pygpt()
    with record(model, foretold, "gpt", ledger=tmp_path / "ledger.json") as recorder:
        for _ in passes(model, load, "cpu"):
            pass
    assert [call.phase for call in recorder.calls] == ["prefill", "token", "token", "token"]
    rows = {name: (told, real, error) for name, told, real, error in recorder.rows()}
    assert {"prefill", "token"} <= rows.keys()
    for name, (told, real, error) in rows.items():
        assert told == recorder.predicted[name] and real == recorder.measured[name]
        assert error == pytest.approx(told / real - 1)
    assert "foretold" in recorder.explain() and len(repr(recorder)) < 110
    bias = Ledger.load(tmp_path / "ledger.json").bias(recorder.machine)
    assert bias["token"].ratio == pytest.approx(rows["token"][1] / rows["token"][0]) and bias["token"].runs == 1
    assert Ledger.load(tmp_path / "ledger.json").bias("another machine") == {}


def test_other_work_than_was_foretold_is_not_compared(tmp_path):
    model = load_pygpt()
    with record(model, dry_run("pygpt", None, 1, 8), ledger=tmp_path / "ledger.json") as recorder:
        model(torch.zeros((1, 9), dtype=torch.long))
    with pytest.raises(ValueError, match="1 x 8 tokens were foretold, and 1 x 9 ran"):
        recorder.rows()
    assert "no comparison" in recorder.explain()
    [run] = Ledger.load(tmp_path / "ledger.json").runs
    assert run["predicted"] == {} and run["measured"]["prefill"] > 0


def test_a_model_that_is_spread_out_runs_as_before(tmp_path):
    model = llama()
    ids = torch.arange(6)[None]
    plain = model(ids).logits
    model = cpu_offload(model, "cpu")
    with record(model, save=False) as recorder, torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    assert [call[:3] for call in recorder.calls] == [("prefill", 1, 6)]


def test_nothing_is_noted_of_a_run_that_fails(tmp_path):
    model = load_pygpt()
    with pytest.raises(RuntimeError, match="halfway"):
        with record(model, ledger=tmp_path / "ledger.json") as recorder:
            model(torch.zeros((1, 4), dtype=torch.long))
            raise RuntimeError("halfway")
    with record(model, ledger=tmp_path / "ledger.json"):
        pass
    assert len(recorder.calls) == 1 and not list(tmp_path.iterdir())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_an_encoder_decoder_has_the_prompt_of_its_encoder():
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with record(model, save=False) as recorder:
        for _ in passes(model, Workload(2, 7, 2), "cpu"):
            pass
    assert [call[:3] for call in recorder.calls] == [("prefill", 2, 7), ("token", 2, 1), ("token", 2, 1)]
