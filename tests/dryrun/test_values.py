"""Values of small tensors in runs without data, against the same code on the CPU."""

import pytest
import torch

from bigkit import dry_run
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.zoo import build
from tests.dryrun.test_fake_gpu import TINY, tiny


def positions_of(device):
    mask = torch.ones(2, 6, dtype=torch.long, device=device)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    padded = torch.cat([mask, mask.new_zeros(2, 1)], dim=1).bool()
    return positions, padded, (~padded).sum(), torch.zeros_like(mask).any()


def test_masks_and_positions_are_known():
    real = positions_of("cpu")
    with fake_gpus() as log:
        found = positions_of("cuda:0")
        for values, expected in zip(found, real):
            assert values.device == torch.device("cuda:0") and torch.equal(log.values.of(values), expected)
        assert int(found[2]) == 4 and not bool(found[3])


def test_what_depends_on_weights_or_chance_is_not_known():
    with fake_gpus() as log:
        weight = torch.empty(4, 4, device="cuda:0")
        ids = torch.arange(4, device="cuda:0")
        view = ids[1:]
        for tensor in (weight @ weight, torch.randint(9, (3,), device="cuda:0"), torch.rand(2)):
            assert log.values.of(tensor) is None
            with pytest.raises(RuntimeError, match="local_scalar_dense"):
                bool(tensor.sum() == 0)
        assert log.values.of(view) is not None
        ids.copy_(weight[0])
        assert log.values.of(ids) is None and log.values.of(view) is None, "views change with it"
        log.between_calls = True
        assert bool(weight.sum() == 0) is False, "the caller of a model asks whether a sequence is finished"


def test_experts_are_taken_to_be_chosen_evenly():
    """Aria's Python cuts the rows of each expert out, as many as `histc` has counted."""
    with fake_gpus():
        chosen = torch.rand(10, 6, device="cuda:0").topk(3).indices
        assert torch.histc(chosen.flatten().float(), 6).cpu().tolist() == [5.0] * 6


def test_a_real_tensor_is_changed_once():
    counter = torch.zeros(1, dtype=torch.long)
    with fake_gpus():
        counter.add_(1)
    assert counter.item() == 1


def names_of(run, step):
    start, end = ([0, *(end for _, end in run.steps)][i] for i in (step, step + 1))
    return [operation.name for operation in run.operations[start:end]]


def test_a_whole_mask_is_no_mask():
    sizes = {**TINY["llama-3.1-8b"], "hidden_size": 256}
    model = tiny("llama-3.1-8b", "bfloat16", **sizes)
    kernels = {name for name in names_of(dry_run(model, None, 2, 24, 0, "A100-80GB"), 0) if "attention" in name}
    assert kernels == {"_scaled_dot_product_flash_attention"}, "the others are taken for masks"


def test_decoding_takes_the_chosen_experts_one_by_one():
    """`generate` decodes with another implementation of experts than a plain call of the model."""
    model = lambda: build.build({**_mixtral(), "num_hidden_layers": 1}, dtype="bfloat16").eval()  # noqa: E731
    generated, called = (dry_run(model, None, 2, 24, 1, "H200", generate=flag) for flag in (True, False))
    assert "_grouped_mm" in names_of(generated, 0) and "_grouped_mm" in names_of(called, 1)
    assert "_grouped_mm" not in names_of(generated, 1)


def _mixtral():
    from bigkit.zoo import catalog

    return {**catalog.config(catalog.find("mixtral-8x7b")), **TINY["mixtral-8x7b"]}
