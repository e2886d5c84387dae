"""``python -m benchmarks [CASE …]``: run cases, print ratios, write one JSON file per case and back end."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.clusters import BACKENDS, Cluster, check_memory, opened
from benchmarks.harness import Comparison
from benchmarks.machine import load, machine, versions
from benchmarks.workloads import chain_large, import_and_hello, map_large, map_noop

CASES = {module.NAME: module for module in (map_noop, chain_large, map_large, import_and_hello)}
COUNT = 10_000
MEGABYTES = {"chain_large": 1000, "map_large": 500}
REPEATS = {"map_noop": 3, "chain_large": 3, "map_large": 3, "import_and_hello": 7}
INFINITE = "inf"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    made.add_argument(
        "--backend",
        choices=[*BACKENDS, "all"],
        help="dask and ray by default, threads for import_and_hello; all is all three",
    )
    made.add_argument("--n", type=int, default=COUNT, help="tasks of map_noop")
    made.add_argument(
        "--megabytes", type=int, help="size of the array: 1000 for chain_large, 500 for map_large"
    )
    made.add_argument("--repeats", type=int, help="pairs of samples")
    made.add_argument(
        "--saturation", help="worker-saturation values of Dask for map_noop (default: its own, then inf)"
    )
    made.add_argument(
        "--rivals", action="store_true", help="measure Prefect, too, in an environment of its own"
    )
    made.add_argument("--output", type=Path, default=report.RESULTS, help="directory of the result files")
    made.add_argument("--report", action="store_true", help="run nothing; print a table of the results")
    return made


def backends_of(case: str, wish: str | None) -> tuple[str, ...]:
    """Return where a case is to run."""
    if wish is None:
        return ("threads",) if case == "import_and_hello" else ("dask", "ray")
    return BACKENDS if wish == "all" else (wish,)


def run(case: str, backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case on one back end and return what goes to its file."""
    given = {
        "count": options.n if case == "map_noop" else None,
        "megabytes": options.megabytes or MEGABYTES.get(case),
        "repeats": options.repeats or REPEATS[case],
    }
    parameters: dict[str, int] = {name: value for name, value in given.items() if value is not None}
    result: dict[str, Any] = {
        "case": case,
        "backend": backend,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": options.command,
        "machine": machine(),
        "versions": versions(),
        "load_before": load(),
        "parameters": parameters,
        "definition": CASES[case].DONE,
        "comparisons": _comparisons(case, backend, parameters, options.saturation),
        "rivals": {},
    }
    first = result["comparisons"][0]
    result["ratio"] = first["ratio"]
    result["all_states_recorded"] = first.get("all_states_recorded", first.get("visible_to_next_command"))
    result["ratio_to_saturated_bare"] = _across(result["comparisons"])
    result["load_after"] = load()
    for comparison in result["comparisons"]:
        print(report.sentence(case, backend, comparison), flush=True)
    if result["ratio_to_saturated_bare"] is not None:
        words = "penstock as configured first, against bare as configured last"
        print(f"{case} on {backend}: {words}: {result['ratio_to_saturated_bare']:.3g}x", flush=True)
    if options.rivals:
        result["rivals"]["prefect"] = _prefect(case, backend, parameters)
        print(report.sentence(case, backend, result["rivals"]["prefect"]), flush=True)
    return result


def _comparisons(
    case: str, backend: str, parameters: dict[str, int], saturation: str | None
) -> list[dict[str, Any]]:
    repeats = parameters["repeats"]
    if case == "import_and_hello":
        return [import_and_hello.compare(backend, repeats=repeats)]
    if case == "map_noop":
        wanted = saturation.split(",") if saturation is not None else ["", INFINITE]
        found = []
        for value in wanted if backend == "dask" else [""]:
            with opened(backend, saturation=value) as cluster:
                found.append(_compare(map_noop, cluster, count=parameters["count"], repeats=repeats))
        return [one.as_json() for one in found]
    size = parameters["megabytes"] * 10**6
    check_memory(5 * size)
    with opened(backend, object_store=4 * size) as cluster:
        workload = chain_large if case == "chain_large" else map_large
        return [_compare(workload, cluster, megabytes=parameters["megabytes"], repeats=repeats).as_json()]


def _compare(workload: Any, cluster: Cluster, **sizes: int) -> Comparison:
    from benchmarks.ours import Penstock, empty_home  # after the parser: it loads penstock
    from benchmarks.rivals.bare import bare_side

    with empty_home():
        ours = Penstock(cluster)
        try:
            found: Comparison = workload.compare(cluster, (bare_side(cluster), ours), **sizes)
        finally:
            ours.close()
    return found


def _across(comparisons: Sequence[dict[str, Any]]) -> float | None:
    """Return the speed of penstock in the first configuration over that of bare in the last one."""
    if len(comparisons) < 2:
        return None
    seconds: float = comparisons[0]["engine"]["median"]["seconds"]
    return float(comparisons[-1]["bare"]["median"]["seconds"]) / seconds


def _prefect(case: str, backend: str, parameters: dict[str, int]) -> dict[str, Any]:
    from benchmarks.rivals.prefect import measure_prefect

    return measure_prefect(
        case,
        backend,
        count=parameters.get("count", 0),
        megabytes=parameters.get("megabytes", 0),
        repeats=parameters["repeats"],
    )


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write a result file; a later run of the same day replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date'][:10]}-{result['case']}-{result['backend']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _command(arguments: Sequence[str]) -> str:
    """Return the command as anybody can repeat it: without the place of the files."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith("--output"):
            kept.append(argument)
        skip = argument == "--output"
    return shlex.join(["python", "-m", "benchmarks", *kept])


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    options.command = _command(arguments)
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        parser().error(f"unknown case {unknown[0]!r}: choose from {', '.join(CASES)}")
    if options.report:
        print(report.table(report.newest(options.output)), end="")
        return 0
    for case in options.cases or CASES:
        for backend in backends_of(case, options.backend):
            write(run(case, backend, options), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
