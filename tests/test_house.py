"""The house rules that a machine can check: what an import costs, what names say, what tests may do.

The rules that other tools check (import directions, lint, types) are in pyproject.toml.
"""

import ast
import importlib.metadata
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "penstock"
TESTS = ROOT / "tests"

HEAVY = {"dask", "distributed", "ray", "fastapi", "sqlalchemy", "bokeh", "pandas", "numpy"}
IMPORT_SECONDS = 0.25

# What users of Prefect look for first; `__all__` holds more.
PROMISED = {
    "flow",
    "task",
    "unmapped",
    "allow_failure",
    "quote",
    "wait",
    "as_completed",
    "get_run_logger",
    "tags",
    "State",
    "PenstockFuture",
    "PenstockFutureList",
    "SequentialTaskRunner",
    "ThreadPoolTaskRunner",
    "ConcurrentTaskRunner",
    "ProcessPoolTaskRunner",
    "DaskTaskRunner",
    "RayTaskRunner",
}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


# ------------------------------------------------------------------------------------------------ the import


def after(statement: str, tmp_path: Path) -> dict[str, Any]:
    """Seconds that a statement takes in a fresh interpreter, and the top-level modules it loads."""
    script = (
        "import json, sys, time\n"
        "before = time.perf_counter()\n"
        f"{statement}\n"
        "seconds = time.perf_counter() - before\n"
        "print(json.dumps({'seconds': seconds, 'modules': sorted({m.partition('.')[0] for m in sys.modules})}))\n"
    )
    environment = {**os.environ, "PENSTOCK_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_import_is_quick_and_light(tmp_path: Path) -> None:
    tries = [after("import penstock", tmp_path) for _ in range(3)]
    assert not HEAVY & set(tries[0]["modules"])
    assert min(one["seconds"] for one in tries) < IMPORT_SECONDS


def test_the_decorators_load_nothing_heavy(tmp_path: Path) -> None:
    loaded = after("from penstock import flow, task, unmapped, ThreadPoolTaskRunner", tmp_path)
    assert not HEAVY & set(loaded["modules"])


# ----------------------------------------------------------------------------------------- the public names


def test_the_public_list_is_complete() -> None:
    assert len(penstock.__all__) == len(set(penstock.__all__))
    assert set(penstock.__all__) >= PROMISED
    assert set(dir(penstock)) >= set(penstock.__all__)
    assert penstock.__version__ == importlib.metadata.version("penstock")


@pytest.mark.parametrize("name", penstock.__all__)
def test_a_public_name_exists_and_explains_itself(name: str) -> None:
    thing = getattr(penstock, name)
    if isinstance(thing, str):
        return
    assert inspect.getdoc(thing), f"penstock.{name} has no docstring"
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert thing.__doc__, f"penstock.{name} inherits its docstring instead of having one"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(penstock, "no_such_name")  # noqa: B009 - the name is wrong on purpose


def error_classes() -> list[type[BaseException]]:
    found = [thing for thing in vars(errors).values() if inspect.isclass(thing)]
    return [
        thing for thing in found if issubclass(thing, BaseException) and thing.__module__ == errors.__name__
    ]


def test_the_error_tree_is_drawn_and_exported() -> None:
    names = {cls.__name__ for cls in error_classes()}
    assert names == set(errors.__all__)
    assert all(re.search(rf"\b{name}\b", errors.__doc__ or "") for name in names)


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
def test_an_error_survives_a_journey_between_processes(cls: type[BaseException]) -> None:
    error = cls("what happened, and what to do")
    if isinstance(error, errors.RunError):
        error.of_run("run-1")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is cls
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert vars(arrived) == vars(error)


# ------------------------------------------------------------------------------------- names inside the code


def scopes(tree: ast.Module) -> Iterator[list[ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions defined side by side: in a module, in a class, in another function."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            yield [item for item in body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", sources(PACKAGE), ids=named)
def test_nothing_exists_twice_for_sync_and_async(path: Path) -> None:
    tree = parsed(path)
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = [node.name for node in ast.walk(tree) if isinstance(node, definitions)]
    assert [name for name in names if name.endswith("_async") or name.startswith("Async")] == []
    for functions in scopes(tree):
        plain = {function.name for function in functions}
        twins = [f.name for f in functions if f.name.startswith("a") and f.name[1:] in plain]
        assert [name for name in twins if not name.startswith("__")] == []


@pytest.mark.parametrize("path", sources(PACKAGE), ids=named)
def test_a_module_is_called_after_what_it_holds(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "core", "misc", "helpers"}
    assert path.stem != "base" or path.parent.name == "runners"
    assert ast.get_docstring(parsed(path)), f"{named(path)} does not say what it is"


def test_the_map_shows_every_module() -> None:
    drawn = (ROOT / "docs" / "architecture.md").read_text()
    modules = [
        path for path in sources(PACKAGE) if path.name != "__init__.py" and "migrations" not in path.parts
    ]
    rooms = [
        path
        for path in modules
        if (path.parent.parent in {PACKAGE, ROOT} and path.parent.name != "demo") or path.parent == WORKER
    ]
    assert [named(path) for path in rooms if f"`{path.name}`" not in drawn] == []


# ---------------------------------------------------------------------------------- the table of features

FEATURES = ROOT / "docs" / "features.md"
TEST_ID = re.compile(r"`(?P<file>tests/[\w/]+\.py|…)?(?:::(?P<test>test_\w+))?`")
LINK = re.compile(r"\]\((?P<page>[\w./-]*)(?:#(?P<anchor>[\w-]+))?\)")


def named_tests(line: str) -> Iterator[tuple[str, str | None]]:
    """File and test of each test id in a line; one that begins with `::` belongs to the file before it."""
    file = ""
    for found in TEST_ID.finditer(line):
        if found["file"] is None and found["test"] is None:
            continue
        file = found["file"] if found["file"] not in {None, "…"} else file
        yield file, found["test"]


def feature_rows() -> list[str]:
    lines = FEATURES.read_text().splitlines()
    return [
        line for line in lines if line.startswith("|") and not line.startswith(("|---", "| |", "| feature"))
    ]


def test_every_feature_names_tests_that_exist() -> None:
    defined: dict[str, set[str]] = {}
    built, _, missing = FEATURES.read_text().partition("\n## Not yet\n")
    for line in feature_rows():
        named_here = list(named_tests(line))
        assert named_here or line in missing, f"no test stands behind: {line}"
        for file, test in named_here:
            if file not in defined:
                assert (ROOT / file).is_file(), f"{file} does not exist: {line}"
                functions = ast.FunctionDef | ast.AsyncFunctionDef
                defined[file] = {
                    one.name for one in ast.walk(parsed(ROOT / file)) if isinstance(one, functions)
                }
            assert test is None or test in defined[file], f"{file}::{test} does not exist"
    asked = {int(number) for number in re.findall(r"^\| F(\d+) \|", built + missing, re.MULTILINE)}
    assert asked == set(range(1, 44))


def test_every_feature_links_to_a_section_that_exists() -> None:
    for line in feature_rows():
        for found in LINK.finditer(line):
            page = FEATURES.parent / found["page"] if found["page"] else FEATURES
            assert page.is_file(), f"{page} does not exist: {line}"
            heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert found["anchor"] is None or found["anchor"] in anchors, f"no such section: {found[0]}"


# ------------------------------------------------------------------------------ what is sent to the workers


WORKER = PACKAGE / "runners" / "worker"
BESIDE = {
    "dask_memory": {"distributed"},
    "dask_plugin": {"dask", "distributed"},
    "dask_tracker": {"distributed"},
    "ray_tasks": {"ray"},
    "shared_memory": set(),
}  # files that are sent with the folder → what else they may import


@pytest.mark.parametrize(
    "path", [*sources(WORKER), *(WORKER.with_name(f"{name}.py") for name in BESIDE)], ids=named
)
def test_a_shipped_file_stands_alone(path: Path) -> None:
    tree = parsed(path)
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, "what is around the package of shipped files is not there"
            names = [node.module] if node.module else [alias.name for alias in node.names]
            own = {name.removeprefix("worker.") for name in names}
            folder = [] if path.parent == WORKER else BESIDE
            there = {one.stem for one in sources(WORKER)} | {"worker"} | set(folder)
            assert own <= there, f"{own - there} is not shipped"
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    besides = BESIDE.get(path.stem, set()) | {"cloudpickle"}  # present wherever dask or ray is
    if path.stem in {
        "result_store",
        "result_formats",
    }:  # inside of functions, where a storage or a value asks for them
        besides |= {"fsspec", "numpy", "xarray", "zarr"}
    assert imported - set(sys.stdlib_module_names) - besides == set()


# ---------------------------------------------------------------------------------------- what tests may do

BODIES = {"task", "flow", "sensor"}  # a function under one of these is the work itself
POLLS = {"eventually", "wait_until"}  # helpers that look again until a deadline


def is_body(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    if node.name in POLLS:
        return True
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in BODIES:
            return True
    return False


def sleeps(tree: ast.Module, lines: list[str]) -> Iterator[int]:
    """Lines that sleep outside the body of a task and without the comment that calls it work."""

    def visit(node: ast.AST, inside: bool) -> Iterator[int]:
        inside = inside or is_body(node)
        if isinstance(node, ast.Call) and not inside:
            name = ast.unparse(node.func)
            near = lines[max(0, node.lineno - 2) : node.lineno]
            if name in {"sleep", "time.sleep"} and not any("# work:" in line for line in near):
                yield node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, inside=False)


@pytest.mark.parametrize("path", sources(TESTS), ids=named)
def test_no_test_sleeps_in_order_to_wait(path: Path) -> None:
    found = list(sleeps(parsed(path), path.read_text().splitlines()))
    assert found == [], "wait for an event, or say `# work:` if the sleep is the work of a task"


RUNNER_NAMES = {"sequential", "threads", "processes", "dask", "ray", "distributed"}
RUNNER_CLASSES = {name for name in PROMISED if name.endswith("TaskRunner")}


def runners_named(tree: ast.Module) -> Iterator[str]:
    """Every way in which code can tell one back end from another: imports, classes, strings, marks."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if RUNNER_NAMES & set(alias.name.split(".")))
            case ast.ImportFrom(module=module) if RUNNER_NAMES & set((module or "").split(".")):
                yield module or ""
            case ast.Name(id=name) | ast.alias(name=name) | ast.Attribute(attr=name) if (
                name in RUNNER_CLASSES
            ):
                yield name
            case ast.Constant(value=str(text)) if text.partition(":")[0] in RUNNER_NAMES:
                yield text
            case ast.Attribute(value=ast.Attribute(attr="mark"), attr=name) if name in RUNNER_NAMES:
                yield f"mark.{name}"


def contracts() -> list[Path]:
    return [path for path in sources(TESTS / "contract") if path.name != "conftest.py"]


@pytest.mark.parametrize("path", contracts(), ids=named)
def test_a_contract_names_no_runner(path: Path) -> None:
    found = list(runners_named(parsed(path)))
    assert found == [], "a difference between runners is a capability in `runner.info`"


# ------------------------------------------------------------------------------------------- the packaging


def test_the_extras_are_the_documented_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"dask", "ray", "postgres", "s3", "server", "demo", "all", "test"}
    (everything,) = extras["all"]
    assert set(re.findall(r"\w+", everything.removeprefix("penstock"))) == set(extras) - {"all", "test"}
    plain = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert not plain & HEAVY - {"sqlalchemy"}


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
