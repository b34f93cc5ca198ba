"""A real HTTP server on loopback that serves byte ranges, and fails as stores do."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """Serves a folder with byte ranges; the server says otherwise where a test wants it to."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms
    server: Server

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        server = self.server
        server.requests += 1
        fault = server.faults.pop(0) if body and server.faults else ""
        if fault == "stall":
            server.released.wait(20)
        path = server.folder / self.path.lstrip("/")
        if server.failures > 0 or fault == "500" or not path.is_file():
            status = 503 if server.failures > 0 else 500 if fault else 404
            server.failures -= 1
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size, wanted = path.stat().st_size, self.headers.get("Range")
        first, last = 0, size - 1
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last + 1 - first)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", server.tag)
        self.end_headers()
        if body:
            server.served += len(data)
            try:
                if fault == "cut":
                    self.close_connection = True
                    data = data[: len(data) // 2]
                self.wfile.write(data)
            except ConnectionError:
                server.hung_up.set()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Counts what it serves."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.tag, self.failures = folder, True, '"1"', 0
        self.served = self.requests = 0
        self.faults: list[str] = []  # of the next answers with a body: "500", "stall", "cut" or "" for none
        self.released = threading.Event()  # stalled answers go on
        self.hung_up = threading.Event()  # a client left before it had all that was sent
        folder.mkdir()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"
