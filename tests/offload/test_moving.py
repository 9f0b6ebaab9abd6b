"""What others do with a spread model as a whole."""

import copy
import pickle
import warnings

import pytest
import torch

from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.hooks import remove_hook_from_module
from bigkit.offload.one_place import disk_offload
from tests.spread import STAND_IN, Net, same, spread

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
TWO_GPUS = {"scale": 0, "h.0": 0, "h.1": 0, "h.2": 1, "h.3": 1, "out": 1}

CASTS = {
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to a dtype": lambda model: model.to(torch.float64),
    "to the CPU": lambda model: model.to("cpu"),
    "to a device and a dtype": lambda model: model.to("cpu", torch.bfloat16),
    "to the type of another": lambda model: model.to(torch.zeros(1).double()),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("places", [TWO_GPUS, {"": 0}, {"": "cpu"}], ids=["two GPUs", "one", "CPU"])
def test_what_lies_where_it_works_is_cast(cast, places):
    model = Net()
    parts = spread(copy.deepcopy(model), places, force_hooks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cast(parts) is parts
    expected = cast(model)
    x = X.to(model.scale.dtype)
    assert same(parts(x), expected(x))
    assert same(pickle.loads(pickle.dumps(parts))(x), expected(x)) and same(copy.deepcopy(parts)(x), expected(x))
    remove_hook_from_module(parts, recurse=True).float()


def test_a_move_is_said_to_leave_the_hooks():
    parts = spread(Net(), TWO_GPUS)
    with pytest.warns(UserWarning, match="was moved, but its hooks still send inputs to the devices") as seen:
        parts.to("meta")
    assert seen[0].filename == __file__ and parts.scale.is_meta


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_what_rests_elsewhere_is_not_cast(cast, tmp_path):
    for places in ({**TWO_GPUS, "h.1": "cpu"}, {"": "disk"}):
        parts = spread(Net(), places, offload_dir=tmp_path)
        with pytest.raises(RuntimeError, match=r"cannot be moved or cast as a whole: call bigkit\.remove_hook"):
            cast(parts)


MAPS = {
    "disk": {"": "disk"},
    "disk by module": {"model": "disk", "lm_head": "disk"},
    "disk first": {"model": "disk", "lm_head": 0},
    "disk in the middle": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": 0,
                           "model.rotary_emb": 0, "lm_head": "disk"},
}  # fmt: skip


@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
def test_a_pipeline_runs_whatever_the_map_begins_with(places, tmp_path):
    import transformers
    from tokenizers import Tokenizer, models

    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w99"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w99", pad_token="w0")
    model = transformers.LlamaForCausalLM(config).eval()
    parts = dispatch_model(copy.deepcopy(model), places, offload_dir=tmp_path, stand_in=STAND_IN)
    answers = [
        transformers.pipeline("text-generation", model=each, tokenizer=tokenizer)(
            "w5", max_new_tokens=3, do_sample=False
        )
        for each in (model, parts)
    ]
    assert answers[0] == answers[1]
    assert parts.hf_device_map == places and next(iter(parts.hf_device_map.values())) != "disk"
    again = dispatch_model(parts, parts.hf_device_map, offload_dir=tmp_path, stand_in=STAND_IN)
    assert again.hf_device_map == places


def test_the_map_of_a_model_on_disk_is_the_dict_that_was_given(tmp_path):
    parts = disk_offload(Net(), tmp_path)
    places = parts.hf_device_map
    assert places == {"": "disk"} and [*places.items()] == [("", "disk")] and [*places.values()] == ["cpu", "disk"]
    for copied in (copy.deepcopy(places), pickle.loads(pickle.dumps(places))):
        assert copied == places and [*copied.values()] == [*places.values()]
