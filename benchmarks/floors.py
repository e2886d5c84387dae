"""The figures that are asked of penstock: what must be reached, what is aimed at, and where it is read.

Ratios are speeds: a floor of "at most 1.05 times the time" is written as at least 0.95x.
A result counts only at the size that its floor names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Result = Mapping[str, Any]
Reader = Callable[[Result], float | None]

WORDS = ("aim met", "floor met", "missed", "aim missed", "no floor", "not measured")


@dataclass(frozen=True)
class Floor:
    """One line of the table.

    Attributes
    ----------
    case : str
        In words.
    name, backend : str
        Of the results that are judged.
    parameters : dict
        That they must have.
    read : callable
        Finds the figure in a result.
    floor, aim : float or None
        None: there is none.
    unit : str
        A format of the figure.
    less : bool
        Whether less is better.
    strict : bool
        Whether the floor itself is too much already.
    note : callable or None
        More words on what was measured.
    """

    case: str
    name: str
    backend: str
    parameters: dict[str, Any]
    read: Reader
    floor: float | None
    aim: float | None
    unit: str = "{:.3g}x"
    less: bool = False
    strict: bool = False
    note: Callable[[Result], str] | None = None

    @property
    def floor_text(self) -> str:
        """The floor in words."""
        return self._words(self.floor)

    @property
    def aim_text(self) -> str:
        """The aim in words."""
        return self._words(self.aim)

    def _words(self, value: float | None) -> str:
        if value is None:
            return "–"
        sign = ("<" if self.strict else "≤") if self.less else "≥"
        return f"{sign} {self.unit.format(value)}"

    def reached(self, value: float, wanted: float) -> bool:
        """Whether a figure is as good as wanted."""
        if self.less:
            return value < wanted if self.strict else value <= wanted
        return value >= wanted


@dataclass(frozen=True)
class Verdict:
    """What was measured of one floor.

    Attributes
    ----------
    word : str
        One of `WORDS`.
    """

    floor: Floor
    word: str
    value: float | None = None
    result: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def measured(self) -> str:
        """The figure in words."""
        if self.value is None or self.result is None:
            return "–"
        text = self.floor.unit.format(self.value)
        return f"{text} ({self.floor.note(self.result)})" if self.floor.note else text

    @property
    def command(self) -> str:
        """The command that measures it, alone."""
        sizes = self.floor.parameters
        peers = " --peers" if self.floor.read is _prefect else ""
        parts = [f"python -m benchmarks{peers}", self.floor.name]
        if self.floor.name != "import_and_hello":
            parts.append(f"--backend {self.floor.backend}")
        if "count" in sizes:
            parts.append(f"--n {sizes['count']}")
        if "megabytes" in sizes:
            parts.append(f"--megabytes {sizes['megabytes']:g}")
        if "chunk_size" in sizes:
            parts.append(f"--chunk-size {sizes['chunk_size']}")
        return " ".join(parts)

    @property
    def cells(self) -> list[str]:
        """Case, floor, aim, measured, verdict."""
        return [self.floor.case, self.floor.floor_text, self.floor.aim_text, self.measured, self.word]


def verdict(floor: Floor, results: Sequence[dict[str, Any]]) -> Verdict:
    """Judge one floor by the newest result that fits it."""
    fitting = [one for one in results if _fits(floor, one)]
    for result in sorted(fitting, key=lambda one: str(one["date"]), reverse=True):
        value = floor.read(result)
        if value is not None:
            return Verdict(floor, _word(floor, value), value, result)
    return Verdict(floor, "not measured")


def _word(floor: Floor, value: float) -> str:
    if floor.floor is not None and not floor.reached(value, floor.floor):
        return "missed"
    if floor.aim is not None and floor.reached(value, floor.aim):
        return "aim met"
    if floor.floor is not None:
        return "floor met"
    return "no floor" if floor.aim is None else "aim missed"


def _fits(floor: Floor, result: Result) -> bool:
    parameters = result["parameters"]
    return (
        result["case"] == floor.name
        and result["backend"] == floor.backend
        and not parameters.get("saturation")
        and result["comparisons"][0].get("all_states_recorded")
        is not False  # an incomplete record is no figure
        and all(parameters.get(name) == value for name, value in floor.parameters.items())
    )


# -- reading figures ---------------------------------------------------------------------------------


def _ratio(result: Result) -> float | None:
    found: float | None = result["comparisons"][0]["ratio"]
    return found


def _seconds(result: Result) -> float | None:
    found: float | None = result["comparisons"][0]["engine"]["median"].get("seconds")
    return found


def _first_ratio(result: Result) -> float | None:
    for comparison in result["comparisons"]:
        if comparison.get("what", "").startswith("first"):
            found: float | None = comparison["ratio"]
            return found
    return None


def _median(name: str, scale: float = 1.0) -> Reader:
    def read(result: Result) -> float | None:
        found = result["comparisons"][0]["engine"].get("median", {}).get(name)
        return None if found is None else found / scale

    return read


def _worst(name: str, scale: float = 1.0) -> Reader:
    """Read the largest figure of any sample: a bound holds for all."""

    def read(result: Result) -> float | None:
        samples = result["comparisons"][0]["engine"]["samples"]
        found = [one.get(name, one.get("figures", {}).get(name)) for one in samples]
        return None if not found or None in found else max(found) / scale

    return read


def _overhead(result: Result) -> float | None:
    """Read the overhead of penstock over that of the bare back end."""
    ours, bare = _overheads(result)
    if ours is None or bare is None:
        return None
    if bare <= 0:  # nothing can be gained on no overhead at all
        return 0.0 if ours <= bare else float("inf")
    return max(ours, 0.0) / bare


def _overheads(result: Result) -> tuple[float | None, float | None]:
    comparison = result["comparisons"][0]
    ours, bare = (comparison[side].get("median", {}).get("overhead_percent") for side in ("engine", "bare"))
    return ours, bare


def _overhead_words(result: Result) -> str:
    ours, bare = _overheads(result)
    return f"{ours:.1f} % against {bare:.1f} %"


def _time_words(result: Result) -> str:
    comparison = result["comparisons"][0]
    by = comparison.get("by", "seconds")
    ours, bare = (comparison[side]["median"].get(by) for side in ("engine", "bare"))
    unit = (1e3, "ms") if by.startswith("latency") else (1.0, "s")
    return f"{ours * unit[0]:.3g} {unit[1]} against {bare * unit[0]:.3g} {unit[1]}"


def _spilled_words(result: Result) -> str:
    comparison = result["comparisons"][0]
    ours, bare = (comparison[side].get("median", {}) for side in ("engine", "bare"))
    told = f"bare {bare.get('host_growth', float('nan')) / 1e9:.2f} GB in all"
    if "spilled_growth" in ours:
        told += f"; on disk at the peak {ours['spilled_growth'] / 1e9:.2f} GB, bare {bare.get('spilled_growth', 0.0) / 1e9:.2f}"
    return told


def _prefect(result: Result) -> float | None:
    theirs = result["rivals"].get("prefect")
    if theirs is None:
        return None
    ours = result["comparisons"][0]
    by = ours.get("by", "seconds")
    mine, other = ours["engine"]["median"].get(by), theirs["engine"].get("median", {}).get(by)
    return None if mine is None or other is None else other / mine


# -- the table ---------------------------------------------------------------------------------------


def _maps() -> list[Floor]:
    found = []
    for backend, one, words in (
        ("dask", 0.8, "Client.map + gather, 2 workers"),
        ("ray", 0.7, "cached ray.remote + get, 2 CPUs"),
    ):
        for chunk, floor, aim in (("1", one, 1.0), ("auto", 8.0, 20.0)):
            case = f"map_noop 10,000, {backend}, chunk_size={chunk}, against {words}"
            sizes = {"count": 10_000, "chunk_size": chunk}
            found.append(Floor(case, "map_noop", backend, sizes, _ratio, floor, aim, note=_time_words))
    for backend in ("dask", "ray"):
        case = f"map_noop 100,000, {backend}, auto, record committed"
        sizes = {"count": 100_000, "chunk_size": "auto"}
        rate = _median("tasks_per_second")
        found.append(Floor(case, "map_noop", backend, sizes, rate, 10_000, 25_000, "{:,.0f} tasks/s"))
    for backend in ("dask", "ray"):
        case = f"driver memory per mapped task, {backend}, 100,000 futures held"
        held = _median("bytes_per_task")
        sizes = {"count": 100_000}
        found.append(Floor(case, "map_memory", backend, sizes, held, 1_500, 500, "{:,.0f} B", less=True))
    return found


def _small() -> list[Floor]:
    found = []
    for backend, floor, aim in (("dask", 3.0, 10.0), ("ray", None, None)):
        case = f"pipeline of 10 maps over 1,000 elements, against the same in bare {backend}"
        sizes = {"count": 1_000, "stages": 10}
        found.append(Floor(case, "pipeline", backend, sizes, _ratio, floor, aim, note=_time_words))
    for backend in ("dask", "ray"):
        case = f"submit().result() one at a time, {backend}, median against bare"
        found.append(Floor(case, "latency", backend, {"count": 200}, _ratio, 1 / 1.3, 1.0, note=_time_words))
    return found


def _large() -> list[Floor]:
    found = []
    for backend in ("dask", "ray"):
        sizes: dict[str, Any] = {"megabytes": 1_000}
        where = f"chain_large 1 GB, {backend}"
        found += [
            Floor(f"{where}, later runs", "chain_large", backend, sizes, _ratio, 1 / 1.05, 1.0, note=_time_words),
            Floor(f"{where}, first run on a new cluster", "chain_large", backend, sizes, _first_ratio, 1 / 1.05, 1.0),
            Floor(
                f"{where}, growth of the driver",
                "chain_large",
                backend,
                sizes,
                _worst("rss_growth", 1e6),
                30.0,
                1.0,
                "{:.3g} MB",
                less=True,
                strict=True,
            ),
        ]  # fmt: skip
    for backend, floor, aim in (("dask", 1 / 1.05, 2.5), ("ray", None, None)):
        case = f"fan_out_large 1 GB, {backend}, 4 readers in other processes, against bare"
        sizes = {"megabytes": 1_000}
        found.append(Floor(case, "fan_out_large", backend, sizes, _ratio, floor, aim, note=_time_words))
    held = "fan_out_large 1 GB, dask, copies on the host while held"
    found.append(_copies(held, "fan_out_large", 1_000, "copies_held"))
    for backend, aim in (("dask", 2.0), ("ray", None)):
        case = f"map_large 500 MB x 32 tasks, {backend}, against scatter(broadcast) or ray.put"
        sizes = {"megabytes": 500}
        found.append(Floor(case, "map_large", backend, sizes, _ratio, 1 / 1.1, aim, note=_time_words))
    peak = "map_large 500 MB, dask, copies on the host beside the driver's own"
    found.append(_copies(peak, "map_large", 500, "copies_peak"))
    return found


def _copies(case: str, name: str, megabytes: int, figure: str) -> Floor:
    """Judge copies on Dask; Ray has one object store for each host, whose pages stay once they were used."""

    def words(result: Result) -> str:
        comparison = result["comparisons"][0]
        ours, bare = (comparison[side].get("median", {}) for side in ("engine", "bare"))
        told = "" if figure == "copies_peak" else f"{ours.get('copies_peak', 0.0):.2f} at the peak; "
        return f"{told}bare {bare.get(figure, float('nan')):.2f}"

    sizes = {"megabytes": megabytes}
    return Floor(case, name, "dask", sizes, _median(figure), None, 1.1, "{:.2f}", less=True, note=words)


def _bounded() -> list[Floor]:
    sizes = {"count": 1_000, "megabytes": 50}
    found = []
    for backend in ("dask", "ray"):
        for what, figure in (
            ("driver", "driver_growth"),
            ("driver, workers and shared memory", "host_growth"),
        ):
            case = f"1,000 results of 50 MB, consumed and dropped, {backend}: {what} over base"
            peak = _worst(figure, 1e9)
            found.append(
                Floor(case, "results_dropped", backend, sizes, peak, 1.5, None, "{:.3g} GB", less=True, strict=True, note=_spilled_words)
            )  # fmt: skip
    return found


def _radps() -> list[Floor]:
    found = []
    for count in (1_000, 4_000):
        for size in (0.1, 10):
            case = f"RADPS, sleeps of 0.1 s, 2 workers x 8 threads, {count:,} tasks of {size:g} MB: overhead"
            sizes = {"count": count, "megabytes": size, "mean": 0.1}
            unit = "{:.2f} of bare Dask's"
            found.append(
                Floor(
                    case, "radps", "dask", sizes, _overhead, 1.0, 0.5, unit, less=True, note=_overhead_words
                )
            )
    return found


def _peers() -> list[Floor]:
    found = []
    for case in ("map_noop", "pipeline", "latency"):
        for backend in ("dask", "ray"):
            for tasks in (100, 1_000):
                sizes = {"count": tasks // 10 if case == "pipeline" else tasks}
                words = f"penstock against prefect-{backend}, {case}, {tasks:,} tasks"
                found.append(Floor(words, case, backend, sizes, _prefect, None, 50.0))
    return found


def _hello() -> list[Floor]:
    case = "import_and_hello, threads, the run visible to the next command"
    return [Floor(case, "import_and_hello", "threads", {}, _seconds, 1.0, None, "{:.2f} s", less=True)]


def _record() -> list[Floor]:
    found = []
    for database, floor in (("sqlite", 30_000), ("postgresql", 20_000)):
        case = f"events straight into {database}, every commit durable"
        rate = _median("events_per_second")
        found.append(
            Floor(case, "ingest", database, {"count": 150_000}, rate, floor, None, "{:,.0f} events/s")
        )
    return found


FLOORS = [*_maps(), *_small(), *_large(), *_bounded(), *_radps(), *_peers(), *_hello(), *_record()]
