"""What this wing uses of PyTorch and Transformers without a public name is there, and does what it is used for."""

from __future__ import annotations

import inspect
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ranks import Ranks


def test_the_store_of_the_group_can_be_had() -> None:
    def count(state: object) -> int:
        from bigkit.distributed import _torch

        try:
            return int(_torch.default_store().add("bigkit-test", 1))
        except (AttributeError, TypeError) as error:
            raise AssertionError("torch gives its group's store no more: map_file needs another counter") from error

    group = Ranks(2)
    assert sorted(group(count)) == [1, 2]
    group.close()


def test_a_failure_reaches_torchruns_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigkit.distributed import _torch

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    _torch.record_failure(ValueError("no prompt for me"))
    written = tmp_path / "error.json"
    assert written.exists(), "torch's error handler wrote no file: torchrun's summary would not name the root cause"
    assert "ValueError: no prompt for me" in json.loads(written.read_text())["message"]["extraInfo"]["py_callstack"]


def test_processes_still_meet_at_the_launchers_store() -> None:
    from bigkit.distributed import _torch

    source = Path(str(find_spec("torch.distributed.rendezvous").origin)).read_text()  # type: ignore[union-attr]
    name = next(iter(_torch.MEET_AT_THE_LAUNCHER))
    assert name in source, f"torch reads {name} no more: notebook_launcher's processes would open a store of their own"


def test_generate_still_draws_in_a_loop_that_can_be_called() -> None:
    """`tests/distributed/test_pipeline.py` compares what it draws; here is what would be missing."""
    from transformers import GenerationMixin

    expected = ["self", "input_ids", "logits_processor", "stopping_criteria", "generation_config"]
    found = [*inspect.signature(GenerationMixin._sample).parameters][:5]
    assert found == expected, "the loop takes other arguments: see distributed/_transformers.py"
    assert "custom_generate" in inspect.signature(GenerationMixin.generate).parameters, (
        "generate takes no loop any more"
    )
    source = inspect.getsource(GenerationMixin._prepare_special_tokens)
    assert "_pad_token_tensor" in source, "generate keeps its padding token elsewhere"
