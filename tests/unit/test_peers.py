"""The register of what failed elsewhere: each reference has a test that exists, or a reason why it has none."""

import ast
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
REGISTER: dict[str, Any] = tomllib.loads((ROOT / "tests" / "peers.toml").read_text())
TESTS = sorted({test for entry in REGISTER["tested"] for test in entry["tests"]})


@cache
def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_reference_is_tested_or_owed_and_only_once() -> None:
    entries = [*REGISTER["tested"], *REGISTER["owed"]]
    mapped = Counter(reference for entry in entries for reference in entry["references"])
    known = REGISTER["references"]
    assert [reference for reference, count in Counter(known).items() if count > 1] == []
    assert sorted(set(known) - set(mapped)) == []
    assert sorted(set(mapped) - set(known)) == []
    assert [reference for reference, count in mapped.items() if count > 1] == []


def test_every_entry_says_something() -> None:
    assert all(entry["tests"] and entry["references"] for entry in REGISTER["tested"])
    assert all(entry["reason"].strip() and entry["references"] for entry in REGISTER["owed"])


@pytest.mark.parametrize("test", TESTS)
def test_a_named_test_exists(test: str) -> None:
    name, _, function = test.partition("::")
    assert (ROOT / name).is_file()
    assert function in functions(ROOT / name)
