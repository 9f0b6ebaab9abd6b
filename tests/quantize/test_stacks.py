"""Experts in few bits: each as bitsandbytes quantizes a matrix, chosen ones decoded alone, on every way to a model."""

import copy
import pickle
import warnings

import pytest
import torch

from bigkit import (
    BnbQuantizationConfig,
    estimate_memory,
    init_empty_weights,
    load_and_quantize_model,
    load_checkpoint_and_dispatch,
    save_model,
    zoo,
)
from bigkit.checkpoints.format import Checkpoint
from bigkit.checkpoints.one_by_one import stream_rows
from bigkit.meta.skeleton import spec_from_module
from bigkit.model.precision import quantized_stacks, tensor_bytes
from bigkit.quantize.bnb import quantized
from tests.offload.test_experts import COUNT, FAMILIES, apart, expert_names, generated, made, mixtral, qwen3_moe

bnb = pytest.importorskip("bitsandbytes")
NAMES = ("gate_up_proj", "down_proj")
ALL = ["nf4", "fp4-double", "int8"]


def config(quantization, **more):
    kind, _, double = quantization.partition("-")
    own = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    settings = {"torch_dtype": torch.float32, "bnb_4bit_compute_dtype": torch.float32, **own, **more}
    return BnbQuantizationConfig(bnb_4bit_use_double_quant=bool(double), **settings)


def rounded(model, quantization):
    """A copy whose experts are quantized and dequantized by bitsandbytes, one after another."""
    model = copy.deepcopy(model)
    for name in expert_names(model):
        for own in NAMES:
            stack = getattr(model.get_submodule(name), own).data
            for expert in range(COUNT):
                weight = quantized(stack[expert], quantization)
                if quantization == "int8":
                    stack[expert] = bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB)
                else:
                    state = copy.copy(weight.quant_state)
                    state.shape = torch.Size([stack[0].numel()])  # some CPUs begin a block anew in each row
                    stack[expert] = bnb.functional.dequantize_4bit(weight.data, state).view(stack[0].shape)
    return model


def linear_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("quantization", ALL)
@pytest.mark.parametrize("make", FAMILIES)
def test_each_expert_is_quantized_as_bitsandbytes_does(make, quantization):
    model = made(make)
    expected = rounded(model, quantization)
    found = load_and_quantize_model(copy.deepcopy(model), config(quantization), device_map={"": "cpu"})
    spec = spec_from_module(model)
    precision = spec.precision(torch.float32, quantization)
    for name in expert_names(model):
        for own in NAMES:
            stack, whole = getattr(found.get_submodule(name), own), getattr(expected.get_submodule(name), own)
            assert torch.equal(stack.all(), whole)
            assert torch.equal(stack[torch.tensor([3, 1])], whole[[3, 1]]) and torch.equal(stack[2], whole[2])
        actual = sum(tensor.nbytes for tensor in found.get_submodule(name).parameters())
        counted = sum(
            tensor_bytes(full, *spec.tensors[full], precision) for full in spec.tensors if full.startswith(f"{name}.")
        )
        assert actual == counted, "plans count the bytes that there are"


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("make", FAMILIES)
def test_tokens_are_those_of_dequantized_experts(make, implementation):
    model = made(make)
    model.set_experts_implementation(implementation)
    expected = rounded(model, "nf4")
    own = config("nf4", skip_modules=linear_layers(model))
    found = load_and_quantize_model(copy.deepcopy(model), own, device_map={"": "cpu"})
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    assert torch.equal(generated(found), generated(expected))


@pytest.mark.parametrize("stored", ["stacked", "one by one"])
@pytest.mark.parametrize("quantization", ALL)
@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_from_a_checkpoint_saved_and_again(make, quantization, stored, tmp_path):
    """Files of Transformers have the experts one by one; bigkit's have stacks. What is saved loads as it was."""
    model = made(make)
    expected = load_and_quantize_model(copy.deepcopy(model), config(quantization), device_map={"": "cpu"})
    text = generated(expected)
    model.save_pretrained(tmp_path / "first") if stored == "one by one" else save_model(model, tmp_path / "first")
    for folder, place in (("first", "cpu"), ("second", "disk")):
        with init_empty_weights():
            empty = make().eval()
        places = {"": "cpu", **dict.fromkeys(expert_names(empty), place)}
        options = {"offload_folder": tmp_path / "rest", "main_device": "cpu"}
        found = load_and_quantize_model(empty, config(quantization), tmp_path / folder, places, **options)
        assert torch.equal(generated(found), text)
        for name in expert_names(model):
            state, same = found.get_submodule(name).state_dict(), expected.get_submodule(name).state_dict()
            assert state.keys() == same.keys()
            assert all(torch.equal(state[key] + 0, same[key]) for key in same)
        save_model(found, tmp_path / "second")


def test_an_expert_at_a_time_is_in_memory(tmp_path):
    """Of a stack that lies in files expert by expert only one is read at once; of every form, the rows are right."""
    model = made(mixtral)
    model.save_pretrained(tmp_path / "apart")
    save_model(model, tmp_path / "stacked")
    for folder in ("apart", "stacked"):
        with init_empty_weights():
            empty = mixtral()
        source = Checkpoint.open(tmp_path / folder)
        from bigkit.checkpoints.match import match

        match(empty, source)
        for name in expert_names(model):
            for own in NAMES:
                rows = list(stream_rows(source, f"{name}.{own}"))
                assert torch.equal(torch.stack(rows), getattr(model.get_submodule(name), own))
                assert all(row.untyped_storage().nbytes() == row.nbytes for row in rows)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("cache", [0, "16KB"])
@pytest.mark.parametrize("quantization", ALL)
def test_chosen_experts_travel_as_they_are_stored(quantization, cache, place, tmp_path):
    model = made(qwen3_moe)
    model.set_experts_implementation("batched_mm")
    expected = generated(load_and_quantize_model(copy.deepcopy(model), config(quantization), device_map={"": "cpu"}))
    options = {"stand_in": {0: "cpu"}, "expert_cache": cache, "offload_folder": tmp_path}
    found = load_and_quantize_model(copy.deepcopy(model), config(quantization), None, apart(model, place), **options)
    experts = found.model.layers[0].mlp.experts
    assert torch.equal(generated(found), expected)
    streamer, copied = experts._hf_hook.streamer, []
    fill = streamer.lane.fill
    streamer.lane.fill = lambda slot, unit: copied.append(unit.nbytes) or fill(slot, unit)
    with torch.no_grad():
        found(torch.tensor([[5]]))
    size = streamer.units[0].nbytes
    assert bool(cache) == (streamer.hits + streamer.misses > 0)
    assert all(nbytes <= 2 * size // COUNT for nbytes in copied), "two of eight experts are chosen"


@pytest.mark.parametrize("quantization", ALL)
def test_copies_make_no_classes(quantization):
    """Else a process that copies models keeps one class more for each."""
    found = load_and_quantize_model(made(mixtral), config(quantization), device_map={"": "cpu"})
    experts = found.get_submodule(expert_names(found)[0])
    for one in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert type(one) is type(experts)
        assert all(torch.equal(getattr(one, own).all(), getattr(experts, own).all()) for own in NAMES)


def test_casts_leave_codes_and_scales_alone():
    found = load_and_quantize_model(made(qwen3_moe), config("nf4-double"), device_map={"": "cpu"})
    experts = found.model.layers[0].mlp.experts
    before = {name: (parameter.dtype, parameter.clone()) for name, parameter in experts.named_parameters()}
    found.bfloat16()
    assert experts.works_in == torch.bfloat16 and experts.gate_up_proj[0].dtype == torch.bfloat16
    for name, (dtype, value) in before.items():
        assert experts.get_parameter(name).dtype == dtype and torch.equal(experts.get_parameter(name), value)


def test_experts_are_decoded_to_the_dtype_that_is_asked_for(tmp_path):
    """An empty model is built in float32 by default; its experts were decoded to that, in twice the memory."""
    model = made(mixtral)
    only = {"torch_dtype": torch.bfloat16, "skip_modules": linear_layers(model)}
    save_model(model, tmp_path / "whole")
    with init_empty_weights():
        first, second = mixtral(), mixtral()
    first = load_and_quantize_model(first, config("nf4", **only), tmp_path / "whole", device_map={"": "cpu"})
    save_model(first, tmp_path / "nf4")
    second = load_checkpoint_and_dispatch(second, tmp_path / "nf4", {"": "cpu"}, dtype="float16")
    dtypes = [one.get_submodule(expert_names(one)[0]).gate_up_proj[0].dtype for one in (first, second)]
    assert dtypes == [torch.bfloat16, torch.float16] == [one.lm_head.weight.dtype for one in (first, second)]


def test_estimates_and_plans_count_experts():
    """Mixtral in nf4 takes 4.5 bits for each weight of its experts and attention, and 16 for the rest."""
    row = next(row for row in estimate_memory("mixtral-8x7b").inference if row.stored == "nf4")
    experts, attention, embeddings = 32 * 8 * 3 * 4096 * 14336, 32 * 2 * (4096 + 1024) * 4096, 2 * 32000 * 4096
    routers_norms_tables = 32 * (8 + 2) * 4096 * 2 + 4096 * 2 + 32 * 4 * 64 + 64 * 4  # and of rotary positions
    assert row.weights == (experts + attention) * 9 // 16 + embeddings * 2 + routers_norms_tables
    model = zoo.describe("mixtral-8x7b")
    kept = model.precision(None, "nf4", keep=["mlp.experts"])
    assert model.bytes(kept) > 80 * 2**30 and not quantized_stacks(model, kept)


def test_no_warning_where_all_experts_are_quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_and_quantize_model(made(qwen3_moe), config("nf4"), device_map={"": "cpu"})


def test_what_is_set_in_the_models_config_reaches_its_parts():
    """`generate` sets there which code decodes with experts; the user's own config stays as it was."""
    model = made(qwen3_moe)
    own = model.config
    found = load_and_quantize_model(model, config("nf4"), device_map={"": "cpu"})
    assert found.config is not own and not hasattr(own, "quantization_config")
    found.set_experts_implementation("batched_mm")
    parts = [module for module in found.modules() if hasattr(module, "config")]
    assert len(parts) > 3 and all(part.config is found.config for part in parts)
    assert own._experts_implementation != "batched_mm"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_that_would_leave_experts_out_are_refused(quantization):
    """For peft, all linear layers of this mixture are its experts, too."""
    peft = pytest.importorskip("peft")
    model = load_and_quantize_model(made(qwen3_moe), config(quantization), device_map={"": "cpu"})
    with pytest.raises(ValueError, match=r"'all-linear'\) name 'model.layers.0.mlp.experts.\w+_proj'.*skip_modules"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    with torch.no_grad():
        assert adapted(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
