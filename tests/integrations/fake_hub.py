"""A Hugging Face Hub that is small enough to run inside a test: real HTTP on this machine, no network.

It knows what the official client needs to create a repository, upload, list and download: nothing else, one branch,
no checks of tokens. Run the client in a process of its own with `client_environment`: it reads its settings at import.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

# Files of these kinds go through the upload protocol for large files, as on the real Hub.
LARGE = (".safetensors", "tokenizer.json")


class FakeHub:
    """The server and what was uploaded to it.

    Attributes:
        repos: The files of each repository, `{"user/name": {"path": content}}`.
        created: What was asked for when a repository was created.
        commits: The commit ids of each repository, oldest first.
        requests: Method, path and authorization of every request.
        url: Where it listens.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.created: dict[str, dict] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def client_environment(self, home: Path) -> dict[str, str]:
        """The environment of a process whose Hub is this one and whose cache is the folder `home`."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))
        }
        return environment | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_fake",
            "HF_HUB_DISABLE_XET": "1",  # the other upload protocol, which this server does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def create(self, repo_id: str, files: dict[str, bytes]) -> None:
        """Make a repository that was there before the test."""
        self.repos[repo_id] = dict(files)
        self.commits[repo_id] = [hashlib.sha1(repo_id.encode()).hexdigest()]

    def commit(self, repo_id: str, lines: bytes) -> str:
        """Apply the operations of a commit, one JSON object per line, and return its id."""
        files = self.repos[repo_id]
        for line in lines.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        self.commits[repo_id].append(hashlib.sha1(lines + self.commits[repo_id][-1].encode()).hexdigest())
        return self.commits[repo_id][-1]


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.body()
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            for pattern, route in ROUTES:
                if match := re.fullmatch(pattern, path):
                    return route(self, body, *match.groups())
            return self.send(404, {"error": f"the fake Hub has no {self.command} {path}"})

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def send(self, status: int, content: bytes | dict | list = b"", headers: dict[str, str] | None = None) -> None:
            kind = "application/octet-stream"
            if not isinstance(content, bytes):
                content, kind = json.dumps(content).encode(), "application/json"
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def create(self, body: bytes) -> None:
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            url = f"{hub.url}/{repo_id}"
            if repo_id in hub.repos:
                return self.send(409, {"error": "exists", "url": url})
            hub.create(repo_id, {})
            hub.created[repo_id] = wanted
            return self.send(200, {"url": url, "name": repo_id, "id": repo_id})

        def whoami(self, body: bytes) -> None:
            self.send(200, {"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

        def validate_yaml(self, body: bytes) -> None:
            self.send(200, {"errors": [], "warnings": []})

        def preupload(self, body: bytes, repo_id: str) -> None:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
            files = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False, "oid": None} for p in paths]
            self.send(200, {"files": files})

        def offer_large(self, body: bytes, repo_id: str) -> None:
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {
                    "upload": {"href": f"{hub.url}/_large/{item['oid']}"},
                    "verify": {"href": f"{hub.url}/_verify"},
                }
            headers = {"Content-Type": "application/vnd.git-lfs+json"}
            self.send(200, {"transfer": "basic", "objects": objects}, headers)

        def put_large(self, body: bytes, oid: str) -> None:
            intact = hashlib.sha256(body).hexdigest() == oid
            if intact:
                hub.large[oid] = body
            self.send(200 if intact else 400)

        def verify_large(self, body: bytes) -> None:
            self.send(200 if json.loads(body)["oid"] in hub.large else 404, {})

        def commit(self, body: bytes, repo_id: str) -> None:
            commit = hub.commit(repo_id, body)
            url = f"{hub.url}/{repo_id}/commit/{commit}"
            self.send(200, {"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": None})

        def info(self, body: bytes, repo_id: str) -> None:
            if repo_id not in hub.repos:
                return self.missing("RepoNotFound", "Repository not found")
            files = [{"rfilename": path} for path in hub.repos[repo_id]]
            sha = hub.commits[repo_id][-1]
            return self.send(
                200, {"id": repo_id, "modelId": repo_id, "sha": sha, "private": False, "tags": [], "siblings": files}
            )

        def tree(self, body: bytes, repo_id: str) -> None:
            if repo_id not in hub.repos:
                return self.missing("RepoNotFound", "Repository not found")
            files = hub.repos[repo_id].items()
            return self.send(
                200,
                [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files],
            )

        def file(self, body: bytes, repo_id: str, path: str) -> None:
            if repo_id not in hub.repos:
                return self.missing("RepoNotFound", "Repository not found")
            commit = {"X-Repo-Commit": hub.commits[repo_id][-1]}
            content = hub.repos[repo_id].get(path)
            if content is None:
                return self.missing("EntryNotFound", "Entry not found", commit)
            return self.send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **commit})

        def missing(self, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            codes = {"X-Error-Code": code, "X-Error-Message": message}
            self.send(404, {"error": message}, {**codes, **(headers or {})})

    repo = r"([^/]+/[^/]+)"
    ROUTES = [
        (r"/api/whoami-v2", Handler.whoami),
        (r"/api/repos/create", Handler.create),
        (r"/api/validate-yaml", Handler.validate_yaml),
        (rf"/api/models/{repo}/preupload/main", Handler.preupload),
        (rf"/{repo}\.git/info/lfs/objects/batch", Handler.offer_large),
        (r"/_large/([0-9a-f]{64})", Handler.put_large),
        (r"/_verify", Handler.verify_large),
        (rf"/api/models/{repo}/commit/main", Handler.commit),
        (rf"/api/models/{repo}(?:/revision/[^/]+)?", Handler.info),
        (rf"/api/models/{repo}/tree/.+", Handler.tree),
        (rf"/{repo}/(?:resolve|raw)/[^/]+/(.+)", Handler.file),
    ]
    return Handler
