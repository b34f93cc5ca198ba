"""Fetching one URL from a list that nobody vouches for."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, urlsplit

OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex"}  # of the X-Robots-Tag header
UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is routed; what wraps an IPv4 address lies outside,
WRAPPED = ipaddress.ip_network("2002::/16")  # but for 6to4


class Unfetched(Exception):
    """Why a URL was not fetched."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Limits:
    """Caps of one fetch.

    Args:
        seconds: from the first packet to the last.
        bytes: of the body.
        allowed: hosts ("host" or "host:port") that may have a private address, such as a store of one's own.
    """

    seconds: float = 20.0
    bytes: int = 1 << 26
    allowed: Collection[str] = ()


def fetch(url: str, limits: Limits) -> bytes:
    """The body behind a URL, or Unfetched.

    http and https only, no redirect followed, no address that is not public: a list of URLs must not reach the
    machine's own network or a cloud's metadata service, neither by name nor by a name that resolves there. The address
    that was checked is the one connected to.
    """
    shown = repr(url[:200])
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError as error:
        raise Unfetched("bad_url", f"{shown}: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise Unfetched("bad_url", f"expected http(s)://HOST/..., got {shown}")
    port = port or {"http": 80, "https": 443}[parts.scheme]
    deadline = time.monotonic() + limits.seconds
    address = public_address(host, port, limits)
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="/%:=&?~+!$,;'@()*[]")
    named = f"[{host}]" if ":" in host else host
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {named}:{port}\r\nUser-Agent: unipic-lightning\r\n"
        "Accept: image/*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
    )
    try:
        with connected(parts.scheme, host, address, port, max(0.001, deadline - time.monotonic())) as sock:
            sock.sendall(request.encode("ascii"))
            response = http.client.HTTPResponse(Timed(sock, deadline), method="GET")  # type: ignore[arg-type]
            response.begin()
            return body(response, limits)
    except TimeoutError as error:
        raise Unfetched("too_slow", f"{shown}: not done after {limits.seconds:g} s") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unfetched("unreachable", f"{shown}: {type(error).__name__}: {error}") from error


def public_address(host: str, port: int, limits: Limits) -> str:
    """The first address of a host, if all of them are public or the host is allowed."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise Unfetched("unreachable", f"{host!r}: {error}") from error
    if host not in limits.allowed and f"{host}:{port}" not in limits.allowed:
        for address in found:
            if not is_public(address):
                raise Unfetched("private_address", f"{host!r} is at {address}, which is not public")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an address is one host of the public internet, and none that stands for another address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip not in UNICAST or ip in WRAPPED):
        return False
    return ip.is_global and not ip.is_multicast


def connected(scheme: str, host: str, address: str, port: int, seconds: float) -> socket.socket:
    """A connection to the address, verified for the host where it is encrypted."""
    sock = socket.create_connection((address, port), seconds)
    try:
        return trusted().wrap_socket(sock, server_hostname=host) if scheme == "https" else sock
    except BaseException:
        sock.close()
        raise


@lru_cache(maxsize=1)
def trusted() -> ssl.SSLContext:
    """The system's certificates, read once."""
    return ssl.create_default_context()


class Timed(io.RawIOBase):
    """What a socket receives until a deadline: a header or body that trickles in must not hold a thread."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock, self.deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        return self.sock.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 1 << 16)


def body(response: http.client.HTTPResponse, limits: Limits) -> bytes:
    """The response's body within the limits."""
    if 300 <= response.status < 400:
        raise Unfetched("redirect", f"status {response.status} to {response.headers.get('Location', '')[:200]!r}")
    if response.status != 200:
        raise Unfetched("http_status", f"status {response.status}")
    tags = ",".join(response.headers.get_all("X-Robots-Tag", [])).replace(":", ",").lower().split(",")
    if opted := OPT_OUT & {tag.strip() for tag in tags}:
        raise Unfetched("opted_out", f"X-Robots-Tag: {', '.join(sorted(opted))}")
    data, size = bytearray(), response.length or 0
    while size <= limits.bytes and (chunk := response.read1(1 << 16)):
        data += chunk
        size = max(size, len(data))
    if size > limits.bytes:
        raise Unfetched("file_too_large", f"more than {limits.bytes} bytes")
    if response.length:
        raise Unfetched("unreachable", f"the connection ended {response.length} bytes before the end")
    return bytes(data)
