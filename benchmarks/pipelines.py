"""A pipeline of Diffusers that does not fit as a whole: on the GPU, by plans of bigkit, and with Diffusers' offloads.

    python benchmarks/pipelines.py [--save]                a CUDA GPU: Flux's shape with fewer blocks, random weights
    python benchmarks/pipelines.py --device cpu --tiny     no GPU: tiny shapes, to see that it runs

An image is made from token ids: text encoders, `--steps` passes of the denoiser, VAE. The first image of each way warms
up, the second one counts; `equal` says whether it is, bit for bit, that of the pipeline on the GPU. The peak is what
PyTorch had allocated, with the budget that bigkit's plan had beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as tf
from torch import Tensor, nn

import bigkit
from bigkit.dryrun.components import describe_pipeline
from bigkit.offload.pipeline import dispatch_pipeline


def flux(device: str, tiny: bool, blocks: int) -> Any:
    """A pipeline of Flux's classes with random weights in bfloat16, on a device."""
    width = 32 if tiny else 3072
    heads: dict[str, Any] = {"attention_head_dim": 16 if tiny else 128, "num_attention_heads": 2 if tiny else 24}
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        denoiser = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16 if tiny else 64, num_layers=blocks, num_single_layers=2 * blocks, **heads,
            joint_attention_dim=32 if tiny else 4096, pooled_projection_dim=32 if tiny else 768,
            axes_dims_rope=(4, 4, 8) if tiny else (16, 56, 56), guidance_embeds=True,
        )  # fmt: skip
        text = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4} if tiny else {
            "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64,
            "feed_forward_proj": "gated-gelu"}  # fmt: skip
        t5 = tf.T5EncoderModel(tf.T5Config(**text, num_layers=3 if tiny else max(2, 24 * blocks // 19)))
        short = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "vocab_size": 99, "projection_dim": 32} if tiny else {}  # fmt: skip
        clip = tf.CLIPTextModel(tf.CLIPTextConfig(**{
            "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 77, **short}))  # fmt: skip
        sizes = (8, 16) if tiny else (128, 256, 512, 512)
        vae = diffusers.AutoencoderKL(
            block_out_channels=sizes, norm_num_groups=4 if tiny else 32, latent_channels=4 if tiny else 16,
            layers_per_block=1 if tiny else 2, shift_factor=0.1, scaling_factor=0.36,
            down_block_types=("DownEncoderBlock2D",) * len(sizes), up_block_types=("UpDecoderBlock2D",) * len(sizes),
        )  # fmt: skip
        torch.set_default_dtype(torch.float32)
    assert tiny or denoiser.inner_dim == width
    parts: dict[str, Any] = {"text_encoder": clip, "text_encoder_2": t5, "transformer": denoiser, "vae": vae}
    for part in parts.values():
        part.to(torch.bfloat16).eval().requires_grad_(False)
    return diffusers.FluxPipeline(
        **parts, tokenizer=None, tokenizer_2=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )


def save_configs(pipe: Any, folder: Path) -> None:
    """Write a pipeline without its weights: what `bigkit.plan` reads."""
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            held: Any = part
            (held.save_config if hasattr(held, "save_config") else held.config.save_pretrained)(folder / name)


def image(pipe: Any, device: str, size: int, steps: int) -> Tensor:
    """One image, (height, width, 3), on the CPU."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pooled = pipe.text_encoder(torch.arange(1, 60, device=device)[None]).pooler_output
        prompt = pipe.text_encoder_2(torch.arange(1, 90, device=device)[None])[0]
        made = pipe(
            prompt_embeds=prompt, pooled_prompt_embeds=pooled, height=size, width=size, num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        )  # fmt: skip
    found: Tensor = made[0][0].float().cpu()
    return found


def settle(cuda: bool) -> None:
    """Give back what is not used any more."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Measure each way in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--blocks", type=int, default=6, help="double blocks; twice as many single ones. Flux: 19")
    parser.add_argument("--size", type=int, default=1024, help="height and width of the image in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/pipelines.json")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    size = 32 if args.tiny else args.size
    out = args.out or (Path(__file__).parent / "results" / "pipelines.json" if args.save else None)
    pipe = flux(args.device, args.tiny, 2 if args.tiny else args.blocks)
    weights = sum(
        p.nbytes for part in pipe.components.values() if isinstance(part, nn.Module) for p in part.parameters()
    )
    about = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU", "torch": torch.__version__,
        "diffusers": diffusers.__version__, "size": size, "steps": args.steps, "weights": weights,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp())
    save_configs(pipe, folder)
    spec: Any = describe_pipeline(folder)
    estimate: Any = bigkit.estimate_memory(spec)
    expected: Tensor | None = None

    def measure(way: str, prepare: Callable[[], Any], **more: Any) -> None:
        nonlocal expected
        try:
            settle(cuda)
            begin = time.perf_counter()
            ready = prepare()
            prepared = time.perf_counter() - begin
            found = image(ready, args.device, size, args.steps)
            expected = found if expected is None else expected
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            found = image(ready, args.device, size, args.steps)
            row = {
                "way": way, "seconds": round(time.perf_counter() - begin, 3), "prepare_s": round(prepared, 1),
                "equal": bool(torch.equal(found, expected)),
                "peak": torch.cuda.max_memory_allocated() if cuda else 0, **more,
            }  # fmt: skip
        except Exception as error:
            row = {"way": way, "error": f"{type(error).__name__}: {error}"[:400]}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if out:
            out.write_text(json.dumps({"about": about, "ways": dict(estimate.ways), "rows": rows}, indent=1) + "\n")

    def at_home() -> Any:
        """The pipeline as it was loaded: on the CPU, without anybody's hooks."""
        nonlocal pipe
        pipe.remove_all_hooks()
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                bigkit.remove_hook_from_module(part, recurse=True)
                part.to("cpu")
        settle(cuda)
        return pipe

    def by_plan(budget: int) -> Any:
        plan: Any = bigkit.plan(spec, {0: budget, "cpu": "100GB"}, overhead=0)
        print(plan.explain(), flush=True)
        return dispatch_pipeline(at_home(), plan, stand_in={} if cuda else {0: "cpu"})

    def model_offload() -> Any:
        at_home().enable_model_cpu_offload(device=args.device)
        return pipe

    def group_offload() -> Any:
        home = at_home()
        for part in (home.text_encoder, home.text_encoder_2, home.transformer, home.vae):
            diffusers.hooks.apply_group_offloading(
                part, onload_device=torch.device(args.device), offload_device=torch.device("cpu"),
                offload_type="leaf_level", use_stream=cuda, **({"record_stream": True} if cuda else {}),
            )  # fmt: skip
        return home

    print(json.dumps(about), flush=True)
    print(estimate, flush=True)
    measure("on the GPU", lambda: pipe)
    ways = estimate.ways
    measure("bigkit, one at a time", lambda: by_plan(ways["one at a time"]), budget=ways["one at a time"])
    measure("Diffusers, model offload", model_offload)
    measure("bigkit, by the block", lambda: by_plan(ways["by the block"]), budget=ways["by the block"])
    measure("Diffusers, group offload, leaves, with its stream", group_offload)  # its hooks stay


if __name__ == "__main__":
    main()
