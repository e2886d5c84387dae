"""Versions of driver, scheduler and workers: what fits, and how the rest is told."""

from penstock.runners import versions

DRIVER = {
    "python": "3.11.7.final.0",
    "distributed": "2026.8.0",
    "cloudpickle": "3.1.2",
    "numpy": "2.4.0",
    "pandas": "3.1.0",
}


def test_equal_versions_fit() -> None:
    assert versions.compare(DRIVER, DRIVER, [DRIVER, DRIVER]) == []


def test_patch_releases_may_differ() -> None:
    other = {**DRIVER, "python": "3.11.2.final.0", "numpy": "2.1.5", "cloudpickle": "3.0.0"}
    assert versions.compare(DRIVER, other, [other]) == []


def test_another_minor_python_is_fatal() -> None:
    rows = versions.compare(DRIVER, {**DRIVER, "python": "3.12.1.final.0"}, [DRIVER])
    assert [row.library for row in rows] == ["python"]
    assert versions.is_fatal(rows)


def test_one_odd_worker_is_enough() -> None:
    rows = versions.compare(DRIVER, DRIVER, [DRIVER, {**DRIVER, "numpy": "1.26.4"}, DRIVER])
    assert [row.library for row in rows] == ["numpy"]
    assert rows[0].workers == "1.26.4 (1), 2.4.0 (2)"
    assert not versions.is_fatal(rows)


def test_what_is_not_installed_does_not_clash() -> None:
    bare = {"python": "3.11.7.final.0", "distributed": "2026.8.0", "cloudpickle": "3.1.2", "numpy": None}
    assert versions.compare(DRIVER, bare, [bare]) == []
    assert versions.compare({**DRIVER, "numpy": None}, DRIVER, []) == []


def test_a_cluster_too_old_to_be_tried_is_named() -> None:
    rows = versions.compare(DRIVER, {**DRIVER, "distributed": "2024.12.1"}, [DRIVER])
    assert [(row.library, row.need) for row in rows] == [("distributed", "≥ 2025.5")]


def test_odd_version_numbers_are_read() -> None:
    assert versions.compare(DRIVER, {**DRIVER, "distributed": "2026.9.0a1+3.g12"}, [{}]) == []


def test_the_table_lines_up() -> None:
    worker = {**DRIVER, "python": "3.12.1.final.0", "pandas": "2.2.0"}
    shown = versions.table(versions.compare(DRIVER, DRIVER, [worker, worker])).splitlines()
    assert shown[0].split() == ["library", "driver", "scheduler", "workers", "needed"]
    assert shown[1].split()[:5] == ["python", "3.11.7", "3.11.7", "3.12.1", "(2)"]
    assert shown[2].startswith("pandas ")
    assert {line.index("same") for line in shown[1:]} == {shown[0].index("needed")}
