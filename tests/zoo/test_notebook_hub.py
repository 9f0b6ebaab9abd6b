"""Notebook 08 where the Hub answers: the same cells run on the checkpoint that it serves, with its tokenizer.

The Hub is one on this machine, and the checkpoint a few small blocks in the layout of the real one: pickles in shards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from bigkit.checkpoints.save import save_model
from bigkit.zoo.gpt import GPT, GPTConfig
from tests.hub_server import FakeHub

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "08-gpt2-xl-from-empty-to-text.ipynb"
SIZES = {"n_layer": 12, "n_head": 2, "n_embd": 32, "vocab_size": 300, "block_size": 128}


def tokenizer_files(folder: Path) -> None:
    """GPT-2's tokenizer without merges: a token for each byte, under the letter that GPT-2 writes for it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [*map(chr, plain), *(chr(256 + i) for i in range(len(others)))]
    folder.mkdir()
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def cells_before_the_exercises() -> str:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    end = next(i for i, cell in enumerate(cells) if "## Exercises" in "".join(cell["source"]))
    code = ["".join(cell["source"]) for cell in cells[:end] if cell["cell_type"] == "code"]
    code = [text.replace("%matplotlib inline\n", "") for text in code]
    return "\n\n".join([TransformerManager().transform_cell(text) for text in code])


def test_where_the_hub_answers_it_is_that_checkpoint(tmp_path: Path) -> None:
    save_model(GPT(GPTConfig(**SIZES)), tmp_path / "xl", "100KB", safe_serialization=False)
    tokenizer_files(tmp_path / "gpt2")
    script = tmp_path / "run.py"
    small = f"from bigkit.zoo import gpt\ngpt.PRESETS['gpt2-xl'] = {SIZES}\n"
    script.write_text(small + cells_before_the_exercises())
    with FakeHub() as hub:
        hub.add("marcsun13/gpt2-xl-linear-sharded", tmp_path / "xl")
        hub.add("gpt2", tmp_path / "gpt2")
        hub.add("openai-community/gpt2", tmp_path / "gpt2")
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                       "MPLBACKEND": "Agg"}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script)], env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "running gpt2-xl" in done.stdout and "Which name is also used" in done.stdout
    assert any("pytorch_model" in request.path and request.sent for request in hub.requests)
