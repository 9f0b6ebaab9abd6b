"""Several links at once, loading over all, and MLPs on the CPU: the outputs of the whole model, and all given back."""

import copy

import pytest
import torch

import bigkit
from bigkit.checkpoints.ring import Slab
from bigkit.measure.links import measure_together
from tests.gpu.test_dispatch_gpu import GPU, Net, run


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(20).requires_grad_(False)


def llama(blocks=8):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=blocks, num_attention_heads=4, vocab_size=512
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_all_gpus_at_once_equal_the_whole_model(net, tmp_path, where, slots, gpus):
    tokens = torch.randint(0, 1000, (4, 64), device=GPU)
    expected = run(copy.deepcopy(net).to(GPU), tokens)
    model = bigkit.dispatch_model(net, {"": where}, range(gpus), offload_dir=tmp_path, slots=slots, ram_cache=0)
    assert torch.equal(run(model, tokens, 6), expected)
    streamers = {part._hf_hook.streamer for part in model.h}
    assert {streamer.device.index for streamer in streamers} == {*range(gpus)}
    assert all(part.slab is None or part.slab.pinned for s in streamers for unit in s.units for part in unit.parts())


def test_a_generation_with_residents_on_all(gpus):
    model = llama(4 * gpus)
    sizes = bigkit.compute_module_sizes(model)
    tokens = torch.randint(0, 512, (2, 12), device=GPU)
    expected = copy.deepcopy(model).to(GPU).generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    budget = 4 * sizes["model.layers.0"] + sizes["lm_head"]
    plan = bigkit.plan(model, {**dict.fromkeys(range(gpus), budget), "cpu": "4GiB"}, context=20, batch=2)
    assert {layer.works for layer in plan.layers} == {None, *range(gpus)}
    for device_map in (plan, dict(plan.device_map)):
        parts = bigkit.dispatch_model(copy.deepcopy(model), device_map)
        for _ in range(2):
            assert torch.equal(parts.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False), expected)


def test_all_are_loaded_at_once(tmp_path, gpus):
    model = llama(20)
    bigkit.save_model(model, tmp_path, "1MB")
    with bigkit.init_empty_weights():
        empty = llama(20)
    places = {"model.embed_tokens": 0, "model.norm": gpus - 1, "model.rotary_emb": 0, "lm_head": gpus - 1}
    places |= {f"model.layers.{i}": i % gpus for i in range(20)}
    with torch.cuda.stream(torch.cuda.Stream(1)):
        bigkit.load_checkpoint_in_model(empty, tmp_path, places)
    for name, tensor in empty.named_parameters():
        assert tensor.device.index == bigkit.devices.placement(places)(name)
        assert torch.equal(tensor.cpu(), model.get_parameter(name)), name


def test_mlps_on_the_cpu():
    mlps_on_the_cpu(llama(), 0)


def test_mlps_on_the_cpu_beside_several_links(gpus):
    mlps_on_the_cpu(llama(max(8, 2 * gpus)), range(gpus))


def mlps_on_the_cpu(model, main):
    prompt, one = (torch.randint(0, 512, (1, count), device=GPU) for count in (40, 1))
    whole = copy.deepcopy(model).to(GPU)
    expected = [whole(tokens).logits for tokens in (prompt, one)]
    parts = bigkit.cpu_offload(model, main, on_cpu="10MB", cpu_threads=2)
    threads = torch.get_num_threads()
    for _ in range(3):
        assert torch.equal(parts(prompt).logits, expected[0])  # streamed
        got = parts(one).logits
        assert torch.allclose(got, expected[1], atol=0.05), "the CPU rounds otherwise, but not so far"
    assert torch.get_num_threads() == threads
    broken = model.model.layers[3].mlp.act_fn
    broken.forward = lambda x: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        parts(one)
    del broken.forward
    assert torch.get_num_threads() == threads
    assert torch.equal(parts(prompt).logits, expected[0]) and torch.equal(parts(one).logits, got)


def test_ram_that_is_let_go_while_another_gpu_writes_to_it(gpus):
    last = torch.device("cuda", gpus - 1)
    ones = torch.ones(2**20, dtype=torch.uint8, device=last)
    torch.cuda.synchronize(last)
    slab = Slab(2**20, pin=True)
    slab.pin()
    view = slab.bytes[:]
    with torch.cuda.stream(torch.cuda.Stream(last)):
        torch.cuda._sleep(10**8)  # cycles: some 50 ms
        view.copy_(ones, non_blocking=True)
    del slab
    assert view.all()


def test_what_is_measured():
    links, reads, call = measure_together(2**26, 2**24)
    assert 1e-6 < call < 5e-3
    assert len(links) == torch.cuda.device_count() and all(rate > 1e9 for rate in links)
    assert reads.keys() == {"bfloat16", "float32"}
    assert all(own > 1e8 and link > 0 for rows in reads.values() for _, own, link in rows)
