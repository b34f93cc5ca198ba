"""URL lists, against real servers on this machine: what is allowed is fetched, all else is refused by name."""

from __future__ import annotations

import io
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.records import EditRecord, Rejected, TextImageRecord
from data_pipeline.sources import UrlList
from data_pipeline.sources.fetch import Limits, Unfetched, fetch, is_public, trusted


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + seed, 9)).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Pictures by number, and every way a server can misbehave."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, data: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        name = self.path.strip("/").partition("?")[0]
        match name.partition(".")[0]:
            case number if number.isdigit():
                time.sleep(0.02 * (int(number) % 3))
                self.answer(png(int(number)))
            case "html":
                self.answer(b"<html>not here</html>", Content_Type="text/html")
            case "gone":
                self.answer(b"", 404)
            case "moved":
                self.answer(b"", 302, Location="/1.png")
            case "noai":
                self.answer(png(1), X_Robots_Tag="otherbot: noarchive, NoAI")
            case "noindex":
                self.answer(png(1), X_Robots_Tag="googlebot: noindex")
            case "archived":
                self.answer(png(1), X_Robots_Tag="noarchive")
            case "large":
                self.answer(bytes(5000))
            case "huge":
                self.answer(b"", length=1 << 40)
            case "endless":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for _ in range(1000):
                    self.wfile.write(b"400\r\n" + bytes(1024) + b"\r\n")
            case "cut":
                self.answer(png(1)[:-9], length=len(png(1)))
                self.close_connection = True
            case "chunked":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in png(1)) + b"0\r\n\r\n")
            case "caf%C3%A9%20x":
                self.answer(png(2))
            case "nothing":
                self.answer(b"")
            case "hang":
                self.server.stop.wait(5)  # type: ignore[attr-defined]
            case "drip":
                self.drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 500)
            case "drip-body":
                self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b"x" * 500)

    def drip(self, data: bytes) -> None:
        """One byte at a time, for longer than any limit here."""
        for byte in data:
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return
            if self.server.stop.wait(0.03):  # type: ignore[attr-defined]
                return


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, address: Any) -> None:
        pass  # a client that hangs up is what is tested


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on 127.0.0.1; `seen` holds the paths it was asked for."""
    with Server(("127.0.0.1", 0), Handler) as running:
        running.seen, running.stop = [], threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=partial(running.serve_forever, 0.01), daemon=True).start()
        yield running
        running.stop.set()  # type: ignore[attr-defined]
        running.shutdown()


def limits(server: Server, **caps: Any) -> Limits:
    return Limits(**{"seconds": 5.0, "bytes": 4096, "allowed": [f"127.0.0.1:{server.server_port}"], **caps})


def refusal(url: str, caps: Limits) -> tuple[str, str]:
    with pytest.raises(Unfetched) as raised:
        fetch(url, caps)
    return raised.value.reason, raised.value.detail


@pytest.mark.parametrize(
    ("path", "seed"), [("1.png", 1), ("2.png?size=9&x=%20", 2), ("chunked", 1), ("archived", 1), ("café x.png#top", 2)]
)
def test_a_picture_of_an_allowed_server_is_fetched(path: str, seed: int, server: Server) -> None:
    assert fetch(f"http://127.0.0.1:{server.server_port}/{path}", limits(server)) == png(seed)
    assert fetch(f"http://127.0.0.1:{server.server_port}/{path}", limits(server, allowed=["127.0.0.1"])) == png(seed)


@pytest.mark.parametrize(
    ("path", "reason", "detail"),
    [
        ("gone", "http_status", "404"),
        ("moved", "redirect", "302 to '/1.png'"),
        ("noai", "opted_out", "noai"),
        ("noindex", "opted_out", "noindex"),
        ("large", "file_too_large", "more than 4096 bytes"),
        ("huge", "file_too_large", "more than 4096 bytes"),
        ("endless", "file_too_large", "more than 4096 bytes"),
        ("cut", "unreachable", "9 bytes before the end"),
    ],
)
def test_a_server_that_does_not_give_the_picture_is_named(path: str, reason: str, detail: str, server: Server) -> None:
    found = refusal(f"http://127.0.0.1:{server.server_port}/{path}", limits(server))
    assert found[0] == reason and detail in found[1]
    assert "/1.png" not in server.seen  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["hang", "drip", "drip-body"])
def test_a_slow_server_is_left_in_time_whatever_it_trickles(path: str, server: Server) -> None:
    start = time.monotonic()
    found = refusal(f"http://127.0.0.1:{server.server_port}/{path}", limits(server, seconds=0.3))
    assert found[0] == "too_slow" and 0.25 < time.monotonic() - start < 1.5


def test_what_is_no_http_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def serve() -> None:
            for greeting in (b"SSH-2.0-OpenSSH\r\n", b"", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 300):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(greeting)

        threading.Thread(target=serve, daemon=True).start()
        caps = Limits(2.0, 4096, ["127.0.0.1"])
        for _ in range(3):
            assert refusal(f"http://127.0.0.1:{port}/x", caps)[0] == "unreachable"
        assert refusal(f"https://127.0.0.1:{port}/x", Limits(0.3, 4096, ["127.0.0.1"]))[0] in (
            "too_slow",
            "unreachable",
        )
    assert refusal(f"http://127.0.0.1:{port}/x", caps)[0] == "unreachable"


# Every way of writing the server's address, none of which may reach it without being allowed.
HOSTS = [
    "127.0.0.1",
    "localhost",
    "LOCALHOST",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "0",
    "0.0.0.0",
    "127.0.0.2",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[::]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
]


@pytest.mark.parametrize("host", HOSTS)
def test_no_spelling_of_a_private_address_reaches_the_machine(host: str, server: Server) -> None:
    reason, detail = refusal(f"http://{host}:{server.server_port}/1.png", Limits(1.0))
    assert reason in ("private_address", "unreachable") and host.strip("[]").lower() in detail
    assert reason == "private_address" or host in ("localhost", "LOCALHOST")  # a machine may not resolve the name
    assert server.seen == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1", "255.255.255.255"]
)
def test_metadata_services_and_networks_of_ones_own_are_refused(host: str) -> None:
    assert refusal(f"http://{host}/latest/meta-data/", Limits(1.0))[0] == "private_address"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:a9fe:a9fe::1", False),
        ("2001:db8::1", False),
        ("192.0.2.1", False),
        ("240.0.0.1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x.png",
        "gopher://127.0.0.1/x",
        "/etc/passwd",
        "x.png",
        "",
        "http://",
        "http:///x.png",
        "http://user:secret@127.0.0.1/x.png",
        "http://user@127.0.0.1/x.png",
        "http://@127.0.0.1/x.png",
        "http://[::1/x.png",
        "http://127.0.0.1:99999/x.png",
        "http://127.0.0.1:x/x.png",
        "http://" + "a" * 70 + ".example/x.png",
        "jav\nascript:alert(1)",
    ],
)
def test_a_url_that_is_none_is_named(url: str) -> None:
    reason, detail = refusal(url, Limits(1.0, allowed=["127.0.0.1"]))
    assert reason == "bad_url" and detail.isprintable()


def test_a_url_cannot_add_to_the_request(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_port}/1.png HTTP/1.1\r\nX: y\r\n\r\nGET /2.png"
    assert fetch(url, limits(server)) == png(1)
    assert len(server.seen) == 1  # type: ignore[attr-defined]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_https_is_verified_for_the_name_in_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -addext"
    made = [*make.split(), "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.seen, running.stop = [], threading.Event()  # type: ignore[attr-defined]
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=partial(running.serve_forever, 0.01), daemon=True).start()
        url, caps = f"https://127.0.0.1:{running.server_port}/1.png", Limits(2.0, 4096, ["127.0.0.1"])
        trusted.cache_clear()
        assert "CERTIFICATE_VERIFY_FAILED" in refusal(url, caps)[1] and not running.seen  # type: ignore[attr-defined]
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        trusted.cache_clear()
        assert fetch(url, caps) == png(1)
        assert "not valid for" in refusal(url.replace("127.0.0.1", "127.1"), Limits(2.0, 4096, ["127.1"]))[1]
        running.shutdown()
    trusted.cache_clear()


def read(source: UrlList, records: int = 99) -> list[Any]:
    return [item for unit in source.units(records) for item in source.read(unit)]


def test_a_list_becomes_records_in_its_order(server: Server, tmp_path: Path) -> None:
    host = f"127.0.0.1:{server.server_port}"
    paths = ["3.png", "html", "1.png", "gone", "noai", "7.png", "nothing", "large"]
    rows = [{"url": f"http://{host}/{path}", "caption": path, "similarity": 0.3} for path in paths]
    rows += [{"url": "http://169.254.169.254/x", "caption": "x"}, {"url": None, "caption": "x"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nbad")
    source = UrlList(str(tmp_path / "t.jsonl"), threads=4, max_bytes=4096, allowed=[host], licence="CC-BY-4.0")
    found = read(source)
    assert [item.reason if isinstance(item, Rejected) else item.image.data for item in found] == [
        png(3),
        "not_a_picture",
        png(1),
        "http_status",
        "opted_out",
        png(7),
        "missing_file",
        "file_too_large",
        "private_address",
        "missing_field",
        "bad_json",
    ]
    first = found[0]
    assert isinstance(first, TextImageRecord) and (first.caption, first.licence) == ("3.png", "CC-BY-4.0")
    assert first.metadata == {"similarity": 0.3, "row": 1, "files": [f"http://{host}/3.png"]}
    assert "t.jsonl line 4: status 404" in found[3].detail
    assert read(source, 3) == found == read(UrlList(**{**vars(source), "threads": 1}))


def test_edits_by_url_with_columns_of_their_own(server: Server, tmp_path: Path) -> None:
    host = f"127.0.0.1:{server.server_port}"
    row = {"open_image_input_url": f"http://{host}/1.png", "output_image": f"http://{host}/2.png", "text": "darker"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    columns: dict[str, str | list[str]] = {"text": "text", "sources": "open_image_input_url", "target": "output_image"}
    (record,) = read(UrlList(str(tmp_path / "t.jsonl"), "edit", columns, allowed=[host]))
    assert isinstance(record, EditRecord) and record.instruction == "darker"
    assert (record.sources[0].data, record.target.data) == (png(1), png(2))
