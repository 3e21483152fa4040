"""Reward servers: our own, and one that lies."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dmdr.backends.toy import Redness
from dmdr.remote.wire import SERVICE, VERSION, Request

SOUND = 5  # answers of a liar before it begins to lie


@contextmanager
def serving(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Our server with the toy's reward, and its address."""
    words = [sys.executable, "-m", "dmdr.cli.reward_server", "--reward", "toy", "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait()


class Liar(ThreadingHTTPServer):
    """Gives some sound answers, and then what it should not, until it is honest.

    Attributes:
        answer: What it gives then.
        url: Its address.
    """

    def __init__(self, answer: str) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.answer, self.given, self.honest = answer, 0, False
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Its clients may leave before the end."""


class Answers(BaseHTTPRequestHandler):
    """Those of a liar."""

    server: Liar

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        about = {"service": SERVICE, "version": VERSION, "authorized": True, "max_request_bytes": 10**6}
        self.say(json.dumps(about).encode())

    def do_POST(self) -> None:
        asked = Request.read(self.rfile.read(int(self.headers["Content-Length"])))
        scores = Redness()(asked.images.float() / 255, asked.prompts).tolist()
        sound = json.dumps({"scores": scores}).encode()
        self.server.given += 1
        lies = self.server.given > SOUND and not self.server.honest
        match self.server.answer if lies else "":
            case "no answer":
                time.sleep(10)
            case "half an answer":
                self.say(sound[:20], length=len(sound))
            case "single bytes":
                self.say(b"", length=1000)
                for _ in range(100):
                    time.sleep(0.1)
                    self.wfile.write(b" ")
            case "no end":
                self.say(b"", length=2**40)
                while True:
                    self.wfile.write(b" " * 2**20)
            case "no JSON":
                self.say(b"<html>")
            case "too few scores":
                self.say(json.dumps({"scores": scores[1:]}).encode())
            case _:
                self.say(sound)

    def say(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
