"""What arrays in arguments become, without a runner."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from penstock.engine.objects import is_frozen
from penstock.runners.worker import guard
from penstock.runners.worker.guard import INPUT_DEPTH, INPUT_ITEMS, Guard


def guarded(value: Any, mode: str = "readonly", *, private: bool = False) -> Any:
    return Guard(mode).arguments((value,), {}, private=private)[0][0]


def test_what_holds_no_array_is_the_same_object() -> None:
    for value in ([1, "x"], {"a": (1, 2)}, (1, [2, {3}]), "text", 3, None, object()):
        assert guarded(value) is value
        assert guarded(value, "copy") is value


def test_containers_with_arrays_are_copied() -> None:
    box: dict[str, Any] = {"a": [np.ones(3)], "b": 1}
    found = guarded(box)
    assert found is not box
    assert found["a"] is not box["a"]
    assert not found["a"][0].flags.writeable
    assert np.shares_memory(found["a"][0], box["a"][0])
    assert box["a"][0].flags.writeable


def test_the_search_has_an_end() -> None:
    deep: Any = np.ones(3)
    for _ in range(INPUT_DEPTH + 1):
        deep = [deep]
    assert guarded(deep) is deep
    assert guarded(deep[0]) is not deep[0]
    long: list[Any] = [(i,) for i in range(INPUT_ITEMS + 1)]
    long[-1] = np.ones(3)
    assert guarded(long) is long
    wide: Any = np.ones(3)
    for _ in range(INPUT_DEPTH):
        wide = [wide] * 50  # 50 ** 5 paths, five lists
    assert not guarded(wide)[7][7][7][7][7].flags.writeable


def test_shared_touches_nothing() -> None:
    array = np.ones(3)
    assert guarded(array, "shared") is array
    assert Guard("shared").values([array])[0] is array


def test_what_was_unpickled_for_the_call_needs_no_copy() -> None:
    array, frozen = np.ones(3), np.ones(3)
    frozen.setflags(write=False)
    assert guarded(array, "copy", private=True) is array
    assert guarded(array, "copy") is not array
    assert guarded(frozen, "copy", private=True).flags.writeable


def test_values_are_not_copied_twice() -> None:
    guard = Guard("copy")
    (value,) = guard.values([np.ones(3)])
    args, kwargs = guard.arguments((value,), {"x": [value]}, private=False)
    assert args[0] is value
    assert kwargs["x"][0] is value


def test_frames_without_copy_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older releases of pandas write through a shallow copy."""
    monkeypatch.setattr(guard, "_copies_on_write", lambda: False)
    frame = pd.DataFrame({"a": [1.0, 2.0]})
    found = guarded(frame)
    assert not np.shares_memory(found["a"].to_numpy(), frame["a"].to_numpy())
    assert guarded(frame, private=True) is frame


def test_a_class_that_refuses() -> None:
    class Odd(np.ndarray[Any, Any]):
        def view(self, *_: Any) -> Any:  # type: ignore[override]
            raise RuntimeError

    odd = np.ndarray.__new__(Odd, (3,))
    assert guarded(odd) is odd


def test_what_is_frozen() -> None:
    array = np.ones(8)
    view = array.view()
    view.setflags(write=False)
    assert not is_frozen(array)
    assert not is_frozen(view)
    array.setflags(write=False)
    assert is_frozen(array)
    assert is_frozen(array[2:])
    assert is_frozen(np.frombuffer(b"12345678"))
    assert not is_frozen(np.frombuffer(bytearray(b"12345678")))
    assert not is_frozen(b"12345678")
    assert not is_frozen(3)
