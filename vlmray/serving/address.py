"""Where a server listens: who reaches it, and whether the place is free."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import time

from vlmray.errors import OptionError

_LOG = logging.getLogger(__name__)
_PATIENCE_S = 10.0
_PERIOD_S = 0.2


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken: Serve would retry it for a while and say so in a log file only.

    A server that was killed leaves its port once its cluster has noticed, some seconds later.

    Raises:
        OptionError: It stays taken, or nobody may listen there.
    """
    deadline, is_told = time.monotonic() + _PATIENCE_S, False
    while (error := _find_error(host, port)) is not None:
        if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
            problem = f"{host} --port {port}: {error.strerror}"
            raise OptionError("host", problem, "pass another port") from error
        if not is_told:
            _LOG.warning("port %d is taken; waiting %g s for a server that was killed", port, _PATIENCE_S)
            is_told = True
        time.sleep(_PERIOD_S)


def _find_error(host: str, port: int) -> OSError | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None
