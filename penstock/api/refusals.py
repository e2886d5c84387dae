"""What a database says when it refuses, in words that name the place and the remedy.

No sentence holds a password: databases do not repeat them, and addresses are printed without.
"""

from __future__ import annotations

import sqlalchemy as sa

from penstock.api.db import Database
from penstock.errors import ConfigurationError, PenstockError, StoreDamaged, StoreUnavailable

_SQLITE = (
    (
        ("malformed", "not a database", "database corruption"),
        (
            "The database {name} is damaged; run `penstock db reset`, which sets it aside as {name}.damaged-… and "
            "begins a new one (`sqlite3 FILE .recover` may save rows of it). Events that were not committed yet are "
            "in the spool and are not lost."
        ),
    ),
    (
        ("disk is full", "disk I/O error"),
        "The disk under {name} takes nothing more ({said}); make room there, and what waits is committed.",
    ),
    (
        ("readonly", "unable to open", "not authorized", "permission denied"),
        (
            "The database {name} cannot be written to ({said}); give this account the right to, or set PENSTOCK_HOME to "
            "another directory."
        ),
    ),
    (
        ("locked", "busy"),
        "Another program holds the database {name} for long; end it, and what waits is committed.",
    ),
)
_POSTGRES = (
    (
        ("28P01", "28000", "password authentication failed", "no password supplied"),
        "PostgreSQL refuses the user or the password of PENSTOCK_DATABASE_URL ({name}).",
    ),
    (
        ("3D000", "does not exist"),
        "PostgreSQL has no database of this name: {name}; make it with `createdb`, or mend PENSTOCK_DATABASE_URL.",
    ),
    (
        ("42501", "permission denied"),
        "PostgreSQL does not let this user write to {name}: {said}.",
    ),
    (("53300", "too many clients"), "PostgreSQL at {name} takes no more connections now."),
    (("53100",), "The disk of the PostgreSQL server at {name} is full."),
    (
        (
            "could not translate",
            "connection refused",
            "timeout expired",
            "timed out",
            "connection failed",
            "closed",
        ),
        "The PostgreSQL server of PENSTOCK_DATABASE_URL ({name}) cannot be reached: {said}.",
    ),
)
_MISCONFIGURED = ("refuses the user", "has no database", "does not let this user")


def explain(database: Database, error: BaseException) -> str:
    """Return one sentence or two about an error of the database.

    Parameters
    ----------
    database : Database
        That raised it.
    error : exception
        Of SQLAlchemy, of the driver, or of the operating system.
    """
    cause = getattr(error, "orig", None) or error
    said = _first_line(cause)
    state = str(getattr(cause, "sqlstate", None) or "")
    for signs, sentence in _SQLITE if database.is_sqlite else _POSTGRES:
        if state in signs or any(sign.lower() in said.lower() for sign in signs if not sign[:2].isdigit()):
            return sentence.format(name=database.name, said=said)
    return f"The database {database.name} cannot be used now: {said}."


def refusal(database: Database, error: sa.exc.SQLAlchemyError) -> PenstockError:
    """Return the error that a user gets to see: of the settings, of the file, or of the moment."""
    sentence = explain(database, error)
    if any(sign in sentence for sign in _MISCONFIGURED):
        return ConfigurationError(sentence)
    return StoreDamaged(sentence) if "is damaged" in sentence else StoreUnavailable(sentence)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
