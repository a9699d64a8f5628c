"""Fake server of the Hugging Face hub on loopback: the requests with which huggingface_hub reads a data set.

As at the hub, listings come in pages, contents are redirected to a signed URL of another path, and a private
data set looks to other users like one that does not exist.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 3
"""Entries of a page; the hub has 1,000."""
SIGNATURE = "signature-of-a-store"
SIGNED = f"X-Amz-Signature={SIGNATURE}"


class HubServer:
    """Data sets by name; each has revisions, and each of those its files by path."""

    def __init__(self, token: str | None = None) -> None:
        """token: what the data sets ask for; None for public ones."""
        self.token = token
        self.data_sets: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        """Method and path of each request."""
        self.failing = 0
        """How many of the next requests for contents are answered with 503."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def publish(self, name: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Add a data set, or a revision of one; its URL."""
        self.data_sets.setdefault(name, {"main": {}})[revision] = dict(files)
        return f"hf://datasets/{name}" + ("" if revision == "main" else f"@{revision}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _entries(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What is in a folder, as the hub describes it; empty if there is no such folder."""
    top = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(top):
            continue
        names = path[len(top) :].split("/")
        for depth in range(1, len(names)):
            below = top + "/".join(names[:depth])
            if recursive or depth == 1:
                entries[below] = {
                    "type": "directory",
                    "path": below,
                    "size": 0,
                    "oid": _digest(below.encode()),
                }
        if recursive or len(names) == 1:
            entries[path] = _file(path, content)
    return list(entries.values())


def _file(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()  # as git names blobs


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            hub.requests.append(f"{self.command} {self.path}")
            if match := re.fullmatch(r"/stored/([^/]+/[^/]+)/([^/]+)/(.+)", url.path):
                return self._content(hub.data_sets[match[1]][unquote(match[2])][unquote(match[3])])
            if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
                return self._resolve(match[1], match[2], match[3])
            if match := re.fullmatch(
                r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?", url.path
            ):
                return self._describe(match[1], match[2], unquote(match[3] or "main"), match[4], query)
            return self._error(404, "")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            hub.requests.append(f"{self.command} {self.path}")
            match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", self.path)
            files = self._files(match[1], unquote(match[2])) if match else None
            if files is None:
                return self._error(404, "EntryNotFound")
            sent = self.headers["Content-Type"].startswith("application/json")
            paths = json.loads(body)["paths"] if sent else parse_qs(body)["paths"]
            everything = _entries(files, "", True)
            return self._json([entry for entry in everything if entry["path"] in paths])

        def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
            """Files of a revision; None after an answer that refuses."""
            known = hub.token is None or self.headers["Authorization"] == f"Bearer {hub.token}"
            if not known or name not in hub.data_sets:
                self._error(401, "RepoNotFound")
                return None
            if revision not in hub.data_sets[name]:
                self._error(404, "RevisionNotFound")
                return None
            return hub.data_sets[name][revision]

        def _describe(
            self, name: str, kind: str | None, revision: str, folder: str | None, query: Mapping[str, str]
        ) -> None:
            files = self._files(name, revision)
            if files is None:
                return None
            if kind != "tree":
                siblings = [{"rfilename": path} for path in files]
                return self._json({"id": name, "sha": _digest(revision.encode()), "siblings": siblings})
            entries = _entries(
                files, unquote(folder or ""), query.get("recursive", "False").lower() == "true"
            )
            if folder and not entries:
                return self._error(404, "EntryNotFound")
            start = int(query.get("cursor", 0))
            here = f"{hub.url}{urlsplit(self.path).path}?recursive={query.get('recursive', 'False')}"
            more = start + PAGE < len(entries)
            link = {"Link": f'<{here}&cursor={start + PAGE}>; rel="next"'} if more else {}
            return self._json(entries[start : start + PAGE], link)

        def _resolve(self, name: str, revision: str, path: str) -> None:
            files = self._files(name, unquote(revision))
            if files is None:
                return None
            if unquote(path) not in files:
                return self._error(404, "EntryNotFound")
            if hub.failing:
                hub.failing -= 1
                return self._error(503, "")
            where = f"/stored/{name}/{quote(unquote(revision), safe='')}/{path}?{SIGNED}"
            return self._send(302, b"", {"Location": hub.url + where})

        def _content(self, content: bytes) -> None:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not match:
                return self._send(200, content)
            start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
            if start >= len(content):
                return self._error(416, "")
            stop = min(stop, len(content))
            return self._send(
                206, content[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            )

        def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
            self._send(
                200, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {})
            )

        def _error(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code} if code else None)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

    return Handler
