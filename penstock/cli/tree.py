"""A run as a tree of lines: single tasks while they are few, one line per task name where they are many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.cli.layout import columns, duration, human_bytes

__all__ = ["MANY", "Branch", "branches", "draw"]

MANY = 20
"""So many runs of one task name become one line."""

_BAD = ("FAILED", "CRASHED")
_WORDS = (
    "COMPLETED",
    "RUNNING",
    "PENDING",
    "SCHEDULED",
    "PAUSED",
    "CANCELLING",
    "CANCELLED",
    "SKIPPED",
    *_BAD,
)


@dataclass(slots=True)
class Branch:
    """One line of the tree and what hangs below it.

    Attributes
    ----------
    label, state, note : str
        Name, state (or counts by state) and whatever else there is to say.
    kind : str
        Type of state that colours the line.
    """

    label: str
    state: str
    kind: str
    seconds: float | None = None
    nbytes: int | None = None
    note: str = ""
    below: list[Branch] = field(default_factory=list)


def branches(nodes: Sequence[dict[str, Any]]) -> list[Branch]:
    """Turn nodes of `penstock.api.queries.get_tree` into branches, many of one name into one."""
    by_name: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for node in map(_as_task, nodes):
        by_name.setdefault((node["task"], bool(node.get("flow"))), []).append(node)
    found: list[Branch] = []
    for (name, _), members in by_name.items():
        if sum(node.get("count", 1) for node in members) >= MANY:
            found.append(_together(name, members))
        else:
            found += [_single(node) for node in _runs(members)]
    return found


def _as_task(node: dict[str, Any]) -> dict[str, Any]:
    """Show a flow run that no task stands for as if one did."""
    return {**node, "task": node["flow"], "flow": node, "nodes": []} if node["kind"] == "flow" else node


def _runs(nodes: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for node in nodes:
        if node["kind"] == "map":
            yield from node["nodes"]
        else:
            yield node


def _single(run: dict[str, Any]) -> Branch:
    nested = run.get("flow")
    label = f"{run['name']} (flow {nested['flow']})" if nested else str(run["name"])
    below = branches([*run["nodes"], *(nested["nodes"] if nested else [])])
    state = run["state"]
    attempts = f"attempt {run['attempt']}" if (run["attempt"] or 0) > 1 else ""
    note = problem(run) if state["type"] in _BAD or state["name"] == "NotReady" else attempts
    return Branch(label, state["name"], state["type"], run["seconds"], run.get("nbytes"), note, below)


def _together(name: str, members: Sequence[dict[str, Any]]) -> Branch:
    states: dict[str, int] = {}
    seconds, nbytes, count = 0.0, 0, 0
    for node in members:
        counts = node["states"] if node["kind"] == "map" else {node["state"]["type"]: 1}
        for state, number in counts.items():
            states[state] = states.get(state, 0) + number
        count += node.get("count", 1)
        seconds += node["seconds"] or 0.0
        nbytes += node.get("nbytes") or 0
    runs = list(_runs(members))
    bad = [run for run in runs if run["state"]["type"] in _BAD]
    below = [_single({**run, "nodes": [], "flow": None}) for run in bad]
    unlisted = sum(states.get(state, 0) for state in _BAD) - len(bad)
    if unlisted > 0:
        below.append(Branch(f"… {unlisted} more", "Failed", "FAILED"))
    deeper = [node for run in runs for node in (*run["nodes"], *((run.get("flow") or {}).get("nodes", ())))]
    worst = next((state for state in reversed(_WORDS) if states.get(state)), "PENDING")
    text = ", ".join(f"{states[state]} {state.lower()}" for state in _WORDS if states.get(state))
    return Branch(f"{name} × {count}", text, worst, seconds, nbytes, "", [*below, *branches(deeper)])


def problem(run: dict[str, Any]) -> str:
    """Say why a run failed, where and in which attempt, in one line."""
    error, state = run.get("error"), run["state"]
    text = f"{error['type']}: {error['message']}" if error and error["type"] else str(state["message"] or "")
    where = [f"attempt {run['attempt']}"] if run["attempt"] else []
    where += [f"on {run['worker']}"] if run.get("worker") else []
    where += [str(state["cause"])] if state["cause"] and state["cause"] not in text else []
    return " ".join(text.split()) + (f" ({', '.join(where)})" if where else "")


def draw(found: Sequence[Branch]) -> list[str]:
    """Write branches as aligned lines."""
    rows: list[tuple[str, ...]] = []
    kinds: list[str] = []

    def add(level: Sequence[Branch], stem: str) -> None:
        for branch in level:
            last = branch is level[-1]
            size = human_bytes(branch.nbytes) if branch.nbytes else ""
            sign = "└─ " if last else "├─ "
            rows.append(
                (f"{stem}{sign}{branch.label}", branch.state, duration(branch.seconds), size, branch.note)
            )
            kinds.append(branch.kind)
            add(branch.below, stem + ("   " if last else "│  "))

    add(found, "")
    return columns(rows, states=kinds) if rows else []
