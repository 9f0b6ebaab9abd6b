"""Where a model that is not shipped comes from: Hub ids, Hub URLs, local folders.

From the Hub comes config.json and nothing else; where there is no usable config, the headers of the safetensors files
(a few kilobytes each, by range requests), which name every tensor with its shape and dtype. Weights are never
downloaded. A folder is read in the same way.

Leaves out: building the model from its config (`build.py`), and shipped models (`catalog.py`), which need none of this.
`huggingface_hub` is imported when the Hub is asked, not before.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..model import config as reader
from ..model.spec import ModelSpec, ModuleSpec, TensorSpec
from ..units import listed
from . import catalog
from .errors import BadURL, GatedModel, NoConfig, OfflineError, UnknownModel, ZooError

_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F4": "uint4", "I64": "int64", "I32": "int32",
           "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
           "BOOL": "bool", "C64": "complex64"}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model's place: a repository on the Hub at a revision, or a local folder."""

    repo: str = ""
    revision: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return str(self.folder or self.repo)


def parse_url(name: str) -> tuple[str, str | None] | None:
    """The repository id and the revision that a Hub URL points to; None if `name` is no URL.

    Raises:
        BadURL: another site, a data set, a space, or no repository.

    >>> parse_url("https://huggingface.co/meta-llama/Llama-2-7b-hf/tree/main")
    ('meta-llama/Llama-2-7b-hf', 'main')
    >>> parse_url("hf.co/gpt2"), parse_url("gpt2")
    (('gpt2', None), None)
    """
    own = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    hosts = {"huggingface.co", "www.huggingface.co", "hf.co", urlsplit(own).netloc}
    if "://" not in name:
        if name.partition("/")[0].lower() not in hosts:
            return None
        name = f"https://{name}"
    url = urlsplit(name.strip())
    if url.scheme not in ("http", "https") or url.netloc.lower() not in hosts:
        raise BadURL(f"{name!r} is not on the Hub: expected a model page, https://huggingface.co/OWNER/MODEL")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    if not parts or parts[0] in ("datasets", "spaces", "docs", "blog", "collections", "papers"):
        raise BadURL(f"{name!r} is no model page: expected https://huggingface.co/OWNER/MODEL")
    split = next((i for i, part in enumerate(parts[:3]) if part in ("tree", "blob", "resolve", "raw", "commit")), None)
    repo = "/".join(parts[: min(2, len(parts)) if split is None else split])
    revision = parts[split + 1] if split is not None and len(parts) > split + 1 else None
    if not _REPO.fullmatch(repo):
        raise BadURL(f"{name!r} is no model page: expected https://huggingface.co/OWNER/MODEL")
    return repo, revision


def folder_of(name: str) -> Path | None:
    """The local folder that `name` means, or None: any existing folder, or the folder of a config.json.

    Raises:
        UnknownModel: `name` is written as a path ("./x", "/x", "~/x"), and nothing is there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.is_file() and path.suffix == ".safetensors":
        raise NoConfig(f"{name!r} is one weight file: give the folder it is in")
    if name.startswith((".", "/", "~")) or "\\" in name:
        raise UnknownModel(f"there is no folder {name!r}")
    return None


def is_repo(name: str) -> bool:
    """Whether `name` has the form of a Hub id."""
    return _REPO.fullmatch(name) is not None and ".." not in name


def read_config(source: Source, token: str | bool | None = None) -> dict[str, Any] | None:
    """The config.json of a folder or repository, or None if it has none.

    Raises:
        GatedModel, UnknownModel, OfflineError: the repository cannot be read.
        NoConfig: config.json is no JSON object.
    """
    if source.folder is not None:
        path = source.folder / "config.json"
        if not path.is_file():
            return None
    else:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            with _explained(source):
                path = _download_config(source, token)
        except RemoteEntryNotFoundError:
            return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NoConfig(f"the config.json of {source} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise NoConfig(f"the config.json of {source} holds a {type(config).__name__}; expected an object")
    return config


def _download_config(source: Source, token: str | bool | None) -> Path:
    """The cached config.json, brought up to date if the Hub answers.

    One HEAD request is sent first: `hf_hub_download` would repeat an unanswered request for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(source.repo, "config.json", revision=source.revision), token=token, timeout=10)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 500)
        if status < 500:
            raise
        try:  # no answer: what the cache has is better than nothing
            return Path(hf_hub_download(source.repo, "config.json", revision=source.revision, local_files_only=True))
        except OSError:
            raise error from None
    return Path(hf_hub_download(source.repo, "config.json", revision=source.revision, token=token))


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turns what huggingface_hub raises into the zoo's errors; a missing file stays what it is."""
    from huggingface_hub import errors

    repo, shipped = source.repo, shipped_hint(source.repo)
    login = f"pass token=... or run `hf auth login`.{shipped}"
    missing = f"the Hub has no model {repo!r}, or it is private: check the name, or {login}"
    absent = f"{repo!r} does not ship with bigkit and is not in the local cache, and"
    remedy = f"or give a folder with its config.json.{shipped}"
    try:
        yield
    except errors.RemoteEntryNotFoundError:
        raise
    except errors.GatedRepoError as error:
        raise GatedModel(f"{repo!r} is gated: accept its licence on its model page, then {login}") from error
    except errors.RevisionNotFoundError as error:
        raise UnknownModel(f"the Hub has {repo!r}, but no revision {source.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise UnknownModel(missing) from error
    except errors.HFValidationError as error:
        raise UnknownModel(f"{repo!r} cannot be the name of a model on the Hub.{shipped}") from error
    except errors.SafetensorsParsingError as error:
        raise NoConfig(f"a safetensors header of {repo!r} cannot be read: {_one_line(error)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise OfflineError(f"{absent} HF_HUB_OFFLINE is set: unset it, {remedy}") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:  # what a stranger hears about models that are private or do not exist
            raise UnknownModel(missing) from error
        raise ZooError(f"the Hub answered with an error for {repo!r}: {_one_line(error)}") from error
    except Exception as error:
        if _is_connection_error(error):
            raise OfflineError(f"{absent} the Hub cannot be reached: connect to the network, {remedy}") from error
        raise


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_connection_error(error: Exception) -> bool:
    """Whether no answer came at all; huggingface_hub talks through httpx (1.x and later) or requests."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(names & {"TransportError", "RequestException"})


def shipped_hint(name: str) -> str:
    """The end of an error message: the shipped models that look like `name`, or all of them."""
    near = catalog.closest(name)
    return (
        f" Shipped, and close to it: {', '.join(near)}." if near else f" Shipped models: {', '.join(catalog.names())}."
    )


def headers(source: Source, token: str | bool | None = None) -> dict[str, TensorSpec]:
    """Every tensor of a model's safetensors files, by name, from the files' headers alone.

    Raises:
        NoConfig: there are no safetensors files, or one cannot be read.
    """
    records = _local_headers(source.folder) if source.folder is not None else _remote_headers(source, token)
    if unknown := sorted({dtype for _, dtype in records.values()} - set(_DTYPES)):
        raise NoConfig(f"tensors of {source} are stored as {listed(unknown)}: expected {', '.join(_DTYPES)}")
    if not records:
        raise NoConfig(
            f"the folder {source} has neither a config.json that bigkit can build nor *.safetensors files whose "
            "headers it can read"
        )
    return {name: TensorSpec(tuple(shape), _DTYPES[dtype]) for name, (shape, dtype) in records.items()}


_Records = dict[str, tuple[Sequence[int], str]]  # tensor name -> its shape, and its dtype by the file's name for it


def _local_headers(folder: Path) -> _Records:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # only what the index names: other formats of the same weights may lie beside them
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise NoConfig(f"{str(index)!r} is no index of safetensors files: it has no usable weight_map") from error
    elif (single := folder / "model.safetensors") in files:
        files = [single]
    records: _Records = {}
    for file in files:
        try:
            with safe_open(file, "numpy") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                records |= {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise NoConfig(f"{str(file)!r} is no readable safetensors file ({_one_line(error)})") from error
    return records


def _remote_headers(source: Source, token: str | bool | None) -> _Records:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        with _explained(source), _quiet_bars():
            metadata = get_safetensors_metadata(source.repo, revision=source.revision, token=token)
    except NotASafetensorsRepoError:
        raise NoConfig(
            f"{source} has neither a config.json that bigkit can build nor safetensors weights whose headers it "
            "can read: choose a repository of a transformers or timm model"
        ) from None
    files = metadata.files_metadata.values()
    return {name: (info.shape, info.dtype) for file in files for name, info in file.tensors.items()}


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """No progress bar for a dozen headers."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


def spec_from_tensors(
    name: str, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None = None
) -> ModelSpec:
    """A model's record from the names of its tensors: the dots separate modules.

    Classes are not in a weight file. Numbered children make a "ModuleList" of "Block"s, which stay whole; a matrix
    called "weight" counts as linear unless its name says that it embeds or normalises.

    >>> spec = spec_from_tensors("tiny", {"h.0.up.weight": TensorSpec((8, 2)), "h.1.up.weight": TensorSpec((8, 2))})
    >>> [(layer.name, layer.cls, layer.bytes()) for layer in spec.layers()]
    [('h.0', 'Block', 64), ('h.1', 'Block', 64)]
    """
    tree: dict[str, Any] = {}
    for full, tensor in tensors.items():
        *path, leaf = full.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if isinstance(node, TensorSpec):
                raise NoConfig(f"the tensor {full!r} lies inside another tensor: these are not a module's weights")
        node[leaf] = tensor
    modules: dict[str, ModuleSpec] = {}  # equal modules are one object

    def module(node: dict[str, Any], cls: str, own: str) -> ModuleSpec:
        own_tensors = {key: value for key, value in node.items() if isinstance(value, TensorSpec)}
        below = {key: value for key, value in node.items() if not isinstance(value, TensorSpec)}
        numbered = bool(below) and all(key.isdigit() for key in below)
        if numbered and cls == "Module":
            cls = "ModuleList"
        order = sorted(below, key=int) if numbered else list(below)
        children = {key: module(below[key], "Block" if numbered else "Module", key) for key in order}
        weight = own_tensors.get("weight")
        embeds = re.search(r"emb|wte|wpe|norm|ln_|shared", own) is not None
        linear = weight is not None and len(weight.shape) == 2 and not embeds
        key = repr((cls, own_tensors, [(name, id(child)) for name, child in children.items()], linear))
        return modules.setdefault(key, ModuleSpec(cls, own_tensors, children, linear))

    root = module(tree, "Model", "")
    facts, attention = (reader.facts(config), reader.attention(config, root)) if config else ({}, ())
    head = any(name.startswith(("lm_head.", "score.", "classifier.", "head.", "fc.")) for name in tensors)
    return ModelSpec(name, root, (), ("Block",), attention, {**facts, "has_head": head}, "safetensors")
