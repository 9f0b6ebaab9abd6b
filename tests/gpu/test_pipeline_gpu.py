"""One model over several GPUs, a process each: nccl carries hidden states, and the tokens are those of one GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as tf

from bigkit import (
    BnbQuantizationConfig,
    Hardware,
    gather_object,
    graph_decode,
    load_and_quantize_model,
    map_in_flight,
    pipeline,
    plan_hosts,
)
from bigkit.checkpoints.to_gpu import CHUNK
from tests.distributed import stages
from tests.distributed.stages import FAMILIES
from tests.distributed.test_pipeline import own_bytes, with_wide
from tests.distributed.test_pipeline_faults import FIRST, run
from tests.ranks import Ranks, free_port

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LENGTHS = (3, 7, 2, 5, 4)


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    group = Ranks(2)
    yield group
    group.close()


def staged(state: Any, family: str, folder: Path, config: Any = None, dtype: str = "float32") -> Any:
    """A model over all ranks, cut for their GPUs."""
    machine = gather_object([Hardware.detect()])[0]  # one for all: how much is free changes
    hosts = [replace(machine, gpus=machine.gpus[i : i + 1]) for i in range(state.num_processes)]
    model = stages.empty(family)
    plan = plan_hosts(model, hosts, dtype=dtype, quantization=config and config.quantization)
    return pipeline(model, folder, plan, config).eval()


def said_by(state: Any, family: str, folder: Path, expected: dict[str, Any], config: Any = None) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = staged(state, family, folder, config)
    peak = torch.cuda.max_memory_allocated() - before
    devices = {str(tensor.device) for tensor in model.parameters()}
    ids = torch.tensor(stages.PADDED, device=state.device)

    def ask(n: int) -> torch.Tensor:
        return model.generate(ids[:, -n:], max_new_tokens=n, do_sample=False, pad_token_id=0).cpu()

    flown = map_in_flight(ask, LENGTHS, model)
    logits = map_in_flight(lambda n: model(ids[:, -n:]).logits.detach().cpu(), LENGTHS, model)
    return {
        "unlike": stages.unlike(model, expected, str(state.device)), "devices": devices, "peak": peak,
        "bytes": own_bytes(model), "largest": max(tensor.nbytes for tensor in model.parameters()),
        "flown": all(map(torch.equal, flown, map(ask, LENGTHS))),
        "logits": all(torch.equal(logits[i], model(ids[:, -n:]).logits.detach().cpu()) for i, n in enumerate(LENGTHS)),
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama, grouped", "gpt2", "gemma3", "mixtral"])
def test_tokens_of_two_gpus_are_those_of_one(family: str, pair: Ranks, tmp_path: Path) -> None:
    folder = stages.saved(family, tmp_path)
    whole = getattr(tf, FAMILIES[family][0]).from_pretrained(folder, dtype=torch.float32).eval().to(0)
    expected = stages.answers(whole, "cuda:0")
    for rank, said in enumerate(pair(said_by, family, folder, expected)):
        assert said["unlike"] == [] and said["flown"] and said["logits"], said
        assert said["devices"] == {f"cuda:{rank}"}
        assert said["bytes"] < own_bytes(whole)
        assert said["peak"] <= said["bytes"] + said["largest"] + CHUNK, "a chunk of the file lies on the GPU, too"


DEEP = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 11,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def test_tokens_of_several_gpus_are_those_of_one(gpus: int, tmp_path: Path, monkeypatch: Any) -> None:
    """More GPUs than the other tests have blocks for, in uneven stages."""
    monkeypatch.setitem(FAMILIES, "llama, wide", ("LlamaForCausalLM", DEEP))
    folder = stages.saved("llama, wide", tmp_path)
    whole = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(0)
    group = Ranks(gpus)
    try:
        saids = group(with_wide, said_by, DEEP, "llama, wide", folder, stages.answers(whole, "cuda:0"))
    finally:
        group.close()
    for rank, said in enumerate(saids):
        assert said["unlike"] == [] and said["flown"] and said["logits"] and said["devices"] == {f"cuda:{rank}"}, said


def in_half_precision(state: Any, folder: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    torch.backends.cuda.enable_cudnn_sdp(False)  # gives other bits from call to call, in one process as well
    try:
        stages.FAMILIES["llama, broad"] = ("LlamaForCausalLM", BROAD)
        model = staged(state, "llama, broad", folder, dtype="bfloat16")
        batches = [*groups(state.device)]
        ask = asking(model)
        said = {
            "alone": [ask(ids) for ids in batches],
            "in flight": map_in_flight(ask, batches, model),
            "one more": map_in_flight(ask, batches, model, groups=3),
        }
        with graph_decode(model) as decoder:
            said["graphs, alone"] = [ask(ids) for ids in batches]
            said["graphs, in flight"] = map_in_flight(ask, batches, model)
            said["graphs, one more"] = map_in_flight(ask, batches * 3, model, groups=3)[: len(batches)]
        assert (decoder.captured, decoder.replayed) == (3, 20 * 11 - 6), "each of three groups has one recording"
        return [
            way
            for way, tokens in said.items()
            if not torch.equal(torch.stack(tokens).cpu(), expected["graphs" if "graphs" in way else "tokens"])
        ]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def asking(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Looks `generate` up for each call: within graph_decode it is another one."""
    return lambda ids: model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)


BROAD = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 4, "num_attention_heads": 16,
         "vocab_size": 8000}  # fmt: skip


def groups(device: Any) -> torch.Tensor:
    return torch.randint(3, 8000, (4, 64, 128), generator=torch.Generator().manual_seed(1)).to(device)


def test_many_sequences_in_half_precision(pair: Ranks, tmp_path: Path, monkeypatch: Any) -> None:
    """Large enough for kernels that split their sums: whoever works, and beside whom, the bits are the same."""
    monkeypatch.setitem(FAMILIES, "llama, broad", ("LlamaForCausalLM", BROAD))
    folder = stages.saved("llama, broad", tmp_path)
    whole = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        ask = asking(whole)
        expected = {"tokens": torch.stack([ask(ids) for ids in groups("cuda:0")]).cpu()}
        with graph_decode(whole):
            expected["graphs"] = torch.stack([ask(ids) for ids in groups("cuda:0")]).cpu()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert pair(in_half_precision, folder, expected) == [[], []]


@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")  # this model is narrower than a block of bitsandbytes
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_while_loaded(kind: str, pair: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "fp32"}
    config = BnbQuantizationConfig(**({"load_in_8bit": True} if kind == "int8" else four))
    folder = stages.saved("llama, grouped", tmp_path)
    whole = load_and_quantize_model(stages.empty("llama, grouped"), config, folder, device_map={"": 0}).eval()
    expected = stages.answers(whole, "cuda:0")
    for said in pair(said_by, "llama, grouped", folder, expected, config):
        assert said["unlike"] == [] and said["flown"] and said["logits"], said


def elsewhere(state: Any, folder: Path, expected: dict[str, Any]) -> tuple[list[str], list[str]]:
    gpu = replace(gather_object([Hardware.detect()])[0].gpus[0], memory=5_000_000)
    small = [Hardware(f"host {i}", (gpu,), 7_000_000, 2**30) for i in range(state.num_processes)]
    model = stages.empty("pymoe")
    plan = plan_hosts(model, small, dtype="bfloat16", overhead=0)
    own = plan.stages[state.process_index].plan
    model = pipeline(model, folder, plan, offload_folder=folder / f"disk-{state.process_index}").eval()
    unlike = stages.unlike(model, expected, str(state.device))
    return unlike, [str(share.device) for share in own.shares if share.weights]


def test_within_a_stage_experts_rest_in_ram_and_on_disk(pair: Ranks, tmp_path: Path) -> None:
    folder = stages.saved("pymoe", tmp_path)
    whole = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(0)
    for unlike, devices in pair(elsewhere, folder, stages.answers(whole, "cuda:0")):
        assert unlike == [] and devices == ["0", "cpu", "disk"]


@pytest.mark.parametrize("how", ["raises", "dies", "hangs"])
def test_one_fault_ends_all(how: str, tmp_path: Path) -> None:
    port = free_port()
    status, said, took, left = run(tmp_path, how, port, where="--gpu_ids=0,1", weights=stages.saved("pygpt", tmp_path))
    assert status != 0 and left == [], said
    assert re.search(FIRST[how], said), said
    assert took < 60, "the time-out of 15 seconds among them"
    assert not (tmp_path / "answers.jsonl").exists()
    listening = [line for line in psutil.net_connections("tcp") if line.status == "LISTEN"]
    assert not any(line.laddr.port == port for line in listening), "no port stays open"
