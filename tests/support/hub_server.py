"""A hub on this machine: as much of its protocol as reading and writing one small repository takes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories (name -> file -> bytes), the tokens that may write, and what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens = {"hf_writer"}
        self.asked: list[str] = []
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.path == "/":
            self._answer(200)
            return
        if self.path.startswith("/api/models/"):
            repo = "/".join(self.path.split("/")[3:5])
            known = repo in self.hub.repos
            self._json({"id": repo, "sha": COMMIT, "siblings": []}) if known else self._missing("RepoNotFound")
            return
        user, name, _, revision, file = self.path.lstrip("/").split("?")[0].split("/")
        files = self.hub.repos.get(f"{user}/{name}")
        if files is None:
            self._missing("RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._missing("RevisionNotFound")
        elif file not in files:
            self._missing("EntryNotFound")
        else:
            tag = hashlib.sha1(files[file]).hexdigest()
            self._answer(200, files[file], ETag=f'"{tag}"', X_Repo_Commit=COMMIT, Accept_Ranges="none")

    do_HEAD = do_GET

    def _missing(self, code: str) -> None:
        self._answer(401 if code == "RepoNotFound" else 404, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.hub.tokens:
            self._answer(403, b'{"error": "Forbidden"}', Content_Type="application/json")
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        else:
            repo = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization', 'user')}/{asked['name']}"
        if repo in self.hub.repos:
            self._answer(409, json.dumps({"url": f"{self.hub.url}/{repo}"}).encode(), Content_Type="application/json")
            return
        self.hub.repos[repo] = {}
        visibility = asked.get("visibility")
        self.hub.private[repo] = bool(asked.get("private")) if visibility is None else visibility == "private"
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
