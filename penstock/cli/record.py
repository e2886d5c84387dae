"""The record as the commands read it: opened for a moment, and asked for a run by what a person remembers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from penstock.cli.layout import moment, short_id, stop

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["find", "opened"]


@contextlib.contextmanager
def opened() -> Iterator[sa.Connection]:
    """Open the record of this machine; whatever is wrong with it ends the command with one sentence."""
    import sqlalchemy as sa

    from penstock.api.embedded import reading
    from penstock.errors import StoreUnavailable

    try:
        with reading() as connection:
            yield connection
    except StoreUnavailable as error:
        stop(str(error))
    except (sa.exc.SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error)
        stop(f"the record cannot be read: {reason} (`penstock doctor` shows where it is)")


def find(
    connection: sa.Connection, text: str, *, kinds: tuple[str, ...] = ("flow", "task")
) -> dict[str, Any]:
    """Return the run that a person means: by id, first or last digits of it, or name.

    Several runs may share a name: then it is the newest one. Digits have to be unambiguous.
    """
    from penstock.api.queries import find_runs

    found = [run for run in find_runs(connection, text) if run["kind"] in kinds]
    if not found:
        stop(f"there is no run {text!r}; `penstock runs` lists them.")
    if len(found) > 1 and text not in {found[0]["name"], found[0].get("flow")}:
        several = ", ".join(
            f"{short_id(run['id'])} ({run['name']}, {moment(run['created'])})" for run in found[:5]
        )
        stop(f"{text!r} fits several runs: {several}; give more digits.")
    return found[0]
