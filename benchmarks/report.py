"""A table of the newest figures, in Markdown, from the files in results/."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEAD = (
    "case",
    "back end",
    "configuration",
    "engine",
    "engine s",
    "bare s",
    "ratio",
    "recorded",
    "driver MB",
    "date",
)


def newest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read the newest result of each case on each back end."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        found[result["case"], result["backend"]] = result
    return [found[key] for key in sorted(found)]


def table(results: Iterable[dict[str, Any]]) -> str:
    """Return a table of results: a line for each comparison, rivals included."""
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for result in results:
        for comparison in [*result["comparisons"], *result["rivals"].values()]:
            lines.append(_line(_cells(result, comparison)))
    return "\n".join(lines) + "\n"


def _cells(result: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    ours = comparison["engine"].get("median", {})
    bare = comparison.get("bare", {}).get("median", {})
    size = _size(result["case"], comparison.get("parameters", result["parameters"]))
    return [
        f"{result['case']} {size}".strip(),
        result["backend"],
        comparison.get("configuration", ""),
        comparison["engine"]["name"],
        _number(ours.get("seconds")),
        _number(bare.get("seconds")),
        f"{comparison['ratio']:.3g}x"
        if comparison["ratio"] is not None
        else comparison.get("unfinished", "") or "-",
        _recorded(comparison),
        _number(ours["rss_growth"] / 1e6) if "rss_growth" in ours else "-",
        result["date"][:10],
    ]


def _size(case: str, parameters: dict[str, Any]) -> str:
    if case == "map_noop":
        return f"n = {parameters['count']}"
    return "" if case == "import_and_hello" else f"{parameters['megabytes']} MB"


def _recorded(comparison: dict[str, Any]) -> str:
    known = comparison.get("all_states_recorded", comparison.get("visible_to_next_command"))
    return "-" if known is None else "yes" if known else "no"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"


def sentence(case: str, backend: str, comparison: dict[str, Any]) -> str:
    """Say in one line what a comparison found."""
    engine, bare = comparison["engine"], comparison.get("bare", {})
    ours = engine.get("median", {})
    parts = [f"{case} on {backend} ({comparison.get('configuration', '')}): {engine['name']}"]
    parts.append(f"{_number(ours.get('seconds'))} s, {bare.get('name', 'bare')}")
    parts.append(f"{_number(bare.get('median', {}).get('seconds'))} s, ratio")
    if comparison["ratio"] is None:
        parts.append("unknown")
    else:
        ratios = comparison["ratios"]
        parts.append(
            f"{comparison['ratio']:.3g}x ({min(ratios):.3g} to {max(ratios):.3g}, {len(ratios)} pairs)"
        )
    line = " ".join(parts) + f"; recorded: {_recorded(comparison)}"
    if "rss_growth" in ours:
        line += f"; driver +{ours['rss_growth'] / 1e6:.1f} MB"
    if comparison.get("tasks") and "cpu_seconds" in ours:
        line += f", {1e3 * ours['cpu_seconds'] / comparison['tasks']:.2f} ms CPU per task"
    if "next_command_seconds" in ours:
        line += f"; seen by {engine['samples'][0]['seen_by']} in {ours['next_command_seconds']:.2f} s"
    if comparison.get("unfinished"):
        line += f"; {comparison['unfinished']}"
    return line
