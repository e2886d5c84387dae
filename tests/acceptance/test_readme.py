"""The README and the pages in docs/ tell the truth: their Python runs, and the commands they show exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PENSTOCK = Path(sys.executable).parent / "penstock"

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTS = re.compile(r"print\(.*\)\s+# (?P<expected>.+)$", re.MULTILINE)


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and line of each block in a language, and its text; "python no-run" is only shown."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for fence in FENCE.finditer(text):
            if fence["info"].strip() == language:
                line = text.count("\n", 0, fence.start()) + 1
                found.append((f"{page.relative_to(ROOT)}:{line}", fence["text"]))
    return found


def commands() -> list[str]:
    """The penstock commands that the pages show, without their arguments, each once."""
    found = set()
    for _, text in blocks("bash"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["penstock"]:
                names = words[1:]
                ends = [i for i, word in enumerate(names) if not re.fullmatch(r"[a-z]+(-[a-z]+)*", word)]
                found.add(" ".join(names[: ends[0]] if ends else names))
    return sorted(found - {""})


LINK = re.compile(r"\]\((?!https?:)(?P<file>[^)#\s]*)(?:#(?P<section>[^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def sections(page: Path) -> set[str]:
    """The names by which links reach the headings of a page."""
    titles = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def environment(home: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return {**ours, "PENSTOCK_HOME": str(home)}


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block[0])
def test_an_example_runs_and_prints_what_it_says(block: tuple[str, str], tmp_path: Path) -> None:
    _, text = block
    script = tmp_path / "example.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    for expected in PRINTS.findall(text):
        assert expected in done.stdout.splitlines()


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / name for name in ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"))],
    ids=lambda page: page.name,
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(FENCE.sub("", page.read_text())):
        target = page.parent / link["file"] if link["file"] else page
        assert target.exists(), link[0]
        assert not link["section"] or link["section"] in sections(target), link[0]


@pytest.mark.parametrize("command", commands())
def test_a_command_exists(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(PENSTOCK), *command.split(), "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_opens_with_the_two_commands() -> None:
    opening = (ROOT / "README.md").read_text().partition("\n## Install")[0]
    assert [line for line in opening.splitlines() if line.startswith("make ")] == ["make demo", "make test"]
    (example,) = [text for info, text in FENCE.findall(opening) if info.strip() == "python"]
    assert len(example.splitlines()) == 12
