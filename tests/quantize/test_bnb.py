"""A quantized weight is what bitsandbytes makes of it, and the same after it was taken apart."""

import pytest
import torch
from torch import nn

from bigkit import (
    load_and_quantize_model,
)
from bigkit.quantize.bnb import (
    is_quantized,
    put_together,
    quantized,
    take_apart,
)
from tests.quantize.helpers import CPU, KINDS, config, empty, every_kind, quantized_names, run, states_equal

bnb = pytest.importorskip("bitsandbytes")


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_those_of_bitsandbytes(saved, kind, dtype):
    model, folder = saved
    ours = load_and_quantize_model(empty(), config(kind, torch_dtype=dtype), folder, CPU)
    full = model.transformer["h"][1].mlp.c_fc
    options = KINDS[kind]
    if kind == "int8":
        theirs = bnb.nn.Linear8bitLt(64, 256, has_fp16_weights=False, threshold=6.0)
    else:
        double, quant_type = options.get("bnb_4bit_use_double_quant", False), options.get("bnb_4bit_quant_type", "fp4")
        theirs = bnb.nn.Linear4bit(64, 256, compute_dtype=torch.float32, compress_statistics=double,
                                   quant_type=quant_type)  # fmt: skip
    theirs.load_state_dict(full.state_dict())
    theirs.to(getattr(torch, dtype)).to("cpu")
    assert not states_equal(theirs, ours.transformer["h"][1].mlp.c_fc)


@every_kind
def test_taken_apart_and_put_together_elsewhere_is_the_same(saved, kind):
    """Parts copied into one slab of bytes, and a weight made of views of it: the same forward, again and again."""
    _, folder = saved
    model = load_and_quantize_model(empty(), config(kind), folder, CPU)
    expected, state = run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slab, start = torch.empty(2**20, dtype=torch.uint8), 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        if not is_quantized(weight):
            continue
        parts = {}
        for name, part in take_apart(weight).items():
            view = slab[start : start + part.nbytes].view(part.dtype).view(part.shape)
            parts[name] = view.copy_(part)
            start += -(-part.nbytes // 16) * 16
        module._parameters["weight"] = made = put_together(weight, parts)
        assert type(made) is type(weight) and made.data_ptr() == parts[""].data_ptr()
        assert [part.data_ptr() for part in take_apart(made).values()] == [part.data_ptr() for part in parts.values()]
    for _ in range(3):
        assert torch.equal(run(model), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(is_quantized(model.get_parameter(name)) for name in quantized_names(model))
    slab.zero_()  # nothing else is kept: the model has only what lies in the slab
    assert not torch.equal(run(model), expected)


def test_plain_tensors_are_not_taken_apart():
    with pytest.raises(ValueError, match="Parameter of shape .3, 2. is no quantized weight"):
        take_apart(nn.Linear(2, 3).weight)
    with pytest.raises(ValueError, match="Params4bit of shape"):
        take_apart(bnb.nn.Linear4bit(64, 64).weight)


def test_quantized_keeps_the_sign_and_order_of_int8():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.25, 0.0, -0.125]])
    parts = take_apart(quantized(weight, "int8"))
    assert parts[""].tolist() == [[64, -127, 32], [127, 0, -64]] and parts["SCB"].tolist() == [2.0, 0.25]
