"""Make the layer tables that ship with bigkit: build each shipped model for real, without memory, and record it.

    python scripts/make_tables.py            all of them
    python scripts/make_tables.py gpt2 t5-large

Each table is one JSON file in bigkit/zoo/tables. Needs transformers and timm. Leaves out: the configs, which are facts
taken from the models' public config.json files.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from bigkit.zoo import build, catalog


def table(entry: catalog.Entry) -> dict[str, Any]:
    """The layer table of one shipped model, from its real classes."""
    config = catalog.config(entry)
    specs = {}
    for key, base in (("base", True), ("full", False)):
        specs[key] = build.spec_of(build.build(config, base=base, dtype=None), entry.name, config)
    return catalog.specs_to_json(specs)


def to_text(table: dict[str, Any]) -> str:
    """JSON with one line for each model and module, so that a change of class shows as a small diff."""

    def line(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    models = ",\n".join(f"  {line(key)}: {line(value)}" for key, value in table["models"].items())
    modules = ",\n".join(f"  {line(node)}" for node in table["modules"])
    return f'{{\n "format": {table["format"]},\n "models": {{\n{models}\n }},\n "modules": [\n{modules}\n ]\n}}\n'


def main(chosen: list[str]) -> None:
    """Write the tables of the chosen models, or of all."""
    for entry in catalog.ENTRIES:
        if not chosen or entry.name in chosen:
            text = to_text(table(entry))
            catalog.table_path(entry).write_text(text, encoding="utf-8")
            print(f"{entry.name:45} {len(text):7,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
