"""`Advisor`: what turning a control does."""

import json

from bigkit.widgets import Advisor


def test_controls_change_the_advice_and_reset_brings_it_back(tmp_path):
    advisor = Advisor("llama-2-70b", "1 x RTX 4090")
    first, picture = advisor.advice, advisor.picture.value
    assert 'role="img"' in picture and "tokens/s" in picture and "waiting for" in advisor.verdict.value
    advisor.hardware.value = "8 x H100-80GB"
    assert advisor.advice.best.plan.offloaded == 0 and advisor.picture.value != picture
    advisor.target.value = "memory"
    assert advisor.advice.best.plan.quantization == "nf4-double"
    advisor.reset()
    assert advisor.advice == first and len(repr(advisor)) < 110
    space = {}
    exec(advisor.to_code(), space)
    assert space["advice"] == first
    data = json.loads(advisor.export(tmp_path / "a.json").read_text())
    assert data["options"][0]["token"] == first.best.token
    assert advisor.export(tmp_path / "a.svg").read_text().startswith("<svg")


def test_nothing_fits_and_a_wrong_name_are_said():
    advisor = Advisor("deepseek-v3", "Binder")
    assert "Nothing fits." in advisor.verdict.value and "nothing fits" in repr(advisor)
    advisor.model.value = "no-such-model-at-all"
    assert 'role="alert"' in advisor.error.value
