"""A small Hugging Face Hub on this machine, for tests that use the real client over real HTTP.

Standard library only (PyYAML for card metadata). It speaks what `huggingface_hub` sends for a push with Git LFS and
for reading a model: repository creation, card validation, upload modes, LFS batch and upload, commits, branches,
tags and pull requests, collections, model info, tree, and files with `X-Repo-Commit` and `ETag`. It has accounts
with tokens, private repositories that are invisible without one, and faults on request.

    python tests/hub_server.py --port 0 --root DIR          # prints its URL
    HF_ENDPOINT=<url> HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_writer python …

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so clients run in processes of their own.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from hub_clients import Port

#: token → account. An account may write to its own name and to its organisations.
ACCOUNTS = {
    "hf_writer": {"name": "writer", "orgs": {"lab": "write", "readers": "read"}, "role": "write"},
    "hf_reader": {"name": "reader", "orgs": {}, "role": "read"},
    "hf_fine": {
        "name": "writer",
        "orgs": {},
        "role": "fineGrained",
        "more": {"fineGrained": {"global": [], "scoped": [{"permissions": ["repo.content.read"]}]}},
    },
}

#: Licences that the Hub's list knows, as far as tests use them.
LICENCES = {"apache-2.0", "mit", "other", "unknown", "llama2", "llama3", "llama3.1", "llama3.2", "gemma", "cc-by-4.0"}

FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
REPO_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


@dataclass
class Blob:
    """A file in a commit: its bytes, or the SHA-256 of an LFS object."""

    size: int
    oid: str
    content: bytes | None = None
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a branch, newest first, without the empty one that every repository starts with."""
        found, oid = [], self.branches.get(revision, revision)
        while oid:
            commit = self.commits[oid]
            found.append(commit)
            oid = commit.parent or ""
        return [commit for commit in found if commit.parent is not None]


class HubServer:
    """The state of the Hub and its HTTP server.

    Attributes:
        url: where it listens.
        repos: repository id → repository; those of datasets begin with `datasets/`.
        collections: slug → title, visibility and items.
        requests: (method, path) of every request, in order.
        faults: what goes wrong next; each entry is used up by the first request that it fits:
            "drop-lfs" cuts the connection in the middle of an LFS upload, "stall-lfs" stops reading there,
            "drop-commit" cuts it before a commit is made, "lose-commit-response" after. Of the endpoint with the
            method NAME below, "503 NAME" answers with a status and does nothing; "html NAME" and "hollow NAME" do what
            is asked for, and answer with a page or an empty object.
    """

    def __init__(self, root: str | os.PathLike[str], port: int = 0) -> None:
        self.objects = Path(root) / "lfs"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.stalled = threading.Event()
        self.stopped = threading.Event()
        self.lock = threading.RLock()
        hub = self

        class BoundHandler(Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", port), BoundHandler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def start(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, *names: str) -> str | None:
        with self.lock:
            for name in names:
                if name in self.faults:
                    self.faults.remove(name)
                    return name
        return None

    def count(self, method: str, pattern: str) -> int:
        """How many requests had this method and a path that matches the pattern."""
        return sum(one == method and re.search(pattern, path) is not None for one, path in self.requests)

    def state_of(self, repo: Repo, revision: str = "main") -> Commit:
        """The newest commit of a branch."""
        return repo.commits[repo.branches[revision]]

    def create(self, repo_id: str, private: bool) -> Repo:
        repo = Repo(repo_id, private)
        blob = make_blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.commit(repo, None, "initial commit", {".gitattributes": blob})
        self.repos[repo_id] = repo
        return repo

    def commit(
        self, repo: Repo, parent: str | None, message: str, files: dict[str, Blob], branch: str = "main"
    ) -> str:
        listing = sorted((name, blob.oid) for name, blob in files.items())
        oid = hashlib.sha1(json.dumps([parent, message, listing, time.time_ns()]).encode()).hexdigest()
        repo.commits[oid] = Commit(oid, parent, message, files)
        repo.branches[branch] = oid
        return oid


def make_blob(content: bytes) -> Blob:
    """A regular file, named by Git's object id."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return Blob(len(content), oid, content=content)


def lfs_blob(sha256: str, size: int) -> Blob:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Blob(size, make_blob(pointer).oid, sha256=sha256)


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = {"error": message, **body}


class Handler(BaseHTTPRequestHandler):
    """One request. Routes are tried in order; the first whose method and pattern fit answers."""

    state: HubServer
    spoiled: bytes | None = None
    protocol_version = "HTTP/1.1"

    def route(self) -> None:
        self.body = self.read_body() if self.command in ("POST", "PUT") and not self.is_lfs_upload() else b""
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.state.requests.append((self.command, url.path))
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split("|"):
                    self.spoil_next(answer.__name__)
                    answer(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
                    return
            raise Refusal(404, f"no such endpoint: {self.command} {url.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, "Retry-After": "0"}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer(refusal.body, refusal.status, headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = route

    def set_faults(self) -> None:
        """Replace the faults; answers with those that no request has used up."""
        left, self.state.faults[:] = list(self.state.faults), json.loads(self.body)
        self.answer(left)

    def spoil_next(self, name: str) -> None:
        self.spoiled = None
        with self.state.lock:
            fault = next((fault for fault in self.state.faults if fault.endswith(f" {name}")), None)
            if fault is not None:
                self.state.faults.remove(fault)
        if fault is not None and fault.split()[0].isdigit():
            raise Refusal(int(fault.split()[0]), "not now")
        self.spoiled = {"html": b"<html>Sign in to the network</html>", "hollow": b"{}"}.get(
            (fault or "").split(" ")[0]
        )

    def is_lfs_upload(self) -> bool:
        return self.command == "PUT" and self.path.startswith("/lfs/")

    def body_chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            chunk = self.rfile.read(min(left, 1 << 16))
            if not chunk:
                raise ConnectionResetError("the client went away")
            left -= len(chunk)
            yield chunk

    def read_body(self) -> bytes:
        return b"".join(self.body_chunks())

    def answer(self, body: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        content = content if self.spoiled is None or status >= 400 else self.spoiled
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value.replace("\n", " ").encode("ascii", "replace").decode())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def drop(self) -> None:
        """Cut the connection without an answer."""
        self.close_connection = True
        self.connection.close()
        raise ConnectionResetError("dropped on request")

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    # Who asks, and for what ----------------------------------------------------------------------------------------

    def account(self, required: bool = False) -> dict[str, Any] | None:
        header = self.headers.get("Authorization")
        if header is not None:
            account = ACCOUNTS.get(header.removeprefix("Bearer "))
            if account is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            return account
        if required:
            raise Refusal(401, "Invalid username or password.")
        return None

    def may_write(self, owner: str) -> None:
        account = self.account(required=True)
        assert account is not None
        owners = (account["name"], *(name for name, role in account["orgs"].items() if role == "write"))
        if account["role"] != "write" or owner not in owners:
            raise Refusal(403, f"You don't have the rights to write under the namespace {owner!r}")

    def repo(self, repo_id: str) -> Repo:
        account = self.account()
        repo = self.state.repos.get(repo_id)
        owners = () if account is None else (account["name"], *account["orgs"])
        if repo is None or (repo.private and repo_id.split("/")[0] not in owners):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        if repo.gated and "/resolve/" in self.path and repo_id.split("/")[0] not in owners:
            raise Refusal(403, f"Access to model {repo_id} is restricted. You must have access to it.", "GatedRepo")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        oid = repo.branches.get(revision) or repo.tags.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[oid]

    # Endpoints -----------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        account = self.account(required=True)
        assert account is not None
        self.answer(
            {
                "type": "user",
                "name": account["name"],
                "orgs": [{"name": name, "roleInOrg": role} for name, role in account["orgs"].items()],
                "auth": {"accessToken": {"displayName": "test", "role": account["role"], **account.get("more", {})}},
            }
        )

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        account = self.account(required=True)
        assert account is not None
        owner = wanted.get("organization") or account["name"]
        self.may_write(owner)
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.state.url}/{repo_id}"
        with self.state.lock:
            if repo_id in self.state.repos:
                raise Refusal(409, "You already created this model repo", url=url)
            self.state.create(repo_id, wanted.get("visibility") == "private")
        self.answer({"url": url, "name": repo_id, "id": hashlib.sha1(repo_id.encode()).hexdigest()[:24]})

    def change_settings(self, repo_id: str) -> None:
        self.may_write(repo_id.split("/")[0])
        repo, wanted = self.repo(repo_id), json.loads(self.body)
        repo.private = wanted["private"] if "private" in wanted else wanted["visibility"] == "private"
        self.answer(wanted)

    def validate_yaml(self) -> None:
        errors, warnings = check_card(json.loads(self.body)["content"])
        status = 400 if errors else 200
        if self.headers.get("Accept") == "text/plain":  # ModelCard.validate
            self.answer("\n".join(f"- {text}" for text in errors).encode(), status, {"Content-Type": "text/plain"})
            return
        found = {"errors": errors, "warnings": warnings}
        self.answer({key: [{"message": text} for text in texts] for key, texts in found.items()}, status)

    def create_branch(self, repo_id: str, branch: str) -> None:
        self.may_write(repo_id.split("/")[0])
        repo = self.repo(repo_id)
        if branch in repo.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repo.branches[branch] = self.commit_of(repo, json.loads(self.body or b"{}").get("startingPoint", "main")).oid
        self.answer({})

    def create_tag(self, repo_id: str, revision: str) -> None:
        self.may_write(repo_id.split("/")[0])
        repo, tag = self.repo(repo_id), json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise Refusal(409, f"Reference already exists: refs/tags/{tag}")
        repo.tags[tag] = self.commit_of(repo, revision).oid
        self.answer({})

    def refs(self, repo_id: str) -> None:
        repo = self.repo(repo_id)

        def listed(kind: str, named: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in named.items()]

        branches = {name: oid for name, oid in repo.branches.items() if not name.startswith("refs/")}
        self.answer({"branches": listed("heads", branches), "tags": listed("tags", repo.tags), "converts": []})

    def create_collection(self) -> None:
        wanted = json.loads(self.body)
        self.may_write(wanted["namespace"])
        title = re.sub(r"\W+", "-", wanted["title"].lower())
        slug = f"{wanted['namespace']}/{title}-{hashlib.sha1(wanted['title'].encode()).hexdigest()[:24]}"
        with self.state.lock:
            if slug in self.state.collections:
                raise Refusal(409, "You already created this collection", slug=slug)
            self.state.collections[slug] = {"title": wanted["title"], "private": wanted["private"], "items": []}
        self.get_collection(slug)

    def get_collection(self, slug: str) -> None:
        self.account(required=True)
        collection = self.state.collections[slug]
        self.answer(
            {
                **collection,
                "slug": slug,
                "owner": {"name": slug.split("/")[0], "type": "user"},
                "lastUpdated": "2026-01-01T00:00:00.000Z",
                "position": 0,
                "theme": "green",
                "upvotes": 0,
            }
        )

    def add_collection_item(self, slug: str) -> None:
        self.may_write(slug.split("/")[0])
        wanted, items = json.loads(self.body), self.state.collections[slug]["items"]
        name = wanted["item"]["id"]
        self.repo(name)
        if name in [item["id"] for item in items]:
            raise Refusal(409, "This item is already in the collection")
        item = {"id": name, "type": "model", "repoType": "model", "position": len(items), "_id": f"{len(items):024}"}
        items.append({**item, **({"note": {"text": wanted["note"]}} if "note" in wanted else {})})
        self.get_collection(slug)

    def preupload(self, repo_id: str, revision: str) -> None:
        self.account(required=True)
        files = self.commit_of(self.repo(repo_id), revision).files
        modes = []
        for file in json.loads(self.body)["files"]:
            sample = base64.b64decode(file["sample"])
            large = file["path"].endswith((".safetensors", ".png")) or file["size"] > 10 << 20 or b"\0" in sample
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in files:
                mode["oid"] = files[file["path"]].etag
            modes.append(mode)
        self.answer({"files": modes})

    def lfs_batch(self, repo_id: str) -> None:
        self.may_write(self.account(required=True)["name"])  # for pull requests, to repositories of others, too
        self.repo(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.state.objects / wanted["oid"]).is_file():
                entry["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        fault = self.state.fault("drop-lfs", "stall-lfs")
        partial = self.state.objects / f".{oid}.{threading.get_ident()}"
        sha = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                for chunk in self.body_chunks():
                    sha.update(chunk)
                    file.write(chunk)
                    if fault == "drop-lfs":
                        self.drop()
                    if fault == "stall-lfs":
                        self.state.stalled.set()
                        self.state.stopped.wait()
                        self.drop()
            if sha.hexdigest() != oid:
                raise Refusal(400, "the content does not have the promised SHA-256")
            partial.replace(self.state.objects / oid)
        finally:
            partial.unlink(missing_ok=True)
        self.answer({})

    def make_commit(self, repo_id: str, revision: str) -> None:
        create_pr = self.query.get("create_pr") == "1"
        if create_pr:
            self.account(required=True)
        else:
            self.may_write(repo_id.split("/")[0])
        if self.state.fault("drop-commit"):
            self.drop()
        with self.state.lock:
            repo = self.repo(repo_id)
            parent = self.commit_of(repo, revision)
            files, message = dict(parent.files), ""
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    message = value["summary"]
                elif entry["key"] == "file":
                    files[value["path"]] = make_blob(base64.b64decode(value["content"]))
                elif entry["key"] == "lfsFile":
                    if not (self.state.objects / value["oid"]).is_file():
                        raise Refusal(400, f"{value['path']}: the LFS object was never uploaded")
                    files[value["path"]] = lfs_blob(value["oid"], (self.state.objects / value["oid"]).stat().st_size)
                elif entry["key"] == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                else:
                    raise Refusal(400, f"unknown operation {entry['key']}")
            number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
            branch = f"refs/pr/{number}" if create_pr else revision
            oid = self.state.commit(repo, parent.oid, message, files, branch)
        if self.state.fault("lose-commit-response"):
            self.drop()
        url = f"{self.state.url}/{repo_id}"
        self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
            | ({"pullRequestUrl": f"{url}/discussions/{number}"} if create_pr else {})
        )

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repo = self.repo(repo_id)
        commit = self.commit_of(repo, revision)
        card = commit.files.get("README.md")
        self.answer(
            {
                "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.oid,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "cardData": card_metadata(card.content.decode()) if card and card.content else None,
                "siblings": [{"rfilename": name} for name in sorted(commit.files)],
            }
        )

    def tree(self, repo_id: str, revision: str, path: str = "") -> None:
        commit = self.commit_of(self.repo(repo_id), revision)
        recursive = self.query.get("recursive", "").lower() == "true"
        prefix = f"{path.strip('/')}/" if path else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(commit.files.items()):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "path": name, "oid": blob.oid, "size": blob.size}
                if blob.sha256:
                    entries[name]["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        if prefix and not entries:
            raise Refusal(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        self.answer(list(entries.values()))

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.commit_of(self.repo(repo_id), revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        blob = commit.files[path]
        content = blob.content if blob.sha256 is None else (self.state.objects / blob.sha256).read_bytes()
        assert content is not None
        headers["ETag"] = f'"{blob.etag}"'
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first = int(wanted[1])
            last = min(int(wanted[2] or blob.size - 1), blob.size - 1)
            if first >= blob.size:
                raise Refusal(416, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
            status, content = 206, content[first : last + 1]
        self.answer(content, status, headers)


_ID = r"(?P<repo_id>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>refs(?:%2F|/)pr(?:%2F|/)\d+|[^/]+)"

#: (methods, pattern of the path, handler)
ROUTES = (
    ("POST", r"/faults", Handler.set_faults),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("PUT", rf"/api/models/{_ID}/settings", Handler.change_settings),
    ("POST", rf"/api/models/{_ID}/branch/(?P<branch>.+)", Handler.create_branch),
    ("POST", rf"/api/models/{_ID}/tag/{_REVISION}", Handler.create_tag),
    ("GET", rf"/api/models/{_ID}/refs", Handler.refs),
    ("POST", r"/api/collections", Handler.create_collection),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", Handler.add_collection_item),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", Handler.get_collection),
    ("POST", rf"/api/models/{_ID}/preupload/{_REVISION}", Handler.preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    ("POST", rf"/api/models/{_ID}/commit/{_REVISION}", Handler.make_commit),
    ("GET", rf"/api/models/{_ID}/revision/{_REVISION}", Handler.model_info),
    ("GET", rf"/api/models/{_ID}/tree/{_REVISION}(?:/(?P<path>.+))?", Handler.tree),
    ("GET", rf"/api/models/{_ID}", Handler.model_info),
    ("GET|HEAD", rf"/(?P<repo_id>datasets/[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
    ("GET|HEAD", rf"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
)


# Card metadata -------------------------------------------------------------------------------------------------------


def card_metadata(content: str) -> dict[str, Any] | None:
    match = FRONT_MATTER.search(content)
    data = yaml.safe_load(match.group(2)) if match else None
    return data if isinstance(data, dict) else None


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of the metadata, by the rules of the Hub that matter to a model card."""
    match = FRONT_MATTER.search(content)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match.group(2))
    except yaml.YAMLError as error:
        return [f"Bad YAML: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be an object"], []
    errors: list[str] = []

    def many(key: str) -> list[Any]:
        value = data.get(key)
        return value if isinstance(value, list) else [] if value is None else [value]

    for key, value in data.items():
        if value is None:
            errors.append(f'"{key}" must not be null')
    for language in many("language"):
        if not isinstance(language, str) or not (
            re.fullmatch(r"[a-z]{2,3}", language) or language in ("code", "multilingual")
        ):
            errors.append(f'"language" with value "{language}" is not valid')
    for licence in many("license"):
        if licence not in LICENCES:
            errors.append(f'"license" must be one of {sorted(LICENCES)}')
    for key in ("base_model", "datasets"):
        for value in many(key):
            if not isinstance(value, str) or not REPO_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid')
    if data.get("base_model_relation") not in (None, "finetune", "adapter", "quantized", "merge"):
        errors.append('"base_model_relation" must be one of [finetune, adapter, quantized, merge]')
    if "base_model_relation" in data and "base_model" not in data:
        errors.append('"base_model_relation" needs "base_model"')
    for key in ("tags", "metrics"):
        if not all(isinstance(value, str) and value for value in many(key)):
            errors.append(f'"{key}" must be an array of strings')
    for position, entry in enumerate(many("model-index")):
        where = f"model-index[{position}]"
        if not entry.get("name"):
            errors.append(f'"{where}.name" is required')
        for number, result in enumerate(entry.get("results") or []):
            there = f"{where}.results[{number}]"
            if not (result.get("task") or {}).get("type"):
                errors.append(f'"{there}.task.type" is required')
            dataset = result.get("dataset") or {}
            if not dataset.get("name"):
                errors.append(f'"{there}.dataset.name" is required')
            if not REPO_ID.fullmatch(str(dataset.get("type", ""))):
                errors.append(f'"{there}.dataset.type" fails to match the required pattern')
            if not result.get("metrics"):
                errors.append(f'"{there}.metrics" is required')
            for metric in result.get("metrics") or []:
                value = metric.get("value")
                if not metric.get("type"):
                    errors.append(f'"{there}.metrics.type" is required')
                if value is None or (isinstance(value, float) and value - value != 0):
                    errors.append(f'"{there}.metrics.value" must be a number')
    return errors, []


@functools.cache
def _port() -> Port:
    return Port()


@pytest.fixture(name="hub_server")
def hub_server_fixture(tmp_path: Path) -> Iterator[HubServer]:
    """A fresh Hub for one test, on the port of all Hubs of this process."""
    server = HubServer(tmp_path / "hub", _port().number).start()
    yield server
    server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 chooses a free one")
    parser.add_argument("--root", required=True, help="folder for uploaded large files")
    arguments = parser.parse_args()
    server = HubServer(arguments.root, arguments.port)
    print(server.url, flush=True)
    try:
        server.server.serve_forever()
    except KeyboardInterrupt:
        server.server.server_close()


if __name__ == "__main__":
    main()
