"""Layer records: sizes against torch and bitsandbytes, tables there and back."""

import json

import pytest

from bigkit import zoo
from bigkit.model.precision import Precision, quantized_bytes
from bigkit.model.spec import Attention, ModelSpec, ModuleSpec, TensorSpec
from bigkit.zoo.catalog import specs_from_json, specs_to_json


def block():
    linear = ModuleSpec("Linear", {"weight": TensorSpec((64, 32)), "bias": TensorSpec((64,))}, linear=True)
    norm = ModuleSpec("BatchNorm", {"mean": TensorSpec((64,), buffer=True), "n": TensorSpec((), "int64", buffer=True)})
    return ModuleSpec("Block", {}, {"linear": linear, "norm": norm})


def model():
    shared = block()
    embed = ModuleSpec("Embedding", {"weight": TensorSpec((100, 32))})
    head = ModuleSpec("Linear", {"weight": TensorSpec((100, 32))}, linear=True)
    children = {"embed": embed, "h": ModuleSpec("ModuleList", {}, {str(i): shared for i in range(12)}), "head": head}
    return ModelSpec(
        name="m",
        root=ModuleSpec("Model", {"token": TensorSpec((1, 32))}, children),
        ties=(("embed.weight", "head.weight"),),
        no_split=("Block",),
        attention=(Attention("h.0", 64), Attention("h.1", 64, 10, 3)),
        facts={"hidden_size": 32},
    )


def test_layers_are_the_smallest_pieces_in_order():
    names = [layer.name for layer in model().layers()]
    assert names == ["token", "embed", *(f"h.{i}" for i in range(12)), "head"]
    assert [layer.name for layer in model().layers(())][:4] == ["token", "embed", "h.0.linear", "h.0.norm"]
    assert model().layers()[-1].ties == (("head.weight", "embed.weight"),)
    assert [layer.name for layer in model().layers("Model")] == [""]


def test_sizes_and_casts():
    spec = model()
    own = 4 * (64 * 32 + 64 + 64) + 8
    assert spec.layers()[2].bytes() == own
    assert spec.bytes() == 4 * 32 + 4 * 3200 + 12 * own  # the tied head counts once
    assert spec.layers()[2].bytes(Precision("float16")) == 2 * (64 * 32 + 64 + 64) + 8  # an integer stays
    assert spec.layers()[2].bytes(buffers_only=True) == 4 * 64 + 8
    assert spec.bytes(Precision("float64")) == 2 * (spec.bytes() - 12 * 8) + 12 * 8  # a cast may also widen
    assert spec.parameters == 32 + 3200 + 12 * (64 * 32 + 64)


def test_special_dtypes_and_kept_modules():
    spec = model()
    special = Precision("float16", special=(("h.3.linear.weight", "float32"),))
    sizes = [layer.bytes(special) for layer in spec.layers()]
    assert sizes[5] == sizes[4] + 2 * 64 * 32 and sizes[6] == sizes[4]
    everything = spec.bytes(Precision("float16", "nf4"))
    kept = spec.bytes(Precision("float16", "nf4", frozenset({"h.3"})))
    assert kept - everything == 2 * 64 * 32 - quantized_bytes((64, 32), "nf4", 64)
    assert spec.kept == {"embed", "head"}


def test_attention_windows_and_fixed_state():
    spec = model()
    assert spec.kv_bytes(100, batch=2, dtype="float16") == 2 * 2 * (64 * 100 + 64 * 10 + 3)


def test_tables_round_trip_and_share_equal_modules():
    spec = model()
    table = json.loads(json.dumps(specs_to_json({"full": spec})))
    again = specs_from_json(table)["full"]
    assert [(n, t) for n, t, _ in again.root.named_tensors()] == [(n, t) for n, t, _ in spec.root.named_tensors()]
    assert (again.ties, again.no_split, again.attention, again.facts) == (
        spec.ties,
        spec.no_split,
        spec.attention,
        spec.facts,
    )
    assert specs_to_json({"full": again}) == table
    runs = [node["children"] for node in table["modules"] if node["class"] == "ModuleList"]
    assert [list(run) for run in runs] == [["0..11"]] and len(table["modules"]) == 7
    with pytest.raises(ValueError, match="format 9"):
        specs_from_json({**table, "format": 9})


def test_shipped_tables_are_small():
    for entry in zoo.ENTRIES:
        assert zoo.catalog.table_path(entry).stat().st_size < 64_000, entry.name


@pytest.mark.parametrize("quantization", ["int8", "nf4", "nf4-double", "fp4", "fp4-double"])
@pytest.mark.parametrize("shape", [(64, 128), (7, 64), (513, 1024)])
def test_quantized_sizes_are_those_of_bitsandbytes(quantization, shape):
    bnb = pytest.importorskip("bitsandbytes")
    import torch

    weight = torch.randn(shape)
    if quantization == "int8":
        data, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        real = data.nbytes + scales.nbytes
    else:
        kind, _, double = quantization.partition("-")
        data, state = bnb.functional.quantize_4bit(
            weight, quant_type=kind, compress_statistics=bool(double), blocksize=64
        )
        parts = [data, state.absmax, state.code]
        if double:
            parts += [state.state2.absmax, state.state2.code, state.offset]
        real = sum(part.nbytes for part in parts)
    assert quantized_bytes(shape, quantization, rows=shape[0]) == real


def test_precision_refuses_nonsense():
    with pytest.raises(ValueError, match="unknown quantization"):
        Precision(quantization="int2")
    with pytest.raises(ValueError, match="unknown dtype"):
        Precision("float12")
