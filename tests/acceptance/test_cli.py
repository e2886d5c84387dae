"""The command line as a user meets it: other processes, pipes, signals, exit codes."""

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.api import embedded, queries
from tests.serving import served

PENSTOCK = str(Path(sys.executable).parent / "penstock")
ESCAPE = "\x1b"
START_SECONDS = 0.4
HEAVY = {"dask", "distributed", "ray", "numpy", "pandas"}

FLOWS = """
import threading
from penstock import Skip, flow, get_run_logger, task

@task
def square(x):
    return x * x

@task(retries=1)
def picky(x):
    if x % 10 == 3:
        raise ValueError(f"{x} is odd")
    return x

@task(log_prints=True)
def says(word):
    print("it says", word)

@flow
def good(n: int = 3, label: str = "none"):
    get_run_logger().warning("label is %s", label)
    says.submit(label)
    total = sum(square.map(range(n)).result())
    print("the total is", total)

@flow
def bad():
    return picky.map(range(25)).result()

@flow
def nothing():
    raise Skip("no new data")

@flow
def outer():
    return good(2), good.with_options(name="other")(30), square(4)

@flow
async def soft(x: float):
    return await square.submit(x)

@flow
def leaves():
    raise SystemExit(0)

@task
def waits(x):
    threading.Event().wait(60)

@flow
def slow():
    futures = waits.map(range(2))
    print("it waits", flush=True)
    return futures.result()
"""


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Shell:
    """A directory with flows in it, and a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        (folder / "flows.py").write_text(FLOWS)
        (folder / "beside.py").write_text("def fall():\n    raise LookupError('no such file')\n")
        (folder / "broken.py").write_text("import beside\nbeside.fall()\n")

    @property
    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        ours |= {"PENSTOCK_HOME": str(self.home), "TERM": "xterm-256color"}
        if ours.pop("PYTHONDONTWRITEBYTECODE", ""):  # or each command would compile all of its libraries
            ours["PYTHONPYCACHEPREFIX"] = str(self.folder.parent / "bytecode")
        return ours

    def __call__(self, *words: str, **variables: str) -> Done:
        done = subprocess.run(
            [PENSTOCK, *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**self.environment, **variables},
            timeout=60,
        )
        assert ESCAPE not in done.stdout + done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def json(self, *words: str) -> Any:
        done = self(*words, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    def rows(self) -> list[dict[str, Any]]:
        """The runs in the record, read without a command."""
        with embedded.reading(self.home) as connection:
            return queries.list_runs(connection)

    def newest(self) -> dict[str, Any]:
        return self.rows()[0]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("shell"))


def sentence(done: Done) -> str:
    """The one line that an error of the command line is."""
    (line,) = [line for line in done.err.splitlines() if line.startswith("penstock: ")]
    assert "Traceback" not in done.err
    return line


# ------------------------------------------------------------------------------------------------- penstock run


def test_a_flow_that_ends_well(shell: Shell) -> None:
    done = shell("run", "flows.py:good", "-p", "n=4", "-p", "label=007")
    assert done.code == 0
    assert done.out == "the total is 14\n", "standard output belongs to the user's flow"
    assert re.search(r"^run \S+  flow good  id [0-9a-f]{8}$", done.err, re.MULTILINE)
    assert re.search(r"^on threads: \d+ slots?$", done.err, re.MULTILINE)
    assert re.search(r"^  square +4/4 ", done.err, re.MULTILINE)
    assert re.search(r"^Completed in [0-9.]+ m?s(, after .* to start)?$", done.err, re.MULTILINE)
    for figure in ("tasks       5", "overhead", "per task", "peak memory driver", "came through the driver"):
        assert figure in done.err
    row = shell.newest()
    assert (row["flow"], row["state"]["name"], row["tasks"]) == ("good", "Completed", {"COMPLETED": 5})
    assert row["parameters"] == {"n": "4", "label": "'007'"}
    assert f"penstock runs show {row['name']}" in done.err


def test_a_flow_that_fails_shows_the_users_lines_only(shell: Shell) -> None:
    done = shell("run", "flows.py:bad", "--runner", "sequential")
    assert done.code == 1
    trace = done.err[done.err.index("Traceback") :]
    files = re.findall(r'File "([^"]+)"', trace)
    assert {Path(name).name for name in files} == {"flows.py"}
    assert "ValueError: 3 is odd" in trace
    assert shell.newest()["backend"]["name"] == "sequential"


def test_skipped_is_no_failure_and_an_async_flow_is_run(shell: Shell) -> None:
    assert shell("run", "flows.py:nothing", "-q").code == 0
    assert shell.newest()["state"]["type"] == "SKIPPED"
    assert shell("run", "flows.py:soft", "-p", "x=1.5", "-q").code == 0
    assert shell("run", "flows.py:leaves", "-q").code == 1, "the exit code tells of the run, not of sys.exit"


def test_a_module_that_cannot_be_imported_leaves_one_failed_run(shell: Shell) -> None:
    before = len(shell.rows())
    done = shell("run", "broken.py:reduce", "-p", "n=3")
    assert done.code == 1
    files = [Path(name).name for name in re.findall(r'File "([^"]+)"', done.err)]
    assert files == ["broken.py", "beside.py"]
    rows = shell.rows()
    assert len(rows) == before + 1
    assert (rows[0]["flow"], rows[0]["state"]["type"], rows[0]["state"]["name"]) == (
        "reduce",
        "FAILED",
        "StartError",
    )
    assert rows[0]["error"]["type"] == "LookupError"
    shown = shell("runs", "show", rows[0]["name"]).out
    assert 'beside.py", line 2, in fall' in shown
    assert "LookupError: no such file" in shown


def test_a_wrong_parameter_is_recorded_and_said_in_a_sentence(shell: Shell) -> None:
    for given, reason in (
        ("n=many", "n: Input should be a valid integer"),
        ("m=1", "unexpected keyword argument 'm'"),
    ):
        done = shell("run", "flows.py:good", "-p", given)
        assert done.code == 1
        assert reason in sentence(done)
        row = shell.newest()
        assert row["state"]["type"] == "FAILED"
        assert reason in row["state"]["message"]


def test_a_missing_flow_is_recorded_and_the_others_are_named(shell: Shell) -> None:
    done = shell("run", "flows.py:goood")
    assert done.code == 1
    assert "it has bad, good, leaves, nothing, outer, slow, soft" in sentence(done)
    assert shell.newest()["state"]["name"] == "StartError"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["flows.py:good", "--runner", "mars"], "unknown task runner 'mars': choose"),
        (["absent.py:good"], "there is no file absent.py"),
        (["flows.py"], "does not name a flow"),
        (["flows.py:good", "-p", "n"], "name=value"),
    ],
)
def test_what_cannot_be_meant_starts_nothing(shell: Shell, words: list[str], reason: str) -> None:
    done = shell("run", *words, PENSTOCK_HOME=str(shell.folder / "untouched"))
    assert done.code == 2
    assert reason in sentence(done)
    assert not (shell.folder / "untouched").exists()


def test_a_file_may_be_called_like_a_library(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("from penstock import flow\n@flow\ndef tidy(): ...\n")
    assert shell("run", f"{tmp_path}/json.py:tidy", "-q").code == 0


def test_the_runner_is_chosen_by_variable_option_or_auto(shell: Shell) -> None:
    assert "on sequential" in shell("run", "flows.py:nothing", PENSTOCK_RUNNER="sequential").err
    chosen = shell("run", "flows.py:nothing", "--runner", "threads", PENSTOCK_RUNNER="sequential").err
    assert "on threads" in chosen
    auto = without_dask(shell, "run", "flows.py:nothing", "--runner", "auto")
    assert auto.code == 0
    assert "runner: threads (dask is not installed)" in auto.err


@pytest.mark.parametrize(
    ("number", "runner", "code"),
    [(signal.SIGINT, "threads", 130), (signal.SIGINT, "processes", 130), (signal.SIGTERM, "threads", 143)],
)
def test_a_signal_ends_the_run_as_cancelled(
    shell: Shell, number: signal.Signals, runner: str, code: int
) -> None:
    process = subprocess.Popen(
        [PENSTOCK, "run", "flows.py:slow", "--runner", runner],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=shell.folder,
        env=shell.environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "it waits\n"
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert f"Cancelled by {number.name}." in err
    assert shell.newest()["state"]["type"] == "CANCELLED"


# ------------------------------------------------------------------------------------------------ penstock runs


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A home in which two flows have run."""
    found = Shell(tmp_path_factory.mktemp("past"))
    found("run", "flows.py:bad", "-q")
    found("run", "flows.py:outer", "-q")
    return found


def test_runs_are_listed_newest_first(past: Shell) -> None:
    head, *rows = past("runs").lines
    titles = ["id", "name", "flow", "state", "started", "duration", "tasks (done/failed)", "runner"]
    assert re.split(r"\s{2,}", head) == titles
    assert [re.split(r"\s{2,}", row)[2:4] for row in rows] == [["outer", "Completed"], ["bad", "Failed"]]
    assert re.split(r"\s{2,}", rows[1])[-2:] == ["22/3", "threads"]
    assert len(past("runs", "--nested").lines) == 5
    assert len(past("runs", "--state", "failed").lines) == 2
    assert past("runs", "--flow", "no-such").out == "no such runs\n"


def test_a_tree_counts_what_is_many_and_lists_what_failed(past: Shell) -> None:
    (row,) = past.json("runs", "--flow", "bad")
    out = past("runs", "show", row["id"][-8:]).out
    assert out.startswith(f"flow run {row['name']}  Failed in ")
    assert re.search(r"└─ picky × 25 +22 completed, 3 failed ", out)
    failures = re.findall(r"─ (picky-\d+) +Failed .* ValueError: (\d+) is odd \(attempt 2, on thread", out)
    assert failures == [("picky-3", "3"), ("picky-13", "13"), ("picky-23", "23")]
    assert "penstock/engine" not in out


def test_a_tree_shows_flows_within_flows(past: Shell) -> None:
    out = past("runs", "show", "outer").out
    assert re.search(r"├─ \S+ \(flow good\) +Completed", out)
    assert re.search(r"│  ├─ says ", out)
    assert re.search(r"│  +└─ square-1 ", out)
    assert re.search(r"│  +└─ square × 30 +30 completed", out)


def test_a_run_as_json(past: Shell) -> None:
    tree = past.json("runs", "show", "bad")
    assert (tree["flow"], tree["state"]["type"], tree["tasks"]) == (
        "bad",
        "FAILED",
        {"COMPLETED": 22, "FAILED": 3},
    )
    (node,) = tree["nodes"]
    assert (node["task"], node["count"], len(node["nodes"])) == ("picky", 25, 25)
    element = past.json("runs", "show", node["nodes"][3]["id"])
    assert element["error"]["message"] == "3 is odd"
    assert element["history"][-1]["type"] == "FAILED"
    assert "attempt 2" in past("runs", "show", element["id"]).out


def test_logs_of_a_run(past: Shell) -> None:
    lines = past("runs", "logs", "outer").lines
    assert len(lines) == 4
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}  WARNING   \S+ +label is none", lines[0])
    assert sum("it says none" in line for line in lines) == 2
    assert len(past("runs", "logs", "outer", "--level", "warning").lines) == 2
    assert len(past.json("runs", "logs", "outer")["lines"]) == 4


def test_a_run_that_is_not_there(past: Shell) -> None:
    for command in ("show", "logs"):
        done = past("runs", command, "feedface")
        assert (done.code, done.out) == (1, "")
        assert "there is no run 'feedface'" in sentence(done)
    assert past("runs", "logs", "outer", "--level", "loud").code == 2


def test_a_home_without_runs_and_one_with_a_broken_record(past: Shell, tmp_path: Path) -> None:
    assert past("runs", PENSTOCK_HOME=str(tmp_path / "new")).out == "no runs yet\n"
    (tmp_path / "penstock.db").write_text(
        "this is no database, and it is long enough to be read as one" * 100
    )
    done = past("runs", PENSTOCK_HOME=str(tmp_path))
    assert done.code == 1
    assert "is damaged; run `penstock db reset`" in sentence(done)


# --------------------------------------------------------------------------------- the other commands, and all


def without_dask(shell: Shell, *words: str) -> Done:
    script = (
        "import sys\n"
        "sys.modules['distributed'] = None\n"
        f"sys.argv = ['penstock', *{list(words)!r}]\n"
        "from penstock.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=shell.folder,
        env=shell.environment,
        timeout=60,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_doctor_with_threads_needs_no_dask(past: Shell) -> None:
    done = without_dask(past, "doctor", "--runner", "threads")
    assert done.code == 0, done.out
    topics = {line.split()[1] for line in done.lines[1:]}
    assert topics >= {"driver", "machine", "home", "record", "disk", "ports", "runner", "tasks", "workers"}
    assert len(past.rows()) == 2, "the doctor's own tasks are not recorded"


def test_doctor_asks_the_server_that_is_set(past: Shell, tmp_path: Path) -> None:
    with served(tmp_path) as server:
        told = {"PENSTOCK_API_URL": server.url, "PENSTOCK_API_TOKEN": server.token}
        reached = past("doctor", "--runner", "threads", "--json", **told)
        refused = past("doctor", "--runner", "threads", "--json", **{**told, "PENSTOCK_API_TOKEN": "x"})
    away = past("doctor", "--runner", "threads", "--json", **told)
    found = [
        {one["topic"]: one for one in json.loads(done.out)}["record"] for done in (reached, refused, away)
    ]
    assert [one["verdict"] for one in found] == ["ok", "note", "note"]
    assert "sqlite" in found[0]["text"]
    assert "token" in found[1]["text"]
    assert "does not answer" in found[2]["text"]
    assert "events wait in" in found[2]["text"]


@pytest.mark.dask
def test_doctor_compares_the_versions_of_a_dask_cluster(past: Shell) -> None:
    found = {one["topic"]: one for one in past.json("doctor", "--runner", "dask")}
    for topic in ("driver", "scheduler", "workers"):
        assert "distributed" in found[topic]["text"]
    assert found["runner"]["verdict"] == found["tasks"]["verdict"] == "ok"


def test_doctor_says_what_is_in_the_way(past: Shell) -> None:
    done = past("doctor", "--runner", "dask://127.0.0.1:9", PENSTOCK_TRACKING="off")
    if done.code == 2:
        assert "penstock[dask]" in sentence(done)
        return
    assert done.code == 1
    assert re.search(r"^bad +runner +dask://127.0.0.1:9 cannot be used", done.out, re.MULTILINE)


def test_settings_and_where_they_come_from(past: Shell) -> None:
    rows = {one["name"]: one for one in past.json("config", "show")}
    assert rows["PENSTOCK_HOME"]["source"] == "PENSTOCK_HOME"
    assert rows["PENSTOCK_RUNNER"]["source"] == "default"
    assert "PENSTOCK_TRACKING" in past("config", "show").out
    wrong = past("config", "show", PENSTOCK_TRACKING="perhaps")
    assert wrong.code == 2
    assert "PENSTOCK_TRACKING is 'perhaps'" in sentence(wrong)


def test_the_version_and_a_mistake_in_the_command(past: Shell) -> None:
    assert re.fullmatch(r"penstock \d+\.\d+\.\d+\S*\n", past("--version").out)
    done = past("runs", "--bogus")
    assert done.code == 2
    assert "--bogus" in done.err


def test_help_comes_at_once(past: Shell) -> None:
    def seconds() -> float:  # of the processor: others may be at work on this machine
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert past("--help").code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < START_SECONDS


def test_reading_the_record_loads_nothing_heavy(past: Shell) -> None:
    script = (
        "import sys\n"
        "sys.argv = ['penstock', 'runs']\n"
        "from penstock.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=past.environment
    )
    assert "sqlalchemy" in done.stderr.split()
    assert not HEAVY & set(done.stderr.split())


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}], ids=["colours", "no colours"])
def test_a_terminal_gets_bars(shell: Shell, variables: dict[str, str]) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(shell.folder)
        os.execve(PENSTOCK, [PENSTOCK, "run", "flows.py:good"], {**shell.environment, **variables})
    written = b""
    while True:
        try:
            written += (some := os.read(terminal, 65536))
        except OSError:  # the other end is closed
            break
        if not some:
            break
    _, status = os.waitpid(pid, 0)
    text = written.decode()
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert "━━━" in text
    assert "the total is 5" in text
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", text)) is not bool(variables)
    assert "\x1b[?25l" not in text or text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), (
        "the cursor is back"
    )


def test_the_demo_on_threads(shell: Shell) -> None:
    pytest.importorskip("ducc0")
    pytest.importorskip("matplotlib")
    done = shell("demo", "--runner", "threads", "--scale", "128", "--output", "spectrum.png")
    assert done.code == 0, done.err
    assert re.search(r"^  image_channel +46/46 ", done.out, re.MULTILINE)
    assert "mJy/beam" in done.out
    assert re.search(r"^  tasks +173$", done.out, re.MULTILINE)
    assert re.search(r"^next: penstock runs show ", done.out, re.MULTILINE)
    assert (shell.folder / "spectrum.png").stat().st_size > 1000


def test_a_run_shows_where_its_result_lies(shell: Shell, tmp_path: Path) -> None:
    done = shell(
        *("run", "flows.py:good", "-q"),
        PENSTOCK_RESULTS_PERSIST_BY_DEFAULT="true",
        PENSTOCK_DEFAULT_RESULT_STORAGE=str(tmp_path / "kept"),
    )
    assert done.code == 0
    for name in ("square-2", "says"):  # an element of a map, and a run of its own
        (line,) = [line for line in shell("runs", "show", name).lines if line.strip().startswith("stored")]
        place = Path(line.split()[-1])
        assert place.parent.parent == tmp_path / "kept"
        assert place.is_file()


# --------------------------------------------------------------------------------------------- penstock explain


def test_a_plan_is_shown_and_nothing_runs(shell: Shell) -> None:
    before = len(shell.rows())
    done = shell("explain", "flows.py:good", "-p", "n=400", "--runner", "processes")
    assert done.code == 0, done.err
    assert "square x 400" in done.out
    assert "the plan ends here: a value is needed" in done.out
    assert "flows.py" in done.lines[-1]
    plan = shell.json("explain", "flows.py:good")
    assert [node["task"] for node in plan["nodes"]] == ["says", "square"]
    assert len(shell.rows()) == before


def test_the_plan_is_alone_on_standard_output_and_an_error_is_the_users(shell: Shell) -> None:
    (shell.folder / "loud.py").write_text(
        "from penstock import flow\n@flow\ndef loud():\n    print('hello')\n"
        "@flow\ndef falls():\n    raise ValueError('mine')\n"
    )
    assert shell.json("explain", "loud.py:loud")["nodes"] == []
    done = shell("explain", "loud.py:falls")
    assert (done.code, done.out) == (1, "")
    assert {Path(name).name for name in re.findall(r'File "([^"]+)"', done.err)} == {"loud.py"}
    assert "unexpected keyword argument" in sentence(shell("explain", "loud.py:loud", "-p", "m=1"))


def test_the_plan_of_the_demo(shell: Shell) -> None:
    plan = shell.json("explain", "penstock.demo.flow:radio", "--runner", "dask")
    found = {node["task"]: node for node in plan["nodes"]}
    assert list(found)[:3] == ["read_visibilities", "find_scans", "solve_gains"]
    assert list(found)[-1] == "draw", "the whole flow, up to the value that it returns"
    assert (found["solve_gains"]["mapped"], found["solve_gains"]["count"]) == (True, None)
    assert (found["image_channel"]["count"], found["summarise"]["fused_with"]) == (46, "image_channel")
    assert "return draw_picture" in plan["end"]
    assert "assumed" in plan["runner"], "no cluster is started for a plan"
