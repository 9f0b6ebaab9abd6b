"""timm's own tools on spread models: its forwards, heads, state dicts, averages and optimizers."""

import pytest
import torch

from tests.clients.places import check, seeded

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODELS = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=2, num_classes=5
    ),
    "resnet": lambda: timm.create_model("resnet18", num_classes=5, channels=(8, 8, 8, 8), stem_width=8),
    "convnext": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5),
}


def features(model):
    rows = model.forward_features(X)
    return model(X), rows, model.forward_head(rows), model.forward_head(rows, pre_logits=True)


def layers(model):
    return tuple(model.forward_intermediates(X, indices=1, intermediates_only=True))


def new_head(model):
    model.reset_classifier(0)
    bare = model(X)
    torch.manual_seed(1)
    model.reset_classifier(3)
    return bare, model(X)


def saved(model):
    from timm.utils import get_state_dict, unwrap_model

    return tuple(tensor.clone() for tensor in get_state_dict(model, unwrap_model).values())


def groups(model):
    from timm.optim import param_groups_layer_decay

    return [
        (group["lr_scale"], group["weight_decay"], len(group["params"]))
        for group in param_groups_layer_decay(model, 0.1, layer_decay=0.5)
    ]


def frozen(model):
    from timm.utils import freeze

    freeze(model)
    return model(X), sum(parameter.requires_grad for parameter in model.parameters())


def loaded(model):
    torch.manual_seed(7)
    state = {name: torch.randn_like(value) if value.is_floating_point() else value
             for name, value in model.state_dict().items() if "running" not in name}  # fmt: skip
    model.load_state_dict(state, strict=False)
    return model(X)


USES = [features, layers, new_head, saved, groups, frozen, loaded]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_timm_does_with_models(make, use, tmp_path):
    check(seeded(make), use, tmp_path)
