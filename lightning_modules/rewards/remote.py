"""A reward in another process or on another machine, and the server for it: JSON with PNG bytes, never pickle.

    python -m lightning_modules.rewards.remote -c configs/rewards/judge.yaml --port 8500

The file holds a class_path and init_args. Both sides read the token from the environment.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import http.client
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request as HTTPRequest
from urllib.request import build_opener

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image
from torch import Tensor

from data_pipeline.endpoint import AsAnswered, received
from data_pipeline.errors import InputError
from lightning_modules.rewards.models import as_arrays, encoded
from lightning_modules.rewards.protocol import Request, Reward

TOKEN = "UNIPIC_REWARD_TOKEN"  # the environment variable that holds the shared secret
MAX_REQUEST = 1 << 30  # bytes
MAX_PIXELS = 1 << 26  # of one picture, before it is decoded
LONGEST_WAIT = 30.0  # seconds between two tries
OPENER = build_opener(AsAnswered())


@dataclass
class Remote:
    """Asks a server for scores; what it does not give within a bounded time is None, and is no number.

    Args:
        url: http(s)://HOST:PORT/score.
        seconds: for one try.
        retries: further tries after a failure of any kind, each wait twice as long as the last.
        first_wait: seconds before the second try.
    """

    url: str
    seconds: float = 120.0
    retries: int = 3
    first_wait: float = field(default=1.0)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise InputError(f"a remote reward's url is {self.url!r}; expected http(s)://HOST:PORT/score")
        if self.seconds <= 0 or self.retries < 0 or self.first_wait < 0:
            raise InputError("a remote reward's seconds must be above 0, retries and first_wait 0 or more")

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        body = json.dumps(
            {
                "pictures": [png(p) for p in as_arrays(pictures)],
                "requests": [
                    {"prompt": r.prompt, "sources": [png(s) for s in as_arrays(r.sources)], "metadata": r.metadata}
                    for r in requests
                ],
            }
        ).encode()
        for attempt in range(self.retries + 1):
            try:
                return usable(json.loads(self._post(body)), len(requests))
            except InputError:
                raise
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                failure = error
            if attempt < self.retries:
                time.sleep(min(self.first_wait * 2**attempt, LONGEST_WAIT))
        raise ConnectionError(f"{self.url} failed {self.retries + 1} times, last with {failure}")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token()}"}
        with OPENER.open(HTTPRequest(self.url, body, headers), timeout=self.seconds) as response:
            found = received(response, time.monotonic() + self.seconds)
            if response.status in (401, 403):
                raise InputError(f"{self.url} refuses the token in {TOKEN}; export the same on both sides")
            if response.status != 200:
                raise OSError(f"HTTP {response.status}")
            return found


def usable(found: Any, count: int) -> list[float | None]:
    """The scores of an answer. ValueError unless it has one finite number or null for each picture."""
    scores = found.get("scores") if isinstance(found, Mapping) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"the answer has no list of {count} scores")
    for score in scores:
        if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
            raise ValueError(f"{score!r} is no score")
    return [None if score is None else float(score) for score in scores]


def token() -> str:
    """The shared secret."""
    found = os.environ.get(TOKEN, "")
    if not found:
        raise InputError(f"the environment variable {TOKEN} is empty; export the same secret for client and server")
    return found


def png(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as base64 of PNG."""
    return base64.b64encode(encoded(picture).data).decode()


def picture(text: str) -> Tensor:
    """The inverse of `png`: (3, H, W) in [0, 1]."""
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"a picture of {opened.width} x {opened.height} is too large")
        return torch.from_numpy(np.asarray(opened.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def answer(reward: Reward, body: bytes) -> dict[str, Any]:
    """What the server says to a request; scores that are no numbers are null. ValueError for a malformed request."""
    try:
        found = json.loads(body)
        pictures = torch.stack([picture(p) for p in found["pictures"]])
        requests = [Request(r["prompt"], tuple(map(picture, r["sources"])), r["metadata"]) for r in found["requests"]]
    except (KeyError, TypeError, OSError, RecursionError, RuntimeError) as error:
        raise ValueError(f"not a request for scores: {type(error).__name__}: {error}") from error
    scores = reward.score(pictures, requests)
    return {"scores": [s if s is not None and math.isfinite(s) else None for s in scores]}


def serve(reward: Reward, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready to `serve_forever`."""
    secret = f"Bearer {token()}"

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_POST(self) -> None:
            if not hmac.compare_digest(self.headers.get("Authorization", "").encode(), secret.encode()):
                return self.say(401, {"error": "wrong token"})
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_REQUEST:
                return self.say(413, {"error": "too large"})
            try:
                return self.say(200, answer(reward, self.rfile.read(int(length))))
            except ValueError as error:
                return self.say(400, {"error": str(error)})
            except Exception as error:  # a reward may raise anything; the client retries, and then leaves groups out
                return self.say(500, {"error": f"{type(error).__name__}: {error}"})

        def say(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet: a line for each request would be all that is seen."""

    return ThreadingHTTPServer((host, port), Handler)


def read_reward(path: Path) -> Reward:
    """The reward that a YAML file names by class_path and init_args; an InputError where it names none."""
    reader = ArgumentParser(exit_on_error=False)
    reader.add_argument("--reward", type=Reward)
    try:
        settings = reader.parse_object({"reward": yaml.safe_load(path.read_text(encoding="utf-8"))})
        found: Reward | None = reader.instantiate_classes(settings).reward
    except (ArgumentError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} names no reward: {' '.join(str(error).split())}") from error
    if found is None:
        raise InputError(f"{path} is empty; expected class_path and init_args of a reward, as configs/rewards/*.yaml")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serves a reward.")
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8500)
    found = parser.parse_args(argv)
    try:
        reward = read_reward(found.config)
        server = serve(reward, found.host, found.port)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"serving {type(reward).__name__} at http://{found.host}:{server.server_port}/score")
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
