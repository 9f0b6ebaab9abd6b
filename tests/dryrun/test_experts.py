"""Dry runs of mixtures: of experts that rest elsewhere the chosen ones travel, as many as chance gives."""

import random
import re

import pytest
import transformers as tf

from bigkit import dry_run, estimate_memory, init_empty_weights, plan
from bigkit.cli import main
from bigkit.draw.dryrun import dryrun_figure, dryrun_text
from bigkit.machine.hardware import HARDWARE
from bigkit.machine.mixture import Mixture
from bigkit.machine.roofline import FILL
from bigkit.machine.routing import Routing
from bigkit.maps.advise import advise
from bigkit.meta.skeleton import spec_from_module
from bigkit.offload.choice import by_chance
from bigkit.widgets.expert_explorer import ExpertExplorer
from bigkit.zoo import describe

COUNT, CHOSEN, BLOCKS = 16, 2, 6


def qwen():
    config = tf.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, moe_intermediate_size=32, num_experts=COUNT, num_experts_per_tok=CHOSEN,
    )  # fmt: skip
    with init_empty_weights():
        return tf.Qwen3MoeForCausalLM(config)


@pytest.mark.parametrize("replay", [True, False])
def test_bytes_that_travel(replay):
    experts = {f"model.layers.{i}.mlp.experts": "cpu" for i in range(BLOCKS)}
    run = dry_run(qwen(), {"": 0, **experts}, 1, 32, 4, "H200", dtype="float32", replay=replay)
    whole = COUNT * 3 * 64 * 32 * 4
    fills = {step: [] for step, _ in run.steps}
    start = 0
    for step, end in run.steps:
        fills[step] = [op.bytes for op in run.operations[start:end] if op.name == FILL]
        start = end
    assert fills["prefill"] == [whole] * BLOCKS, "a prompt brings whole layers, each once"
    for token in range(1, 5):
        bring = [whole * CHOSEN // COUNT] * (BLOCKS - 2)
        assert fills[f"token {token}"] == bring, "the prompt has left the last two blocks in the slots"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_a_plan_counts_the_copies_of_experts_that_decoding_makes(family, batch):
    """`generate` copies each chosen expert for each sequence: more than a short prompt takes."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    experts = {"num_local_experts": 8} if family == "Mixtral" else {"num_experts": 8, "num_experts_per_tok": 4}
    config = getattr(tf, f"{family}Config")(
        **sizes, **experts, vocab_size=500, intermediate_size=1024, moe_intermediate_size=512, head_dim=64
    )

    def empty():
        with init_empty_weights():
            return getattr(tf, f"{family}ForCausalLM")(config).bfloat16().eval()

    given = plan(empty(), {0: "1GiB"}, batch=batch, context=40, overhead=0)
    peak = dry_run(empty(), given, batch, 32, 8, "H200").peak_allocated[0]
    assert peak - 32 * 2**20 == pytest.approx(given.used[0], abs=100_000), "beside the workspace of cuBLAS"


def test_chosen_experts_in_files_come_in_pieces():
    routing = Routing("qwen", COUNT, tuple(((1, 2), (4, 7), (0, 9)) for _ in range(BLOCKS)))
    experts = {f"model.layers.{i}.mlp.experts": "disk" for i in range(BLOCKS)}
    run = dry_run(qwen(), {"": 0, **experts}, 1, 1, 2, "H200", dtype="float32", routing=routing, replay=False)
    assert {op.in_pieces for op in run.operations if op.name == FILL} == {True}
    run = dry_run(qwen(), {"": 0, **experts}, 1, 64, 0, "H200", dtype="float32")
    assert {op.in_pieces for op in run.operations if op.name == FILL} == {False}, "a prompt takes all, in one piece"


def test_by_chance():
    assert by_chance(COUNT, 1, CHOSEN, 3) != by_chance(COUNT, 1, CHOSEN, 4)
    average = sum(
        len(set(by_chance(COUNT, 1, CHOSEN, a) + by_chance(COUNT, 1, CHOSEN, 9999 + a))) for a in range(1, 400)
    )
    assert len(by_chance(COUNT, 2, CHOSEN, 0)) == round(average / 399)
    assert by_chance(COUNT, 1000, CHOSEN, 0) == [*range(COUNT)]


def test_advice_counts_what_travels():
    model, machine = describe("mixtral-8x7b"), HARDWARE["1 x RTX 4090"]
    option = advise(model, machine, stored=(None,)).best
    assert option.plan.experts == (2, 8) and option.bottleneck == "link"
    link = 0.87 * machine.gpus[0].link
    assert option.waits["link"] == pytest.approx(option.plan.offloaded * 2 / 8 / link)
    assert option.prefill >= option.plan.offloaded / link
    many = advise(model, machine, batch=16, stored=(None,)).best
    assert many.waits["link"] > 0.98 * many.plan.offloaded / link
    assert plan("mixtral-8x7b", hardware="1 x RTX 4090", dtype="bfloat16").experts


def apart():
    return {"": 0, **{f"model.layers.{i}.mlp.experts": "cpu" for i in range(BLOCKS)}}


def by_hand(tokens, seed=0):
    """A routing of a model like `qwen()`, drawn."""
    draw = random.Random(seed)
    layers = tuple(tuple(tuple(draw.sample(range(COUNT), CHOSEN)) for _ in range(tokens)) for _ in range(BLOCKS))
    return Routing("like it", COUNT, layers)


EACH = 3 * 64 * 32 * 4


def brought(run):
    """Step -> bytes of experts that are brought in it, block after block."""
    found, start = {}, 0
    for step, end in run.steps:
        found[step] = [op.bytes for op in run.operations[start:end] if op.name == FILL]
        start = end
    return found


def test_a_recorded_routing_says_which_experts_travel():
    """With a prompt of three tokens the chosen ones of all three, each once; then token by token."""
    routing = by_hand(5)
    run = dry_run(qwen(), apart(), 1, 3, 4, "H200", dtype="float32", routing=routing)
    found = brought(run)
    for block in range(BLOCKS):
        assert found["prefill"][block] == EACH * len({one for choice in routing.chosen[block][:3] for one in choice})
    assert all(found[f"token {token}"] == [EACH * CHOSEN] * BLOCKS for token in range(1, 5))
    assert run.expert_hits == (0, 0) and not run.hits


@pytest.mark.parametrize("rows", [4, 8])
def test_hits_of_a_cache_are_those_of_its_blocks(rows):
    """Each block keeps the experts that were used last: as many hits as `Routing.hits` finds in each layer alone."""
    routing, new = by_hand(18), 10
    cache = rows * EACH * BLOCKS
    run = dry_run(qwen(), apart(), 1, 8, new, "H200", dtype="float32", routing=routing, expert_cache=cache)
    tokens = range(8, 8 + new)  # the prompt of 8 tokens is streamed past the cache
    layers = [Routing("one", COUNT, (tuple(layer[token] for token in tokens),)) for layer in routing.chosen]
    hits = sum(sum(layer.hits("LRU", rows)) for layer in layers)
    assert run.expert_hits == (hits, new * BLOCKS * CHOSEN - hits)
    moved = brought(run)
    assert sum(sum(moved[f"token {token}"]) for token in range(1, new + 1)) == run.expert_hits[1] * EACH
    assert f"{100 * hits / (new * BLOCKS * CHOSEN):.0f} % of the chosen experts were on the GPU" in str(run)


def test_experts_have_a_lane_of_their_own():
    """Blocks of attention and experts rest in RAM: two lanes, one link. Experts wait for their block's router."""
    places = {**apart(), **{f"model.layers.{i}.self_attn": "cpu" for i in range(BLOCKS)}}
    run = dry_run(qwen(), places, 1, 16, 3, "T4", dtype="float32")
    assert {"copy to cuda:0", "experts to cuda:0"} < run.busy.keys()
    spans = sorted((s for s in run.spans if s.lane in ("copy to cuda:0", "experts to cuda:0")), key=lambda s: s.start)
    assert all(one.end <= two.start + 1e-12 for one, two in zip(spans, spans[1:])), "the link does one thing at a time"
    assert all(("experts" in span.name) == (span.lane == "experts to cuda:0") for span in spans)
    seconds = sum(span.end - span.start for span in spans if span.lane.startswith("experts"))
    assert seconds == pytest.approx(run.busy["experts to cuda:0"] * sum(step.seconds for step in run.times))
    work = [span for span in run.spans if span.lane == "cuda:0"]
    for span in spans:
        if span.lane.startswith("experts") and span.start > run.times[0].seconds:
            assert not any(one.start < span.start < one.end for one in work), "the router has chosen before"
    text, svg = dryrun_text(run), dryrun_figure(run).svg
    assert re.search(r"experts, GPU 0 \d+ %", text) and "experts, GPU 0" in svg


def test_what_cannot_be_said_is_refused():
    for options, said in (
        (
            {"routing": Routing("pymoe", 16, (((0, 1),),))},
            r"recorded from pymoe \(1 layer, 2 of 16 experts\), and this",
        ),
        ({"expert_cache": 100}, "less than the experts that one token takes"),
    ):
        with pytest.raises(ValueError, match=said):
            dry_run(qwen(), apart(), 1, 8, 1, "H200", dtype="float32", **options)
    for places in ({"": 0, "lm_head": "cpu"}, None):
        with pytest.raises(ValueError, match="no experts of a mixture rest away"):
            dry_run(qwen(), places, 1, 8, 1, "H200", dtype="float32", expert_cache="1MB")


def test_bad_input_gets_one_sentence_through_every_face(tmp_path, capsys):
    """More experts for a token than there are; a routing of another model, of none, or no routing."""
    said = "Qwen3MoeForCausalLM says that a token takes 17 experts, but its blocks have 16 each"
    for call in (
        lambda model: dry_run(model, None, 1, 8, 1, "H200", dtype="float32"),
        lambda model: plan(model, {0: "1GB"}),
        estimate_memory,
        lambda model: Mixture.of(spec_from_module(model)),
    ):
        greedy = qwen()
        greedy.config.num_experts_per_tok = COUNT + 1
        with pytest.raises(ValueError, match=said):
            call(greedy)
    greedy.config.architectures = ["Qwen3MoeForCausalLM"]
    greedy.config.save_pretrained(tmp_path)
    for command in ("plan", "dry-run", "estimate-memory", "advise"):
        assert main([command, str(tmp_path), *(["--hardware", "4090"] if command != "estimate-memory" else [])]) == 2
        assert capsys.readouterr().err.strip().endswith(said.partition(" ")[2])
    other = Routing("pymoe", 16, (((0, 1),),))
    other.save(tmp_path / "routing.json")
    for routing in (other, tmp_path / "routing.json", str(tmp_path / "routing.json")):
        with pytest.raises(
            ValueError, match=r"recorded from pymoe \(1 layer, 2 of 16 experts\), and this model has 6 l"
        ):
            dry_run(qwen(), None, 1, 8, 1, "H200", dtype="float32", routing=routing)
    with pytest.raises(TypeError, match="a routing is what record_routing gives, or its JSON file, not a dict"):
        dry_run(qwen(), None, 1, 8, 1, "H200", routing={})
    small = ["--hardware", "4090", "--context", "8", "--new", "1"]
    assert main(["dry-run", "pymoe", *small, "--routing", str(tmp_path / "routing.json")]) == 2
    assert "and this model has 6 layers, 2 of 16 experts: record it" in capsys.readouterr().err
    assert main(["dry-run", "pymoe", *small, "--expert_cache", "1GB"]) == 2
    assert "but no experts of a mixture rest away from a GPU" in capsys.readouterr().err
    assert main(["dry-run", "pymoe", *small, "--experts_on_cpu", "6", "--expert_cache", "12MB"]) == 0
    assert "of the chosen experts were on the GPU" in capsys.readouterr().out
    with pytest.raises(TypeError, match="not a list"):
        ExpertExplorer(routing=[])
