"""What tests of quantized models share: every kind of quantization, and small models."""

import pytest
import torch
import transformers

from bigkit import (
    BnbQuantizationConfig,
    init_empty_weights,
)
from bigkit.quantize.bnb import (
    is_quantized,
)
from bigkit.zoo.gpt import GPT, GPTConfig

CPU = {"": "cpu"}


KINDS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}


every_kind = pytest.mark.parametrize("kind", KINDS)


def config(kind, **options):
    return BnbQuantizationConfig(**{"bnb_4bit_compute_dtype": "fp32", "torch_dtype": "fp32", **KINDS[kind], **options})


def small(**sizes):
    return GPT(GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 96, "block_size": 32, **sizes}))


def four():
    return small(n_layer=4)


def empty(make=small):
    with init_empty_weights():
        return make()


def states_equal(one, other):
    one, other = ({name: tensor.cpu() for name, tensor in model.state_dict().items()} for model in (one, other))
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


def tokens():
    return torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))


def run(model):
    with torch.no_grad():
        return model(tokens())[0]


def quantized_names(model):
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if is_quantized(parameter)]


def llama():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


MAPS = {
    "RAM": {"transformer": "cpu", "lm_head": 0},
    "disk": {"transformer": "disk", "lm_head": 0},
    "mixed": {"transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0, "transformer.h.0": 0,
              "transformer.h.1": "cpu", "transformer.h.2": "disk", "transformer.h.3": "cpu",
              "transformer.ln_f": "disk", "lm_head": 0},
}  # fmt: skip
