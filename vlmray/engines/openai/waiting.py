"""Say in one line what a server keeps whoever asks it waiting for, and renew it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vlmray.engines.openai.shares import State

_LOG = logging.getLogger(__name__)
_PATIENCE_S = 10.0
_LONG_PATIENCE_S = 30.0
"""While nothing is known of how long its answers take."""

_RENEWED_S = 60.0


class Waiting:
    """What was said of a server, so that it is not said again and again.

    Args:
        url: The server.
        limit_s: How long it may be silent.
        say: Takes the line.
    """

    def __init__(self, url: str, limit_s: float, say: Callable[[str], None] = _LOG.warning) -> None:
        self._url = url
        self._limit_s = limit_s
        self._say = say
        self._said, self._said_at = "", 0.0

    def look(self, state: State) -> None:
        """Say what has been awaited for some time; again when that changes, or after a minute."""
        kind, line = self._describe(state)
        if not line:
            self._said = ""
            return
        now = time.monotonic()
        if kind != self._said or now - self._said_at > _RENEWED_S:
            self._say(line)
            self._said, self._said_at = kind, now

    def _describe(self, state: State) -> tuple[str, str]:
        if not state.num_wanted:
            return "", ""
        if state.pause_s > _PATIENCE_S:
            return "pause", f"waiting for {self._url}: it asks to be left alone for {state.pause_s:.0f} s"
        if state.silent_s > max(_PATIENCE_S, min(state.patience_s, _LONG_PATIENCE_S)):
            return "silent", (
                f"waiting for {self._url}: it has said nothing for {state.silent_s:.0f} s and is given up "
                f"after {self._limit_s:g} s"
            )
        if state.unanswered_s > _PATIENCE_S > state.silent_s:
            return "busy", (
                f"waiting for {self._url}: it says that it has too much to do, and is asked again "
                f"({state.num_wanted} requests wait)"
            )
        return "", ""
