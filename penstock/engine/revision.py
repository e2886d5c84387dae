"""Which code ran: the revision of the repository a function comes from, else a hash of its source.

Asked for when the first run of a process is written down, never at import; one call of git for
each repository and process.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALONE = "flows_in_"
"""Begins the name of a module that was imported from a file whose own name means another one."""

PATIENCE = 5.0
"""Seconds that git may take, once; then the hash of the source has to do."""


def version_of(function: Callable[..., Any]) -> str:
    """Return what tells the code of a function from that of yesterday.

    Returns
    -------
    str
        Twelve digits of the commit of its git repository, with ``-dirty`` if a file under version
        control was changed since; else ``source-`` and eight digits of `code_hash`.
    """
    code = _code_of(function)
    file = code.co_filename if code is not None else ""
    if os.path.isfile(file):
        found = _revision_at(os.path.dirname(os.path.abspath(file)))
        if found:
            return found
    return f"source-{code_hash(function)}"


@functools.cache
def _revision_at(folder: str) -> str:
    root = _root_of(folder)
    return "" if root is None else _revision(root)


def _root_of(folder: str) -> str | None:
    """Return the repository around a folder; installed packages are nobody's working copy."""
    path = Path(folder)
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return None
    return next((str(one) for one in (path, *path.parents) if (one / ".git").exists()), None)


@functools.cache
def _revision(root: str) -> str:
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, env=quiet, check=False
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or a repository that takes too long
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def code_hash(function: Callable[..., Any]) -> str:
    """Return eight hexadecimal digits of the source of a function; of its bytecode where there is no source."""
    inner = inspect.unwrap(getattr(function, "func", function))
    if _code_of(inner) is None and not inspect.isbuiltin(inner):
        inner = type(inner)
    try:
        content = inspect.getsource(inner).encode()
    except (OSError, TypeError):  # typed in, made by exec, written in C
        code = _code_of(function)
        named = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', '')}"
        content = named.encode() if code is None else _bytecode(code)
    return hashlib.sha256(content).hexdigest()[:8]


def task_key(function: Callable[..., Any]) -> str:
    """Return the name of a function's code: ``qualname-<8 digits of its hash>``."""
    named = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{named}-{code_hash(function)}"


def module_of(function: Callable[..., Any]) -> str:
    """Return the name of a function's module, the same if its file is imported or run as a script."""
    name = str(getattr(function, "__module__", None) or "")
    main, code = getattr(sys.modules.get("__main__"), "__file__", None), _code_of(function)
    if name == "__main__" and main and code and os.path.realpath(code.co_filename) == os.path.realpath(main):
        return ".".join(module_names(Path(os.path.realpath(main)))[1])
    return name.removeprefix(ALONE)


def module_names(path: Path) -> tuple[Path, list[str]]:
    """Return the directory from which a file is imported, and the parts of its module's name."""
    folder, names = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, names


def _code_of(function: Any) -> types.CodeType | None:
    inner = inspect.unwrap(getattr(function, "func", function))
    inner = getattr(inner, "__func__", inner)
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _bytecode(code: types.CodeType) -> bytes:
    parts = [code.co_code, repr(code.co_names).encode()]
    for constant in code.co_consts:
        inner = isinstance(constant, types.CodeType)
        parts.append(_bytecode(constant) if inner else repr(constant).encode())
    return b"\0".join(parts)
