"""Server-sent events, read: parsed, and continued over connections that break."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator

from penstock.api.connection import ServerError, Unreachable

__all__ = ["follow", "parse"]

PATIENCE = 60.0  # seconds for a server to come back
LONGEST_PAUSE = 5.0


def parse(lines: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield ``(event, data, id)`` of each complete event in a stream of lines; the id None if it has none."""
    kind, data, last = "message", list[str](), None
    for line in lines:
        if not line:
            if data or last is not None:
                yield kind, "\n".join(data), last
            kind, data, last = "message", [], None
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            last = value


def follow(
    opened: Callable[[str | None], Iterator[str]], patience: float = PATIENCE
) -> Iterator[tuple[str, str]]:
    """Yield ``(event, data)``, and open the stream again where it was cut.

    Parameters
    ----------
    opened : callable
        Given the last id, or None at first, returns the lines of a stream.
    patience : float
        Seconds without a server after which its error is raised.
    """
    last: str | None = None
    pause, broken = 0.1, None
    while True:
        try:
            for kind, data, position in parse(opened(last)):
                pause, broken = 0.1, None
                last = position if position is not None else last
                yield kind, data
        except ServerError as error:
            if not isinstance(error, Unreachable) and error.status not in {429, 502, 503, 504}:
                raise
            broken = broken or time.monotonic()
            if time.monotonic() - broken > patience:
                raise
        time.sleep(pause * random.uniform(0.0, 1.0))  # noqa: S311 - jitter
        pause = min(2 * pause, LONGEST_PAUSE)
