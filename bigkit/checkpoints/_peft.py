"""What is private in peft and looked into: which weights an adapter is about to be put on.

peft looks for `target_parameters` among the parameters of each module, by name. A weight that is stored in few bits is
no parameter (its codes are), so peft would not find it, or take its codes for it, and put on the rest of the adapter.

Seen in peft 0.17 to 0.21; `tests/checkpoints/test_as_stored.py` fails when the names below are gone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable


def refuse_adapters_on(decoded: Iterable[str]) -> None:
    """Refuse an adapter on weights of a module that are stored in few bits. Call it where a module is asked for its own
    parameters. Reads `peft_config`, and the module's name, of the functions that ask (`BaseTuner.inject_adapter` and
    `_inject_parameters`). What "all-linear" means for a mixture is among `target_parameters`, too.

    Args:
        decoded: own names of the weights.

    Raises:
        ValueError: the asker is peft, and its `target_parameters` name one of them.
    """
    asker = sys._getframe(2).f_locals
    wanted = getattr(asker.get("peft_config"), "target_parameters", None)
    for name in decoded if wanted else ():
        full = f".{asker.get('module_name', asker.get('key', ''))}.{name}"
        if any(full.endswith(f".{target}") for target in wanted or ()):
            raise ValueError(
                f"an adapter's target_parameters (or 'all-linear') name {full[1:]!r}, which is stored in few bits and "
                "is no parameter: load it whole (keep='dense', or skip_modules where bigkit quantizes), or choose "
                "target_modules without it"
            )
