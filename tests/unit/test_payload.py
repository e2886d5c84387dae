"""Functions and values as bytes: what arrives says where it was written."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import textwrap
import traceback
import types
from collections import ChainMap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from penstock.runners import packing, shared_memory
from penstock.runners.worker.pickling import dumps, reducers

TEXT = """
def plain(x):
    return 1 / x

nested = [lambda x: (lambda y: 1 / y)(x)]

def outer():
    limit = 0
    def inner(x):
        return 1 / (x + limit)
    return inner

def decorated(x):
    return [1 / y for y in (x,)]

class Divider:
    def method(self, x):
        return 1 / x

    @classmethod
    def of_class(cls, x):
        return 1 / x

    @staticmethod
    def static(x):
        return 1 / x

    @property
    def half(self):
        return 1 / 0

class Error(Exception):
    def __str__(self):
        return str(1 / 0)
"""

Dump = Callable[[Any], bytes]


@dataclasses.dataclass
class Users:
    """A module of the user's, which is gone when his functions arrive."""

    module: types.ModuleType
    file: str


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Users]:
    file = tmp_path / "users_own.py"
    file.write_text(textwrap.dedent(TEXT))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("users_own")
    cloudpickle.register_pickle_by_value(module)
    yield Users(module, str(file))
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules["users_own"]
    packing._users.pop("users_own", None)


def shared(value: Any) -> bytes:
    return shared_memory.dump(value)[0]


def places(body: Callable[[], Any]) -> list[tuple[str, int, str]]:
    """Return file, line and name of the frames below the body itself."""
    with pytest.raises(ZeroDivisionError) as caught:
        body()
    found = traceback.extract_tb(caught.value.__traceback__)
    mine = [number for number, frame in enumerate(found) if frame.filename == __file__]
    return [(frame.filename, frame.lineno or 0, frame.name) for frame in found[mine[-1] + 1 :]]


CALLS: dict[str, Callable[[Any], Any]] = {
    "function": lambda module: module.plain(0),
    "lambda in a lambda": lambda module: module.nested[0](0),
    "closure": lambda module: module.outer()(0),
    "comprehension": lambda module: module.decorated(0),
    "method": lambda module: module.Divider().method(0),
    "class method": lambda module: module.Divider.of_class(0),
    "static method": lambda module: module.Divider.static(0),
    "property": lambda module: module.Divider().half,
    "exception": lambda module: str(module.Error()),
}
NAMES = ("plain", "nested", "outer", "decorated", "Divider", "Error")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dump", [packing.dumps, dumps, shared])
def test_tracebacks_of_what_travelled_name_the_users_file(dump: Dump, name: str, users: Users) -> None:
    call = CALLS[name]
    at_home = places(lambda: call(users.module))
    assert at_home
    assert {file for file, _, _ in at_home} == {users.file}
    kept = {one: getattr(users.module, one) for one in NAMES}
    arrived = types.SimpleNamespace(**pickle.loads(dump(kept)))
    again = types.SimpleNamespace(**pickle.loads(dump(vars(arrived))))  # a task that submits tasks
    assert places(lambda: call(arrived)) == at_home
    assert places(lambda: call(again)) == at_home


def test_every_other_field_of_code_stays(users: Users) -> None:
    code = users.module.outer.__code__
    arrived = pickle.loads(packing.dumps(users.module.outer)).__code__
    fields = [name for name in dir(code) if name.startswith("co_") and not callable(getattr(code, name))]
    assert "co_linetable" in fields
    fields.remove("co_consts")  # the inner code is equal, and another object
    assert {name: getattr(arrived, name) for name in fields} == {name: getattr(code, name) for name in fields}
    assert list(arrived.co_lines()) == list(code.co_lines())
    assert list(arrived.co_positions()) == list(code.co_positions())
    assert arrived == code


def test_code_keeps_its_file_whatever_cloudpickle_puts_there(users: Users) -> None:
    """Older releases keep the name, newer ones may write another word, or reduce code in another way."""
    reduce = cloudpickle.Pickler.dispatch_table[types.CodeType]

    def table(word: str | None) -> Any:
        def reduced(code: types.CodeType) -> Any:
            made, arguments = reduce(code)
            place = next(number for number, one in enumerate(arguments) if isinstance(one, str))
            changed = (
                *arguments[:place],
                code.co_filename if word is None else word,
                *arguments[place + 1 :],
            )
            return made, changed

        return ChainMap({types.CodeType: reduced}, cloudpickle.Pickler.dispatch_table)

    code = users.module.plain.__code__
    for word in (None, "<another-word>"):
        kind = type("Kind", (cloudpickle.Pickler,), {"dispatch_table": table(word)})
        made, arguments = reducers(kind)[types.CodeType](code)
        assert made(*arguments).co_filename == users.file

    odd = {types.CodeType: lambda code: (bytes, (code.co_code, "a", "b"))}
    kind = type("Kind", (), {"dispatch_table": odd})
    assert reducers(kind) is odd, "what is not understood stays as it is"
    kind = type("Kind", (), {"dispatch_table": {}})
    assert reducers(kind) == {}
