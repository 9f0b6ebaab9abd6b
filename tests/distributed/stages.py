"""Small models over the ranks of a group, and what they answer: used by the tests of pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.meta.test_cache import DECODERS, build

PADDED = [[0, 0, 0, 7, 11, 5], [3, 9, 2, 4, 8, 6]]  # two prompts of unlike length, padded at the left


def hosts(count: int) -> list[Any]:
    from bigkit.machine.hardware import Hardware

    return [Hardware(f"host {i}", (), 2**32, 2**40) for i in range(count)]


def saved(family: str, folder: Path) -> Path:
    """The checkpoint of a small model with random weights."""
    torch.manual_seed(0)
    path = folder / family.replace(", ", "-")
    build(*DECODERS[family], torch.float32).save_pretrained(path)
    return path


def empty(family: str) -> Any:
    from bigkit import init_empty_weights

    if family == "pygpt":
        from bigkit.zoo.gpt import GPT, GPTConfig

        with init_empty_weights():
            return GPT(GPTConfig("pygpt"))
    if family == "pymoe":
        import transformers as tf

        from bigkit.zoo.gpt import PYMOE

        with init_empty_weights():
            return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(PYMOE))
    with init_empty_weights():
        return build(*DECODERS[family], torch.float32)


def staged(state: Any, family: str, folder: Path, *, config: Any = None, dtype: str | None = "float32", **options: Any) -> Any:
    """A model over all ranks, cut evenly."""
    from bigkit import pipeline, plan_hosts

    model = empty(family)
    kind = None if config is None else config.quantization
    plan = plan_hosts(model, hosts(state.num_processes), dtype=dtype, quantization=kind)
    return pipeline(model, folder, plan, config, **({} if config else {"dtype": dtype}), **options).eval()


def answers(model: Any) -> dict[str, Any]:
    """What a model of Transformers says, in the ways that it can be asked."""
    ids, mask = torch.tensor(PADDED), torch.tensor(PADDED).ne(0).long()
    padded = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    said = {"greedy": model.generate(ids, do_sample=False, **padded)}
    torch.manual_seed(1)
    said["sampled"] = model.generate(ids, do_sample=True, top_k=20, temperature=1.5, **padded)
    said["logits"] = model(ids, attention_mask=mask).logits
    return said
