"""Train the GPT that ships with bigkit, on the source of the Python standard library.

    python scripts/train_gpt.py --out build/pygpt --minutes 8.5

One process, one device. The whole corpus lies on the device as bytes and each batch is a set of random crops. The
learning rate follows the clock, so the run ends when its minutes are over, compilation included. What is saved is a
running average of the weights, from the moment when it was best on the validation files.

Three sets of whole files: what is trained on, `VALIDATION` (which average is kept) and `HELD_OUT` (only ever reported;
shipped as `heldout.txt`). Test files of the last two are left out of training as well.

Writes to --out: config.json, the bfloat16 shards and their index, heldout.txt, and training.json (figures and samples).
Leaves out: several GPUs, resuming, any data but the standard library of one Python.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from bigkit.zoo.gpt import GPT, SEPARATOR, GPTConfig, decode, encode, load_gpt, perplexity

HELD_OUT = ("bisect", "colorsys", "graphlib", "shlex")
VALIDATION = ("fnmatch", "fractions", "textwrap")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"}  # strangers, tables, a copy
SKIPPED_FILES = ("_sysconfigdata", "entities")  # a machine's own build flags; a table
TEST_FOLDERS = {"test", "tests", "idle_test"}
PROMPTS = ("import ", "def ", "class Queue:\n    ", "    def __init__(self", "for i in range(", "if __name__ == ")


# ---------------------------------------------------------------------------------------------------------------------
# Text


def read_files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Each Python file of the standard library as (path inside it, source): UTF-8 only, equal files once."""
    seen: set[bytes] = set()
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if SKIPPED_FOLDERS & set(inside.parts) or inside.stem.startswith(SKIPPED_FILES):
            continue
        source = path.read_bytes().replace(b"\r\n", b"\n").strip()
        digest = hashlib.sha256(source).digest()
        if not source or SEPARATOR in source or digest in seen:
            continue
        with contextlib.suppress(UnicodeDecodeError):  # a few test files hold broken text on purpose
            source.decode()
            seen.add(digest)
            yield inside, source


def corpus(folder: Path, test_share: float, seed: int) -> tuple[bytes, bytes, str]:
    """Training bytes, validation bytes and held-out text of the standard library in `folder`.

    Args:
        folder: the standard library's folder.
        test_share: at most this share of the training bytes comes from tests.
        seed: chooses which test files.

    Raises:
        FileNotFoundError: a held-out or validation file is not there.
    """
    set_apart: dict[str, bytes] = {}
    library, tests = [], []
    for path, source in read_files(folder):
        name = path.stem.removeprefix("test_")
        if name in HELD_OUT + VALIDATION:
            if path.parts == (f"{name}.py",):
                set_apart[name] = source
        elif TEST_FOLDERS & set(path.parts):
            tests.append(source)
        else:
            library.append(source)
    missing = [name for name in HELD_OUT + VALIDATION if name not in set_apart]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: give --stdlib a standard library's folder")
    random.Random(seed).shuffle(tests)
    room = sum(map(len, library)) * test_share / (1 - test_share)
    while tests and sum(map(len, tests)) > room:
        tests.pop()
    separator = bytes([SEPARATOR])
    train, validation = (
        separator + separator.join(files) + separator
        for files in (library + tests, [set_apart[name] for name in VALIDATION])
    )
    return train, validation, "\n\n".join(set_apart[name].decode() for name in HELD_OUT) + "\n"


def crops(data: torch.Tensor, starts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, (len(starts), length) each, out of one long row of bytes."""
    windows = data[starts[:, None] + torch.arange(length + 1, device=data.device)].long()
    return windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def optimizer_for(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and tables but no biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def rate(progress: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Share of the peak learning rate at a point of the run (0 to 1): up in a line, down in a cosine."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


@torch.no_grad()
def bits_per_byte(model: nn.Module, data: torch.Tensor, starts: torch.Tensor, autocast: torch.autocast) -> float:
    """Mean loss of `model` in bits on the crops at `starts`, without dropout."""
    losses = []
    model.eval()
    with autocast:
        for part in starts.split(64):
            _, loss = model(*crops(data, part, int(model.block_size)))  # type: ignore[arg-type]
            losses.append(loss * len(part))
    return float(sum(losses)) / len(starts) / math.log(2)


def train(
    args: argparse.Namespace,
    model: nn.Module,
    train_bytes: bytes,
    validation: bytes,
    keep: Callable[[nn.Module], None] = lambda average: None,
) -> tuple[nn.Module, dict]:
    """Train `model`, which gives (logits, loss) as `GPT` does and has a `block_size`.

    Returns:
        The average of its weights that was best on the validation bytes, and the figures of the run. `keep` is called
        with each average that is the best so far.
    """
    began = time.perf_counter()
    device = torch.device(args.device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    torch.set_float32_matmul_precision("high")

    texts = (train_bytes, validation)
    data, unseen = (torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device) for text in texts)
    length = int(model.block_size)  # type: ignore[arg-type]
    probe = torch.randint(len(data) - length, (128,), device=device)  # where the training loss is measured, fixed
    tiles = torch.arange(0, len(unseen) - length, length, device=device)

    model = model.to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = optimizer_for(model, args.lr, args.weight_decay)
    forward = torch.compile(model) if args.compile else model

    best: dict[str, torch.Tensor] = {}
    history: list[dict[str, float]] = []
    step, progress, first, evaluated = 0, 0.0, began, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(progress)
        starts = torch.randint(len(data) - length, (args.batch,), device=device)
        with autocast:
            _, loss = forward(*crops(data, starts, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        with torch.no_grad():
            weight = max(1 - args.ema, 1 / step)  # a plain mean at first, so that the random start is forgotten
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, weight)
        running = loss.item()  # waits for the device, so that the clock tells the truth
        now_s = time.perf_counter()
        if step == 1:
            first = now_s  # compilation is over: the schedule covers what is left
        progress = step / args.steps if args.steps else (now_s - first) / max(1e-9, args.minutes * 60 - (first - began))

        if progress >= 1 or now_s - evaluated > args.evaluate_every:
            record = {
                "step": step,
                "seconds": round(now_s - began, 1),
                "running": round(running / math.log(2), 4),
                "train": round(bits_per_byte(average, data, probe, autocast), 4),
                "validation": round(bits_per_byte(average, unseen, tiles, autocast), 4),
            }
            if not history or record["validation"] < min(earlier["validation"] for earlier in history):
                best = {name: tensor.clone() for name, tensor in average.state_dict().items()}
                keep(average)
            history.append(record)
            print("  ".join(f"{name} {value}" for name, value in record.items()), flush=True)
            evaluated = time.perf_counter()

    average.load_state_dict(best)
    kept = min(history, key=lambda record: record["validation"])
    figures = {
        "steps": step,
        "tokens": step * args.batch * length,
        "epochs": round(step * args.batch * length / len(data), 1),
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "kept_step": kept["step"],
        "bits_per_byte": {"train": kept["train"], "validation": kept["validation"]},
        "history": history,
    }
    return average.eval(), figures


# ---------------------------------------------------------------------------------------------------------------------
# Files


def save(model: GPT, folder: Path, shards: int = 4) -> None:
    """Write `model` in bfloat16: config.json, at most `shards` safetensors files of about one size, and their index."""
    state = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    sizes = [tensor.nbytes for tensor in state.values()]
    # Shards are filled in order, so each but the last ends up larger than the limit less the largest tensor.
    split = split_torch_state_dict_into_shards(state, max_shard_size=sum(sizes) // shards + max(sizes))
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it private, and it is to be packaged
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {**model.config.to_dict(), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def samples(model: GPT, seed: int, tokens: int) -> list[dict[str, str]]:
    """What the model makes of each prompt, greedily and drawn at temperature 0.8."""
    device = next(model.parameters()).device
    texts = []
    for prompt in PROMPTS:
        idx = torch.tensor([[SEPARATOR, *encode(prompt)]], device=device)
        torch.manual_seed(seed)
        drawn = model.generate(idx, tokens, temperature=0.8, do_sample=True, top_k=50)
        greedy = model.generate(idx, tokens)
        texts.append({"prompt": prompt, "greedy": decode(greedy[0, 1:]), "drawn": decode(drawn[0, 1:])})
    return texts


def arguments(description: str) -> argparse.ArgumentParser:
    """What every training here asks for; the model's sizes are its script's own."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=8.5, help="time to train, compilation included")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead, whatever time they need")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="this Python's")
    parser.add_argument("--test_share", type=float, default=0.5, help="most of the corpus that may come from tests")
    parser.add_argument("--batch", type=int, default=256, help="crops a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the average of the weights, a step")
    parser.add_argument("--evaluate_every", type=float, default=10, help="seconds")
    parser.add_argument("--sample_tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    return parser


def write_report(args: argparse.Namespace, parameters: int, lengths: dict[str, int], figures: dict[str, Any]) -> None:
    """Write training.json beside the weights, and print its samples and main figures.

    Args:
        args: what the script was called with.
        parameters: the number of the model's parameters.
        lengths: part of the text -> its bytes.
        figures: what was measured, the samples last.
    """
    about: dict[str, Any] = {
        "parameters": parameters,
        "corpus": {
            "source": f"standard library of Python, {args.stdlib.name}",
            "bytes": lengths,
            "validation": VALIDATION,
            "held_out": HELD_OUT,
        },
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "stdlib", "device")},
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine() + " CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **figures,
    }
    (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    for sample in about["samples"]:
        print(f"--- greedy\n{sample['greedy']}\n--- drawn\n{sample['drawn']}")
    print({name: about[name] for name in ("steps", "epochs", "minutes", "kept_step", "bits_per_byte", "device")})


def main() -> None:
    """Train, save, and report the figures of the saved files."""
    parser = arguments(__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--n_layer", type=int, default=0, help="0: the preset pygpt's, as for the next three")
    parser.add_argument("--n_head", type=int, default=0)
    parser.add_argument("--n_embd", type=int, default=0)
    parser.add_argument("--block_size", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--shards", type=int, default=4, help="files")
    args = parser.parse_args()

    dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), args.dropout)
    sizes = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    config = replace(GPTConfig("pygpt"), **sizes, **dropout).resolved()
    train_bytes, validation, held_out = corpus(args.stdlib, args.test_share, args.seed)
    parameters = sum(p.numel() for p in GPT(config).parameters())
    lengths = {"train": len(train_bytes), "validation": len(validation), "held_out": len(held_out.encode())}
    print(f"{parameters:,} parameters; bytes: {lengths}", flush=True)

    torch.manual_seed(args.seed)
    model, figures = train(args, GPT(config), train_bytes, validation)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.out, args.shards)  # type: ignore[arg-type]
    (args.out / "heldout.txt").write_text(held_out, encoding="utf-8", newline="\n")

    saved = load_gpt(args.out, args.device)
    figures["bits_per_byte"]["held_out"] = round(math.log2(perplexity(saved, held_out)), 4)
    figures["samples"] = samples(saved, args.seed, args.sample_tokens)
    write_report(args, parameters, lengths, figures)


if __name__ == "__main__":
    main()
