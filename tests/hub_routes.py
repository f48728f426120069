"""What the Hub of the tests answers: a route a method."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repositories import START, USER, HubError, Repository, git_id

if TYPE_CHECKING:
    from hub_server import Hub

# What the real Hub keeps as large files, by default, of what is met here.
LARGE_SUFFIXES = {".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".pth", ".npz", ".png", ".h5ad"}
DATE = "2026-01-01T00:00:00.000Z"
# Some of those that the real Hub accepts.
LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "other"}


class Handler(BaseHTTPRequestHandler):
    """One request; every route is a method that returns what is sent as JSON, or has answered by itself."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: "Hub", *args) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args) -> None:
        """Nothing on stderr: `Hub.requests` is the log."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # ---------------------------------------------------------------- a request

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        self.body = b""
        try:
            if self.command == "PUT":
                self._receive_large_file()
                return
            self.body = b"".join(self._pieces())
            for methods, pattern, method in ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in methods.split():
                    with self.hub.lock:
                        answer = method(self, **{name: unquote(part) for name, part in match.groupdict("").items()})
                    if answer is not None:
                        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
                    return
            raise HubError(404, f"No such route: {self.command} {self.route}")
        except HubError as error:
            body = json.dumps({"error": error.message}).encode()
            self._answer(error.status, body, {"Content-Type": "application/json", **error.headers})

    def _pieces(self) -> Iterator[bytes]:
        """The body of the request, whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                piece = self.rfile.read(min(left, 1 << 16))
                if not piece:
                    raise ConnectionError("the client has gone")
                left -= len(piece)
                yield piece
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        # Logged before it is answered, so that a client that has its answer finds it there.
        self.hub.requests.append((self.command, unquote(self.path), status, self.token))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---------------------------------------------------------------- who may

    def _known(self, *, needed: bool = True) -> set[str]:
        """Namespaces of the request's token."""
        if self.token and self.token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        if needed and not self.token:
            raise HubError(401, "Invalid username or password.")
        return self.hub.tokens.get(self.token, set())

    def _readable(self, kind: str, id: str) -> Repository:
        """A repository; one that is not there and one that is hidden look the same, and without a token it is 401."""
        namespaces = self._known(needed=False)
        found = self.hub.repositories.get((kind, id))
        if found is None or (found.private and id.split("/")[0] not in namespaces):
            if not self.token:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return found

    def _writable(self, kind: str, id: str) -> Repository:
        found = self._readable(kind, id)
        if id.split("/")[0] not in self._known():
            raise HubError(403, "You do not have the required permissions for this repository")
        return found

    # ---------------------------------------------------------------- repositories

    def who(self) -> Any:
        self._known()
        orgs = [{"type": "org", "name": name} for name in sorted(self.hub.tokens[self.token] - {USER})]
        token = {"displayName": "test", "role": "write"}
        return {"type": "user", "name": USER, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def create(self) -> Any:
        told = json.loads(self.body)
        id = f"{told.get('organization') or USER}/{told['name']}"
        kind = told.get("type") or "model"
        if id.split("/")[0] not in self._known():
            raise HubError(403, "You don't have the rights to create a repository under this namespace")
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{id}"
        if (kind, id) in self.hub.repositories:
            body = json.dumps({"error": "You already created this repo", "url": url}).encode()
            self._answer(409, body, {"Content-Type": "application/json"})
            return None
        private = bool(told.get("private")) or told.get("visibility") == "private"
        repository = self.hub.repositories[kind, id] = Repository(id, kind, private)
        repository.add(dict(START), "initial commit")
        return {"url": url, "name": id, "id": id}

    def info(self, kind: str, id: str, revision: str) -> Any:
        repository = self._readable(kind, id)
        commit = repository.commit(revision or "main")
        told = {"_id": git_id(id.encode()), "id": id, "modelId": id, "author": id.split("/")[0], "sha": commit.id}
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        flags = {"private": repository.private, "gated": False, "disabled": False}
        times = {"lastModified": DATE, "createdAt": DATE}
        return {**told, **flags, **times, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def refs(self, kind: str, id: str) -> Any:
        repository = self._readable(kind, id)
        branches, tags = (
            [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit} for name, commit in of.items()]
            for folder, of in (("heads", repository.branches), ("tags", repository.tags))
        )
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def commits(self, kind: str, id: str, revision: str) -> Any:
        repository = self._readable(kind, id)
        until = repository.history.index(repository.commit(revision))
        past = repository.history[until::-1]
        return [{"id": c.id, "title": c.title, "message": "", "authors": [], "date": DATE} for c in past]

    def branch(self, kind: str, id: str, name: str) -> Any:
        repository = self._writable(kind, id)
        if self.command == "DELETE":
            del repository.branches[name]
            return {}
        if name in repository.branches:
            raise HubError(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[name] = repository.commit(start).id
        return {}

    def tag(self, kind: str, id: str, name: str) -> Any:
        repository = self._writable(kind, id)
        if self.command == "DELETE":
            del repository.tags[name]
            return {}
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise HubError(409, "Tag reference exists already")
        repository.tags[tag] = repository.commit(name).id
        return {}

    def check_card(self) -> Any:
        """Whether the metadata of a card is YAML with a licence that is known; the real Hub asks for more."""
        metadata = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            fields, errors = yaml.safe_load(metadata[1]) if metadata else {}, []
        except yaml.YAMLError as error:
            fields, errors = {}, [{"message": str(error)}]
        if fields.get("license", "other") not in LICENCES:
            errors.append({"message": f'"license" must be one of [{", ".join(sorted(LICENCES))}]'})
        told = {"errors": errors, "warnings": []}
        if not errors:
            return told
        self._answer(400, json.dumps(told).encode(), {"Content-Type": "application/json"})
        return None

    # ---------------------------------------------------------------- reading

    def _entry(self, repository: Repository, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 in repository.large:
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        last = {"id": repository.history[-1].id, "title": repository.history[-1].title, "date": DATE}
        return {**entry, "lastCommit": last}

    def _folders(self, files: dict[str, bytes]) -> set[str]:
        return {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}

    def tree(self, kind: str, id: str, revision: str, path: str) -> Any:
        repository = self._readable(kind, id)
        files, path = repository.commit(revision).files, path.strip("/")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        if path and path not in self._folders(files):
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        inside = [n for n in sorted({*files, *self._folders(files)}) if not path or n.startswith(f"{path}/")]
        if not recursive:
            inside = [name for name in inside if "/" not in name[len(path) + 1 if path else 0 :]]
        folder = {"type": "directory", "size": 0}
        return [
            self._entry(repository, name, files[name]) if name in files else {**folder, "path": name, "oid": name}
            for name in inside
        ]

    def paths_info(self, kind: str, id: str, revision: str) -> Any:
        repository = self._readable(kind, id)
        files = repository.commit(revision).files
        json_body = self.headers.get("Content-Type", "").startswith("application/json")
        told = json.loads(self.body) if json_body else parse_qs(self.body.decode())
        paths = [path for path in told["paths"] if path in files]
        folders = [path for path in told["paths"] if path in self._folders(files)]
        return [self._entry(repository, path, files[path]) for path in paths] + [
            {"type": "directory", "path": path, "oid": path, "size": 0} for path in folders
        ]

    def resolve(self, kind: str, id: str, revision: str, path: str) -> None:
        repository = self._readable(kind.removesuffix("s") or "model", id)
        commit = repository.commit(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        content = commit.files[path]
        sha256 = hashlib.sha256(content).hexdigest()
        headers["ETag"] = f'"{git_id(content)}"'
        if sha256 in repository.large:
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(200, content, headers)
            return
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        if start >= len(content):
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        part = content[start:stop]
        told = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self._answer(206, part, {**headers, "Content-Range": told})

    # ---------------------------------------------------------------- writing

    def preupload(self, kind: str, id: str, revision: str) -> Any:
        repository = self._writable(kind, id)
        files = repository.commit(revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            path, there = file["path"], files.get(file["path"])
            large = PurePosixPath(path).suffix in LARGE_SUFFIXES or b"\0" in base64.b64decode(file["sample"])
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if there is not None:
                answer["oid"] = hashlib.sha256(there).hexdigest() if large else git_id(there)
            answers.append(answer)
        return {"files": answers}

    def batch(self, prefix: str, id: str) -> Any:
        repository = self._writable(prefix.removesuffix("s") or "model", id)
        objects = []
        for file in json.loads(self.body)["objects"]:
            answer = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in repository.large:
                address = f"{self.hub.endpoint}/large/{repository.kind}/{id}/{file['oid']}"
                answer["actions"] = {"upload": {"href": address}, "verify": {"href": address}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _receive_large_file(self) -> None:
        """An upload, whose address is all that it needs to be allowed; perhaps it is cut."""
        cut, received = self.hub.cut_here(), b""
        for piece in self._pieces():
            received += piece
            if cut is not None and len(received) > cut:
                self.hub.requests.append((self.command, self.route, 0, self.token))
                self.close_connection = True
                self.connection.close()
                return
        match = re.fullmatch(_LARGE, self.route)
        if match is None or hashlib.sha256(received).hexdigest() != match["sha256"]:
            raise HubError(400, "the content is not what its address says")
        with self.hub.lock:
            self.hub.repository(match["id"], match["kind"]).large[match["sha256"]] = received
        self._answer(200, b"", {})

    def verify(self, kind: str, id: str, sha256: str) -> Any:
        told, large = json.loads(self.body), self.hub.repository(id, kind).large
        if told["oid"] != sha256 or len(large.get(sha256, b"")) != told["size"]:
            raise HubError(404, "the large file is not there")
        return {}

    def change(self, kind: str, id: str, revision: str) -> Any:
        repository = self._writable(kind, id)
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = repository.commit(revision)
        files, title = dict(parent.files), ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent.id):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in repository.large:
                    raise HubError(400, f"The large file of {value['path']} was not uploaded")
                files[value["path"]] = repository.large[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                gone = value["path"].rstrip("/") + "/"
                files = {name: content for name, content in files.items() if not name.startswith(gone)}
            else:
                raise HubError(400, f"Unknown operation {key}")
        commit = repository.add(files, title, revision)
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.hub.endpoint}/{id}/commit/{commit.id}"}


_REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
_LARGE = r"/large/(?P<kind>[a-z]+)/(?P<id>[^/]+/[^/]+)/(?P<sha256>[0-9a-f]{64})"
_ID = r"(?P<id>[^/]+/[^/]+?)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", r"/api/whoami-v2", Handler.who),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.check_card),
    ("GET", rf"{_REPO}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET", rf"{_REPO}/refs", Handler.refs),
    ("GET", rf"{_REPO}/commits/(?P<revision>[^/]+)", Handler.commits),
    ("POST DELETE", rf"{_REPO}/branch/(?P<name>[^/]+)", Handler.branch),
    ("POST DELETE", rf"{_REPO}/tag/(?P<name>[^/]+)", Handler.tag),
    ("GET", rf"{_REPO}/tree/(?P<revision>[^/]+)(?P<path>/.*)?", Handler.tree),
    ("POST", rf"{_REPO}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("POST", rf"{_REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"{_REPO}/commit/(?P<revision>[^/]+)", Handler.change),
    ("POST", rf"/(?:(?P<prefix>datasets|spaces)/)?{_ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", _LARGE, Handler.verify),
    (
        "GET HEAD",
        rf"/(?:(?P<kind>datasets|spaces)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        Handler.resolve,
    ),
]
