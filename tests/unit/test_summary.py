"""Short descriptions of values, made without touching the data."""

from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

from penstock.engine.summary import TEXT, describe, describe_all, human_bytes


class Secretive:
    def __repr__(self) -> str:
        raise RuntimeError("must not be asked")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (None, "None"),
        ("abc", "'abc'"),
        ([1, "a", None], "[1, 'a', None]"),
        ({"a": 1}, "{'a': 1}"),
        (list(range(100)), "list of 100 items"),
        ([object()], "list of 1 items"),
        ({i: i for i in range(9)}, "dict of 9 items"),
        (np.zeros((4, 5)), "ndarray(4, 5) float64 160 B"),
        (np.zeros((1024, 1024), np.float32), "ndarray(1024, 1024) float32 4.0 MiB"),
        (Secretive(), "Secretive"),
        (Secretive, "type"),
    ],
)
def test_descriptions(value: Any, text: str) -> None:
    assert describe(value) == text


def test_a_frame() -> None:
    assert describe(pd.DataFrame({"a": range(1000), "b": 0.0})).startswith("DataFrame(1000, 2) 1")


@hypothesis.given(st.one_of(st.text(), st.binary(), st.integers(), st.lists(st.text())))
def test_descriptions_are_short(value: Any) -> None:
    assert len(describe(value)) <= TEXT


def test_all_of_them_stay_below_the_limit() -> None:
    described = describe_all({f"parameter_{i}": "x" * 1000 for i in range(200)})
    assert sum(len(name) + len(text) for name, text in described.items()) <= 4096 + TEXT
    assert described["…"].endswith(" more")
    assert len(described) - 1 + int(described["…"].split()[0]) == 200


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (2 << 40, "2.0 TiB"),
    ],
)
def test_bytes_for_people(number: int, text: str) -> None:
    assert human_bytes(number) == text
