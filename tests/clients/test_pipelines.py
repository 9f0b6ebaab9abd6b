"""Pipelines of Diffusers: counted, planned and run component by component, with the images of the whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import bigkit
from bigkit.dryrun.components import describe_pipeline
from bigkit.dryrun.fake_gpu import OperationLog, fake_gpus
from bigkit.dryrun.result import held_by_kind
from bigkit.maps.pipeline import PipelinePlan
from bigkit.model.pipeline import Component, PipelineEstimate, PipelineSpec
from bigkit.offload.hooks import hooks_in
from bigkit.offload.lenders import streamers_in
from bigkit.offload.pipeline import dispatch_pipeline
from bigkit.offload.whole_model import CpuOffload

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")


def vae(latents: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, sample_size=32, latent_channels=latents, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def clip() -> Any:
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=99,
                       max_position_embeddings=77, projection_dim=32)
    )  # fmt: skip


def stable_diffusion() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        text_encoder=clip(), unet=unet, vae=vae(4), tokenizer=None, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip


def flux() -> Any:
    torch.manual_seed(0)
    denoiser = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=99)).eval()
    return diffusers.FluxPipeline(
        text_encoder=clip(), text_encoder_2=t5, transformer=denoiser, vae=vae(4), tokenizer=None, tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


MADE = {"stable diffusion": stable_diffusion, "flux": flux}


def drawn(name: str, pipe: Any) -> torch.Tensor:
    """An image from embeddings that the pipeline's own text encoders give."""
    pipe.set_progress_bar_config(disable=True)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        embeds = pipe.text_encoder(ids)
        given: dict[str, Any] = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[0] / 2}
        if name == "flux":
            given = {"prompt_embeds": pipe.text_encoder_2(ids)[0], "pooled_prompt_embeds": embeds.pooler_output}
    generator = torch.Generator().manual_seed(0)
    result = pipe(**given, height=32, width=32, num_inference_steps=2, generator=generator, output_type="np")
    return torch.from_numpy(result[0])


@pytest.fixture(scope="module", params=MADE)
def saved(request: Any, tmp_path_factory: Any) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("pipeline")
    MADE[request.param]().save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def described(saved: tuple[str, Path]) -> Callable[..., Any]:
    """What a pipeline is, for images of a size; each told once."""
    return cache(partial(describe_pipeline, saved[1]))


def loaded(name: str) -> Any:
    return MADE[name]()


def test_an_estimate_counts_components_and_phases(saved: tuple[str, Path]) -> None:
    name, folder = saved
    estimate: Any = bigkit.estimate_memory(str(folder))
    assert isinstance(estimate, PipelineEstimate)
    pipe = loaded(name)
    weights = {
        own: sum(parameter.numel() * 2 for parameter in part.parameters())
        + sum(b.numel() * (2 if b.is_floating_point() else b.element_size()) for b in part.buffers())
        for own, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert {one["name"]: one["weights"] for one in estimate.components} == weights
    assert [one["phase"] for one in estimate.components][-2:] == ["denoise", "decode"]
    assert all(one["activations"] for one in estimate.components), str(estimate)
    ways = estimate.ways
    assert ways["by the block"] <= ways["one at a time"] < ways["all stay"]
    assert ways["all stay"] == sum(weights.values()) + max(one["activations"] for one in estimate.components)
    assert json.loads(estimate.to_json())["ways"] == ways and "denoise" in str(estimate)


def test_a_plan_keeps_what_is_used_most(described: Any) -> None:
    spec = described()
    estimate: Any = bigkit.estimate_memory(spec)
    how = []
    for size in (estimate.ways["all stay"], estimate.ways["one at a time"], estimate.ways["by the block"]):
        plan: Any = bigkit.plan(spec, {0: size, "cpu": "1GB"}, overhead=0)
        assert isinstance(plan, PipelinePlan)
        assert plan.feasible and plan.peak <= size and "peak" in plan.explain()
        how.append([one.how for one in plan.components])
    assert set(how[0]) == {"stays"} and "comes" in how[1]
    assert "by block" in how[2] or estimate.ways["by the block"] == estimate.ways["one at a time"]
    short: Any = bigkit.plan(spec, {0: estimate.ways["by the block"] // 2, "cpu": "1GB"}, overhead=0)
    assert not short.feasible and "lacks" in short.explain()


@pytest.mark.parametrize("way", ["all stay", "one at a time", "by the block"])
def test_images_are_those_of_diffusers(saved: tuple[str, Path], described: Any, way: str) -> None:
    name, spec = saved[0], described()
    whole = drawn(name, loaded(name))
    theirs = loaded(name)
    theirs.enable_model_cpu_offload(device="cpu")
    assert torch.equal(drawn(name, theirs), whole)
    groups = loaded(name)
    for part in (groups.components.get("unet"), groups.components.get("transformer")):
        if part is not None:
            part.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(drawn(name, groups), whole)

    size = bigkit.estimate_memory(spec).ways[way]  # type: ignore[attr-defined]
    plan: Any = bigkit.plan(spec, {0: size, "cpu": "1GB"}, overhead=0)
    pipe = dispatch_pipeline(loaded(name), plan, stand_in={0: "cpu"})
    for _ in range(2):
        assert torch.equal(drawn(name, pipe), whole), plan.explain()
    pipe.maybe_free_model_hooks()
    assert torch.equal(drawn(name, pipe), whole)


def test_what_came_for_a_phase_is_gone_in_the_next_one(saved: tuple[str, Path], described: Any) -> None:
    """Whatever works: of the components that come, none but itself is on the GPU meanwhile, as the plan counts."""
    name, spec = saved[0], described()
    estimate: Any = bigkit.estimate_memory(spec)
    plan: Any = bigkit.plan(spec, {0: estimate.ways["one at a time"], "cpu": "1GB"}, overhead=0)
    pipe = dispatch_pipeline(loaded(name), plan, stand_in={0: "cpu"})
    coming = {one.name: getattr(pipe, one.name) for one in plan.components if one.how == "comes"}
    others = [getattr(pipe, one.name) for one in plan.components]
    hooks = {own: next(hook for hook in hooks_in(part) if isinstance(hook, CpuOffload)) for own, part in coming.items()}
    there: list[tuple[str, list[str]]] = []

    def note(own: str) -> Any:
        return lambda *_: there.append((own, [other for other, hook in hooks.items() if hook.in_ram]))

    for one, part in zip(plan.components, others):
        inner = part.decoder if one.phase == "decode" else part
        inner.register_forward_hook(note(one.name))
    assert coming
    for _ in range(2):
        drawn(name, pipe)
    assert {own for own, _ in there} == {one.name for one in plan.components}
    assert all(found == ([own] if own in coming else []) for own, found in there), there


@contextmanager
def fake_pipelines() -> Iterator[OperationLog]:
    """Fake GPUs on which Diffusers' pipelines can be moved: PyTorch moves modules by what fake tensors refuse."""
    own = torch.nn.Module._apply, CpuOffload.pre_forward, CpuOffload.offload

    def apply(self: torch.nn.Module, change: Any, recurse: bool = True) -> torch.nn.Module:
        for child in self.children():
            child._apply(change)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = torch.nn.Parameter(change(parameter), requires_grad=False)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else change(buffer)
        return self

    def bring(self: Any, *args: Any, **kwargs: Any) -> Any:
        sent = own[1](self, *args, **kwargs)
        for tensor, *_ in self.in_ram:
            tensor.fake_device = self.execution_device  # `tensor.data = other` does not say it to a fake tensor
        return sent

    def offload(self: Any) -> None:
        there = [tensor for tensor, *_ in self.in_ram]
        own[2](self)
        for tensor in there:
            tensor.fake_device = torch.device("cpu")

    with pytest.MonkeyPatch.context() as patch, fake_gpus() as log:
        patch.setattr(torch.nn.Module, "_apply", apply)
        patch.setattr(CpuOffload, "pre_forward", bring)
        patch.setattr(CpuOffload, "offload", offload)
        yield log


def peaks_on_fakes(name: str, plan: PipelinePlan) -> dict[Any, int]:
    """GPU -> the most bytes that an image took there, from a prompt as long as plans count with; without workspaces."""
    with fake_pipelines() as log:
        pipe = dispatch_pipeline(loaded(name).to(torch.bfloat16), plan)
        pipe.set_progress_bar_config(disable=True)
        assert pipe._execution_device == torch.device("cuda", 0)
        embeds = pipe.text_encoder(torch.zeros(1, 77, dtype=torch.long, device="cuda:0"))
        given: dict[str, Any] = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[0]}
        if name == "flux":
            t5 = pipe.text_encoder_2(torch.zeros(1, 512, dtype=torch.long, device="cuda:0"))
            given = {"prompt_embeds": t5[0], "pooled_prompt_embeds": embeds.pooler_output}
        assert all(tensor.device == torch.device("cuda", 0) for tensor in given.values())
        pipe(**given, height=32, width=32, num_inference_steps=2, output_type="latent")
        pipe.vae.decode(torch.zeros(1, 4, 16, 16, dtype=torch.bfloat16, device="cuda:0"))
        peaks = {}
        for gpu in plan.gpus:
            recording = log.trace.recordings.get(f"cuda:{gpu}")
            held = held_by_kind(recording.events, log.trace.kinds[f"cuda:{gpu}"]) if recording else {}
            counted = zip(*(sizes for kind, sizes in held.items() if kind != "workspace"))
            peaks[gpu] = max(map(sum, counted), default=0)
        return peaks


@pytest.mark.parametrize("way", ["all stay", "one at a time", "by the block"])
def test_a_run_on_fake_gpus_takes_what_the_plan_says(saved: tuple[str, Path], described: Any, way: str) -> None:
    name, spec = saved[0], described(image=32)
    estimate: Any = bigkit.estimate_memory(spec)
    plan: Any = bigkit.plan(spec, {0: estimate.ways[way], "cpu": "1GB"}, overhead=0)
    apart = 0.3 if way == "by the block" else 0.1  # in slots, tensors as small as these are rounded up by as much
    assert peaks_on_fakes(name, plan)[0] == pytest.approx(plan.peak, rel=apart), plan.explain()


def quiet(spec: PipelineSpec) -> PipelineSpec:
    """The same pipeline as if it had no activations, which are most of so small a one."""
    return replace(spec, components=tuple(replace(one, activations=0) for one in spec.components))


def test_several_gpus_share_a_pipeline(saved: tuple[str, Path], described: Any) -> None:
    """Components lie on one GPU or the other, or are split; images are the same, and inputs come where they work."""
    name, spec = saved[0], quiet(described(image=32))
    whole = drawn(name, loaded(name))
    denoiser = next(one for one in spec.components if one.phase == "denoise")
    size, found = denoiser.spec.bytes(), []
    least: int = bigkit.estimate_memory(spec).ways["by the block"]  # type: ignore[attr-defined]
    for budgets in ({0: spec.weights, 1: spec.weights}, {0: spec.weights - size, 1: size},
                    dict.fromkeys(range(3), size * 9 // 10), {0: least, 1: least // 2, "cpu": "1GB"}):  # fmt: skip
        plan: Any = bigkit.plan(spec, budgets, overhead=0)
        assert plan.feasible and all(peak <= budgets[gpu] for one in plan.components for gpu, peak in one.peaks.items())
        placed = {one.name: one for one in plan.components}
        found.append((placed[denoiser.name].how, placed[denoiser.name].gpus))
        assert placed["vae"].gpus == (0,) and "peak of GPU 1" in plan.explain()
        assert (plan.copied == 0) == ("cpu" not in budgets), plan.explain()
        peaks = peaks_on_fakes(name, plan)
        assert set(peaks) == set(plan.gpus)
        pipe = dispatch_pipeline(loaded(name), plan, stand_in=dict.fromkeys(plan.gpus, "cpu"))
        for _ in range(2):
            assert torch.equal(drawn(name, pipe), whole), plan.explain()
    assert found[:3] == [("stays", (0,)), ("stays", (1,)), ("split", (0, 1, 2))], found


def test_halves_of_a_unet_come_in_pieces() -> None:
    """Diffusers keeps `CrossAttnUpBlock2D` whole for several GPUs: on one, its resnets and transformers are enough."""
    with bigkit.init_empty_weights():
        unet = stable_diffusion().unet
    one = Component("unet", bigkit.describe(unet), "denoise")  # type: ignore[arg-type]
    assert "CrossAttnUpBlock2D" in one.spec.no_split and one.blocks == ("BasicTransformerBlock", "ResnetBlock2D")
    whole = max(layer.bytes() for layer in one.spec.layers_to_place())
    assert max(layer.bytes() for layer in one.layers) < whole / 3


def test_places_for_blocks_in_flight_are_given_back(saved: tuple[str, Path], described: Any) -> None:
    """Of components that come by block, only the one that works has memory for its blocks; nothing of it is lost."""
    name, spec = saved[0], quiet(described(image=32))
    least = max(one.least for one in spec.components)
    plan: Any = bigkit.plan(spec, {0: least, "cpu": "1GB"}, overhead=0)
    assert plan.feasible and plan.peak <= least and plan.copied > 0, plan.explain()
    plan = replace(plan, components=tuple(
        replace(one, how="by block", plan=None, away={"": "cpu"}) for one in plan.components
    ))  # fmt: skip
    blocks = [one.name for one in plan.components]
    pipe = dispatch_pipeline(loaded(name), plan, stand_in={0: "cpu"})
    working: list[list[str]] = []

    def note(*_: Any) -> None:
        parts = {own: streamers_in(getattr(pipe, own)) for own in blocks}
        working.append([own for own, streamers in parts.items() if any(streamer.slots for streamer in streamers)])

    for own in blocks:
        inner = pipe.vae.decoder if own == "vae" else getattr(pipe, own)
        inner.register_forward_hook(note)
    whole = drawn(name, loaded(name))
    for _ in range(2):
        assert torch.equal(drawn(name, pipe), whole)
    assert all(len(found) == 1 for found in working) and {own for [own] in working} == {*blocks}, working


def test_what_no_pipeline_can_follow_is_said() -> None:
    for plan in (None, {"unet": 0}, bigkit.plan("pygpt", {"cpu": "1GB"})):
        with pytest.raises(TypeError, match="a pipeline follows bigkit.plan of its name or folder, not a"):
            dispatch_pipeline(stable_diffusion(), plan)  # type: ignore[arg-type]


def test_a_plan_without_ram_lets_nothing_wait_there(described: Any) -> None:
    """Where GPU and CPU share one memory there is no budget for RAM: what waits there would be counted nowhere."""
    spec = quiet(described(image=32))
    plan: Any = bigkit.plan(spec, {0: spec.weights * 3 // 4, "disk": "1GB"}, overhead=0)
    assert plan.feasible and {one.how for one in plan.components} <= {"stays", "by block"}, plan.explain()
    assert all(layer.device != "cpu" for one in plan.components if one.plan for layer in one.plan.layers)


def test_the_size_of_the_image_counts(saved: tuple[str, Path]) -> None:
    """A larger image takes more while it is denoised and decoded, and plans keep more room; texts take the same."""
    _, folder = saved
    usual, small, wide = (
        {one["name"]: one for one in bigkit.estimate_memory(str(folder), image=image).components}  # type: ignore[attr-defined]
        for image in (None, 32, (32, 96))
    )
    for name, one in small.items():
        more = wide[name]["activations"] / one["activations"]
        assert one["weights"] == usual[name]["weights"] and (more == 1 if one["phase"] == "encode" else 1 < more < 4)
    assert small["vae"]["load"] == "32 x 32 pixels" and wide["vae"]["load"] == "32 x 96 pixels"
    assert {one["load"] for one in wide.values() if one["phase"] == "denoise"} <= {
        "1 x 16 x 48 latents", "2 x 16 x 48 latents"}  # fmt: skip
    peaks = [bigkit.plan(str(folder), {0: "1GB", "cpu": "1GB"}, overhead=0, image=image).peak for image in (32, 512)]  # type: ignore[attr-defined]
    assert peaks[0] < peaks[1]
    for image in (2, (32, 0), "32"):
        with pytest.raises(ValueError, match=r"expected pixels, or \(height, width\), 4 each at least"):
            bigkit.estimate_memory(str(folder), image=image)  # type: ignore[arg-type]


def test_what_cannot_be_built_is_left_out_and_said(saved: tuple[str, Path], tmp_path: Path) -> None:
    import shutil

    _, folder = saved
    shutil.copytree(folder, tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    index["vae"] = ["somewhere", "Strange"]
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    estimate: Any = bigkit.estimate_memory(str(tmp_path / "other"))
    assert "vae is left out: it is a Strange of somewhere" in str(estimate)
    (tmp_path / "other" / "model_index.json").unlink()
    with pytest.raises(bigkit.zoo.NoConfig):
        bigkit.estimate_memory(str(tmp_path / "other"))
