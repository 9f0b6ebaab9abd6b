"""One model over several processes says what it says in one: bit for bit, however it is cut, stored and asked."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from bigkit import BnbQuantizationConfig, load_and_quantize_model, pipeline, plan_hosts
from bigkit.distributed.in_flight import map_in_flight
from bigkit.zoo.gpt import PYGPT, PYMOE, encode, load_pygpt
from tests.distributed import stages
from tests.meta.test_cache import DECODERS, HYBRIDS
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    group = Ranks(2)
    yield group
    group.close()


PROMPT = torch.tensor([encode("import os")])
WIDE = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2000, "num_hidden_layers": 6,
        "num_attention_heads": 8}  # fmt: skip
LENGTHS = (3, 7, 2, 5)  # of prompts, and of their answers


@pytest.fixture(scope="module")
def pymoe() -> dict[str, Any]:
    return stages.answers(tf.AutoModelForCausalLM.from_pretrained(PYMOE, dtype=torch.float32).eval())


def own_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.parameters())


def moe(state: Any, expected: dict[str, Any]) -> dict[str, Any]:
    model = stages.staged(state, "pymoe", PYMOE)
    said: dict[str, Any] = {"unlike": stages.unlike(model, expected), "bytes": own_bytes(model)}
    caches = model.generate(PROMPT, max_new_tokens=3, do_sample=False, return_dict_in_generate=True).past_key_values
    said["cached"] = [layer.keys.nbytes for layer in caches.layers]
    streamed = []
    streamer = type("Streamer", (), {"put": lambda self, ids: streamed.append(ids), "end": lambda self: None})()
    model.generate(PROMPT, max_new_tokens=3, do_sample=False, streamer=streamer)
    said["streamed"] = len(streamed)
    for options in (
        {"num_beams": 2},
        {"custom_generate": "somebody/else"},
        {"output_scores": True, "return_dict_in_generate": True},
    ):
        try:
            model.generate(PROMPT, max_new_tokens=3, **options)
        except ValueError as error:
            said[next(iter(options))] = str(error)
    said["in flight"] = map_in_flight(lambda n: model.generate(PROMPT[:, :n], max_new_tokens=n), LENGTHS, model)
    return said


@pytest.mark.parametrize("size", [2, 4, pytest.param(6, marks=pytest.mark.soak)])  # 4: stages of 2, 2, 1 and 1 blocks
def test_a_mixture_of_experts_over_processes(size: int, group: Callable[[int], Ranks], pymoe: dict[str, Any]) -> None:
    whole = tf.AutoModelForCausalLM.from_pretrained(PYMOE, dtype=torch.float32).eval()
    flown = [whole.generate(PROMPT[:, :n], max_new_tokens=n) for n in LENGTHS]
    saids = group(size)(moe, pymoe)
    for said in saids:
        assert said["unlike"] == []
        assert said["streamed"] == 4, "the prompt and three tokens, on every process"
        assert "num_beams: a pipeline draws one token at a time" in said["num_beams"]
        assert said["custom_generate"].startswith("custom_generate: a pipeline draws")
        assert "output_scores" in said["output_scores"]
        assert all(map(torch.equal, said["in flight"], flown))
    norm = whole.model.norm.weight.nbytes
    assert sum(said["bytes"] - norm for said in saids) == own_bytes(whole) - norm, "each weight once"
    cached = [said["cached"] for said in saids]
    for layer in range(6):
        sizes = sorted(sizes[layer] for sizes in cached)
        assert all(size <= sizes[-1] / 200 for size in sizes[:-1]), "keys stay where their block is"


def gpt(state: Any) -> tuple[Any, ...]:
    model = pipeline(stages.empty("pygpt"), PYGPT, dtype="float32").eval()  # cut for the memory that there is
    ids = torch.tensor([encode("import ")] * 2)
    greedy = model.generate(ids[:1], 12)
    torch.manual_seed(0)
    return greedy, model.generate(ids, 12, do_sample=True, top_k=30), model(ids)[0]


def test_a_model_with_its_own_generate(ranks: Ranks) -> None:
    whole = load_pygpt(dtype=torch.float32)
    ids = torch.tensor([encode("import ")] * 2)
    greedy = whole.generate(ids[:1], 12)
    torch.manual_seed(0)
    expected = (greedy, whole.generate(ids, 12, do_sample=True, top_k=30), whole(ids)[0])
    for said in ranks(gpt):
        assert all(map(torch.equal, said, expected))


def no_block_left(state: Any, folder: Path) -> list[str]:
    said, model = [], stages.empty("llama, grouped")
    for plan in (None, plan_hosts(model, stages.hosts(state.num_processes), dtype="float32")):
        try:
            pipeline(model, folder, plan, dtype="float32")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("size", [4, pytest.param(8, marks=pytest.mark.soak)])
def test_more_processes_than_blocks_are_refused_on_each(
    size: int, group: Callable[[int], Ranks], tmp_path: Path
) -> None:
    folder = stages.saved("llama, grouped", tmp_path)
    for said in group(size)(no_block_left, folder):
        assert len(said) == 2
        for text in said:
            assert re.match(f"the plan has 3 stages, and there are {size} processes: start one for each stage", text)


# ---------------------------------------------------------------------------------------------------------------------
# How weights are stored and where they rest


def elsewhere(state: Any, folder: Path, expected: dict[str, Any]) -> tuple[list[str], list[str]]:
    from bigkit import Hardware, plan_hosts
    from bigkit.machine.hardware import GPUS

    model = stages.empty("pymoe")
    gpu = type(GPUS["L4"])("tiny", 5_000_000, 1e9, 1e12, 1e9)
    small = [Hardware(f"host {i}", (gpu,), 3_300_000, 2**30) for i in range(state.num_processes)]
    plan = plan_hosts(model, small, dtype="bfloat16", overhead=0)
    own = plan.stages[state.process_index].plan
    model = pipeline(
        model, PYMOE, plan, offload_folder=folder / str(state.process_index), stand_in=dict.fromkeys(range(3), "cpu")
    ).eval()
    return stages.unlike(model, expected), [str(share.device) for share in own.shares if share.weights]


def test_within_a_stage_experts_rest_elsewhere(three: Ranks, tmp_path: Path) -> None:
    whole = tf.AutoModelForCausalLM.from_pretrained(PYMOE).eval()
    for unlike, devices in three(elsewhere, tmp_path, stages.answers(whole)):
        assert unlike == []
        assert devices == ["0", "cpu", "disk"], "of two blocks, the experts of one in RAM and of one on disk"


def in_four_bits(folder: Path) -> tuple[Path, Any, Any]:
    """A saved model, how it is quantized, and the whole of it, quantized."""
    pytest.importorskip("bitsandbytes")
    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="fp32")
    saved = stages.saved("llama, grouped", folder)
    empty = stages.empty("llama, grouped")
    return saved, config, load_and_quantize_model(empty, config, saved, device_map={"": "cpu"})


def quantized(state: Any, folder: Path, config: Any, expected: dict[str, Any]) -> tuple[list[str], int]:
    model = stages.staged(state, "llama, grouped", folder, config)
    kinds = [type(module).__name__ for module in model.modules()]
    return stages.unlike(model, expected), kinds.count("Linear4bit")


def test_a_quantized_model(three: Ranks, tmp_path: Path) -> None:
    folder, config, whole = in_four_bits(tmp_path)
    said = three(quantized, folder, config, stages.answers(whole))
    assert [unlike for unlike, _ in said] == [[], [], []]
    assert sum(count for _, count in said) == sum(type(m).__name__ == "Linear4bit" for m in whole.modules()) == 21


def quantized_on_disk(state: Any, folder: Path, config: Any, expected: dict[str, Any]) -> tuple[list[str], list[str]]:
    from bigkit import Hardware
    from bigkit.machine.hardware import GPUS

    gpu = type(GPUS["L4"])("tiny", 14_000, 1e9, 1e12, 1e9)
    small = [Hardware(f"host {i}", (gpu,), 3_000, 2**30) for i in range(state.num_processes)]
    model = stages.empty("llama, grouped")
    plan = plan_hosts(model, small, dtype="float32", quantization="nf4", overhead=0)
    away = {"offload_folder": folder / f"disk-{state.process_index}", "stand_in": {0: "cpu", 1: "cpu"}}
    model = pipeline(model, folder, plan, config, **away).eval()
    shares = plan.stages[state.process_index].plan.shares
    return stages.unlike(model, expected), [str(share.device) for share in shares if share.weights]


def test_a_quantized_stage_whose_blocks_rest_on_disk(two: Ranks, tmp_path: Path) -> None:
    folder, config, whole = in_four_bits(tmp_path)
    said = two(quantized_on_disk, folder, config, stages.answers(whole))
    assert said == [([], ["0", "disk"]), ([], ["0"])], "the head, which is in 32 bits, has no room beside more blocks"


def peak(state: Any, folder: Path) -> tuple[int, int, int]:
    """Bytes of anonymous memory that loading took at most, of the stage, and of the largest tensor."""

    def private() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    highest, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            highest.append(private())

    plan = plan_hosts(model := stages.empty("llama, wide"), stages.hosts(state.num_processes), dtype="float32")
    before = private()
    watcher = threading.Thread(target=watch)
    watcher.start()
    pipeline(model, folder, plan, dtype="float64")  # every tensor is cast: none stays in the file's pages
    over.set()
    watcher.join()
    sizes = [tensor.nbytes for tensor in model.parameters()]
    return max(highest) - before, sum(sizes), max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory is anonymous")
def test_a_process_holds_its_stage_and_one_tensor_more(three: Ranks, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(stages.FAMILIES, "llama, wide", ("LlamaForCausalLM", WIDE))
    folder = stages.saved("llama, wide", tmp_path)
    for most, stage, largest in three(with_wide, peak, WIDE, folder):
        assert stage < 85e6, "a third of 185 MB, embedding or head with it"
        assert most <= stage + largest + 6e6, (most, stage, largest)


def with_wide(state: Any, function: Any, settings: Any, *args: Any) -> Any:
    stages.FAMILIES["llama, wide"] = ("LlamaForCausalLM", settings)
    return function(state, *args)


# ---------------------------------------------------------------------------------------------------------------------
# Families


def family_of(state: Any, family: str, folder: Path, expected: dict[str, Any]) -> list[str]:
    return stages.unlike(stages.staged(state, family, folder), expected)


def check_family(group: Ranks, family: str, folder: Path) -> None:
    folder = stages.saved(family, folder)
    whole = getattr(tf, stages.FAMILIES[family][0]).from_pretrained(folder, dtype=torch.float32).eval()
    expected = stages.answers(whole)
    assert group(family_of, family, folder, expected) == [[]] * group.size


FEW = ["gpt2", "opt", "gemma3", "llama, base", "llama4_text"]
# tied and learned positions; a norm first; windows; no head and no `generate`; embeddings that are asked for a device


@pytest.mark.parametrize("family", FEW)
def test_families(three: Ranks, family: str, tmp_path: Path) -> None:
    check_family(three, family, tmp_path)


REFUSED = {
    "gemma4": "Gemma4ForCausalLM feeds every block from model.embed_tokens_per_layer: only hidden states go from host",
    "gemma3n_text": r"Gemma3nForCausalLM has 3 chains of blocks \('model.layers', 'model.altup_projections'",
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("family", [family for family in {**DECODERS, **HYBRIDS} if family not in {*FEW, *REFUSED}])
def test_every_family(two: Ranks, family: str, tmp_path: Path) -> None:
    check_family(two, family, tmp_path)


@pytest.mark.parametrize("family", REFUSED)
def test_blocks_that_take_more_than_hidden_states_are_refused_by_the_plan(family: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[family]):
        plan_hosts(stages.empty(family), stages.hosts(2))


def test_a_model_that_is_no_chain_is_refused(tmp_path: Path) -> None:
    from bigkit import describe

    with pytest.raises(ValueError, match=r"2 chains of blocks \('encoder.block', 'decoder.block'\)"):
        plan_hosts(describe("t5-large"), stages.hosts(2))
