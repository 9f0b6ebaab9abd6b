"""peft's adapters on spread models: put on, run, merged, taken off, saved, loaded. The oracle is the whole model."""

import copy

import pytest
import torch
import transformers

from bigkit import dispatch_model, remove_hook_from_module
from bigkit.offload import experts
from tests.clients.places import AWAY, WAYS, check, language_model, quantized, spread_ways

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(7)[None]


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})


CONFIGS = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "IA3": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "a module to save": lambda: lora(modules_to_save=["lm_head"]),
    "two to save": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "embeddings": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "tokens": lambda: lora(trainable_token_indices=[1, 2, 3]),
    "parameters": lambda: peft.LoraConfig(
        r=2, init_lora_weights=False, target_modules=[], target_parameters=["q_proj.weight"]
    ),
}


def put_on(model, config):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def merged(model):
    model.merge_adapter()
    first = logits(model)
    model.unmerge_adapter()
    return first, logits(model)


def switched(model):
    with model.disable_adapter():
        bare = logits(model)
    torch.manual_seed(2)
    model.add_adapter("other", lora())
    model.set_adapter("other")
    other = logits(model)
    model.delete_adapter("default")
    return bare, other, logits(model)


def trainable(model):
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return names, model.get_nb_trainable_parameters(), [*peft.get_peft_model_state_dict(model).values()]


STEPS = {
    "run": logits,
    "merge and unmerge": merged,
    "merge for good": lambda model: logits(model.merge_and_unload()),
    "take off": lambda model: logits(model.unload()),
    "trainable": trainable,
}


OFTEN = ("LoRA", "DoRA", "IA3", "a module to save")
SOMETIMES = [pytest.param(CONFIGS[name], marks=() if name in OFTEN else pytest.mark.soak, id=name) for name in CONFIGS]


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("config", SOMETIMES)
def test_adapters(config, step, tmp_path):
    check(language_model(), lambda model: step(put_on(model, config())), tmp_path)


def test_adapters_are_switched(tmp_path):
    check(language_model(), lambda model: switched(put_on(model, lora())), tmp_path)


@pytest.mark.parametrize(
    ("name", "tie"), [("LoRA", True), ("DoRA", False), ("IA3", False), ("a module to save", False)]
)
def test_saved_and_loaded_adapters(name, tie, tmp_path):
    """peft dispatches a model again, with Accelerate, where its map names "cpu" or "disk"."""
    base = language_model(tie)
    whole = put_on(copy.deepcopy(base), CONFIGS[name]())
    whole.save_pretrained(tmp_path / "whole")
    expected = logits(whole)
    for way, parts in spread_ways(base, tmp_path):
        put_on(parts, CONFIGS[name]()).save_pretrained(tmp_path / way)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / way).eval()
        torch.testing.assert_close(logits(again), expected, msg=way)
    for way, parts in spread_ways(base, tmp_path / "loaded"):
        model = peft.PeftModel.from_pretrained(parts, tmp_path / "whole", offload_folder=tmp_path / "theirs").eval()
        torch.testing.assert_close(logits(model), expected, msg=way)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, msg=way)


@pytest.mark.parametrize("way", [name for name in WAYS if name != "GPUs"])  # that would be a real one to Transformers
def test_the_loader_of_transformers(way, tmp_path):
    put_on(language_model(), lora()).save_pretrained(tmp_path / "whole")
    whole, parts = language_model(), WAYS[way](language_model(), tmp_path)
    for model in (whole, parts):
        model.load_adapter(tmp_path / "whole")
    assert set(parts.hf_device_map) == {""} and "load_adapter" not in vars(remove_hook_from_module(parts))
    torch.testing.assert_close(logits(parts), logits(whole))


def test_a_prefix_goes_to_the_device_that_works(tmp_path):
    """peft asks the map for it, which of a model that rests elsewhere names no GPU otherwise."""
    from peft.utils.integrations import get_layer_device_map

    for way in ("RAM", "disk"):
        parts = AWAY[way](language_model(), tmp_path)
        assert set(get_layer_device_map(parts).values()) == {0}, way
        assert len(set(parts.hf_device_map.items())) == 1 and 0 not in dict(parts.hf_device_map.items()).values()


def test_what_is_saved_learns_on_a_base_that_rests_elsewhere(tmp_path):
    """A copy of the head stays where it works, and comes after all that was only lent."""
    for way, parts in spread_ways(language_model(), tmp_path, AWAY):
        model = put_on(parts, lora(target_modules=["o_proj"], modules_to_save=["lm_head"]))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("modules_to_save" in name)
        head = model.base_model.model.lm_head.modules_to_save["default"].weight
        before, optimizer = model(IDS, labels=IDS).loss, torch.optim.SGD([head], 0.1)
        before.backward()
        optimizer.step()
        assert type(head) is torch.nn.Parameter and model(IDS, labels=IDS).loss < before, way


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", OFTEN)
def test_adapters_on_fewer_bits(name, kind, where, tmp_path):
    pytest.importorskip("bitsandbytes")
    expected, given = (logits(put_on(quantized(kind, place, tmp_path), CONFIGS[name]())) for place in (None, where))
    torch.testing.assert_close(given, expected)
    model = put_on(quantized(kind, where, tmp_path), lora())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(kind, None, tmp_path), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("way", ["RAM", "disk", "expert cache", "pieces"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_adapters_on_experts_that_are_brought_one_by_one(implementation, way, tmp_path, monkeypatch):
    """They read all of a stack, so each expert must lie at its number."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "vocab_size": 32}
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval()
    base.set_experts_implementation(implementation)
    for parameter in base.parameters():
        parameter.data.normal_(std=0.3)
    if way == "pieces":
        monkeypatch.setattr(experts, "WHOLE", 0)
        monkeypatch.setattr(experts, "SOME", 1)
    place, size = (
        "disk" if way == "disk" else "cpu",
        sum(p.nbytes for p in base.model.layers[0].mlp.experts.parameters()),
    )
    parts = dispatch_model(
        copy.deepcopy(base), {"": 0, **{f"model.layers.{i}.mlp.experts": place for i in range(2)}}, stand_in={0: "cpu"},
        offload_dir=tmp_path, expert_cache=2 * size if way == "expert cache" else 0,
    )  # fmt: skip
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ids = torch.tensor([[5, 1, 7, 30, 2]])
    results = []
    for model in (base, parts):
        model = put_on(model, lora(**targets))
        with torch.no_grad():
            tokens = [model(ids[:, i : i + 1]).logits for i in (0, 1, 2, 0)]
        results.append([*tokens, *merged(model), logits(model.unload())])
    torch.testing.assert_close(results[1], results[0])
