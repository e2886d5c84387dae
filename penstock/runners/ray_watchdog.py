"""Ends the processes of a Ray of ours that outlive their driver."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator

import psutil

VARIABLE = "PENSTOCK_RAY_MARK"
GRACE_SECONDS = 3.0

# Reads until the driver is gone, in whatever way. Then it looks until it finds nothing: Ray's head may
# have been about to start a helper. A process belongs to this Ray by its environment; what a user's
# task has started is not ended, hence the look at the command (by a pattern that does not match itself).
_SCRIPT = r"""
read line
for look in 1 2 3 4 5 6 7 8 9 10; do
  if [ -d /proc/self ]; then
    pids=$(grep -l "$0" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3)
  else
    pids=$(ps axeww 2>/dev/null | grep "$0" | awk '{print $1}')
  fi
  found=
  for pid in $pids; do
    if [ -d /proc/self ]; then
      command=$(tr '\0' ' ' < /proc/$pid/cmdline) 2>/dev/null
    else
      command=$(ps -o command= -p $pid)
    fi
    case $command in */r[a]y/*|ray::*) found=yes; kill -9 $pid 2>/dev/null ;; esac
  done
  [ $look -gt 1 ] && [ -z "$found" ] && exit
  sleep 0.3
done
"""


class Watchdog:
    """Ends what outlives a driver, or an orderly end of its Ray.

    Ray's own processes die with the driver, and workers seconds later, but two helpers (agents) of
    90 MB each stay for a minute. They are known by a mark in their environment, so that also those
    are found which Ray starts while the driver is being interrupted. A shell that reads from the
    driver learns of its death at once.
    """

    def __init__(self) -> None:
        self._mark = f"{VARIABLE}={uuid.uuid4().hex}"
        self._shell: subprocess.Popen[bytes] | None = None
        if os.path.exists("/bin/sh"):
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, self._mark],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes that are started in a block."""
        name, _, value = self._mark.partition("=")
        os.environ[name] = value
        try:
            yield
        finally:
            os.environ.pop(name, None)

    def found(self) -> list[psutil.Process]:
        """Return the processes of this Ray that are alive."""
        name, _, value = self._mark.partition("=")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(name) != value:
                    continue
                command = " ".join(process.cmdline())
                if "/ray/" in command or command.startswith("ray::"):
                    found.append(process)
        return found

    def close(self) -> None:
        """Ray was closed, in good order or not: see that nothing is left, and go."""
        _, left = psutil.wait_procs(self.found(), timeout=GRACE_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._shell is not None:
            self._shell.kill()
            self._shell.communicate()
