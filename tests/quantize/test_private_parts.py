"""What bigkit needs of bitsandbytes' private parts is there; a failure says what no longer works."""

import inspect
import logging

import pytest
import torch

from bigkit.quantize import _bnb
from bigkit.quantize.bnb import bitsandbytes, quantized

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("name", ["int8_vectorwise_quant", "int8_linear_matmul", "int8_mm_dequant"])
def test_kernels(name):
    bitsandbytes()
    packet = getattr(torch.ops.bitsandbytes, name, None)
    assert packet is not None and "default" in packet.overloads(), (
        f"bitsandbytes {bnb.__version__} has no operation {name}: Linear8bitLt cannot call its kernels itself"
    )


@pytest.mark.parametrize("name", ["CB", "SCB", "threshold", "has_fp16_weights"])
def test_the_state_of_int8_layers(name):
    assert hasattr(bnb.MatmulLtState(), name), (
        f"bitsandbytes {bnb.__version__}: MatmulLtState has no {name}, which Linear8bitLt lends for a forward"
    )


def test_packing_anew():
    layer = bnb.nn.Linear4bit(64, 32, device="meta")
    assert hasattr(layer, "support_avx512bf16_for_cpu"), (
        f"bitsandbytes {bnb.__version__}: 4-bit layers may pack their codes anew, and keep_codes() cannot stop it"
    )
    assert "original_qshape" in inspect.getsource(bnb.functional), (
        f"bitsandbytes {bnb.__version__}: is_packed_anew() cannot tell weights that were packed anew"
    )
    assert not _bnb.is_packed_anew(quantized(torch.randn(32, 64), "nf4").quant_state)


@pytest.mark.parametrize("warning", [_bnb.KERNEL_WARNING, _bnb.CAST_WARNING])
def test_warnings_are_still_worded_so(warning):
    module, words = warning
    source = inspect.getsource(__import__(module, fromlist=["ops"]))
    assert words in source, f"bitsandbytes {bnb.__version__}: {module} says no more {words!r}: nothing is kept quiet"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_warning_is_kept_back_within_its_context_alone(caplog, error):
    name, words = _bnb.CAST_WARNING
    logger = logging.getLogger(name)
    filters = list(logger.filters)
    logger.setLevel(logging.WARNING)
    try:
        with pytest.raises(error) if error else _bnb.without(_bnb.KERNEL_WARNING), _bnb.without(_bnb.CAST_WARNING):
            logger.warning(f"MatMul8bitLt: {words} from %s", "a")
            logger.warning("something else")
            if error:
                raise error
        logger.warning(f"MatMul8bitLt: {words} from %s", "b")
    finally:
        logger.setLevel(logging.NOTSET)
    assert [record.getMessage()[-4:] for record in caplog.records] == ["else", "om b"]
    assert logger.filters == filters


def test_the_compiler_waits_for_the_first_call(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or function)
    before = torch.compile
    with _bnb.compiling_later():

        @torch.compile
        def double(x):
            return 2 * x

        @torch.compile(dynamic=False)
        def triple(x):
            return 3 * x

    assert torch.compile is before and calls == []
    assert double.__name__ == "double" and double(2) + double(3) + triple(x=1) == 13
    assert calls == [{}, {"dynamic": False}], "once each"
    module = "bitsandbytes.backends.default.ops"
    assert "torch.compile(" in inspect.getsource(__import__(module, fromlist=["ops"])), (
        f"bitsandbytes {bnb.__version__}: {module} compiles nothing when it is imported, and nothing need wait"
    )
