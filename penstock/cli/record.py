"""The record as the commands read it: opened for a moment, and asked for a run by what a person remembers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from penstock.cli.layout import moment, short_id, stop

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["Ask", "answering", "find", "find_run", "opened"]

Ask = Callable[..., Any]
"""Answers a question of `penstock.api.queries` by its name."""


@contextlib.contextmanager
def answering() -> Iterator[Ask]:
    """Yield who answers about runs: the server that is set, or the record of this machine."""
    from penstock.settings import settings

    if settings().api_url:
        from penstock.api.client import Client

        with Client(settings().api_url) as client:
            yield client.ask
        return
    from penstock.api.queries import ANSWERS

    with opened() as connection:
        yield lambda what, **details: ANSWERS[what](connection, **details)


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
    from penstock.api.queries import ANSWERS

    return find_run(lambda what, **details: ANSWERS[what](connection, **details), text, kinds=kinds)


def find_run(ask: Ask, text: str, *, kinds: tuple[str, ...] = ("flow", "task")) -> dict[str, Any]:
    """Return the run that a person means; see `find`."""
    found: list[dict[str, Any]] = [run for run in ask("find", text=text) if run["kind"] in kinds]
    if not found:
        stop(f"there is no run {text!r}; `penstock runs` lists them.")
    if len(found) > 1 and text not in {found[0]["name"], found[0].get("flow")}:
        several = ", ".join(
            f"{short_id(run['id'])} ({run['name']}, {moment(run['created'])})" for run in found[:5]
        )
        stop(f"{text!r} fits several runs: {several}; give more digits.")
    return found[0]
