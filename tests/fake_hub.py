"""A hub on this machine: a real HTTP server that stores what `huggingface_hub` uploads, and serves it back.

It has the endpoints for creating repositories and branches, for uploading files in git and in LFS, and for listing and
downloading them. Files below `.safetensors` go through LFS, as on the real hub without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from saetrain import hub as saetrain_hub

Files = dict[str, bytes]
WRITE_TOKEN, READ_TOKEN = "hf_" + "abcdefghij" * 3, "hf_" + "jihgfedcba" * 3


@dataclass
class Repo:
    """A repository: {branch: commit}, and {commit: {path: content}}."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        sha = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, branch: str = "main") -> Files:
        return self.commits[self.branches[branch]]


@dataclass
class FakeHub:
    """State of the hub; ``requests``: method and path of each request, ``failing``: a status to answer by path."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)

    def add_repo(self, name: str, files: Files, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"", **files})
        return repo

    def downloaded(self) -> list[str]:
        """Return the files that were downloaded."""
        found = [re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", line) for line in self.requests]
        return [match[1] for match in found if match]


class Refused(Exception):
    """An answer with an error: status, code and message of the hub."""


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.read_body()
        try:
            for part, status in self.hub.failing.items():
                if part in path:
                    raise Refused(status, "", "refused by the test")
            self.reply(200, *self.route(path, body))
        except Refused as refused:
            status, code, message = refused.args
            content = json.dumps({"error": message, "url": f"{self.hub.url}/owner/name"}).encode()
            self.reply(status, content, {"X-Error-Code": code, "X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        if match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(*match.groups())
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.large[match[1]] = body
            return b"", {}
        return json.dumps(self.route_api(path, body)).encode(), {"Content-Type": "application/json"}

    def route_api(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            return self.create_repo(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.start_large_uploads(json.loads(body))
        match = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path)
        if match is None:
            raise Refused(404, "", f"{path} does not exist")
        name, action, revision = match[1], match[2] or "revision", match[3] or "main"
        if action == "branch":
            return self.create_branch(self.find_repo(name), revision)
        repo = self.find_repo(name)
        if action == "preupload":
            paths = [item["path"] for item in json.loads(body)["files"]]
            modes = {item: "lfs" if item.endswith(".safetensors") else "regular" for item in paths}
            return {"files": [{"path": item, "uploadMode": modes[item], "shouldIgnore": False} for item in paths]}
        if action == "commit":
            return self.add_commit(name, revision, [json.loads(line) for line in body.splitlines()])
        sha = self.find_commit(repo, revision)
        if action == "revision":
            return {"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [], "downloads": 0}
        assert action == "tree", path
        return [describe_file(item, content) for item, content in repo.commits[sha].items()]

    def require_writer(self) -> None:
        token = self.headers.get("Authorization", "")
        if READ_TOKEN in token:
            raise Refused(403, "", "You don't have the rights")
        if WRITE_TOKEN not in token:
            raise Refused(401, "", "Invalid username or password.")

    def find_repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and WRITE_TOKEN not in self.headers.get("Authorization", "")):
            raise Refused(401, "RepoNotFound", "Repository not found")
        return repo

    def find_commit(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        return sha

    def create_repo(self, wanted: dict[str, Any]) -> Any:
        self.require_writer()
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repos:
            raise Refused(409, "", "You already created this model repo")
        self.hub.add_repo(name, {}, wanted.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{name}"}

    def create_branch(self, repo: Repo, branch: str) -> Any:
        self.require_writer()
        if branch in repo.branches:
            raise Refused(409, "", "Reference already exists")
        repo.commit(branch, dict(repo.files()))
        return {}

    def start_large_uploads(self, wanted: dict[str, Any]) -> Any:
        self.require_writer()
        return {
            "transfer": "basic",
            "objects": [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}}
                for item in wanted["objects"]
            ],
        }

    def add_commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> Any:
        self.require_writer()
        repo = self.hub.repos[name]
        files = dict(repo.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = repo.commit(branch, files)
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}

    def send_file(self, name: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        repo = self.find_repo(name)
        sha = self.find_commit(repo, revision)
        content = repo.commits[sha].get(path)
        if content is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return content, {"X-Repo-Commit": sha, "ETag": f'"{etag_of(path, content)}"'}

    def log_message(self, *words: object) -> None:
        """Print nothing."""


def etag_of(path: str, content: bytes) -> str:
    """Return the hash by which the hub names a file: SHA-256 in LFS, and that of a git blob else."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe_file(path: str, content: bytes) -> dict[str, Any]:
    """Return the entry of a file in the list of a commit's files."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": etag_of("", content)}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": etag_of(path, content), "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    """Run a hub without repositories on a free port."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """Make the libraries of this process use ``hub``, with a writing token and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    saetrain_hub.is_hub_reachable.cache_clear()
