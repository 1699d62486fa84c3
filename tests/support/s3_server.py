"""A local S3 server that records uploads and can fail or stall on purpose."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3Server:
    """moto's S3 server behind a filter.

    Attributes:
        url: address of the server.
        puts: keys stored so far, in the order their uploads began.
        on_put: called with each key before it is stored; may block, or return an HTTP status to answer instead.
        on_get: the same for each GET and HEAD request.
        on_body: called with each key and the content that answers a GET; returns the content to send instead.
        sends_checksums: whether the store sends a checksum with which the client finds a changed content, as S3 does.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.puts: list[str] = []
        self.on_put: Callable[[str], int | None] = lambda key: None
        self.on_get: Callable[[str], int | None] = lambda key: None
        self.on_body: Callable[[str, bytes], bytes] = lambda key, content: content
        self.sends_checksums = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def client(self) -> Any:
        """A boto3 client of the server."""
        import boto3

        return boto3.client("s3", endpoint_url=self.url)

    def keys(self, bucket: str) -> dict[str, int]:
        """Keys of a bucket with their sizes."""
        return {
            entry["Key"]: entry["Size"] for entry in self.client().list_objects_v2(Bucket=bucket).get("Contents", ())
        }

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        key = environ["PATH_INFO"].lstrip("/").partition("/")[2]
        if environ["REQUEST_METHOD"] == "PUT" and key:
            self.puts.append(key)
            status = self.on_put(key)
            if status is not None:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response(f"{status} Refused", [("Content-Length", "0")])
                return [b""]
        if environ["REQUEST_METHOD"] in ("GET", "HEAD") and key:
            status = self.on_get(key)
            if status is not None:
                start_response(f"{status} Refused", [("Content-Length", "0")])
                return [b""]
        if environ["REQUEST_METHOD"] != "GET" or not key:
            return self._app(environ, start_response)
        answer: list[Any] = []
        content = b"".join(self._app(environ, lambda status, headers, *more: answer.extend((status, headers))))
        if answer[0].startswith("200"):
            content = self.on_body(key, content)
            answer[1] = [(name, value) for name, value in answer[1] if name.lower() != "content-length"]
            if not self.sends_checksums:
                answer[1] = [(name, value) for name, value in answer[1] if "checksum" not in name.lower()]
            answer[1].append(("Content-Length", str(len(content))))
        start_response(*answer)
        return [content]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server, with its address and test credentials in the environment."""
    server = S3Server()
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, S3_ENDPOINT_URL=server.url)
    try:
        yield server
    finally:
        server.close()
        os.environ.clear()
        os.environ.update(before)
