"""`penstock runs`: what has run on this machine, what became of it, and what it said."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from penstock.cli.layout import (
    clean,
    columns,
    duration,
    human_bytes,
    moment,
    paint,
    print_json,
    short_id,
    stop,
)
from penstock.cli.record import answering, find_run

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

HEAD = ("id", "name", "flow", "state", "started", "duration", "tasks (done/failed)", "runner")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON.")]
RunArgument = Annotated[
    str, typer.Argument(metavar="ID", help="An id, its first or last digits, or a run's name.")
]


@app.callback()
def runs(
    context: typer.Context,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="List at most so many.")] = 20,
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Only in this state, such as FAILED. Repeat it.")
    ] = None,
    flow: Annotated[str | None, typer.Option("--flow", help="Only of this flow.")] = None,
    nested: Annotated[bool, typer.Option("--nested", help="List flows that flows have called, too.")] = False,
    json: JsonOption = False,
) -> None:
    """List runs, the newest first; or show one of them."""
    if context.invoked_subcommand is not None:
        return
    with answering() as ask:
        found = ask("runs", limit=limit, states=state or [], flow=flow, nested=nested)
    if json:
        print_json(found)
    elif not found:
        print("no runs yet" if not (state or flow) else "no such runs")
    else:
        rows = [_row(run) for run in found]
        for line in columns(rows, head=HEAD, flexible=(1, 2), states=[run["state"]["type"] for run in found]):
            print(line)


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    tasks = run["tasks"]
    done = sum(tasks.get(state, 0) for state in ("COMPLETED", "SKIPPED", "CANCELLED"))
    failed = tasks.get("FAILED", 0) + tasks.get("CRASHED", 0)
    return (
        short_id(run["id"]),
        run["name"] or "",
        run["flow"] or "",
        run["state"]["name"],
        moment(run["started"] or run["created"]),
        _length(run),
        f"{done}/{failed}",
        _runner(run),
    )


def _length(run: dict[str, Any]) -> str:
    if run["seconds"] is None and run["ended"] is None and run["started"]:
        return duration(max(0.0, time.time() - run["started"]))
    return duration(run["seconds"])


def _runner(run: dict[str, Any]) -> str:
    return str((run.get("backend") or {}).get("name") or run.get("runner") or "")


# -- one run --------------------------------------------------------------------------------


@app.command("show")
def show(run: RunArgument, json: JsonOption = False) -> None:
    """Show one run: its tasks and nested flows with states, durations and errors."""
    from penstock.cli.tree import MANY

    with answering() as ask:
        found = find_run(ask, run)
        if found["kind"] == "flow":
            shown = ask("tree", flow_run=found["id"], elements=None if json else MANY)
        else:
            shown = {**(ask("run", run=found["id"]) or found), "history": ask("history", run=found["id"])}
    if shown is None:
        stop(f"there is no run {run!r} any more.")
    if json:
        print_json(shown)
        return
    for line in _flow_lines(shown) if found["kind"] == "flow" else _task_lines(shown):
        print(line)


def _facts(pairs: list[tuple[str, str]]) -> list[str]:
    return columns([(f"  {title}", value) for title, value in pairs if value])


def _title(run: dict[str, Any]) -> str:
    state = run["state"]
    length = f" in {_length(run)}" if _length(run) else ""
    head = f"{run['kind']} run {clean(run['name'])}  {paint(state['name'], state['type'])}{length}"
    return f"{head}: {clean(state['message'])}" if state["message"] else head


def _parameters(run: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in (run["parameters"] or {}).items())


def _flow_lines(run: dict[str, Any]) -> list[str]:
    from penstock.cli.tree import branches, draw

    backend = run.get("backend") or {}
    place = f"{run['host']}, pid {run['pid']}, Python {run['python']}, penstock {run['penstock']}"
    slots = f", {backend['threads']} slots in {backend['workers']} workers" if backend else ""
    counts = ", ".join(f"{count} {state.lower()}" for state, count in sorted(run["tasks"].items()))
    facts = [
        ("id", run["id"]),
        ("flow", run["flow"] or ""),
        ("started", moment(run["started"] or run["created"])),
        ("driver", place if run["host"] else ""),
        ("runner", f"{_runner(run)}{slots}"),
        ("parameters", _parameters(run)),
        ("tags", ", ".join(run["tags"] or [])),
        ("tasks", counts),
        ("log", f"{run['dropped_lines']:,} lines were not kept" if run["dropped_lines"] else ""),
    ]
    return [_title(run), *_facts(facts), *draw(branches(run["nodes"])), *_traceback(run)]


def _traceback(run: dict[str, Any]) -> list[str]:
    text = (run.get("error") or {}).get("text")
    return ["", *clean(text).rstrip().splitlines()] if text else []


def _task_lines(run: dict[str, Any]) -> list[str]:
    facts = [
        ("id", run["id"]),
        ("task", run["task"] or ""),
        ("flow run", run["flow_run"] or ""),
        ("worker", run["worker"] or ""),
        ("result", human_bytes(run["nbytes"]) if run["nbytes"] else ""),
        ("stored", run.get("stored") or ""),
        ("peak memory", human_bytes(run["peak"]) if run["peak"] else ""),
        ("parameters", _parameters(run)),
        ("upstream", ", ".join(edge["name"] or short_id(edge["run"]) for edge in run["upstream"])),
    ]
    steps = [
        (f"  {moment(step['time'])}", step["name"], f"attempt {step['attempt']}", str(step["message"] or ""))
        for step in run["history"]
    ]
    history = columns(steps, states=[step["type"] for step in run["history"]])
    return [_title(run), *_facts(facts), "  history", *history, *_traceback(run)]


@app.command("logs")
def logs(
    run: RunArgument,
    level: Annotated[
        str | None, typer.Option("--level", help="The lowest level to show, such as WARNING.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Only the latest lines.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what a run wrote to its log; of a flow run with the logs of its tasks."""
    if level is not None and level.upper() not in LEVELS:
        stop(f"--level {level!r} must be one of {', '.join(LEVELS)}.", 2)
    with answering() as ask:
        found = ask("logs", run=find_run(ask, run)["id"], level=level, limit=limit)
    if json:
        print_json(found)
        return
    for line in found["lines"]:
        stamp = (
            time.strftime("%H:%M:%S", time.localtime(line["time"])) + f".{int(line['time'] % 1 * 1000):03}"
        )
        print(f"{stamp}  {clean(line['level']):<8}  {clean(line['name'] or ''):<20}  {clean(line['text'])}")
    if found["dropped"]:
        print(f"({found['dropped']} lines were not kept: the tasks wrote more than the log takes)")
