"""Fake GPUs: what is noted of a run, against PyTorch's own counters and real runs on the CPU."""

import math
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

from bigkit import dry_run, init_empty_weights, zoo
from bigkit.dryrun.fake_gpu import Target, fake_gpus
from bigkit.dryrun.workload import Workload, fill, passes
from bigkit.machine.allocator import replay
from bigkit.zoo import build, catalog
from tests import forked

NO_WORKSPACE = Target(workspace=0)


def tiny(name, dtype="float32", **sizes):
    """A shipped model's architecture, small enough for a CPU."""
    return build.build({**catalog.config(catalog.find(name)), **sizes}, dtype=dtype).eval()


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
TINY = {
    "llama-3.1-8b": LLAMA,
    "gemma-2-9b": {**LLAMA, "head_dim": 16, "sliding_window": 16},
    "mistral-7b": {**LLAMA, "sliding_window": 16},
    "qwen3-0.6b": {**LLAMA, "head_dim": 16},
    "mixtral-8x7b": {**LLAMA, "num_local_experts": 4},
    "deepseek-v3": {
        **LLAMA,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1},
    "bloom": {"n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 128},
    "opt-1.3b": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "word_embed_proj_dim": 64,
    },
    "t5-large": {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 128},
    "bert-base-cased": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 128,
    },
    "vit-base-patch16-224": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 32,
    },
    "resnet50.a1_in1k": {},
    "pygpt": {},
}


def rehearse(model, load, target=Target(), places=None):
    with fake_gpus(target) as notes:
        notes.kind = "weights"
        fill(model, places or {"": 0})
        notes.kind = "activations"
        notes.trace.mark("filled")
        for phase, _ in passes(model, load, "cuda:0"):
            notes.trace.mark(phase)
    return notes.trace


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_rehearsed(name):
    model = tiny(name, **TINY[name])
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trace = rehearse(model, Workload(2, 24, 2))
    recording = trace.recordings["cuda:0"]
    curves = replay(recording.events)
    filled = dict(recording.marks[:1])["filled"]
    assert size <= curves.allocated[filled - 1] <= size + 512 * filled + 2**20
    assert curves.peak_allocated > curves.allocated[filled - 1]
    assert [name for name, _ in recording.marks[1:]] in (["prefill"], ["prefill", "decode", "decode"])
    assert any(operation.flops for operation in trace.operations)


def test_what_lives_is_what_python_holds():
    with fake_gpus(NO_WORKSPACE) as notes:
        a = torch.zeros(1000, device="cuda:0")
        b = a + 1
        view = b[10:]
        del b
        c = view.to("cuda:1")
        events = notes.trace.recordings["cuda:0"].events
        assert events == [4000, 4000], "a view keeps its storage"
        del view
        assert events == [4000, 4000, -2]
        assert notes.trace.recordings["cuda:1"].events == [990 * 4]
        a.add_(1)
        assert len(events) == 3, "in place"
    assert c.device == torch.device("cuda:1") and a.shape == (1000,)


def test_memory_in_the_place_of_ram_that_is_gone_counts():
    with fake_gpus() as log:
        for _ in range(5):
            with log.silent():
                ram = torch.empty(1000, dtype=torch.uint8, device="cuda")
            log.overlook(ram)
            del ram
        kept = [torch.empty(1000, dtype=torch.uint8, device="cuda") for _ in range(10)]
    assert log.trace.recordings["cuda:0"].events == [1000] * len(kept)


def test_parts_on_several_devices():
    model = build.build(catalog.config(catalog.find("pygpt")), dtype="float32").eval()
    places = {"": 0, "transformer.ln_f": 1, "lm_head": 1}
    with fake_gpus() as notes:
        fill(model, places)
        with pytest.raises(RuntimeError, match="cuda:0|device"):  # as a real run without hooks would fail
            list(passes(model, Workload(1, 8), "cuda:0"))
    assert set(notes.trace.recordings) == {"cuda:0", "cuda:1"}


@contextmanager
def a_machine_with_a_gpu():
    """As far as PyTorch can tell; touching that GPU is an error."""
    touched = mock.Mock(side_effect=AssertionError("the real GPU was touched"))
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(torch.cuda, "is_available", lambda: True))
        enter(mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")))
        enter(mock.patch.object(torch.cuda, "_lazy_init", touched))
        yield
    assert not touched.called


@pytest.mark.parametrize("machine", [nullcontext, a_machine_with_a_gpu])
def test_constants_are_born_on_their_own_gpu(machine):
    with machine(), fake_gpus():
        assert torch.tensor([1.0], device="cuda:3").device == torch.device("cuda:3")
        assert torch.ones(2, device="cuda").device == torch.device("cuda:0")


@pytest.mark.parametrize(
    "name, quantization, rests",
    [("llama-3.1-8b", None, 0), ("mixtral-8x7b", None, 0), ("llama-3.1-8b", None, "cpu"), ("gpt2", "nf4-double", 0)],
)
def test_a_real_gpu_is_left_alone_and_changes_nothing(name, quantization, rests):
    def run():
        build = (lambda: tiny(name, **TINY[name])) if quantization is None else name
        return dry_run(build, {"": rests}, 2, 24, 2, "H200", dtype="bfloat16", quantization=quantization)

    if quantization:
        pytest.importorskip("bitsandbytes")
    without = run()
    with a_machine_with_a_gpu():
        beside = run()
    assert beside.recordings == without.recordings
    assert list(beside.operations) == list(without.operations) and beside.seconds == without.seconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_that_converts_its_modules(dtype):
    """As routers of switch_transformers do. Outside, a plain fake module is refused by `Module.to`."""
    with fake_gpus() as log:
        layer = nn.Linear(512, 512, bias=False, device="cuda:0")
        layer.to(torch.device("cuda:0"), dtype)
        out = layer(torch.ones(1, 512, device="cuda:0", dtype=dtype))
    assert layer.weight.dtype == out.dtype == dtype
    converted = [] if dtype == torch.float32 else [2**19, -1]  # made, and the weight before it is freed
    assert log.trace.recordings["cuda:0"].events[: 1 + len(converted)] == [2**20, *converted]


def test_nothing_is_left_behind():
    """Neither in PyTorch nor in `torch.cuda`; and nothing real was allocated."""
    before = torch.cuda.get_device_capability
    with pytest.raises(ZeroDivisionError):
        with fake_gpus():
            1 / 0  # noqa: B018
    assert torch.cuda.get_device_capability is before
    assert torch.ones(2).sum() == 2 and type(torch.ones(1)) is torch.Tensor


def test_a_build_without_cuda_is_lent_a_guard():
    """The guard that a CPU build lacks is taken away in a process of its own, and the run must work all the same."""
    code = """
import torch
from bigkit.dryrun._torch import device_guards
from bigkit.dryrun.fake_gpu import fake_gpus
try:
    registry = device_guards()
except RuntimeError as error:
    print("skip", error); raise SystemExit
torch.version.cuda = registry[1] = None
with fake_gpus() as notes:
    a = torch.ones(4, device="cuda:2")
    a.copy_(a); a[:2] = 1; a.uniform_()
    b = a.to("cuda:1") + 1
print(sorted(notes.trace.recordings), registry[1])
"""
    done = forked.run(code)
    assert not done.returncode, done.stderr
    out = done.stdout
    if out.startswith("skip"):
        pytest.skip(out)
    assert out.strip() == "['cuda:1', 'cuda:2'] None"


def test_sizes_are_bounded_by_arithmetic():
    """A Llama block in bfloat16 with fused attention works in 3 * intermediate + 4 * hidden elements for each token."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = build.build(
        {**catalog.config(catalog.find("llama-2-7b")), **sizes, "num_hidden_layers": 2, "vocab_size": 512},
        dtype="bfloat16",
    ).eval()
    load = Workload(2, 1024, 0)
    recording = rehearse(model, load, NO_WORKSPACE).recordings["cuda:0"]
    curves = replay(recording.events)
    weights = curves.allocated[dict(recording.marks)["filled"] - 1]
    cache = 2 * 2 * 2 * 1024 * 1024 * 2
    formula = 2 * 1024 * (3 * 3072 + 4 * 1024) * 2
    assert math.isclose(curves.peak_allocated - weights - cache, formula, rel_tol=0.1)


def test_zoo_names_are_known():
    assert set(TINY) <= set(zoo.names())


def test_steps_of_the_host_are_modules_operations_and_launches():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x.view(4, 2)) + 1

    with fake_gpus() as notes:
        x = torch.ones(8, device="cuda:0")
        model = Twice()
        model(x)
        torch.neg(x)
    first, second = notes.trace.operations[-2:]
    assert (first.name, first.issued) == ("add", 5)  # two modules, a view, the sum, its launch
    assert (second.name, second.issued) == ("neg", 2)
    assert not nn.modules.module._global_forward_pre_hooks


class Caster(nn.Module):
    """Casts its own layer in every forward, as NLLB's mixture and Switch Transformers do with their routers."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.pretrained_cfg = {"input_size": (3, 64, 64)}

    def forward(self, x):
        self.linear = self.linear.to(torch.float32)
        return self.linear(x)


def test_a_module_that_is_cast_to_what_it_is_stays():
    own = nn.Module._apply
    with init_empty_weights():
        model = Caster()
    run = dry_run(model, None, 1, 1, 0, "H200")
    assert run.timeline().at_peak()["weights"] == 4 * (64 * 64 + 64) and nn.Module._apply is own
