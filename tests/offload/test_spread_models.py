"""Models as people have them, spread in mixed ways: equal to the whole model bit for bit."""

import copy
import itertools

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from bigkit import init_empty_weights
from bigkit.checkpoints.save import save_model
from bigkit.offload.load_and_dispatch import load_checkpoint_and_dispatch
from bigkit.offload.one_place import cpu_offload, disk_offload
from tests.spread import STAND_IN, check_at_rest, same, spread, spread_ways

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 1]])
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
        "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **options))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, n_positions=64)
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2,
                              decoder_start_token_id=0)
    )  # fmt: skip


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
    )


def cycle(model, *places):
    """A map that puts the model's blocks, and what lies beside them, on these places in turn."""
    names, turns = {}, itertools.cycle(places)

    def walk(name, module):
        whole = type(module).__name__ in (model._no_split_modules or ()) or not [*module.children()]
        if whole:
            names[name] = next(turns)
            return
        for own in [*module._parameters, *module._buffers]:
            names[f"{name}.{own}" if name else own] = next(turns)
        for own, child in module.named_children():
            walk(f"{name}.{own}" if name else own, child)

    walk("", model)
    return names


PLACES = [("cpu",), ("disk",), (0, "cpu"), ("disk", "cpu", 1), (1, 0, "disk", "cpu")]


@pytest.mark.parametrize("make", [llama, gpt2, t5, mixtral])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_generate(make, places, tmp_path):
    torch.manual_seed(0)
    whole = make().eval()
    whole.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = whole.generate(IDS, **settings)
    parts = spread(copy.deepcopy(whole), cycle(whole, *places), main_device=0, offload_dir=tmp_path)
    for cache in (True, False):
        result = parts.generate(IDS, **settings, use_cache=cache)
        assert torch.equal(result.sequences, expected.sequences)
        assert not cache or same(result.logits, expected.logits)
    check_at_rest(parts)
    beams = {**settings, "num_beams": 2}
    assert torch.equal(parts.generate(IDS, **beams).sequences, whole.generate(IDS, **beams).sequences)


@pytest.mark.parametrize("tie", [True, False])
def test_from_a_checkpoint_to_text(tie, tmp_path):
    torch.manual_seed(0)
    whole = llama(tie_word_embeddings=tie).eval()
    save_model(whole, tmp_path, "4KB")
    for strategy in ("auto", {"model": "disk", "lm_head": "disk"}, {"model": "disk", "lm_head": 0}):
        with init_empty_weights():
            parts = llama(tie_word_embeddings=tie).eval()
        parts.tie_weights()
        parts = load_checkpoint_and_dispatch(parts, tmp_path, strategy, {0: "14KB", "cpu": "8KB"}, stand_in=STAND_IN)
        text = parts.generate(IDS, max_new_tokens=5, do_sample=False)
        assert torch.equal(text, whole.generate(IDS, max_new_tokens=5, do_sample=False))
        check_at_rest(parts)


@pytest.mark.parametrize(("embed", "head"), [*itertools.product([0, 1, "cpu", "disk"], repeat=2)])
@pytest.mark.parametrize("main", [0, "cpu"])
def test_tied_weights_across_every_pair_of_places(embed, head, main, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.mid = nn.Linear(8, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.mid(self.embed(ids)))

    whole, ids = Tied(), IDS % 10
    parts = spread(copy.deepcopy(whole), {"embed": embed, "mid": "cpu", "head": head}, main_device=main,
                   offload_dir=tmp_path, force_hooks=True)  # fmt: skip
    assert same(parts(ids), whole(ids)) and same(parts(ids), whole(ids))
    works = [main if place in ("cpu", "disk") else place for place in (embed, head)]
    for edit in (
        lambda model: model.embed.weight.data.mul_(2),
        lambda model: model.head.weight.data.__setitem__(slice(2, 3), 0.5),
        lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(10, 8))),  # no longer tied
        lambda model: model.embed.weight.data.add_(1),
    ):
        edit(whole), edit(parts)
        if works[0] == works[1]:  # else each device has a copy
            assert same(parts(ids), whole(ids)) and same(parts(ids), whole(ids))
    parts(ids)
    check_at_rest(parts)


def test_a_module_in_two_places(tmp_path):
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(8, 8)
            self.a, self.b = nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.Linear(8, 8), shared)
            self.c = shared

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    whole = Shares()
    for way, parts in spread_ways(whole, tmp_path):
        assert same(parts(X), whole(X)) and same(parts(X), whole(X)), way
        check_at_rest(parts)
    for places in itertools.product([0, "cpu", "disk"], repeat=3):
        parts = spread(copy.deepcopy(whole), dict(zip("abc", places)), offload_dir=tmp_path, main_device=0)
        assert same(parts(X), whole(X)) and same(parts(X), whole(X)), places


class Odd(nn.Module):
    """Everything that a module may hold."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 8))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)
        self.flags = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.short = nn.Parameter(torch.randn(5).bfloat16())
        self.transposed = nn.Parameter(torch.randn(8, 4).t())
        self.cut = nn.Parameter(torch.randn(8, 16)[:, ::2])
        self.expanded = nn.Parameter(torch.randn(1, 8).expand(2, 8))
        self.list = nn.ParameterList([torch.randn(8), torch.randn(8)])
        self.dict = nn.ParameterDict({"x": torch.randn(8), "y": torch.randn(8)})
        self.conv = nn.Conv2d(1, 2, 3, padding=1).to(memory_format=torch.channels_last)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)

    def forward(self, x):
        x = x * self.scalar + self.cls_token + self.nothing.sum() + self.steps[2] * self.flags[0]
        x = x + self.short.float().mean() + F.linear(x, self.transposed).sum() + F.linear(x, self.cut)
        x = x + self.expanded[1]
        x = sum(self.list, x) + self.dict["x"] * self.dict["y"]
        x = self.spectral(self.normed(x)) + self.conv(x[None, None]).sum()
        x = x[None]
        return self.layer(self.attention(*[self.rnn(x)[0]] * 3)[0])


@pytest.mark.parametrize("train", [True, False])
def test_everything_that_a_module_may_hold(train, tmp_path):
    torch.manual_seed(0)
    whole = Odd().train(train)
    names = [*dict.fromkeys(name.partition(".")[0] for name in whole.state_dict())]
    mixed = dict(zip(names, itertools.cycle(["disk", 0, "cpu"])))
    ways = {
        "RAM": lambda m: cpu_offload(m, 0, stand_in=STAND_IN, offload_buffers=True),
        "disk": lambda m: disk_offload(m, tmp_path, 0, stand_in=STAND_IN),
        "mapped": lambda m: disk_offload(m, tmp_path, offload_buffers=True),
        "mixed": lambda m: spread(m, mixed, offload_dir=tmp_path),
    }
    for way, send in ways.items():
        one = copy.deepcopy(whole)
        parts = send(Odd().train(train))
        parts.load_state_dict(one.state_dict())
        with torch.no_grad():
            assert same(parts(X), one(X)) and same(parts(X), one(X)), way
            parts.rnn.weight_ih_l0.mul_(2), one.rnn.weight_ih_l0.mul_(2)
            parts.layer.linear1.weight.mul_(2), one.layer.linear1.weight.mul_(2)
            assert same(parts(X), one(X)) and same(parts(X), one(X)), way
        assert same(dict(parts.state_dict()), dict(one.state_dict()))
        assert parts.conv.weight.is_contiguous(memory_format=torch.channels_last)


class Experts(nn.Module):
    """A layer of experts of which the data choose: some are skipped, in another order each time."""

    def __init__(self, count=6):
        super().__init__()
        self.gate = nn.Linear(8, count)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(count))
        self.fused = nn.Parameter(torch.randn(count, 8, 8))

    def forward(self, x):
        chosen = self.gate(x).topk(2).indices
        result = x
        for i in chosen.flatten().unique().flip(0).tolist():
            result = result + self.experts[i](x) * (chosen == i).any(-1, keepdim=True) + x @ self.fused[i]
        return result


def test_experts_chosen_by_data(tmp_path):
    torch.manual_seed(0)
    whole = nn.Sequential(Experts(), nn.Linear(8, 8), Experts())
    for way, parts in spread_ways(whole, tmp_path):
        for k in range(4):
            x = torch.randn(2, 8)
            assert same(parts(x), whole(x)), (way, k)
        check_at_rest(parts)
    experts = {f"0.experts.{i}": ["disk", "cpu", 0][i % 3] for i in range(6)}
    parts = spread(whole, {"0.gate": 0, "0.fused": "cpu", **experts, "1": "cpu", "2": "disk"}, offload_dir=tmp_path)
    check_at_rest(parts)


def test_early_exit_and_other_methods_than_forward(tmp_path):
    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

        def encode(self, x):
            return self.h[0](x)

        def forward(self, x, depth):
            for layer in self.h[:depth]:
                x = layer(x)
            return x

    whole = Exits()
    for way, parts in spread_ways(whole, tmp_path):
        for depth in (5, 2, 0, 3, 5, 1, 5):
            assert same(parts(X, depth), whole(X, depth)), (way, depth)
        assert same(parts.encode(X), whole.encode(X)), way
        check_at_rest(parts)


@pytest.mark.filterwarnings("ignore")  # peft and transformers disagree on names
def test_lora_added_after_dispatch(tmp_path):
    import peft

    torch.manual_seed(0)
    whole = llama().eval()
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    state = None
    for way, parts in spread_ways(whole, tmp_path):
        with torch.no_grad():
            parts(IDS)
            adapted = peft.get_peft_model(parts, settings)
            expected = peft.get_peft_model(copy.deepcopy(whole), settings)
            state = state or {n: torch.randn_like(v) for n, v in expected.state_dict().items() if "lora" in n}
            expected.load_state_dict(state, strict=False), adapted.load_state_dict(state, strict=False)
            for _ in range(2):
                assert same(adapted(IDS).logits, expected(IDS).logits), way
            assert same(adapted.generate(IDS, max_new_tokens=3), expected.generate(IDS, max_new_tokens=3))
            adapted.merge_adapter(), expected.merge_adapter()
            for _ in range(2):
                assert same(adapted(IDS).logits, expected(IDS).logits), way
            adapted.unmerge_adapter(), expected.unmerge_adapter()
            assert same(adapted(IDS).logits, expected(IDS).logits), way
        with pytest.raises(RuntimeError, match="offloaded weights are for inference"):
            adapted(IDS).logits.sum().backward()
        check_at_rest(adapted)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_timm(name, tmp_path):
    import timm

    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 3} if name.startswith("vit") else {}
    whole = timm.create_model(name, num_classes=10, **size).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = whole(images)
    places = dict(zip([n for n, _ in whole.named_children()], itertools.cycle(["disk", "cpu", 0])))
    own = [*whole._parameters]  # cls_token, pos_embed
    empty = [n for n, m in whole.named_children() if not list(m.state_dict())]
    for map_ in (
        {"": "cpu"},
        {**places, **dict(zip(own, itertools.cycle(["disk", "cpu"]))), **dict.fromkeys(empty, 0)},
        {**places, **dict.fromkeys(own, 0)},
    ):
        for buffers in (False, True):
            parts = spread(copy.deepcopy(whole), map_, main_device=0, offload_dir=tmp_path, offload_buffers=buffers)
            assert same(parts(images), expected) and same(parts(images), expected)
            whole_again, parts = copy.deepcopy(whole).train(), parts.train()
            assert same(parts(images), whole_again(images))
            assert same(parts.eval()(images), whole_again.eval()(images))  # running statistics moved alike
