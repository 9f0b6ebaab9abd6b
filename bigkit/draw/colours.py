"""The colours of all pictures: the palette of Okabe and Ito, which colour-blind readers can tell apart, and greys.

Where two colours could still be mistaken for each other, there is a hatch or a label too.
"""

from __future__ import annotations

from ..devices import Device

# Source: Okabe and Ito, Color Universal Design, https://jfly.uni-koeln.de/color/
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
WHITE, TRACK, PALE, GREY, DARK, SOFT = "#FFFFFF", "#EEEEEE", "#D9D9D9", "#B8B8B8", "#555555", "#333333"

GPU_COLOURS = (BLUE, SKY, GREEN, PURPLE)  # in turn: neighbours always differ


def device_colour(device: Device) -> str:
    """The colour of a device: the GPUs take four in turn, RAM is grey and disk pale."""
    return GPU_COLOURS[device % 4] if isinstance(device, int) else {"cpu": GREY, "disk": PALE}.get(device, BLUE)


def ink(ground: str) -> str:
    """Black or white, whichever reads better on a colour."""
    return WHITE if ground in (BLACK, BLUE, DARK, SOFT) else BLACK
