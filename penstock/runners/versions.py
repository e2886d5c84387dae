"""Do the versions of driver, scheduler and workers fit? Pure: figures in, one table out.

Dask itself only warns. A function sent by value to another minor release of Python crashes the
worker, and arrays pickled by numpy 2 do not load with numpy 1: both are found here before any
code leaves the driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

OLDEST_DASK = (2025, 5)
"""The oldest distributed that was tried as a cluster to attach to."""

_DIGITS = {"python": 2, "cloudpickle": 1, "numpy": 1, "pandas": 1}
"""Libraries whose leading numbers must agree, and how many of these."""

Versions = Mapping[str, str | None]


@dataclass(frozen=True)
class Row:
    """One library that does not fit.

    Attributes
    ----------
    library : str
        Its name.
    driver, scheduler : str
        Their versions, "–" if not installed.
    workers : str
        Their versions, each with the number of workers that have it.
    need : str
        The rule that is broken.
    """

    library: str
    driver: str
    scheduler: str
    workers: str
    need: str


def compare(driver: Versions, scheduler: Versions, workers: Sequence[Versions]) -> list[Row]:
    """Compare what is installed where.

    Parameters
    ----------
    driver, scheduler : mapping of str to str
        Version by library, None where it is not installed.
    workers : sequence of mapping
        The same for each worker.

    Returns
    -------
    list of Row
        The libraries that do not fit, Python first; empty if all is well.
    """
    rows = []
    everywhere = [scheduler, *workers]
    for library, digits in _DIGITS.items():
        own = driver.get(library)
        others = [found for one in everywhere if (found := one.get(library))]
        if own and any(_head(other, digits) != _head(own, digits) for other in others):
            words = "same major.minor" if digits == 2 else "same major"
            rows.append(_row(library, driver, scheduler, workers, words))
    if any(_head(one.get("distributed") or "9999", 2) < OLDEST_DASK for one in everywhere):
        rows.append(_row("distributed", driver, scheduler, workers, "≥ " + ".".join(map(str, OLDEST_DASK))))
    return rows


def is_fatal(rows: Iterable[Row]) -> bool:
    """Whether code sent by value would crash: another minor release of Python."""
    return any(row.library == "python" for row in rows)


def table(rows: Sequence[Row]) -> str:
    """Lay out the libraries that do not fit."""
    lines = [("library", "driver", "scheduler", "workers", "needed")]
    lines += [(row.library, row.driver, row.scheduler, row.workers, row.need) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    shown = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in shown)


def _row(library: str, driver: Versions, scheduler: Versions, workers: Sequence[Versions], need: str) -> Row:
    counts: dict[str, int] = {}
    for worker in workers:
        version = _short(worker.get(library))
        counts[version] = counts.get(version, 0) + 1
    listed = ", ".join(f"{version} ({count})" for version, count in sorted(counts.items()))
    return Row(library, _short(driver.get(library)), _short(scheduler.get(library)), listed or "none", need)


def _short(version: str | None) -> str:
    return (version or "–").removesuffix(".final.0")


def _head(version: str, digits: int) -> tuple[int, ...]:
    numbers = []
    for part in version.split(".")[:digits]:
        leading = "".join(letter for letter in part if letter.isdigit())
        numbers.append(int(leading or 0))
    return tuple(numbers)
