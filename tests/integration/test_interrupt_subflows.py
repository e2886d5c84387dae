"""Ctrl-C while flows run side by side: all of them end, and the process with them."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import time
from pathlib import Path
from penstock import flow, task

@task
def slow(mark):
    Path(mark).touch()
    while True:
        time.sleep(0.01)

@flow
def child(mark):
    return slow.submit(mark).result()

@flow(task_runner="threads")
def night(folder):
    futures = [child.submit(f"{folder}/{number}") for number in range(3)]
    return [future.result() for future in futures]

if __name__ == "__main__":
    import sys
    night(sys.argv[1])
"""


def test_ctrl_c_pressed_twice_at_once(tmp_path: Path, wait_until: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    marks = tmp_path / "marks"
    marks.mkdir()
    with subprocess.Popen(
        [sys.executable, str(script), str(marks)],
        env={**os.environ, "PENSTOCK_HOME": str(tmp_path / "home")},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_until(lambda: len(list(marks.iterdir())) == 3, 30)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
