"""A model hub on this machine: the few answers of the real one that fetching a repository takes."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class Hub:
    """Serves one repository out of a directory.

    Attributes:
        token: Who has it may see the repository; anybody when None.
        breaks: Files whose connection breaks half way.
        swapped: Files that arrive with a byte changed.
        sent: Paths of files that were fetched whole.
        url: Where it is.
    """

    def __init__(self, repo: str, directory: Path):
        self.repo, self.directory, self.token = repo, directory, None
        self.breaks, self.swapped, self.sent, self.url = set(), set(), [], ""

    def files(self) -> list[Path]:
        return sorted(p for p in self.directory.iterdir() if p.is_file())

    def large(self, path: Path) -> bool:
        return path.suffix == ".safetensors"

    def etag(self, path: Path) -> str:
        content = path.read_bytes()
        return hashlib.sha256(content).hexdigest() if self.large(path) else hashlib.sha1(content).hexdigest()

    def entry(self, path: Path) -> dict:
        size = path.stat().st_size
        entry = {"type": "file", "path": path.name, "size": size, "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
        return {**entry, "lfs": {"oid": self.etag(path), "size": size, "pointerSize": 130}} if self.large(path) else entry


@contextmanager
def serve(repo: str, directory: Path):
    hub = Hub(repo, directory)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status: int, content: bytes = b"", headers: dict | None = None):
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **(headers or {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0].strip("/")
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(401, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
            if path == f"api/models/{repo}/revision/main":
                return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())
            if path.startswith(f"api/models/{repo}/revision/"):
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            if path == f"api/models/{repo}/tree/{COMMIT}":
                return self.answer(200, json.dumps([hub.entry(p) for p in hub.files()]).encode())
            if path.startswith(f"{repo}/resolve/{COMMIT}/"):
                return self.file(hub.directory / path.rpartition("/")[2])
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

        def file(self, path: Path):
            content = path.read_bytes()
            headers = {"ETag": f'"{hub.etag(path)}"', "X-Repo-Commit": COMMIT, "Content-Length": len(content)}
            if hub.large(path):
                headers |= {"X-Linked-ETag": f'"{hub.etag(path)}"', "X-Linked-Size": len(content)}
            if self.command == "GET" and path.name in hub.breaks:
                self.answer(200, content[: len(content) // 2], headers)
                self.close_connection = True
                return
            if path.name in hub.swapped:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(200, content, headers)
            if self.command == "GET":
                hub.sent.append(path.name)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
