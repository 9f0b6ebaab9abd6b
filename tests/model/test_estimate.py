"""The estimate: to the digit what accelerate counts, and what the article that this project starts from printed."""

import json

import pytest
import torch
import transformers
from packaging.version import Version

from bigkit import dry_run, estimate_memory, init_empty_weights, zoo
from bigkit.api import describe
from bigkit.model.activations import working_bytes
from bigkit.model.precision import Precision
from bigkit.units import format_bytes

ARTICLE = {  # dtype: largest layer, total size, training
    "bert-base-cased": {
        "float32": ("84.95 MB", "413.18 MB", "1.61 GB"),
        "float16": ("42.47 MB", "206.59 MB", "826.36 MB"),
        "int8": ("21.24 MB", "103.29 MB", "413.18 MB"),
        "int4": ("10.62 MB", "51.65 MB", "206.59 MB"),
    },
    "resnet50.a1_in1k": {"float32": ("9.0 MB", "97.7 MB", "390.78 MB")},
}


def texts(row):
    return tuple(format_bytes(size, "classic") for size in (row.largest_layer, row.total_size, row.training))


def test_the_articles_table():
    bert = estimate_memory("bert-base-cased")
    for row in bert.rows:
        layer, total, training = ARTICLE["bert-base-cased"][row.dtype]
        assert texts(row)[1:] == (total, training)
        assert format_bytes(row.largest_module, "classic") == layer  # the word embeddings alone
    # Transformers now keeps the three embeddings of BERT on one device, which makes them the largest layer.
    assert texts(bert.rows[0])[0] == "86.47 MB" and bert.largest_layer_name == "embeddings"
    assert texts(estimate_memory("resnet50.a1_in1k").rows[0]) == ARTICLE["resnet50.a1_in1k"]["float32"]
    idefics = estimate_memory("HuggingFaceM4/idefics-80b-instruct")
    assert texts(idefics.rows[0])[0] == "3.02 GB"
    assert idefics.rows[0].total_size / 2**30 == pytest.approx(297.12, rel=2e-3)


@pytest.mark.parametrize("name", zoo.names())
def test_classic_sizes_are_accelerates(name):
    from accelerate.utils import calculate_maximum_sizes

    if name == "idefics-80b-instruct" and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("it has other buffers in older Transformers")
    total, (largest, _) = calculate_maximum_sizes(zoo.empty_model(name, base=True))
    row = estimate_memory(name).rows[0]
    assert (row.total_size, row.largest_layer) == (int(total), int(largest))


MORE = ["albert", "bart", "clip", "deberta-v2", "distilbert", "electra", "falcon", "gpt_neo", "gpt_neox", "gptj",
        "llama",
        "mamba", "mpt", "opt", "phi", "qwen2", "qwen2_moe", "roberta", "starcoder2", "swin", "whisper",
        "xlm-roberta"]  # fmt: skip


@pytest.mark.parametrize("model_type", MORE)
def test_other_classes_of_transformers_too(model_type):
    from accelerate.utils import calculate_maximum_sizes
    from transformers import CONFIG_MAPPING, AutoModel

    from bigkit import init_empty_weights

    with init_empty_weights():
        model = AutoModel.from_config(CONFIG_MAPPING[model_type]())
    total, (largest, names) = calculate_maximum_sizes(model)
    found = estimate_memory(model)
    assert (found.rows[0].total_size, found.rows[0].largest_layer) == (int(total), int(largest))
    assert found.largest_layer_name in names


def test_a_weight_on_a_module_with_children_is_a_layer_too():
    """Accelerate looks for the largest layer among modules without children alone and overlooks such a weight."""
    from accelerate.utils import calculate_maximum_sizes
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    from bigkit import init_empty_weights

    with init_empty_weights():
        model = Wav2Vec2Model(Wav2Vec2Config())
    total, (largest, _) = calculate_maximum_sizes(model)
    found = estimate_memory(model)
    assert found.largest_layer_name.endswith("parametrizations.weight.original1")
    assert found.rows[0].largest_layer == 4 * 768 * 48 * 128 > largest
    assert found.rows[0].total_size == total


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_is_what_accelerate_calls_it(dtype):
    from accelerate.commands.estimate import estimate_training_usage

    row = next(row for row in estimate_memory("bert-base-cased").rows if row.dtype == dtype)
    total = estimate_memory("bert-base-cased").rows[0].total_size
    assert row.training == max(estimate_training_usage(total, dtype).values()) and row.trainable


def test_what_cannot_be_trained_is_marked():
    found = estimate_memory("gpt2", dtypes=["bfloat16", "fp8", "int4"])
    assert [row.trainable for row in found.rows] == [True, False, False]
    assert [row.dtype for row in found.rows] == ["bfloat16", "float8_e4m3fn", "int4"]
    assert str(found).count(" *\n") == 2 and "cannot be trained" in str(found)


def test_inference_rows_use_true_sizes():
    found = estimate_memory("llama-2-7b", context=4096, batch=2)
    row = {row.stored: row for row in found.inference}
    assert row["bfloat16"].weights == 2 * 6738415616 + 4 * 64  # and the rotary table of 64 float32
    assert row["bfloat16"].kv_cache == 2 * 2 * 32 * 4096 * 4096 * 2
    assert row["float32"].kv_cache == 2 * row["bfloat16"].kv_cache
    linear = 6738415616 - 2 * 32000 * 4096 - 65 * 4096
    kept = 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert row["nf4"].weights == pytest.approx(kept + linear * 4.5 / 8, rel=1e-3)
    assert row["nf4-double"].weights == pytest.approx(kept + linear * 4.126953 / 8, rel=1e-3)
    assert row["bfloat16"].activations == 2 * (2 * 4096 * (3 * 11008 + 4 * 4096) + 2 * 32000)
    assert row["nf4"].total == row["nf4"].weights + row["nf4"].kv_cache + row["nf4"].activations


def test_activations_match_the_fake_run_of_llama_70b():
    """Measured on fake devices above the weights: 2564.1 MiB with the KV cache of 22 layers, 8192 tokens."""
    spec = describe("llama-2-70b")
    cache = 22 * 2048 * 8192 * 2
    assert (working_bytes(spec, Precision("bfloat16"), 1, 8192) + cache) / 2**20 == pytest.approx(2564.1, rel=0.01)


def test_training_rows_add_up():
    rows = {row.method.split(",")[0]: row for row in estimate_memory("gpt2").training}
    n = 124439808
    full = next(row for row in estimate_memory("gpt2").training if row.method == "Adam, float32")
    mixed = next(row for row in estimate_memory("gpt2").training if "mixed" in row.method)
    assert (full.gradients, full.optimizer) == (4 * n, 8 * n)
    assert mixed.weights + mixed.gradients + mixed.optimizer == pytest.approx(16 * n, rel=1e-3)
    adapters = 16 * 12 * ((768 + 2304) + (768 + 768) + (768 + 3072) + (3072 + 768))
    assert rows["LoRA r=16"].trained == rows["QLoRA r=16"].trained == adapters
    assert rows["LoRA r=16"].optimizer == 8 * adapters


def test_json_text_and_html_say_the_same():
    found = estimate_memory("mixtral-8x7b")
    data = json.loads(found.to_json())
    assert [row["total_size"] for row in data["rows"]] == [row.total_size for row in found.rows]
    assert data["rows"][0].keys() >= {"dtype", "largest_layer", "total_size", "training"}
    for row in found.rows:
        for text in texts(row):
            assert text in str(found) and text in found._repr_html_()
    assert len(repr(found)) < 110


def test_a_module_can_be_estimated():
    import torch

    found = estimate_memory(torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 5)))
    assert found.rows[0].total_size == 4 * 165 and found.rows[0].largest_layer == 4 * 110
    assert "not estimated" in str(found)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"dtypes": ["float12"]}, "unknown dtype"), ({"batch": 0}, "at least 1"), ({"stored": ["nf5"]}, "unknown")],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        estimate_memory("gpt2", **arguments)
    with pytest.raises(TypeError, match="expected a model's name"):
        estimate_memory(7)


@pytest.mark.parametrize("model", ["gpt2", torch.nn.Linear(2, 2), zoo.describe("gpt2")])
def test_an_option_that_there_is_not_is_an_error(model):
    """`batch_size`, as other calls name it, was ignored for modules: the answer was that for one sequence."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch_size'"):
        estimate_memory(model, batch_size=4)


def test_dtype_of_the_cache():
    """One name everywhere: estimate, plan, advise and the plan's code; weights and activations stay."""
    import bigkit

    plain, small = (bigkit.estimate_memory("llama-3.1-8b", kv_dtype=dtype) for dtype in (None, "int4"))
    [*others], [*smaller] = plain.inference, small.inference
    for before, after in zip(others, smaller):
        assert (after.weights, after.activations) == (before.weights, before.activations)
    token = 2 * 32 * 8 * 128
    assert smaller[1].kv_cache == 2048 * token // 2 + 4 * 2048 * token // 64
    assert "KV cache in int4" in str(small) and "KV cache in" not in str(plain)

    budget = {0: "20GiB"}
    plans = [bigkit.plan("llama-3.1-8b", budget, "exact", kv_dtype=dtype) for dtype in (None, "float8", "int4")]
    assert plans[0].max_context < plans[1].max_context < plans[2].max_context
    assert "kv_dtype='int4'" in plans[2].to_code() and "KV cache in int4" in plans[2].explain()
    advice = bigkit.advise("llama-3.1-8b", "RTX 4090", context=65536, kv_dtype="float8")
    assert advice.best.plan.options["kv_dtype"] == "float8" and "KV cache in float8" in advice.explain()
    with pytest.raises(ValueError, match="unknown kv_dtype 'int3'"):
        bigkit.plan("gpt2", budget, kv_dtype="int3")


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1500), (3, 500)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["Bloom", "Mpt"])
def test_scores_that_a_family_stores_are_counted(family, dtype, batch, tokens):
    """By the formula for fused attention a plan of BLOOM gave a GPU 4 GB more than its budget."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    names = ("hidden_size", "n_layer", "n_head") if family == "Bloom" else ("d_model", "n_layers", "n_heads")
    config = getattr(transformers, f"{family}Config")(**dict(zip(names, (256, 2, 8))), vocab_size=500)

    def empty():
        with init_empty_weights():
            return getattr(transformers, f"{family}ForCausalLM")._from_config(config, dtype=getattr(torch, dtype))

    run = dry_run(empty, 0, batch, tokens, 0, "H200", cache=False)
    held = run.timeline(0).at_peak()["activations"]
    assert 0.995 * held <= working_bytes(describe(empty()), Precision(dtype), batch, tokens) <= 1.1 * held
