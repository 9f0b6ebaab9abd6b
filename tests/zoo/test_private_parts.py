"""What `bigkit.zoo._transformers` takes from Transformers is there; if not, that file is the place to change."""

import pytest

from bigkit.zoo import _transformers

transformers = pytest.importorskip("transformers")
WHERE = f"in Transformers {transformers.__version__}: see bigkit/zoo/_transformers.py"


def test_transformers():
    assert hasattr(transformers.PreTrainedModel, "_from_config"), f"PreTrainedModel._from_config is gone {WHERE}"
    assert hasattr(transformers.AutoModelForCausalLM, "_model_mapping"), f"AutoModel..._model_mapping is gone {WHERE}"
    settings = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    assert _transformers.builds(transformers.AutoModelForCausalLM, settings)
    assert not _transformers.builds(transformers.AutoModelForSeq2SeqLM, settings)
    model = _transformers.from_config(transformers.GPT2LMHeadModel, settings, None)
    assert type(model) is transformers.GPT2LMHeadModel
