"""The radio demo: from the raw visibilities of a spiral galaxy to its spectrum and map.

    from penstock.demo import radio
    print(radio())

Read `penstock/demo/flow.py` first: it is the whole reduction on one page.
Data and method are told in `examples/radio/README.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.demo.flow import radio
    from penstock.demo.report import Report

__all__ = ["Report", "radio"]


def __getattr__(name: str) -> Any:
    """Import the flow when it is asked for: a worker that only unpickles visibilities never pays for it."""
    if name == "radio":
        from penstock.demo.flow import radio

        return radio
    if name == "Report":
        from penstock.demo.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
