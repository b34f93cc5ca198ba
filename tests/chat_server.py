"""A fake OpenAI-compatible endpoint on loopback, which keeps what it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Server:
    """An API that answers with what `reply` makes of a question's text and of how often it was asked before."""

    url: str = ""
    reply: Callable[[str, int], Reply] = lambda text, times: chat("{}")
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def texts(self) -> list[str]:
        return [question["messages"][0]["content"][-1]["text"] for question in self.asked]


def chat(content: Any, **choice: Any) -> Reply:
    """A chat completion that says this."""
    completion = {"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}
    return 200, {}, json.dumps(completion).encode()


@contextmanager
def running() -> Iterator[Server]:
    """Serves on loopback until the block ends; `reply` may be set at any time."""
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = question["messages"][0]["content"][-1]["text"]
            with lock:
                times = state.texts().count(text)
                state.asked.append(question)
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
            status, headers, body = state.reply(text, times)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # a client that has read enough goes away
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
