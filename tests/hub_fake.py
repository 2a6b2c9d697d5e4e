"""A Hugging Face Hub on this machine: what the client needs to create a repository, upload files and download them."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory: `repos[ORG/NAME][file] = bytes`. A request without the token `right` is refused."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: object = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._answer({"error": code}, status, X_Error_Code=code)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer right":
            return self._refuse(401, "Unauthorized")
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.repos.setdefault(name, {})
            private = asked.get("visibility") == "private" or asked.get("private")
            self.server.private[name] = bool(private)
            return self._answer({"url": f"{self.server.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        repo, _, action = path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if action == "preupload":
            files = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer({"files": [{"path": one["path"]} | how for one in files]})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.repos[repo][entry["value"]["path"]] = content
        url = f"{self.server.url}/{repo}/commit/{'0' * 40}"
        return self._answer({"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if not path:
            return self._answer({})
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            if repo not in self.server.repos:
                return self._refuse(404, "RepoNotFound")
            files = [{"rfilename": name} for name in self.server.repos[repo]]
            return self._answer({"id": repo, "sha": "0" * 40, "siblings": files})
        repo, _, rest = path.partition("/resolve/")
        found = self.server.repos.get(repo, {}).get(rest.partition("/")[2])
        if found is None:
            return self._refuse(404, "EntryNotFound")
        tag = f'"{hash(found) & 0xFFFFFFFF:08x}"'
        return self._answer(found, ETag=tag, X_Repo_Commit="0" * 40)

    do_HEAD = do_GET


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve one for the block."""
    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
