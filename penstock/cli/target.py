"""What `penstock run` is asked to run: a file or module, a flow in it, and text for its parameters."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from penstock.errors import ConfigurationError, hide_frames

if TYPE_CHECKING:
    from penstock.engine.flow import Flow

__all__ = ["Target", "arguments_for", "pairs"]


@dataclass(frozen=True)
class Target:
    """A flow that can be loaded.

    Attributes
    ----------
    place : str
        Path of a file, or dotted name of a module.
    name : str
        Of the flow in it.
    """

    place: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``"path.py:flow"`` or ``"package.module:flow"``.

        Raises
        ------
        ConfigurationError
            If it is neither, or there is no such file.
        """
        place, colon, name = text.rpartition(":")
        if not colon or not place or not name.isidentifier():
            raise ConfigurationError(
                f"{text!r} does not name a flow: write path.py:flow or package.module:flow."
            )
        is_path = place.endswith(".py") or os.sep in place
        if is_path and not Path(place).is_file():
            raise ConfigurationError(f"there is no file {place}.")
        return cls(place, name)

    def load(self) -> Flow[..., Any]:
        """Import the module and return the flow.

        Raises
        ------
        ConfigurationError
            If there is no such flow in it; the message lists those there are.
        BaseException
            Whatever the module raises, with the frames of the user's code only.
        """
        from penstock.engine.flow import Flow

        try:
            module = (
                _import_file(Path(self.place).resolve())
                if Path(self.place).is_file()
                else _import(self.place)
            )
        except BaseException as error:
            _trim(error)
            raise
        found = getattr(module, self.name, None)
        if isinstance(found, Flow):
            return found
        flows = sorted(name for name, value in vars(module).items() if isinstance(value, Flow))
        there = f"it has {', '.join(flows)}" if flows else "it has none"
        what = "no flow" if found is None else f"a {type(found).__name__} and no flow"
        raise ConfigurationError(f"{self.place} has {what} called {self.name!r}; {there}.")


def _import(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """Import a file under the name that its siblings would use, or run it as Python runs a script."""
    from penstock.engine.revision import module_names

    folder, names = module_names(path)
    sys.path.insert(0, str(folder))
    if len(names) > 1:
        return importlib.import_module(".".join(names))
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _module_name(path: Path) -> str:
    """Return the name by which files beside it import it, unless a library is called the same."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
        if spec is not None and spec.origin and Path(spec.origin).resolve() == path:
            return path.stem
    from penstock.engine.revision import ALONE

    return f"{ALONE}{path.stem}"


def _trim(error: BaseException) -> None:
    """Keep the frames of the user's code: not ours, nor those of the import machinery."""
    hide_frames(error)
    step: TracebackType | None = error.__traceback__
    while step is not None and step.tb_frame.f_code.co_filename.startswith(
        ("<frozen importlib", importlib.__file__)
    ):
        step = step.tb_next
    error.__traceback__ = step


# -- parameters -----------------------------------------------------------------------------


def pairs(given: Sequence[str]) -> dict[str, str]:
    """Split ``name=value``.

    Raises
    ------
    ConfigurationError
        If there is no name.
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigurationError(f"-p {text!r} must have the form name=value.")
        found[name.strip()] = value
    return found


def arguments_for(flow: Flow[..., Any], given: Mapping[str, str]) -> dict[str, Any]:
    """Turn text into arguments: JSON where it is JSON, else the text itself.

    A parameter that takes text or a path by its annotation gets the text as it is, so that
    ``-p run=007`` stays a name.
    """
    from penstock.engine.parameters import type_hints

    hints = type_hints(flow.fn)
    return {name: _value(text, hints.get(name)) for name, text in given.items()}


def _value(text: str, hint: Any) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    choices = typing.get_args(hint) or (hint,)
    takes_text = any(one is str or (isinstance(one, type) and issubclass(one, Path)) for one in choices)
    return text if takes_text and value is not None and not isinstance(value, str) else value
