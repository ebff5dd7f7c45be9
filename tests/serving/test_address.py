"""A port that is taken is refused, unless it is left soon."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from vlmray.errors import OptionError
from vlmray.serving import address


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def test_a_port_that_stays_taken_is_refused(taken: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(address, "_PATIENCE_S", 0.5)
    port = taken.getsockname()[1]
    with pytest.raises(OptionError, match=f"--port {port}: Address already in use; pass another port"):
        address.check_port("127.0.0.1", port)
    assert caplog.messages == [f"port {port} is taken; waiting 0.5 s for a server that was killed"]


def test_a_port_that_a_killed_server_leaves_is_waited_for(taken: Any) -> None:
    leaving = threading.Timer(0.5, taken.close)
    leaving.start()
    address.check_port("127.0.0.1", taken.getsockname()[1])
    leaving.join()


def test_what_is_no_address_of_this_machine_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match="Cannot assign requested address"):
        address.check_port("203.0.113.1", 8000)


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_who_reaches_a_server(host: str, expected: bool) -> None:
    assert address.is_loopback(host) == expected
