"""How a flow was started, so that it can be started again: its place and its arguments."""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock import errors
from penstock.runners.worker.sizes import size_of
from penstock.settings import settings

__all__ = ["arguments_of", "describe_entry"]

LARGEST = 64 << 10  # bytes of arguments that are kept with a run
_TOO_LARGE = f"its arguments are larger than {LARGEST >> 10} KiB"


def describe_entry(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what it takes to call a flow again, for the row of its run.

    Parameters
    ----------
    function : callable
        Of the flow.
    arguments : mapping
        As the user gave them.

    Returns
    -------
    dict
        ``place, name, cwd, runner`` and ``json`` or ``pickle``; ``obstacle`` says what is missing.
    """
    found: dict[str, Any] = {"cwd": os.getcwd(), "runner": settings().runner or ""}
    try:
        found |= _place(function) | _packed(arguments)
    except Exception as error:  # a run never fails because of what is noted of it
        found["obstacle"] = f"its arguments cannot be kept ({type(error).__name__}: {error})"
    return found


def _place(function: Any) -> dict[str, Any]:
    code, name = getattr(function, "__code__", None), getattr(function, "__name__", "")
    module = sys.modules.get(getattr(function, "__module__", ""))
    if code is None or not Path(code.co_filename).is_file():
        return {"obstacle": "its code is in no file (a notebook, or a prompt)"}
    held = getattr(module, name, None)
    if getattr(held, "fn", None) is not function and module is not None and hasattr(module, "__file__"):
        names = [key for key, value in vars(module).items() if getattr(value, "fn", None) is function]
        if not names and "<locals>" in getattr(function, "__qualname__", ""):
            return {"obstacle": "it is defined inside a function"}
        name = names[0] if names else name
    return {"place": os.path.realpath(code.co_filename), "name": name}


def _packed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if sum(map(size_of, arguments.values())) > LARGEST:  # before anything is copied
        return {"obstacle": _TOO_LARGE}
    try:
        text = json.dumps(dict(arguments))
        if json.loads(text) == dict(arguments) and len(text) <= LARGEST:
            return {"json": text}
    except (TypeError, ValueError):
        pass
    packed = pickle.dumps(dict(arguments), 5)
    if b"__main__" in packed:
        return {"obstacle": "its arguments are of classes of the script that started it"}
    if len(packed) > LARGEST:
        return {"obstacle": _TOO_LARGE}
    return {"pickle": base64.b64encode(packed).decode()}


def arguments_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that `describe_entry` kept.

    Raises
    ------
    ConfigurationError
        Saying why there are none.
    """
    if "obstacle" in entry or not entry.get("place"):
        reason = entry.get("obstacle", "nothing is known of how it was started")
        raise errors.ConfigurationError(f"the run cannot be resumed: {reason}.")
    if "json" in entry:
        return dict(json.loads(entry["json"]))
    return dict(pickle.loads(base64.b64decode(entry["pickle"])))
