"""What is planned, estimated and rehearsed as quantized is what loading quantizes, family by family."""

import warnings

import pytest
import torch

from bigkit import estimate_memory, init_empty_weights, load_and_quantize_model, plan
from bigkit.dryrun.fake_bnb import config_of, quantize_empty
from bigkit.meta.skeleton import spec_from_module
from bigkit.quantize.bnb import nbytes
from tests.meta.test_cache import DECODERS, SMALL, build
from tests.quantize.helpers import CPU, quantized_names, small

pytest.importorskip("bitsandbytes")

ENCODERS = {
    "bert": ("BertForMaskedLM", SMALL),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
                                          "num_heads": 4}),
    "vit": ("ViTForImageClassification", SMALL | {"image_size": 16, "patch_size": 8}),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
}  # fmt: skip
FAMILIES = {**DECODERS, **ENCODERS, "pygpt": (None, {})}
USUAL = ("pygpt", "gpt2", "bert", "t5", "opt", "falcon", "llama", "mixtral", "qwen2", "deepseek_v3", "vit", "gemma2")


def make(family):
    name, settings = FAMILIES[family]
    return small() if name is None else build(name, settings, torch.float32)


def check(family, kind, half):
    spec, quantization = spec_from_module(make(family)), config_of(kind, half)
    with init_empty_weights():
        empty = make(family)
    if not spec.quantized(spec.precision(half, kind)):  # then loading refuses, and nothing is offered
        with pytest.raises(ValueError, match="would be quantized"):
            load_and_quantize_model(make(family), quantization, device_map=CPU)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # experts that stay as they are
        model = load_and_quantize_model(make(family), quantization, device_map=CPU)
    names = [f"{name}.weight" for name in spec.quantized(spec.precision(half, kind))]
    assert names == quantized_names(model)
    rehearsed = quantize_empty(empty, quantization)
    kinds = ("Linear8bitLt", "Linear4bit")
    assert names == [f"{name}.weight" for name, part in rehearsed.named_modules() if type(part).__name__ in kinds]
    loaded = sum(map(nbytes, model.parameters()))  # ties once
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    planned = plan(spec, {"cpu": "1GiB"}, dtype=half, quantization=kind)
    weights = planned.shares[0].weights
    assert 0 <= loaded + buffers - weights <= buffers / 2 + 1, "buffers are planned in the dtype, and stay as they are"
    if half == "float16":
        [row] = estimate_memory(spec, stored=[kind]).inference
        assert row.weights == weights


@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
@pytest.mark.parametrize("family", USUAL)
def test_plans_count_what_loading_quantizes(family, kind):
    check(family, kind, "float16")


@pytest.mark.soak
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double", "fp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_count_what_loading_quantizes_in_every_family(family, kind, half):
    check(family, kind, half)
