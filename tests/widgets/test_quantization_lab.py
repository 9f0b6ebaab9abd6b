"""The lab measures what bitsandbytes does, its picture and text tell the same, and it follows its controls."""

import json
import logging
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bigkit.draw.study import study_figure, study_label, study_text
from bigkit.model.precision import quantized_bytes
from bigkit.quantize.study import BLOCKSIZES, Sample, Scheme, layers_of, planted, study
from bigkit.widgets import QuantizationLab, quantization_lab
from bigkit.widgets._explorer import LONGEST_REPR, OWN
from bigkit.widgets.quantization_lab import PRESETS
from bigkit.zoo.gpt import load_pygpt
from tests import forked

bnb = pytest.importorskip("bitsandbytes")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

schemes = st.builds(
    Scheme, st.sampled_from(["int8", "nf4", "fp4"]), st.sampled_from(BLOCKSIZES), st.booleans(),
    st.sampled_from([0.0, 2.0, 6.0]),
)  # fmt: skip


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@settings(max_examples=40)
@given(scheme=schemes, outputs=st.integers(1, 40), inputs=st.integers(2, 90), seed=st.integers(0, 9))
def test_a_study_is_what_bitsandbytes_does(scheme, outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(outputs, inputs, generator=generator), torch.randn(5, inputs, generator=generator)
    found = study(Sample("layer", weight, x), scheme)
    if scheme.kind == "int8":
        layer = bnb.nn.Linear8bitLt(inputs, outputs, False, has_fp16_weights=False, threshold=scheme.threshold)
        layer.load_state_dict({"weight": weight})
        with torch.no_grad():
            output = layer.to("cpu").eval()(x.half()).float()
        rounded = bnb.functional.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
        assert found.nbytes == quantized_bytes((outputs, inputs), "int8", outputs)
    else:
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=scheme.blocksize, quant_type=scheme.kind, compress_statistics=scheme.double
        )
        if scheme.blocksize >= 1024 or inputs % 2:
            return  # bitsandbytes would compile its kernel
        if inputs % scheme.blocksize and weight.numel() > scheme.blocksize:
            return  # its kernel for CPUs with AVX512 takes rows for whole blocks, and gives other values than on a GPU
        rounded = bnb.functional.dequantize_4bit(packed, state).reshape(outputs, inputs)
        output = F.linear(x, rounded)
        kind = scheme.kind + "-double" * scheme.double
        assert found.nbytes == quantized_bytes((outputs, inputs), kind, outputs, scheme.blocksize)
    assert found.weight_error == pytest.approx(relative(rounded, weight), abs=1e-6)
    assert found.output_error == pytest.approx(relative(output, F.linear(x, weight)), abs=1e-5)
    assert sum(found.counts) == weight.numel() and min(found.codes) >= -1 and max(found.codes) <= 1
    assert found.bits == 8 * found.nbytes / weight.numel()


def test_schemes_that_do_not_exist_are_refused():
    for wrong in ({"kind": "int4"}, {"blocksize": 100}, {"threshold": -1.0}, {"threshold": float("inf")}):
        with pytest.raises(ValueError, match=r"unknown kind|unknown block size|threshold must be"):
            Scheme(**wrong)


def test_listening_to_a_model_leaves_it_as_it_was():
    model = load_pygpt(dtype=torch.float32)
    found = layers_of(model, torch.tensor([[1, 2, 3]]))
    assert len(found) == 41 and found["lm_head"].inputs.shape == (3, 256)
    assert not any(module._forward_hooks for module in model.modules())
    sample = found["transformer.h.3.mlp.c_fc"]
    assert torch.equal(sample.outputs, F.linear(sample.inputs, model.transformer["h"][3].mlp.c_fc.weight))


def test_picture_label_and_text_tell_the_same():
    made = study(planted(), Scheme("nf4"))
    errors = {"h.0.up": 0.05, "h.1.up": 0.07, made.layer: made.output_error}
    text, label = study_text(made, errors), study_label(made)
    for said in (f"{made.bits:.2f} bits a weight", f"{100 * made.output_error:.2f} %", "36.06 KiB"):
        assert said in text and said in label
    assert ["h.up", "2", "5.00", "%", "7.00", "%"] in [line.split() for line in text.splitlines()]
    assert all(f"{code:.3f}" in text for code in made.codes)
    picture = study_figure(made, errors)
    assert sum(box.kind == "values of a code" for box in picture.shapes) == 16
    assert made.layer in {text.text for text in picture.texts} and picture.label == label


def test_the_lab_follows_its_controls():
    lab = QuantizationLab()
    assert lab.preset.value == "nf4" and lab.study.scheme == Scheme("nf4") and len(lab.errors) == 40
    before = lab.study.output_error
    assert lab.threshold.disabled and not lab.blocksize.disabled
    lab.blocksize.value = 1024
    assert lab.preset.value == OWN and lab.study.bits < 4.1 and lab.study.output_error > before
    for name, controls in PRESETS.items():
        lab.preset.value = name
        assert lab.preset.value == name and lab.study.scheme.kind == controls["kind"]
        assert all(getattr(lab, control).value == value for control, value in controls.items())
        assert len(repr(lab)) <= LONGEST_REPR
        root = ElementTree.fromstring(lab.picture.value)
        assert root.get("role") == "img" and lab.study.layer in root.get("aria-label")
    with_outliers_apart = lab.study.output_error
    lab.threshold.value = 0.0
    assert lab.study.output_error > 2 * with_outliers_apart and lab.preset.value == "outliers, treated as all"
    assert len(lab.errors) == 41
    lab.reset()
    assert lab.study.scheme == Scheme("nf4") and lab.preset.value == "nf4" and lab.study.output_error == before
    with pytest.raises(ValueError, match="unknown layer 'lm_tail'"):
        QuantizationLab("lm_tail")


def test_the_lab_exports_what_it_shows(tmp_path):
    lab = QuantizationLab("planted outliers", Scheme("int8"))
    data = json.loads(lab.export(tmp_path / "study.json").read_text())
    assert data["output_error"] == lab.study.output_error == data["output_errors"]["planted outliers"]
    assert lab.export(tmp_path / "study.svg").read_text() == lab.picture.value
    for shown in (lab, QuantizationLab("transformer.h.2.attn.c_proj", Scheme("fp4", 128, True))):
        names = {}
        exec(shown.to_code(), names)
        assert names["found"].output_error == pytest.approx(shown.study.output_error)


def test_perplexities_of_a_few_bytes_are_close(monkeypatch):
    quantization_lab._perplexity.cache_clear()
    monkeypatch.setattr(quantization_lab, "SCORED", 200)
    found = QuantizationLab().perplexities()
    quantization_lab._perplexity.cache_clear()
    assert list(found) == ["float32", "bfloat16", "int8", "nf4", "nf4-double", "fp4"]
    assert all(value == pytest.approx(found["float32"], rel=0.1) for value in found.values())


@pytest.mark.soak
def test_perplexity_rises_as_bits_fall():
    found = QuantizationLab().perplexities()
    assert list(found) == ["float32", "bfloat16", "int8", "nf4", "nf4-double", "fp4"]
    assert max(found["bfloat16"], found["int8"]) < 1.003 * found["float32"]
    assert found["float32"] < found["nf4"] < found["fp4"] < 1.1 * found["float32"]
    assert found["nf4-double"] == pytest.approx(found["nf4"], rel=0.005)


def test_without_bitsandbytes_the_lab_says_so():
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from bigkit.widgets import QuantizationLab\n"
        "lab = QuantizationLab(); print(lab, lab.error.value)"
    )
    said = forked.run(code).stdout
    assert "nothing quantized yet" in said and "need bitsandbytes" in said


def test_the_lab_shows_inputs_and_takes_a_layer_by_its_column():
    lab = QuantizationLab("planted outliers")
    lab.kind.value = "int8"
    features = lab.study.features
    assert len(features) == lab.study.shape[1] and sum(value >= 6 for value in features) == lab.study.outliers == 3
    assert lab.picture.value.count("so multiplied in 16 bit") == 3
    before = lab.picture.value
    lab.threshold.value = 0.0
    assert lab.picture.value != before and "so multiplied in 16 bit" not in lab.picture.value
    lab.click("layer:transformer.h.0.mlp.c_proj")
    assert lab.study.layer == "transformer.h.0.mlp.c_proj"
