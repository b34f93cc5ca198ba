"""A reward behind HTTP under every kind of fault: no failure becomes a number, and no wait is without end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import InputError
from lightning_modules.rewards import remote
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.remote import Remote, answer, png, serve
from lightning_modules.rewards.weighted import Weighted, score


class Mean:
    """The mean of picture and first source; None where a prompt says so."""

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        return [
            None if r.prompt == "none" else (p.mean().item() + (r.sources[0].mean().item() if r.sources else 0))
            for p, r in zip(pictures, requests, strict=True)
        ]


PICTURES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
REQUESTS = [Request("a"), Request("none"), Request("c", (torch.ones(3, 4, 4),), {"tag": "ü"})]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.TOKEN, "open sesame")


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()


def faulty(*answers: Callable[[BaseHTTPRequestHandler], None]) -> ThreadingHTTPServer:
    """A server whose n-th answer is the n-th of these, and the last of them for ever."""
    calls = iter(answers)
    last = [answers[-1]]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            next(calls, last[0])(self)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def says(body: bytes, status: int = 200, length: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    def of(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return of


def hangs(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.0)


GOOD = says(json.dumps({"scores": [0.25, None, 1]}).encode())
FAULTS = {
    "500": says(b"oops", 500),
    "404": says(b"", 404),
    "not json": says(b"<html>"),
    "half a json": says(b'{"scores": [0.1, 0.2'),
    "cut off": says(b'{"scores": [0.1, 0.2, 0.3]}', length=100),
    "short": says(b'{"scores": [0.1, 0.2]}'),
    "long": says(b'{"scores": [0.1, 0.2, 0.3, 0.4]}'),
    "nan": says(b'{"scores": [NaN, 0.2, 0.3]}'),
    "infinite": says(b'{"scores": [1e999, 0.2, 0.3]}'),
    "text": says(b'{"scores": ["0.5", 0.2, 0.3]}'),
    "true": says(b'{"scores": [true, 0.2, 0.3]}'),
    "list": says(b"[0.1, 0.2, 0.3]"),
    "deep": says(b"[" * 100_000),
    "hangs": hangs,
}


def test_scores_cross_the_wire_exactly() -> None:
    with running(serve(Mean(), "127.0.0.1", 0)) as url:
        found = Remote(url).score(PICTURES, REQUESTS)
    pixels = (PICTURES * 255).round() / 255
    assert found[1] is None
    assert found[0] == pytest.approx(pixels[0].mean().item()) and found[2] == pytest.approx(1 + pixels[2].mean().item())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_what_lasts_is_no_number(fault: str) -> None:
    with running(faulty(FAULTS[fault], FAULTS[fault], GOOD)) as url:
        assert Remote(url, seconds=0.3, first_wait=0.01).score(PICTURES, REQUESTS) == [0.25, None, 1.0]
    with running(faulty(FAULTS[fault])) as url:
        started = time.monotonic()
        client = Remote(url, seconds=0.3, retries=1, first_wait=0.01)
        with pytest.raises(ConnectionError, match="failed 2 times"):
            client.score(PICTURES, REQUESTS)
        assert time.monotonic() - started < 10
        assert score({"far": Weighted(client)}, PICTURES, REQUESTS)["far"].isnan().all()


def test_a_server_that_is_down_is_no_number() -> None:
    with running(faulty(GOOD)) as url:
        pass
    assert score({"far": Weighted(Remote(url, retries=0))}, PICTURES, REQUESTS)["far"].isnan().all()


def test_a_wrong_token_ends_the_run_and_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(serve(Mean(), "127.0.0.1", 0)) as url:
        monkeypatch.setenv(remote.TOKEN, "guess")
        with pytest.raises(InputError, match="refuses the token"):
            Remote(url).score(PICTURES, REQUESTS)
        monkeypatch.setenv(remote.TOKEN, "")
        with pytest.raises(InputError, match="is empty"):
            Remote(url).score(PICTURES, REQUESTS)
    with pytest.raises(InputError, match="is empty"):
        serve(Mean(), "127.0.0.1", 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"pictures": ["AAAA"], "requests": [{"prompt": "a", "sources": [], "metadata": {}}]}',
        b'{"pictures": [], "requests": []}',
        b"\xff\xfe",
    ],
)
def test_a_malformed_request_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        answer(Mean(), body)


def test_a_reward_without_numbers_answers_null() -> None:
    class Wild:
        def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
            return [float("nan"), float("inf"), 0.5]

    wire = [{"prompt": "a", "sources": [], "metadata": {}}] * 3
    pictures = [png((p.permute(1, 2, 0).numpy() * 255).astype("uint8")) for p in PICTURES]
    body = json.dumps({"pictures": pictures, "requests": wire}).encode()
    assert answer(Wild(), body) == {"scores": [None, None, 0.5]}
