"""What is measured: a row for each case, back end and size. `TABLE` is what ``make bench`` runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.clusters import BACKENDS, WORKERS
from benchmarks.workloads import (
    chain_large,
    fan_out_large,
    import_and_hello,
    ingest,
    latency,
    map_large,
    map_memory,
    map_noop,
    pipeline,
    radps,
    results_dropped,
)

CASES = {
    module.NAME: module
    for module in (
        map_noop,
        map_memory,
        pipeline,
        latency,
        chain_large,
        fan_out_large,
        map_large,
        results_dropped,
        radps,
        import_and_hello,
        ingest,
    )
}
INFINITE = "inf"
SHAPES = {"fan_out_large": (fan_out_large.WORKERS, 1), "radps": (radps.WORKERS, radps.THREADS)}


@dataclass(frozen=True)
class Row:
    """One case on one back end, at one size.

    Attributes
    ----------
    case, backend : str
        What and where.
    sizes : dict
        What the case is given: "count", "megabytes", "stages", "mean", "deviation".
    repeats : int
        Pairs of samples.
    chunk_size : str
        "1", "auto" or another number, for `map_noop`; empty where it is not set.
    saturation : str
        Of the Dask scheduler; its default if empty.
    bare : bool
        False measures the engine alone.
    untouched : bool
        Whether a bare sample comes first.
    peer_repeats : int
        Pairs of samples of Prefect.
    """

    case: str
    backend: str
    sizes: dict[str, Any] = field(default_factory=dict)
    repeats: int = 5
    chunk_size: str = ""
    saturation: str = ""
    bare: bool = True
    untouched: bool = True
    peer_repeats: int = 3

    @property
    def shape(self) -> tuple[int, int]:
        """Worker processes and threads of each."""
        return SHAPES.get(self.case, (WORKERS, 1))

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything that a figure of this row depends on, besides the machine."""
        words = {"chunk_size": self.chunk_size, "saturation": self.saturation}
        return {**self.sizes, "repeats": self.repeats, **{name: word for name, word in words.items() if word}}

    @property
    def variant(self) -> str:
        """The size in a few letters, for names of files."""
        parts = [str(self.sizes["count"])] if "count" in self.sizes else []
        if "megabytes" in self.sizes:
            parts.append(f"{self.sizes['megabytes']:g}MB")
        if "mean" in self.sizes and self.case == "radps":
            parts.append(f"{self.sizes['mean']:g}s")
        if self.chunk_size:
            parts.append("auto" if self.chunk_size == "auto" else f"chunk{self.chunk_size}")
        if self.saturation:
            parts.append(self.saturation)
        return "-".join(parts)

    @property
    def label(self) -> str:
        """Case, size and back end, for people."""
        return " ".join(part for part in (self.case, self.variant, "on", self.backend) if part)


def _both(case: str, **options: Any) -> list[Row]:
    return [Row(case, backend, **options) for backend in ("dask", "ray")]


SCALED = {"mean": 0.1, "deviation": 0.01}  # seconds

TABLE = [
    *_both("map_noop", sizes={"count": 10_000}, chunk_size="1"),
    *_both("map_noop", sizes={"count": 10_000}, chunk_size="auto", untouched=False),
    Row("map_noop", "dask", {"count": 10_000}, 3, "1", INFINITE, untouched=False),
    *_both("map_noop", sizes={"count": 100_000}, chunk_size="auto", bare=False),
    *_both("map_memory", sizes={"count": 100_000}, repeats=3, bare=False),
    *_both("pipeline", sizes={"count": 1_000, "stages": pipeline.STAGES}, untouched=False),
    *_both("latency", sizes={"count": 200}),
    *_both("chain_large", sizes={"megabytes": 1_000}),
    *_both("fan_out_large", sizes={"megabytes": 1_000}),
    *_both("map_large", sizes={"megabytes": 500}),
    *_both("results_dropped", sizes={"count": 1_000, "megabytes": 50}, repeats=1, untouched=False),
    *(
        Row("radps", "dask", {"count": count, "megabytes": size, **SCALED}, repeats, untouched=False)
        for count, repeats in ((1_000, 5), (4_000, 3))
        for size in (0.1, 10)
    ),
    Row("import_and_hello", "threads", repeats=7),
    *(Row("ingest", database, {"count": 150_000}, bare=False) for database in ingest.DATABASES),
]

PUBLIC = [
    Row("radps", "dask", {"count": count, "megabytes": size, "mean": mean, "deviation": deviation}, 1, untouched=False)
    for count in (1_000, 4_000, 16_000, 64_000, 128_000)
    for mean, deviation in ((1.0, 0.1), (6.0, 4.0))
    for size in (0.1, 10)
]  # fmt: skip
"""The public definition of RADPS, shortest first: hours."""

_PEER: dict[str, Any] = {"untouched": False}

PEERS = [
    row
    for count, peer_repeats in ((100, 3), (1_000, 1))  # Prefect takes minutes for a thousand tasks
    for small in ({**_PEER, "peer_repeats": peer_repeats},)
    for row in (
        *_both("map_noop", sizes={"count": count}, chunk_size="auto", **small),
        *_both("pipeline", sizes={"count": count // 10, "stages": pipeline.STAGES}, **small),
        *_both("latency", sizes={"count": count}, **small),
        Row("radps", "dask", {"count": count, "megabytes": 0.1, **SCALED}, **small),
    )
] + [
    *_both("chain_large", sizes={"megabytes": 50}, **_PEER),
    *_both("fan_out_large", sizes={"megabytes": 50}, **_PEER),
    *_both("map_large", sizes={"megabytes": 50}, **_PEER),
    *_both("map_large", sizes={"megabytes": 500}, **_PEER, peer_repeats=1),
    *_both("results_dropped", sizes={"count": 100, "megabytes": 5}, **_PEER, peer_repeats=1),
    Row("import_and_hello", "threads", peer_repeats=3),
]
"""The sizes that Prefect is measured at."""


@dataclass(frozen=True)
class Wish:
    """What the command line changes; None leaves a row as it is."""

    cases: Sequence[str] = ()
    backend: str | None = None
    count: int | None = None
    megabytes: float | None = None
    sleep: float | None = None
    chunk_size: str | None = None
    saturation: str | None = None
    repeats: int | None = None


def chosen(rows: Iterable[Row], wish: Wish) -> list[Row]:
    """Return the rows that are wished for, with the wished sizes, each once."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in _on(list(rows), wish):
        made = _changed(row, wish)
        found.setdefault((made.case, made.backend, made.variant), made)
    return list(found.values())


def _on(rows: list[Row], wish: Wish) -> list[Row]:
    """Return rows of the wished cases on the wished back end, taken over from another where it has none."""
    rows = [row for row in rows if not wish.cases or row.case in wish.cases]
    if wish.backend is None:
        return rows
    found = []
    for backend in BACKENDS if wish.backend == "all" else (wish.backend,):
        for case in dict.fromkeys(row.case for row in rows):
            of_case = [row for row in rows if row.case == case]
            own = [row for row in of_case if row.backend == backend]
            if not own and wish.cases and (backend in ingest.DATABASES) == (case == ingest.NAME):
                of_case = [row for row in of_case if not row.saturation]
                own = [replace(row, backend=backend) for row in of_case]
            found.extend(own)
    return found


def _changed(row: Row, wish: Wish) -> Row:
    sizes = dict(row.sizes)
    if wish.count is not None and "count" in sizes:
        sizes["count"] = wish.count
    if wish.megabytes is not None and "megabytes" in sizes:
        sizes["megabytes"] = wish.megabytes
    if wish.sleep is not None and "mean" in sizes:
        sizes["deviation"] = sizes["deviation"] * wish.sleep / sizes["mean"]
        sizes["mean"] = wish.sleep
    changes: dict[str, Any] = {"sizes": sizes}
    if wish.chunk_size is not None and row.chunk_size:
        changes["chunk_size"] = wish.chunk_size
    if wish.saturation is not None and row.backend == "dask":
        changes["saturation"] = wish.saturation
    if wish.repeats is not None:
        changes["repeats"] = changes["peer_repeats"] = wish.repeats
    return replace(row, **changes)
