"""Training a small model on several GPUs: what each of them keeps is what the table's formulas say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"


@pytest.mark.soak  # half a minute
def test_gpus_keep_what_is_foretold(gpus: int, tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    subprocess.run([sys.executable, SCRIPT, "--tiny", "--processes", str(gpus), "--out", out], check=True, timeout=120)
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == ["data parallel", "FSDP", "FSDP, checkpointing"]
    for row in rows:
        assert row["kept"] == pytest.approx(row["predicted_kept"], rel=0.01) and row["rests"] >= row["kept"]
