"""What an operation costs: FLOP, bytes, elements taken one by one, and what its kernel asks for meanwhile."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bigkit.dryrun.fake_gpu import Target, fake_gpus
from bigkit.dryrun.workload import Workload, fill, passes
from tests.dryrun.test_fake_gpu import TINY, rehearse, tiny

NO_WORKSPACE = Target(workspace=0)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2", "opt-1.3b", "bert-base-cased"])
def test_products_are_counted_as_pytorch_counts_them(name):
    """FLOP of the same run on the CPU, attention left out: its kernels differ."""
    load = Workload(2, 24, 0, all_logits=True)
    sizes = {**TINY[name], **({"num_key_value_heads": 4} if name == "llama-3.1-8b" else {})}
    trace = rehearse(tiny(name, **sizes), load)
    counter = FlopCounterMode(display=False)
    model = fill(tiny(name, **sizes), {"": "cpu"})
    with counter:
        list(passes(model, load, "cpu"))
    products = ("mm", "addmm", "bmm", "baddbmm")
    mine = sum(operation.flops for operation in trace.operations if operation.name in products)
    real = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in products)
    assert mine == real > 0


def test_convolutions_of_16_bits_are_laid_out_anew():
    with fake_gpus(NO_WORKSPACE) as notes:
        image, weight = (
            torch.empty(*s, dtype=torch.float16, device="cuda:0") for s in ((8, 64, 56, 56), (64, 64, 3, 3))
        )
        F.conv2d(image, weight, padding=1)
        F.conv2d(image, weight[:, :, :1, :1].contiguous())
    sizes = [event for event in notes.trace.recordings["cuda:0"].events if event > 0]
    assert sizes == [2 * 8 * 64 * 56**2, 2 * 64 * 64 * 9, 2 * 8 * 64 * 56**2, 6496272, 2 * 64 * 64, 2 * 8 * 64 * 56**2]


def requests_of(work):
    """What is asked for, and given back, after the tensors that the work begins with."""
    with fake_gpus(NO_WORKSPACE) as notes:
        run = work(lambda *shape: torch.empty(*shape, dtype=torch.float16, device="cuda:0"))
        events = notes.trace.recordings["cuda:0"].events
        begin = len(events)
        kept = run()
        assert kept is not None
        return events[begin:]


def test_images_with_the_channels_last_are_taken_as_they_lie():
    def work(new):
        image, weight = new(8, 64, 56, 56).to(memory_format=torch.channels_last), new(128, 64, 2, 2)
        return lambda: F.conv2d(image, weight, stride=2)

    assert requests_of(work) == [2 * 8 * 128 * 28**2]


def test_a_convolution_of_few_inputs_is_done_as_it_lies():
    def work(new):
        image, weight = new(8, 3, 224, 224), new(128, 3, 4, 4)
        return lambda: F.conv2d(image, weight, stride=4)

    assert requests_of(work) == [2 * 8 * 128 * 56**2]


def test_a_layer_norm_copies_what_does_not_lie_in_one_piece_before_it_asks_for_more():
    def work(new):
        x, weight = new(8, 64, 100).transpose(1, 2), new(64)
        return lambda: F.layer_norm(x, (64,), weight, weight)

    size = 2 * 8 * 100 * 64
    copy, out, mean, deviation, *frees = requests_of(work)
    assert [copy, out, mean, deviation] == [size, size, 8 * 100 * 4, 8 * 100 * 4] and frees[0] == -3


def test_a_few_rows_are_put_into_a_large_tensor_for_what_they_take():
    with fake_gpus(NO_WORKSPACE) as notes:
        table, rows = torch.empty(1000, 64, device="cuda:0"), torch.empty(3, 64, device="cuda:0")
        where = torch.zeros(3, dtype=torch.long, device="cuda:0")
        table[where] = rows
        table.index_copy_(0, where, rows)
    put = {operation.name: operation.bytes for operation in notes.trace.operations}
    assert put["index_put_"] == put["index_copy_"] == 2 * rows.nbytes + where.nbytes


def test_reading_an_expanded_tensor_costs_what_is_there():
    with fake_gpus(NO_WORKSPACE) as notes:
        row = torch.empty(1, 1000, device="cuda:0")
        wide = row.expand(50, 1000) + 0
        table = torch.empty(10**6, 8, device="cuda:0")
        F.embedding(torch.zeros(5, dtype=torch.long, device="cuda:0"), table)
    added, looked_up = (o for o in notes.trace.operations if o.name in ("add", "embedding"))
    assert added.bytes == 4000 + wide.numel() * 4
    assert looked_up.bytes == 2 * 5 * 8 * 4


def last_of(work):
    with fake_gpus(NO_WORKSPACE) as notes:
        work(lambda *shape: torch.empty(*shape, device="cuda:0"))
        return notes.trace.operations[-1]


@pytest.mark.parametrize(
    "work, one_by_one",
    [
        (lambda new: new(8, 16) + new(8, 16), 0),
        (lambda new: new(8, 16) * 2, 0),
        (lambda new: new(8, 16).t() * new(8, 16).t(), 0),  # the same order in all, whatever it is
        (lambda new: new(8, 16) * new(16), 128),
        (lambda new: new(16, 8).t() * new(8, 16), 128),
        (lambda new: new(8, 32)[:, :16].neg(), 128),
        (lambda new: new(8, 16).copy_(new(16, 8).t()), 128),
        (lambda new: torch.cat((new(8, 16), new(8, 16))), 0),
        (lambda new: torch.cat((new(8, 32)[:, :16], new(8, 16)), 1), 2 * 256),
        (lambda new: torch.cat((new(0), new(8, 16))), 2 * 128),  # a cache that was empty
        (lambda new: new(8, 16).to(torch.float16), 0),
        (lambda new: new(8, 16).half().float(), 76),
        (lambda new: new(8, 16).masked_fill_(new(8, 1) > 0, 0), 128),
        (lambda new: new(8, 16).masked_fill(new(8, 1) > 0, 0), 192),
        (lambda new: new(8, 16).masked_fill(new(8, 1) > 0, new(1)[0]), 192),
        (lambda new: new(1, 1).masked_fill(new(1, 1) > 0, 0), 0),
        (lambda new: new(8, 16).topk(2), 12 * 128),
        (lambda new: F.embedding(new(5).long(), new(100, 32)), 5 * 200),
        (lambda new: F.layer_norm(new(8, 16), (16,)), 8 * 400),
        (lambda new: F.layer_norm(new(16, 8).t(), (16,)), 8 * 400 + 128),
        (lambda new: new(8, 16).sum(0), 0),
    ],
)
def test_elements_in_one_order_are_taken_several_at_once(work, one_by_one):
    assert last_of(work).scattered == one_by_one


@pytest.mark.parametrize(
    "work, elements, each",
    [
        (lambda new: new(16, 2048, 2048) + new(2048, 2048, 16).permute(2, 0, 1), 16 * 2048**2, 64),
        (lambda new: new(8, 2048, 2048) + new(2048, 2048, 8).permute(2, 0, 1), 8 * 2048**2, 32),
        (lambda new: new(2, 2048, 2048) + new(2048, 2048, 2).permute(2, 0, 1), 2 * 2048**2, 0.75 * 8),  # of the cache
        (lambda new: new(16, 64, 64) + new(64, 64, 16).permute(2, 0, 1), 16 * 64**2, 0.75 * 32),
        (lambda new: new(4096, 4096) + new(4096, 8192)[:, ::2], 4096**2, 8),  # nobody needs what lies between
        (lambda new: new(8, 32).masked_fill(new(8, 32) > 0, 0), 256, 9),  # a copy, and the mask's bytes
        (lambda new: new(8, 16).t() + new(8, 16).t(), 128, 4),
    ],
)
def test_neighbours_that_lie_apart_are_read_with_what_lies_between(work, elements, each):
    assert last_of(work).bytes == elements * (4 + 4 + each)


def test_a_value_to_fill_with_is_asked_for():
    """PyTorch reads it, so the host waits for the GPU (TensorAdvancedIndexing.cpp: `masked_fill__cuda`)."""
    names = []
    for value in ("cuda:0", "cpu"):
        with fake_gpus(NO_WORKSPACE) as notes:
            x = torch.empty(8, 8, device="cuda:0")
            x.masked_fill(x > 0, torch.zeros((), device=value))
            names.append([operation.name for operation in notes.trace.operations][-2:])
    assert names == [["wait", "masked_fill"], ["gt", "masked_fill"]]


@pytest.mark.skipif(torch.__version__ < "2.12", reason="PyTorch 2.11 multiplies them one by one")
def test_single_tokens_of_a_batch_are_multiplied_as_one_matrix():
    with fake_gpus() as notes:
        heads = torch.empty_strided((8, 4, 1, 8), (32, 8, 8, 1), device="cuda:0")
        F.linear(heads.transpose(1, 2).contiguous().reshape(8, 1, -1), torch.empty(16, 32, device="cuda:0"))
    assert [operation.name for operation in notes.trace.operations] == ["mm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_experts_in_every_dtype(dtype):
    with fake_gpus(NO_WORKSPACE) as notes:
        rows = torch.empty(32, 64, dtype=dtype, device="cuda:0")
        experts = torch.empty(4, 128, 64, dtype=dtype, device="cuda:0").transpose(1, 2)
        ends = torch.empty(4, dtype=torch.int32, device="cuda:0")
        out = torch._grouped_mm(rows, experts, offs=ends)
    assert out.dtype == dtype and out.shape == (32, 128) and out.device.type == "cuda"
    product = notes.trace.operations[-1]
    assert product.name == "_grouped_mm" and product.flops == pytest.approx(2 * 4 * 128 * 64 * 128, rel=1e-3), "tiles"
    assert sum(event > 0 for event in notes.trace.recordings["cuda:0"].events) == 4, "no casts are noted"


@pytest.mark.parametrize("width, each", [(8, 1), (8 * 10**5, 32)])
def test_a_large_matrix_that_a_batch_shares_is_read_by_each_product(width, each):
    """As the head's weights are, for the logits of the last tokens of several prompts."""
    rows, weight = (32, 5, 64), (32, 64, width)

    def work(new):
        return new(*rows)[:, -1:].bmm(new(1, *weight[1:]).expand(weight))

    assert last_of(work).bytes == 4 * (32 * 64 + each * 64 * width + 32 * width)


@pytest.mark.parametrize("rows", [1, 9, 64])
def test_rows_meet_as_many_experts_as_chance_gives_them(rows):
    with fake_gpus(NO_WORKSPACE) as notes:
        inputs = torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda:0")
        experts = torch.empty(16, 128, 64, dtype=torch.bfloat16, device="cuda:0").transpose(1, 2)
        torch._grouped_mm(inputs, experts, offs=torch.empty(16, dtype=torch.int32, device="cuda:0"))
    chosen = torch.randint(16, (20000, rows), generator=torch.Generator().manual_seed(0))
    met = sum(len(row.unique()) for row in chosen) / len(chosen)
    assert notes.trace.operations[-1].name == "_grouped_mm"
    read = notes.trace.operations[-1].bytes - 2 * rows * (64 + 128)
    assert read / (2 * 64 * 128) == pytest.approx(met, rel=0.01)
