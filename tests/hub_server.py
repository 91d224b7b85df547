"""A small model hub on loopback: enough of the Hugging Face API to download from."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name → files by name; ``gated`` and ``private`` ones ask for ``token``."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token = "hf_secret"
        self.requests: list[tuple[str, str, str]] = []
        self.cut_after: int | None = None
        self.dead: set[str] = set()
        self.url = ""


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve a :class:`Hub` until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Answer ``paths-info``: which of the asked paths are files."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path, ""))
        match = re.fullmatch(r"/api/datasets/(.+?)/paths-info/[^/]+", path)
        files = self.hub.repos.get(f"datasets/{match[1]}") if match else None
        if files is None:
            self._error(404, "EntryNotFound")
            return
        asked = (
            json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        )
        found = [name for name in asked if name in files]
        self._json([{"type": "file", "path": n, "size": len(files[n]), "oid": _oid(files[n])} for n in found])

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if match := re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/revision/([^/]+))?", path):
            # A data set's files are kept under "datasets/owner/name", as its URLs have it.
            self._api(match[2] if match[1] == "models" else f"datasets/{match[2]}", match[3])
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3], body=body)
        else:
            self._error(404, "EntryNotFound")

    def _refused(self, repo: str, revision: str | None) -> bool:
        authorized = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo not in self.hub.repos or (repo in self.hub.private and not authorized):
            self._error(401 if repo in self.hub.private else 404, "RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self._error(404, "RevisionNotFound")
        else:
            return False
        return True

    def _api(self, repo: str, revision: str | None) -> None:
        if "/tree/" in repo:
            self._tree(*repo.split("/tree/", 1))
            return
        if self._refused(repo, revision):
            return
        siblings = [
            {"rfilename": n, "size": len(d), "blobId": _oid(d)} for n, d in self.hub.repos[repo].items()
        ]
        gated = "auto" if repo in self.hub.gated else False
        self._json({"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "gated": gated, "private": False,
                    "tags": [], "siblings": siblings, "downloads": 0, "likes": 0})  # fmt: skip

    def _tree(self, repo: str, place: str) -> None:
        revision, _, folder = place.partition("/")
        if self._refused(repo, revision):
            return
        files = {n: d for n, d in self.hub.repos[repo].items() if not folder or n.startswith(f"{folder}/")}
        if not files:
            self._error(404, "EntryNotFound")
            return
        self._json([{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()])

    def _file(self, repo: str, revision: str, name: str, *, body: bool) -> None:
        if self._refused(repo, revision):
            return
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._error(403, "GatedRepo")
            return
        data = self.hub.repos[repo].get(name)
        if data is None:
            self._error(404, "EntryNotFound")
            return
        begin, status = 0, 200
        whole = len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, status = int(match[1]), 206
            data = data[begin : int(match[2]) + 1 if match[2] else None]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{whole}")
        self.send_header("ETag", f'"{_oid(self.hub.repos[repo][name])}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not body:
            return
        limit = 0 if name in self.hub.dead else self.hub.cut_after
        if limit is not None and len(data) > limit:
            # The line goes dead in the middle of the file.
            self.wfile.write(data[:limit])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data)

    def _json(self, value: object) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
