"""The report as pictures: PNG files, and one HTML page that holds them."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.floors import Verdict

COLOURS = {
    "aim met": "#1b7837",
    "floor met": "#7fbf7b",
    "missed": "#b2182b",
    "aim missed": "#92c5de",
    "no floor": "#bbbbbb",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
td, th { border: 1px solid #ccc; padding: .3em .6em; text-align: left; vertical-align: top; }
th { background: #f2f2f2; } code { font-size: 12px; } img { max-width: 100%; }
tr.missed td { background: #fbe3e4; } tr.aim-met td { background: #e5f4e3; }
"""


def draw(
    judged: Sequence[Verdict],
    results: Sequence[dict[str, Any]],
    peers: Sequence[dict[str, Any]],
    folder: Path,
) -> list[Path]:
    """Write the plots that there are figures for; return their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = [
        _speeds(judged, folder / "speeds.png"),
        _samples(results, folder / "samples.png"),
        _overheads(results, folder / "radps.png"),
        _peers(peers, folder / "prefect.png"),
    ]
    return [path for path in drawn if path is not None]


def _figure(lines: int) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.34 * max(lines, 2)), layout="constrained")
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _speeds(judged: Iterable[Verdict], path: Path) -> Path | None:
    """Draw how far each figure is from its floor: right of the line is better."""
    shown = [one for one in judged if one.value and (one.floor.floor or one.floor.aim)]
    if not shown:
        return None
    figure, axes = _figure(len(shown))
    for place, one in enumerate(reversed(shown)):
        base = one.floor.floor or one.floor.aim or 1.0
        value = float(one.value or 0)
        better = base / value if one.floor.less else value / base
        axes.barh(place, better - 1, left=1, color=COLOURS[one.word])
        if one.floor.floor and one.floor.aim:
            aim = one.floor.floor / one.floor.aim if one.floor.less else one.floor.aim / one.floor.floor
            axes.plot([aim], [place], "k|", markersize=11)
        axes.annotate(f" {one.floor.unit.format(value)}", (max(better, 1), place), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [one.floor.case for one in reversed(shown)], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times better than the floor, or than the aim where there is no floor (stroke: the aim)")
    axes.margins(x=0.15)
    return _save(figure, path)


def _samples(results: Iterable[dict[str, Any]], path: Path) -> Path | None:
    """Draw every pair of samples of every case as a ratio."""
    lines = [
        (" ".join(part for part in (one["case"], one["variant"], one["backend"], comparison.get("what", "")) if part), comparison["ratios"])
        for one in results
        for comparison in one["comparisons"]
        if comparison.get("ratios")
    ]  # fmt: skip
    if not lines:
        return None
    figure, axes = _figure(len(lines))
    for place, (_, ratios) in enumerate(reversed(lines)):
        axes.plot(ratios, [place] * len(ratios), "o", color="#2166ac", alpha=0.6, markersize=5)
    axes.set_yticks(range(len(lines)), [name for name, _ in reversed(lines)], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("speed of penstock over that of the bare back end, pair by pair")
    return _save(figure, path)


def _overheads(results: Iterable[dict[str, Any]], path: Path) -> Path | None:
    """Draw the overhead of the RADPS benchmark."""
    import numpy as np

    shown = [
        (f"{one['parameters']['count']:,} x {one['parameters']['megabytes']:g} MB, sleeps of {one['parameters']['mean']:g} s, {one['backend']}", one["comparisons"][0])
        for one in results
        if one["case"] == "radps"
    ]  # fmt: skip
    if not shown:
        return None
    figure, axes = _figure(2 * len(shown))
    places = np.arange(len(shown))
    for shift, side, colour in ((0.2, "engine", "#2166ac"), (-0.2, "bare", "#bbbbbb")):
        values = [one[side].get("median", {}).get("overhead_percent", np.nan) for _, one in shown]
        names = {one[side]["name"] for _, one in shown}
        axes.barh(places + shift, values, 0.38, color=colour, label=", ".join(sorted(names)))
    axes.set_yticks(places, [name for name, _ in shown], fontsize=8)
    axes.set_xlabel("overhead in %: 100 (wall - S) / S, S = sum of sleeps / threads")
    axes.legend()
    return _save(figure, path)


def _peers(peers: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Draw how many times faster penstock was than Prefect."""
    shown = [one for one in peers if one["factor"]]
    if not shown:
        return None
    figure, axes = _figure(len(shown))
    names = [f"{one['case']}, {one['backend']}" for one in shown]
    axes.barh(range(len(shown)), [one["factor"] for one in shown], color="#2166ac")
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("Prefect's time over penstock's")
    axes.invert_yaxis()
    return _save(figure, path)


# -- HTML -----------------------------------------------------------------------------------------------


def html_page(
    results: Sequence[dict[str, Any]],
    judged: Sequence[Verdict],
    peers: Sequence[dict[str, Any]],
    drawn: Iterable[Path],
) -> str:
    """Return the report as one page that needs no other file."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>penstock: figures</title><style>{STYLE}</style>"
    ]
    parts.append(f"<h1>Figures</h1><p>{html.escape(report.surroundings(results))}</p>")
    parts.append("<p>A ratio is a speed: above 1x is faster than the bare back end.</p>")
    parts.append(_html_table(report.verdict_table(judged)))
    parts.append(f"<pre>{html.escape(report.missed(judged) + report.extrapolated(results))}</pre>")
    for path in drawn:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}"></p>')
    if peers:
        parts.append("<h2>Prefect at the same size</h2>" + _html_table(report.peer_table(peers)))
    parts.append("<h2>Every comparison</h2>" + _html_table(report.table(results)))
    return "\n".join(parts) + "\n</html>\n"


def _html_table(markdown: str) -> str:
    """Turn a table of this package's Markdown into HTML."""
    rows = [line.strip("| ").split(" | ") for line in markdown.strip().splitlines()]
    lines = ["<table>", "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0]) + "</tr>"]
    for row in rows[2:]:
        cells = [re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(cell)) for cell in row]
        kind = "missed" if "missed" in row else "aim-met" if "aim met" in row else ""
        lines.append(f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
