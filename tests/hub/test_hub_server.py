"""The Hub-shaped server keeps the promises that the Hub's client relies on."""

import hashlib
import json
import urllib.request

import pytest
from hub.hub_server import HubServer


CONTENT = bytes(range(100)) * 2
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path) as server:
        ask(server, "POST", "/api/repos/create", {"name": "tiny"})
        yield server


def ask(hub, method, path, body=None, **headers):
    """Send a request as the Hub's owner; the answer is `(status, headers, content)`, redirects are not followed."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    url = path if path.startswith("http") else hub.url + path
    if url.startswith(hub.url):
        headers.setdefault("Authorization", f"Bearer {hub.token}")
    request = urllib.request.Request(url, body, headers, method=method)
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.HTTPHandler())
    with opener.open(request) as response:
        return response.status, response.headers, response.read()


def upload_large_file(hub, content=CONTENT):
    asked = {
        "operation": "upload",
        "transfers": ["basic"],
        "hash_algo": "sha256",
        "objects": [{"oid": SHA256, "size": len(CONTENT)}],
    }
    _, _, answer = ask(hub, "POST", "/me/tiny.git/info/lfs/objects/batch", asked)
    actions = json.loads(answer)["objects"][0].get("actions")
    return None if actions is None else ask(hub, "PUT", actions["upload"]["href"], content)[0]


def commit(hub, *operations, **header):
    lines = [{"key": "header", "value": {"summary": "test", "description": "", **header}}, *operations]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    status, _, answer = ask(hub, "POST", "/api/models/me/tiny/commit/main", body)
    return status, json.loads(answer)


LARGE_FILE = {"key": "lfsFile", "value": {"path": "a/b.bin", "algo": "sha256", "oid": SHA256, "size": len(CONTENT)}}


def test_storage_checks_the_hash(hub):
    assert upload_large_file(hub, CONTENT[:-1] + b"x") == 400
    assert upload_large_file(hub, CONTENT[:-1]) == 400
    assert commit(hub, LARGE_FILE)[0] == 400
    assert upload_large_file(hub) == 200
    assert upload_large_file(hub) is None
    assert commit(hub, LARGE_FILE)[0] == 200


def test_large_files_are_served_by_the_storage_also_in_parts(hub):
    upload_large_file(hub)
    commit_id = commit(hub, LARGE_FILE)[1]["commitOid"]
    status, headers, _ = ask(hub, "HEAD", "/me/tiny/resolve/main/a/b.bin")
    assert (status, headers["X-Repo-Commit"]) == (302, commit_id)
    assert (headers["X-Linked-ETag"], headers["X-Linked-Size"]) == (f'"{SHA256}"', str(len(CONTENT)))
    assert headers["Location"].startswith(hub.storage_url)
    assert ask(hub, "GET", headers["Location"])[2] == CONTENT

    status, part_headers, part = ask(hub, "GET", headers["Location"], Range="bytes=150-")
    assert (status, part) == (206, CONTENT[150:])
    assert part_headers["Content-Range"] == "bytes 150-199/200"
    assert ask(hub, "GET", headers["Location"], Range="bytes=10-19")[2] == CONTENT[10:20]
    assert ask(hub, "GET", headers["Location"], Range="bytes=200-")[0] == 416


def test_commits_are_kept_and_named_like_git(hub):
    first, _ = hub.files("me/tiny")
    operation = {"key": "file", "value": {"path": "hello", "content": "aGVsbG8K", "encoding": "base64"}}
    second = commit(hub, operation)[1]["commitOid"]
    assert len(second) == 40
    assert hub.files("me/tiny")[0] == second
    # What `git hash-object` says of "hello\n".
    assert hub.files("me/tiny")[1]["hello"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert "hello" not in hub.files("me/tiny", first)[1]
    assert commit(hub, operation, parentCommit=first)[0] == 412
    assert ask(hub, "GET", f"/me/tiny/resolve/{second}/hello")[2] == b"hello\n"
    assert ask(hub, "GET", f"/me/tiny/resolve/{first}/hello")[0] == 404


def test_tree(hub):
    upload_large_file(hub)
    commit(hub, LARGE_FILE)

    def paths(url):
        return [(entry["type"], entry["path"]) for entry in json.loads(ask(hub, "GET", url)[2])]

    top = [("file", ".gitattributes"), ("directory", "a")]
    assert paths("/api/models/me/tiny/tree/main") == top
    assert paths("/api/models/me/tiny/tree/main?recursive=true") == [*top, ("file", "a/b.bin")]
    assert paths("/api/models/me/tiny/tree/main/a") == [("file", "a/b.bin")]
    entry = json.loads(ask(hub, "GET", "/api/models/me/tiny/tree/main/a?expand=true")[2])[0]
    assert entry["lfs"]["oid"] == SHA256
    assert entry["lastCommit"]["date"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/me/none/resolve/main/x", "RepoNotFound"),
        ("/me/tiny/resolve/none/x", "RevisionNotFound"),
        ("/me/tiny/resolve/main/x", "EntryNotFound"),
        ("/api/models/me/none", "RepoNotFound"),
        ("/api/models/me/tiny/revision/none", "RevisionNotFound"),
    ],
)
def test_missing_things(hub, path, code):
    status, headers, _ = ask(hub, "GET", path)
    assert (status, headers["X-Error-Code"]) == (404, code)


def test_invalid_card_is_refused(hub):
    status, _, answer = ask(hub, "POST", "/api/validate-yaml", {"content": "---\na: [\n---\n", "repoType": "model"})
    assert status == 400
    assert json.loads(answer)["errors"]


def test_repository_is_made_once_by_its_owner(hub):
    assert ask(hub, "POST", "/api/repos/create", {"name": "tiny"})[0] == 409
    assert ask(hub, "POST", "/api/repos/create", {"name": "other"}, Authorization="Bearer hf_other")[0] == 401
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 200


def test_unknown_request_is_a_failure(hub):
    assert ask(hub, "GET", "/api/nothing")[0] == 501
    assert hub.failures == ["GET /api/nothing: NotImplementedError('no such endpoint')"]
