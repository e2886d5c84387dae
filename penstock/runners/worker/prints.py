"""Route `print` to the log of the run that calls it."""

from __future__ import annotations

import builtins
import sys
from typing import Any

from .running import RUNNING, shared


def route_prints() -> None:
    """Make `print` write to the log of the run that calls it, where the run wants that."""
    if builtins.print is not _print:
        builtins.print = _print


def set_outside(receive: Any) -> None:
    """Ask `receive(text)` about prints outside of task runs; it answers whether it took them."""
    shared.outside = receive


def _print(
    *args: Any, sep: str | None = " ", end: str | None = "\n", file: Any = None, flush: bool = False
) -> None:
    if file in (None, sys.stdout):
        text = (" " if sep is None else sep).join(map(str, args))
        running = RUNNING.get()
        outside = getattr(shared, "outside", None)
        if (running is not None and running.scope is None) or outside is None:
            taken = running is not None and bool(running.order.get("prints"))
            if taken:
                running.log("INFO", text)
        else:
            taken = outside(text)
        if taken:
            return
    shared.print(*args, sep=sep, end=end, file=file, flush=flush)
