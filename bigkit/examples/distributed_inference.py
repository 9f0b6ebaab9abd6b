"""Continue a few prompts with a model, on as many processes as you start.

    bigkit launch --num_processes 2 distributed_inference.py

To use your own: change `load` and `continue_text`. Each process loads the whole model onto its own device.
"""

import torch

from bigkit import PartialState, gather_for_results
from bigkit.zoo.gpt import GPT, decode, encode, load_pygpt

PROMPTS = ["import ", "def __init__(self", "class ", "for i in range("]


def load(device: torch.device) -> GPT:
    """The model on this process's device."""
    return load_pygpt(device, torch.float32)


def continue_text(model: GPT, prompt: str, device: torch.device) -> str:
    """The prompt and 24 more bytes."""
    return decode(model.generate(torch.tensor([encode(prompt)], device=device), 24)[0])


def main() -> None:
    """Split, infer, gather; process 0 prints."""
    state = PartialState()
    with state.main_process_first():  # where a model is downloaded, one process does it and the others find it
        model = load(state.device)
    with state.split_between_processes(PROMPTS) as mine:
        texts = [continue_text(model, prompt, state.device) for prompt in mine]
        print(  # in one piece with its line end, or those of two processes may mix
            f"process {state.process_index} of {state.num_processes} on {state.device}: {len(texts)} prompts\n",
            end="",
            flush=True,
        )
    texts = gather_for_results(texts, len(PROMPTS))
    if state.is_main_process:
        for text in texts:
            print(repr(text))
    state.destroy()


if __name__ == "__main__":
    main()
