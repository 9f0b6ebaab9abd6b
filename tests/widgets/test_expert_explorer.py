"""An explorer of experts follows its controls; its code, export and `repr` say what is shown."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from bigkit.machine.mixture import Mixture
from bigkit.machine.routing import POLICIES, Routing
from bigkit.widgets import ExpertExplorer
from bigkit.widgets._explorer import LONGEST_REPR
from bigkit.widgets.expert_explorer import DISK, PRESETS, RAM
from bigkit.zoo import catalog


def looks(explorer):
    return explorer.picture.value, explorer.text.value, explorer.verdict.value, repr(explorer)


@pytest.fixture(scope="module")
def shared():
    return ExpertExplorer()


@pytest.fixture
def explorer(shared):
    shared.reset()
    shared.panes.selected_index = None
    return shared


def test_something_shows_before_anything_is_touched(explorer):
    svg = ElementTree.fromstring(explorer.picture.value)
    assert svg.get("role") == "img" and "pymoe, token 1 of 512" in svg.get("aria-label")
    assert explorer.error.value == "" and explorer.preset.value == "pymoe, a quarter on the GPU"
    assert "Only an example" not in explorer.verdict.value, "the bytes are those of the recorded model"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(explorer, preset):
    explorer.preset.value = preset
    assert explorer.error.value == "" and explorer.preset.value == preset
    wanted = PRESETS[preset]
    mixture = Mixture.of(catalog.specs(wanted["model"])["full"])
    assert explorer.scene.mixture == mixture
    assert ("Only an example" in explorer.verdict.value) == (wanted["model"] != "pymoe")
    assert ("disk" in explorer.scene.times["LRU"].waits) == (wanted["rests"] == DISK) != explorer.disk.disabled
    room = 82e9 if "H100" in preset or "disk" in preset else 26e9
    assert explorer.scene.times["LRU"].cache + mixture.resident < room, "the cache fits on the GPU"
    assert len(repr(explorer)) <= LONGEST_REPR and repr(explorer).count("token 1 of 512") == 1


def test_turning_each_control_and_reset(explorer):
    start = looks(explorer)
    for control, value in (
        (explorer.token, 77), (explorer.policy, "static"), (explorer.cache, 60), (explorer.model, "mixtral-8x7b"),
        (explorer.dtype, "float32"), (explorer.link, 12.0), (explorer.memory, 500.0), (explorer.rests, DISK),
        (explorer.disk, 1.5), (explorer.rests, RAM), (explorer.preset, "gpt-oss-120b, RTX 4090"),
    ):  # fmt: skip
        before = looks(explorer)
        control.value = value
        assert explorer.error.value == "", control.description
        assert explorer.picture.value != before[0] and looks(explorer)[1] != before[1], control.description
    explorer.buttons.children[0].click()
    assert looks(explorer) == start


def test_a_larger_cache_is_never_slower(explorer):
    for policy in POLICIES:
        explorer.policy.value = policy
        times = []
        for explorer.cache.value in (0, 10, 25, 50, 75, 100):
            times.append(explorer.scene.times[policy].seconds)
            assert times[-1] >= explorer.scene.times["best"].seconds
        assert times == sorted(times, reverse=True) and (times[0] > times[-1]) == (policy != "none")


@pytest.mark.parametrize("name", ["llama-2-7b", "no-such-model", ""])
def test_a_model_without_experts_is_one_sentence(explorer, name):
    before = looks(explorer)
    explorer.model.value = name
    assert 'role="alert"' in explorer.error.value and "Traceback" not in explorer.error.value
    assert looks(explorer) == before
    explorer.reset()
    assert explorer.error.value == ""


def test_code_and_export_give_the_same(explorer, tmp_path):
    for preset in ("pymoe, a quarter on the GPU", "DeepSeek-V3, from disk"):
        explorer.preset.value, explorer.policy.value = preset, "best"
        scope = {}
        exec(explorer.to_code(), scope)
        assert scope["found"] == explorer.scene.times["best"]
        content = json.loads(explorer.export(tmp_path / "experts.json").read_text())
        assert content["model"] == explorer.model.value and len(content["chosen"]) == 12
        assert content["policies"]["best"]["seconds"] == scope["found"].seconds
    ElementTree.parse(explorer.export(tmp_path / "experts.svg"))
    for i, part in enumerate(("token_time", "Download")):
        explorer.panes.selected_index = i
        assert part in explorer.panes.children[i].value


def test_a_routing_of_your_own(tmp_path, monkeypatch):
    routing = Routing("mine <i>", 4, (((0, 1), (0, 2), (0, 1)), ((3, 2), (3, 1), (0, 3))))
    explorer = ExpertExplorer(policy="best", routing=routing)
    assert explorer.token.max == 3 and explorer.slots == 2 and "Only an example" in explorer.verdict.value
    assert "<i>" not in explorer.verdict.value + explorer.text.value
    monkeypatch.chdir(tmp_path)
    routing.save("routing.json")
    scope = {}
    exec(explorer.to_code(), scope)
    assert scope["found"] == explorer.scene.times["best"]


def test_what_does_not_exist_is_said():
    with pytest.raises(ValueError, match="unknown policy 'LFU'"):
        ExpertExplorer(policy="LFU")
    with pytest.raises(ValueError, match="unknown preset"):
        ExpertExplorer("a mainframe")
