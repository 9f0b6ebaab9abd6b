"""Names of devices and of modules: one spelling for "cuda:1" and 1, dotted names, and maps from one to the other.

Leaves out: which layer goes to which device (`maps/`), and everything that needs a real device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

Device = int | str  # a GPU's number, "mps", "cpu" or "disk"


def join(prefix: str, own: str) -> str:
    """The name of a part within a module: "h.0" and "attn" give "h.0.attn", "" and "h" give "h".

    >>> join("h.0", "attn"), join("", "h"), join("h", "")
    ('h.0.attn', 'h', 'h')
    """
    return f"{prefix}.{own}" if prefix and own else prefix or own


def prefixes(name: str) -> list[str]:
    """The names of all modules around `name`, outermost first, then `name` itself.

    >>> prefixes("h.0.attn")
    ['', 'h', 'h.0', 'h.0.attn']
    """
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def collapse(placed: Mapping[str, Device]) -> dict[str, Device]:
    """Merge entries whose whole module lies on one device: {"h.0": 0, "h.1": 0, "head": 1} -> {"h": 0, "head": 1}.

    A model on a single device becomes {"": device}. One pass over the names: linear in their number.
    """
    devices: dict[str, set[Device]] = {}
    for name, device in placed.items():
        for prefix in prefixes(name):
            devices.setdefault(prefix, set()).add(device)
    short: dict[str, Device] = {}
    for name, device in placed.items():
        short[next(prefix for prefix in prefixes(name) if len(devices[prefix]) == 1)] = device
    return short


def device_label(device: Device) -> str:
    """What a sentence calls a device: "GPU 0", "RAM", "disk"."""
    return f"GPU {device}" if isinstance(device, int) else {"cpu": "RAM", "mps": "MPS"}.get(device, device)


def read_device(device: object) -> Device:
    """A device as plans name it: 1, numpy's 1, "1", "cuda:1" and torch.device("cuda:1") are 1; "cuda" is 0.

    Raises:
        ValueError: it is no GPU number, "mps", "cpu" or "disk".
    """
    text = str(device)
    kind, _, number = text.partition(":")
    if isinstance(device, Integral) and not isinstance(device, bool) and int(device) >= 0 or text.isdecimal():
        return int(text)
    if kind == "cuda" and (number.isdigit() or not number):
        return int(number or 0)
    if kind in ("mps", "cpu", "disk") and number in ("", "0"):
        return kind
    raise ValueError(f"unknown device {device!r}: expected a GPU number, 'cuda:N', 'mps', 'cpu' or 'disk'")


def whole_on(device_map: Any) -> Any:
    """The map that a single device stands for: "cpu", 0 or torch.device("cuda:1"); anything else as it is.

    >>> whole_on("cuda:1"), whole_on("auto")
    ({'': 1}, 'auto')
    """
    if device_map is None or isinstance(device_map, Mapping):
        return device_map
    try:
        return {"": read_device(device_map)}
    except ValueError:
        return device_map


def placement(device_map: Mapping[str, Device] | None) -> Callable[[str], Any]:
    """A function from the name of a module or tensor to the device of the innermost entry around it, or to None.

    >>> device_of = placement({"": "cpu", "h.0": 1})
    >>> device_of("h.0.attn.weight"), device_of("h.1")
    (1, 'cpu')
    """
    devices = {name: read_device(device) for name, device in (device_map or {}).items()}

    def device_of(name: str) -> Any:
        while name and name not in devices:
            name = name.rpartition(".")[0]
        return devices.get(name)

    return device_of
