"""The further runners of a flow run: for tasks that name one, and for subflows that were given one.

They are opened when they are first needed and closed when the root flow run has ended, so that what was
made on one of them can be used everywhere in the flow. Between two of them a value moves through the driver.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.runners import runner_of
from penstock.runners.base import TaskRunner, kept

if TYPE_CHECKING:
    from penstock.engine.session import Session


class Venues:
    """What a root flow run has opened besides its own runner.

    Parameters
    ----------
    named : mapping
        Runners by the names that the flow gives them.
    """

    def __init__(self, named: Mapping[str, Any] | None = None) -> None:
        self.named = dict(named or {})
        self._sessions: dict[Any, Session] = {}
        self._ends: list[Callable[[], None]] = []
        self._home: set[Any] = set()
        self._lock = threading.RLock()

    def is_home(self, session: Session, wish: Any) -> None:
        """Note that a wish means the runner that the flow run began with."""
        self._sessions[_key(wish)] = session
        self._home.add(_key(wish))

    def session_for(self, session: Session, wish: Any) -> Session:
        """Return the session on the runner that a task wishes for; it is opened if it has to be.

        Parameters
        ----------
        session : Session
            On the runner of the code that submits.
        wish : str, type or TaskRunner
            A name in the flow's mapping, or what `runner_of` takes.
        """
        if session.plans:
            return session
        if isinstance(wish, str):
            wish = self.named.get(wish, wish)
        if wish is session.runner:
            return session
        with self._lock:
            found = self._sessions.get(_key(wish))
            if found is None:
                runner = kept(runner_of(wish))
                users_own = runner.is_open  # who has opened it closes it
                runner.open()
                if runner.keeps and not users_own:
                    runner.keep()
                found = type(session)(runner, session.journal)
                found.venues = self
                self._sessions[_key(wish)] = found
                self.at_end(runner.close)
                self.at_end(found.close)
            return found

    def at_end(self, call: Callable[[], None]) -> None:
        """Call when the root flow run has ended, the last one first."""
        self._ends.append(call)

    def bytes_fetched(self) -> int:
        """Return the bytes that came to the driver from all of them, the flow's own runner left out."""
        return sum(session.bytes_fetched for key, session in self._sessions.items() if key not in self._home)

    def close(self) -> None:
        """Leave all of them."""
        while self._ends:
            self._ends.pop()()


def _key(wish: Any) -> Any:
    return wish if isinstance(wish, (str, type)) else id(wish)


def check_wish(wish: Any) -> None:
    """Refuse what is no runner, before anything runs.

    Raises
    ------
    ConfigurationError
        If a mapping is empty or has other keys than names, or a value is no runner.
    """
    if isinstance(wish, Mapping):
        if not wish or not all(isinstance(name, str) for name in wish):
            message = (
                "'task_runner' as a mapping needs names as keys, and at least one: the first is the default."
            )
            raise errors.ConfigurationError(message)
        for one in wish.values():
            check_wish(one)
        return
    known = wish is None or isinstance(wish, (str, TaskRunner))
    if not known and not (isinstance(wish, type) and issubclass(wish, TaskRunner)):
        message = f"a task runner must be a name, a class or an instance, got {type(wish).__name__}."
        raise errors.ConfigurationError(message)


def default_of(wish: Any) -> Any:
    """Return the runner that a flow uses where nothing else is said: of a mapping the first one."""
    return next(iter(wish.values())) if isinstance(wish, Mapping) else wish
