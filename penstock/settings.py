"""Settings: what a user can set without touching code, and where each value came from.

A value is looked for in this order: the environment (``PENSTOCK_RUNNER``), the project
(``penstock.toml``, or ``[tool.penstock]`` in ``pyproject.toml``, in the working directory or the
nearest one above it that has such a file), the user (``penstock.toml`` in ``PENSTOCK_HOME``), the
default. In TOML a name is written in small letters and without the prefix: ``runner = "dask"``.

The model is a plain frozen dataclass: the first flow run of every script reads it, and loading a
validation library would take longer than most of these scripts.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from penstock import errors
from penstock.errors import ConfigurationError

__all__ = ["Settings", "load", "refresh", "settings"]

PREFIX = "PENSTOCK_"
HOME = "~/.penstock"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Settings:
    """The values in force.

    Attributes
    ----------
    home : Path
        Directory of everything that penstock keeps on this machine.
    runner : str
        Where tasks run if the code does not say it: "threads", "processes", "dask", "ray" or a URL.
    api_url : str
        Address of a penstock server; empty to record into the store in `home`.
    ui_url : str
        Where people look at its pages, if that is not the place of `api_url`: behind a proxy.
    api_token : str
        Proves to that server who we are; empty for the one that lies in `home`.
    database_url : str
        Database of the store; empty for ``penstock.db`` in `home`.
    tasks_max_nesting : int
        How deep tasks may submit tasks.
    logging_log_prints : bool
        Whether `print` in flows and tasks goes to the log of the run.
    task_default_retries, flow_default_retries : int
        Retries where the decorator does not say it.
    large_argument : int
        Arguments of at least so many bytes are placed near the workers once.
    results_persist_by_default : {"false", "true", "large"}
        Whether results are stored where neither task nor flow say it; "large": from
        `large_argument` bytes.
    tasks_default_persist_result : {"", "false", "true", "large"}
        Likewise for tasks that do not say it themselves, whatever their flow says; empty to follow the flow.
    default_result_storage : str
        Where: a directory or a URL of fsspec; empty for ``storage`` in `home`.
    results_default_serializer : str
        In which format, such as "parquet"; "auto" chooses by the value.
    tasks_refresh_cache : bool
        Whether tasks that do not say it themselves make cached results again.
    tasks_disable_caching : bool
        Whether no stored result is taken in the place of a run.
    tasks_default_no_cache : bool
        Whether only tasks with a ``cache_policy`` or ``cache_key_fn`` are cached.
    shared_memory : {"auto", "off"}
        Whether the processes of one host share large values on Dask instead of sending copies.
    progress : {"auto", "off"}
        Whether a flow shows what it does below the cell of the notebook that calls it.
    tracking : {"on", "off"}
        Whether runs are recorded.
    spool_sync : {"process", "power"}
        What a recorded event survives as soon as it is on disk: the end of the process, or a
        power failure.
    debug_mode : bool
        For those who look for an error in penstock itself: tracebacks keep its own lines, and its loggers
        write everything from DEBUG on.
    server_allow_local_runs : bool
        Whether `penstock server start` serves with ``--allow-local-runs``: the API then starts `penstock
        resume` on this machine when somebody asks for a run to go on.
    retention : str
        How long the record keeps a run after its end: "90d", "36h", or "never" to forget none.
    """

    home: Path
    runner: str = ""
    api_url: str = ""
    ui_url: str = ""
    api_token: str = field(default="", repr=False)
    database_url: str = ""
    tasks_max_nesting: int = 2000
    logging_log_prints: bool = False
    task_default_retries: int = 0
    flow_default_retries: int = 0
    large_argument: int = 1 << 20
    results_persist_by_default: Literal["false", "true", "large"] = "false"
    tasks_default_persist_result: Literal["", "false", "true", "large"] = ""
    default_result_storage: str = ""
    results_default_serializer: str = "auto"
    tasks_refresh_cache: bool = False
    tasks_disable_caching: bool = False
    tasks_default_no_cache: bool = False
    shared_memory: Literal["auto", "off"] = "auto"
    progress: Literal["auto", "off"] = "auto"
    tracking: Literal["on", "off"] = "on"
    spool_sync: Literal["process", "power"] = "process"
    debug_mode: bool = False
    server_allow_local_runs: bool = False
    retention: str = "90d"
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def source(self, name: str) -> str:
        """Return where a value came from: a variable, the path of a file, or "default"."""
        return self.sources.get(name, DEFAULT)

    @property
    def retention_days(self) -> float | None:
        """`retention` in days; None if no run is ever forgotten."""
        return None if self.retention == "never" else span_days(self.retention)

    def describe(self) -> list[tuple[str, str, str]]:
        """List every setting as (variable, value, source), passwords in URLs masked."""
        rows = []
        for name in NAMES:
            value = getattr(self, name)
            text = str(value).lower() if isinstance(value, bool) else str(value)
            text = "***" if name == "api_token" and text else masked(text)
            rows.append((variable(name), text, self.source(name)))
        return rows


NAMES = tuple(one.name for one in dataclasses.fields(Settings) if one.name != "sources")


def masked(text: str) -> str:
    """Return a text with the passwords in its URLs masked."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)  # greedy: a password may hold an @ by mistake
    return re.sub(r"(?i)([?&]\w*(?:password|passfile|token|secret)\w*)=[^&\s]*", r"\1=***", text)


_SPANS = {"s": 1 / 86400, "m": 1 / 1440, "h": 1 / 24, "d": 1.0, "w": 7.0}


def span_days(text: str) -> float:
    """Return a length of time such as "30d", "36h" or "2w" in days.

    Raises
    ------
    ValueError
        If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower(), flags=re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is no length of time such as 30d, 36h or 2w")
    return float(match[1]) * _SPANS[match[2]]


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


_current: Settings | None = None


def settings() -> Settings:
    """Return the settings in force; they are read once per process."""
    global _current
    if _current is None:
        _current = _in_force(load())
    return _current


def refresh() -> Settings:
    """Read the settings anew, after the environment or a file has changed."""
    global _current
    _current = _in_force(load())
    return _current


_log = logging.getLogger("penstock")
_lines = logging.StreamHandler()
_lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s - %(message)s"))


def _in_force(found: Settings) -> Settings:
    """Do what cannot wait until somebody asks for the value."""
    if found.debug_mode:
        errors.hides_frames = False
        _log.setLevel(logging.DEBUG)
        if not logging.getLogger().handlers and _lines not in _log.handlers:
            _log.addHandler(_lines)  # a program that has handlers of its own gets the lines there
    elif not errors.hides_frames:
        errors.hides_frames = True
        _log.setLevel(logging.NOTSET)
        _log.removeHandler(_lines)
    return found


def load(environment: Mapping[str, str] | None = None, directory: Path | None = None) -> Settings:
    """Read the settings from everywhere.

    Parameters
    ----------
    environment : mapping, optional
        Instead of `os.environ`.
    directory : Path, optional
        Instead of the working directory.

    Raises
    ------
    ConfigurationError
        If a value cannot be used; the sentence names the variable or the file.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(found: Mapping[str, Any], source: str, base: Path) -> None:
        for name, raw in found.items():
            if name in values:
                continue  # an earlier source wins
            label = variable(name) if source == "environment" else f"{name} in {source}"
            values[name] = _CHECKS[name](raw, label, base)
            sources[name] = variable(name) if source == "environment" else source

    here = _working_directory() if directory is None else directory
    given = {name: environment[variable(name)] for name in NAMES if environment.get(variable(name), "") != ""}
    take(given, "environment", here)
    for path, table in _project_tables(here):
        take(table, str(path), path.parent)
    values.setdefault("home", _path(HOME, variable("home"), here))
    user_file = values["home"] / "penstock.toml"
    table = _read(user_file, ())
    if "home" in table:
        raise ConfigurationError(f"home in {user_file} cannot be set there, since the file lies in it.")
    take(table, str(user_file), user_file.parent)
    return Settings(**values, sources=sources)


# -- files ----------------------------------------------------------------------------------


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was removed under our feet
        return Path("/")


def _project_tables(here: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    for directory in (here, *here.parents):
        own, shared = directory / "penstock.toml", directory / "pyproject.toml"
        if own.is_file() or shared.is_file():
            return [(own, _read(own, ())), (shared, _read(shared, ("tool", "penstock")))]
    return []


def _read(path: Path, keys: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}  # absent or not for us to read
    if keys and keys[-1] not in text:
        return {}
    import tomllib

    try:
        table: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}.") from None
    for key in keys:
        table = table.get(key, {}) if isinstance(table, dict) else {}
    if not isinstance(table, dict):
        raise ConfigurationError(f"{'.'.join(keys)} in {path} must be a table.")
    for name in table:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigurationError(f"{path} sets {name!r}, which penstock does not know{hint}")
    return table


# -- values ---------------------------------------------------------------------------------

_SIZES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_WORDS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}
_Check = Callable[[Any, str, Path], Any]


def _refuse(raw: Any, label: str, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{label} is {raw!r}, but must be {expected}.")


def _path(raw: Any, label: str, base: Path) -> Path:
    if not isinstance(raw, (str, Path)):
        raise _refuse(raw, label, "the path of a directory")
    try:
        return base / Path(raw).expanduser()
    except RuntimeError:
        raise _refuse(raw, label, "a path, and the home directory of this account is unknown") from None


def _text(raw: Any, label: str, base: Path) -> str:
    if not isinstance(raw, str):
        raise _refuse(raw, label, "text")
    return raw.strip()


def _truth(raw: Any, label: str, base: Path) -> bool:
    word = _WORDS.get(str(raw).strip().lower())
    if word is None:
        raise _refuse(raw, label, "true or false")
    return word


def _whole(minimum: int) -> _Check:
    def check(raw: Any, label: str, base: Path) -> int:
        try:
            number = int(raw) if isinstance(raw, str) else raw
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or not minimum <= number < 1 << 63:
            raise _refuse(raw, label, f"a whole number of at least {minimum}")
        return number

    return check


def _size(raw: Any, label: str, base: Path) -> int:
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", str(raw).strip().lower(), flags=re.ASCII)
    if match is None or match[2] not in _SIZES:
        raise _refuse(raw, label, 'a number of bytes, such as 1048576 or "1 MiB"')
    return int(match[1]) * _SIZES[match[2]]


def _one_of(*words: str) -> _Check:
    def check(raw: Any, label: str, base: Path) -> str:
        word = str(raw).strip().lower()
        if word not in words:
            raise _refuse(raw, label, " or ".join(repr(one) for one in words))
        return word

    return check


def _automatic(raw: Any, label: str, base: Path) -> str:
    word = _WORDS.get(str(raw).strip().lower())
    if word is None and str(raw).strip().lower() != "auto":
        raise _refuse(raw, label, "'auto' or 'off'")
    return "off" if word is False else "auto"


def _switch(raw: Any, label: str, base: Path) -> str:
    word = _WORDS.get(str(raw).strip().lower())
    if word is None:
        raise _refuse(raw, label, "'on' or 'off'")
    return "on" if word else "off"


def _persistence(raw: Any, label: str, base: Path) -> str:
    word = str(raw).strip().lower()
    if word == "large":
        return word
    truth = _WORDS.get(word)
    if truth is None:
        raise _refuse(raw, label, "true, false or 'large'")
    return str(truth).lower()


def _task_persistence(raw: Any, label: str, base: Path) -> str:
    return "" if raw == "" else _persistence(raw, label, base)


def _storage(raw: Any, label: str, base: Path) -> str:
    text = _text(raw, label, base)
    return text if "://" in text or not text else str(_path(text, label, base))


def _span(raw: Any, label: str, base: Path) -> str:
    word = str(raw).strip().lower()
    if word == "never":
        return word
    try:
        span_days(word)
    except ValueError:
        raise _refuse(raw, label, "a length of time such as '90d', or 'never'") from None
    return word


FORMATS = (
    "auto",
    "pickle",
    "json",
    "npy",
    "npz",
    "arrow",
    "parquet",
    "zarr",
    "compressed/pickle",
    "compressed/json",
)
"""The names in `penstock.runners.worker.result_formats`, which this room cannot see."""

_CHECKS: Mapping[str, _Check] = {
    "home": _path,
    "runner": _text,
    "api_url": _text,
    "ui_url": _text,
    "api_token": _text,
    "database_url": _text,
    "tasks_max_nesting": _whole(1),
    "logging_log_prints": _truth,
    "task_default_retries": _whole(0),
    "flow_default_retries": _whole(0),
    "large_argument": _size,
    "results_persist_by_default": _persistence,
    "tasks_default_persist_result": _task_persistence,
    "default_result_storage": _storage,
    "results_default_serializer": _one_of(*FORMATS),
    "tasks_refresh_cache": _truth,
    "tasks_disable_caching": _truth,
    "tasks_default_no_cache": _truth,
    "shared_memory": _automatic,
    "progress": _automatic,
    "tracking": _switch,
    "spool_sync": _one_of("process", "power"),
    "debug_mode": _truth,
    "server_allow_local_runs": _truth,
    "retention": _span,
}
