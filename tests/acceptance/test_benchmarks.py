"""The benchmarks run, say what they measured, and count a run only when the record shows it.

Nothing here asserts a speed: the machine that runs the tests has other things to do.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.floors import FLOORS, verdict
from benchmarks.plan import CASES, PEERS, PUBLIC, TABLE, Wish, chosen
from benchmarks.profiling import busiest

ROOT = Path(__file__).parent.parent.parent
MISSING = importlib.util.find_spec("distributed") is None and not os.environ.get("CI")
NO_RAY = importlib.util.find_spec("ray") is None and not os.environ.get("CI")

FIELDS = {
    "case",
    "backend",
    "variant",
    "date",
    "command",
    "machine",
    "versions",
    "load_before",
    "load_after",
    "parameters",
    "definition",
    "comparisons",
    "profile",
    "ratio",
    "all_states_recorded",
    "rivals",
}


def benchmark(folder: Path, *arguments: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Run the harness; return the result files that it wrote, by case and variant, and what it printed."""
    command = [sys.executable, "-m", "benchmarks", *arguments, "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {}
    for path in folder.glob("*.json"):
        found: dict[str, Any] = json.loads(path.read_text())
        parts = (found["date"][:10], found["case"], found["variant"], found["backend"])
        assert path.name == "-".join(part for part in parts if part) + ".json"
        assert set(found) == FIELDS
        results["-".join(part for part in (found["case"], found["variant"]) if part)] = found
    return results, done.stdout


def test_hello_world_is_timed_and_seen_by_the_next_command(tmp_path: Path) -> None:
    results, printed = benchmark(tmp_path, "import_and_hello", "--repeats", "1")
    found = results["import_and_hello"]
    assert found["command"] == "python -m benchmarks import_and_hello --repeats 1"
    assert {"system", "processor", "cores", "memory_gb", "python"} <= set(found["machine"])
    assert found["versions"]["penstock"]
    (comparison,) = found["comparisons"]
    assert found["ratio"] == comparison["ratio"] > 0
    assert comparison["visible_to_next_command"]
    for side in ("engine", "bare", "nothing"):
        assert len(comparison[side]["samples"]) == 1
        assert comparison[side]["median"]["seconds"] > 0
    assert "ratio" in printed


@pytest.mark.dask
@pytest.mark.skipif(MISSING, reason="dask is not installed")
def test_a_map_of_no_ops_is_done_when_the_record_shows_every_state(tmp_path: Path) -> None:
    arguments = ("map_noop", "--backend", "dask", "--n", "50", "--chunk-size", "1", "--repeats", "1")
    results, printed = benchmark(tmp_path, *arguments)
    assert set(results) == {"map_noop-50-chunk1", "map_noop-50-chunk1-inf"}, (
        "the default worker-saturation, then inf"
    )
    found = results["map_noop-50-chunk1"]
    assert found["parameters"] == {"count": 50, "repeats": 1, "chunk_size": "1"}
    assert found["all_states_recorded"] is True
    for result in results.values():
        (comparison,) = result["comparisons"]
        assert comparison["tasks"] == 50
        (ours,), (bare,) = comparison["engine"]["samples"], comparison["bare"]["samples"]
        assert comparison["ratios"] == [bare["seconds"] / ours["seconds"]]
        assert ours["completed"] == 50
        assert bare["completed"] is None
        assert ours["seconds"] == ours["marks"]["recorded"] >= ours["marks"]["values"]
        assert bare["seconds"] == bare["marks"]["values"]
        assert ours["cpu_seconds"] > 0
        assert ours["rss_growth"] >= 0
    assert printed.count("recorded: yes") == 2


SMALL = ("--n", "20", "--megabytes", "2", "--sleep", "0.01", "--repeats", "1")
ON_A_CLUSTER = ("pipeline", "latency", "chain_large", "fan_out_large", "map_large", "results_dropped")


def judge_small(results: dict[str, dict[str, Any]], *, apart: bool) -> None:
    """Check what each case measures besides the time."""
    by_case = {found["case"]: found["comparisons"] for found in results.values()}
    for found in results.values():
        for comparison in found["comparisons"]:
            assert comparison["all_states_recorded"], found["case"]
            assert len(comparison["engine"]["samples"]) == 1
            assert comparison["engine"]["samples"][0]["completed"] >= comparison["tasks"]

    def median(case: str, which: int = 0) -> dict[str, float]:
        measured: dict[str, float] = by_case[case][which]["engine"]["median"]
        return measured

    assert by_case["pipeline"][0]["tasks"] == 200
    assert 0 < median("latency")["latency_median"] <= median("latency")["latency_p90"]
    assert [one["what"] for one in by_case["chain_large"]] == ["later runs", "first run on a new cluster"]
    if apart:
        assert median("fan_out_large")["processes"] == 4
        assert median("results_dropped")["workers_growth"] > 0
    assert median("fan_out_large")["host_growth"] >= median("fan_out_large")["host_at_values"] > 0
    assert median("map_large")["copies_peak"] >= 0
    assert median("results_dropped")["host_growth"] >= 0  # one process may use again what it has freed


@pytest.mark.dask
@pytest.mark.skipif(MISSING, reason="dask is not installed")
def test_every_case_runs_on_dask(tmp_path: Path) -> None:
    results, _ = benchmark(tmp_path, *ON_A_CLUSTER, "radps", "map_memory", "--backend", "dask", *SMALL)
    judge_small(results, apart=True)
    radps = next(found for found in results.values() if found["case"] == "radps")
    for side in ("engine", "bare"):
        (sample,) = radps["comparisons"][0][side]["samples"]
        ideal, overhead = sample["figures"]["ideal_seconds"], sample["figures"]["overhead_percent"]
        assert overhead == pytest.approx(100 * (sample["seconds"] - ideal) / ideal)
    held = results["map_memory-20"]["comparisons"][0]["engine"]["median"]
    assert held["peak_bytes_per_task"] >= 0
    assert "bytes_per_task" in held


def test_every_case_runs_with_threads(tmp_path: Path) -> None:
    results, _ = benchmark(tmp_path, *ON_A_CLUSTER, "--backend", "threads", *SMALL)
    judge_small(results, apart=False)


@pytest.mark.ray
@pytest.mark.skipif(NO_RAY, reason="ray is not installed")
def test_a_result_that_nobody_keeps_is_followed_on_ray(tmp_path: Path) -> None:
    results, _ = benchmark(tmp_path, "results_dropped", "--backend", "ray", *SMALL)
    (comparison,) = results["results_dropped-20-2MB"]["comparisons"]
    assert comparison["all_states_recorded"]
    for side in ("engine", "bare"):
        (sample,) = comparison[side]["samples"]
        assert sample["figures"]["spilled_growth"] == 0


# ------------------------------------------------------------------------------------------------ the plan


def test_every_floor_is_measured_by_a_row_of_the_plan() -> None:
    rows = [*TABLE, *PEERS]
    for floor in FLOORS:
        fitting = [
            row
            for row in rows
            if (row.case, row.backend) == (floor.name, floor.backend)
            and all(row.parameters.get(name) == value for name, value in floor.parameters.items())
        ]
        assert fitting, floor.case


def test_a_wish_changes_sizes_and_takes_each_row_once() -> None:
    rows = chosen(TABLE, Wish(cases=["map_noop"], backend="ray", count=200))
    assert [row.variant for row in rows] == ["200-chunk1", "200-auto"]
    (row,) = chosen(TABLE, Wish(cases=["radps"], backend="threads", count=8, megabytes=1, sleep=0.01))
    assert row.sizes == {"count": 8, "megabytes": 1, "mean": 0.01, "deviation": pytest.approx(0.001)}
    assert {row.case for row in chosen(TABLE, Wish())} == set(CASES)
    assert all(row.sizes["mean"] in {1.0, 6.0} for row in PUBLIC)


def test_medians_are_of_five_runs_or_of_three_that_take_long() -> None:
    for row in TABLE:
        fewer = {"results_dropped": 1, "map_memory": 3, "radps": 3}.get(row.case, 5)
        assert row.repeats >= fewer or row.saturation, row.label


# ---------------------------------------------------------------------------------------------- the verdicts


def side(median: dict[str, float], name: str = "x") -> dict[str, Any]:
    return {"name": name, "median": median, "samples": [{"rss_growth": 0, "figures": median, **median}]}


def result(
    case: str,
    backend: str,
    parameters: dict[str, Any],
    ratio: float | None = None,
    ours: dict[str, float] | None = None,
    bare: dict[str, float] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Make up a result file."""
    comparison = {
        "configuration": "made up",
        "what": "",
        "by": "seconds",
        "tasks": 1,
        "ratio": ratio,
        "ratios": [] if ratio is None else [ratio],
        "all_states_recorded": True,
        "engine": side({"seconds": 1.0, **(ours or {})}, "penstock"),
        "bare": side({"seconds": 1.0, **(bare or {})}, "bare"),
    }
    return {
        "case": case,
        "backend": backend,
        "variant": "-".join(str(value) for value in parameters.values()),
        "date": "2026-11-25T10:00:00+00:00",
        "command": f"python -m benchmarks {case}",
        "machine": {"processor": "a", "cores": 2, "memory_gb": 1.0, "system": "b", "python": "c"},
        "versions": {"penstock": "0"},
        "parameters": parameters,
        "comparisons": [comparison],
        "profile": None,
        "rivals": {},
        **changes,
    }


def word(results: list[dict[str, Any]], case: str, backend: str, words: str = "") -> str:
    """Return the verdict on the one floor that fits."""
    (floor,) = (one for one in FLOORS if one.name == case and one.backend == backend and words in one.case)
    return verdict(floor, results).word


NOOP = {"count": 10_000, "chunk_size": "auto"}


@pytest.mark.parametrize(
    "ratio, expected", [(25.0, "aim met"), (20.0, "aim met"), (8.0, "floor met"), (7.9, "missed")]
)
def test_a_ratio_is_judged_by_floor_and_aim(ratio: float, expected: str) -> None:
    assert (
        word([result("map_noop", "dask", NOOP, ratio)], "map_noop", "dask", "10,000, dask, chunk_size=auto")
        == expected
    )


def test_only_a_result_of_the_right_size_with_a_whole_record_counts() -> None:
    floor = "10,000, dask, chunk_size=auto"
    small = result("map_noop", "dask", {**NOOP, "count": 200}, 100.0)
    other = result("map_noop", "dask", {**NOOP, "chunk_size": "1"}, 100.0)
    saturated = result("map_noop", "dask", {**NOOP, "saturation": "inf"}, 100.0)
    partial = result("map_noop", "dask", NOOP, 100.0)
    partial["comparisons"][0]["all_states_recorded"] = False
    assert word([small, other, saturated, partial], "map_noop", "dask", floor) == "not measured"


def test_the_newest_result_counts() -> None:
    old = result("latency", "dask", {"count": 200}, 2.0)
    new = result("latency", "dask", {"count": 200}, 0.5, date="2026-11-26T10:00:00+00:00")
    assert word([new, old], "latency", "dask", "one at a time") == "missed"


@pytest.mark.parametrize("held, expected", [(400.0, "aim met"), (1_500.0, "floor met"), (1_501.0, "missed")])
def test_less_memory_is_better(held: float, expected: str) -> None:
    made = result("map_memory", "dask", {"count": 100_000}, ours={"bytes_per_task": held})
    assert word([made], "map_memory", "dask") == expected


def test_a_bound_holds_for_every_sample() -> None:
    sizes = {"count": 1_000, "megabytes": 50}
    made = result("results_dropped", "dask", sizes, ours={"driver_growth": 0.0, "host_growth": 1e9})
    assert word([made], "results_dropped", "dask", "shared memory over base") == "floor met"
    made["comparisons"][0]["engine"]["samples"].append({"figures": {"host_growth": 1.5e9}})
    assert word([made], "results_dropped", "dask", "shared memory over base") == "missed"


@pytest.mark.parametrize("ours, expected", [(9.0, "aim met"), (20.0, "floor met"), (21.0, "missed")])
def test_overhead_is_judged_by_that_of_bare_dask(ours: float, expected: str) -> None:
    made = result(
        "radps",
        "dask",
        {"count": 1_000, "megabytes": 10, "mean": 0.1},
        ours={"overhead_percent": ours},
        bare={"overhead_percent": 20.0},
    )
    assert word([made], "radps", "dask", "1,000 tasks of 10 MB") == expected


def test_the_report_names_what_is_missed_with_its_profile(tmp_path: Path) -> None:
    missed = result("map_noop", "dask", NOOP, 3.0, bare={"tasks_per_second": 400.0})
    missed["profile"] = {"driver": {"file": "a.json", "own": [["slow (engine/x.py)", 0.5]], "inclusive": []}}
    peer = result("map_noop", "ray", {"count": 100, "chunk_size": "auto"}, 1.0)
    peer["rivals"]["prefect"] = {
        "engine": side({"seconds": 60.0}, "prefect"),
        "ratio": 0.01,
        "ratios": [0.01],
        "unfinished": "",
    }
    for name, made in (("a", missed), ("b", peer)):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    text = report.publish(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert "Missed floors:\n\n* map_noop 10,000, dask, chunk_size=auto" in text
    assert "slow (engine/x.py) 50 %" in text
    assert "250 s (extrapolated)" in text
    assert "| map_noop n = 100, chunk_size auto | ray | 60 | 1 | 60x |" in text
    assert word([peer], "map_noop", "ray", "prefect-ray, map_noop, 100 tasks") == "aim met"
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(tmp_path.glob("*.png"))) > 0
    assert 'src="http' not in page


def test_a_profile_is_summed_over_threads() -> None:
    frames = [
        {"name": "run", "file": "/somewhere/site-packages/lib/a.py"},
        {"name": "read", "file": "/x/y/z/b.py"},
        {"name": "Condition.wait", "file": "/x/threading.py"},
    ]
    profiles = [
        {"samples": [[0, 1], [0]], "weights": [3.0, 1.0]},
        {"samples": [[1], [0, 2]], "weights": [4.0, 2.0]},
    ]
    found = busiest({"shared": {"frames": frames}, "profiles": profiles})
    assert (found["seconds"], found["waiting"]) == (10.0, 2.0)
    assert found["own"] == [["read (y/z/b.py)", 0.875], ["run (lib/a.py)", 0.125]]
    assert ["run (lib/a.py)", 0.5] in found["inclusive"]
