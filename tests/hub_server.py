"""A Hub on this machine: the routes of huggingface.co that bigkit and huggingface_hub use, serving local folders.

    with FakeHub() as hub:
        hub.add("someone/tiny", folder)
        ...                       # a process with HF_ENDPOINT=hub.url sees one model
        print(hub.requests)       # what it asked for, and how many bytes it was given

Speaks HEAD and GET of /{repo}/resolve/{revision}/{file} (ETag, X-Repo-Commit, byte ranges) and GET of
/api/models/{repo}[/revision/{revision}] and /api/models/{repo}/tree/{revision}; answers 401, 403 and 404 with the Hub's
X-Error-Code. Leaves out: uploads, Git LFS redirects, Xet, search.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FILE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/tree/(?P<revision>[^/]+)")
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)(?:/revision/(?P<revision>[^/]+))?")


@dataclass(frozen=True)
class Request:
    """One request: its method, path, byte range, bearer token, the status of the answer and the bytes of its body."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    sent: int


@dataclass
class Repo:
    """A model on the fake Hub: a folder for each revision; the tokens that may read it (None: everybody)."""

    id: str
    revisions: dict[str, Path]
    gated: bool = False
    readers: frozenset[str] | None = None

    def commit(self, revision: str) -> str:
        return hashlib.sha1(f"{self.id}@{self.revisions[revision]}".encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        """The name of a revision, given by its name or by its commit."""
        return next((name for name in self.revisions if revision in (name, self.commit(name))), None)


@dataclass
class FakeHub:
    """The server; use it as a context manager."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    broken: bool = False  # answers everything with 500

    def add(
        self, id: str, folder: Path, *, gated: bool = False, readers: set[str] | None = None, **revisions: Path
    ) -> None:
        """Serve `folder` as the model `id`; keyword arguments are further revisions."""
        allowed = None if readers is None else frozenset(readers)
        self.repos[id] = Repo(id, {"main": folder, **revisions}, gated, allowed)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def _respond(self) -> None:
        path = urlsplit(self.path).path
        if self.owner.broken:
            self._error(500, None, "Internal Server Error")
        elif match := _TREE.fullmatch(path):
            self._tree(match)
        elif match := _INFO.fullmatch(path):
            self._info(match)
        elif match := _FILE.fullmatch(path):
            self._file(match)
        else:
            self._error(404, None, "Not Found")

    def _token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" and token else None

    def _find(self, match: re.Match[str], content: bool) -> tuple[Repo, str] | None:
        """The repository and revision that were asked for, or None after an error was sent."""
        repo, token = self.owner.repos.get(match["repo"]), self._token()
        if repo is None or (repo.readers is not None and not repo.gated and token not in repo.readers):
            if token is None:  # the Hub does not tell strangers what exists
                self._error(401, None, "Invalid username or password.")
            else:
                self._error(404, "RepoNotFound", "Repository not found")
            return None
        if content and repo.gated and token not in (repo.readers or ()):
            reason = f"Access to model {repo.id} is restricted."
            self._error(401 if token is None else 403, "GatedRepo", reason)
            return None
        revision = repo.find(unquote(match["revision"] or "main"))
        if revision is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
            return None
        return repo, revision

    def _info(self, match: re.Match[str]) -> None:
        if found := self._find(match, content=False):
            repo, revision = found
            files = sorted(path.name for path in repo.revisions[revision].iterdir())
            info = {"_id": "0", "id": repo.id, "modelId": repo.id, "sha": repo.commit(revision), "private": False,
                    "gated": "manual" if repo.gated else False, "disabled": False, "tags": [], "downloads": 0,
                    "likes": 0, "siblings": [{"rfilename": name} for name in files]}  # fmt: skip
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _tree(self, match: re.Match[str]) -> None:
        if found := self._find(match, content=False):
            repo, revision = found
            files = [{"type": "file", "path": path.name, "size": path.stat().st_size,
                      "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
                     for path in sorted(repo.revisions[revision].iterdir()) if path.is_file()]  # fmt: skip
            self._send(200, json.dumps(files).encode(), {"Content-Type": "application/json"})

    def _file(self, match: re.Match[str]) -> None:
        if found := self._find(match, content=True):
            repo, revision = found
            commit = {"X-Repo-Commit": repo.commit(revision)}
            path = repo.revisions[revision] / unquote(match["file"])
            if not path.is_file():
                self._error(404, "EntryNotFound", "Entry not found", commit)
                return
            body, status = path.read_bytes(), 200
            headers = {**commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept-Ranges": "bytes"}
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(span[1]), min(int(span[2] or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                body, status = body[first : last + 1], 206
            self._send(status, body, headers)

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {**named, "X-Error-Message": message, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        sent = 0 if self.command == "HEAD" else len(body)
        asked = (self.command, unquote(self.path), self.headers.get("Range"), self._token())
        self.owner.requests.append(Request(*asked, status, sent))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if sent:
            self.wfile.write(body)
