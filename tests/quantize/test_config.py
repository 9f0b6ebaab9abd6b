"""The options of a quantization: checked, never changed, and those of Transformers."""

import dataclasses

import pytest
import torch
import transformers

from bigkit import (
    BnbQuantizationConfig,
    load_and_quantize_model,
)
from bigkit.model.spec import QUANTIZATIONS
from tests.quantize.helpers import CPU, KINDS, config, empty, every_kind, states_equal

bnb = pytest.importorskip("bitsandbytes")


def test_config_says_what_it_means():
    made = BnbQuantizationConfig(load_in_8bit=True)
    assert made.torch_dtype == torch.float16 and made.quantization == "int8" and made.llm_int8_threshold == 6.0
    made = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bf16", skip_modules=["head"])
    assert made.torch_dtype == made.bnb_4bit_compute_dtype == torch.bfloat16 and made.skip_modules == ("head",)
    assert {BnbQuantizationConfig(**options).quantization for options in KINDS.values()} == set(QUANTIZATIONS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one of load_in_8bit and load_in_4bit, not neither"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "not both"),
        ({"load_in_8bit": 1}, "load_in_8bit must be True or False, not 1"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1}, "must be a number of 0 or more, not -1"),
        ({"load_in_8bit": True, "llm_int8_threshold": float("nan")}, "must be a number of 0 or more, not nan"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "must be 'fp4' or 'nf4', not 'nf3'"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype must be float32"),
        ({"load_in_4bit": True, "torch_dtype": "float99"}, "torch_dtype must be float32, float16 or bfloat16"),
        ({"load_in_4bit": True, "skip_modules": "lm_head"}, "skip_modules must be a list of module names"),
        ({"load_in_4bit": True, "keep_in_fp32_modules": [3]}, "keep_in_fp32_modules must be a list"),
    ],
)
def test_config_refuses_nonsense(options, said):
    with pytest.raises(ValueError, match=said):
        BnbQuantizationConfig(**options)


def test_config_never_changes(saved):
    _, folder = saved
    made = config("nf4", skip_modules=["attn"], keep_in_fp32_modules=["mlp.c_fc"])
    before = dataclasses.asdict(made)
    first = load_and_quantize_model(empty(), made, folder, CPU)
    second = load_and_quantize_model(empty(), made, folder, CPU)
    assert dataclasses.asdict(made) == before and not states_equal(first, second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.load_in_8bit = True


@every_kind
def test_config_is_that_of_transformers(kind):
    made = config(kind, skip_modules=["lm_head"])
    theirs = transformers.BitsAndBytesConfig.from_dict(made.to_dict())
    assert theirs.quantization_method() == {"int8": "llm_int8"}.get(kind, kind.partition("-")[0])
    assert BnbQuantizationConfig.from_dict(theirs.to_dict(), torch_dtype="float32") == made
    with pytest.raises(ValueError, match="quantized by 'gptq'"):
        BnbQuantizationConfig.from_dict({"quant_method": "gptq"})
    with pytest.warns(UserWarning, match="no effect with load_in_4bit"):
        BnbQuantizationConfig(load_in_4bit=True, llm_int8_threshold=5.0)
