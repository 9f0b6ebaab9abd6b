"""Draw the picture of the README, notebooks/images/plan.svg: the first state of an explorer, which is always the same.

.venv/bin/python scripts/draw_readme.py
"""

from __future__ import annotations

from pathlib import Path

from bigkit.widgets import PlanExplorer

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "images" / "plan.svg"
MEMORY = {0: "24GiB", 1: "24GiB", "cpu": "64GiB", "disk": 0}


def main() -> None:
    """Write the picture, and say what it shows."""
    explorer = PlanExplorer("mixtral-8x7b", MEMORY, context=8192, overhead="512MiB")
    PATH.parent.mkdir(exist_ok=True)
    print(f"{explorer.export(PATH).name}: {explorer}")


if __name__ == "__main__":
    main()
