"""Which code ran."""

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

from penstock.engine import revision

SOURCE = "def work(x):\n    return x\n"


def loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.work


def git(folder: Path, *words: str) -> str:
    known = ["-c", "user.name=somebody", "-c", "user.email=somebody@localhost"]
    done = subprocess.run(["git", *known, "-C", folder, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    revision._revision.cache_clear()
    revision._revision_at.cache_clear()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "code.py").write_text(SOURCE)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_the_revision_of_a_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = loaded(repository / "inner" / "code.py")
    head = git(repository, "rev-parse", "HEAD")
    assert revision.version_of(work) == head[:12]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(subprocess, "run", never)
    assert revision.version_of(work) == head[:12]  # git was asked once


def test_a_working_copy_that_was_changed(repository: Path) -> None:
    (repository / "inner" / "code.py").write_text(SOURCE + "\n# changed\n")
    work = loaded(repository / "inner" / "code.py")
    assert revision.version_of(work) == git(repository, "rev-parse", "HEAD")[:12] + "-dirty"


def test_installed_packages_have_no_revision(repository: Path) -> None:
    folder = repository / "lib" / "site-packages"
    folder.mkdir(parents=True)
    (folder / "code.py").write_text(SOURCE)
    assert revision.version_of(loaded(folder / "code.py")).startswith("source-")


def test_code_outside_of_repositories(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text(SOURCE.replace("return x", "return -x"))
    first, second = (revision.version_of(loaded(tmp_path / name)) for name in ("a.py", "b.py"))
    if revision._root_of(str(tmp_path)) is None:
        assert first.startswith("source-")
        assert first != second


def test_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert revision.version_of(loaded(repository / "inner" / "code.py")).startswith("source-")


def test_code_without_source() -> None:
    namespace: dict[str, Any] = {}
    exec("def one(x): return x\ndef two(x): return x + 1", namespace)
    one, two = namespace["one"], namespace["two"]
    assert revision.code_hash(one) != revision.code_hash(two)
    assert revision.task_key(one) == f"one-{revision.code_hash(one)}"
    assert len(revision.code_hash(max)) == 8
