"""Fake server of the Hugging Face hub on loopback: huggingface_hub writes models to it and reads them.

Repositories are created private or public; files go through the preupload, LFS and commit requests of the
hub's API and keep their history. Without its token, a private repository looks like one that does not exist.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import yaml

REPOSITORY = r"([^/]+/[^/]+)"


class ModelHubServer:
    """Model repositories by name; each has its commits, oldest first, and each commit its files."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.visibility: dict[str, str] = {}
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        """Objects that were uploaded by LFS, by SHA-256."""
        self.requests: list[str] = []
        """Method and path of each request."""
        self.refused_metadata = 0
        """How many cards were refused because their metadata is invalid."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def files(self, name: str) -> dict[str, bytes]:
        """Files of the newest commit."""
        return self.commits[name][-1]

    def put(self, name: str, path: str, content: bytes | None) -> None:
        """Commit one file, or its removal."""
        self.visibility.setdefault(name, "public")
        before = self.commits.setdefault(name, [{}])[-1]
        after = {key: value for key, value in before.items() if key != path}
        self.commits[name].append(after if content is None else {**after, path: content})

    def revision(self, name: str, revision: str) -> int | None:
        """Number of the commit that a branch or a commit's name means."""
        if revision == "main":
            return len(self.commits[name]) - 1
        names = [self.oid(name, number) for number in range(len(self.commits[name]))]
        return names.index(revision) if revision in names else None

    def oid(self, name: str, number: int) -> str:
        """Name of a commit."""
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def metadata_errors(card: str) -> list[str]:
    """What the hub would refuse in the metadata of a card."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if not match:
        return ["there is no metadata"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [str(error)]
    errors = []
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            if not isinstance(result["task"]["type"], str) or not result["metrics"]:
                errors.append("a result needs a task and metrics")
            errors += [
                "a metric needs a type and a number"
                for metric in result["metrics"]
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float)
            ]
    return errors


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in a listing."""
    digest = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": digest}


def _handler(hub: ModelHubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            body, path = self.rfile.read(int(self.headers["Content-Length"])), urlsplit(self.path).path
            if not self._known():
                return self._json({"error": "Invalid username or password."}, 401)
            if path == "/api/validate-yaml":
                errors = metadata_errors(json.loads(body)["content"])
                hub.refused_metadata += bool(errors)
                listed = [{"message": error} for error in errors]
                return self._json({"errors": listed, "warnings": []}, 400 if errors else 200)
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if match := re.fullmatch(rf"/api/models/{REPOSITORY}/preupload/main", path):
                return self._preupload(json.loads(body)["files"])
            if match := re.fullmatch(rf"/{REPOSITORY}\.git/info/lfs/objects/batch", path):
                return self._batch(json.loads(body)["objects"])
            if match := re.fullmatch(rf"/api/models/{REPOSITORY}/commit/main", path):
                return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
            if path == "/verify":
                known = json.loads(body)["oid"] in hub.large
                return self._json({}, 200 if known else 404)
            return self._json({}, 404)

        def do_PUT(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            content = self.rfile.read(int(self.headers["Content-Length"]))
            oid = self.path.rsplit("/", 1)[1]
            right = hashlib.sha256(content).hexdigest() == oid
            hub.large |= {oid: content} if right else {}
            self._send(200 if right else 400, b"")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if match := re.fullmatch(rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", path):
                return self._resolve(match[1], match[2], match[3])
            if match := re.fullmatch(rf"/api/models/{REPOSITORY}(?:/(revision|tree)/([^/]+))?", path):
                return self._describe(match[1], match[2], match[3] or "main")
            return self._json({}, 404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def _known(self) -> bool:
            return self.headers["Authorization"] == f"Bearer {hub.token}"

        def _create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            exists = name in hub.commits
            if not exists:
                hub.visibility[name] = asked.get("visibility", "public")
                hub.commits[name] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
            self._json({"url": f"{hub.url}/{name}", "name": name}, 409 if exists else 200)

        def _preupload(self, files: list[dict[str, Any]]) -> None:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._json({"files": modes})

        def _batch(self, objects: list[dict[str, Any]]) -> None:
            actions = [
                {
                    **each,
                    "actions": {
                        "upload": {"href": f"{hub.url}/upload/{each['oid']}"},
                        "verify": {"href": f"{hub.url}/verify"},
                    },
                }
                for each in objects
            ]
            self._json({"transfer": "basic", "objects": actions})

        def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            files = dict(hub.files(name))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            hub.commits[name].append(files)
            oid = hub.oid(name, len(hub.commits[name]) - 1)
            self._json({"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

        def _number(self, name: str, revision: str) -> int | None:
            """Number of a commit; None after an answer that refuses."""
            if name not in hub.commits or (hub.visibility[name] == "private" and not self._known()):
                self._error(401, "RepoNotFound")
                return None
            number = hub.revision(name, revision)
            if number is None:
                self._error(404, "RevisionNotFound")
            return number

        def _describe(self, name: str, kind: str | None, revision: str) -> None:
            number = self._number(name, revision)
            if number is None:
                return
            files = hub.commits[name][number]
            if kind == "tree":
                self._json([_entry(path, content) for path, content in files.items()])
            else:
                siblings = [{"rfilename": path} for path in files]
                self._json({"id": name, "sha": hub.oid(name, number), "siblings": siblings})

        def _resolve(self, name: str, revision: str, path: str) -> None:
            number = self._number(name, revision)
            if number is None:
                return
            if path not in hub.commits[name][number]:
                self._error(404, "EntryNotFound")
                return
            content = hub.commits[name][number][path]
            etag = hashlib.sha256(content).hexdigest()
            headers = {"X-Repo-Commit": hub.oid(name, number), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            self._send(200, content, headers)

        def _json(self, value: object, status: int = 200) -> None:
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _error(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, quote(value, safe=' "/:;=.-_'))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
