"""What everybody can read and reach: contrast, labels of pictures, names of controls."""

import importlib.util
import re

import ipywidgets
import pytest

from bigkit import widgets
from bigkit.draw import colours as draw
from bigkit.widgets import _html
from bigkit.widgets._controls import Number

COLOURS = {
    name: value for name, value in vars(draw).items() if name.isupper() and re.match("#[0-9A-F]{6}$", str(value))
}
EXPLORERS = [
    name
    for name in widgets.__all__
    if name != "QuantizationLab" or importlib.util.find_spec("bitsandbytes") is not None
]


def luminance(colour):
    """WCAG 2.2, relative luminance."""
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    """WCAG 2.2: 1 to 21; 4.5 is what text of this size needs."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_as_wcag_has_it():
    assert contrast("#000000", "#FFF") == pytest.approx(21) and contrast("#777777", "#FFFFFF") == pytest.approx(
        4.48, abs=0.01
    )


@pytest.mark.parametrize("name", COLOURS)
def test_text_on_a_colour_is_read(name):
    ground = COLOURS[name]
    assert contrast(draw.ink(ground), ground) >= 4.5


def test_text_beside_the_bars_and_in_the_verdict_is_read():
    assert len(COLOURS) >= 12
    for ground in ("#FFFFFF", draw.TRACK):  # pictures have a ground of their own in both themes
        assert contrast("#333333", ground) >= 4.5
    for ground, edge in _html.PILLS.values():
        assert contrast("#111", ground) >= 4.5 and contrast(edge, "#111111") >= 3, "an edge is seen on a dark page"


@pytest.fixture(scope="module", params=EXPLORERS)
def explorer(request):
    small = {"model": "pygpt", "batch": 1, "prompt": 16, "new": 1} if request.param == "DryRunExplorer" else {}
    return getattr(widgets, request.param)(**small)


def test_a_picture_is_announced(explorer):
    pictures = re.findall(r"<svg[^>]*>", explorer.picture.value)
    assert pictures
    for picture in pictures:
        assert 'role="img"' in picture
        label = re.search(r'aria-label="([^"]*)"', picture)[1]
        assert len(label) > 40 and re.search(r"\d", label), "a label tells the figures"
    assert re.search(r'role="(status|alert)"', explorer.verdict.value)
    assert re.search(r"\d", explorer.text.value) and 'tabindex="0"' in explorer.text.value


def test_each_control_has_a_name(explorer):
    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    controls = [w for w in walk(explorer) if isinstance(w, ipywidgets.DOMWidget) and w.has_trait("value")]
    numbers = [w for w in walk(explorer) if isinstance(w, Number)]
    inside = [explorer.picture, *(w.slider for w in numbers)]  # touch.js names both, in the browser
    controls = [w for w in controls if not isinstance(w, ipywidgets.HTML) and w not in inside]
    assert all(number.entry.description for number in numbers)
    assert len(controls) > 2
    for control in controls:
        name = getattr(control, "description", "") or getattr(control, "tooltip", "")
        assert name or isinstance(control, (ipywidgets.Play, ipywidgets.ToggleButtons)), type(control).__name__
    for button in (w for w in walk(explorer) if isinstance(w, ipywidgets.Button)):
        assert button.description and button.tooltip, "a button says what it does"
