"""How a flow was started, as its row keeps it."""

import time
from typing import Any

import pytest

from penstock import errors, flow
from penstock.engine.entry import LARGEST, arguments_of, describe_entry


@flow
def known(**things: Any) -> None: ...


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"a": 1, "b": [1.5, None, "x"]},
        {"a": (1, 2)},
        {"a": {1, 2}},
        {"a": {1: 2}},
        {"a": b"\x00"},
        {"a": 2j},
    ],
)
def test_arguments_come_back_as_they_were(arguments: dict[str, Any]) -> None:
    entry = describe_entry(known.fn, arguments)
    assert (entry["place"], entry["name"]) == (__file__, "known")
    assert arguments_of(entry) == arguments
    assert {name: type(value) for name, value in arguments_of(entry).items()} == {
        name: type(value) for name, value in arguments.items()
    }


def test_what_cannot_be_kept_is_said() -> None:
    big = [0.0] * (LARGEST // 8)
    started = time.perf_counter()
    for value in (big, bytes(1 << 28)):
        with pytest.raises(errors.ConfigurationError, match="larger than 64 KiB"):
            arguments_of(describe_entry(known.fn, {"a": value}))
    assert time.perf_counter() - started < 1.0
    with pytest.raises(errors.ConfigurationError, match="arguments cannot be kept"):
        arguments_of(describe_entry(known.fn, {"a": (one for one in range(3))}))
    with pytest.raises(errors.ConfigurationError, match="nothing is known"):
        arguments_of({})


def test_code_without_a_file_cannot_be_found_again() -> None:
    made: dict[str, Any] = {}
    exec("def typed(): ...", made)
    with pytest.raises(errors.ConfigurationError, match="in no file"):
        arguments_of(describe_entry(made["typed"], {}))
