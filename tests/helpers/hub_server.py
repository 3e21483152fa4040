"""A small server of the hub's routes that an upload calls, on this machine; files come in commits, none in Xet."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        role: Of the token.
        refusing: Part of the paths that it answers with 403.
        made: What was asked of repositories.
        files: What they hold, by path.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.role, self.refusing = "write", "nothing"
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *about: Any) -> None:
        """Nothing."""

    def answer(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found: Any = {}
        if self.path.startswith("/api/whoami"):
            found = {"name": "me", "type": "user", "auth": {"accessToken": {"role": hub.role}}}
        elif self.path == "/api/repos/create":
            hub.made.append(json.loads(body))
            found = {"url": f"{hub.address}/{hub.made[-1].get('organization') or 'me'}/{hub.made[-1]['name']}"}
        elif self.path == "/api/validate-yaml":
            found = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = [each["path"] for each in json.loads(body)["files"]]
            found = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
        elif "/commit/" in self.path and hub.refusing not in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{hub.address}/me/x/commit/1", "commitOid": "1" * 40, "success": True}
        refused = hub.refusing in self.path
        content = json.dumps({"error": "you may not write here"} if refused else found).encode()
        self.send_response(403 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_HEAD = answer


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        hub.shutdown()
