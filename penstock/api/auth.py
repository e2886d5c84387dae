"""Who may do what: tokens, their scopes, and the declaration that every route of the API carries.

A token is 256 random bits. The server keeps its SHA-256 only; the one of the account that started
the server lies beside them in a file that nobody else can read, which is where the commands and
drivers of that account find it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import time
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from penstock.errors import ConfigurationError

__all__ = ["Keyring", "Scope", "declared", "needs", "token_path"]

SESSION_SECONDS = 12 * 3600.0
LINK_SECONDS = 600.0
LONGEST_TOKEN = 200
_Value = TypeVar("_Value")


class Scope(IntEnum):
    """What a token is good for; each scope includes those before it."""

    PUBLIC = 0
    """No token is needed: whether the server is up."""
    VIEW = 1
    """Read the record."""
    RUN = 2
    """Write it as drivers do, start and stop runs."""
    ADMIN = 3
    """Everything."""


def token_path(home: Path) -> Path:
    """Return where the token of the account lies that started a server."""
    return home / "token"


class Keyring:
    """The tokens that a server accepts.

    Parameters
    ----------
    home : Path
        Holds ``token``, the text for clients of this account, and ``tokens.json``, the hashes of
        all tokens. Both are made if they are absent, with access for their owner only.

    Raises
    ------
    ConfigurationError
        If others than the owner can read one of the files, or if it cannot be read at all.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / "tokens.json"
        self._scopes: dict[str, Scope] = {}
        self._sessions: dict[str, tuple[Scope, float]] = {}
        self._links: dict[str, float] = {}
        text = _private(token_path(home))
        if text is None:
            text = secrets.token_hex(32)
            _write(token_path(home), text + "\n")
        self._scopes[_digest(text.strip())] = Scope.ADMIN
        self._own = dict(self._scopes)
        self._read_at = -1
        self._refresh()

    def _stored(self) -> dict[str, str]:
        text = _private(self._path)
        if text is None:
            return {}
        try:
            found = json.loads(text)
            return {str(digest): Scope[str(scope)].name for digest, scope in found.items()}
        except (ValueError, KeyError, AttributeError):
            raise ConfigurationError(
                f"{self._path} is damaged; remove it, and make new tokens with `penstock server token`."
            ) from None

    def add(self, scope: Scope) -> str:
        """Make another token; its text is returned once and kept nowhere."""
        token = secrets.token_hex(32)
        stored = self._stored() | {_digest(token): scope.name}
        _write(self._path, json.dumps(stored, indent=1))
        return token

    def _refresh(self) -> bool:
        """Read the file of the hashes if it is another one by now; return whether it is."""
        try:
            stamp = self._path.stat().st_mtime_ns
        except OSError:
            stamp = 0
        if stamp == self._read_at:
            return False
        self._read_at = stamp
        self._scopes = self._own | {digest: Scope[scope] for digest, scope in self._stored().items()}
        return True

    def scope(self, token: str) -> Scope | None:
        """Return what a token is good for; None if it is not one of ours."""
        self._refresh()  # one that was made or withdrawn counts at once
        return _find(self._scopes, token)

    # -- browsers ---------------------------------------------------------------------------
    def link(self) -> str:
        """Make the key of a link that logs a browser in, once, within ten minutes."""
        key = secrets.token_urlsafe(32)
        self._links[_digest(key)] = time.monotonic() + LINK_SECONDS
        return key

    def enter(self, key: str) -> str | None:
        """Trade the key of a link for a session of twelve hours; None if it is used or too old."""
        now = time.monotonic()
        self._links = {digest: until for digest, until in self._links.items() if until > now}
        self._sessions = {digest: one for digest, one in self._sessions.items() if one[1] > now}
        if _find(self._links, key) is None:
            return None
        del self._links[_digest(key)]
        session = secrets.token_urlsafe(32)
        self._sessions[_digest(session)] = (Scope.ADMIN, now + SESSION_SECONDS)
        return session

    def session(self, cookie: str) -> Scope | None:
        """Return what a browser's session is good for; None if there is none, or no more."""
        found = _find(self._sessions, cookie)
        return found[0] if found is not None and found[1] > time.monotonic() else None


def _find(known: dict[str, _Value], text: str) -> _Value | None:
    digest = _digest(text)
    found: _Value | None = None
    for one, value in known.items():  # every one of them, so that time tells nothing
        if hmac.compare_digest(one, digest):
            found = value
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text[:LONGEST_TOKEN].encode("utf-8", "replace")).hexdigest()


def _private(path: Path) -> str | None:
    """Return the text of a file that only its owner can read; None if there is no file."""
    try:
        with path.open(encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid != os.getuid():
                raise ConfigurationError(
                    f"Others can read {path}, which holds the keys of the server: `chmod 600 {path}`, or remove "
                    "it to get new ones."
                )
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from None


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise ConfigurationError(f"{path} cannot be written: {error}.") from None


# -- what a route declares ------------------------------------------------------------------

_bearer = HTTPBearer(auto_error=False, description="The text in the file `token` of PENSTOCK_HOME.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


class _Needs:
    """The dependency that lets a request through, or not."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request, credentials: _Credentials = None) -> Scope:
        return _admit(request, credentials.credentials if credentials is not None else None, self.scope)


async def _public() -> Scope:
    return Scope.PUBLIC


_public.scope = Scope.PUBLIC  # type: ignore[attr-defined]


def needs(scope: Scope) -> Any:
    """Declare on a router or route which scope a request must have."""
    return Depends(_public if scope is Scope.PUBLIC else _Needs(scope))


def declared(route: Any) -> Scope | None:
    """Return the scope that a route declares, itself or through its router; None if it forgot to."""
    scopes = [getattr(one.call, "scope", None) for one in route.dependant.dependencies]
    return max((scope for scope in scopes if scope is not None), default=None)


def _admit(request: Request, token: str | None, least: Scope) -> Scope:
    keyring: Keyring = request.app.state.keyring
    scope = keyring.scope(token) if token is not None else _of_browser(request, keyring)
    if scope is None:
        raise HTTPException(
            401,
            "This needs a token: send `Authorization: Bearer …` with the text in the file `token` of PENSTOCK_HOME.",
            {"WWW-Authenticate": "Bearer"},
        )
    if scope < least:
        raise HTTPException(403, f"This needs a token of scope {least.name.lower()} or above.")
    return scope


def _of_browser(request: Request, keyring: Keyring) -> Scope | None:
    cookie = request.cookies.get(cookie_name(request))
    return keyring.session(cookie) if cookie is not None else None


def cookie_name(request: Request) -> str:
    """Return the name of our cookie: with the port, which cookies otherwise ignore."""
    return f"penstock-{request.url.port or 80}"
