"""A Hub that lies, dawdles or never ends: every answer of it is one clear sentence, within seconds and megabytes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bigkit import zoo

CLIENT = """
import json, resource, sys, time
from bigkit import zoo
from bigkit.zoo import fetch
fetch.SECONDS = 4
for line in sys.stdin:
    start = time.monotonic()
    try:
        answer = ["", str(zoo.describe(line.strip()).parameters)]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([*answer, time.monotonic() - start, memory]), flush=True)
"""


def header(fields: object) -> bytes:
    text = json.dumps(fields).encode() if not isinstance(fields, bytes) else fields
    return struct.pack("<Q", len(text)) + text


def tensor(**fields: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}


# Repository -> its config.json or, where it has none, its model.safetensors.
CONFIGS = {
    "deep": b"[" * 100_000,
    "binary": b"\xff\xfe\x00",
    "number": b"7",
    "nan": b'{"model_type": "llama", "hidden_size": NaN}',
    "negative": b'{"model_type": "llama", "hidden_size": -64, "num_attention_heads": 4}',
    "layers-many": b'{"model_type": "llama", "num_hidden_layers": "many"}',
    "layers-endless": b'{"model_type": "llama", "num_hidden_layers": 1000000000}',
    "experts-endless": b'{"model_type": "mixtral", "num_local_experts": 1000000000000}',
}
WEIGHTS = {
    "header-deep": header(b'{"w": ' + b"[" * 50_000),
    "header-list": header([1, 2]),
    "shape-negative": header(tensor(shape=[-1])),
    "shape-missing": header({"w": {"dtype": "F32", "data_offsets": [0, 4]}}),
    "shape-huge": header(tensor(shape=[2**40, 2**40])),
    "sizes-many": header(tensor(shape=[1] * 50_000)),
    "names-deep": header({".".join("abcdefgh" * 200): tensor()["w"]}) + b"1234",
    "escape-name": header({"\x1b[31mw": {"dtype": "X\x1b[0m", "shape": [1], "data_offsets": [0, 4]}}),
    "header-long": struct.pack("<Q", 2**40) + b"{}",
    "web-page": b"<!DOCTYPE html><html>sign in</html>" * 10,
}


class Liar(BaseHTTPRequestHandler):
    """What it does is said by the name of the repository."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        _, _, repo, _, _, file = (*self.path.split("/", 5), "", "", "", "")[:6]
        try:
            self.lie(repo, file)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def lie(self, repo: str, file: str) -> None:
        if repo in CONFIGS or repo in WEIGHTS:
            body = CONFIGS.get(repo, b"") if file == "config.json" else WEIGHTS.get(repo, b"")
            body = b"" if file.endswith("index.json") else body
            self.answer(200 if body else 404, body, {} if body else {"X-Error-Code": "EntryNotFound"})
        elif repo == "trickle":
            self.begin(200, {"Content-Length": "100000"})
            self.trickle()
        elif repo == "trickle-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            self.trickle()
        elif repo == "endless":
            self.begin(200, {"Transfer-Encoding": "chunked"})
            chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            for _ in range(200_000):  # 13 GB
                self.wfile.write(chunk)
        elif repo == "endless-error":
            self.begin(403, {"Transfer-Encoding": "chunked"})
            for _ in range(200_000):
                self.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        elif repo == "loop":
            self.answer(302, b"", {"Location": self.path})
        elif repo == "elsewhere":
            self.answer(302, b"", {"Location": "ftp://nowhere/config.json"})
        elif repo == "cut":
            self.begin(200, {"Content-Length": "1000"})
            self.wfile.write(b'{"model_type": "llama"}')
            self.close_connection = True
        elif repo == "escape":
            self.answer(403, b"", {"X-Error-Message": "\x1b]0;owned\x07\x1b[2Jno"})
        elif repo == "etag":
            outside = {"ETag": '"../../../../../outside"', "X-Repo-Commit": "../../../../outside"}
            self.answer(200, b'{"model_type": "from-tomorrow"}', outside)
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.begin(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def trickle(self) -> None:
        for _ in range(100):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.5)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    home = tmp_path_factory.mktemp("home") / "of" / "the" / "cache"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_DISABLE_TELEMETRY": "1"}
    process = subprocess.Popen([sys.executable, "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env={**kept, **place, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home)})  # fmt: skip
    ask(process, "x/layers-many")  # imports take longer than any answer
    yield process, home
    assert process.stdin and process.stdout
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()
    server.shutdown()
    server.server_close()


def ask(process: subprocess.Popen[str], repo: str) -> list:
    assert process.stdin and process.stdout
    print(repo, file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


@pytest.mark.parametrize("repo", [*CONFIGS, *WEIGHTS, "trickle", "trickle-headers", "endless", "endless-error", "loop",
                                  "elsewhere", "cut", "escape", "etag"])  # fmt: skip
def test_a_lying_hub_gets_one_sentence(client: tuple[subprocess.Popen[str], Path], repo: str) -> None:
    process, home = client
    before = ask(process, "x/nothing")[3]
    kind, message, seconds, memory = ask(process, f"x/{repo}")
    assert kind in zoo.__all__, f"{kind}: {message}"
    assert message.isprintable() and len(message) < 1000, message
    assert f"x/{repo}" in message
    assert seconds < 15, "past all patience"
    assert memory - before < 200_000, "kilobytes: far more was read than asked for"
    outside = [path for path in home.parents[2].rglob("*") if home not in (path, *path.parents) and path.is_file()]
    assert not outside, "written outside of the cache"


def test_folders_that_lie(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    for name in (tmp_path, "~nosuchuser/model", "x" * 5000, "a\0b", "../", "."):
        with pytest.raises(zoo.ZooError) as caught:
            zoo.describe(name)
        assert str(caught.value).isprintable()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(zoo.NoConfig, match="not valid JSON"):
        zoo.describe(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(zoo.NoConfig, match="weight_map"):
        zoo.describe(tmp_path)
