"""The kernel of a notebook: it outlives its flows, has a loop of its own, and shows what they do."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

from penstock.settings import settings


def is_here() -> bool:
    """Whether this process is the kernel of a notebook."""
    if "ipykernel" not in sys.modules:  # nothing is loaded in order to find out
        return False
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def is_its_handler(handler: Any) -> bool:
    """Whether a handler of SIGINT is the one of a cell with ``await``; it cancels the cell when its loop is free."""
    return str(getattr(handler, "__module__", "")).startswith("ipykernel.")


def shown(root: str) -> contextlib.AbstractContextManager[Any]:
    """Show a root flow run below its cell while the block runs; does nothing elsewhere.

    Parameters
    ----------
    root : str
        Id of the run.
    """
    if not is_here() or settings().progress == "off":
        return contextlib.nullcontext()
    # Displays stand above the engine, and here is where a run begins: bound by name, as the store is.
    display: contextlib.AbstractContextManager[Any] = importlib.import_module("penstock.notebook").Shown(root)
    return display
