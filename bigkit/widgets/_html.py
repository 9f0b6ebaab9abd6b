"""Pieces of HTML that explorers show; all text from outside is escaped here."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence

from ..devices import Device, device_label
from ..draw.colours import GREEN, ORANGE, VERMILLION
from ..draw.plan import PARTS
from ..maps.plan import Share
from ..units import format_bytes

PILLS = {"good": ("#DDF3EA", GREEN), "slow": ("#FFF1D6", ORANGE), "bad": ("#FBE3D6", VERMILLION)}  # ground and edge
MONO = "margin:0;font:11.5px/1.4 ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre"


def preformatted(text: str, wrap: bool = False) -> str:
    """Plain text as HTML that keeps its columns; lines that are too long scroll, or wrap."""
    style = f"{MONO}-wrap" if wrap else f"{MONO};overflow:auto"
    return f'<pre tabindex="0" style="{style}">{html.escape(text)}</pre>'


def map_table(device_map: Mapping[str, Device]) -> str:
    """A device map as an HTML table."""
    rows = "".join(
        f"<tr><td>{html.escape(name) or 'the whole model'}</td><td>{html.escape(repr(device))}</td>"
        f"<td>{html.escape(device_label(device))}</td></tr>"
        for name, device in device_map.items()
    )
    table = f"<table><tr><th>module</th><th>device</th><th></th></tr>{rows}</table>"
    return f'<div style="max-height:300px;overflow:auto;line-height:1.2" tabindex="0">{table}</div>'


def device_table(headline: str, share: Share, layers: Sequence[tuple[str, str, int]]) -> str:
    """What a device holds: its parts, and its layers with class and bytes."""
    parts = [(name, "", getattr(share, part)) for part, name in PARTS.items() if getattr(share, part)]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(about)}</td><td>{format_bytes(size)}</td></tr>"
        for name, about, size in [*parts, *layers]
    )
    table = f'<div style="max-height:220px;overflow:auto;line-height:1.2" tabindex="0"><table>{rows}</table></div>'
    return f'<div role="status" style="line-height:1.4;padding:4px 0">{html.escape(headline)}</div>{table}'


def pill(news: str, headline: str, rest: str = "", role: str = "status") -> str:
    """A line of news ("good", "slow" or "bad"), which a screen reader says when it changes."""
    ground, edge = PILLS[news]
    style = f"--edge:{edge};background:{ground};border-left:4px solid {edge};color:#111;padding:4px 10px"
    words = f"<b>{html.escape(headline)}</b> {html.escape(rest)}"
    return f'<div role="{role}" class="bigkit-pill" style="{style};line-height:1.4;white-space:normal">{words}</div>'


def still(svg: str) -> str:
    """An SVG element as an image that cannot be touched.

    JupyterLab shows neither SVG nor scripts of a notebook that was not run here; GitHub and nbviewer show images too.
    """
    label = re.search('aria-label="([^"]*)"', svg)
    content = base64.b64encode(re.sub(r"(?s)<g class=.marks.*</g>\n", "", svg).encode()).decode()
    return f'<img width="720" alt="{label[1] if label else ""}" src="data:image/svg+xml;base64,{content}">'


def short(text: str, length: int = 30) -> str:
    """A name cut to fit a `repr`.

    >>> short("a" * 40, 10)
    'aaaaaaaaa…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"
