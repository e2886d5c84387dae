"""What was found, in words and tables: lines while it runs, then one Markdown page and one HTML page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.floors import FLOORS, Verdict, verdict

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
TOP = 5  # functions of a profile


def newest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read the newest result of each case at each size on each back end."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        result.setdefault("variant", "")
        key = (result["case"], result["variant"], result["backend"])
        if key not in found or found[key]["date"] < result["date"]:
            found[key] = result
    return [found[key] for key in sorted(found)]


# -- tables -----------------------------------------------------------------------------------------


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
    return [
        " ".join(part for part in (result["case"], _size(result), comparison.get("what", "")) if part),
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


def _size(result: dict[str, Any]) -> str:
    parameters = result["parameters"]
    parts = []
    if parameters.get("count") is not None:
        parts.append(f"n = {parameters['count']}")
    if parameters.get("megabytes") is not None:
        parts.append(f"{parameters['megabytes']:g} MB")
    if parameters.get("chunk_size"):
        parts.append(f"chunk_size {parameters['chunk_size']}")
    if result["case"] == "radps":
        parts.append(f"sleeps of {parameters['mean']:g} s")
    return ", ".join(parts)


def verdicts(results: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Judge every floor."""
    return [verdict(floor, results) for floor in FLOORS]


def verdict_table(found: Iterable[Verdict]) -> str:
    """Return the table of floors in Markdown."""
    head = ("case", "floor", "aim", "measured", "verdict", "command")
    lines = [_line(head), _line(["---"] * len(head))]
    lines.extend(_line([*one.cells, f"`{one.command}`"]) for one in found)
    return "\n".join(lines) + "\n"


def peer_rows(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times faster penstock was than Prefect at the same size, measured in the same command.

    Returns
    -------
    list of dict
        "case", "backend", "prefect" and "penstock" (seconds, or None), "factor" (or None), "note".
    """
    found = []
    for result in results:
        theirs = result["rivals"].get("prefect")
        if theirs is None:
            continue
        ours = result["comparisons"][0]
        by = ours.get("by", "seconds")
        mine, other = ours["engine"]["median"].get(by), theirs["engine"].get("median", {}).get(by)
        finished = other is not None
        found.append(
            {
                "case": f"{result['case']} {_size(result)}".strip(),
                "backend": result["backend"],
                "prefect": other,
                "penstock": mine,
                "factor": other / mine if finished and mine else None,
                "note": theirs.get("unfinished", ""),
                "command": result["command"],
            }
        )
    return found


def peer_table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table of Prefect in Markdown."""
    head = ("case", "back end", "Prefect s", "penstock s", "penstock is faster by", "note")
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        factor = "-" if row["factor"] is None else f"{row['factor']:.3g}x"
        lines.append(
            _line(
                [
                    row["case"],
                    row["backend"],
                    _number(row["prefect"]),
                    _number(row["penstock"]),
                    factor,
                    row["note"],
                ]
            )
        )
    return "\n".join(lines) + "\n"


# -- pages ------------------------------------------------------------------------------------------


def publish(folder: Path = RESULTS) -> str:
    """Write report.md, report.html and the plots beside the results; return what to print.

    Parameters
    ----------
    folder : Path
        With the result files.
    """
    from benchmarks import plots

    results = newest(folder)
    judged, peers = verdicts(results), peer_rows(results)
    drawn = plots.draw(judged, results, peers, folder)
    text = page(results, judged, peers, drawn)
    (folder / "report.md").write_text(text)
    (folder / "report.html").write_text(plots.html_page(results, judged, peers, drawn))
    return text


def page(
    results: Sequence[dict[str, Any]],
    judged: Sequence[Verdict],
    peers: Sequence[dict[str, Any]],
    drawn: Iterable[Path] = (),
) -> str:
    """Return the report in Markdown."""
    parts = [
        "# Figures",
        surroundings(results),
        "A ratio is a speed: above 1x is faster than the bare back end.\n",
    ]
    parts.append(verdict_table(judged))
    parts.extend([missed(judged), extrapolated(results)])
    parts.extend(f"![{path.stem}]({path.name})\n" for path in drawn)
    if peers:
        parts.extend(["## Prefect at the same size", peer_table(peers)])
    parts.extend(["## Every comparison", table(results)])
    return "\n".join(parts)


def surroundings(results: Sequence[dict[str, Any]]) -> str:
    """Say on what it was measured."""
    if not results:
        return "Nothing was measured yet.\n"
    newest_result = max(results, key=lambda one: one["date"])
    machine, versions = newest_result["machine"], newest_result["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    days = sorted({one["date"][:10] for one in results})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}, "
        f"{machine['python']}; {libraries}. Measured {span}.\n"
    )


def missed(judged: Iterable[Verdict]) -> str:
    """Name the floors that are missed, with what a profile says of them, and those without a figure."""
    judged = list(judged)
    lines = []
    below = [one for one in judged if one.word == "missed"]
    if below:
        lines.append("Missed floors:\n")
        for one in below:
            lines.append(f"* {one.floor.case}: {one.measured}, floor {one.floor.floor_text}")
            lines.extend(f"  {line}" for line in profile_lines(one.result))
    elif any(one.word != "not measured" for one in judged):
        lines.append("No floor is missed of those that were measured.\n")
    without = sum(one.word == "not measured" for one in judged)
    if without:
        lines.append(f"\nNot measured yet: {without} of {len(judged)}.\n")
    return "\n".join(lines) + "\n"


def profile_lines(result: dict[str, Any] | None) -> list[str]:
    """Say where the time of a result went, if it was profiled."""
    lines = []
    for process, found in ((result or {}).get("profile") or {}).items():
        if "problem" in found:
            lines.append(f"- profile of {process}: none, {found['problem']}")
            continue
        top = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["own"][:TOP])
        lines.append(f"- profile of {process} (profiles/{found['file']}): {top}")
    return lines


def _recorded(comparison: dict[str, Any]) -> str:
    known = comparison.get("all_states_recorded", comparison.get("visible_to_next_command"))
    return "-" if known is None else "yes" if known else "no"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"


# -- one line for one comparison ----------------------------------------------------------------------


def sentence(label: str, comparison: dict[str, Any]) -> str:
    """Say in one line what a comparison found."""
    engine, bare = comparison["engine"], comparison.get("bare", {})
    ours, theirs = engine.get("median", {}), bare.get("median", {})
    what = f", {comparison['what']}" if comparison.get("what") else ""
    parts = [f"{label}{what} ({comparison.get('configuration', '')}): {engine['name']}"]
    parts.append(f"{_number(ours.get('seconds'))} s, {bare.get('name', 'bare')}")
    parts.append(f"{_number(theirs.get('seconds'))} s, ratio")
    ratios = comparison.get("ratios") or []
    if comparison["ratio"] is None:
        parts.append("unknown")
    else:
        parts.append(
            f"{comparison['ratio']:.3g}x ({min(ratios):.3g} to {max(ratios):.3g}, {len(ratios)} pairs)"
        )
    line = " ".join(parts) + f"; recorded: {_recorded(comparison)}"
    if "rss_growth" in ours:
        line += f"; driver +{ours['rss_growth'] / 1e6:.1f} MB"
    if comparison.get("tasks") and "cpu_seconds" in ours:
        line += f", {1e3 * ours['cpu_seconds'] / comparison['tasks']:.2f} ms CPU per task"
    for name, words in SPOKEN.items():
        if name in ours:
            line += f"; {words.format(ours[name])}"
            if name in theirs:
                line += f" (bare {words.format(theirs[name])})"
    if "next_command_seconds" in ours:
        line += f"; seen by {engine['samples'][0]['seen_by']} in {ours['next_command_seconds']:.2f} s"
    if comparison.get("unfinished"):
        line += f"; {comparison['unfinished']}"
    return line


SPOKEN = {
    "tasks_per_second": "{:.0f} tasks/s",
    "bytes_per_task": "{:.0f} B per task held",
    "peak_bytes_per_task": "{:.0f} B at the peak",
    "latency_median": "median {:.4f} s",
    "latency_p90": "p90 {:.4f} s",
    "copies_peak": "{:.2f} copies at the peak",
    "copies_held": "{:.2f} held",
    "processes": "{:.0f} reading processes",
    "host_growth": "memory of the host +{:.3g} B",
    "spilled_growth": "{:.3g} B on disk at the peak",
    "overhead_percent": "overhead {:.1f} %",
}


def rate_of_bare(results: Iterable[dict[str, Any]], backend: str) -> float | None:
    """Return the median tasks per second of bare `map_noop` on a back end, of 1,000 tasks and more."""
    rates = [
        one["bare"]["median"]["tasks_per_second"]
        for result in results
        if result["case"] == "map_noop" and result["backend"] == backend
        for one in result["comparisons"]
        if not result["parameters"].get("saturation")
        and "tasks_per_second" in one["bare"].get("median", {})
        and result["parameters"].get("count", 0) >= 1_000
    ]
    return statistics.median(rates) if rates else None


def extrapolated(results: Sequence[dict[str, Any]]) -> str:
    """Say what the bare back ends would need for 100,000 no-ops, if their rate stayed what it was at 10,000."""
    lines = []
    for backend in ("dask", "ray"):
        rate = rate_of_bare(results, backend)
        if rate is not None:
            lines.append(
                f"Bare {backend} at 100,000 no-ops was not measured; at its rate of {rate:,.0f} tasks/s with fewer "
                f"it would need {100_000 / rate:,.0f} s (extrapolated).\n"
            )
    return "\n".join(lines)
