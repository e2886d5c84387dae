"""Row 7 at random: drivers are killed and stopped while they work; nothing is lost, nothing is there twice."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from penstock.api import embedded, queries
from penstock.api.db import Database
from penstock.api.models import flow_runs, task_runs
from tests.chaos.proof import Proof
from tests.chaos.victims import Victims
from tests.drivers import ROOT

SECONDS = float(os.environ.get("PENSTOCK_TEST_CHAOS", "20"))

CODE = """
import os, sys, time
from penstock import flow, task
from penstock.runtime import task_run

@task
def write(key):
    with open(os.environ["LEDGER"], "a") as file:
        file.write(f"{task_run.id} {task_run.run_count}\\n")
    time.sleep(0.002)  # work:

@flow(flow_run_name="{name}")
def work(name: str):
    for number in range(40):
        write.with_options(task_run_name=f"{name}/{number}")(f"{name}/{number}")
    write.with_options(task_run_name=name + "/{key}").map([f"{name}/m{number}" for number in range(40)]).wait()

for number in range(1000):
    work(f"{sys.argv[1]}-{number}")
"""


@pytest.mark.timeout(180)
def test_row_7_drivers_die_and_stop_at_random(clean_environment: Path, tmp_path: Path) -> None:
    home, ledger, script = clean_environment, tmp_path / "ledger", tmp_path / "driver.py"
    script.write_text(CODE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LEDGER": str(ledger)}

    def start(number: int) -> "subprocess.Popen[str]":
        line = [sys.executable, str(script), f"d{number}"]
        return subprocess.Popen(
            line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        )

    victims = Victims({"driver": (3, start)}, random.Random(7))
    try:
        victims.rage(SECONDS, 0.7)
    finally:
        victims.end()
    assert embedded.drain(home, 30)
    database = Database(f"sqlite:///{home / 'penstock.db'}")
    proof = Proof(database, ledger)
    assert proof.faults == []
    with database.read() as connection:
        rows = connection.execute(sa.select(task_runs.c.name)).scalars().all()
        roots = connection.execute(sa.select(flow_runs.c.state_type, flow_runs.c.rank)).all()
        running = queries.list_runs(connection, states=["RUNNING", "PENDING"], limit=1000)
    database.close()
    print(
        f"{victims.kills} kills, {victims.stops} stops, {len(rows)} task runs, {proof.figures['executions']} executions"
    )
    assert victims.kills >= 3
    assert {attempt for one in proof.executed.values() for attempt in one} == {1}
    assert len(rows) == len(set(rows))  # the name of each tells which call it was
    assert running == []  # the dead are known to be dead
    assert {kind for kind, _ in roots} <= {"COMPLETED", "CRASHED"}
    assert list((home / "spool").glob("*.log")) == []
