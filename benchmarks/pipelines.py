"""A pipeline of Diffusers that does not fit as a whole: on the GPU, by plans of bigkit, and with Diffusers' offloads.

    python benchmarks/pipelines.py [--save]                a CUDA GPU: Flux's shape with fewer blocks, random weights
    python benchmarks/pipelines.py --two [--save]          two GPUs: components apart, and the denoiser split
    python benchmarks/pipelines.py --device cpu --tiny     no GPU: tiny shapes, to see that it runs

An image is made from token ids: text encoders, `--steps` passes of the denoiser, VAE. The first image of each way warms
up, the second one counts; `equal` says whether it is, bit for bit, that of the pipeline on the GPU. The peak is what
PyTorch had allocated, and `predicted` what the plan said before. A sequential offload makes one image only.
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


def image(pipe: Any, device: str, size: int, steps: int, tiny: bool = False) -> Tensor:
    """One image, (3, height, width), on the CPU; from prompts as long as Flux takes them."""
    pipe.set_progress_bar_config(disable=True)
    vocabulary, tokens = (99, 16) if tiny else (30000, 512)
    with torch.no_grad():
        pooled = pipe.text_encoder((torch.arange(77, device=device) % vocabulary)[None]).pooler_output
        prompt = pipe.text_encoder_2((torch.arange(tokens, device=device) % vocabulary)[None])[0]
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
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)


def peak_of(gpu: int) -> int:
    """The most bytes that PyTorch had allocated on a GPU."""
    return torch.cuda.max_memory_allocated(gpu)


class Ways:
    """Each way to make an image, measured one after another with the same weights.

    Args:
        args: of the command line.
        out: a JSON file that is written anew after each way.
    """

    def __init__(self, args: argparse.Namespace, out: Path | None) -> None:
        self.args, self.out, self.cuda = args, out, args.device.startswith("cuda")
        self.size = 32 if args.tiny else args.size
        self.build()
        folder = Path(tempfile.mkdtemp())
        save_configs(self.pipe, folder)
        self.spec: Any = describe_pipeline(folder, image=self.size)
        self.estimate: Any = bigkit.estimate_memory(self.spec)
        self.about = {
            "device": torch.cuda.get_device_name() if self.cuda else platform.processor() or "CPU",
            "torch": torch.__version__, "diffusers": diffusers.__version__, "size": self.size, "steps": args.steps,
            "blocks": args.blocks, "weights": self.spec.weights,
        }  # fmt: skip
        self.rows: list[dict[str, Any]] = []
        self.expected: Tensor | None = None

    def build(self) -> None:
        """Make the pipeline, always with the same weights."""
        self.pipe = flux(self.args.device, self.args.tiny, 2 if self.args.tiny else self.args.blocks)

    def image(self, pipe: Any) -> Tensor:
        """One image of the benchmark's size."""
        return image(pipe, self.args.device, self.size, self.args.steps, self.args.tiny)

    def measure(self, way: str, prepare: Callable[[], Any], predicted: int = 0, warm: bool = True, **more: Any) -> None:
        """Prepare, make an image to warm up (`warm`) and one that counts, and keep the row or the error."""
        try:
            settle(self.cuda)
            begin = time.perf_counter()
            ready = prepare()
            prepared = time.perf_counter() - begin
            if warm:
                first = self.image(ready)
                self.expected = first if self.expected is None else self.expected
            settle(self.cuda)
            begin = time.perf_counter()
            found = self.image(ready)
            row = {
                "way": way, "seconds": round(time.perf_counter() - begin, 3), "prepare_s": round(prepared, 1),
                "equal": bool(torch.equal(found, self.expected)),  # type: ignore[arg-type]
                "peak": peak_of(0) if self.cuda else 0, "predicted": predicted, **more,
            }  # fmt: skip
            if "second_predicted" in more and self.cuda:
                row["second_peak"] = peak_of(1)
        except Exception as error:
            row = {"way": way, "error": f"{type(error).__name__}: {error}"[:400]}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.out:
            kept = {"about": self.about, "ways": dict(self.estimate.ways), "rows": self.rows}
            self.out.write_text(json.dumps(kept, indent=1) + "\n")

    def at_home(self) -> Any:
        """The pipeline as it was loaded: on the CPU, without anybody's hooks."""
        self.pipe.remove_all_hooks()
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                bigkit.remove_hook_from_module(part, recurse=True)
                part.to("cpu")
        settle(self.cuda)
        return self.pipe

    def by_plan(self, way: str, *budgets: int) -> None:
        """Plan for GPUs with so many bytes for the pipeline, and measure that."""
        plan: Any = bigkit.plan(self.spec, {**dict(enumerate(budgets)), "cpu": "100GB"}, overhead=0)
        print(plan.explain(), flush=True)
        stand_in = {} if self.cuda else dict.fromkeys(plan.gpus, "cpu")
        first, *second = [max(one.peaks[gpu] for one in plan.components) for gpu in plan.gpus]
        more = {"second_predicted": second[0]} if second else {}
        self.measure(way, lambda: dispatch_pipeline(self.at_home(), plan, stand_in=stand_in), first, **more)

    def of_diffusers(self, call: str, **options: Any) -> Any:
        """The pipeline with an offload of Diffusers."""
        getattr(self.at_home(), call)(**options)
        return self.pipe


def main() -> None:
    """Measure each way in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--blocks", type=int, default=6, help="double blocks; twice as many single ones. Flux: 19")
    parser.add_argument("--size", type=int, default=1024, help="height and width of the image in pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--two", action="store_true", help="two GPUs: components apart, and the denoiser split")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/pipelines.json")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    results = Path(__file__).parent / "results"
    ways = Ways(args, args.out or (results / f"pipelines{'-two' * args.two}.json" if args.save else None))
    print(json.dumps(ways.about), flush=True)
    print(ways.estimate, flush=True)
    peaks = ways.estimate.ways
    ways.measure("on the GPU", lambda: ways.pipe, peaks["all stay"])
    if args.two:
        denoiser = next(one for one in ways.spec.components if one.phase == "denoise")
        working = max(one.working for one in ways.spec.components)
        rest, size = ways.spec.weights - denoiser.spec.bytes(), denoiser.spec.bytes()
        ways.by_plan("bigkit, components apart", rest + working, size + working)
        ways.by_plan("bigkit, the denoiser split", rest + size // 2 + working, size * 6 // 10 + working)
        ways.by_plan("bigkit, two smaller GPUs", size * 4 // 10 + working, size * 4 // 10 + working)
        return
    ways.by_plan("bigkit, one at a time", peaks["one at a time"])
    ways.measure("Diffusers, model offload", lambda: ways.of_diffusers("enable_model_cpu_offload", device=args.device))
    ways.by_plan("bigkit, by the block", peaks["by the block"])
    ways.by_plan("bigkit, half of the way", (peaks["by the block"] + peaks["one at a time"]) // 2)
    groups = {"offload_type": "leaf_level", "use_stream": ways.cuda, "record_stream": ways.cuda}
    device = torch.device(args.device)
    ways.measure("Diffusers, group offload, leaves, with its stream",
                 lambda: ways.of_diffusers("enable_group_offload", onload_device=device, **groups))  # fmt: skip
    if ways.cuda:  # its hooks cannot be taken off
        ways.build()
        sequential = {"device": args.device}
        ways.measure("Diffusers, sequential offload",
                     lambda: ways.of_diffusers("enable_sequential_cpu_offload", **sequential), warm=False)  # fmt: skip


if __name__ == "__main__":
    main()
