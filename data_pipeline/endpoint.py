"""A vision-language model behind an OpenAI-compatible endpoint, asked about pictures."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPErrorProcessor, Request, build_opener

from data_pipeline.errors import InputError
from data_pipeline.records import EncodedImage

MAX_BODY = 1 << 20  # bytes of a response
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before another try; each wait doubles the last
EXCERPT = 200  # characters of an answer that a note quotes
MISTAKES = (401, 402, 404, 405)  # the key, the account or the address is wrong: so for every record, not for this one
SEED = 0
LONGEST = 86_400  # seconds of a time limit: sockets cannot wait for ever


class Unanswered(Exception):
    """Why a question has no answer that can be used; the next question may have one."""


class Passing(Exception):
    """A failure that another try may mend, and the seconds to wait that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class AsAnswered(HTTPErrorProcessor):
    """Hands every status on as it came: none is an exception, and no redirect takes the key elsewhere."""

    def http_response(self, request: Request, response: Any) -> Any:
        return response

    https_response = http_response


OPENER = build_opener(AsAnswered())


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers and how to ask it: greedily and with a fixed seed.

    Two endpoints are equal if their answers should be: neither the address nor the patience decides what is said.

    Args:
        url: the API's root, such as http://127.0.0.1:8000/v1.
        model: the name under which the server knows the model.
        key_variable: the environment variable that holds the API key, in every worker; "" where none is needed.
        seconds: time for one try.
        retries: further tries after a lost connection, a status of 408, 429, or 500 and above.
        threads: questions at a time of one worker.
        max_tokens: longest answer; a longer one is cut off by the server and counts as none.
    """

    url: str = field(compare=False)
    model: str
    key_variable: str = field(default="", compare=False)
    seconds: float = field(default=60.0, compare=False)
    retries: int = field(default=4, compare=False)
    threads: int = field(default=8, compare=False)
    max_tokens: int = 512

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        bare = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        if not bare or parts.username is not None:  # not quoted: it may hold a key
            raise InputError("endpoint.url must be http(s)://HOST[:PORT]/PATH without user or query; see key_variable")
        if not re.fullmatch(r"([A-Za-z_]\w*)?", self.key_variable, re.ASCII):
            raise InputError("endpoint.key_variable must name an environment variable, as OPENAI_API_KEY, not be a key")
        if not self.model:
            raise InputError(f"endpoint.model is empty; {self.url}/models lists what the server has")
        if not 0 < self.seconds <= LONGEST or self.retries < 0 or self.threads < 1 or self.max_tokens < 1:
            raise InputError(
                "endpoint: threads and max_tokens must be positive, retries 0 or more, seconds above 0 and at most "
                f"{LONGEST:,}"
            )

    def ask(self, text: str, images: Sequence[EncodedImage] = ()) -> str:
        """The model's answer to a text below pictures, or Unanswered. InputError where the endpoint serves nobody."""
        for attempt in range(self.retries + 1):
            try:
                return self._said(self._post(self._request(text, images)))  # anew: a proxy's handler changes it
            except Passing as failure:
                problem = str(failure)
                if attempt < self.retries:
                    time.sleep(min(max(failure.wait, FIRST_WAIT * 2**attempt), LONGEST_WAIT))
        raise InputError(
            f"endpoint {self.url} failed {self.retries + 1} times in a row, last with {problem}. See that it runs and "
            f"serves {self.model}, or lower threads; finished shards are kept, run the same command again to go on"
        )

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if self.key_variable and not (key and key.isascii() and key.isprintable()):
            raise InputError(f"the environment variable {self.key_variable} holds no API key; export it for {self.url}")
        return key

    def _request(self, text: str, images: Sequence[EncodedImage]) -> Request:
        key = self._key()
        shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        question = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}],
            "temperature": 0,
            "seed": SEED,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        return Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(question).encode(), headers)

    def _post(self, request: Request) -> bytes:
        """One try: the body of a response of status 200."""
        try:
            with OPENER.open(request, timeout=self.seconds) as response:
                status, wait = response.status, response.headers.get("Retry-After", "")
                body = received(response, time.monotonic() + self.seconds)
        except (OSError, http.client.HTTPException) as error:
            raise Passing(f"{type(error).__name__}: {error}") from error
        if len(body) > MAX_BODY:
            body = f"more than {MAX_BODY} bytes".encode()
        elif status == 200:
            return body
        reason = f"HTTP {status}: {self._quoted(body)}"
        if status in (408, 429) or status >= 500:
            raise Passing(reason, seconds_asked(wait))
        if 300 <= status < 400 or status in MISTAKES:
            raise InputError(f"endpoint {self.url} answers {reason}; check its url, model and key_variable")
        raise Unanswered(reason)

    def _said(self, body: bytes) -> str:
        """The text of a chat completion, without what a reasoning model thought before it."""
        try:
            choice = json.loads(body)["choices"][0]
            text, end = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Unanswered(f"not a chat completion: {self._quoted(body)}") from error
        if end in ("length", "content_filter"):
            raise Unanswered(f"the answer was cut off, finish_reason is {end}")
        text = text.rpartition("</think>")[2].strip() if isinstance(text, str) else ""
        if not text:
            raise Unanswered("the answer is empty")
        return text

    def _quoted(self, body: bytes) -> str:
        """The beginning of a response; some servers repeat the key they were sent."""
        text, key = body.decode(errors="replace"), self._key()
        return excerpt(text.replace(key, "***") if key else text)


def data_url(image: EncodedImage) -> str:
    """The picture's bytes as they are, inside a URL."""
    kind = {"jpg": "jpeg"}.get(image.extension, image.extension)
    return f"data:image/{kind};base64,{base64.b64encode(image.data).decode()}"


def received(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, or a part that is longer than allowed."""
    body = bytearray()
    while len(body) <= MAX_BODY and (chunk := response.read1(1 << 16)):
        body += chunk
        if time.monotonic() > deadline:
            raise TimeoutError("the response came too slowly")
    if response.length and len(body) <= MAX_BODY:
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)


def seconds_asked(header: str) -> float:
    """The wait of a Retry-After header, seconds or a date; 0 where it is neither."""
    try:
        return float(header) if header.isdecimal() else parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def json_object(answer: str) -> dict[str, Any]:
    """The one JSON object of an answer, whatever is said around it; Unanswered for none, several or a doubtful one."""
    decoder = json.JSONDecoder(object_pairs_hook=distinct)
    found: list[dict[str, Any]] = []
    start = answer.find("{")
    while start >= 0:
        try:
            item, end = decoder.raw_decode(answer, start)
            found.append(item)
        except ValueError:
            end = start + 1
        except RecursionError as error:
            raise Unanswered("JSON nested too deeply") from error
        start = answer.find("{", end)
    if len(found) != 1:
        raise Unanswered(f"expected one JSON object, got {len(found)}: {excerpt(answer)}")
    return found[0]


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object; a name that comes twice has no value that can be relied on."""
    if len(dict(pairs)) != len(pairs):
        raise Unanswered("a name comes twice in the JSON object")
    return dict(pairs)


def plain(text: str) -> str:
    """The text on one line, without control characters and halves of characters, which no file can hold."""
    kept = (c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join("".join(kept).split())


def excerpt(text: str) -> str:
    """The beginning of a text, for a note."""
    line = plain(text[: 4 * EXCERPT])
    return line if len(line) <= EXCERPT else f"{line[:EXCERPT]}..."
