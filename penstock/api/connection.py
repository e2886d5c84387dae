"""One connection to a server: requests, and what each way of failing means."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from penstock import errors
from penstock.engine.home import usable_home
from penstock.errors import ConfigurationError, PenstockError
from penstock.settings import settings
from penstock.version import own_version

__all__ = ["Answer", "Connection", "ServerError", "Unreachable"]

SECONDS = 35.0  # longer than a server takes to say that its database is away
LARGEST = 64 << 20
PREFIX = "/api/v1"


class ServerError(PenstockError):
    """A server refused a request.

    Attributes
    ----------
    status : int
        The status of HTTP; 0 if there was no answer.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.status)


class Unreachable(ServerError):
    """A server does not answer, or not as one of ours does."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        """Return the body as JSON.

        Raises
        ------
        ValueError
            If it is none.
        """
        return json.loads(self.body)


class Connection:
    """Requests to one server, one after the other; a connection that broke is made anew.

    Parameters
    ----------
    url : str
        Address of the server, with the path before ``/api`` if there is one.
    token : str, optional
        Instead of that in the settings, or in the file ``token`` in the home, which is read for each
        request: a new one counts at once.
    home : Path, optional
        Instead of the one in the settings.
    timeout : float
        Seconds to wait for an answer.

    Raises
    ------
    ConfigurationError
        If the URL is none.
    """

    def __init__(
        self, url: str, token: str | None = None, home: Path | None = None, timeout: float = SECONDS
    ) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            sound = False
        if not sound or parts.query or parts.username:
            raise ConfigurationError(f"PENSTOCK_API_URL is {url!r}, but must be like http://127.0.0.1:4270.")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._parts = parts
        self._token = token
        self._home = home
        self._timeout = timeout
        self._gate = threading.Lock()
        self._http: http.client.HTTPConnection | None = None

    # -- requests ---------------------------------------------------------------------------
    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Send a request and return the answer, whatever its status.

        Raises
        ------
        Unreachable
            If there is none.
        """
        target = self._target(path, query)
        sent = {**self._headers(), **(headers or {})}
        with self._gate:
            for fresh in (False, True):
                idle = self._http is not None  # the server may have closed it in the meantime
                try:
                    return self._exchange(method, target, body, sent)
                except (http.client.HTTPException, OSError) as error:
                    self._drop()
                    again = (
                        idle
                        and not fresh
                        and isinstance(error, (ConnectionError, http.client.RemoteDisconnected))
                    )
                    if not again:
                        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                        raise Unreachable(f"the server at {self.url} does not answer: {reason}") from error
        raise AssertionError("unreachable")

    def _exchange(self, method: str, target: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        connection = self._connected()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # The server may answer before it has read all, such as that this is too large; else the next line fails.
            connection.request(method, target, body, dict(headers))
        response = connection.getresponse()
        content = response.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise http.client.HTTPException("the answer is too large")
        found = {name.lower(): value for name, value in response.getheaders()}
        if response.will_close:
            self._drop()
        return Answer(response.status, content, found)

    def stream(
        self, path: str, headers: Mapping[str, str] | None = None, query: Mapping[str, Any] | None = None
    ) -> Iterator[str]:
        """Yield the lines of an answer that has no end, over a connection of its own."""
        connection = self._new(60.0)
        try:
            sent = {**self._headers(), **(headers or {}), "Accept": "text/event-stream"}
            connection.request("GET", self._target(path, query), headers=sent)
            response = connection.getresponse()
            if response.status != 200:
                raise self.refusal(Answer(response.status, response.read(LARGEST), {}))
            while line := response.readline(LARGEST):
                yield line.decode("utf-8", "replace").rstrip("\r\n")
        except (http.client.HTTPException, OSError) as error:
            raise Unreachable(
                f"the server at {self.url} does not answer: {str(error) or type(error).__name__}"
            ) from error
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None) -> Any:
        """Send and receive JSON.

        Raises
        ------
        PenstockError
            If the server refuses: what it says happened there, or a `ServerError`.
        Unreachable
            If it does not answer, or not with JSON.
        """
        content = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json"} if content is not None else {}
        answer = self.request(method, path, content, headers, query)
        if not 200 <= answer.status < 300:
            raise self.refusal(answer)
        try:
            return answer.json()
        except ValueError:
            raise Unreachable(f"what answers at {self.url} is no penstock server") from None

    def refusal(self, answer: Answer) -> PenstockError:
        """Return the error that an answer stands for."""
        detail: Any = None
        with contextlib.suppress(ValueError, AttributeError):
            detail = answer.json().get("detail")
        if isinstance(detail, list):  # of the validation: what is wrong with which field
            detail = "; ".join(
                f"{'.'.join(map(str, one.get('loc', ())))}: {one.get('msg')}" for one in detail
            )
        kind = getattr(errors, answer.headers.get("x-penstock-error", ""), None)
        if answer.status == 409 and isinstance(kind, type) and issubclass(kind, PenstockError):
            return kind(detail)  # as the store in this process would have raised it
        if answer.status == 401:
            detail = "it does not accept our token; set PENSTOCK_API_TOKEN, or PENSTOCK_HOME to the home of the server"
        return ServerError(
            f"the server at {self.url} refuses ({answer.status}): {detail or 'no reason'}", answer.status
        )

    def close(self) -> None:
        """Close the connection."""
        with self._gate:
            self._drop()

    # -- its parts --------------------------------------------------------------------------
    def _target(self, path: str, query: Mapping[str, Any] | None) -> str:
        given = [(name, value) for name, value in (query or {}).items() if value is not None]
        text = urlencode([(name, _text(value)) for name, value in given], doseq=True)
        return f"{self._parts.path.rstrip('/')}{PREFIX}{path}{'?' if text else ''}{text}"

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": f"penstock/{own_version()}", "Accept": "application/json"}
        token = self._token or settings().api_token or self._stored_token()
        return headers | ({"Authorization": f"Bearer {token}"} if token else {})

    def _stored_token(self) -> str:
        home = self._home if self._home is not None else usable_home(settings().home).path
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (home / "token").read_text(encoding="ascii").strip()
        return ""

    def _connected(self) -> http.client.HTTPConnection:
        if self._http is None:
            self._http = self._new(self._timeout)
        return self._http

    def _new(self, timeout: float) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(
                host, port, timeout=timeout, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def _drop(self) -> None:
        connection, self._http = self._http, None
        if connection is not None:
            connection.close()


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return [_text(one) for one in value] if isinstance(value, (list, tuple)) else value
