"""
A Hugging Face Hub on loopback: enough of its HTTP interface for `push_to_hub` and `from_pretrained` to run unchanged.

Two servers run, as with the real Hub: the Hub itself, which knows repositories, and a storage server on another port,
to which large files go and to which downloads of them are redirected. Files live on disk by content, as in git and
LFS; a repository is a chain of commits over them.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


DATE = "2026-01-01T00:00:00.000Z"
LARGE_FILE_SIZE = 10 * 2**20
# What the Hub puts into a new repository, shortened to the patterns that weights have.
GIT_ATTRIBUTES = b"".join(
    pattern + b" filter=lfs diff=lfs merge=lfs -text\n" for pattern in (b"*.safetensors", b"*.bin", b"*.pt", b"*.png")
)


def git_object_id(kind: str, content: bytes) -> str:
    """The id that git gives to an object."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of a commit. `blob_id` is git's; a large file has a pointer in git and its content under `sha256`."""

    size: int
    blob_id: str
    sha256: str | None = None
    pointer_size: int = 0

    @property
    def content_id(self) -> str:
        return self.sha256 or self.blob_id


@dataclass
class Repository:
    """Commits, each a full `{path: File}`, and the branches that name them."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File], summary: str) -> str:
        """Add a commit on top of a branch and return its id."""
        lines = [f"{path} {file.blob_id}" for path, file in sorted(files.items())]
        content = "\n".join([self.branches.get(branch, ""), summary, *lines])
        commit_id = git_object_id("commit", content.encode())
        self.commits[commit_id] = files
        self.branches[branch] = commit_id
        return commit_id

    def resolve(self, revision: str) -> str | None:
        """Commit id of a branch or of a commit id."""
        commit_id = self.branches.get(revision, revision)
        return commit_id if commit_id in self.commits else None


class HubError(Exception):
    """An answer that is an error, with the Hub's code for it in `X-Error-Code`."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


@dataclass
class Request:
    """What an endpoint gets: the parts of its path, the query, headers and the body."""

    method: str
    path: str
    parts: dict[str, str]
    query: dict[str, str]
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Response:
    """What an endpoint answers."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: Any, status: int = 200) -> "Response":
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


Endpoint = Callable[["HubServer", Request], Response]
HUB_ENDPOINTS: list[tuple[str, re.Pattern, Endpoint]] = []
STORAGE_ENDPOINTS: list[tuple[str, re.Pattern, Endpoint]] = []

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


def endpoint(method: str, pattern: str, table: list = HUB_ENDPOINTS) -> Callable[[Endpoint], Endpoint]:
    """Register a function as the answer to a request."""

    def register(function: Endpoint) -> Endpoint:
        table.append((method, re.compile(pattern), function))
        return function

    return register


class HubServer:
    """
    The Hub and its storage, serving from `folder` while the context is open.

    `requests` lists what was asked so far, as `"METHOD /path"`; `failures` lists requests that no endpoint knows or
    that raised, which tests should find empty.
    """

    user = "me"
    token = "hf_test"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.failures: list[str] = []
        self.lock = threading.RLock()
        self._servers = [self._start(HUB_ENDPOINTS), self._start(STORAGE_ENDPOINTS)]
        # Two hosts, as with the real Hub: some versions of `huggingface_hub` give one host the token on any port.
        hub, storage = (server.server_port for server in self._servers)
        self.url, self.storage_url = f"http://127.0.0.1:{hub}", f"http://localhost:{storage}"

    def _start(self, endpoints: list) -> ThreadingHTTPServer:
        handler = type("Handler", (HubRequestHandler,), {"hub": self, "endpoints": endpoints})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exception) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Environment variables that point `huggingface_hub` here; they count only before it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home, "hub")),
            "HF_MODULES_CACHE": str(Path(home, "modules")),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            # The tests' own modules, and the package that is tested wherever this process has it from.
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.getenv("PYTHONPATH")])]),
        }

    def put_content(self, content_id: str, content: bytes) -> None:
        (self.folder / content_id).write_bytes(content)

    def content(self, content_id: str) -> bytes:
        return (self.folder / content_id).read_bytes()

    def has_content(self, content_id: str) -> bool:
        return (self.folder / content_id).is_file()

    def add_regular(self, content: bytes) -> File:
        """Store a file that git itself holds."""
        file = File(len(content), git_object_id("blob", content))
        self.put_content(file.blob_id, content)
        return file

    def large_file(self, sha256: str) -> File:
        """A file whose content was uploaded to the storage."""
        size = (self.folder / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return File(size, git_object_id("blob", pointer), sha256, len(pointer))

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repositories[name]

    def files(self, name: str, revision: str = "main") -> tuple[str, dict[str, File]]:
        """Commit id and files of a revision."""
        repository = self.repository(name)
        commit_id = repository.resolve(revision)
        if commit_id is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit_id, repository.commits[commit_id]

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        """Content of a file, for tests to look at."""
        return self.content(self.files(name, revision)[1][path].content_id)


class HubRequestHandler(BaseHTTPRequestHandler):
    """Finds the endpoint of a request, reads its body and writes the answer."""

    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes; without this each answer waits for a delayed acknowledgement.
    disable_nagle_algorithm = True
    hub: HubServer
    endpoints: list[tuple[str, re.Pattern, Endpoint]]

    def log_message(self, *args) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self) -> Response:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {name: values[-1] for name, values in parse_qs(url.query).items()}
        line, body = f"{self.command} {path}", self.read_body()
        self.hub.requests.append(line)
        try:
            for method, pattern, function in self.endpoints:
                if (match := pattern.fullmatch(path)) and method in (self.command, "*"):
                    request = Request(self.command, path, match.groupdict(), query, self.headers, body)
                    with self.hub.lock:
                        return function(self.hub, request)
            raise NotImplementedError("no such endpoint")
        except HubError as error:
            return Response(json.dumps({"error": str(error)}).encode(), error.status, error.headers)
        except Exception as error:
            self.hub.failures.append(f"{line}: {error!r}")
            return Response(repr(error).encode(), 501)

    def respond(self) -> None:
        response = self.answer()
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = respond


def check_writer(hub: HubServer, request: Request) -> None:
    if request.headers.get("Authorization") != f"Bearer {hub.token}":
        raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The whole content, or the part that a `Range: bytes=first-last` asks for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if match is None:
        return Response(content, 200, headers)
    first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    if first > last:
        return Response(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Response(
        content[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
    )


@endpoint("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Response:
    check_writer(hub, request)
    token = {"displayName": "test", "role": "write"}
    return Response.of_json({"type": "user", "name": hub.user, "orgs": [], "auth": {"accessToken": token}})


@endpoint("POST", "/api/repos/create")
def create_repository(hub: HubServer, request: Request) -> Response:
    check_writer(hub, request)
    asked = request.json()
    name = f"{asked.get('organization') or hub.user}/{asked['name']}"
    answer = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if name in hub.repositories:
        return Response.of_json({"error": "You already created this model repo", **answer}, 409)
    repository = hub.repositories[name] = Repository()
    repository.commit("main", {".gitattributes": hub.add_regular(GIT_ATTRIBUTES)}, "initial commit")
    return Response.of_json(answer)


@endpoint("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Response:
    try:
        metadata = card_metadata(request.json()["content"])
    except yaml.YAMLError as error:
        return Response.of_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Response.of_json({"errors": [], "warnings": warnings})


def card_metadata(card: str) -> dict:
    """The YAML block at the head of a model card."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, flags=re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


@endpoint("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)")
def preupload(hub: HubServer, request: Request) -> Response:
    """Which files are to be uploaded as large files, and what the Hub already has under their names."""
    check_writer(hub, request)
    _, present = hub.files(request.parts["repo"], request.parts["revision"])
    attributes = hub.content(present[".gitattributes"].content_id).decode().splitlines()
    large = [line.split()[0] for line in attributes if "filter=lfs" in line]
    answer = []
    for asked in request.json()["files"]:
        path, binary = asked["path"], b"\0" in base64.b64decode(asked["sample"])
        named = any(fnmatch.fnmatch(Path(path).name, pattern) for pattern in large)
        mode = "lfs" if named or binary or asked["size"] > LARGE_FILE_SIZE else "regular"
        oid = present[path].content_id if path in present else None
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Response.of_json({"files": answer})


@endpoint("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request) -> Response:
    """Where to upload large files; nothing to do for those that the storage has."""
    check_writer(hub, request)
    hub.repository(request.parts["repo"])
    asked = request.json()
    assert (asked["operation"], asked["hash_algo"]) == ("upload", "sha256")
    assert "basic" in asked["transfers"]
    objects = []
    for wanted in asked["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
        if not hub.has_content(wanted["oid"]):
            verify = f"{hub.url}/{request.parts['repo']}.git/info/lfs/objects/verify"
            upload = f"{hub.storage_url}/{wanted['oid']}?size={wanted['size']}"
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        objects.append(answer)
    return Response.of_json({"transfer": "basic", "objects": objects})


@endpoint("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
def lfs_verify(hub: HubServer, request: Request) -> Response:
    check_writer(hub, request)
    asked = request.json()
    if not hub.has_content(asked["oid"]) or hub.large_file(asked["oid"]).size != asked["size"]:
        raise HubError(404, "LfsObjectNotFound", "The large file was not uploaded")
    return Response.of_json({})


@endpoint("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)")
def commit(hub: HubServer, request: Request) -> Response:
    """Apply a commit, one JSON object per line."""
    check_writer(hub, request)
    name, branch = request.parts["repo"], request.parts["revision"]
    parent, files = hub.files(name, branch)
    files, header = dict(files), {}
    for line in request.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            header = value
            if value.get("parentCommit", parent) != parent:
                raise HubError(412, "ParentCommitMismatch", "A commit has happened since. Please refresh")
        elif key == "file":
            assert value["encoding"] == "base64"
            files[value["path"]] = hub.add_regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["algo"] != "sha256" or not hub.has_content(value["oid"]):
                raise HubError(400, "LfsObjectNotFound", f"The large file {value['path']} was not uploaded")
            files[value["path"]] = hub.large_file(value["oid"])
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise NotImplementedError(key)
    if "README.md" in files:
        card_metadata(hub.content(files["README.md"].content_id).decode())
    commit_id = hub.repositories[name].commit(branch, files, header["summary"])
    return Response.of_json(
        {"success": True, "commitOid": commit_id, "commitUrl": f"{hub.url}/{name}/commit/{commit_id}"}
    )


@endpoint("GET", f"/api/models/{REPO}(/revision/(?P<revision>.+))?")
def model_info(hub: HubServer, request: Request) -> Response:
    name = request.parts["repo"]
    commit_id, files = hub.files(name, request.parts["revision"] or "main")
    card = card_metadata(hub.content(files["README.md"].content_id).decode()) if "README.md" in files else {}
    siblings = []
    for path, file in sorted(files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in request.query:
            sibling.update(size=file.size, blobId=file.blob_id)
            if file.sha256:
                sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
        siblings.append(sibling)
    facts = {
        "_id": git_object_id("repo", name.encode())[:24],
        "id": name,
        "modelId": name,
        "author": name.split("/")[0],
        "sha": commit_id,
        "lastModified": DATE,
        "createdAt": DATE,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []),
        "cardData": card,
        "siblings": siblings,
    }
    if "library_name" in card:
        facts["library_name"] = card["library_name"]
    return Response.of_json(facts)


@endpoint("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def tree(hub: HubServer, request: Request) -> Response:
    _, files = hub.files(request.parts["repo"], request.parts["revision"])
    prefix = f"{request.parts['folder']}/" if request.parts["folder"] else ""
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    entries: dict[str, dict] = {}
    for path, file in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        inner = path[len(prefix) :].split("/")[:-1]
        for depth in range(1, len(inner) + 1 if recursive else min(len(inner), 1) + 1):
            folder = prefix + "/".join(inner[:depth])
            entries[folder] = {"type": "directory", "oid": git_object_id("tree", folder.encode()), "size": 0}
        if recursive or not inner:
            entries[path] = {"type": "file", "oid": file.blob_id, "size": file.size}
            if file.sha256:
                entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    if prefix and not entries:
        raise HubError(404, "EntryNotFound", f"{prefix[:-1]} does not exist")
    if request.query.get("expand", "").lower() in ("true", "1"):
        for entry in entries.values():
            entry["lastCommit"] = {"id": request.parts["revision"], "title": "", "date": DATE}
    return Response.of_json([{**entry, "path": path} for path, entry in entries.items()])


@endpoint("*", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: HubServer, request: Request) -> Response:
    """A file, or for a large one the way to the storage; `HEAD` tells its size and hash either way."""
    commit_id, files = hub.files(request.parts["repo"], request.parts["revision"])
    headers = {"X-Repo-Commit": commit_id}
    path = request.parts["path"]
    if path not in files:
        raise HubError(404, "EntryNotFound", "Entry not found", **headers)
    file = files[path]
    if file.sha256 is None:
        return ranged(request, hub.content(file.blob_id), {"ETag": f'"{file.blob_id}"', **headers})
    headers.update({"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'})
    return Response(b"", 302, {"Location": f"{hub.storage_url}/{file.sha256}", **headers})


@endpoint("PUT", "/(?P<sha256>[0-9a-f]{64})", STORAGE_ENDPOINTS)
def put_large_file(hub: HubServer, request: Request) -> Response:
    """Uploads are signed by their address; the storage believes no token and checks what arrives."""
    digest = hashlib.sha256(request.body).hexdigest()
    if digest != request.parts["sha256"] or len(request.body) != int(request.query["size"]):
        raise HubError(400, "BadDigest", "The content does not have the announced hash or size")
    assert "Authorization" not in request.headers
    hub.put_content(digest, request.body)
    return Response(headers={"ETag": f'"{digest}"'})


@endpoint("*", "/(?P<sha256>[0-9a-f]{64})", STORAGE_ENDPOINTS)
def get_large_file(hub: HubServer, request: Request) -> Response:
    assert "Authorization" not in request.headers
    sha256 = request.parts["sha256"]
    if not hub.has_content(sha256):
        raise HubError(404, "EntryNotFound", "Entry not found")
    return ranged(request, hub.content(sha256), {"ETag": f'"{sha256}"'})
