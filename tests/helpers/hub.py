"""A stand-in of the Hugging Face hub's API: what writing and reading repositories asks for, kept in memory.

It answers as the hub does what `huggingface_hub` asks: who is logged in, repositories that are made, cards
that are checked, files by both ways (in the commit, or beside it by LFS), commits, and reading files back.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest
import yaml

from helpers.processes import http_server

TOKEN, USER = "hf_a1b2c3d4e5f6g7h8i9j0k1l2", "jane"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub has, and what it refuses."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by name, by repository: `models/jane/x`, `datasets/jane/x`."""

    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What came by LFS, by its SHA-256."""

    by_lfs: set[str] = field(default_factory=set)
    broken: str = ""
    """Paths that contain this are answered with 500."""

    def text(self, repo: str, name: str) -> str:
        return self.repos[repo][name].decode()

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that knows this hub alone."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip


def output_of(hub: Hub, script: str, home: Path, *arguments: object) -> str:
    """What a Python script prints that knows this hub alone, and finds nothing in a cache."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=280,
        env={**os.environ, **hub.environment, "HF_HOME": str(home)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def stand_in() -> Iterator[Hub]:
    """Run one."""
    hub = Hub()
    with http_server(type("Handler", (_Handler,), {"hub": hub})) as url:
        hub.url = url
        yield hub


@contextlib.contextmanager
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process know this hub alone, with its token."""
    constants = huggingface_hub.constants
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        yield


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"] or 0)))

    def do_PUT(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"] or 0)))

    def _answer(self, body: bytes) -> None:
        path = urlsplit(self.path).path
        if self.hub.broken and self.hub.broken in path:
            return self._send(500, {"error": "out of order"})
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, path):
                if path.startswith("/api/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
                    return self._send(401, {"error": "Invalid username or password."})
                return method(self, body, *found.groups())
        return self._send(404, {"error": f"the stand-in has no {self.command} {path}"})

    def _send(self, status: int, value: Any = b"", **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _whoami(self, body: bytes) -> None:
        self._send(200, {"type": "user", "name": USER, "orgs": []})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        if owner != USER:
            message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            return self._send(403, {"error": message}, X_Error_Message=message)
        kind, name = asked.get("type") or "model", f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        known = self.hub.repos.get(f"{kind}s/{name}")
        if known is None:
            self.hub.repos[f"{kind}s/{name}"] = {}
            self.hub.private[f"{kind}s/{name}"] = asked.get("visibility") == "private"
        return self._send(200 if known is None else 409, {"url": url, "error": "it is there"})

    def _may_write(self, body: bytes, repo: str) -> None:
        self._send(*((200, {}) if repo in self.hub.repos else _NO_REPO))

    def _validate(self, body: bytes) -> None:
        head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        wrong = [{"message": f"{name} is empty"} for name, value in head.items() if value in (None, "", [])]
        self._send(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def _preupload(self, body: bytes, repo: str) -> None:
        files = [
            {
                "path": file["path"], "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".parquet")) else "regular",
            }
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        self._send(200, {"files": files})

    def _lfs(self, body: bytes, repo: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._send(200)

    def _commit(self, body: bytes, repo: str) -> None:
        header, *lines = map(json.loads, body.splitlines())
        assert header["key"] == "header"
        assert header["value"]["summary"]
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                data = self.hub.objects[value["oid"]]
                assert len(data) == value["size"]
                self.hub.by_lfs.add(value["path"])
            else:
                data = base64.b64decode(value["content"])
            self.hub.repos[repo][value["path"]] = data
        self._send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{_COMMIT}", "commitOid": _COMMIT})

    def _info(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.repos:
            return self._send(*_NO_REPO)
        name, files = repo.partition("/")[2], self.hub.repos[repo]
        head = yaml.safe_load(files["README.md"].split(b"---\n")[1]) if "README.md" in files else None
        siblings = [{"rfilename": file} for file in files]
        found = {"id": name, "sha": _COMMIT, "siblings": siblings, "cardData": head, "private": False}
        return self._send(200, {**found, "tags": [], "downloads": 0, "likes": 0})

    def _list(self, body: bytes, repo: str, folder: str | None) -> None:
        below, found = f"{folder}/" if folder else "", {}
        for path, data in self.hub.repos[repo].items():
            if path.startswith(below):
                name, _, rest = path.removeprefix(below).partition("/")
                kind = "directory" if rest else "file"
                found[name] = {"type": kind, "path": below + name, "size": len(data), "oid": _COMMIT}
        self._send(200, [*found.values()])

    def _read(self, body: bytes, dataset: str | None, name: str, file: str) -> None:
        files = self.hub.repos.get(f"{'datasets' if dataset else 'models'}/{name}")
        if files is None:
            return self._send(404, _NO_REPO[1], X_Error_Code="RepoNotFound")
        if file not in files:
            return self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=_COMMIT)
        etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
        return self._send(200, files[file], ETag=etag, X_Repo_Commit=_COMMIT)


_NO_REPO = (404, {"error": "Repository not found"})
_NAME = r"[\w.-]+/[\w.-]+"
_REPO = rf"((?:models|datasets)/{_NAME})"
_ROUTES = (
    (r"/api/whoami-v2", _Handler._whoami),
    (r"/api/repos/create", _Handler._create),
    (r"/api/validate-yaml", _Handler._validate),
    (rf"/api/{_REPO}/auth-check/write", _Handler._may_write),
    (rf"/api/{_REPO}/preupload/main", _Handler._preupload),
    (rf"/api/{_REPO}/commit/main", _Handler._commit),
    (rf"/api/{_REPO}(?:/revision/\w+)?", _Handler._info),
    (rf"/api/{_REPO}/tree/\w+(?:/(.+))?", _Handler._list),
    (rf"/((?:datasets/)?{_NAME})\.git/info/lfs/objects/batch", _Handler._lfs),
    (r"/lfs/(\w+)", _Handler._put),
    (rf"/(datasets/)?({_NAME})/resolve/\w+/(.+)", _Handler._read),
)
