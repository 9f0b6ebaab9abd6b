"""Models over a GPU, RAM and disk: the outputs of the whole model, bit for bit, whatever the order and the slots."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn

import bigkit
from bigkit.checkpoints import ring
from bigkit.offload.handle import Away

GPU = torch.device("cuda:0")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self, blocks=8, width=256):
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.h = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.order = [*range(blocks)]

    def forward(self, tokens):
        x = self.embed(tokens)
        for i in self.order:
            x = self.h[i](x)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def run(model, tokens, times=3):
    with torch.no_grad():
        outputs = [model(tokens) for _ in range(times)]
    assert all(torch.equal(outputs[0], output) for output in outputs)
    return outputs[0]


def slots_of(model):
    return next(h.streamer for m in model.modules() if (h := getattr(m, "_hf_hook", None)) and h.streamer)


MIXED = {"embed": 0, "h.0": 0, "h.1": "cpu", "h.2": "disk", "h.3": "cpu", "h.4": 0, "h.5": "disk", "h.6": "cpu",
         "h.7": "cpu", "head": 0}  # fmt: skip


@pytest.mark.parametrize("slots", [1, 2, 3, 12])
@pytest.mark.parametrize("where", ["cpu", "disk", "mixed"])
def test_equal_to_the_whole_model(net, tmp_path, where, slots):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    expected = run(copy.deepcopy(net).to(GPU), tokens)
    device_map = MIXED if where == "mixed" else {"": where}
    model = bigkit.dispatch_model(net, device_map, 0, offload_dir=tmp_path, slots=slots, ram_cache=0)
    assert torch.equal(run(model, tokens, 5), expected)
    assert run(model, tokens.cpu()).device.type == "cpu"  # the output goes where the input came from
    streamer = slots_of(model)
    assert not streamer.maps and not any(slot.lent for slot in streamer.slots)
    assert all(part.slab.pinned for unit in streamer.units for part in unit.parts() if part.slab is not None)
    assert model.head.weight is model.embed.weight


def test_of_a_block_some_weights_were_on_the_gpu(net):
    """They are pinned before they are copied, and what was copied to the same RAM before stays."""
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    expected = run(copy.deepcopy(net).to(GPU), tokens)
    for block in net.h:
        block.down.to(GPU)
    assert torch.equal(run(bigkit.cpu_offload(net, 0), tokens), expected)


def test_pinning_refused(net, monkeypatch):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    expected = run(copy.deepcopy(net).to(GPU), tokens)
    monkeypatch.setattr(ring, "_may_pin", lambda nbytes: False)
    model = bigkit.cpu_offload(net, 0)
    assert not any(part.slab.pinned for unit in slots_of(model).units for part in unit.parts())
    assert torch.equal(run(model, tokens, 5), expected)


def test_disk_blocks_are_kept_in_ram(net, tmp_path):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    expected = run(copy.deepcopy(net).to(GPU), tokens)
    model = bigkit.disk_offload(net, tmp_path, 0, ram_cache="1GB")
    streamer = slots_of(model)
    assert streamer.cached == {*range(len(streamer.units))}
    assert torch.equal(run(model, tokens, 4), expected)
    assert not streamer.cached and all(unit.rests_in() == "cpu" for unit in streamer.units)


def test_resident_memory_is_spread(net):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    expected = run(copy.deepcopy(net).to(GPU), tokens)
    size = sum(p.nbytes for p in net.h[0].parameters())
    model = bigkit.dispatch_model(net, {"embed": 0, "h": "cpu", "head": 0}, 0, resident_memory=4 * size)
    assert [i for i in range(8) if model.hf_device_map[f"h.{i}"] == 0] == [0, 2, 4, 6]
    assert torch.equal(run(model, tokens), expected)


@pytest.mark.parametrize("seed", range(20))
def test_any_order(net, seed):
    """Skips, repeats, and orders that change from call to call, on a busy GPU."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 1000, (2, 32), device=GPU)
    whole = copy.deepcopy(net).to(GPU)
    model = bigkit.cpu_offload(net, 0, slots=1 + seed % 4)
    busy = torch.randn(2048, 2048, device=GPU)
    for _ in range(10):
        count = int(torch.randint(0, 16, (1,), generator=generator))
        order = torch.randint(0, 8, (count,), generator=generator).tolist()
        model.order = whole.order = order
        busy = busy @ busy * 1e-3
        with torch.no_grad():
            assert torch.equal(model(tokens), whole(tokens)), order


def test_no_copy_overtakes_slow_work():
    """Blocks that work much longer than their copy takes, and the other way round."""
    torch.manual_seed(0)
    for width, rows in ((64, 200_000), (3000, 2)):
        layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(12)]).requires_grad_(False)
        x = torch.randn(rows, width, device=GPU)
        expected = run(copy.deepcopy(layers).to(GPU), x)
        assert torch.equal(run(bigkit.cpu_offload(layers, 0), x, 10), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_gives_everything_back(net, error):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    expected = run(copy.deepcopy(net).to(GPU), tokens)
    model = bigkit.cpu_offload(net, 0)

    def fail(*_):
        raise error

    handle = model.h[3].down.register_forward_hook(fail)
    for _ in range(3):
        with pytest.raises(error), torch.no_grad():
            model(tokens)
        assert not any(slot.lent for slot in slots_of(model).slots)
        assert all(isinstance(p, Away) for p in model.parameters())
    handle.remove()
    assert torch.equal(run(model, tokens), expected)


def test_edits_are_kept(net):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    whole, model = copy.deepcopy(net).to(GPU), bigkit.cpu_offload(net, 0)
    run(model, tokens)
    for m in (whole, model):
        with torch.no_grad():
            m.h[2].up.weight.mul_(1.5)
            m.h[3].up.weight.data[0] = 1
            m.h[4].norm.weight = nn.Parameter(torch.full((256,), 2.0, device=GPU), requires_grad=False)
    assert torch.equal(run(model, tokens), run(whole, tokens))

    def grow(module, *_):
        module.weight.add_(0.25)

    handles = [m.h[5].down.register_forward_hook(grow) for m in (whole, model)]
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(tokens), whole(tokens))
    for handle in handles:
        handle.remove()
    assert torch.equal(run(model, tokens), run(whole, tokens))


def test_two_threads_and_streams(net):
    inputs = [torch.randint(0, 1000, (4, 64), device=GPU) for _ in range(4)]
    whole = copy.deepcopy(net).to(GPU)
    expected = [run(whole, x) for x in inputs]
    model = bigkit.cpu_offload(net, 0)
    wrong = []

    def work(x, y):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(20):
                out = model(x)
                stream.synchronize()
                if not torch.equal(out, y):
                    wrong.append(1)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_given_back(tmp_path):
    def cycle():
        model = bigkit.dispatch_model(Net(blocks=4).requires_grad_(False), {"embed": 0, "h": "cpu", "head": 0}, 0)
        run(model, torch.randint(0, 1000, (1, 8), device=GPU), 1)

    cycle()
    gc.collect()
    torch.cuda.synchronize()
    before, pinned = torch.cuda.memory_allocated(), ring.pinned_bytes()
    for _ in range(5):
        cycle()
    gc.collect()
    assert (torch.cuda.memory_allocated(), ring.pinned_bytes()) == (before, pinned)


def test_nothing_is_allocated_in_the_steady_state(net):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    model = bigkit.cpu_offload(net, 0)
    run(model, tokens)
    streamer = slots_of(model)
    slots = [slot.base.data_ptr() for slot in streamer.slots]
    peak = []
    for _ in range(5):
        torch.cuda.reset_peak_memory_stats()
        run(model, tokens, 1)
        peak.append(torch.cuda.max_memory_allocated())
    assert len({*peak}) == 1 and [slot.base.data_ptr() for slot in streamer.slots] == slots


def test_weights_used_outside_their_forward(net):
    model, whole = bigkit.cpu_offload(copy.deepcopy(net), 0), net.to(GPU)
    x = torch.randn(3, 256, device=GPU)
    with torch.no_grad():
        assert torch.equal(nn.functional.linear(x, model.h[1].up.weight), nn.functional.linear(x, whole.h[1].up.weight))
    assert model.h[1].up.weight.device == GPU and torch.equal(model.h[1].up.weight.cpu(), whole.h[1].up.weight.cpu())


def test_a_checkpoint_runs_from_its_files(net, tmp_path):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    bigkit.save_model(net, tmp_path / "checkpoint", "1MB")
    expected = run(net.to(GPU), tokens)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with bigkit.init_empty_weights():
        empty = Net()
    model = bigkit.load_checkpoint_and_dispatch(empty, tmp_path / "checkpoint", MIXED, ram_cache=0)
    assert torch.equal(run(model, tokens), expected)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    bigkit.save_model(model, tmp_path / "again", "1MB")
    fresh = Net()
    assert bigkit.load_checkpoint_in_model(fresh, tmp_path / "again", strict=True).clean
    assert torch.equal(run(fresh.to(GPU), tokens), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "t5"])
def test_generation_of_transformers_models(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    elif kind == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**small, num_local_experts=16))
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=500, n_embd=128, n_layer=4, n_head=4))
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=500, d_model=128, d_ff=256, num_layers=3, num_heads=4, decoder_start_token_id=0
            )
        )
    model = model.eval().requires_grad_(False)
    tokens = torch.randint(5, 500, (2, 12), device=GPU)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    whole = copy.deepcopy(model).to(GPU)
    expected = whole.generate(tokens, **options)
    spread = bigkit.cpu_offload(model, 0)
    assert torch.equal(spread.generate(tokens, **options), expected)


def test_several_gpus(net, gpus):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    expected = run(copy.deepcopy(net).to(GPU), tokens)
    device_map = {"embed": 0, "head": gpus - 1} | {f"h.{i}": i % gpus if i % 3 < 2 else "cpu" for i in range(8)}
    model = bigkit.dispatch_model(net, device_map)
    assert torch.equal(run(model, tokens), expected)
