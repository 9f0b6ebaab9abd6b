"""sentence-transformers over a spread model gives the sentences the same vectors."""

import copy

import pytest
import torch
import transformers

from bigkit import dispatch_model
from tests.clients.places import AWAY, STAND_IN, WAYS, check, seeded, tokenizer

library = pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8", "w9 w1"]
CONFIG = transformers.BertConfig(
    vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def encoder(tmp_path):
    seeded(lambda: transformers.BertModel(CONFIG)).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    return library.SentenceTransformer(str(tmp_path / "bert"), device="cpu").eval()


def vectors(model):
    together = torch.tensor(model.encode(TEXTS, batch_size=2, show_progress_bar=False))
    alone = model.encode(TEXTS[0], convert_to_tensor=True, show_progress_bar=False)
    return together, alone, model.similarity(together, together)


def test_the_whole_encoder_is_spread(encoder, tmp_path):
    check(encoder, vectors, tmp_path, {name: way for name, way in WAYS.items() if name != "GPUs"})


def test_its_transformer_is_spread(encoder, tmp_path):
    """As one does who loads a large model: only the first module is too big."""
    expected = vectors(encoder)
    for name, way in WAYS.items():
        model = copy.deepcopy(encoder)
        model[0].auto_model = way(model[0].auto_model, tmp_path / name)
        for given, wanted in zip(vectors(model), expected):
            torch.testing.assert_close(given, wanted)


def test_it_is_saved_from_where_it_rests(encoder, tmp_path):
    expected = vectors(encoder)
    for name, way in AWAY.items():
        model = copy.deepcopy(encoder)
        model[0].auto_model = way(model[0].auto_model, tmp_path / name)
        model.save(str(tmp_path / name / "saved"))
        again = library.SentenceTransformer(str(tmp_path / name / "saved"), device="cpu")
        for given, wanted in zip(vectors(again), expected):
            torch.testing.assert_close(given, wanted)


def test_a_map_over_its_modules(encoder, tmp_path):
    expected = vectors(encoder)
    places = {name: place for (name, _), place in zip(encoder.named_children(), ["disk", 0, 0, 0])}
    model = dispatch_model(encoder, places, offload_dir=tmp_path, stand_in=STAND_IN)
    for given, wanted in zip(vectors(model), expected):
        torch.testing.assert_close(given, wanted)
