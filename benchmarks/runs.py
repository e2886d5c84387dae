"""Run a row of the plan: open its cluster, take the samples, write what was found into a file."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.clusters import Cluster, check_memory, opened
from benchmarks.harness import Comparison, Sampling
from benchmarks.machine import load, machine, versions
from benchmarks.plan import CASES, Row
from benchmarks.profiling import Profiler
from benchmarks.workloads import chain_large, import_and_hello, ingest, map_memory

STORES = {"chain_large": 4, "fan_out_large": 4, "map_large": 4}  # Ray's object store in sizes of the array
STORE = {"results_dropped": 1 << 30, "radps": 2 << 30}  # … or in bytes
NEEDED = {"chain_large": 5, "fan_out_large": 9, "map_large": 6}  # memory in sizes of the array

Compare = Callable[..., Comparison]


def run(row: Row, command: str, *, profiles: Path | None = None) -> dict[str, Any]:
    """Measure a row and return what goes to its file.

    Parameters
    ----------
    row : Row
        What to measure.
    command : str
        With which anybody can repeat it.
    profiles : Path, optional
        Where the profile of one more sample goes; none is made without it.
    """
    date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    result: dict[str, Any] = {
        "case": row.case,
        "backend": row.backend,
        "variant": row.variant,
        "date": date,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "load_before": load(),
        "parameters": row.parameters,
        "definition": CASES[row.case].DONE,
    }
    profiler = Profiler(profiles, f"{date[:10]}-{_stem(row)}") if profiles is not None else None
    result["comparisons"] = comparisons(row, profiler)
    result["profile"] = profiler.found if profiler is not None else None
    first = result["comparisons"][0]
    result["ratio"] = first["ratio"]
    result["all_states_recorded"] = first.get("all_states_recorded", first.get("visible_to_next_command"))
    result["rivals"] = {}
    result["load_after"] = load()
    return result


def comparisons(row: Row, profiler: Profiler | None = None) -> list[dict[str, Any]]:
    """Compare penstock with the bare back end."""
    sampling = Sampling(row.repeats, row.bare, row.untouched, profile=profiler)
    if row.case == "import_and_hello":
        return [import_and_hello.compare(row.backend, repeats=row.repeats)]
    if row.case == "ingest":
        return [ingest.compare(row.backend, repeats=row.repeats, **row.sizes)]
    check_memory(int(NEEDED.get(row.case, 0) * row.sizes.get("megabytes", 0) * 10**6))
    if row.case == "map_memory":
        with opened("threads" if row.backend == "ray" else row.backend) as cluster:
            if row.backend == "ray":  # each driver starts one of its own
                cluster.backend, cluster.configuration = "ray", f"{cluster.threads} CPUs"
            return [map_memory.compare(cluster, sampling, **row.sizes).as_json()]
    found = []
    if row.case == "chain_large":
        found.append(first_runs(row).as_json())
    with open_for(row) as cluster:
        if profiler is not None:
            profiler.cluster = cluster
        found.insert(0, _compare(CASES[row.case].compare, cluster, row, sampling).as_json())
    return found


def open_for(row: Row) -> Any:
    """Open the cluster of a row."""
    workers, threads = row.shape
    size = int(row.sizes.get("megabytes", 0) * 10**6)
    store = STORE.get(row.case, STORES.get(row.case, 0) * size)
    return opened(
        row.backend, saturation=row.saturation, object_store=store, workers=workers, threads=threads
    )


def first_runs(row: Row) -> Comparison:
    """Compare the first large array of a new cluster; each sample has a cluster of its own."""
    found: Comparison | None = None
    for repeat in range(row.repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            with open_for(row) as cluster:

                def take(sides: Any, cluster: Cluster = cluster, which: int = which) -> Comparison:
                    side = sides[which]
                    made = Comparison(cluster.configuration, sides[0].name, sides[1].name, chain_large.TASKS)
                    chain_large.warm(side, cluster, row.sizes["megabytes"])
                    sample = chain_large.sample_of(side, cluster, row.sizes["megabytes"])
                    (made.samples if which else made.bare_samples).append(sample)
                    return made

                made = _with_sides(cluster, row, take)
            if found is None:
                found, found.what = made, "first run on a new cluster"
            else:
                found.bare_samples += made.bare_samples
                found.samples += made.samples
    assert found is not None
    return found


def _compare(compare: Compare, cluster: Cluster, row: Row, sampling: Sampling) -> Comparison:
    return _with_sides(cluster, row, lambda sides: compare(cluster, sides, sampling, **row.sizes))


def _with_sides(cluster: Cluster, row: Row, use: Callable[[Any], Comparison]) -> Comparison:
    from benchmarks.ours import Penstock, empty_home  # after the parser: it loads penstock
    from benchmarks.rivals.bare import bare_side

    size = row.chunk_size or "auto"
    with empty_home():
        ours = Penstock(cluster, "auto" if size == "auto" else int(size))
        try:
            return use((bare_side(cluster), ours))
        finally:
            ours.close()


def with_prefect(row: Row) -> dict[str, Any]:
    """Measure Prefect at the size of a row, beside the bare back end, in an environment of its own."""
    from benchmarks.rivals.prefect import measure_prefect

    return measure_prefect(row.case, row.backend, sizes=row.sizes, repeats=row.peer_repeats, shape=row.shape)


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write a result file; a later run of the same day replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = (result["date"][:10], result["case"], result["variant"], result["backend"])
    path = folder / f"{'-'.join(part for part in parts if part)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _stem(row: Row) -> str:
    return "-".join(part for part in (row.case, row.variant, row.backend) if part)
