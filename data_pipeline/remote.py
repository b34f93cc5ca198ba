"""Files behind URLs, read by byte ranges through fsspec; nothing is fetched whole.

Credentials and endpoints come from the environment, as each store's own tools read them (for S3: AWS_* and
FSSPEC_S3_ENDPOINT_URL).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import fsspec

from data_pipeline.errors import InputError

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")
STAMPS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime")
ATTEMPTS = 6
STALL = 60.0  # seconds that an answer may take
PAUSE = 0.2  # seconds before the second attempt, three times as long before each further one: 24 in all

T = TypeVar("T")


def is_url(location: str) -> bool:
    """Whether a location is a URL rather than a path."""
    return "://" in location


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; fsspec keeps one for each process, so that forked workers may call.

    Only stores: fsspec's chains ("zip://...::http://...") and its other schemes open local files and archives.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "::" in url:
        raise InputError(f"cannot read {url}; expected a path or a URL of {', '.join(SCHEMES)}")
    try:
        found = fsspec.url_to_fs(url)
    except ImportError as error:
        raise InputError(f"cannot read {url}: {error}; install that package") from error
    except Exception as error:  # each store checks URLs and credentials in its own way
        raise InputError(f"cannot read {url}: {error}; check the address and your credentials") from error
    return found


def stat(url: str) -> tuple[int, str]:
    """Size in bytes and what changes with the content."""
    files, path = filesystem(url)
    facts = retried(url, lambda: files.info(path))
    if facts.get("type") == "directory" or facts.get("size") is None:
        raise InputError(f"{url} has no size; expected one file whose server states its Content-Length")
    size = int(facts["size"])
    if url.startswith("http") and size > 1:
        retried(url, lambda: check_ranges(files, path, size))
    return size, tag_of(facts)


@lru_cache(maxsize=1 << 16)
def check_unchanged(url: str, size: int, tag: str) -> None:
    """Refuses a file that is not what was indexed, by its size and tag; each process asks once for each file."""
    files, path = filesystem(url)
    facts = retried(url, lambda: files.info(path))
    found = int(facts.get("size") or 0), tag_of(facts)
    if found != (size, tag):
        raise InputError(
            f"{url} was replaced since it was indexed: it has {found[0]} bytes and the tag {found[1] or 'none'}, the "
            f"index is of {size} bytes and {tag or 'none'}; index it again"
        )


def tag_of(facts: Mapping[str, Any]) -> str:
    """What changes with a file's content: an entity tag or a time; "" where the store has neither."""
    return next((str(facts[name]) for name in STAMPS if facts.get(name)), "")


def check_ranges(files: Any, path: str, size: int) -> None:
    """Reads the last byte in the one way that does not fetch all of it where the server ignores ranges."""
    with files.open(path, "rb", size=size, cache_type="none") as file:
        file.seek(size - 1)
        try:
            file.read(1)
        except ValueError as error:
            raise no_ranges(path) from error


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes from `start` to before `end`; an answer that fails, stalls or is cut short is asked for again."""
    files, path = filesystem(url)
    patience = {"timeout": STALL} if getattr(files, "async_impl", False) else {}

    def ask() -> bytes:
        data: bytes = files.cat_file(path, start=start, end=end, **patience)
        if len(data) > end - start:
            raise no_ranges(url)
        if len(data) < end - start:
            raise EOFError(
                f"only {len(data)} of the {end - start} bytes at {start}; if the file was replaced, index it again"
            )
        return data

    return retried(url, ask)


def no_ranges(url: str) -> InputError:
    return InputError(
        f"the server of {url} ignores byte ranges, so that every picture would cost the whole file; use a server that "
        f"supports them, or copy the file here"
    )


def retried(url: str, call: Callable[[], T]) -> T:
    """What the call returns, tried again unless the failure will last."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except InputError:
            raise
        except Exception as error:  # each store raises its own
            if attempt + 1 == ATTEMPTS or lasting(error):
                cause = f"{type(error).__name__}: {error}"
                raise InputError(f"cannot read {url} ({cause}); check the address and your credentials") from error
            time.sleep(PAUSE * 3**attempt)
    raise AssertionError("unreachable")


def lasting(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec calls every failure to look a file up so
    status = getattr(error, "status", 0)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, FileNotFoundError | PermissionError | NotImplementedError)
