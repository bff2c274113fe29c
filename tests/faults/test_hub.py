"""A hub that is busy, breaks off, hangs or is down, served from here to the real libraries.

What holds without a server is in tests/data/test_sources.py and tests/test_network.py.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

ROWS = [{"text": f"record {i} " + "x" * 90} for i in range(5_000)]
DATA = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
NAME = "data/train-00000-of-00001.jsonl"
ENTRY = {"type": "file", "oid": "1" * 40, "size": len(DATA), "path": NAME}
FOLDER = {"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"}
READ = """
import json, sys, time
from lmplay.data import hub
from lmplay.data.tokenizers import open_tokenizer
from lmplay.errors import UserError
from lmplay.plan import Dataset

name, cap = sys.argv[1], float(sys.argv[2])
hub._SECONDS = cap or hub._SECONDS
began, rows = time.monotonic(), []
found = {"problem": "", "hint": "", "code": 0}
try:
    if name == "tokenizer":
        open_tokenizer("stalls/tokenizer")
    else:
        rows = [row["text"] for row in hub.hub_rows(Dataset(hub=f"{name}/text"), "train", 0)]
except UserError as error:
    found = {"problem": error.problem, "hint": error.hint, "code": error.code}
found |= {"rows": [text.split()[1] for text in rows], "seconds": time.monotonic() - began}
print(json.dumps(found), flush=True)
os = __import__("os")
os._exit(0)  # a call that was left behind need not end
"""


asked: Counter[str] = Counter()  # requests so far, by owner


class Hub(BaseHTTPRequestHandler):
    """One dataset under any owner; the owner's name says how the server behaves."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self):
        path = unquote(urlparse(self.path).path)
        owner = next((part for part in BEHAVIOURS if f"/{part}/" in f"{path}/"), None)
        if owner is None:
            return self._reply(404, b"{}")
        asked[owner] += 1
        status = BEHAVIOURS[owner](asked[owner], "/resolve/" in path)
        if status == "hang":
            time.sleep(3600)
        elif status != 200:
            return self._reply(status, b'{"error": "not now"}')
        if "/api/datasets/" in path:
            return self._reply(200, json.dumps(self._facts(path)).encode())
        if not path.endswith(NAME):
            return self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._file(owner)

    def _facts(self, path: str):
        rest = path.partition("/api/datasets/")[2].split("/")[2:]
        if rest[:1] == ["tree"]:
            inside = "/".join(rest[2:])
            return [ENTRY] if inside == "data" or "recursive=t" in self.path.lower() else [FOLDER]
        if rest[:1] == ["paths-info"]:
            wanted = unquote(self._body.decode())
            return [ENTRY] if NAME in wanted else [FOLDER] if "data" in wanted else []
        name = "/".join(path.partition("/api/datasets/")[2].split("/")[:2])
        made = "2026-01-01T00:00:00.000Z"
        return {
            "id": name, "sha": "a" * 40, "private": False, "gated": False, "disabled": False,
            "siblings": [{"rfilename": NAME}], "tags": [], "downloads": 0, "likes": 0,
            "createdAt": made, "lastModified": made,
        }  # fmt: skip

    def _file(self, owner: str):
        headers = {"ETag": f'"{hashlib.sha256(DATA).hexdigest()}"', "X-Repo-Commit": "a" * 40}
        first, last, status = 0, len(DATA) - 1, 200
        if some := self.headers.get("Range"):
            begin, _, end = some.removeprefix("bytes=").partition("-")
            first, last, status = int(begin), min(int(end or last), last), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(DATA)}"
        body = DATA[first : last + 1]
        is_cut = owner == "cuts" and self.command == "GET" and asked[owner] % 2
        self._reply(status, body, headers, len(body) // 2 if is_cut else None)

    def _reply(self, status: int, body: bytes, headers=(), sent: int | None = None):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True


BEHAVIOURS = {
    "works": lambda number, is_data: 200,
    "busy": lambda number, is_data: 429 if number in (1, 2, 5, 12) else 200,
    "overloaded": lambda number, is_data: 503 if number in (1, 2, 5, 12) else 200,
    "cuts": lambda number, is_data: 200,
    "stalls": lambda number, is_data: "hang",
    "freezes": lambda number, is_data: "hang" if is_data else 200,
    "down": lambda number, is_data: 503,
}


@pytest.fixture
def hub(tmp_path):
    """Reads the dataset of an owner from the server, and says what came of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environ = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }

    def read(owner: str, cap: float = 0) -> dict:
        command = [sys.executable, "-c", READ, owner, str(cap)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    yield read
    server.shutdown()


@pytest.mark.soak
def test_a_hub_that_recovers_gives_each_row_once_and_one_that_does_not_is_given_up(hub, figure):
    seconds = {}
    for owner in ("works", "busy", "overloaded", "cuts"):
        found = hub(owner)
        assert found["rows"] == [str(i) for i in range(len(ROWS))], (owner, found["problem"])
        seconds[owner] = found["seconds"]
    for owner in ("stalls", "freezes", "down"):
        found = hub(owner)
        assert found["code"] == 4 and found["seconds"] < 70, found
        assert f"cannot read {owner}/text" in found["problem"] and "HF_ENDPOINT" in found["hint"]
        seconds[owner] = found["seconds"]

    worst = max(seconds[owner] for owner in ("stalls", "freezes", "down"))
    told = f"429, 503 and cut bodies: {len(ROWS):,} rows once each; hangs and 503 for good given up"
    figure("hub_flaky", f"{told} after at most {worst:.0f} s", seconds=seconds)


@pytest.mark.soak
def test_a_tokenizers_host_that_never_answers_is_given_up_within_its_limit(hub, figure):
    found = hub("tokenizer")

    assert found["code"] == 4 and found["seconds"] < 20
    assert "stalls/tokenizer" in found["problem"] and "HF_ENDPOINT" in found["hint"]
    figure("tokenizer_blackhole", f"given up after {found['seconds']:.1f} s", **found)
