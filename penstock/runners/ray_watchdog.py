"""Ends the processes of a Ray of ours that outlive their driver."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import uuid
from collections.abc import Iterator

import psutil

VARIABLE = "PENSTOCK_RAY_MARK"
GRACE_SECONDS = 3.0

# Reads until the driver is gone, in whatever way. Then it looks until it finds nothing: Ray's head may
# have been about to start a helper. What a user's task has started is not ended, hence the look at the
# command (by a pattern that does not match itself).
#
# A process belongs to this Ray by a mark in its environment, or by its log, which lies in a directory whose
# name ends with the pid of the driver: a helper writes its title over part of its environment.
_SCRIPT = r"""
read line
ours() {
  if [ -d /proc/self ]; then
    grep -q "$mark" /proc/$1/environ 2>/dev/null || ls -l /proc/$1/fd 2>/dev/null | grep -q "$logs"
  else
    ps eww -p $1 2>/dev/null | grep -q "$mark"
  fi
}
command_of() {
  if [ -d /proc/self ]; then tr '\0' ' ' < /proc/$1/cmdline; else ps -o command= -p $1; fi 2>/dev/null
}
mark=$0 logs="/session_[0-9_-]*_$1/"
for look in 1 2 3 4 5 6 7 8 9 10; do
  found=
  for pid in $(ps axo pid= 2>/dev/null || ls /proc | grep '^[0-9]*$'); do
    case $(command_of $pid) in
      */r[a]y/*|ray::*) if ours $pid; then found=yes; kill -9 $pid 2>/dev/null; fi ;;
    esac
  done
  [ $look -gt 1 ] && [ -z "$found" ] && exit
  sleep 0.3
done
"""


class Watchdog:
    """Ends what outlives a driver, or an orderly end of its Ray.

    Ray's own processes die with the driver, and workers seconds later, but two helpers (agents) of
    90 MB each stay for a minute. They are known by a mark in their environment or by their logs, so that also
    those are found which Ray starts while the driver is being interrupted. A shell that reads from the
    driver learns of its death at once.
    """

    def __init__(self) -> None:
        self._mark = f"{VARIABLE}={uuid.uuid4().hex}"
        self._shell: subprocess.Popen[bytes] | None = None
        if os.path.exists("/bin/sh"):
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, self._mark, str(os.getpid())],
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
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command = " ".join(process.cmdline())
                if ("/ray/" in command or command.startswith("ray::")) and self._is_ours(process):
                    found.append(process)
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        name, _, value = self._mark.partition("=")
        if process.environ().get(name) == value:
            return True
        log = re.compile(rf"/session_[0-9_-]*_{os.getpid()}/")
        return any(log.search(one.path) for one in process.open_files())

    def close(self) -> None:
        """Ray was closed, in good order or not: see that nothing is left, and go."""
        _, left = psutil.wait_procs(self.found(), timeout=GRACE_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self._shell is not None:
            self._shell.kill()
            self._shell.communicate()
