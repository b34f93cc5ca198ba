"""Reinforcement through a reward server that fails for a while: what is learned is as if it never had, bit for bit."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lightning as L
import pytest
import torch
from micro import Brightness, built
from rl import SAMPLING, made, prompts, trained, watched

from lightning_modules.rewards import remote
from lightning_modules.rewards.remote import Remote, serve

Answer = Callable[[BaseHTTPRequestHandler], None]
FAILING = {2, 3, 5}  # requests that fail, by their number from 1
UPDATES = 3
SECONDS = 1.0  # that a try may take


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.TOKEN, "open sesame")


def says(body: bytes, status: int = 200) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def slow(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5 * SECONDS)


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


FAULTS: dict[str, Answer] = {
    "hangs up": hangs_up,
    "500": says(b"oops", 500),
    "slow": slow,
    "wrong length": says(b'{"scores": [0.1, 0.2]}'),
    "nan": says(b'{"scores": [NaN, 0, 0, 0, 0, 0]}'),
    "half a json": says(b'{"scores": [0.1, 0.2'),
}


def failing(server: ThreadingHTTPServer, fault: Answer, numbers: Callable[[int], bool]) -> None:
    """Has a server fail the requests of these numbers."""
    good, seen = server.RequestHandlerClass, []

    class Handler(good):
        def do_POST(self) -> None:
            seen.append(self)
            fault(self) if numbers(len(seen)) else super().do_POST()

    server.RequestHandlerClass = Handler


@contextmanager
def running(server: ThreadingHTTPServer, after: float = 0.0) -> Iterator[str]:
    """The URL of a server that answers after so many seconds."""
    thread = threading.Timer(after, server.serve_forever, (0.01,))
    thread.daemon = True
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()


def weights(url: str, root: Path) -> dict[str, torch.Tensor]:
    """What is learned in a few updates from that server's scores."""
    module = made(str(built()), reward=Remote(url, seconds=SECONDS, retries=8, first_wait=0.02))
    learned = watched(module)
    trained(module, [prompts(i) for i in range(UPDATES)], UPDATES, root)
    assert [len(groups) for groups in learned] == [SAMPLING.groups] * UPDATES  # none was lost
    return module.state_dict()


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(remote.TOKEN, "open sesame")
        with running(serve(Brightness(), "127.0.0.1", 0)) as url:
            return weights(url, tmp_path_factory.mktemp("faultless"))


@pytest.mark.parametrize("fault", FAULTS)
def test_after_recovery_the_run_equals_a_faultless_one(fault: str, faultless: dict, tmp_path: Path) -> None:
    server = serve(Brightness(), "127.0.0.1", 0)
    failing(server, FAULTS[fault], FAILING.__contains__)
    with running(server) as url:
        found = weights(url, tmp_path)
    assert all(torch.equal(tensor, found[name]) for name, tensor in faultless.items())


def test_so_it_does_where_no_server_listens_at_first(faultless: dict, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[ThreadingHTTPServer] = []

    def start() -> None:
        started.append(serve(Brightness(), "127.0.0.1", port))
        started[0].serve_forever(0.01)

    thread = threading.Timer(0.3, start)
    thread.start()
    found = weights(f"http://127.0.0.1:{port}/score", tmp_path)
    started[0].shutdown()
    started[0].server_close()
    thread.join()
    assert all(torch.equal(tensor, found[name]) for name, tensor in faultless.items())


def test_waiting_for_a_server_that_stays_silent_is_bounded(tmp_path: Path) -> None:
    server = serve(Brightness(), "127.0.0.1", 0)
    failing(server, slow, lambda number: True)
    with running(server) as url:
        module = made(str(built()), reward=Remote(url, seconds=0.2, retries=2, first_wait=0.05))
        module.configure_model()
        logged: dict[str, float] = {}
        module.log = lambda name, value, **_: logged.__setitem__(name, float(value))
        module.trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
        )
        started = time.monotonic()
        assert module.collect(prompts(0)) == []
        # Two micro-batches, each three tries of 0.2 s and two waits of 0.05 s and 0.1 s; the rest is sampling.
        assert time.monotonic() - started < 2 * 0.75 + 5
    assert logged["rollouts/unscored"] == 1 and "reward/edit" not in logged
