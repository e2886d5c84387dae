"""Where the events of a spool are to go: written beside it, so that nobody takes them elsewhere.

A destination is the address of a server, that of a database without its password, or empty: the
database in the home of the spool. Two drivers of one home may have different ones.
"""

from __future__ import annotations

import re
from pathlib import Path

from penstock.settings import settings

LOCAL = ""
_SUFFIX = ".to"
_SERVERS = ("http", "https")
_URL = re.compile(r"(?:([^:/]*):)?//(?:[^/]*@)?([^/?#]*)([^?#]*)")


def present() -> str:
    """Return where this process sends its events, by the settings."""
    given = settings()
    return server(given.api_url) if given.api_url else store()


def store() -> str:
    """Return which database the settings name, whether or not a server stands before it."""
    given = settings()
    url = given.database_url
    if not url or url == f"sqlite:///{given.home / 'penstock.db'}":
        return LOCAL
    scheme, place, path = _split(url)
    return f"{'postgresql' if scheme.startswith('postgres') else scheme}://{place}{path}"


def server(url: str) -> str:
    """Return the address of a server in the one way in which addresses are compared."""
    scheme, place, path = _split(url if "//" in url else f"http://{url}")
    host, colon, port = place.lower().partition(":")
    if host == "localhost":
        host = "127.0.0.1"
    return f"{scheme}://{host}{colon}{port}{path.rstrip('/')}"


def is_server(destination: str) -> bool:
    """Whether a destination is a server."""
    return destination.partition("://")[0] in _SERVERS


def write(spool: Path, destination: str) -> None:
    """Note beside a spool where its events are to go."""
    if destination != LOCAL:
        path = spool.with_suffix(_SUFFIX)
        path.touch(mode=0o600)
        path.write_text(destination, encoding="utf-8")


def read(spool: Path) -> str:
    """Return where the events of a spool are to go."""
    try:
        return spool.with_suffix(_SUFFIX).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return LOCAL


def remove(spool: Path) -> None:
    """Remove what `write` has written."""
    spool.with_suffix(_SUFFIX).unlink(missing_ok=True)


def _split(url: str) -> tuple[str, str, str]:
    """Return scheme, place without the account, and path; the scheme is empty if it is no URL."""
    found = _URL.match(url)
    return ((found[1] or "").lower(), found[2], found[3]) if found else ("", url, "")
