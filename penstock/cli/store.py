"""The store as commands ask it that change something: the one in this process, or a server."""

from __future__ import annotations

import contextlib
import getpass
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.cli.layout import moment, short_id, stop

if TYPE_CHECKING:
    from penstock.engine.tracking import Store

__all__ = ["connected", "find", "person"]


@contextlib.contextmanager
def connected() -> Iterator[Store]:
    """Open the store that the settings name, with everything in it that this machine has recorded."""
    from penstock.engine.home import usable_home
    from penstock.engine.tracking import open_store
    from penstock.settings import settings

    store = open_store(usable_home(settings().home))
    try:
        drain = getattr(store, "drain", None)  # of the store in this process
        if drain is not None:
            drain()
        yield store
    except (errors.PenstockError, OSError):
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("sqlalchemy", "httpx")):
            raise
        stop(f"the store does not answer: {getattr(error, 'orig', None) or error}")
    finally:
        store.close()


def find(store: Store, text: str) -> dict[str, Any]:
    """Return the run that a person means: by id, first or last digits of it, or name; see `record.find`."""
    found: list[dict[str, Any]] = store.ask({"what": "find", "text": text})
    if not found:
        whole = text.replace("-", "").lower()
        if re.fullmatch(r"[0-9a-f]{32}", whole):  # a map has no row of its own
            return {"kind": "map", "id": whole, "name": whole, "state": {"type": "", "name": ""}}
        stop(f"there is no run {text!r}; `penstock runs` lists them.")
    if len(found) > 1 and text not in {found[0]["name"], found[0].get("flow")}:
        several = ", ".join(
            f"{short_id(run['id'])} ({run['name']}, {moment(run['created'])})" for run in found[:5]
        )
        stop(f"{text!r} fits several runs: {several}; give more digits.")
    return found[0]


def person() -> str:
    """Return who gives the command, for the record."""
    from penstock.engine.events import HOST

    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = "somebody"
    return f"{name} on {HOST}"
