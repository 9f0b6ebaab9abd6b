"""Every public name and signature of Accelerate's modules is ours too: the same, more, or listed with a reason."""

import importlib
import inspect
from fnmatch import fnmatchcase
from importlib.metadata import version

import pytest

import bigkit.accelerate as ours
from bigkit.accelerate.differences import LEFT_OUT, OTHERWISE, SEEN_IN, reason_left_out

pytest.importorskip("accelerate")
if not version("accelerate").startswith(SEEN_IN):
    pytest.skip(f"the tables were made for Accelerate {SEEN_IN}", allow_module_level=True)
MODULES = [
    "", "state", "accelerator", "big_modeling", "hooks", "inference", "launchers", "logging", "utils", "utils.bnb",
    "utils.constants", "utils.dataclasses", "utils.environment", "utils.imports", "utils.memory", "utils.modeling",
    "utils.offload", "utils.operations", "utils.other", "utils.random", "utils.tqdm", "utils.versions",
]  # fmt: skip
CLASSES = [
    "state.PartialState", "state.AcceleratorState", "accelerator.Accelerator", "hooks.ModelHook",
    "hooks.SequentialHook", "hooks.AlignDevicesHook", "hooks.CpuOffload", "hooks.UserCpuOffloadHook",
    "hooks.LayerwiseCastingHook", "logging.MultiProcessAdapter", "utils.dataclasses.BnbQuantizationConfig",
    "utils.dataclasses.DistributedType", "utils.offload.OffloadedWeightsLoader", "utils.offload.PrefixedDataset",
]  # fmt: skip


def module_of(package, path):
    return importlib.import_module(f"{package}.{path}".rstrip("."))


def own_module(path):
    return module_of("bigkit.accelerate", path)


def public(path):
    """Name -> thing, of a module of Accelerate: what it defines; of a package, what it passes on."""
    module = module_of("accelerate", path)
    names = {name: thing for name, thing in vars(module).items() if not name.startswith("_")}
    if path == "utils.constants":
        return {name: thing for name, thing in names.items() if name.isupper()}
    home = "accelerate" if hasattr(module, "__path__") else module.__name__
    return {name: thing for name, thing in names.items() if str(getattr(thing, "__module__", "")).startswith(home)}


def signature(thing):
    try:
        return inspect.signature(thing)
    except (TypeError, ValueError):
        return None


def difference(theirs, ours):
    """What a call that theirs takes would find otherwise in ours, or None."""
    kinds = {parameter.kind for parameter in ours.parameters.values()}
    own = [p for p in ours.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    anything = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds and not own
    for position, one in enumerate(theirs.parameters.values()):
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            if one.kind not in kinds:
                return f"no {one}"
            continue
        same = [p for p in own if p.name == one.name]
        if anything:
            continue
        if not same or (one.kind != one.KEYWORD_ONLY and own.index(same[0]) != position):
            return f"no {one.name} at position {position}"
        default = same[0].default
        if one.default is not one.empty and default != one.default and type(one.default) is not object:
            return f"{one.name}={default!r}, not {one.default!r}"
    new = [p.name for p in own if p.name not in theirs.parameters and p.default is p.empty]
    return f"{new} must be given" if new else None


def differing():
    """Name (of a function, a class or a member) -> how it differs, of all that both have."""
    found = {}
    for path in MODULES:
        for name, thing in public(path).items():
            if callable(thing) and (mine := vars(own_module(path)).get(name)) is not None:
                found[name] = (thing, mine)
    for path in CLASSES:
        module, name = path.rsplit(".", 1)
        theirs, mine = (
            getattr(module_of("accelerate", module), name),
            getattr(own_module(module), name),
        )
        for member, thing in inspect.getmembers(theirs, callable):
            if not member.startswith("_") and hasattr(mine, member):
                found[f"{name}.{member}"] = (thing, getattr(mine, member))
    pairs = {name: (signature(one), signature(other)) for name, (one, other) in found.items()}
    return {name: how for name, (a, b) in pairs.items() if a and b and (how := difference(a, b))}


@pytest.mark.parametrize("path", MODULES)
def test_every_name_is_ours_or_left_out_for_a_reason(path):
    names = public(path)
    assert names
    missing = [name for name in names if name not in vars(own_module(path)) and not reason_left_out(name)]
    assert not missing


@pytest.mark.parametrize("path", CLASSES)
def test_every_member_is_ours_or_left_out_for_a_reason(path):
    module, name = path.rsplit(".", 1)
    theirs, mine = getattr(module_of("accelerate", module), name), getattr(own_module(module), name)
    if "tate" in name or name == "Accelerator":
        mine = mine(cpu=True)  # it has attributes of its own
    missing = [
        member
        for member in dir(theirs)
        if not member.startswith("_") and not reason_left_out(member) and not hasattr(mine, member)
    ]
    assert not missing


def test_every_signature_is_the_same_or_more_or_listed():
    assert differing().keys() == OTHERWISE.keys()


def test_nothing_is_listed_in_vain():
    theirs = {(path, name) for path in MODULES for name in public(path)}
    missing = {name for path, name in theirs if name not in vars(own_module(path))}
    for path in CLASSES:
        module, name = path.rsplit(".", 1)
        missing |= {*dir(getattr(module_of("accelerate", module), name))} - {*dir(getattr(own_module(module), name))}
    for patterns in LEFT_OUT.values():
        for pattern in patterns.split():
            assert any(fnmatchcase(name, pattern) for name in missing), f"{pattern} is not missing"
    for path in MODULES:
        has = [name for name in vars(own_module(path)) if reason_left_out(name) and not name.startswith("is_")]
        assert not has, f"{has} are there, and listed as left out"


def test_what_is_left_out_says_why():
    with pytest.raises(ImportError, match="no DeepSpeedPlugin: it is for training, or cuts single tensors"):
        from bigkit.accelerate.utils import DeepSpeedPlugin  # noqa: F401
    with pytest.raises(ImportError, match="no prepare_pippy: one model over several processes is bigkit.pipeline"):
        from bigkit.accelerate.inference import prepare_pippy  # noqa: F401
    with pytest.raises(AttributeError, match="no backward: it is for training"):
        ours.Accelerator(cpu=True).backward(None)
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from bigkit.accelerate import nonsense  # noqa: F401
    assert not hasattr(ours, "nonsense")
