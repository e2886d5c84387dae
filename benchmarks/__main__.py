"""``python -m benchmarks [CASE …]``: run cases, print ratios, write one JSON file per case, size and back end."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report, runs
from benchmarks.clusters import BACKENDS
from benchmarks.plan import CASES, PEERS, PUBLIC, TABLE, Row, Wish, chosen
from benchmarks.workloads import ingest


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    made.add_argument(
        "--backend",
        choices=[*BACKENDS, *ingest.DATABASES, "all"],
        help="dask and ray by default, threads for import_and_hello, databases for ingest; all is all three",
    )
    made.add_argument("--n", type=int, help="tasks, where a case has a number of them")
    made.add_argument("--megabytes", type=float, help="size of the arrays, where a case has some")
    made.add_argument("--sleep", type=float, help="mean seconds of a task of radps")
    made.add_argument("--repeats", type=int, help="pairs of samples")
    made.add_argument("--chunk-size", help="of map_noop: 1, auto or another number (default: 1, then auto)")
    made.add_argument(
        "--saturation", help="worker-saturation of Dask (default: its own; for map_noop also inf)"
    )
    which = made.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="the public definition of RADPS: hours")
    which.add_argument(
        "--peers",
        action="store_true",
        help="penstock and, in an environment of its own, Prefect, at sizes that Prefect can bear",
    )
    made.add_argument("--profile", action="store_true", help="run one more sample under py-spy")
    made.add_argument("--output", type=Path, default=report.RESULTS, help="directory of the result files")
    made.add_argument("--list", action="store_true", help="run nothing; show what would be measured")
    made.add_argument(
        "--report", action="store_true", help="run nothing; make tables and plots of the newest results"
    )
    return made


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Return what the command line asks for."""
    wish = Wish(
        cases=options.cases,
        backend=options.backend,
        count=options.n,
        megabytes=options.megabytes,
        sleep=options.sleep,
        chunk_size=options.chunk_size,
        saturation=options.saturation,
        repeats=options.repeats,
    )
    return chosen(PUBLIC if options.full else PEERS if options.peers else TABLE, wish)


def measure(row: Row, options: argparse.Namespace) -> None:
    """Run a row, write its file, and say what was found."""
    print(f"-- {row.label}, {time.strftime('%H:%M:%S')}", flush=True)
    started = time.monotonic()
    result = runs.run(row, options.command, profiles=options.output / "profiles" if options.profile else None)
    for comparison in result["comparisons"]:
        print(report.sentence(row.label, comparison), flush=True)
    runs.write(result, options.output)
    if options.peers:
        result["rivals"]["prefect"] = runs.with_prefect(row)
        print(report.sentence(row.label, result["rivals"]["prefect"]), flush=True)
        runs.write(result, options.output)
    for line in report.profile_lines(result):
        print(line)
    print(f"   took {time.monotonic() - started:.0f} s", flush=True)


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
        print(report.publish(options.output), end="")
        return 0
    failed = []
    for row in rows_of(options):
        if options.list:
            print(row.label)
            continue
        try:
            measure(row, options)
        except (Exception, SystemExit) as error:
            if len(options.cases) == 1 and options.backend not in (None, "all"):
                raise
            print(f"{row.label} FAILED: {type(error).__name__}: {error}", flush=True)
            failed.append(row.label)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
