"""A Hub in a thread: as much of its HTTP API as the real ``huggingface_hub`` and ``datasets`` need for dataset repositories."""

import base64
import hashlib
import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets.config
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session

TOKEN = "hf_" + "s3cr3t" * 6

SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


class Repository:
    """Commits of a repository: each is all of its files."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server and what it holds.

    Attributes:
        repositories: By ``namespace/name``.
        requests: Method, path and whether the token came along, of everything that was asked for.
        fail: Called with method and path before anything is done; returns a status to fail with, "reset" to cut the connection
            after half of the body was read, or None.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.fail: Callable[[str, str], int | str | None] = lambda method, path: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision)]


def validate_card(content: str) -> list[str]:
    """The rules of the Hub's ``/api/validate-yaml`` for the keys that this package writes, or its user."""
    match = re.match(r"^---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["there is no YAML header"]
    header = yaml.safe_load(match[1])
    known = {"configs", "pretty_name", "size_categories", "tags", "license", "extra_gated_prompt"}
    errors = [f"unknown key {key}" for key in set(header) - known]
    errors += [f"size {size!r}" for size in header["size_categories"] if size not in SIZES]
    errors += [f"tag {tag!r}" for tag in header["tags"] if not isinstance(tag, str)]
    if not isinstance(header["pretty_name"], str):
        errors.append("pretty_name")
    if sum(config.get("default", False) for config in header["configs"]) > 1:
        errors.append("two defaults")
    for config in header["configs"]:
        if not isinstance(config["config_name"], str) or set(config) - {"config_name", "data_files", "default"}:
            errors.append(f"config {config!r}")
        errors += [f"data file {file!r}" for file in config["data_files"] if set(file) != {"split", "path"}]
    return errors


def validate_model_card(content: str) -> list[str]:
    """The same for the keys that the Trainer writes into the header of a model card."""
    match = re.match(r"^---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["there is no YAML header"]
    header = yaml.safe_load(match[1])
    lists, texts = (
        {"datasets", "language", "metrics", "tags"},
        {"base_model", "library_name", "license", "pipeline_tag"},
    )
    errors = [f"unknown key {key}" for key in set(header) - lists - texts - {"model-index"}]
    errors += [f"{key} {header[key]!r}" for key in texts & set(header) if not isinstance(header[key], str)]
    errors += [f"{key} {e!r}" for key in lists & set(header) for e in header[key] if not isinstance(e, str)]
    for entry in header.get("model-index", []):
        if set(entry) != {"name", "results"} or not isinstance(entry["name"], str):
            errors.append(f"model-index {entry!r}")
    return errors


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes: 40 ms a request otherwise

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.server.requests.append((self.command, path, authorized))
        failure = self.server.fail(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if failure == "reset":
            self.rfile.read(length // 2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        if failure is not None:
            self.send(failure, {"error": f"the server says {failure}"})
            return
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate),
            ("GET", r"/api/datasets/([^/]+/[^/]+)", self.info),
            ("GET", r"/api/datasets/([^/]+/[^/]+)/revision/(.+)", self.info),
            ("GET", r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self.tree),
            ("POST", r"/api/datasets/([^/]+/[^/]+)/paths-info/(.+)", self.paths_info),
            ("POST", r"/api/datasets/([^/]+/[^/]+)/branch/(.+)", self.branch),
            ("POST", r"/api/datasets/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            ("POST", r"/api/datasets/([^/]+/[^/]+)/commit/(.+)", self.commit),
            ("POST", r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self.store),
            ("HEAD", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            ("GET", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for method, pattern, handle in routes:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                if "([^/]+/[^/]+)" in pattern and not self.may_see(match[1], authorized):
                    self.send(
                        404 if authorized else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
                    )
                elif (
                    method in ("POST", "PUT")
                    and not authorized
                    and handle not in (self.paths_info, self.store, self.validate)
                ):
                    self.send(401, {"error": "Invalid username or password."})
                else:
                    handle(body, *match.groups())
                return
        self.send(404, {"error": f"no such page: {self.command} {path}"})

    def may_see(self, repo_id: str, authorized: bool) -> bool:
        repository = self.server.repositories.get(repo_id)
        return repository is not None and (authorized or not repository.private)

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def found(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.server.repositories[repo_id]
        oid = repository.resolve(revision)
        if oid is None:
            self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return oid, repository.commits[oid]

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        repo_id = f"{given['organization']}/{given['name']}"
        assert given["type"] == "dataset"
        known = repo_id in self.server.repositories
        if not known:
            self.server.repositories[repo_id] = Repository(given.get("visibility") == "private")
        self.send(409 if known else 200, {"url": f"{self.server.url}/datasets/{repo_id}"})

    def validate(self, body: bytes) -> None:
        given = json.loads(body)
        rules = validate_model_card if given["repoType"] == "model" else validate_card
        errors = rules(given["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.send(400 if errors else 200, answer)

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        if found := self.found(repo_id, revision):
            oid, files = found
            siblings = [{"rfilename": name} for name in sorted(files)]
            private = self.server.repositories[repo_id].private
            self.send(
                200, {"_id": "1", "id": repo_id, "sha": oid, "private": private, "siblings": siblings, "tags": []}
            )

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(".parquet"):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return entry

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None = None) -> None:
        if found := self.found(repo_id, revision):
            prefix = "" if not folder else folder.rstrip("/") + "/"
            recursive = "recursive=True" in self.path or "recursive=true" in self.path
            entries, folders = [], set()
            for path, content in sorted(found[1].items()):
                if path.startswith(prefix):
                    inside = path[len(prefix) :]
                    folders |= {prefix + inside.split("/")[0]} if "/" in inside else set()
                    if recursive or "/" not in inside:
                        entries.append(self.entry(path, content))
            entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
            if entries:
                self.send(200, entries)
            else:
                self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        if found := self.found(repo_id, revision):
            given = json.loads(body)
            entries = []
            for path in given["paths"]:
                if path in found[1]:
                    entries.append(self.entry(path, found[1][path]))
                elif any(name.startswith(path + "/") for name in found[1]):
                    entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
            self.send(200, entries)

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        repository = self.server.repositories[repo_id]
        known = name in repository.branches
        repository.branches.setdefault(name, repository.branches["main"])
        self.send(409 if known else 201, {})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if self.found(repo_id, revision):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".parquet", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.send(200, {"files": files})

    def batch(self, body: bytes, repo_id: str) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self.send(200, b"")

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repository = self.server.repositories[repo_id]
        if revision not in repository.branches:
            self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = dict(repository.commits[repository.branches[revision]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert line["key"] == "header"
                repository.messages.append(value["summary"])
        oid = repository.commit(revision, files)
        url = f"{self.server.url}/datasets/{repo_id}/commit/{oid}"
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        if found := self.found(repo_id, revision):
            oid, files = found
            if path not in files:
                self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
                return
            content = files[path]
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"}
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if span is None:
                self.send(200, content, headers)
                return
            start, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.send(206, content[start : end + 1], headers)


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """Run a Hub and point the clients of this process at it, with caches of their own and no token from outside."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_TOKEN_PATH": str(folder / "no token"),
        "HF_STORED_TOKENS_PATH": str(folder / "no tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between retries
    close_session()
    try:
        yield hub
    finally:
        close_session()
        hub.shutdown()
        hub.server_close()
        thread.join()
