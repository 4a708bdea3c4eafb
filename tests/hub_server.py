"""A hub on this machine: the requests that downloads make, answered as huggingface.co answers them.

Files redirect to a content network under another host name, as large files do there. What goes wrong is set by a test.
"""

import hashlib
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants, file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def content(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@dataclass
class Hub:
    """What it serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)  # by repository/path
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # status and error code by repository
    sent: dict[str, bytes] = field(default_factory=dict)  # what comes instead of the file
    stated_size: int | None = None
    is_hub: bool = True
    ignores_range: bool = False
    pause_after: int | None = None  # bytes after which an answer waits until the client has gone
    requests: list[tuple[str, str, dict]] = field(default_factory=list)
    address: str = ""

    def asked(self, method: str) -> list[dict]:
        """Headers of the requests of a method, in order; of GET those for bytes."""
        wanted = "/cdn/" if method == "GET" else "/resolve/"
        return [headers for name, path, headers in self.requests if name == method and wanted in path]

    def publish(self, file, data: bytes) -> None:
        self.files[f"{file.repository}/{file.path}"] = data

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.address = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if not match and not self.path.startswith("/cdn/"):  # huggingface_hub asks for other things on its own account
            self._send(404, {})
            return
        self.hub.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if not match:
            self._send_bytes(self.path.removeprefix("/cdn/"))
            return
        repository, revision, path = match.groups()
        if repository in self.hub.refused:
            status, code = self.hub.refused[repository]
            self._send(status, {"X-Error-Code": code, "X-Error-Message": "no"})
        elif f"{repository}/{path}" not in self.hub.files:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        elif not self.hub.is_hub:
            self._send(200, {"Content-Type": "text/html"})
        elif revision not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._redirect(f"{repository}/{path}")

    def _redirect(self, name: str) -> None:
        data = self.hub.files[name]
        digest = hashlib.sha256(data).hexdigest()
        size = len(data) if self.hub.stated_size is None else self.hub.stated_size
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": size, "X-Linked-Etag": f'"{digest}"', "ETag": '"pointer"'}
        self._send(302, {**headers, "Location": f"{self.hub.address.replace('localhost', '127.0.0.1')}/cdn/{name}"})

    def _send(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": 0, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _send_bytes(self, name: str) -> None:
        data = self.hub.sent.get(name, self.hub.files[name])
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(match[1]) if match and not self.hub.ignores_range else 0
        if first >= len(data):
            self._send(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        headers = {"Content-Length": len(data) - first}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        headers["Content-Disposition"] = f'attachment; filename="{PurePosixPath(name).name}";'
        self._send(206 if first else 200, headers)
        body = data[first:]
        if self.hub.cuts:
            self.wfile.write(body[: self.hub.cuts.pop(0)])
            self.close_connection = True
        elif self.hub.pause_after is not None:
            self._send_slowly(body)
        else:
            self.wfile.write(body)

    def _send_slowly(self, body: bytes) -> None:
        self.wfile.write(body[: self.hub.pause_after])
        self.wfile.flush()
        try:
            for byte in body[self.hub.pause_after :]:
                time.sleep(0.2)
                self.wfile.write(bytes([byte]))
        except OSError:
            self.close_connection = True


@contextmanager
def local_hub():
    """A hub that huggingface_hub of this process takes for huggingface.co; it hurries, and reads in small pieces."""
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        patch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
        patch.delenv("HF_TOKEN", raising=False)
        yield hub
