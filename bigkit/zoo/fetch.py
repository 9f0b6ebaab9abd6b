"""Small files, and the starts of large ones, from the Hub: so many bytes and seconds, and not one more.

A file is one GET request at `{HF_ENDPOINT}/{repo}/resolve/{revision}/{file}`. What comes back is a stranger's: nothing
of it names a file on this machine, and no answer is read longer than `SECONDS` or further than was asked.

Leaves out: weights, and what the files say (`hub.py`, `headers.py`). `huggingface_hub` brings tokens, the connection
and HF_HUB_OFFLINE; it is imported when the Hub is asked, not before.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..units import format_bytes
from .errors import GatedModel, OfflineError, UnknownModel, ZooError

T = TypeVar("T")
SECONDS = 60  # for all of a file


class NoSuchFile(ZooError):
    """The repository has no file of that name."""


class Fetched(NamedTuple):
    """The first bytes of a file, and how many it has."""

    start: bytes
    size: int


def fetch(repo: str, revision: str | None, file: str, token: str | bool | None, most: int) -> Fetched:
    """The first bytes of a file on the Hub, up to `most`.

    Args:
        repo: "OWNER/MODEL".
        revision: branch, tag or commit; None is "main".
        file: its name in the repository.
        token: for gated and private models; None takes the one that `hf auth login` stored.
        most: bytes to read at the most.

    Raises:
        NoSuchFile, GatedModel, UnknownModel, OfflineError, ZooError: why there is nothing, and what to do.
    """
    return _in_time(lambda: _get(repo, revision, file, token, most), f"{file} of {repo!r}")


def _in_time(call: Callable[[], T], what: str) -> T:
    """What `call` returns or raises, within `SECONDS`: a server may send a byte every nine seconds for ever."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=answer, name="bigkit-fetch", daemon=True).start()
    try:
        value, error = answers.get(timeout=SECONDS)
    except queue.Empty:
        raise OfflineError(f"the Hub did not send {what} within {SECONDS} s: try again later") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _get(repo: str, revision: str | None, file: str, token: str | bool | None, most: int) -> Fetched:
    from huggingface_hub import errors, get_session, get_token, hf_hub_url

    absent = f"{repo!r} does not ship with bigkit and is not in the local cache, and"
    remedy = "or give a folder with its config.json"
    try:
        bearer = get_token() if token in (None, True) else token
        headers = {"Range": f"bytes=0-{most - 1}", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {bearer}"} if bearer else {}
        url = hf_hub_url(repo, file, revision=revision)
        with get_session().stream("GET", url, headers=headers, timeout=10) as answer:
            if answer.status_code >= 400:
                raise _refusal(repo, revision, file, answer)
            start = b""
            for chunk in answer.iter_raw(1 << 16):
                start += chunk
                if len(start) >= most:
                    break
            return Fetched(start[:most], _size(answer))
    except ZooError:
        raise
    except errors.HFValidationError as error:
        raise UnknownModel(f"{repo!r} cannot be the name of a model on the Hub") from error
    except errors.OfflineModeIsEnabled as error:
        raise OfflineError(f"{absent} HF_HUB_OFFLINE is set: unset it, {remedy}") from error
    except Exception as error:  # httpx's, by name: huggingface_hub has changed the library it talks through before
        names = {cls.__name__ for cls in type(error).__mro__}
        if isinstance(error, OSError) or "TransportError" in names:
            raise OfflineError(f"{absent} the Hub cannot be reached: connect to the network, {remedy}") from error
        reason = f"{type(error).__name__}: {printable(error)}"
        raise ZooError(f"the Hub's answer for {file} of {repo!r} cannot be used ({reason})") from error


def _refusal(repo: str, revision: str | None, file: str, answer: Any) -> ZooError:
    """Why the Hub does not give a file, by its status and its own code for it."""
    code, status = answer.headers.get("X-Error-Code"), answer.status_code
    login = "pass token=... or run `hf auth login`"
    if code == "EntryNotFound":
        return NoSuchFile(f"{repo!r} has no {file}")
    if code == "GatedRepo":
        return GatedModel(f"{repo!r} is gated: accept its licence on its model page, then {login}")
    if code == "RevisionNotFound":
        return UnknownModel(f"the Hub has {repo!r}, but no revision {revision!r}")
    if code == "RepoNotFound" or status == 401:  # 401: what a stranger hears of models that are private or not there
        return UnknownModel(f"the Hub has no model {repo!r}, or it is private: check the name, or {login}")
    reason = printable(answer.headers.get("X-Error-Message") or answer.reason_phrase)
    kind = OfflineError if status >= 500 else ZooError  # a server that is down is as good as none
    return kind(f"the Hub answered with an error for {repo!r}: {status} {reason}")


def _size(answer: Any) -> int:
    """Bytes of the whole file, by the headers of an answer with its start."""
    span = re.fullmatch(r"bytes 0-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    size = span[1] if answer.status_code == 206 and span else answer.headers.get("Content-Length", "")
    return int(size) if size.isdigit() else 0


def printable(text: object, most: int = 200) -> str:
    """A stranger's text on one line of a terminal: without control characters, and cut.

    >>> printable("not \\x1b[31mhere\\n")
    'not ?[31mhere'
    """
    line = " ".join(str(text)[: 10 * most].split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:most]


def whole(fetched: Fetched, most: int, what: str) -> bytes:
    """All bytes of a small file.

    Raises:
        ZooError: it is larger than `most`, or came cut.
    """
    if fetched.size > most or len(fetched.start) >= most:
        raise ZooError(f"{what} has {format_bytes(fetched.size)}: expected at most {format_bytes(most)}")
    if fetched.size and fetched.size != len(fetched.start):
        raise ZooError(f"{what} came cut: {len(fetched.start)} of {fetched.size} bytes")
    return fetched.start
