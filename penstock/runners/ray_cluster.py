"""The one connection to Ray that a process can have: made, shared and left here."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import threading
from typing import Any

import psutil
import ray

from penstock.errors import RunnerUnavailable
from penstock.runners.ray_watchdog import Watchdog

NAMESPACE = "penstock"
ATTACH_SECONDS = 30.0
ANSWER_SECONDS = 5.0
STORE_FLOOR = 512 * 2**20  # a smaller /dev/shm is left to Ray, which then uses the disk

_lock = threading.RLock()
_users = 0
_keeper: _Keeper | None = None


def join(address: str | None, init_kwargs: dict[str, Any]) -> None:
    """Connect this process to Ray, unless it is.

    Parameters
    ----------
    address : str or None
        As for `RayTaskRunner`.
    init_kwargs : dict
        For ``ray.init``.

    Raises
    ------
    RunnerUnavailable
        If there is no Ray at the address, or it cannot be started.
    """
    global _users, _keeper
    with _lock:
        if not ray.is_initialized():
            if _keeper is not None:  # somebody else has shut our Ray down
                _keeper.close()
            _users, _keeper = 0, None
            _keeper = _start(address, init_kwargs)
        _users += 1


def leave() -> None:
    """Give up one use; the last one closes what `join` opened."""
    global _users, _keeper
    with _lock:
        if _users == 0:
            return
        _users -= 1
        if _users == 0 and _keeper is not None:
            keeper, _keeper = _keeper, None
            keeper.close()


def _start(address: str | None, init_kwargs: dict[str, Any]) -> _Keeper:
    address = os.environ.get("RAY_ADDRESS") or address if address in {None, "auto"} else address
    arguments: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address in {None, "local"}:
        keeper = _Keeper(
            {**arguments, **_local(init_kwargs), **init_kwargs, "address": "local"}, loopback=True
        )
        keeper.start()
        return keeper.answer(None, "Ray cannot be started on this machine")
    loopback = _check(str(address))
    keeper = _Keeper({**arguments, **init_kwargs, "address": address}, loopback=loopback)
    keeper.start()
    return keeper.answer(ATTACH_SECONDS, f"Ray at {address} cannot be attached to")


def _local(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Defaults of a cluster that we start: no dashboard, this machine only, a store in memory."""
    arguments: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    if "object_store_memory" not in init_kwargs:
        try:
            shared = shutil.disk_usage("/dev/shm").free  # noqa: S108 - asked for its size only
        except OSError:
            shared = 0
        if shared > STORE_FLOOR:  # Ray takes 30 % of the memory, and the slow /tmp if that does not fit
            arguments["object_store_memory"] = int(min(0.3 * psutil.virtual_memory().total, 0.9 * shared))
    return arguments


class _Keeper(threading.Thread):
    """Calls ``ray.init`` and stays until the end.

    Linux ends the processes of Ray with the *thread* that started them, so this must not be a
    thread of somebody who may end it. Neither does Ray replace the handler of SIGTERM from here.

    Parameters
    ----------
    arguments : dict
        For ``ray.init``.
    loopback : bool
        Have this machine known as 127.0.0.1, and servers listen there only.
    """

    def __init__(self, arguments: dict[str, Any], *, loopback: bool) -> None:
        super().__init__(name="penstock-ray", daemon=True)
        self._arguments = arguments
        self._loopback = loopback
        self._error: BaseException | None = None
        self._watchdog: Watchdog | None = None
        self._connection = ""
        self._abandoned = False
        self._gate = threading.Lock()
        self._ready = threading.Event()
        self._over = threading.Event()

    def run(self) -> None:
        try:
            self._begin()
        except BaseException as error:  # handed to whoever waits; Ray may even raise SystemExit
            self._error = error
        if self._error is not None and self._watchdog is not None:
            self._watchdog.close()
        with self._gate:
            self._ready.set()
            abandoned = self._abandoned
        if self._error is None and abandoned:
            self.close()
        elif self._error is None:
            self._over.wait()

    def _begin(self) -> None:
        marking: Any = contextlib.nullcontext()
        if self._arguments["address"] == "local":
            self._watchdog = Watchdog()  # before there is anything to end: a driver may die at any moment
            marking = self._watchdog.marking()
        with marking:
            _init(self._arguments, loopback=self._loopback)
        self._connection = _connection()

    def answer(self, timeout: float | None, trouble: str) -> _Keeper:
        """Wait until Ray is there.

        Raises
        ------
        RunnerUnavailable
            If it is not.
        """
        try:
            self._ready.wait(timeout)
        finally:
            with self._gate:
                self._abandoned = not self._ready.is_set()
        if self._abandoned:
            message = f"{trouble}: no answer in {timeout:.0f} s."
            raise RunnerUnavailable(message)
        if self._error is not None:
            message = f"{trouble}: {_reason(self._error)}"
            raise RunnerUnavailable(message) from None
        return self

    def close(self) -> None:
        """Close the connection, and the cluster if it was started here."""
        try:
            if _connection() == self._connection:  # else the user has closed ours and opened another
                _shutdown()
        finally:
            if self._watchdog is not None:
                self._watchdog.close()
            self._over.set()


def _reason(error: BaseException) -> str:
    """Say in a sentence why Ray did not start; it hides its reasons in causes of causes."""
    said = f"{error} {error.__cause__}"
    if "InvalidAuthToken" in said:
        return "it asks for a token; with RAY_AUTH_MODE=token Ray uses the one of this account."
    return " ".join(str(error).split())[:500] or type(error).__name__


def _init(arguments: dict[str, Any], *, loopback: bool) -> None:
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),  # the new behaviour, which silences a FutureWarning
    ):
        os.environ.setdefault(name, value)
    # Ray takes 127.0.0.1 for "the address of this machine" and listens on every interface, except
    # where it believes that the platform knows no clusters.
    constants = getattr(getattr(ray, "_private", None), "ray_constants", None)
    before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if loopback and before is not None:
        constants.ENABLE_RAY_CLUSTER = False  # type: ignore[union-attr]
    try:
        ray.init(**arguments)
    finally:
        if loopback and before is not None:
            constants.ENABLE_RAY_CLUSTER = before  # type: ignore[union-attr]
    if not arguments["log_to_driver"]:
        _print_messages(wanted=False)  # of the raylet: it prints what we report ourselves


def _shutdown() -> None:
    if ray.is_initialized():
        try:
            ray.shutdown(wait_for_processes=True)
        except TypeError:  # an older Ray, which does not wait
            ray.shutdown()
    _print_messages(wanted=True)


def _connection() -> str:
    """Name the present connection of this process; empty if there is none."""
    if not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    return f"{getattr(context, 'gcs_address', '')} {context.get_job_id()}"


def _print_messages(*, wanted: bool) -> None:
    worker: Any = getattr(getattr(ray, "_private", None), "worker", None)
    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = wanted


# -- is anybody there? Ray itself takes two minutes to say no, and may end the process ---------


def _check(address: str) -> bool:
    """Refuse an address at which no server of Ray answers; say whether this is loopback only."""
    if address == "auto":
        found = _running_here()
    else:
        found = address.partition("://")[2] or address
    host, _, port = found.rpartition(":")
    host, port = (host.strip("[]"), port) if host else (found, "10001")
    if not port.isdigit():
        message = f"{address!r} is no address of Ray: give host:port, ray://host:port, auto or local."
        raise RunnerUnavailable(message)
    if not _speaks(host, int(port)):
        message = f"no Ray answers at {address}: check the address, or start one with `ray start --head`."
        raise RunnerUnavailable(message)
    if "://" in address or host not in {"localhost", "127.0.0.1", "::1"}:
        return False
    return not _speaks(str(ray.util.get_node_ip_address()), int(port))


def _running_here() -> str:
    from ray._private import services

    try:
        found = services.get_ray_address_from_environment("auto", None)
    except ConnectionError:
        message = "no Ray runs on this machine: start one with `ray start --head`, or give its address."
        raise RunnerUnavailable(message) from None
    return str(found)


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_SETTINGS = 4


def _speaks(host: str, port: int) -> bool:
    """Whether a gRPC server listens there: it answers the preface of HTTP/2 with its settings."""
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return True
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(_PREFACE)
            answer = connection.recv(4)
    except OSError:
        return False
    return len(answer) == 4 and answer[3] == _SETTINGS
