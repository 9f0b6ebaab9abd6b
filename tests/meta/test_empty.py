"""Building without memory, held against the same models built for real, and reading a module's skeleton."""
# ruff: noqa: C408  (tables of configs read better as keyword arguments)

from __future__ import annotations

import copy
import gc
import io
import json
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bigkit
from bigkit.meta.empty import init_empty_weights, init_on_device
from bigkit.meta.skeleton import spec_from_module, tied_groups


class Allocations(TorchDispatchMode):
    """Remembers the biggest real tensor that any call made; enter it before the block under test."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def described(tensors):
    return {name: (tuple(t.shape), t.dtype, t.requires_grad, type(t)) for name, t in tensors}


def plain_tensors(model):
    """Tensors that modules keep as ordinary attributes, also in lists and dicts."""

    def inside(name, value):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from inside(f"{name}[{i}]", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from inside(f"{name}[{key}]", item)

    for prefix, module in model.named_modules():
        for own, value in vars(module).items():
            if own not in ("_parameters", "_buffers", "_modules"):
                yield from inside(f"{prefix}.{own}", value)


def assert_same_as_real(build):
    """The model built without memory is the model built for real, but for the data of its parameters."""
    real = build()
    with init_empty_weights():
        empty = build()
    assert described(empty.named_parameters(remove_duplicate=False)) == described(
        real.named_parameters(remove_duplicate=False)
    )
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert tied_groups(empty) == tied_groups(real)
    assert list(empty.state_dict()) == list(real.state_dict())
    plain = [(name, value) for name, value in plain_tensors(empty) if not isinstance(value, nn.Parameter)]
    expected = [(name, value) for name, value in plain_tensors(real) if not isinstance(value, nn.Parameter)]
    buffers = dict(plain) | dict(empty.named_buffers(remove_duplicate=False))
    oracle = dict(expected) | dict(real.named_buffers(remove_duplicate=False))
    assert buffers.keys() == oracle.keys()
    for name, buffer in buffers.items():
        other = oracle[name]
        assert (buffer.device, buffer.dtype, buffer.stride()) == (other.device, other.dtype, other.stride()), name
        assert torch.equal(buffer, other), name
    return empty


# ---------------------------------------------------------------------------------------------------------------------
# Against real builds

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=96)
GROUPED = dict(SMALL, num_key_value_heads=2, head_dim=8)
TRANSFORMERS = {
    "bert": SMALL,
    "roberta": SMALL,
    "distilbert": dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=96, sinusoidal_pos_embds=True),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=96),
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=96, rotary_dim=4),
    "gpt_neox": SMALL,
    "gpt_neo": dict(hidden_size=32, num_layers=2, num_heads=4, vocab_size=96,
                    attention_types=[[["global", "local"], 1]]),
    "opt": dict(SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4, vocab_size=96),
    "falcon": SMALL,
    "llama": dict(
        GROUPED,
        rope_parameters=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5,
            original_max_position_embeddings=256,
        ),
    ),
    "mistral": GROUPED,
    "mixtral": dict(GROUPED, num_local_experts=4),
    "qwen3": GROUPED,
    "qwen3_moe": dict(GROUPED, num_experts=4, moe_intermediate_size=16),
    "gemma2": GROUPED,
    "gemma3_text": dict(GROUPED, sliding_window=16),
    "phi3": dict(GROUPED, pad_token_id=0),
    "deepseek_v3": dict(
        SMALL, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "gpt_oss": dict(GROUPED, num_local_experts=4),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=4),
    "t5": dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96),
    "whisper": dict(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "wav2vec2": dict(SMALL, conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
    "vit": dict(SMALL, image_size=32, patch_size=8),
    "swin": dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
}  # fmt: skip
CAUSAL = ("gpt2", "llama", "gemma2", "opt", "bloom", "mamba", "mixtral", "deepseek_v3")


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_models_are_what_they_would_be(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **TRANSFORMERS[kind])
    auto = transformers.AutoModelForCausalLM if kind in CAUSAL else transformers.AutoModel
    assert_same_as_real(lambda: auto.from_config(copy.deepcopy(config)))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientnet_b0",
     "levit_128s", "eva02_tiny_patch14_224", "beit_base_patch16_224", "mobilenetv3_small_050", "coat_tiny"],
)  # fmt: skip
def test_timm_models_are_what_they_would_be(name):
    timm = pytest.importorskip("timm")
    options = {"depth": 2} if "patch16" in name else {"depths": (1, 1, 2, 1)} if "swin" in name else {}  # large ones
    assert_same_as_real(lambda: timm.create_model(name, **options))


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is allocated


@pytest.fixture(scope="module")
def fresh_process():
    """A process of its own: torch's own imports must not count, nor what other tests allocated or imported."""
    program = """
import json, resource, sys, time, torch
from torch import nn
from bigkit.meta.empty import init_empty_weights
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
with init_empty_weights():
    model = nn.Sequential(*[nn.Linear(10_000, 10_000) for _ in range(100)])
seconds = time.perf_counter() - start
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
parameters = sum(p.numel() for p in model.parameters())
with init_empty_weights():
    model = nn.Sequential(
        nn.Embedding(10, 8, padding_idx=0), nn.EmbeddingBag(10, 8), nn.Linear(8, 8), nn.Conv2d(3, 8, 3), nn.LSTM(8, 8),
        nn.LayerNorm(8), nn.BatchNorm2d(8), nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2),
    )
    for initialise in (nn.init.xavier_normal_, nn.init.kaiming_normal_, nn.init.trunc_normal_, nn.init.ones_):
        initialise(model[0].weight)
    nn.Embedding(10, 8).register_buffer("noise", nn.Embedding(10, 8).weight.detach().clone())
print(json.dumps({
    "parameters": parameters, "seconds": seconds, "MiB": grown / (2**20 if sys.platform == "darwin" else 2**10),
    "empty": all(parameter.is_meta for parameter in model.parameters()), "compiler": "torch._dynamo" in sys.modules,
}))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_ten_billion_parameters_take_no_memory(fresh_process):
    assert fresh_process["parameters"] == 100 * (10_000 * 10_000 + 10_000)
    assert fresh_process["MiB"] < 50 and fresh_process["seconds"] < 10


@pytest.mark.skipif(torch.__version__ < "2.15", reason="older kernels import the compiler whatever we do")
def test_usual_layers_do_not_import_the_compiler(fresh_process):
    """Most meta kernels written in Python import torch._dynamo when they first run: over a second and 80 MB."""
    assert fresh_process["empty"] and not fresh_process["compiler"]


def test_an_initialiser_returns_its_tensor_and_its_values_are_drawn_when_read():
    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.empty(1000)
            assert weight.normal_(5.0) is weight and weight.is_meta
            self.weight = nn.Parameter(weight)
            self.register_buffer("halves", torch.ones(1000).mul_(3).view(2, 500))
            self.halves[0].bernoulli_(0.5)
            later = torch.zeros(1000)
            self.before = later + 1
            later.exponential_(0.1)
            self.later = later

    with init_empty_weights():
        model = Drawn()
    assert model.weight.is_meta and (model.before == 1).all()
    assert set(model.halves[0].tolist()) == {0.0, 1.0} and (model.halves[1] == 3).all()
    assert 5 < model.later.mean() < 20 and model.later.min() >= 0


def test_no_parameter_is_allocated_for_a_moment():
    class Everything(nn.Module):
        def __init__(self, n=1000):
            super().__init__()
            self.a = nn.Parameter(torch.ones(n, n) * 0.5)
            self.b = nn.Parameter(torch.randn(n, n).clamp(-1, 1))
            self.c = nn.Parameter(torch.linspace(0, 1, n * n).view(n, n).to("cpu"))
            self.d = nn.Parameter(torch.empty(n, n).normal_(generator=torch.Generator().manual_seed(1)))
            self.e = nn.Parameter(torch.zeros_like(self.a) + torch.arange(n))
            self.f = nn.Parameter(torch.tensor([1.0, 2.0]).new_ones(n, n))
            self.g = nn.Parameter(torch.tensor([[2.0]]) * torch.ones(n, 1).expand(n, n))
            self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(n, n))
            self.lstm = nn.LSTM(n, n)
            self.attention = nn.MultiheadAttention(n, 4)
            nn.init.orthogonal_(self.a)
            nn.init.trunc_normal_(self.b)
            nn.init.sparse_(self.c, 0.5)
            self.to("cpu").to(torch.bfloat16).float()
            self.load_state_dict(self.state_dict())
            self.copy = copy.deepcopy(self.linear)

    with Allocations() as seen, init_empty_weights():
        model = Everything()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert seen.largest < 2**16


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
def test_a_whole_giant_with_fused_experts(kind):
    """The default configs are the full models: deepseek-v3's fused experts are tensors of 30 GB."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind)
    with Allocations() as seen, init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert max(parameter.nbytes for parameter in model.parameters()) > 2**30
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert seen.largest < 2**16


def test_nothing_is_kept_when_the_block_ends():
    parts = []

    class Throwaway(nn.Module):
        def __init__(self):
            super().__init__()
            scratch = torch.randn(10, 10)
            self.weight = nn.Parameter(scratch * 2)
            self.register_buffer("mask", torch.ones(10, 10).tril())
            parts.extend(map(weakref.ref, (scratch, self.weight, self.mask)))

    with init_empty_weights():
        model = Throwaway()
    assert parts[0]() is None
    del model
    gc.collect()
    assert [part() for part in parts] == [None] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Values: whatever a model does in __init__, what it keeps is what it would keep


def set_data(tensor, data):
    kept = tensor + 1  # reads the old values, perhaps after they are gone
    tensor.data = data
    tensor.add_(1)
    return tensor + kept.sum()


OPERATIONS = {
    "fill": lambda a, b: a.fill_(3.0),
    "uniform": lambda a, b: a.uniform_(2.0, 2.0),
    "zero some": lambda a, b: a.view(-1)[::2].zero_(),
    "add": lambda a, b: a + b,
    "add_": lambda a, b: a.add_(b),
    "copy_": lambda a, b: a.copy_(b * 2),
    "row": lambda a, b: a[1],
    "write row": lambda a, b: a.view(-1)[:3].mul_(-1),
    "transpose": lambda a, b: a.reshape(3, 3).t(),
    "flip in place": lambda a, b: (b.clone() + a).expand(3, 3).clone().copy_(torch.arange(3.0)).t_().mul_(b),
    "ones": lambda a, b: torch.ones(3, 3),
    "arange": lambda a, b: torch.arange(9.0).view(3, 3),
    "like": lambda a, b: torch.full_like(a, 7.0),
    "real": lambda a, b: torch.tensor([[1.0, 2.0, 3.0]] * 3),
    "item": lambda a, b: a * b.sum().item(),
    "list": lambda a, b: torch.tensor(b.tolist()),
    "numpy": lambda a, b: a * float(b.numpy().mean()),
    "select": lambda a, b: a[a > 0].sum() + b,
    "branch": lambda a, b: a if (a > b).any() else b,
    "data": lambda a, b: b.data.mul_(2),
    "set data": lambda a, b: set_data(a.clone().mul_(2), b + a),
    "set real data": lambda a, b: set_data(a.clone(), torch.tensor([[4.0, 5.0, 6.0]] * 3)),
    "detach": lambda a, b: a.detach(),
    "deepcopy": lambda a, b: copy.deepcopy(a),
    "where": lambda a, b: torch.where(a > 1, a, b),
    "matmul": lambda a, b: (a.expand(3, 3) @ b.expand(3, 3)).clamp(-1e6, 1e6),
    "cumsum out": lambda a, b: torch.cumsum(b.expand(3, 3), 0, out=torch.empty(3, 3)),
    "clamp": lambda a, b: a.clamp_(-1e6, 1e6),
    "parameter": lambda a, b: nn.Parameter(a.clone()).data,
    "attribute": None,
    "buffer": None,
    "weight": None,
}  # fmt: skip


class Random(nn.Module):
    """Runs a program over a growing list of tensors, keeping some of them as it goes."""

    def __init__(self, program):
        super().__init__()
        values = [torch.zeros(3, 3), torch.eye(3)]
        for number, (operation, i, j) in enumerate(program):
            a, b = values[i % len(values)], values[j % len(values)]
            if operation == "attribute":
                setattr(self, f"attribute{number}", a)
            elif operation == "buffer":
                self.register_buffer(f"buffer{number}", a)
            elif operation == "weight":
                self.register_parameter(f"weight{number}", nn.Parameter(a.clone()))
            else:
                values.append(OPERATIONS[operation](a, b))
        self.kept = values[::2]
        self.last = {"value": values[-1]}


def random_programs_keep_the_values_they_would_keep(program):
    try:
        with torch.no_grad():
            expected = Random(program)
    except (RuntimeError, IndexError):
        return  # the program itself is wrong (shapes do not fit)
    with init_empty_weights(), torch.no_grad():
        built = Random(program)
    kept = [*plain_tensors(built), *built.named_buffers()]
    oracles = [*plain_tensors(expected), *expected.named_buffers()]
    for (name, value), (_, oracle) in zip(kept, oracles, strict=True):
        assert not value.is_meta, name
        assert torch.equal(value.nan_to_num(), oracle.nan_to_num()), name
    assert described(built.named_parameters()) == described(expected.named_parameters())
    assert all(parameter.is_meta for parameter in built.parameters())


CALL = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9), st.integers(0, 9))
PROGRAM = given(program=st.lists(CALL, max_size=14))
test_random_programs = settings(max_examples=80)(PROGRAM(random_programs_keep_the_values_they_would_keep))
test_random_programs_for_long = pytest.mark.soak(
    settings(max_examples=3000)(PROGRAM(random_programs_keep_the_values_they_would_keep))
)


def test_values_are_read_wherever_a_model_reads_them():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            rates = torch.linspace(0, 0.3, 4)
            self.rates = [rate.item() for rate in rates]
            self.listed = torch.arange(4).tolist()
            self.arrays = (torch.arange(3).numpy() * 2).tolist(), torch.ones(3).cpu().numpy().sum()
            self.decided = "yes" if (torch.zeros(3) == 0).all() else "no"
            self.nonzero = torch.tensor([0, 3, 0, 5])[torch.arange(4) > 0].nonzero().flatten().tolist()
            self.count = int(torch.full((2, 2), 7).sum())
            self.weight = nn.Parameter(torch.full((3,), 2.0))
            self.scale = float(self.weight.detach().sum()) + self.weight.tolist()[0]

    with init_empty_weights():
        model = Reader()
    assert vars(model)["rates"] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert (model.listed, model.decided, model.nonzero, model.count) == ([0, 1, 2, 3], "yes", [0, 2], 28)
    assert model.arrays == ([0, 2, 4], 3.0)
    assert model.scale == 8.0 and model.weight.is_meta


def test_buffers_of_every_making():
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), 3.0))
            self.register_buffer("filled", torch.empty(3).fill_(5))
            self.register_buffer("random", torch.rand(1000))
            self.register_buffer("average", self.weight.detach().clone(), persistent=False)
            self.register_buffer("beside", torch.zeros(2, device=self.weight.device))
            self.register_buffer("nothing", None)
            late = torch.zeros(2, 2)
            self.register_buffer("late", late)
            late[0] = 4  # through the reference from before
            self.typed = nn.Buffer(torch.arange(3), persistent=False)
            self.filled = self.filled * 2
            self.norm = nn.BatchNorm1d(2)
            self.half()

    with init_empty_weights():
        model = Buffers()
    assert model.filled.tolist() == [10, 10, 10]
    assert 0.4 < model.random.float().mean() < 0.6
    assert model.average.tolist() == [[3, 3], [3, 3]] and model.beside.tolist() == [0, 0]
    assert model.late.tolist() == [[4, 4], [0, 0]] and model.late.dtype == torch.float16
    assert model.typed.tolist() == [0, 1, 2] and model.nothing is None
    assert model.norm.num_batches_tracked.item() == 0 and model.norm.running_var.tolist() == [1, 1]
    assert sorted(model.state_dict()) == sorted(
        ["weight", "filled", "random", "beside", "late", "norm.weight", "norm.bias", "norm.running_mean",
         "norm.running_var", "norm.num_batches_tracked"]
    )  # fmt: skip
    assert all(parameter.is_meta and parameter.dtype == torch.float16 for parameter in model.parameters())


def test_plain_attributes_are_real_and_keep_their_identity():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.arange(3.0)
            self.pair = (torch.ones(2), "x")
            shared = torch.zeros(2)
            self.first, self.second = shared, shared
            self.masks = []
            self.masks.append(torch.ones(2))
            self.table = {"inner": {"mask": torch.ones(2)}}
            self.table["itself"] = self.table
            self.lstm = nn.LSTM(2, 3)

    with init_empty_weights():
        model = Plain()
        assert model.a.tolist() == [0, 1, 2]
    assert model.pair[0].tolist() == [1, 1] and model.masks[0].tolist() == [1, 1]
    assert model.table["inner"]["mask"].tolist() == [1, 1]
    assert model.first is model.second
    assert all(own is flat for own, flat in zip(model.lstm.parameters(), model.lstm._flat_weights, strict=True))
    assert all(weight.is_meta for weight in model.lstm._flat_weights)


def test_values_take_the_default_dtype_of_their_time():
    model = nn.Module()
    with init_empty_weights():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model.late = [torch.arange(3) / 2, torch.ones(2)]
        finally:
            torch.set_default_dtype(torch.float32)
    assert [tensor.dtype for tensor in model.late] == [torch.bfloat16] * 2
    assert model.late[0].tolist() == [0, 0.5, 1] and torch.get_default_dtype() == torch.float32


PROMOTED = {
    "zeros": lambda: torch.zeros(3),
    "rand": lambda: torch.rand(0),
    "linspace": lambda: torch.linspace(0, 1, 3),
    "full": lambda: torch.full((2,), 1 / 3),
    "quotient": lambda: torch.arange(1, 4) / 3,
    "product": lambda: (torch.arange(4) > 1) * (1 / 3),
    "sine": lambda: torch.arange(3).sin(),
    "complex": lambda: torch.arange(3) * 1j,
    "where": lambda: torch.where(torch.arange(3) > 1, 1 / 3, 2 / 3),
    "where of tensors": lambda: torch.where(torch.arange(3) > 1, torch.ones(3) / 3, torch.zeros(())),
    "chosen": lambda: torch.linspace(0, 1, 4)[torch.arange(2)],
    "filled": lambda: torch.linspace(0, 1, 4).masked_fill_(torch.arange(4) > 1, 1 / 3),
    "integers": lambda: torch.arange(3).cumsum(0),
    "mean": lambda: torch.arange(3).double().mean(),
}


@pytest.mark.parametrize("before, later", [("bfloat16", "float32"), ("float32", "float64"), ("float64", "float32")])
def test_values_are_those_of_their_default_dtype_whenever_they_are_computed(before, later):
    makers = {name: make for name, make in PROMOTED.items() if name != "complex" or before != "bfloat16"}
    torch.set_default_dtype(getattr(torch, before))
    try:
        expected = {name: make() for name, make in makers.items()}
        model = nn.Module()
        with init_empty_weights():
            model.late = {name: make() for name, make in makers.items()}  # a dict may grow: computed when it ends
            torch.set_default_dtype(getattr(torch, later))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected.items():
        assert model.late[name].dtype == tensor.dtype and torch.equal(model.late[name], tensor), name


def test_another_thread_keeps_its_default_dtype_while_values_are_computed():
    seen = []

    def look(x):  # runs when it is computed for real
        thread = threading.Thread(target=lambda: seen.append(torch.empty(1).dtype))
        thread.start()
        thread.join()
        return x.clone()

    library = torch.library.Library("bigkit_test", "DEF")
    library.define("look(Tensor x) -> Tensor")
    library.impl("look", look, "CPU")
    library.impl("look", torch.empty_like, "Meta")
    model = nn.Module()
    with init_empty_weights():
        torch.set_default_dtype(torch.float64)
        try:
            model.late = [torch.ops.bigkit_test.look(torch.arange(3) / 2)]
        finally:
            torch.set_default_dtype(torch.float32)
    assert seen == [torch.float32] and model.late[0].dtype == torch.float64


def test_loading_weights_inside_init():
    stored = io.BytesIO()
    torch.save({"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3), "1": torch.arange(3.0)}, stored)

    class Loads(nn.Module):
        def __init__(self):
            super().__init__()
            stored.seek(0)
            loaded = torch.load(stored)
            self.register_buffer("kept", loaded["1"])
            self.weight = nn.Parameter(loaded["0.weight"])
            self.linear = nn.Linear(3, 3)
            self.linear.load_state_dict({"weight": loaded["0.weight"], "bias": loaded["0.bias"]})

    with pytest.warns(UserWarning, match="to a meta parameter"), init_empty_weights():
        model = Loads()
    assert model.kept.tolist() == [0, 1, 2]
    assert model.weight.is_meta and model.linear.weight.is_meta


# ---------------------------------------------------------------------------------------------------------------------
# Parameters: identity, class, ties


class Marked(nn.Parameter):
    """A parameter class with a constructor of its own and attributes."""

    def __new__(cls, data, requires_grad=True, *, mark):
        self = super().__new__(cls, data, requires_grad)
        self.mark = mark
        return self


@pytest.mark.parametrize("data", [lambda: torch.zeros(2, 3), lambda: torch.tensor([[1.0, 2.0]])])
def test_custom_parameters_survive(data):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = Marked(data(), requires_grad=False, mark="hello")

    with init_empty_weights():
        model = Custom()
    assert type(model.weight) is Marked and model.weight.mark == "hello"
    assert model.weight.is_meta and not model.weight.requires_grad and model.weight.shape == data().shape


def test_ties_made_in_init_survive():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.wte.weight
            real = nn.Parameter(torch.tensor([1.0, 2.0]))
            self.a, self.b = real, real
            self.view = nn.Parameter(self.wte.weight.data)
            self.twice = self.again = nn.LayerNorm(4)

    with init_empty_weights():
        model = Tied()
    assert model.head.weight is model.wte.weight and model.a is model.b
    groups = [
        ["a", "b"],
        ["view", "wte.weight", "head.weight"],
        ["twice.weight", "again.weight"],
        ["twice.bias", "again.bias"],
    ]
    assert tied_groups(model) == tied_groups(Tied()) == groups


def test_lazy_modules_stay_lazy():
    with init_empty_weights():
        model = nn.Sequential(nn.LazyLinear(3))
    assert model[0].weight.device.type == "meta"
    with pytest.raises(ValueError, match="'0.weight' of a lazy LazyLinear has no shape yet"):
        spec_from_module(model)
    assert model(torch.ones(2, 5, device="meta")).shape == (2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The block itself


def untouched():
    model = nn.Linear(2, 2)
    hooks = torch.nn.modules.module
    return (
        not model.weight.is_meta
        and torch.empty(4).device.type == "cpu"
        and nn.Module.__setattr__ is SETATTR
        and not hooks._global_parameter_registration_hooks
        and not hooks._global_buffer_registration_hooks
        and torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    )


SETATTR = nn.Module.__setattr__


def test_everything_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), init_empty_weights():
        nn.Linear(2, 2)
        1 / 0  # noqa: B018
    assert untouched()
    with pytest.raises(RuntimeError, match="broadcast"), init_empty_weights():
        torch.ones(3) + torch.ones(4)
    assert untouched()


def test_blocks_nest_and_the_innermost_counts():
    with init_empty_weights():
        shared = torch.ones(2)
        with init_on_device("cpu"):
            real = nn.BatchNorm1d(2)
            assert real.weight.tolist() == [1, 1]
            with init_empty_weights(include_buffers=True):
                inner = nn.BatchNorm1d(2)
            assert inner.running_mean.is_meta
        outer = nn.BatchNorm1d(2)
        outer.register_buffer("shared", shared)
    assert outer.weight.is_meta and outer.running_var.tolist() == [1, 1] and outer.shared.tolist() == [1, 1]
    assert untouched()

    @init_empty_weights()
    def build():
        return nn.Linear(2, 2)

    assert build().weight.is_meta and build().weight.is_meta and untouched()


def test_other_threads_are_left_alone():
    entered, built, seen = threading.Event(), threading.Event(), {}

    def elsewhere():
        entered.wait(10)
        seen["plain"] = nn.BatchNorm1d(3)
        with init_empty_weights():
            seen["empty"] = nn.BatchNorm1d(3)
        built.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with init_empty_weights():
        first = nn.Linear(3, 3)
        entered.set()
        assert built.wait(10)
        second = nn.BatchNorm1d(3)
    thread.join()
    assert seen["plain"].weight.tolist() == [1, 1, 1]
    assert seen["empty"].weight.is_meta and seen["empty"].running_var.tolist() == [1, 1, 1]
    assert first.weight.is_meta and second.weight.is_meta and second.running_var.tolist() == [1, 1, 1]
    assert untouched()


def test_a_patch_that_others_put_around_ours_stays():
    calls = []
    with init_empty_weights():
        ours = nn.Module.__setattr__

        def theirs(module, name, value):
            calls.append(name)
            ours(module, name, value)

        nn.Module.__setattr__ = theirs
    try:
        model = nn.Linear(2, 2)
        assert nn.Module.__setattr__ is theirs and "weight" in calls and not model.weight.is_meta
    finally:
        nn.Module.__setattr__ = SETATTR
    assert untouched()


def test_include_buffers_puts_buffers_on_meta():
    class Buffers(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(3)
            self.register_buffer("big", torch.ones(1000, 1000))
            self.register_buffer("given", torch.tensor([1.0, 2.0]))
            self.rate = torch.linspace(0, 1, 2)[1].item()

    with Allocations() as seen, init_empty_weights(include_buffers=True):
        model = Buffers()
    assert all(tensor.is_meta for tensor in model.state_dict().values()) and model.rate == 1
    assert seen.largest < 1000


def test_a_real_device_gets_parameters_and_buffers_only_if_asked():
    device = torch.device("cuda:0") if torch.cuda.is_available() else torch.device("cpu")
    with init_on_device(device):
        model = nn.BatchNorm1d(3)
    assert model.weight.device == device and model.running_mean.device.type == "cpu"
    with init_on_device(device, include_buffers=True):
        model = nn.BatchNorm1d(3)
        model.bias = model.weight
    assert model.running_mean.device == device and model.bias is model.weight
    assert untouched()


class _Holder:
    """An ordinary object that holds a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


SURVIVORS = {
    "cache": lambda kept: kept.append(torch.arange(4.0)),
    "view": lambda kept: kept.append(torch.arange(8.0).view(2, 4)[0]),
    "view and its base": lambda kept: kept.extend([base := torch.arange(8.0), base[:4]]),
    "computed": lambda kept: kept.append(torch.arange(4.0) * 2 + 1),
    "written to": lambda kept: kept.append(torch.empty(4).fill_(3)),
    "parts": lambda kept: kept.extend(torch.arange(8.0).chunk(2)),
    "object": lambda kept: kept.append(_Holder(torch.ones(4))),
    "closure": lambda kept: kept.append(lambda table=torch.linspace(0, 1, 4): table),
}


@pytest.mark.parametrize("name", SURVIVORS)
@pytest.mark.parametrize("as_buffer", [False, True])
def test_tensors_that_outlive_the_block_are_real(name, as_buffer):
    def tensors(kept):
        return [item.tensor if isinstance(item, _Holder) else item() if callable(item) else item for item in kept]

    wanted, kept = [], []
    SURVIVORS[name](wanted)
    with init_empty_weights():
        SURVIVORS[name](kept)
        model = nn.Module()
        for i in range(len(kept) if as_buffer else 0):
            model.register_buffer(f"b{i}", tensors(kept)[i])
        model.linear = nn.Linear(4, 4)
    for real, expected in zip(tensors(kept), tensors(wanted), strict=True):
        assert torch.equal(real, expected)
    for buffer, tensor in zip(model.buffers(), tensors(kept)):
        assert buffer.data_ptr() == tensor.data_ptr()
    assert model.linear.weight.is_meta


def test_what_was_asked_for_on_meta_or_is_a_parameter_stays_there():
    with init_empty_weights():
        asked = torch.empty(2**40, device="meta")
        loose = nn.Parameter(torch.empty(2**40))
        with_buffers = nn.Module()
    with init_empty_weights(include_buffers=True):
        table = torch.empty(2**40)
        with_buffers.register_buffer("table", table)
    assert asked.is_meta and loose.is_meta and table.is_meta and with_buffers.table.is_meta


def test_what_a_forward_makes_of_weights_stays_on_meta_with_them():
    """Also what planning runs, which asks a twin of the model what its cache holds."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=77)
    kept = []
    with init_empty_weights():
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            logits = model(torch.arange(5)[None]).logits
            kept += [torch.zeros_like(model.lm_head.weight), torch.arange(3) / 2]
        plan = bigkit.plan(model, {"cpu": "1GB"})
    assert logits.is_meta and logits.shape == (1, 5, 77)
    assert [tensor.is_meta for tensor in kept] == [False, False] and kept[1].tolist() == [0, 0.5, 1]
    assert plan == bigkit.plan(model, {"cpu": "1GB"}) and plan.layers
    assert not model.model.rotary_emb.inv_freq.is_meta
