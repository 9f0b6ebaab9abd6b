"""One image for each prompt, on as many processes as you start; process 0 writes the first, process 1 the second.

    bigkit launch --num_processes 3 distributed_diffusion.py --model tiny
    bigkit launch distributed_diffusion.py --model runwayml/stable-diffusion-v1-5 --steps 25

`tiny` is a pipeline with random weights, built from configs without a network: its images are noise, but all else
happens as with a real one. Needs diffusers: pip install bigkit[diffusers].
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from bigkit import PartialState, gather_object

PROMPTS = ["a dog", "a cat", "a chicken"]
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # its first home is gone


def tiny_pipeline() -> Any:
    """A Stable Diffusion pipeline of 50 thousand random parameters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<start>", "<end>", "<unknown>", "a", "dog", "cat", "chicken"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unknown>", pad_token="<end>", eos_token="<end>", model_max_length=8
    )
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def main() -> None:
    """Split the prompts, make the images, say who wrote what."""
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description="one image for each prompt")
    parser.add_argument("--model", default="tiny", help="tiny, a Hub id or a folder (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the images go (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps (%(default)s)")
    options = parser.parse_args()

    state = PartialState()
    dtype = torch.float16 if state.device.type == "cuda" and options.model != "tiny" else torch.float32
    with state.main_process_first():  # one process downloads the model, the others find it
        if options.model == "tiny":
            pipeline = tiny_pipeline()
        else:
            name = MOVED.get(options.model, options.model)
            pipeline = DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    pipeline.to(state.device)
    pipeline.set_progress_bar_config(disable=not state.is_local_main_process)
    written = []
    with state.split_between_processes(PROMPTS) as mine:
        for prompt in mine:
            seed = torch.Generator("cpu").manual_seed(PROMPTS.index(prompt))  # the same image on any process
            image = pipeline(prompt, num_inference_steps=options.steps, generator=seed).images[0]
            path = options.folder / f"{prompt.replace(' ', '_')}_{state.process_index}.png"
            image.save(path)
            written.append(f"process {state.process_index} wrote {path.name}: {prompt!r}, {image.width}x{image.height}")
    for line in gather_object(written):
        if state.is_main_process:
            print(line)
    state.destroy()


if __name__ == "__main__":
    main()
