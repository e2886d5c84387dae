"""Small tables for notebooks: text in, HTML out, everything escaped, nothing loaded."""

from __future__ import annotations

import html
from collections.abc import Iterable

COLOURS = {
    "COMPLETED": "#1b7f4b",
    "FAILED": "#c0392b",
    "CRASHED": "#d35400",
    "CANCELLED": "#7f8c8d",
    "CANCELLING": "#7f8c8d",
    "SKIPPED": "#1685a3",
    "RUNNING": "#2461c2",
    "PENDING": "#8a6d00",
    "SCHEDULED": "#8a6d00",
    "PAUSED": "#8a6d00",
}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def badge(kind: object, name: str) -> Html:
    """Show a state: its name in the colour of its type."""
    colour = COLOURS.get(str(kind), "#333")
    return Html(f'<span style="color:{colour};font-weight:600">{html.escape(name)}</span>')


def card(kind: str, title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Make a small table.

    Parameters
    ----------
    kind, title : str
        What it shows, and which one.
    rows : iterable of (str, str)
        Label and text; what is not `Html` is escaped.
    """
    lines = "".join(
        f'<tr><td style="text-align:left;opacity:.65">{_escaped(label)}</td>'
        f'<td style="text-align:left">{_escaped(text)}</td></tr>'
        for label, text in rows
    )
    head = f"<b>{html.escape(kind)}</b> {html.escape(title)}"
    return f'<div style="font-family:sans-serif">{head}<table>{lines}</table></div>'


def _escaped(text: str) -> str:
    return text if isinstance(text, Html) else html.escape(str(text)[:500])
