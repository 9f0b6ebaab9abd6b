"""Quantized checkpoints run as they are stored: bit for bit what decoding all weights first gives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

import bigkit
from bigkit.checkpoints.as_stored import StoredLinear
from bigkit.checkpoints.codecs import decode_mxfp4, find_codec
from bigkit.checkpoints.format import Checkpoint
from bigkit.meta.skeleton import spec_from_module
from bigkit.model.header import CheckpointError

LLAMA = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=96,
                    num_key_value_heads=2, max_position_embeddings=64, dtype="bfloat16")  # fmt: skip
OSS = GptOssConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
                   num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
                   max_position_embeddings=64, dtype="bfloat16")  # fmt: skip
PROMPT = torch.tensor([[5, 9, 33, 2, 71, 8]])


def int32(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)


def fp8(rows: int, columns: int) -> dict[str, Tensor]:
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) / 50
    return {"weight": torch.randn(rows, columns).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def int4(rows: int, columns: int) -> dict[str, Tensor]:
    return {
        "weight_packed": int32(rows, columns // 8),
        "weight_scale": (torch.rand(rows, columns // 32) / 50).bfloat16(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def gptq(rows: int, columns: int) -> dict[str, Tensor]:
    scales = (torch.rand(columns // 32, rows) / 50).half()
    index = torch.arange(columns, dtype=torch.int32) // 32
    return {"qweight": int32(columns // 8, rows), "qzeros": int32(columns // 32, rows // 8), "scales": scales,
            "g_idx": index}  # fmt: skip


def awq(rows: int, columns: int) -> dict[str, Tensor]:
    scales = (torch.rand(columns // 32, rows) / 50).half()
    return {"qweight": int32(columns, rows // 8), "qzeros": int32(columns // 32, rows // 8), "scales": scales}


def mxfp8(rows: int, columns: int) -> dict[str, Tensor]:
    exponents = torch.randint(119, 123, (rows, columns // 32), dtype=torch.uint8)
    return {"weight": torch.randn(rows, columns).to(torch.float8_e4m3fn), "weight_scale_inv": exponents}


def nvfp4(rows: int, columns: int) -> dict[str, Tensor]:
    """As ModelOpt writes it."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.rand(rows, columns // 16).to(torch.float8_e4m3fn)
    activations = {"input_scale": torch.tensor(0.5)}  # for kernels that compute in 4 bits
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": torch.tensor(0.02), **activations}


FORMATS: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    "fp8": fp8, "int4": int4, "gptq": gptq, "awq": awq, "mxfp8": mxfp8, "nvfp4": nvfp4,
}  # fmt: skip


def write(folder: Path, format: str) -> nn.Module:
    """A checkpoint in a format, and the model that all of its weights decoded give."""
    torch.manual_seed(0)
    model = (GptOssForCausalLM(OSS) if format == "mxfp4" else LlamaForCausalLM(LLAMA)).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj_bias"):  # of experts: Transformers lets them begin as zeros
            parameter.data.normal_(0, 0.1)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if format == "mxfp4" and name.endswith("experts"):
            for own in ("gate_up_proj", "down_proj"):
                experts, columns, rows = getattr(module, own).shape
                blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
                scales = torch.randint(118, 122, (experts, rows, columns // 32), dtype=torch.uint8)
                tensors |= {f"{name}.{own}_blocks": blocks, f"{name}.{own}_scales": scales}
                getattr(module, own).data = decode_mxfp4({"_blocks": blocks, "_scales": scales}, torch.bfloat16)
                del tensors[f"{name}.{own}"]
        elif format in FORMATS and isinstance(module, nn.Linear) and name != "lm_head":
            shape = tuple(module.weight.shape)
            parts = FORMATS[format](*shape)
            codec = find_codec(shape, {own: (tuple(part.shape), part.dtype) for own, part in parts.items()})  # type: ignore[arg-type]
            assert codec is not None
            module.weight.data = codec.decode(parts, torch.bfloat16)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{own}": part for own, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    return model.eval()


def empty(model: nn.Module) -> nn.Module:
    with bigkit.init_empty_weights():
        return type(model)(model.config).bfloat16().eval()


def spread(count: int, *devices: int | str) -> dict[str, int | str]:
    layers = {f"model.layers.{i}": devices[i % len(devices)] for i in range(count)}
    return {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0, **layers}


PLACES = ["resident", "cpu", "disk", "slots", "slots-disk"]


@pytest.mark.parametrize(
    ("format", "place"),
    [*(("fp8", place) for place in PLACES), *(("mxfp4", place) for place in PLACES), ("int4", "slots"),
     ("gptq", "disk"), ("awq", "slots-disk")],
)  # fmt: skip
def test_outputs_are_those_of_the_decoded_weights(tmp_path: Path, format: str, place: str) -> None:
    plain = write(tmp_path, format)
    layers = plain.config.num_hidden_layers
    options = {
        "resident": {},
        "cpu": {"device_map": {"": "cpu"}},
        "disk": {"device_map": {**spread(layers, "disk"), "model.embed_tokens": "cpu", "model.norm": "cpu",
                                "model.rotary_emb": "cpu", "lm_head": "cpu"}},
        "slots": {"device_map": spread(layers, "cpu"), "stand_in": {0: "cpu"}},
        "slots-disk": {"device_map": spread(layers, "disk", 0), "stand_in": {0: "cpu"}},
    }[place]  # fmt: skip
    model = bigkit.load_checkpoint_and_dispatch(empty(plain), tmp_path, strict=True, **options)
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)
    expected = plain.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("format", [*FORMATS, "mxfp4"])
def test_sizes_are_those_of_the_file_and_it_is_written_as_it_was_read(tmp_path: Path, format: str) -> None:
    plain = write(tmp_path, format)
    stored = load_file(tmp_path / "model.safetensors")
    model = empty(plain)
    report = bigkit.load_checkpoint_in_model(model, tmp_path, dtype="bfloat16")
    assert report.clean, report
    kept_in_float32 = [name for name, p in model.named_parameters() if p.dtype == torch.float32 != stored[name].dtype]
    more = sum(2 * stored[name].numel() for name in kept_in_float32)  # norms of gpt-oss
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert spec_from_module(model).bytes() == sum(tensor.nbytes for tensor in stored.values()) + buffers + more
    bigkit.save_model(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    for name, tensor in again.items():
        bits = [one.reshape(-1).view(torch.uint8) for one in (tensor.to(stored[name].dtype), stored[name])]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("format", [*FORMATS, "mxfp4"])
def test_dense_is_a_plain_model(tmp_path: Path, format: str) -> None:
    plain = write(tmp_path, format)
    model = empty(plain)
    assert bigkit.load_checkpoint_in_model(model, tmp_path, keep="dense").clean
    assert all(type(module) is type(other) for module, other in zip(model.modules(), plain.modules(), strict=True))
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_chosen_experts_travel_as_they_are_stored(tmp_path: Path, place: str) -> None:
    plain = write(tmp_path, "mxfp4")
    apart = {f"model.layers.{i}.mlp.experts": place for i in range(2)}
    devices: dict[str, int | str] = {"": 0, **apart}
    model = bigkit.load_checkpoint_and_dispatch(empty(plain), tmp_path, devices, strict=True, stand_in={0: "cpu"})
    expected = plain.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)
    hook: Any = model.model.layers[0].mlp.experts._hf_hook
    assert type(hook.streamer).__name__ == "ExpertStreamer"


@pytest.mark.parametrize("format", [*FORMATS, "mxfp4"])
def test_a_model_that_has_weights_gets_those_of_the_file(tmp_path: Path, format: str) -> None:
    plain = write(tmp_path, format)
    with torch.no_grad():
        expected = plain(PROMPT).logits
        for device_map in (None, {"": "cpu"}, {"": "disk"}):
            model: Any = type(plain)(plain.config).bfloat16().eval()
            bigkit.load_checkpoint_and_dispatch(
                model, tmp_path, device_map, strict=True, offload_folder=tmp_path / "rest"
            )  # type: ignore[arg-type]
            assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.parametrize("format", ["fp8", "nvfp4", "mxfp4"])
def test_no_other_weight_is_rounded_to_codes(tmp_path: Path, format: str) -> None:
    plain = write(tmp_path, format)
    model = empty(plain)
    for _ in range(2):
        assert bigkit.load_checkpoint_in_model(model, tmp_path).clean
    bigkit.save_model(plain, tmp_path / "plain")
    with pytest.warns(UserWarning, match="does not fit"):
        bigkit.load_checkpoint_in_model(model, tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)


@pytest.mark.parametrize("place", [None, "cpu", "disk"])
@pytest.mark.parametrize("format", ["fp8", "mxfp8"])
def test_a_state_dict_of_other_weights_is_refused(tmp_path: Path, format: str, place: str | None) -> None:
    """torch would round them to codes, and leave the scales."""
    plain = write(tmp_path, format)
    places: Any = place and spread(3, place)
    model = bigkit.load_checkpoint_and_dispatch(empty(plain), tmp_path, places, stand_in={0: "cpu"})
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for assign in (False, True):
        with pytest.raises(
            RuntimeError, match=r"q_proj.weight is stored here as torch.float8_e4m3fn, and torch.bfloat"
        ):
            model.load_state_dict(plain.state_dict(), strict=False, assign=assign)
        model.load_state_dict(own, assign=assign)
        with torch.no_grad():
            assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)


ADAPTERS: dict[str, Any] = {
    "LoRA": ("LoraConfig", {"r": 2, "init_lora_weights": False}),
    "DoRA": ("LoraConfig", {"r": 2, "init_lora_weights": False, "use_dora": True}),
    "IA3": ("IA3Config", {"feedforward_modules": [], "init_ia3_weights": False}),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    ("format", "adapter"),
    [("fp8", "LoRA"), ("fp8", "DoRA"), ("nvfp4", "IA3"), ("gptq", "LoRA"), ("awq", "IA3"), ("int4", "DoRA")],
)
def test_adapters_see_the_decoded_weight_and_merging_is_refused(tmp_path: Path, format: str, adapter: str) -> None:
    peft = pytest.importorskip("peft")
    plain = write(tmp_path, format)
    places: Any = spread(3, "cpu", "disk", 0)
    model = bigkit.load_checkpoint_and_dispatch(empty(plain), tmp_path, places, stand_in={0: "cpu"})
    kind, options = ADAPTERS[adapter]
    torch.manual_seed(1)
    ours, theirs = (
        peft.get_peft_model(one, getattr(peft, kind)(target_modules=["q_proj", "v_proj"], **options)).eval()
        for one in (model, plain)
    )
    adapters = {name: tensor for name, tensor in ours.state_dict().items() if "lora_" in name or "ia3_" in name}
    assert not theirs.load_state_dict(adapters, strict=False).unexpected_keys
    with torch.no_grad():
        expected = theirs(PROMPT).logits
        assert torch.equal(ours(PROMPT).logits, expected)
        with pytest.raises(
            RuntimeError, match=r"would write to a weight of \[64, 64\], but it is stored as .*keep='dense'"
        ):
            ours.merge_adapter()
        assert torch.equal(ours(PROMPT).logits, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("place", [None, "cpu"])
@pytest.mark.parametrize("format", [*FORMATS, "mxfp4"])
def test_adapters_on_what_is_no_parameter_are_refused(tmp_path: Path, format: str, place: str | None) -> None:
    """peft would leave them out, and put on the others."""
    peft = pytest.importorskip("peft")
    plain = write(tmp_path, format)
    layers = plain.config.num_hidden_layers
    targets = ["mlp.experts.down_proj", "k_proj.weight"] if format == "mxfp4" else ["q_proj.weight"]
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], target_parameters=targets, init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path / "adapter")
    for step in (
        lambda model: peft.get_peft_model(model, config),
        lambda model: peft.PeftModel.from_pretrained(model, tmp_path / "adapter"),
        lambda model: model.load_adapter(tmp_path / "adapter"),
    ):
        model = bigkit.load_checkpoint_and_dispatch(
            empty(plain), tmp_path, place and spread(layers, place), stand_in={0: "cpu"}
        )  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"target_parameters .*layers.0.*_proj.*stored in few bits.*keep='dense'"):
            step(model)
    torch.manual_seed(1)
    ours = peft.get_peft_model(
        bigkit.load_checkpoint_and_dispatch(empty(plain), tmp_path, keep="dense").eval(), config
    ).eval()
    torch.manual_seed(1)
    theirs = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        assert torch.equal(ours(PROMPT).logits, theirs(PROMPT).logits)


def test_the_weight_of_a_stored_layer_can_be_read_and_not_written_to(tmp_path: Path) -> None:
    plain = write(tmp_path, "gptq")
    model: Any = empty(plain)
    bigkit.load_checkpoint_in_model(model, tmp_path)
    layer, expected = model.model.layers[0].mlp.up_proj, plain.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(layer.weight, expected) and type(layer.weight + 1) is Tensor
    writes: list[Callable[[Tensor], Any]] = [
        lambda weight: weight.mul_(2), lambda weight: weight.data.add_(1), lambda weight: weight.t().zero_(),
        lambda weight: weight[0].__setitem__(0, 1.0), lambda weight: weight.detach().copy_(expected),
        lambda weight: setattr(weight, "data", expected), lambda weight: torch.add(weight, 1, out=weight),
        lambda weight: weight.chunk(2)[1].__iadd__(1), lambda weight: nn.init.zeros_(weight),
        lambda weight: nn.functional.relu(weight, inplace=True), lambda weight: nn.functional.relu(weight.t(), True),
        lambda weight: nn.functional.embedding(PROMPT[0], weight, max_norm=0.1), lambda weight: np.from_dlpack(weight),
    ]  # fmt: skip
    for write_to in writes:
        with torch.no_grad(), pytest.raises(RuntimeError, match="would write to a weight of"):
            write_to(layer.weight)
    for array in (
        layer.weight.float().numpy,
        layer.weight.float().detach().numpy,
        layer.weight.view(torch.uint8).numpy,
    ):
        assert array().flags.writeable == (array.__self__.dtype == torch.float32)  # that is a copy
    with pytest.raises(ValueError, match="another one was given: load with keep='dense'"):
        layer.weight = nn.Parameter(expected.clone())


def test_what_is_computed_on_meta_of_a_stored_weight_can_be_written_to(tmp_path: Path) -> None:
    model: Any = empty(write(tmp_path, "gptq"))
    bigkit.load_checkpoint_in_model(model, tmp_path)
    layer = model.model.layers[0].mlp.up_proj.to("meta")
    assert (layer.weight * 2).add_(1).shape == layer.weight.shape


@pytest.mark.parametrize("format", ["gptq", "mxfp4"])
def test_copies_and_pickles(tmp_path: Path, format: str) -> None:
    plain = write(tmp_path, format)
    model = empty(plain)
    bigkit.load_checkpoint_in_model(model, tmp_path)
    torch.save(model, tmp_path / "whole.pt")
    ways = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ]
    with torch.no_grad():
        expected = plain(PROMPT).logits
        for one in ways:
            assert torch.equal(one(PROMPT).logits, expected)
        next(ways[0].model.layers[0].parameters()).zero_()
        assert torch.equal(model(PROMPT).logits, expected)


def test_plans_count_what_is_stored(tmp_path: Path) -> None:
    plain = write(tmp_path, "fp8")
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    for dtype in (None, torch.bfloat16):
        model = empty(plain)
        room = 4.5 * 128 * 64  # of the largest weight while it is decoded
        budget = {0: int(size * 1.1 + room), "cpu": "1GB"}  # the weights in 16 bit take 1.7 times as much
        assert budget[0] < 1.7 * size  # type: ignore[operator]
        bigkit.load_checkpoint_and_dispatch(model, tmp_path, "auto", budget, dtype=dtype, stand_in={0: "cpu"})
        assert set(model.hf_device_map.values()) == {0}


def test_a_cast_changes_what_it_works_in_and_not_what_is_stored(tmp_path: Path) -> None:
    plain = write(tmp_path, "fp8")
    model = empty(plain)
    bigkit.load_checkpoint_in_model(model, tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, StoredLinear)
    before = layer._parameters["weight_scale_inv"].clone()
    model.float()
    assert layer._parameters["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(layer._parameters["weight_scale_inv"], before)
    assert layer.works_in == torch.float32 and model(PROMPT).logits.dtype == torch.float32


def test_after_an_error_the_model_is_as_it_was(tmp_path: Path) -> None:
    plain = write(tmp_path, "fp8")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    model = empty(plain)
    with pytest.raises(CheckpointError, match="model.norm.weight"):
        bigkit.load_checkpoint_in_model(model, tmp_path, strict=True)
    assert all(type(module) is not StoredLinear for module in model.modules())
    assert [(name, p.dtype) for name, p in model.named_parameters()] == [(n, p.dtype) for n, p in
                                                                         plain.named_parameters()]  # fmt: skip


def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = empty(write(tmp_path, "fp8"))
    with pytest.raises(bigkit.PlanError):
        bigkit.load_checkpoint_and_dispatch(model, tmp_path, "auto", {0: "1KB", "cpu": "1KB"}, stand_in={0: "cpu"})
    assert all(type(module) is not StoredLinear for module in model.modules())


def test_a_checkpoint_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, opened = empty(write(tmp_path, "fp8")), []
    plainly = Checkpoint.open
    monkeypatch.setattr(Checkpoint, "open", lambda *args: opened.append(args) or plainly(*args))
    bigkit.load_checkpoint_and_dispatch(model, tmp_path, "auto", {0: "1GB", "cpu": "1GB"}, stand_in={0: "cpu"})
    assert len(opened) == 1


def test_a_format_that_is_not_known_is_one_sentence(tmp_path: Path) -> None:
    plain = write(tmp_path, "fp8")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.qweight"] = int32(7, 9)
    tensors |= {f"{name}.qzeros": int32(1, 1), f"{name}.scales": torch.rand(1, 1)}
    del tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} in .*qweight torch.int32 .* no format that bigkit reads"):
        bigkit.load_checkpoint_in_model(empty(plain), tmp_path)
    with pytest.raises(ValueError, match="keep must be"):
        bigkit.load_checkpoint_in_model(empty(plain), tmp_path, keep="fp8")


class Twice(nn.Module):
    """A layer that works in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_layer_in_two_places_is_no_tied_weight(tmp_path: Path) -> None:
    stored = fp8(64, 64)
    save_file({f"first.{own}": tensor for own, tensor in stored.items()}, tmp_path / "model.safetensors")
    with bigkit.init_empty_weights():
        model = Twice()
    model = bigkit.load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"}, dtype=torch.float32)
    weight, x = stored["weight"].float() * stored["weight_scale_inv"], torch.randn(2, 64)
    assert torch.equal(model(x), x @ weight.t() @ weight.t())
