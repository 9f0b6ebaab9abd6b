"""bigkit's layers compute what bitsandbytes' do, and are right where those are not."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from bigkit import (
    load_and_quantize_model,
)
from bigkit.quantize.bnb import (
    dequantized,
    empty_layer,
    quantized,
    skeleton,
)
from tests.quantize.helpers import CPU, config, empty, every_kind, run, states_equal

bnb = pytest.importorskip("bitsandbytes")


ODD_INPUTS = {
    "small": torch.linspace(-3, 3, 5 * 64).view(5, 64),
    "outliers": torch.linspace(-9, 9, 5 * 64).view(5, 64),
    "no number": torch.full((2, 64), float("nan")),
    "one row": torch.linspace(-2, 2, 64),
    "many dimensions": torch.linspace(-2, 2, 12 * 64).view(2, 2, 3, 64),
    "nothing": torch.empty(0, 64),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("inputs", ODD_INPUTS)
def test_the_int8_layer_computes_what_bitsandbytes_does(dtype, bias, threshold, inputs):
    full = nn.Linear(64, 32, bias)
    theirs = bnb.nn.Linear8bitLt(64, 32, bias, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(full.state_dict())
    theirs.to("cpu").eval()
    ours = empty_layer(full, 64, 32, "int8", threshold, None).eval()
    ours.weight, ours.bias = quantized(full.weight.detach(), "int8"), full.bias
    x = ODD_INPUTS[inputs].to(getattr(torch, dtype))
    with torch.no_grad():
        if x.dim() in (2, 3):  # bitsandbytes takes no others
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(ours(x).view(-1, 32), theirs(x.view(-1, 64)), rtol=0, atol=0)
            assert ours(x).shape == (*x.shape[:-1], 32)
        assert ours(x).dtype == x.dtype and ours.weight.SCB is not None and ours.state.SCB is None


def test_int8_layers_say_nothing_at_each_forward(caplog):
    layer = empty_layer(nn.Linear(64, 32), 64, 32, "int8", 6.0, None).eval()
    layer.weight, layer.bias = quantized(torch.randn(32, 64), "int8"), nn.Parameter(torch.zeros(32), False)
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    try:
        logger.setLevel(logging.WARNING)
        layer(torch.full((1, 64), 9.0)), layer(torch.ones(1, 64))
        logger.warning("something else")
    finally:
        logger.setLevel(level)
    assert [record.message for record in caplog.records] == ["something else"] and not logger.filters


# In blocks of 64: whole rows, blocks over several rows, rows of odd length, a last block that is not full.
SHAPES = [(64, 32), (96, 32), (100, 40), (32, 64), (48, 3), (33, 10), (160, 16), (2, 7), (192, 5)]


FOUR_BIT = ("nf4", "nf4-double", "fp4", "fp4-double")


@pytest.mark.parametrize("inputs, outputs", SHAPES)
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_rows_that_are_no_whole_blocks(inputs, outputs, kind):
    """bitsandbytes' kernel for CPUs takes wrong scales for some of these; compared with codes and arithmetic."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, 2)).to(dtype)
        original = model[0].weight.detach().float()
        options = {"bnb_4bit_compute_dtype": dtype, "torch_dtype": dtype, "skip_modules": ["1"]}
        layer = load_and_quantize_model(model, config(kind, **options), device_map=CPU)[0]
        weight, state = layer.weight, layer.weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
        codes = [code for byte in weight.data.flatten().tolist() for code in (byte >> 4, byte & 15)]
        expected = [float(state.code[c] * scales[i // state.blocksize]) for i, c in enumerate(codes)]
        expected = torch.tensor(expected[: inputs * outputs]).view(outputs, inputs)
        assert torch.equal(dequantized(weight, torch.float32), expected)
        assert (expected - original).abs().max() < 0.25 * original.abs().max(), "near what was quantized"
        for rows in (1, 3):
            x = torch.randn(rows, inputs, dtype=dtype)
            exact = nn.functional.linear(x.double(), expected.double(), layer.bias.double())
            bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
            assert (layer(x).double() - exact).abs().max() < bound
        if inputs % state.blocksize == 0:  # there bitsandbytes is right
            theirs = bnb.functional.dequantize_4bit(weight.data, state)
            assert torch.equal(dequantized(weight), theirs.to(state.dtype))


def test_a_gradient_flows_through_rows_that_are_no_whole_blocks():
    model = nn.Sequential(nn.Linear(96, 8), nn.Linear(8, 2))
    layer = load_and_quantize_model(model, config("nf4", skip_modules=["1"]), device_map=CPU)[0]
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, dequantized(layer.weight).sum(0).expand(3, 96), atol=1e-6)


def test_int8_layers_can_be_pickled_and_moved(saved):

    _, folder = saved
    model = load_and_quantize_model(empty(), config("int8"), folder, CPU)
    layer = model.transformer["h"][0].mlp.c_fc
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer) and not states_equal(again, layer)
    assert torch.equal(run(copy.deepcopy(model)), run(model))
    assert layer.to("cpu").weight.SCB is not None and torch.equal(run(model), run(model.to("cpu")))


@every_kind
def test_nothing_on_meta_is_multiplied_with(kind):
    """bitsandbytes' kernels would read from address 0, and answer."""
    layer = empty_layer(nn.Linear(64, 32), 64, 32, kind, 6.0, torch.float32).eval()
    layer.bias = nn.Parameter(torch.zeros(32), requires_grad=False)
    for weight in (layer.weight, skeleton(quantized(torch.randn(32, 64), kind))):
        layer._parameters["weight"] = weight
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="is on meta: it has no data"):
                layer(torch.ones(2, 64))
