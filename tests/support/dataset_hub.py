"""A Hugging Face Hub on the loopback: one data set with one file of records, which counts what is fetched."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "train.jsonl"


class HubServer:
    """Serves the data set owner/name; `sent` holds the method and path of each request for its file."""

    def __init__(self, content: bytes) -> None:
        self.sent: list[str] = []
        handler = type("Handler", (_Handler,), {"content": content, "sent": self.sent})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    content: bytes
    sent: list[str]

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def do_POST(self) -> None:  # paths-info
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._send(json.dumps([self._entry()]).encode(), True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.endswith(f"/{FILE}"):
            self.sent.append(f"{self.command} {path}")
            self._send(self.content, with_body, ETag='"records"')
        elif "/tree/" in path:
            self._send(json.dumps([self._entry()]).encode(), with_body)
        elif path.startswith("/api/datasets/owner/name"):
            about = {"id": "owner/name", "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self._send(json.dumps({**about, "siblings": [{"rfilename": FILE}]}).encode(), with_body)
        elif path == "/":
            self._send(b"{}", with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _entry(self) -> dict[str, Any]:
        return {"type": "file", "path": FILE, "size": len(self.content), "oid": COMMIT}

    def _send(self, body: bytes, with_body: bool, **headers: str) -> None:
        first, status = 0, 200
        if (given := self.headers.get("Range")) and with_body:
            first = int(given.removeprefix("bytes=").partition("-")[0])
            status = 206
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if with_body:
            self.wfile.write(body[first:])

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""
