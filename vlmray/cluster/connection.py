"""Connect to the Ray cluster this process belongs to, or start one of its own.

The same call serves a laptop, a cluster's head node and a submitted job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.data  # noqa: F401  # sets up the logger that is silenced below
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import read_ray_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from vlmray.cluster.watch import watch_cluster
from vlmray.errors import RunError, one_line

_HOST_PORT = re.compile(r"[\w.\-\[\]:]+:\d+")
_HTTP2_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # a frame without any; the fourth byte is its kind
_NOBODY = "no Ray cluster answers there; correct it or unset it"
_WRONG_TOKEN = (
    "the cluster wants another token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what it was started with"
)


def connect(log_level: str = "INFO") -> None:
    """Connect to the cluster this process belongs to, or start Ray on this machine.

    RAY_ADDRESS (set inside a submitted job) comes first, then a cluster that `ray start` left running
    on this machine; only when there is neither does Ray start one, which ends with this process.

    Raises:
        ValueError: no cluster answers at RAY_ADDRESS, or it wants another token.
        RunError: Ray does not start.
    """
    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = _address()
    try:
        _init(address, log_level)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        problem = "does not start" if address == "local" else f"at {address} cannot be joined"
        raise RunError(f"Ray {problem}: {one_line(error)}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would end the process midway
    watch_cluster()


def _init(address: str, log_level: str) -> None:
    if log_level == "DEBUG":
        ray.init(address=address, include_dashboard=False)
        return
    # Ray's own messages drown the progress bar: banners, advice, and core-worker lines that name no
    # problem. What goes wrong still reaches the driver, as an exception; all of it is in Ray's log files.
    warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _silent_stderr():  # the core worker announces its log level
        ray.init(
            address=address,
            include_dashboard=False,  # of a cluster started here, which nobody would look at
            logging_level=logging.ERROR,
            log_to_driver=False,
        )


# ---------------------------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------------------------


def _address() -> str:
    """Return the address for `ray.init`, checked: it waits half a minute for a cluster that is gone."""
    given = os.environ.get("RAY_ADDRESS", "").strip()
    if given == "local":
        return given
    # What `ray start` wrote; a killed cluster leaves it behind.
    address = read_ray_address() if given in ("", "auto") else given
    problem = _objection(address) if address else "no cluster runs on this machine"
    if address and problem is None:
        return address
    if given:
        raise ValueError(f"RAY_ADDRESS {given}: {problem}")
    if problem == _WRONG_TOKEN:
        raise ValueError(f"the Ray cluster of this machine ({address}): {problem}, or RAY_ADDRESS=local")
    return "local"


def _objection(address: str) -> str | None:
    """Tell what is wrong with an address; None where a cluster answers that lets this process in."""
    if not _HOST_PORT.fullmatch(address):
        return "expected HOST:PORT of a cluster's head node, auto or local; correct it or unset it"
    if not _speaks_http2(address):
        return _NOBODY
    try:
        with _silent_stderr():
            _greet(address)
    except ray.exceptions.AuthenticationError:
        return _WRONG_TOKEN
    except ray.exceptions.RayError as error:
        return f"{_NOBODY} ({one_line(error)})"
    return None


def _greet(address: str) -> None:
    """Ask a cluster for its name, with the token of this machine where it wants one."""
    try:
        GcsClient(address=address)
    except ray.exceptions.AuthenticationError:
        # Ray itself takes it only for a cluster that it found without being told the address.
        logging.getLogger("ray").setLevel(logging.ERROR)
        if "RAY_AUTH_MODE" in os.environ or not maybe_enable_token_auth_if_token_available(False):
            raise
        GcsClient(address=address)


def _speaks_http2(address: str) -> bool:
    """Tell whether what listens there may be Ray, which is asked in HTTP/2."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _HTTP2_SETTINGS)
            uses_tls = os.environ.get("RAY_USE_TLS", "0") not in ("", "0")
            return uses_tls or connection.recv(9)[3:4] == _HTTP2_SETTINGS[3:4]
    except (OSError, OverflowError, UnicodeError):
        return False


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr meanwhile; exceptions pass."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def driver_node() -> dict[str, str]:
    """Return the label selector of the node this process runs on."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
