"""Where this machine keeps its record: the configured home, or a directory local to the node.

SQLite's write-ahead log and file locks need a local file system, and many home directories of
scientists are on NFS. A run is never refused for that: the record goes to a local directory
instead, always the same one for the same home, so that the next command finds it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

NETWORK = frozenset(
    [
        "9p",
        "afs",
        "afpfs",
        "beegfs",
        "ceph",
        "cifs",
        "cvmfs",
        "fuse.beegfs",
        "fuse.ceph",
        "fuse.glusterfs",
        "fuse.juicefs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "fuse.weka",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "pvfs2",
        "smb3",
        "smbfs",
        "virtiofs",
        "wekafs",
    ]
)
"""Types of file systems that several machines share."""

MOUNTS = Path("/proc/self/mountinfo")
LOCAL = Path("/var/tmp")  # noqa: S108 - survives a reboot; what lies there is checked before use


@dataclass(frozen=True, slots=True)
class Home:
    """A directory that can be written to.

    Attributes
    ----------
    path : Path
        The directory; its ``spool`` exists, with access for its owner only.
    warning : str
        Why it is not the configured one, in one sentence; empty if it is.
    """

    path: Path
    warning: str = ""

    @property
    def spool(self) -> Path:
        """Directory of the event files."""
        return self.path / "spool"


def usable_home(configured: Path) -> Home:
    """Return the configured home, made if need be, or the local directory that stands in for it.

    Parameters
    ----------
    configured : Path
        ``PENSTOCK_HOME``.

    Returns
    -------
    Home
        Never fails: at worst it is a new temporary directory.
    """
    network = network_type(configured)
    if network:
        reason = f"is on a network file system ({network}), where a SQLite store is not safe"
    else:
        try:
            _make(configured)
        except OSError as error:
            reason = f"cannot be written to ({error.strerror or error})"
        else:
            return Home(configured)
    path = _stand_in(configured)
    advice = "set PENSTOCK_HOME to a directory on a local disk to choose another place"
    return Home(path, f"PENSTOCK_HOME {configured} {reason}; runs are recorded in {path} instead ({advice}).")


def network_type(path: Path) -> str:
    """Return the type of the network file system that a path is on; empty if it is a local one."""
    try:
        target = os.path.realpath(path)
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""  # not Linux: no cheap way to know
    best, found = "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two mounts on one point the later one is seen
            best, found = point, after.split(" ")[0]
    return found if found in NETWORK else ""


def _make(home: Path) -> None:
    spool = home / "spool"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    spool.mkdir(mode=0o700, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".probe-", dir=spool)  # rights alone do not tell: EROFS, quotas
    os.close(handle)
    os.unlink(name)


def _stand_in(configured: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(configured)).hexdigest()[:12]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    bases = [
        LOCAL / f"penstock-{os.getuid()}",
        *([Path(runtime) / "penstock"] if runtime else []),
        Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}",
    ]
    for base in bases:
        try:
            base.mkdir(mode=0o700, exist_ok=True)
            status = base.lstat()
            # Anybody may have made a directory of this name in a shared place.
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
                _make(base / digest)
                return base / digest
        except OSError:
            continue
    path = Path(tempfile.mkdtemp(prefix="penstock-"))
    _make(path)
    return path
