"""Small models over the ranks of a group, and what they answer: used by the tests of pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.meta.test_cache import DECODERS, HYBRIDS, build

FAMILIES = {**DECODERS, **HYBRIDS}
PADDED = [[0, 0, 0, 7, 11, 5], [3, 9, 2, 4, 8, 6]]  # two prompts of unlike length, padded at the left


def hosts(count: int) -> list[Any]:
    from bigkit.machine.hardware import Hardware

    return [Hardware(f"host {i}", (), 2**32, 2**40) for i in range(count)]


def empty(family: str) -> Any:
    import transformers as tf

    from bigkit import init_empty_weights
    from bigkit.zoo.gpt import GPT, PYMOE, GPTConfig

    with init_empty_weights():
        if family == "pygpt":
            return GPT(GPTConfig("pygpt"))
        if family == "pymoe":
            return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(PYMOE))
        return build(*FAMILIES[family], torch.float32)


def saved(family: str, folder: Path) -> Path:
    """The checkpoint of a small model with random weights."""
    torch.manual_seed(0)
    path = folder / family.replace(", ", "-")
    if family in FAMILIES:
        build(*FAMILIES[family], torch.float32).save_pretrained(path)
    else:  # of the shape of one that ships
        from bigkit import save_model

        model = empty(family).to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                torch.nn.init.normal_(tensor, 0, 0.05)
        save_model(model, path)
        if hasattr(model.config, "save_pretrained"):
            model.config.save_pretrained(path)
    return path


def staged(state: Any, family: str, folder: Path, config: Any = None, plan: Any = None, **options: Any) -> Any:
    """A model over all ranks, cut evenly, in float32."""
    from bigkit import pipeline, plan_hosts

    model = empty(family)
    kind = None if config is None else config.quantization
    plan = plan or plan_hosts(model, hosts(state.num_processes), dtype="float32", quantization=kind)
    return pipeline(model, folder, plan, config, **options).eval()


def answers(model: Any, device: str = "cpu") -> dict[str, Any]:
    """What a model of Transformers says, in the ways that it can be asked, on the CPU."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AtLength(StoppingCriteria):
        """The first sequence may have 8 tokens, the second 10."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= 8, input_ids.shape[1] >= 10], device=input_ids.device)

    ids = torch.tensor(PADDED, device=device)
    mask = ids.ne(0).long()
    if not hasattr(model, "generate"):
        return {"hidden states": model(ids, attention_mask=mask).last_hidden_state.detach().cpu()}
    padded: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    said = {"greedy": model.generate(ids, **padded)}
    torch.manual_seed(1)
    said["sampled"] = model.generate(ids, **{**padded, "do_sample": True, "top_k": 20, "temperature": 1.5})
    said["static"] = model.generate(ids, **padded, cache_implementation="static", disable_compile=True)
    said["no cache"] = model.generate(ids, **padded, use_cache=False)
    said["penalty"] = model.generate(ids, **padded, repetition_penalty=1.3)
    ends = [int(said["greedy"][0, 7]), int(said["greedy"][1, 9])]  # one sequence ends before the other
    said["early stop"] = model.generate(ids, **padded, eos_token_id=ends)
    said["stopped"] = model.generate(ids, **padded, stopping_criteria=StoppingCriteriaList([AtLength()]))
    said["logits"] = model(ids, attention_mask=mask).logits.detach()
    return {way: answer.cpu() for way, answer in said.items()}


def unlike(model: Any, expected: dict[str, Any], device: str = "cpu") -> list[str]:
    """Which answers differ from those of the whole model."""
    said = answers(model, device)
    return [way for way in expected if not torch.equal(said[way], expected[way])]
