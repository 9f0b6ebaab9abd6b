"""A random model, ways to spread it, and what its user does with it: all drawn from one seed, and played on the spread
model and on a plain one at once.
"""

from __future__ import annotations

import copy
import pprint
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from bigkit import init_empty_weights, plan
from bigkit.checkpoints.load import load_checkpoint_in_model
from bigkit.checkpoints.save import save_model
from bigkit.devices import join
from bigkit.dryrun.fake_gpu import fake_gpus
from bigkit.dryrun.workload import fill
from bigkit.meta.skeleton import own_tensors, tied_groups
from bigkit.offload.dispatch import dispatch_model
from bigkit.offload.hooks import remove_hook_from_module
from bigkit.offload.load_and_dispatch import load_checkpoint_and_dispatch
from tests.fuzz.modules import Reads, Recipe, Stop, Stops, build, random_root
from tests.spread import STAND_IN, check_at_rest, handles

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


class Case(NamedTuple):
    """All that one seed decides."""

    seed: int
    recipe: Recipe
    train: bool
    quantized: str
    start: str
    places: dict[str, Any]
    options: dict[str, Any]
    steps: list[tuple[str, int]]

    def __str__(self) -> str:
        return (
            f"model = build({pprint.pformat(self.recipe, width=110)}, seed={self.seed})"
            f"{'.train()' if self.train else '.eval()'}{self.quantized and f'  # quantized: {self.quantized}'}\n"
            f"# {self.start}, with {self.options}\nplaces = {pprint.pformat(self.places, width=110, compact=True)}\n"
            f"steps = {self.steps}"
        )


def draw(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    recipe = random_root(rng)
    quantized = rng.choice(["nf4", "int8"]) if rng.random() < 0.06 else ""
    train = rng.random() < 0.3 and not quantized
    model = build(recipe, seed)
    steps = [*PLAIN_STEPS] if quantized else [*STEPS]
    return Case(
        seed=seed,
        recipe=recipe,
        train=train,
        quantized=quantized,
        start=rng.choice(["dispatch", "load shards", "load .bin"]) if not quantized else "dispatch",
        places=random_map(rng, model, quantized),
        options=random_options(rng),
        steps=[(rng.choice(steps), rng.randrange(10**6)) for _ in range(rng.randint(1, 4))],
    )


def random_map(rng: random.Random, model: nn.Module, quantized: str = "") -> dict[str, Any]:
    """A device map, which keeps quantized layers whole.

    What works on GPU 1 is a whole child of the root's or of its list of blocks.
    """
    places: dict[str, Any] = {}
    if rng.random() < 0.1:
        return {"": rng.choice(["cpu", "disk", 0])}
    finest = rng.choice([0.1, 0.4, 0.9])
    here = rng.choice([["cpu", "disk"], ["cpu", "disk", 0], [0]])

    def walk(name: str, module: nn.Module, outer: bool) -> None:
        if outer and name and rng.random() < 0.25:
            places[name] = 1
        elif name and (rng.random() > finest or not module._modules and (quantized or not own_tensors(module))):
            places[name] = rng.choice(here)
        else:
            for own in own_tensors(module):
                places[join(name, own)] = rng.choice(here)
            for own, child in module._modules.items():
                walk(join(name, own), child, name in ("", "blocks"))

    for own, child in model._modules.items():
        walk(own, child, own != "blocks")
    return places


def random_options(rng: random.Random) -> dict[str, Any]:
    return {
        "main_device": rng.choice([None, 0, 0, "cpu"]),
        "offload_buffers": rng.random() < 0.4,
        "slots": rng.randint(1, 3),
        "prefetch": rng.random() < 0.7,
        "ram_cache": rng.choice([0, 500, 10**6]),
        "resident_memory": rng.choice([0, 0, 300, 2000, 10**6]),
        "preload_module_classes": rng.choice(
            [(), (), ("MLP", "Own"), ("Attention", "MultiheadAttention"), ("Walked",)]
        ),
        "force_hooks": rng.random() < 0.5,
    }


def quantize(model: nn.Module, kind: str, device: str) -> nn.Module:
    """Bitsandbytes' own layers in place of the plain linear ones, quantized where they will work.

    Bitsandbytes 0.50 leaves the codes of an int8 layer on the CPU when a model that was quantized there goes to a GPU.
    """
    import bitsandbytes as bnb

    if bnb.functional.has_avx512bf16():  # there bitsandbytes 0.50 decodes rows of less than a block wrongly
        kind = "int8"
    for module in [*model.modules()]:
        for own, child in [*module.named_children()]:
            if type(child) is nn.Linear and own not in ("head", "linear", "linear1", "linear2"):
                bias = child.bias is not None
                if kind == "int8":
                    new = bnb.nn.Linear8bitLt(*child.weight.shape[::-1], bias=bias, has_fp16_weights=False)
                else:
                    new = bnb.nn.Linear4bit(*child.weight.shape[::-1], bias=bias, quant_type=kind)
                new.load_state_dict(child.state_dict())
                setattr(module, own, new.to(device))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Playing a case


class Play:
    """A case that is being played.

    Attributes:
        whole: the plain model.
        parts: the spread one.
    """

    def __init__(self, case: Case, folder: Path, gpu: bool = False) -> None:
        self.case, self.folder, self.at = case, folder, "start"
        self.device, self.stand_in = ("cuda:0", {1: "cuda:0"}) if gpu else ("cpu", STAND_IN)
        if gpu:  # CPU and GPU compute the same with other kernels, and cuDNN with fewer bits
            torch.backends.cudnn.allow_tf32 = False
        whole = build(case.recipe, case.seed).train(case.train)
        self.whole = (quantize(whole, case.quantized, self.device) if case.quantized else whole).to(self.device)

    def play(self) -> None:
        self.begin()
        self.forward(random.Random(self.case.seed))
        for step, seed in self.case.steps:
            self.at = f"{step} {seed}"
            STEPS[step](self, random.Random(seed))
            self.settle()
            check_at_rest(self.parts)
        self.at = "end"
        self.state(random.Random(0)) if not self.case.quantized else None
        self.undispatch()
        assert "forward" not in vars(self.parts)
        self.forward(random.Random(1))

    def undispatch(self) -> None:
        """Afterwards weights lie where they rested: what was in RAM is brought to the GPU, if there is a real one."""
        remove_hook_from_module(self.parts, recurse=True)
        assert not handles(self.parts)
        self.parts.to(self.device)

    def settle(self) -> None:
        """What was assigned is taken in when its unit works the next time; experts may not be chosen."""
        for streamer in {handle.streamer for handle in handles(self.parts)}:
            for site in streamer.sites:
                site.take_in_changes()

    def begin(self) -> None:
        case = self.case
        if case.start == "dispatch":
            self.parts = copy.deepcopy(self.whole)
            note(self.parts, 0.5)
            self.dispatch(case.places, self.options(case.options))
            return
        with init_empty_weights():
            self.parts = build(case.recipe, case.seed).train(case.train)
        state = self.whole.state_dict()
        for name, buffer in self.whole.named_buffers():
            if name not in state:
                owner, _, own = name.rpartition(".")
                self.parts.get_submodule(owner)._buffers[own] = buffer.clone()
        if case.start == "load .bin":
            torch.save(state, self.folder / "pytorch_model.bin")
        else:
            save_model(self.whole, self.folder, "1KB")
        with_folder = {**self.options(case.options), "offload_folder": self.folder / "rest", "stand_in": self.stand_in}
        load_checkpoint_and_dispatch(self.parts, self.folder, case.places, strict=True, **with_folder)

    def options(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Options as drawn; beside a real GPU nothing works on the CPU, whose sums are rounded in another order."""
        return {**drawn, "main_device": 0} if self.device != "cpu" and drawn["main_device"] != 0 else drawn

    def dispatch(self, places: dict[str, Any], options: dict[str, Any]) -> None:
        result = dispatch_model(self.parts, places, offload_dir=self.folder / "rest", stand_in=self.stand_in, **options)
        assert result is self.parts

    def forward(self, rng: random.Random) -> None:
        ids = torch.tensor([[rng.randrange(11) for _ in range(3)] for _ in range(2)], device=self.device)
        mode, results = rng.choice([*MODES]), []
        for model in (self.whole, self.parts):
            try:
                with MODES[mode]():
                    results.append(model(ids, scale=0.5))
            except (Stop, AttributeError) as error:
                results.append({"error": type(error).__name__})
        assert_same(*results)

    def stop(self, rng: random.Random) -> None:
        names = [name for name, module in self.whole.named_modules() if isinstance(module, Stops)]
        chosen = rng.choice(names) if names else ""
        for stops in (True, False):
            for model in (self.whole, self.parts):
                model.get_submodule(chosen).stop = stops
            self.forward(rng)

    def edit(self, rng: random.Random) -> None:
        names = [name for name, _ in self.whole.named_parameters() if name.startswith("blocks")]
        name, kind = rng.choice(names or ["head.bias"]), rng.randrange(4)
        owner, _, own = name.rpartition(".")
        for model in (self.whole, self.parts):
            module = model.get_submodule(owner)
            weight = module._parameters[own]
            if kind == 0:
                weight.data.mul_(0.5)
            elif kind == 1:
                with torch.no_grad():
                    weight[0] = 0.25
            elif kind == 2:
                setattr(module, own, nn.Parameter(torch.full(weight.shape, 0.125, device=weight.device)))
            else:
                scaled = {key: v.clone() * 0.5 if v.is_floating_point() else v for key, v in model.state_dict().items()}
                model.load_state_dict(scaled)
        self.forward(rng)

    def state(self, rng: random.Random) -> None:
        assert_same(dict(self.whole.state_dict()), dict(self.parts.state_dict()))

    def save(self, rng: random.Random) -> None:
        folder, files = self.folder / f"saved{rng.random()}", {}
        save_model(self.parts, folder, rng.choice(["1KB", "1GB"]))
        for file in folder.glob("*.safetensors"):
            files |= safetensors.torch.load_file(file)
        for name, value in self.whole.state_dict().items():
            tied = [other for other in files.values() if other.shape == value.shape]
            assert name in files or any(torch.equal(other, value.cpu()) for other in tied), f"{name} is missing"
            assert_same(files.get(name, value), value)

    def load_again(self, rng: random.Random) -> None:
        """A second checkpoint into a model that is spread already."""
        if tied_groups(self.whole) != tied_groups(self.parts):
            return  # tied over two GPUs, each of which has a copy; the file has one
        other = copy.deepcopy(self.whole)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.125)
        self.whole.load_state_dict(other.state_dict())
        folder = self.folder / f"other{rng.random()}"
        save_model(other, folder, "2KB")
        load_checkpoint_in_model(self.parts, folder)
        self.forward(rng)

    def again(self, rng: random.Random) -> None:
        self.dispatch(random_map(rng, self.whole, self.case.quantized), self.options(random_options(rng)))
        self.forward(rng)

    def undo(self, rng: random.Random) -> None:
        self.undispatch()
        self.forward(rng)
        if rng.random() < 0.5:
            self.whole, self.parts = copied(self.whole), copied(self.parts)
        self.again(rng)

    def copy(self, rng: random.Random) -> None:
        try:
            twin = copied(self.parts)
        except TypeError as error:
            assert "is spread out by bigkit and cannot be copied" in str(error)
            return
        whole, parts = self.whole, self.parts
        self.whole, self.parts = copied(whole), twin
        self.forward(rng)
        self.again(rng)
        if not self.case.quantized:
            self.edit(rng)  # of the copy alone
        self.whole, self.parts = whole, parts
        self.forward(rng)

    def adapter(self, rng: random.Random) -> None:
        """LoRA, on copies that are then thrown away."""
        import peft

        plain = [name for name, module in self.whole.named_modules() if type(module) is nn.Linear]
        targets = [name for name in plain if name.rpartition(".")[2] in ("up", "down", "first", "mix")]
        if not targets or self.case.train:
            return self.forward(rng)
        settings = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
        models = []
        for model in (self.whole, self.parts):
            torch.manual_seed(3)
            models.append(peft.get_peft_model(model, settings))
        whole, parts = self.whole, self.parts
        self.whole, self.parts = models
        self.forward(rng)
        for model in models:
            model.merge_adapter()
        self.forward(rng)
        for model in models:
            model.unmerge_adapter()
        self.forward(rng)
        self.whole, self.parts = (model.unload() for model in models)
        self.forward(rng)
        assert (self.whole, self.parts) == (whole, parts)


STEPS: dict[str, Callable[[Play, random.Random], None]] = {
    "forward": Play.forward,
    "stop": Play.stop,
    "edit": Play.edit,
    "state": Play.state,
    "save": Play.save,
    "load_again": Play.load_again,
    "again": Play.again,
    "undo": Play.undo,
    "copy": Play.copy,
    "adapter": Play.adapter,
}
PLAIN_STEPS = ("forward", "stop", "again", "undo", "copy")  # bitsandbytes packs 4-bit weights anew when they run


def on_fake_gpus(case: Case) -> None:
    """Plan the model for two GPUs that do not exist, and run it there: every operation on one device."""
    rng = random.Random(case.seed)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with init_empty_weights():
        models = [build(case.recipe, case.seed).eval() for _ in range(3)]
    size = sum(tensor.nbytes for tensor in models[0].parameters())
    budgets = {0: int(size * rng.choice([0.4, 0.6, 0.8])), 1: size, "cpu": size}
    given = {name: "cpu" if place == "disk" else place for name, place in case.places.items()}
    with fake_gpus(), torch.no_grad():
        try:
            fill(models[0], {"": 0})(ids.to("cuda:0"))
        except Exception:
            return  # what the data decide is not known here
        for model, places in zip(models[1:], (given, plan(models[1], budgets, strict=False).device_map)):
            try:
                dispatch_model(fill(model, places), places, 0)(ids.to("cuda:0"))
            except Exception as error:
                raise RuntimeError(f"with {places}: {error}") from error


def copied(model: nn.Module) -> nn.Module:
    """A copy, with what the user notes at weights; PyTorch's own copies lose that."""
    return note(copy.deepcopy(model), 0.75)


def note(model: nn.Module, factor: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Reads):
            module.note(factor)
    return model


def assert_same(one: Any, other: Any) -> None:
    """Two results are equal, up to the rounding of another kernel."""
    assert type(one) is type(other) or isinstance(one, Tensor), (one, other)
    if isinstance(one, dict):
        assert one.keys() == other.keys(), (one.keys(), other.keys())
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, Tensor):
        torch.testing.assert_close(other.cpu(), one.cpu(), rtol=1e-4, atol=2e-5, equal_nan=True)
    else:
        assert one == other


def check(seed: int, folder: Path, gpu: bool = False) -> None:
    """Play the case of a seed; on fake GPUs too, which takes longer, if it is one of every tenth.

    Args:
        seed: the seed.
        folder: does not exist yet, and not afterwards.
        gpu: GPU 0 is itself, not the CPU in its place.

    Raises:
        AssertionError: with what brings the failure back.
    """
    case = draw(seed)
    folder.mkdir(parents=True)
    play = Play(case, folder, gpu)
    try:
        play.play()
        play.at = "on fake GPUs"
        if seed % 10 == 0 and not case.quantized:
            on_fake_gpus(case)
    except Exception as error:
        raise AssertionError(f"seed {seed}, at step {play.at}: {type(error).__name__}: {error}\n{case}") from error
    finally:
        shutil.rmtree(folder)
