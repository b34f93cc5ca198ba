"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import track

T = TypeVar("T")
EVERY = 10.0  # seconds between lines of a log


def progress(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """The items, shown as they pass, also where `total` is unknown; nothing is shown where there is no wait."""
    if total is not None and total < 2:
        yield from items
    elif sys.stderr.isatty():
        yield from track(items, what, total=total, transient=True)
    else:
        started = shown = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() - shown > EVERY:
                shown = time.monotonic()
                of = "" if total is None else f"/{total}"
                print(f"{what} {done}{of}  {shown - started:.0f} s", file=sys.stderr, flush=True)
