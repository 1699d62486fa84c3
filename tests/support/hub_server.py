"""A Hugging Face hub on the loopback interface: what `huggingface_hub` calls to push a model, and nothing more."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = {"hf_" + "w" * 20: "write", "hf_" + "r" * 20: "read"}
ACCOUNT = "me"


class Hub(ThreadingHTTPServer):
    """Repositories by name: {"private": bool, "files": name → content}; requests that change something are kept."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.changes: list[str] = []
        self.forbidden: set[str] = set()  # repositories that the token must not write to, by a rule of the server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = None, code: str = "") -> None:
        body = json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _role(self) -> str | None:
        return TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            if (role := self._role()) is None:
                return self._answer(401, {"error": "Invalid credentials"})
            account = {"name": ACCOUNT, "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": role}}}
            return self._answer(200, account)
        repo, _, rest = path.removeprefix("/api/models/").partition("/tree/")
        found = self.server.repos.get(repo)
        if found is None:
            return self._answer(404, {"error": "Repository not found"}, "RepoNotFound")
        if rest:
            return self._answer(
                200, [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in found["files"].items()]
            )
        self._answer(200, {"id": repo, "private": found["private"], "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization') or ACCOUNT}/{given['name']}"
            self.server.changes.append(f"create {repo}")
            self.server.repos[repo] = {"private": given["private"], "files": {}}
            return self._answer(200, {"url": f"{self.server.url}/{repo}", "id": repo})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        repo, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if fnmatch(one["path"], "*.safetensors") else "regular"}
                for one in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        assert action == "commit", path
        self.server.changes.append(f"commit {repo}")
        if repo in self.server.forbidden:
            return self._answer(403, {"error": "Your token is for another repository"})
        files = self.server.repos[repo]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1" * 40, "hookOutput": ""})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
