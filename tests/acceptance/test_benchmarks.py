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

ROOT = Path(__file__).parent.parent.parent
MISSING = importlib.util.find_spec("distributed") is None and not os.environ.get("CI")

FIELDS = {
    "case",
    "backend",
    "date",
    "command",
    "machine",
    "versions",
    "load_before",
    "load_after",
    "parameters",
    "definition",
    "comparisons",
    "ratio",
    "all_states_recorded",
    "ratio_to_saturated_bare",
    "rivals",
}


def benchmark(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run the harness; return the one result file that it wrote, and what it printed."""
    command = [sys.executable, "-m", "benchmarks", *arguments, "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert path.name == f"{found['date'][:10]}-{found['case']}-{found['backend']}.json"
    return found, done.stdout


def test_hello_world_is_timed_and_seen_by_the_next_command(tmp_path: Path) -> None:
    found, printed = benchmark(tmp_path, "import_and_hello", "--repeats", "1")
    assert set(found) == FIELDS
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
    found, printed = benchmark(tmp_path, "map_noop", "--backend", "dask", "--n", "50", "--repeats", "1")
    assert set(found) == FIELDS
    assert found["parameters"] == {"count": 50, "repeats": 1}
    assert found["all_states_recorded"] is True
    assert found["ratio_to_saturated_bare"] > 0
    assert len(found["comparisons"]) == 2, "the default worker-saturation, then inf"
    for comparison in found["comparisons"]:
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
