"""`transformers.pipeline` over a spread model answers what it answers over the whole one."""

import pytest
import torch
import transformers

from tests.clients.places import WAYS, check, language_model, quantized, seeded, spread_ways, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
PICTURE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def texts(task, **options):
    def use(model):
        ask = transformers.pipeline(task, model=model, tokenizer=tokenizer())
        return str(ask(["w5 w98 w7", "w1 w98"], **options)), str(ask("w3 w98 w4", **options))

    return use


def written(model):
    ask = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    plain = {"max_new_tokens": 4, "do_sample": False}
    return str(ask("w5", **plain)), str(ask(["w5 w6", "w7 w8"], batch_size=2, **plain)), str(ask.device)


USES = {
    "text generation": (language_model, written),
    "fill in": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        texts("fill-mask", top_k=3),
    ),
    "classify": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
        texts("text-classification"),
    ),
    "features": (lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), texts("feature-extraction")),
    "tokens": (
        lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SMALL)),
        texts("token-classification"),
    ),
}


@pytest.mark.parametrize(("make", "use"), USES.values(), ids=USES)
def test_a_pipeline_answers_the_same(make, use, tmp_path):
    check(seeded(make), use, tmp_path)


def test_a_pipeline_of_pictures(tmp_path):
    from PIL import Image

    picture = Image.new("RGB", (16, 16), (200, 30, 90))
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})

    def use(model):
        ask = transformers.pipeline("image-classification", model=model, image_processor=processor)
        return str(ask(picture)), str(ask([picture, picture]))

    check(seeded(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**PICTURE))), use, tmp_path)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_pipeline_over_fewer_bits(kind, where, tmp_path):
    pytest.importorskip("bitsandbytes")
    assert written(quantized(kind, where, tmp_path)) == written(quantized(kind, None, tmp_path))


def test_a_pipeline_that_is_told_a_device(tmp_path):
    """Transformers moves the model then, unless it has a map: it says so in one sentence, and the model still runs."""
    ids = torch.arange(5)[None]
    for way, parts in spread_ways(language_model(), tmp_path, WAYS):
        before = parts(ids).logits
        with pytest.raises(ValueError, match="accelerate"):
            transformers.pipeline("text-generation", model=parts, tokenizer=tokenizer(), device="cpu")
        assert torch.equal(parts(ids).logits, before), way
