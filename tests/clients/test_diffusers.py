"""Diffusers' pipelines and models around parts that bigkit has spread."""

import copy

import pytest
import torch

from tests.clients.places import AWAY, WAYS, check, seeded, spread_ways

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def unet():
    return seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    )


def vae():
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            sample_size=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    )


def pipeline(model):
    pipe = diffusers.DDIMPipeline(model, diffusers.DDIMScheduler(num_train_timesteps=4))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe):
    return torch.tensor(pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")[0])


def by_the_whole_model(model):
    """Accelerate keeps it in RAM from now on, and brings it as a whole."""
    pipe = pipeline(model)
    pipe.enable_model_cpu_offload(device="cpu")
    first = drawn(pipe)
    pipe.maybe_free_model_hooks()
    second = drawn(pipe)
    pipe.remove_all_hooks()
    return first, second, drawn(pipe)


def hooks_removed(model):
    pipe = pipeline(model)
    pipe.remove_all_hooks()
    return drawn(pipe), drawn(pipe.to(torch.float32)), str(pipe.to("cpu").device)


def map_reset(model):
    pipe = pipeline(model)
    pipe.reset_device_map()
    return drawn(pipe)


def facts(model):
    pipe = pipeline(model)
    return (
        str(pipe.device), str(pipe._execution_device), pipe.dtype, model.num_parameters(), model.get_memory_footprint(),
    )  # fmt: skip


def groups_on_it(model):
    """Diffusers' own offloading of leaves on top; it takes bigkit's hooks for none."""
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    return model(X, 1).sample


def groups_beside_it(model):
    other = vae()
    other.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )
    return other(X).sample, model(X, 1).sample


def with_an_adapter(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), model)
    return model(X, 1).sample


USES = [
    lambda model: drawn(pipeline(model)), by_the_whole_model, hooks_removed, map_reset, facts, groups_on_it,
    groups_beside_it, with_an_adapter,
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_pipelines(use, tmp_path):
    if use in (groups_on_it, with_an_adapter):
        for way, parts in spread_ways(unet(), tmp_path):
            torch.testing.assert_close(use(parts), use(unet()), msg=way)
    else:
        check(unet(), use, tmp_path)


def test_a_pipeline_is_not_moved_or_cast(tmp_path):
    for way, parts in spread_ways(unet(), tmp_path, AWAY):
        pipe = pipeline(parts)
        before = drawn(pipe)
        for change in (CPU, torch.float16):
            with pytest.raises(RuntimeError, match="cannot be moved or cast as a whole: call bigkit.remove_hook"):
                pipe.to(change)
        assert torch.equal(drawn(pipe), before), way
    assert pipeline(WAYS["GPUs"](unet(), tmp_path)).to(torch.float64).unet.dtype == torch.float64


def test_saved_pipelines(tmp_path):
    expected = drawn(pipeline(unet()))
    for way, parts in spread_ways(unet(), tmp_path):
        pipeline(parts).save_pretrained(tmp_path / f"{way} saved")
        again = diffusers.DDIMPipeline.from_pretrained(tmp_path / f"{way} saved")
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(drawn(again), expected, msg=way)
        torch.testing.assert_close(drawn(pipeline(parts)), expected, msg=way)


def coded(model):
    """`encode` and `decode` call a hook's `pre_forward` alone (`apply_forward_hook`)."""
    code = model.encode(X).latent_dist.mode()
    model.enable_slicing()
    model.enable_tiling()
    return code, model.decode(code).sample, model(X).sample


def fused(model):
    model.fuse_qkv_projections()
    first = model(X).sample
    model.unfuse_qkv_projections()
    return first, model(X).sample


@pytest.mark.parametrize("use", [coded, fused])
def test_an_autoencoder(use, tmp_path):
    check(vae(), use, tmp_path)


def test_weights_that_are_cast_within_a_forward(tmp_path):
    """Diffusers' layerwise casting: what is lent cannot change its dtype, and says so."""
    for parts in dict(spread_ways(unet(), tmp_path, AWAY)).values():
        parts.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        with pytest.raises(ValueError, match="that is lent to a forward cannot become .* assign it between forwards"):
            parts(X, 1)
    whole, resident = unet(), WAYS["GPUs"](copy.deepcopy(unet()), tmp_path)
    for model in (whole, resident):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert torch.equal(resident(X, 1).sample, whole(X, 1).sample)
