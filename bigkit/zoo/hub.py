"""Where a model that is not shipped comes from: Hub ids, Hub URLs, local folders; and its config.json.

From the Hub comes config.json and nothing else; where there is no usable config, the headers of the safetensors files
(`headers.py`). Weights are never downloaded. A folder is read in the same way.

Leaves out: building the model from its config (`build.py`), and shipped models (`catalog.py`), which need none of this.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ..machine.ledger import cache_folder, write_whole
from . import catalog
from .errors import BadURL, NoConfig, OfflineError, UnknownModel, ZooError
from .fetch import NoSuchFile, fetch, printable, whole

_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
LARGEST_CONFIG = 10_000_000  # bytes; large ones have 100,000


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
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (RuntimeError, OSError, ValueError) as error:  # no such user, a name too long, a zero byte
        raise UnknownModel(f"{printable(name)!r} is no name of a folder or model: {printable(error)}") from error
    if not exists:
        if name.startswith((".", "/", "~")) or "\\" in name:
            raise UnknownModel(f"there is no folder {name!r}")
        return None
    if path.is_dir():
        return path
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.is_file() and path.suffix == ".safetensors":
        raise NoConfig(f"{name!r} is one weight file: give the folder it is in")
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
    what = f"the config.json of {source}"
    return read_json(source, "config.json", what, lambda: _config_of_repo(source, token))


def read_json(source: Source, file: str, what: str, download: Callable[[], bytes]) -> dict[str, Any] | None:
    """A JSON file of a folder or repository, or None if there is none.

    Args:
        source: the folder or repository.
        file: its path there.
        what: what errors call it.
        download: its bytes, of a repository.

    Raises:
        NoConfig: it is no JSON object.
    """
    if source.folder is not None:
        path = source.folder / file
        if not path.is_file():
            return None
        text = path.read_bytes()
    else:
        try:
            text = download()
        except NoSuchFile:
            return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoConfig(f"{what} is not valid JSON ({printable(error)})") from error
    if not isinstance(value, dict):
        raise NoConfig(f"{what} holds a {type(value).__name__}; expected an object")
    return value


def _config_of_repo(source: Source, token: str | bool | None) -> bytes:
    """config.json as the Hub has it now; where the Hub does not answer, as it was when last seen.

    What was seen lies in bigkit's cache, and in huggingface_hub's if another library has asked for it.
    """
    from huggingface_hub import try_to_load_from_cache

    name = quote(f"{source.repo}@{source.revision or 'main'}", safe="@")
    seen = cache_folder() / "configs" / f"{name}.json"
    try:
        fetched = fetch(source.repo, source.revision, "config.json", token, LARGEST_CONFIG)
    except NoSuchFile:
        raise
    except OfflineError as error:
        theirs = try_to_load_from_cache(source.repo, "config.json", revision=source.revision)
        for path in (seen, *([Path(theirs)] if isinstance(theirs, str) else [])):
            if path.is_file():
                return path.read_bytes()
        raise OfflineError(f"{error}.{shipped_hint(source.repo)}") from error
    except ZooError as error:
        other = "Of a model that is elsewhere give the folder of its config.json, or its GGUF file."
        raise type(error)(f"{error}.{shipped_hint(source.repo)} {other}") from error
    text = whole(fetched, LARGEST_CONFIG, f"the config.json of {source}")
    with suppress(OSError):  # a cache that cannot be written is none
        seen.parent.mkdir(parents=True, exist_ok=True)
        write_whole(seen, text)
    return text


def shipped_hint(name: str) -> str:
    """The end of an error message: the shipped models that look like `name`, or where to find their names."""
    near = catalog.closest(name)
    shipped = f"Shipped, and close to it: {', '.join(near)}" if near else "`bigkit models` lists what is shipped"
    return f" {shipped}."
